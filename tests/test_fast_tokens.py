"""The fast tokenizer is used where it is equal to `tokenizers`, and for nearly all English."""

import random
import re
from collections.abc import Sequence
from functools import cache
from itertools import compress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer, Lowercase
from tokenizers.pre_tokenizers import BertPreTokenizer, Whitespace

from pipelines.data import fast_tokens
from pipelines.data.fast_tokens import AGREED, MAX_CHARS, FastTokenizer, dead_ends, fast_tokenizer
from pipelines.data.sentences import split_sentences
from pipelines.data.vocabulary import CONTROL_TOKENS, Vocabulary, VocabularyConfig, bert_tokenizer
from pipelines.data.vocabulary_training import train_vocabulary
from tests.corpus import make_documents

CODES = np.flatnonzero(AGREED).tolist()
LIVING = [code for code in CODES if code < 0x3400]
NEIGHBOURS = ("a{0}a {0} A{0}", "{0}", "{0}{0}b", "中{0}中", "{0}\u0301x", "x,{0}.y")
LANGUAGES = (Path(__file__).parent / "languages.txt").read_text(encoding="utf-8").split("\n")
SIGNS = (
    "zero\u200bwidth soft\u00adhyphen nul\x00 bell\x07 \ufeffmark \ufffd line\u2028end",
    "tab\tnew\r\nline cafe\u0301 \u1100\u1161\u11a8 a\u302e\u0316\u0301\u302fb",
)


def exact(vocabulary: Vocabulary, texts: Sequence[str]) -> list[list[int]]:
    encodings = vocabulary.tokenizer.encode_batch([*texts], add_special_tokens=False)
    return [encoding.ids for encoding in encodings]


def assert_equal(vocabulary: Vocabulary, texts: Sequence[str]) -> None:
    found = [ids.tolist() for ids in vocabulary.encode([*texts])]
    for text, ids, right in zip(texts, found, exact(vocabulary, texts), strict=True):
        assert ids == right, ascii(text)


def spelling(codes: Sequence[int], lowercase: bool) -> list[str]:
    """Return all that the code points become, as pieces that start and that continue a word."""
    normalize = BertNormalizer(lowercase=lowercase).normalize_str
    letters = sorted({letter for code in codes for letter in normalize(chr(code))} - {" "})
    return [*letters, *("##" + letter for letter in letters)]


def assert_fast_equal(fast: FastTokenizer, tokenizer: Tokenizer, texts: list[str]) -> None:
    ids, lengths = fast.encode(texts)
    right = [found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    assert lengths.tolist() == [len(found) for found in right]
    assert ids.tolist() == [i for found in right for i in found]


def assert_agreed(codes: Sequence[int], lowercase: bool) -> None:
    pieces = [*CONTROL_TOKENS, *spelling([*codes, *map(ord, "abxyA\u4e2d,.\u0301")], lowercase)]
    tokenizer = bert_tokenizer(pieces, lowercase=lowercase)
    fast = FastTokenizer(tokenizer)
    for neighbours in NEIGHBOURS:
        texts = [neighbours.format(chr(code)) for code in codes]
        assert fast.knows(texts).all()
        assert_fast_equal(fast, tokenizer, texts)


@cache
def scripts(lowercase: bool, share: float) -> Vocabulary:
    """Return a vocabulary of the living scripts, of which a share of the letters is missing."""
    dice = random.Random(f"{lowercase} {share}")
    pieces = [piece for piece in spelling(LIVING, lowercase) if dice.random() < share]
    letters = [piece for piece in pieces if len(piece) == 1]
    words = {"".join(dice.choices(letters, k=dice.randint(2, 4))) for _ in range(2000)}
    pieces += sorted(words | {"##" + word for word in words})
    tokenizer = bert_tokenizer([*CONTROL_TOKENS, *pieces], lowercase=lowercase)
    return Vocabulary(tokenizer.to_str())


@cache
def english() -> Vocabulary:
    texts = [*LANGUAGES, *(document.text for document in make_documents(60))]
    return train_vocabulary(texts * 2, VocabularyConfig(size=3000))


# Unicode


@pytest.mark.parametrize("lowercase", [True, False])
def test_both_agree_on_the_code_points_of_living_scripts(lowercase: bool) -> None:
    assert_agreed([*LIVING, *CODES[len(LIVING) :: 50]], lowercase)


@pytest.mark.slow
@pytest.mark.parametrize("lowercase", [True, False])
def test_both_agree_on_every_code_point_of_the_table(lowercase: bool) -> None:
    assert_agreed(CODES, lowercase)


def test_every_kind_of_code_point_is_equal_one_way_or_the_other() -> None:
    codes = [*range(0, 0x3400), *range(0x3400, 0x110000, 997)]
    texts = [f"a{chr(code)}b {chr(code)}" for code in codes if not 0xD800 <= code < 0xE000]
    for lowercase in (True, False):
        assert_equal(scripts(lowercase, 1.0), texts)


def test_the_table_holds_letters_of_living_scripts_and_not_what_is_unassigned() -> None:
    assert len(AGREED) == 0x110000
    assert AGREED[[ord(c) for c in "".join([*LANGUAGES, *SIGNS])]].all()
    assert not AGREED[[0x7F, 0x378, 0xD800, 0xDFFF, 0xE000, 0x10FFFF]].any()


neighbours = st.sampled_from([chr(code) for code in LIVING])
traps = st.sampled_from([*" \t\n\x00\x07\x7f.,#[]", "\u0301", "\u0345", "\u200d", "[MASK]", "##"])
few = st.sampled_from([*"abc\u0434\u0436\uac00\uac01\u4e2d ", "\u0308"])


@given(
    texts=st.lists(
        st.lists(st.one_of(neighbours, traps, few, st.characters(exclude_categories=["Cs"]))).map(
            "".join
        ),
        max_size=20,
    ),
    lowercase=st.booleans(),
    share=st.sampled_from([1.0, 0.7]),
)
@settings(max_examples=80, deadline=None)
def test_any_mixture_of_scripts_is_equal(texts: list[str], lowercase: bool, share: float) -> None:
    assert_equal(scripts(lowercase, share), texts)


def test_texts_of_many_languages_are_equal() -> None:
    texts = [*LANGUAGES, *SIGNS, " ".join(LANGUAGES), *(text.upper() for text in LANGUAGES)]
    for vocabulary in (english(), *(scripts(low, 1.0) for low in (True, False))):
        assert_equal(vocabulary, texts)


# Words


def test_words_of_100_characters_are_the_last_that_are_no_unknown() -> None:
    letters = ("a", "é", "e\u0301", "я", "가", "각", "中", ",", "\u0301", "İ", "😂")
    sizes = (33, 34, 50, 51, 99, 100, 101, 102, 300)
    texts = [f"b {letter * size}c" for letter in letters for size in sizes]
    assert_equal(english(), texts)
    assert english().unknown in english().encode(["a" * 101])[0]
    assert english().unknown not in english().encode(["a" * 100])[0]


def test_a_text_that_would_be_cut_for_threads_is_not() -> None:
    vocabulary = english()
    assert vocabulary.encode(["a" * 200_000])[0].tolist() == [vocabulary.unknown]
    assert_equal(vocabulary, ["The ship sails. " * 8000, "é" * MAX_CHARS, "é" * (MAX_CHARS + 1)])


@pytest.mark.parametrize("token", CONTROL_TOKENS)
def test_control_tokens_in_a_text_are_text(token: str) -> None:
    assert_equal(english(), [token, f"a{token}b", f"{token}{token}", token.lower(), token[:-1]])
    assert not {*exact(english(), [token])[0]} & {english().mask, english().cls, english().sep}


@pytest.mark.parametrize("seed", range(3))
def test_vocabularies_with_holes_are_equal(seed: int) -> None:
    dice = random.Random(seed)
    for _ in range(5):
        letters = dice.choice(["abcd", "abcdefgh", "aéя한中,", "ab,.#[", "aMASK["])
        ends = [mark + letter for letter in letters for mark in ("", "##") if dice.random() < 0.7]
        words = ["".join(dice.choices(letters, k=dice.randint(2, 4))) for _ in range(6)]
        marked = [dice.choice(["", "##"]) + word for word in words]
        pieces = dict.fromkeys([*CONTROL_TOKENS, *ends, *marked])
        tokenizer = bert_tokenizer([*pieces], lowercase=dice.random() < 0.5)
        texts = ["".join(dice.choices(letters + " ", k=dice.randint(1, 9))) for _ in range(300)]
        fast = FastTokenizer(tokenizer)
        known = [*compress(texts, fast.knows(texts))]
        assert known
        assert_fast_equal(fast, tokenizer, known)
        assert_equal(Vocabulary(tokenizer.to_str()), texts)


def test_a_letter_that_is_only_within_pieces_goes_the_slow_way() -> None:
    pieces = [*CONTROL_TOKENS, "a", "##a", "b", "ac", "##bc", "é"]
    tokenizer = bert_tokenizer(pieces, lowercase=False)
    assert dead_ends(tokenizer) == {"b", "c"} | set("[PAD]UNKCLSEPMASK") - set("[]")
    assert FastTokenizer(tokenizer).knows(["aa é", "aab", "", "C", "a中"]).tolist() == [
        True,
        False,
        True,
        False,
        True,
    ]
    assert dead_ends(bert_tokenizer([*CONTROL_TOKENS, "a", "##a", "aa"], lowercase=True)) == set()


# Which way


def test_nearly_all_english_goes_the_fast_way() -> None:
    prose = "\u201cNaïve,\u201d the café\u2019s owner said \u2014 it\u2019s £5\u2026 or €6!\n"
    texts = [document.text for document in make_documents(60)]
    sentences = [s for text in [*texts, prose] for s in split_sentences("en", text)]
    fast, _ = fast_tokenizer(english().tokenizer)
    assert fast is not None
    sizes = np.array([len(sentence.encode()) for sentence in sentences])
    assert sizes[fast.knows(sentences)].sum() >= 0.99 * sizes.sum()
    assert fast.knows([*LANGUAGES, *SIGNS]).all()


def test_texts_keep_their_places_whichever_way_each_goes() -> None:
    texts = ["a ship", "\x7f", "", "sails \ue000", "and sinks", "\u0378"]
    assert_equal(english(), texts)
    assert english().encode([]) == []
    flat, lengths = english().encode_flat([])
    assert (flat.dtype, lengths.tolist()) == (english().dtype, [])


@pytest.mark.parametrize(
    ("part", "value", "said"),
    [
        ("normalizer", Lowercase(), "its normalizer is not BERT's"),
        ("normalizer", BertNormalizer(strip_accents=False), "BERT's with other options"),
        ("normalizer", BertNormalizer(clean_text=False), "BERT's with other options"),
        ("normalizer", BertNormalizer(handle_chinese_chars=False), "BERT's with other options"),
        ("pre_tokenizer", Whitespace(), "its pre-tokenizer is not BERT's"),
        ("max_input_chars_per_word", 50, "its pieces are used otherwise"),
    ],
)
def test_other_tokenizers_go_the_slow_way_and_say_why(part: str, value: object, said: str) -> None:
    pieces = english().tokenizer.get_vocab()
    tokenizer = Tokenizer(WordPiece(pieces, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    setattr(tokenizer.model if part.startswith("max") else tokenizer, part, value)
    vocabulary = Vocabulary(tokenizer.to_str())
    assert said in vocabulary.slow_because
    assert_equal(vocabulary, [*LANGUAGES, "x" * 60])


@pytest.mark.parametrize("library", ["tokenizers", "tokie"])
def test_other_versions_than_the_measured_ones_go_the_slow_way_and_say_why(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert english().slow_because == ""
    monkeypatch.setitem(fast_tokens.MEASURED, library, "0.0.1")
    vocabulary = Vocabulary(english().json)
    said = rf"{library} is \d\S+, and .* measured with 0\.0\.1"
    assert re.fullmatch(said, vocabulary.slow_because)
    assert_equal(vocabulary, LANGUAGES)


def test_a_fast_tokenizer_that_fails_the_self_check_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # As if the table were of other versions: of an unassigned code point the two disagree.
    wrong = AGREED.copy()
    wrong[0x382] = True
    monkeypatch.setattr(fast_tokens, "AGREED", wrong)
    pieces = [*english().tokenizer.get_vocab(), "\u0382", "##\u0382"]
    vocabulary = Vocabulary(bert_tokenizer(pieces, lowercase=True).to_str())
    assert vocabulary.slow_because == "the fast tokenizer has other ids for a sample of the pieces"
    assert_equal(vocabulary, [*LANGUAGES, "a\u0382"])
