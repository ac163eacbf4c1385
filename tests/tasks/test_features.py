import numpy as np
import pytest
import torch

from gloria_core.data.geometry import center_crop
from gloria_core.data.images import to_tensor
from gloria_core.tasks.features import frontal_image, image_batches, image_features, select, text_features

TEXTS = ["Small left effusion.", "No acute finding.", "Large right opacity, no effusion.", "opacity"]


def test_features_equal_a_plain_forward_pass(model, frame, cache):
    found = image_features(model, frame, cache, batch_size=3, precision="float32")
    batches = list(image_batches(model, frame, cache, batch_size=3, precision="float32"))
    pixels = to_tensor(np.stack([center_crop(cache[path], 56) for path in frame["images"]]))
    with torch.no_grad():
        expected = model.eval().encode_images(pixels)
        embedding = model.objective.global_embedder(expected.pooled)
    np.testing.assert_allclose(found.pooled, expected.pooled, atol=1e-5)
    assert [rows for rows, _ in batches] == [slice(0, 3), slice(3, 6), slice(6, 8)]
    torch.testing.assert_close(
        torch.cat([images.regions for _, images in batches]), expected.regions, atol=1e-5, rtol=0
    )
    np.testing.assert_allclose(found.embedding, embedding, atol=1e-5)
    assert found.pooled.dtype == found.embedding.dtype == np.float32


def test_batch_size_and_training_mode_do_not_matter_and_the_mode_returns(model, frame, cache):
    model.train()
    model.text_encoder.eval()
    before = [(name, module.training) for name, module in model.named_modules()]
    statistics = {k: v.clone() for k, v in model.state_dict().items()}
    one = image_features(model, frame, cache, batch_size=1, precision="float32")
    all_at_once = image_features(model, frame, cache, batch_size=64, precision="float32")
    np.testing.assert_allclose(one.pooled, all_at_once.pooled, atol=1e-5)
    assert [(name, module.training) for name, module in model.named_modules()] == before
    assert all(torch.equal(v, statistics[k]) for k, v in model.state_dict().items())


def test_bfloat16_comes_back_as_float32_and_close(model, frame, cache):
    exact = image_features(model, frame, cache, precision="float32")
    rough = image_features(model, frame, cache, precision="bfloat16")
    assert rough.pooled.dtype == np.float32
    assert 0 < np.abs(exact.pooled - rough.pooled).max() < 0.1 * np.abs(exact.pooled).max()


def test_nothing_and_features_that_are_not_finite_are_refused(model, frame, cache):
    with pytest.raises(ValueError, match="empty"):
        image_features(model, frame.iloc[:0], cache)
    with torch.no_grad():
        next(model.image_encoder.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match=r"study s0: .* NaN"):
        image_features(model, frame, cache)


def test_frontal_image_is_the_first_that_is_not_lateral():
    row = {"study_id": "s", "images": "a.png;b.png;c.png", "views": "LATERAL;AP;PA"}
    assert frontal_image(row) == (1, "b.png")
    assert frontal_image({**row, "views": ""}) == (0, "a.png")
    assert frontal_image({**row, "images": "a.png;b.png", "views": "LATERAL;LATERAL"}) == (0, "a.png")


def test_texts_do_not_depend_on_the_batch(model):
    whole = text_features(model, TEXTS, precision="float32")
    parts = text_features(model, TEXTS, batch_size=1, precision="float32")
    assert whole.features.words.shape == parts.features.words.shape
    for name in ("words", "tokens", "sentence"):
        mask = {"words": whole.features.word_mask, "tokens": whole.features.token_mask}.get(name)
        one, other = getattr(whole.features, name), getattr(parts.features, name)
        torch.testing.assert_close(*((one, other) if mask is None else (one[mask], other[mask])), atol=1e-5, rtol=1e-4)
    assert torch.equal(whole.features.word_sentence, parts.features.word_sentence)
    assert torch.equal(whole.features.word_mask, parts.features.word_mask)
    np.testing.assert_allclose(whole.embedding, whole.features.sentence, atol=1e-6)
    assert len(whole) == 4 and whole.batch.words[3] == ("[CLS]", "opacity", "[SEP]")
    torch.testing.assert_close(select(whole.features, [2, 0, 2]).sentence, whole.features.sentence[[2, 0, 2]])


def test_texts_with_padding_of_another_objective(make_model):
    """ConVIRT takes the maximum over tokens: joined batches must not let their padding in."""
    model = make_model("convirt")
    whole = text_features(model, TEXTS, precision="float32")
    parts = text_features(model, TEXTS, batch_size=2, precision="float32")
    np.testing.assert_allclose(whole.embedding, parts.embedding, atol=1e-5)


def test_published_models_read_cleaned_texts(make_model):
    published = make_model(behavior="published")
    found = text_features(published, ["Small, left effusion! 2. No finding."])
    assert "!" not in found.texts[0] and found.texts[0] == found.texts[0].lower()
    assert text_features(published, ["Small, left!"], clean=False).texts == ("Small, left!",)
    # the released rule drops sentences of one word: such a text is read as it is
    assert text_features(published, ["Edema", "No edema."]).texts == ("Edema", "no edema")


def test_text_errors(model):
    with pytest.raises(ValueError, match="no texts"):
        text_features(model, [])
    with pytest.raises(ValueError, match="text ' '"):
        text_features(model, ["opacity", " "])
    model.tokenizer = None
    with pytest.raises(ValueError, match="no tokenizer"):
        text_features(model, TEXTS)
