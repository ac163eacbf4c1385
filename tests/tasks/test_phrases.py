import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
from PIL import Image

from gloria_core.data.geometry import Geometry
from gloria_core.tasks.phrases import (
    Phrase,
    another_text,
    choose_phrases,
    phrases_from_masks,
    phrases_from_prompts,
    region,
    seen,
    swap_sides,
    whole_sentences,
)

TEXT = "Bilateral effusions. Left lower zone opacity."


def _mask(label, path, start, end, image=0, section="impression"):
    return {"label": label, "image": image, "path": path, "spans": [[section, start, end]]}


def _frame(masks, boxes=(), views="PA;LATERAL"):
    row = {
        "study_id": "s",
        "images": "a.png;b.png",
        "views": views,
        "findings": TEXT,
        "impression": TEXT,
        "masks": json.dumps(masks) if masks else "",
        "boxes": json.dumps(list(boxes)) if boxes else "",
    }
    return pd.DataFrame([row])


def test_masks_that_share_words_are_one_phrase():
    masks = [
        _mask("Pleural Effusion", "left.png", 0, 19),
        _mask("Pleural Effusion", "right.png", 0, 19),
        _mask("Lung Opacity", "zone.png", 21, 44),
        _mask("Lung Opacity", "other.png", 0, 5, section="findings"),
        _mask("Edema", "lateral.png", 0, 5, image=1),
        {"label": "Fracture", "image": 0, "path": "silent.png"},
    ]
    found = phrases_from_masks(_frame(masks))
    assert [(p.label, p.words, p.masks, p.image) for p in found] == [
        ("Pleural Effusion", "Bilateral effusions", ("left.png", "right.png"), "a.png"),
        ("Lung Opacity", "Left lower zone opacity", ("zone.png",), "a.png"),
    ]
    assert [p.words for p in phrases_from_masks(_frame(masks), sections=("findings",))] == ["Bilat"]
    # the lateral comes first in the file, the frontal is still the image
    assert phrases_from_masks(_frame(masks, views="LATERAL;AP"))[0].label == "Edema"
    assert phrases_from_masks(_frame([])) == []


def test_boxes_are_grounded_by_their_labels_prompt():
    boxes = [
        {"label": "Mass", "image": 0, "xywh": [1, 2, 3, 4]},
        {"label": "Mass", "image": 0, "xywh": [9, 9, 2, 2]},
        {"label": "Nodule", "image": 0, "xywh": [0, 0, 1, 1]},
    ]
    (found,) = phrases_from_prompts(_frame([], boxes), {"Mass": "lung mass"})
    assert (found.words, found.boxes, found.section) == ("lung mass", ((1, 2, 3, 4), (9, 9, 2, 2)), "prompt")


def test_masks_without_words_are_grounded_by_their_labels_prompt():
    masks = [{"label": "Mass", "image": 0, "path": path} for path in ("a.png", "b.png")]
    boxes = [{"label": label, "image": 0, "xywh": [1, 2, 3, 4]} for label in ("Mass", "Nodule")]
    mass, nodule = phrases_from_prompts(_frame(masks, boxes), {"Mass": "lung mass", "Nodule": "a nodule"})
    assert (mass.words, mass.masks, mass.boxes) == ("lung mass", ("a.png", "b.png"), ())
    assert (nodule.words, nodule.boxes) == ("a nodule", ((1, 2, 3, 4),))


def test_phrases_are_chosen_by_what_is_known():
    data = SimpleNamespace(name="own")
    span = _frame([_mask("Edema", "a.png", 0, 5)])
    found, meaning = choose_phrases(data, span)
    assert found == phrases_from_masks(span) and "words of the reports" in meaning
    boxed = _frame([], [{"label": "Mass", "image": 0, "xywh": [1, 2, 3, 4]}])
    (found,), meaning = choose_phrases(data, boxed)
    assert found.known and found.text == "Mass." and "prompts (set 'labels')" in meaning
    frame = pd.concat([_frame([])] * 3, ignore_index=True)
    frame.loc[1:, ["findings", "impression"]] = ""
    frame["Edema"] = [1.0, 1.0, 0.0]
    found, meaning = choose_phrases(data, frame)
    assert not any(phrase.known for phrase in found) and "no map is scored" in meaning
    assert frame["impression"][0].startswith(found[0].words)
    assert [phrase.text for phrase in found[1:]] == ["Edema.", "Normal."]
    assert len(choose_phrases(data, frame, n_studies=2)[0]) == 2


def test_region_of_masks_and_boxes(tmp_path):
    mask = np.zeros((20, 10), dtype=np.uint8)
    mask[0:4, 0:5] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    geometry = Geometry.fit(20, 10, 20)  # five columns of padding on either side
    phrase = Phrase(0, "A", "impression", "x", ((0, 1),), "a.png", masks=("m.png",), boxes=((8.0, 18.0, 2.0, 2.0),))
    found = region(phrase, geometry, tmp_path, 20)
    expected = np.zeros((20, 20), dtype=bool)
    expected[0:4, 5:10] = True
    expected[18:20, 13:15] = True
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(region(phrase, geometry, tmp_path, 16), expected[2:18, 2:18])
    original = region(phrase, geometry, tmp_path)
    np.testing.assert_array_equal(original, expected[:, 5:15])
    np.testing.assert_array_equal(seen(geometry, 20)[0], [False] * 5 + [True] * 10 + [False] * 5)


def test_a_box_thinner_than_a_pixel_keeps_one(tmp_path):
    phrase = Phrase(0, "A", "prompt", "x", ((0, 1),), "a.png", boxes=((40.0, 80.0, 3.0, 3.0),))
    found = region(phrase, Geometry.fit(200, 200, 20), tmp_path, 20)
    assert found.sum() == 1 and found[8, 4]
    outside = Phrase(0, "A", "prompt", "x", ((0, 1),), "a.png", boxes=((0.0, 0.0, 3.0, 3.0),))
    assert not region(outside, Geometry.fit(200, 200, 20), tmp_path, 10).any()


def test_sides_are_swapped_in_the_phrase_only_and_spans_follow():
    text = "Right effusion, large on the right side. Left opacity on the right."
    spans = ((0, 14), (41, 53))
    swapped = swap_sides(Phrase(0, "A", "impression", text, spans, "a.png"))
    assert swapped.text == "Left effusion, large on the right side. Right opacity on the right."
    assert swapped.words == "Left effusion … Right opacity"
    assert swap_sides(swapped).text == text and swap_sides(swapped).spans == spans
    assert swap_sides(Phrase(0, "A", "impression", text, ((6, 14),), "a.png")) is None
    assert swap_sides(Phrase(0, "A", "impression", "bright LEFTover", ((0, 15),), "a.png")) is None


def test_another_text_is_of_another_label_and_study():
    phrases = [
        Phrase(i, "AB"[i % 2], "impression", f"text {i}", ((0, 4),), f"{i}.png", masks=(f"m{i}",)) for i in range(6)
    ]
    others = another_text(phrases, seed=3)
    for own, other in zip(phrases, others, strict=True):
        assert (other.row, other.image, other.masks, other.label) == (own.row, own.image, own.masks, own.label)
        assert int(other.text[-1]) % 2 != own.row % 2
    assert others == another_text(phrases, seed=3) != another_text(phrases, seed=4)
    assert another_text(phrases[:1]) == [None]


def test_whole_sentences_grow_to_their_ends_and_keep_the_region():
    text = "Heart is large. Small left effusion, no edema. Stable."
    phrase = Phrase(0, "Pleural Effusion", "impression", text, ((22, 35),), "a.png", masks=("m.png",))
    (grown,) = whole_sentences([phrase])
    assert grown.words == "Small left effusion, no edema."
    assert (grown.masks, grown.label, grown.row) == (phrase.masks, phrase.label, phrase.row)
    across = Phrase(0, "Edema", "impression", text, ((9, 14), (47, 53)), "a.png")
    assert whole_sentences([across])[0].words == "Heart is large. … Stable."
