"""Vocabularies: the same from the same texts, without control tokens in them, and whole."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from transformers import BertTokenizer

from pipelines.data.vocabulary import (
    CONTROL_TOKENS,
    Vocabulary,
    VocabularyConfig,
    load_vocabulary,
)
from pipelines.data.vocabulary_training import train_vocabulary
from pipelines.errors import DataError, UserError
from tests.corpus import make_documents

TEXTS = [document.text for document in make_documents(60)]
CONFIG = VocabularyConfig(size=700, alphabet=64)

TRAIN = """
from pipelines.data.word_counts import count_words
from pipelines.data.wordpiece_training import learn_pieces
from tests.corpus import make_documents
words = count_words([document.text for document in make_documents(60)], lowercase=True)
print(*learn_pieces(words, size=695, alphabet=64, min_frequency=2))
"""


def decode(vocabulary: Vocabulary, text: str) -> list[str]:
    ids = vocabulary.encode([text])[0].tolist()
    return [str(vocabulary.tokenizer.id_to_token(i)) for i in ids]


def foreign(**pieces: int) -> Tokenizer:
    """Return a WordPiece tokenizer as other tools write it: it knows control tokens in text."""
    vocab = {token: i for i, token in enumerate(CONTROL_TOKENS)} | pieces
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    return tokenizer


def test_t5_training_is_the_same_in_every_process() -> None:
    pieces = train_vocabulary(TEXTS, CONFIG).tokenizer.get_vocab()
    made = sorted(pieces, key=lambda piece: pieces[piece])[len(CONTROL_TOKENS) :]
    for seed in ("0", "1"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", TRAIN]
        assert subprocess.check_output(command, env=environment, text=True).split() == made


def test_control_tokens_come_first_and_are_never_drawn() -> None:
    vocabulary = train_vocabulary(TEXTS, CONFIG)
    first = [vocabulary.tokenizer.id_to_token(i) for i in range(5)]
    assert tuple(first) == CONTROL_TOKENS
    ids = [vocabulary.pad, vocabulary.unknown, vocabulary.cls, vocabulary.sep, vocabulary.mask]
    assert ids == [0, 1, 2, 3, 4]
    assert vocabulary.ordinary.tolist() == list(range(5, vocabulary.size))


def test_continuations_are_the_pieces_with_their_mark() -> None:
    vocabulary = train_vocabulary(TEXTS, CONFIG)
    marked = [
        str(vocabulary.tokenizer.id_to_token(i)).startswith("##") for i in range(vocabulary.size)
    ]
    assert vocabulary.continues.tolist() == marked
    assert 20 < sum(marked) < vocabulary.size - 20


def test_a_word_is_one_start_and_its_continuations() -> None:
    vocabulary = train_vocabulary(TEXTS, CONFIG)
    assert decode(vocabulary, "The harbour") == ["the", "harbour"]
    pieces = decode(vocabulary, "unharboured")
    assert len(pieces) > 1
    assert pieces[0] + "".join(piece.removeprefix("##") for piece in pieces[1:]) == "unharboured"


@pytest.mark.parametrize("size", [300, 700])
def test_the_size_is_a_bound_whatever_the_alphabet(size: int) -> None:
    ideographs = ["".join(chr(0x400 + i) + chr(0x401 + i) + " " for i in range(500))] * 3
    config = VocabularyConfig(size=size, alphabet=600)
    assert 250 < train_vocabulary([*TEXTS, *ideographs], config).size <= size


def test_the_alphabet_is_the_most_frequent_characters() -> None:
    texts = ["aaaa bbbb cc", "aa bb d"]
    vocabulary = train_vocabulary(texts, VocabularyConfig(alphabet=2))
    assert decode(vocabulary, "abba") != ["[UNK]"]
    assert decode(vocabulary, "c d") == ["[UNK]", "[UNK]"]


def test_case_and_accents_are_folded_only_where_asked_for() -> None:
    folded = train_vocabulary(TEXTS, CONFIG)
    assert decode(folded, "THE h\u00e1rbour") == decode(folded, "the harbour")
    kept = train_vocabulary(TEXTS, VocabularyConfig(lowercase=False))
    assert decode(kept, "The") == ["The"]
    assert decode(kept, "THE") != decode(kept, "the")


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_t6_control_tokens_in_text_are_text(token: str) -> None:
    trained = train_vocabulary([*TEXTS, "[ pad unk cls sep mask ]\n" * 9], CONFIG)
    made_elsewhere = Vocabulary(foreign(a=5, b=6).to_str())
    for vocabulary in (trained, made_elsewhere):
        for text in (token, f"a{token}b", f"a {token} b"):
            assert set(decode(vocabulary, text)) & set(CONTROL_TOKENS) <= {"[UNK]"}
    assert decode(trained, token) == ["[", token.strip("[]").lower(), "]"]


def test_t6_a_tokenizer_made_elsewhere_cuts_and_pads_nothing() -> None:
    tokenizer = foreign(a=5)
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=8)
    found = Vocabulary(tokenizer.to_str()).encode(["a a a a a", "a"])
    assert [ids.tolist() for ids in found] == [[5] * 5, [5]]


def test_t6_every_letter_and_digit_of_unicode_has_a_token() -> None:
    vocabulary = train_vocabulary(TEXTS, CONFIG)
    characters = [c for c in map(chr, range(0x110000)) if c.isalnum()]
    assert len(characters) > 100_000
    assert all(len(ids) for ids in vocabulary.encode(characters))


def test_an_endless_word_is_one_unknown() -> None:
    vocabulary = train_vocabulary(TEXTS, CONFIG)
    assert decode(vocabulary, "a" * 1_000_000) == ["[UNK]"]
    assert decode(vocabulary, "a" * 101) == ["[UNK]"]
    assert len(decode(vocabulary, "a" * 100)) > 1


def test_a_vocabulary_travels_whole() -> None:
    vocabulary = train_vocabulary(TEXTS, CONFIG)
    again = pickle.loads(pickle.dumps(vocabulary))
    assert again.json == vocabulary.json
    assert (again.size, again.dtype) == (vocabulary.size, vocabulary.dtype)
    assert np.array_equal(again.continues, vocabulary.continues)
    assert np.array_equal(again.ordinary, vocabulary.ordinary)
    for first, second in zip(again.encode(TEXTS), vocabulary.encode(TEXTS), strict=True):
        assert np.array_equal(first, second)


def test_a_vocabulary_survives_its_file(tmp_path: Path) -> None:
    vocabulary = train_vocabulary(TEXTS, CONFIG)
    path = tmp_path / "tokenizer.json"
    path.write_text(vocabulary.json, encoding="utf-8")
    assert load_vocabulary(path).json == vocabulary.json


@pytest.mark.parametrize(("size", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_ids_are_as_wide_as_the_vocabulary_needs(size: int, dtype: type) -> None:
    vocabulary = Vocabulary(foreign(**{f"w{i}": i for i in range(5, size)}).to_str())
    assert vocabulary.size == size
    assert vocabulary.dtype == dtype
    ids = vocabulary.encode([f"w{size - 1}"])[0]
    assert ids.dtype == dtype
    assert ids.tolist() == [size - 1]


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_cut_file_is_refused(tmp_path: Path, kept: float) -> None:
    path = tmp_path / "tokenizer.json"
    text = train_vocabulary(TEXTS, CONFIG).json
    path.write_text(text[: int(kept * len(text))], encoding="utf-8")
    with pytest.raises(DataError, match=r"tokenizer\.json is not a vocabulary of ours"):
        load_vocabulary(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe", "utf-8"),
        (b"{}", "Model missing"),
        (b"[]", "not a vocabulary"),
        (b'{"model": {"type": "WordPiece"}}', "not a vocabulary"),
        (Tokenizer(BPE({"a": 0}, [])).to_str().encode(), "not WordPiece"),
        (Tokenizer(WordPiece({"a": 0, "[PAD]": 1})).to_str().encode(), r"lacks \[UNK\], \[CLS\]"),
    ],
)
def test_a_file_that_is_no_vocabulary_of_ours_is_refused(
    tmp_path: Path, content: bytes, said: str
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        load_vocabulary(path)


def test_a_missing_file_is_refused_with_the_way_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no vocabulary at .*: train one with rayssl vocab --out"):
        load_vocabulary(tmp_path / "tokenizer.json")


def test_a_size_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(ValueError, match="vocabulary size must be at least 300, got 299"):
        VocabularyConfig(size=299)


def test_the_file_is_plain_json_without_tokens_to_be_found_in_text() -> None:
    fields = json.loads(train_vocabulary(TEXTS, CONFIG).json)
    assert fields["model"]["type"] == "WordPiece"
    assert fields["added_tokens"] == []


# Vocabularies made elsewhere

BERT = [
    *("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]"),
    *"!,.'#-abcdefghijklmnopqrstuvwxyz\u4e2d",
    *("##" + letter for letter in "abcdefghijklmnopqrstuvwxyz"),
    *("the", "ship", "##s", "sail", "##ing", "un", "THE", "Ship", "\u2028"),
]
PROSE = [
    "The ships' sailing, unsailing!",
    "THE Ship na\u00efve \u4e2d\u4e2d [MASK] #tag ab\u0301c",
    "a" * 101 + " b" * 3,
    "",
]


def write_bert(folder: Path, pieces: list[str], line_end: str = "\n") -> Path:
    path = folder / "vocab.txt"
    path.write_bytes("".join(piece + line_end for piece in pieces).encode())
    return path


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_vocab_txt_gives_the_ids_of_transformers(
    tmp_path: Path, lowercase: bool, line_end: str
) -> None:
    pieces = list(dict.fromkeys(BERT))
    found = load_vocabulary(write_bert(tmp_path, pieces, line_end), lowercase=lowercase)
    ids = {piece: i for i, piece in enumerate(pieces)}
    reference = BertTokenizer(vocab=ids, do_lower_case=lowercase)
    # There a literal control token is one, here it is text.
    texts = [text.replace("[MASK]", "mask") for text in PROSE]
    right = [reference.encode(text, add_special_tokens=False) for text in texts]
    assert [encoded.tolist() for encoded in found.encode(texts)] == right
    assert found.size == len(pieces)
    assert (found.pad, found.mask) == (0, 5)
    assert found.mask not in found.encode(PROSE)[1]


@pytest.mark.parametrize(
    ("lowercase", "strip_accents", "right"),
    [(True, True, [5, 6]), (True, False, [5, 7]), (False, False, [8, 7])],
)
def test_the_options_of_a_given_tokenizer_hold(
    tmp_path: Path, lowercase: bool, strip_accents: bool, right: list[int]
) -> None:
    tokenizer = foreign(na=5, naive=6, **{"na\u00efve": 7, "Na": 8})
    tokenizer.normalizer = BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    assert load_vocabulary(path).encode(["Na na\u00efve"])[0].tolist() == right


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([*CONTROL_TOKENS, "a", "b", "a"], "'a' is on line 6 and on line 8"),
        ([*CONTROL_TOKENS, "a", "", ""], "'' is on line 7 and on line 8"),
        ([*CONTROL_TOKENS[:-1], "a"], r"its vocabulary lacks \[MASK\]"),
        ([], "lacks"),
    ],
)
def test_a_vocab_txt_that_is_not_whole_is_refused(
    tmp_path: Path, pieces: list[str], said: str
) -> None:
    with pytest.raises(DataError, match=rf"vocab\.txt is not a vocabulary of ours: .*{said}"):
        load_vocabulary(write_bert(tmp_path, pieces))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"a": 6}, "no piece has the id 5, before 'a' with 6"),
        ({"a": 5, "b": 5}, "its pieces '[ab]' and '[ab]' share the id 5"),
        ({"a": 2}, "share the id 2"),
    ],
)
def test_holes_and_doubles_among_the_ids_are_named(
    tmp_path: Path, changes: dict[str, int], said: str
) -> None:
    described = json.loads(foreign().to_str())
    described["model"]["vocab"] |= changes
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(described))
    with pytest.raises(DataError, match=said):
        load_vocabulary(path)


def test_another_word_for_unknown_is_refused(tmp_path: Path) -> None:
    described = json.loads(foreign(a=5).to_str())
    described["model"]["unk_token"] = "a"
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(described))
    with pytest.raises(DataError, match=r"its unknown words are a, not \[UNK\]"):
        load_vocabulary(path)
