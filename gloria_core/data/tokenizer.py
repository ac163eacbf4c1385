"""Word-piece tokenizers, and texts as token ids that know their word and their sentence.

Tokenizers are trained offline, loaded from a folder, a vocabulary file or the hub, and stored as JSON.

The word rule is GLoRIA's (Huang et al., ICCV 2021, `text_model.py::aggregate_tokens`): a piece that begins with "##"
belongs to the word before it, `[CLS]` and `[SEP]` are words of their own, nothing counts after the first `[SEP]`.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from gloria_core.data.packages import PACKAGE, package_folder
from gloria_core.data.reports import ReportError, Span, sentences
from gloria_core.types import TextBatch

# A thread pool in the parent makes the library warn in every forked loader worker; training a vocabulary is quick.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SPECIALS = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
CLINICAL_BERT = "emilyalsentzer/Bio_ClinicalBERT"


class TokenizerError(ValueError):
    """A tokenizer cannot be found or used; the message says what would work."""


def train_wordpiece(
    texts: Iterable[str], *, vocab_size: int = 2000, min_frequency: int = 2, folder: Path | str | None = None
) -> PreTrainedTokenizerFast:
    """Trains a lower-casing BERT WordPiece tokenizer; the same texts in any order give the same tokenizer.

    The ids 0 to 4 are `[PAD] [UNK] [CLS] [SEP] [MASK]`, then every character (first and continued) in code order, then
    the merged pieces. `folder` also receives the files that `load_tokenizer(folder)` reads.

    Raises: TokenizerError when there is no text, or the alphabet alone exceeds `vocab_size`.
    """
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    words = [word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))]
    if not words:
        raise TokenizerError("no word to train a tokenizer on; give it the training reports")
    # The trainer numbers continued characters in the order of a randomly seeded hash map, and breaks ties between
    # merges by number. Numbering every character beforehand is what makes it repeatable.
    first = sorted({word[0] for word in words})
    continued = sorted({f"##{character}" for word in words for character in word[1:]})
    fixed = [*SPECIALS.values(), *first, *continued]
    if len(fixed) > vocab_size:
        raise TokenizerError(f"vocab_size={vocab_size} is smaller than specials and alphabet ({len(fixed)})")
    trained = Tokenizer(WordPiece(unk_token="[UNK]"))
    trained.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    sizes = {"vocab_size": vocab_size, "min_frequency": min_frequency}
    trained.train_from_iterator(words, WordPieceTrainer(**sizes, special_tokens=fixed, show_progress=False))
    vocabulary = dict(sorted(trained.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1]))
    tokenizer = BertTokenizer(vocab=vocabulary, do_lower_case=True, model_max_length=512)
    if folder is not None:
        tokenizer.save_pretrained(str(folder))
    return tokenizer


def load_tokenizer(name_or_path: str | Path, *, lowercase: bool = True) -> PreTrainedTokenizerFast:
    """Loads a tokenizer from a folder, a `vocab.txt` or `tokenizer.json` file, "package:<pip package>", or the hub.

    `lowercase` applies where a bare vocabulary is read, and to Bio_ClinicalBERT, whose cased vocabulary the papers use
    with lower-cased text.

    Raises: TokenizerError (or PackageError) naming the remedy when nothing can be loaded, or when `[CLS]`, `[SEP]`,
    `[PAD]` or `[UNK]` is missing.
    """
    path = Path(name_or_path)
    if str(name_or_path).startswith(PACKAGE):
        path = package_folder(str(name_or_path).removeprefix(PACKAGE), "vocab.txt")
    if path.is_dir() and not any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        if not (path / "vocab.txt").is_file():
            raise TokenizerError(f"{path} has neither tokenizer.json, tokenizer_config.json nor vocab.txt")
        path /= "vocab.txt"
    if path.is_file():
        tokenizer = _from_file(path, lowercase=lowercase)
    else:
        options = {"do_lower_case": lowercase} if str(name_or_path) == CLINICAL_BERT else {}
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path if path.is_dir() else name_or_path), **options)
        except (OSError, ValueError) as error:
            cause = "HF_HUB_OFFLINE is set" if os.environ.get("HF_HUB_OFFLINE") else type(error).__name__
            fault = f"no tokenizer '{name_or_path}': no local folder or file, and not given by the hub ({cause})"
            raise TokenizerError(f"{fault}; give a folder with tokenizer files, or a vocab.txt") from error
    missing = [key for key in ("cls_token", "sep_token", "pad_token", "unk_token") if getattr(tokenizer, key) is None]
    if missing or not tokenizer.is_fast:
        raise TokenizerError(f"{name_or_path} is no BERT-like fast tokenizer ({', '.join(missing) or 'no offsets'})")
    return tokenizer


def _from_file(path: Path, *, lowercase: bool) -> PreTrainedTokenizerFast:
    if path.suffix == ".json":
        return PreTrainedTokenizerFast(tokenizer_file=str(path), model_max_length=512, **SPECIALS)
    vocabulary = WordPiece.read_file(str(path))
    if len(vocabulary) <= max(vocabulary.values(), default=-1):
        raise TokenizerError(f"{path} lists a token twice; a vocabulary file has one token a line")
    missing = [token for token in SPECIALS.values() if token not in vocabulary]
    if missing:
        raise TokenizerError(f"{path} lacks {', '.join(missing)}; a BERT vocabulary has all five specials")
    return BertTokenizer(vocab=vocabulary, do_lower_case=lowercase, model_max_length=512)


def tokenizer_to_json(tokenizer: PreTrainedTokenizerFast) -> str:
    """The whole tokenizer as one JSON text, for a checkpoint; `tokenizer_from_json` gives it back."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["truncation"] = backend["padding"] = None  # traces of the last call, no part of the tokenizer
    specials = {key: getattr(tokenizer, key) for key in SPECIALS if getattr(tokenizer, key) is not None}
    content = {"backend": backend, "specials": specials, "model_max_length": min(tokenizer.model_max_length, 10**6)}
    return json.dumps(content, ensure_ascii=False)


def tokenizer_from_json(text: str) -> PreTrainedTokenizerFast:
    """Inverse of `tokenizer_to_json`. Raises TokenizerError for a text of another kind."""
    try:
        content = json.loads(text)
        backend = Tokenizer.from_str(json.dumps(content["backend"]))
        length = int(content["model_max_length"])
        return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=length, **content["specials"])
    except Exception as error:  # the tokenizers library raises bare Exception
        raise TokenizerError(f"not a stored tokenizer: {error}") from error


def tokenize(
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    max_tokens: int = 97,
    sentence_spans: Sequence[Sequence[Span]] | None = None,
    allow_empty: bool = False,
    names: Sequence[str] | None = None,
) -> TextBatch:
    """Tokenises N texts, padded to the longest of them and cut to `max_tokens` pieces, `[SEP]` kept (GLoRIA: 97).

    `sentence_spans[i]` are the (start, end) sentences of text i; by default those of `reports.sentences`. A word
    belongs to the sentence in which it begins; a word outside every span has sentence -1. The words of the result are
    slices of the text. Special tokens that are spelt out in a text ("[SEP]") are read as ordinary characters.

    Raises: ReportError for a text without any token (named by `names[i]`, else by its number) unless `allow_empty`;
    ValueError for max_tokens < 3.
    """
    if max_tokens < 3:
        raise ValueError(f"max_tokens is {max_tokens}; it must hold [CLS], one piece and [SEP]")
    backend = tokenizer.backend_tokenizer
    # a call of the tokenizer itself sets these three anew
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    rows, words, spans = [], [], []
    for number, text in enumerate(texts):
        # one by one: the batch call starts a thread pool, which forked loader workers cannot use
        encoded = backend.encode(text, add_special_tokens=False)
        encoded.truncate(max_tokens - 2)
        if not encoded.ids and not allow_empty:
            name = names[number] if names is not None else f"text {number}"
            raise ReportError(f"{name} has no word: {text[:40]!r}. Exclude it or choose another section (text='both')")
        n_words = max(encoded.word_ids, default=-1) + 1
        word_spans = [encoded.word_to_chars(word) for word in range(n_words)]
        limits = sentences(text) if sentence_spans is None else sentence_spans[number]
        sentence_of = [
            next((number for number, (begin, end) in enumerate(limits) if begin <= start < end), -1)
            for start, _ in word_spans
        ]
        ids = [tokenizer.cls_token_id, *encoded.ids, tokenizer.sep_token_id]
        word_ids = [0, *(word + 1 for word in encoded.word_ids), n_words + 1]
        rows.append(torch.tensor([ids, word_ids, [-1, *(sentence_of[word] for word in encoded.word_ids), -1]]).T)
        words.append((tokenizer.cls_token, *(text[a:b] for a, b in word_spans), tokenizer.sep_token))
        spans.append(((0, 0), *word_spans, (0, 0)))
    ids, word_ids, sentence_ids = pad_sequence(rows, batch_first=True, padding_value=-1).permute(2, 0, 1).contiguous()
    ids = ids.masked_fill(word_ids < 0, tokenizer.pad_token_id)
    return TextBatch(
        input_ids=ids,
        attention_mask=(word_ids >= 0).long(),
        token_type_ids=torch.zeros_like(ids),
        word_ids=word_ids,
        sentence_ids=sentence_ids,
        unknown=(ids == tokenizer.unk_token_id) & (word_ids >= 0),
        words=tuple(words),
        spans=tuple(spans),
    )


def vocabulary_list(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Token strings by id; ids that the vocabulary leaves out are empty strings."""
    count = max(tokenizer.get_vocab().values()) + 1
    return [token or "" for token in tokenizer.convert_ids_to_tokens(range(count))]


def text_batch_from_ids(
    input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, *, vocabulary: Sequence[str]
) -> TextBatch:
    """Word ids by GLoRIA's published scan (`text_model.py::aggregate_tokens`), for token ids without their text.

    A piece that does not continue a word ("##...") opens one; so a continuation right after `[CLS]` joins the `[CLS]`
    word, as in the released loop. The first `[SEP]` is a word of its own and ends the text; later tokens have word -1.
    All words are sentence 0. `spans` stays empty.

    Shape: input_ids, attention_mask, token_type_ids (N, L). `vocabulary`: the token of each id.
    Raises: ValueError for a row without `[SEP]` (the released loop loses its last word and counts padding).
    """
    n, length = input_ids.shape
    is_sep = input_ids == vocabulary.index("[SEP]")
    without = (~is_sep.any(dim=1)).nonzero().flatten().tolist()
    if without:
        raise ValueError(f"rows {without} have no [SEP]; truncate texts so that [SEP] is kept")
    position = torch.arange(length, device=input_ids.device).expand(n, length)
    end = is_sep.long().argmax(dim=1, keepdim=True)
    valid = position <= end
    continues = torch.tensor([token.startswith("##") for token in vocabulary], device=input_ids.device)
    opens = valid & (~continues[input_ids] | (position == 0))
    word_ids = (opens.long().cumsum(dim=1) - 1).masked_fill(~valid, -1)
    words = []
    for ids, numbers in zip(input_ids.tolist(), word_ids.tolist(), strict=True):
        pieces = [""] * (max(numbers) + 1)
        for token, word in zip(ids, numbers, strict=True):
            if word >= 0:
                pieces[word] += vocabulary[token].removeprefix("##")
        words.append(tuple(pieces))
    return TextBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        token_type_ids=token_type_ids,
        word_ids=word_ids,
        sentence_ids=torch.where((word_ids > 0) & (position != end), 0, -1),
        unknown=(input_ids == vocabulary.index("[UNK]")) & valid,
        words=tuple(words),
    )
