"""Word-piece tokenizers: trained offline, loaded from a folder, a vocabulary file or the hub, stored as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gloria_core.data.packages import PACKAGE, folder_with

SPECIALS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
CLINICAL_BERT = "emilyalsentzer/Bio_ClinicalBERT"


class TokenizerError(ValueError):
    """A tokenizer cannot be found or used; the message says what would work."""


def _wordpiece(vocabulary: dict[str, int], *, lowercase: bool) -> PreTrainedTokenizerFast:
    """The BERT pipeline over a given vocabulary: clean, lower-case, split at blanks and punctuation, word pieces."""
    missing = [token for token in SPECIALS.values() if token not in vocabulary]
    if missing:
        raise TokenizerError(f"the vocabulary lacks {', '.join(missing)}; a BERT vocabulary has all five specials")
    backend = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=512, **SPECIALS)


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
    trainer = WordPieceTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=fixed, show_progress=False
    )
    with _one_thread():
        trained.train_from_iterator(words, trainer)
    vocabulary = dict(sorted(trained.get_vocab(with_added_tokens=False).items(), key=lambda item: item[1]))
    tokenizer = _wordpiece(vocabulary, lowercase=True)
    if folder is not None:
        tokenizer.save_pretrained(str(folder))
    return tokenizer


@contextmanager
def _one_thread():
    """Keeps the library's thread pool unused: a pool in the parent makes it warn in every forked loader worker."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def load_tokenizer(name_or_path: str | Path, *, lowercase: bool = True) -> PreTrainedTokenizerFast:
    """Loads a tokenizer from a folder, a `vocab.txt` or `tokenizer.json` file, "package:<pip package>", or the hub.

    `lowercase` applies where a bare vocabulary is read, and to Bio_ClinicalBERT, whose cased vocabulary the papers use
    with lower-cased text.

    Raises: TokenizerError naming the remedy when nothing can be loaded, or when `[CLS]`, `[SEP]`, `[PAD]` or `[UNK]`
    is missing.
    """
    path = Path(name_or_path)
    if str(name_or_path).startswith(PACKAGE):
        path = _in_package(str(name_or_path).removeprefix(PACKAGE))
    if path.is_file():
        tokenizer = _from_file(path, lowercase=lowercase)
    elif path.is_dir() and not any((path / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json")):
        if not (path / "vocab.txt").is_file():
            raise TokenizerError(f"{path} has neither tokenizer.json, tokenizer_config.json nor vocab.txt")
        tokenizer = _from_file(path / "vocab.txt", lowercase=lowercase)
    else:
        options = {"do_lower_case": lowercase} if str(name_or_path) == CLINICAL_BERT else {}
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path if path.is_dir() else name_or_path), **options)
        except (OSError, ValueError) as error:
            raise TokenizerError(
                f"no tokenizer '{name_or_path}': it is no local folder or file, and the hub did not give it "
                f"({'HF_HUB_OFFLINE is set' if os.environ.get('HF_HUB_OFFLINE') else type(error).__name__}). "
                "Give a local folder with the model's tokenizer files, or its vocab.txt"
            ) from error
    lacking = [key for key in ("cls_token", "sep_token", "pad_token", "unk_token") if getattr(tokenizer, key) is None]
    if lacking or not tokenizer.is_fast:
        raise TokenizerError(f"{name_or_path} is no BERT-like fast tokenizer ({', '.join(lacking) or 'no offsets'})")
    return tokenizer


def _in_package(package: str) -> Path:
    try:
        folder = folder_with(package, "vocab.txt")
    except ModuleNotFoundError as error:
        raise TokenizerError(str(error)) from None
    if folder is None:
        raise TokenizerError(f"package {package!r} holds no vocabulary (vocab.txt)")
    return folder


def _from_file(path: Path, *, lowercase: bool) -> PreTrainedTokenizerFast:
    if path.suffix == ".json":
        return PreTrainedTokenizerFast(tokenizer_file=str(path), model_max_length=512, **SPECIALS)
    lines = path.read_text(encoding="utf-8").split("\n")
    tokens = [line.rstrip("\r") for line in (lines[:-1] if lines[-1] == "" else lines)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        raise TokenizerError(f"{path} lists a token twice; a vocabulary file has one token a line")
    return _wordpiece(vocabulary, lowercase=lowercase)


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
        specials = {key: content["specials"][key] for key in SPECIALS if key in content["specials"]}
        length = int(content["model_max_length"])
    except Exception as error:  # the tokenizers library raises bare Exception
        raise TokenizerError(f"not a stored tokenizer: {error}") from error
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=length, **specials)
