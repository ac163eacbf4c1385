"""A saved index comes back whole, and answers only to the model that made it; re-ranking uses the objective itself."""

import numpy as np
import pytest
import torch

from gloria_core.tasks.features import image_features, text_features
from gloria_core.tasks.retrieval import (
    SearchIndexError,
    cosine,
    find_partners,
    fingerprint,
    index_images,
    index_texts,
    load_index,
    matrix,
    pair_similarities,
    report_texts,
    rerank,
)
from gloria_core.tasks.zero_shot import similarities


@pytest.fixture
def texts(model, frame):
    return text_features(model, report_texts(frame), precision="float32")


def test_round_trip_and_search(model, frame, cache, texts, tmp_path):
    index = index_texts(model, frame["study_id"], texts)
    path = index.save(tmp_path / "deep" / "reports.index")
    again = load_index(path, model)
    assert (again.ids, again.texts, again.kind, again.model) == (index.ids, index.texts, "texts", fingerprint(model))
    np.testing.assert_array_equal(again.embedding, index.embedding)
    assert [p.name for p in path.parent.iterdir()] == ["reports.index"]
    features = image_features(model, frame, cache, precision="float32")
    table = again.nearest(model, features.embedding[:2], k=3)
    full = cosine(features.embedding, texts.embedding).block(slice(0, 2), slice(0, 8)).numpy()
    assert table["rank"].tolist() == [1, 2, 3] * 2 and table["query"].tolist() == [0] * 3 + [1] * 3
    np.testing.assert_allclose(table["cosine"].to_numpy().reshape(2, 3), -np.sort(-full, axis=1)[:, :3], atol=1e-6)
    assert table.loc[0, "text"] == texts.texts[int(full[0].argmax())]


def test_image_index_keeps_paths(model, frame, cache):
    features = image_features(model, frame, cache)
    index = index_images(model, frame, features)
    assert index.paths == tuple(frame["images"]) and len(index) == 8
    with pytest.raises(ValueError, match="same order"):
        index_images(model, frame.iloc[::-1], features)
    first = index.nearest(model, features.embedding[3], k=1).iloc[0]
    assert first["id"] == "s3" and first["cosine"] == pytest.approx(1, abs=1e-5)


def test_another_model_is_refused(model, make_model, frame, texts, tmp_path):
    path = index_texts(model, frame["study_id"], texts).save(tmp_path / "x")
    other = make_model()
    assert fingerprint(other) == fingerprint(model)  # same seed, same weights: the same model
    with torch.no_grad():
        next(iter(other.objective.parameters())).view(-1)[0] += 1e-3
    with pytest.raises(SearchIndexError, match="cannot be compared"):
        load_index(path, other)
    with pytest.raises(SearchIndexError, match="cannot be compared"):
        load_index(path).nearest(other, texts.embedding)


def test_the_fingerprint_sees_configuration_and_buffers(model, make_model):
    assert fingerprint(make_model(max_tokens=50)) != fingerprint(model)
    before = fingerprint(model)
    name, buffer = next((n, b) for n, b in model.named_buffers() if b.is_floating_point() and b.numel())
    buffer.add_(1)
    assert fingerprint(model) != before, name


@pytest.mark.parametrize("damage", [b"", b"not an index", None])
def test_damaged_files_are_refused(model, frame, texts, tmp_path, damage):
    path = index_texts(model, frame["study_id"], texts).save(tmp_path / "x")
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    with pytest.raises(SearchIndexError, match="damaged"):
        load_index(path)
    with pytest.raises(SearchIndexError, match="cannot be opened"):
        load_index(tmp_path / "absent")


@pytest.mark.parametrize("objective", ["gloria", "convirt"])
def test_pairs_are_cells_of_the_full_similarity(make_model, frame, cache, objective):
    model = make_model(objective)
    texts = text_features(model, report_texts(frame), precision="float32")
    full = similarities(model, frame, cache, texts, precision="float32")
    pairs = np.array([[3, 1], [0, 0], [3, 6], [7, 2], [3, 1]])
    found = pair_similarities(model, frame, cache, texts, pairs, batch_size=2, precision="float32")
    np.testing.assert_allclose(found, full[pairs[:, 0], pairs[:, 1]], atol=1e-5)


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_reranking_everything_is_the_full_objective(model, frame, cache, texts, direction):
    features = image_features(model, frame, cache, precision="float32")
    n = 4 if direction == "image_to_text" else 8  # four distinct texts
    coarse, asked = find_partners(cosine(features.embedding, texts.embedding), texts.texts, direction=direction, k=n)
    found = rerank(model, frame, cache, texts, coarse, asked, direction=direction, precision="float32")
    full = matrix(similarities(model, frame, cache, texts, precision="float32"))
    expected, _ = find_partners(full, texts.texts, direction=direction, k=n)
    np.testing.assert_allclose(found.rank, expected.rank)
    np.testing.assert_allclose(np.sort(found.scores), np.sort(expected.scores), atol=1e-5)
