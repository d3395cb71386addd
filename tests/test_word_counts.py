"""Words are those of BERT's normalizer and pre-tokenizer, and all of them are counted."""

from collections import Counter

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from pipelines.data import word_counts
from pipelines.data.word_counts import MAX_WORD_CHARS, can_continue, count_words, most_frequent

parts = st.one_of(
    st.sampled_from([*" \t\n\r\x0b\x0c\x1c\x85\x00.,#'", "\u2028", "\u0301", "The", "3a"]),
    st.sampled_from(["É", "\u3000", "\uac00", "\u4e2d\u6587", "\u200b", "ß", "ΟΣ", "[MASK]"]),
    st.characters(exclude_categories=["Cs"]),
)


def as_bert_does(text: str, lowercase: bool) -> Counter[str]:
    normal = BertNormalizer(lowercase=lowercase).normalize_str(text)
    return Counter(word for word, _ in BertPreTokenizer().pre_tokenize_str(normal))


def counted(table: pa.Table) -> dict[str, int]:
    return dict(zip(table["word"].to_pylist(), table["count"].to_pylist(), strict=True))


@given(
    texts=st.lists(st.lists(parts, max_size=30).map("".join), max_size=5),
    lowercase=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_words_are_what_bert_makes_of_the_whole_text(texts: list[str], lowercase: bool) -> None:
    right = sum((as_bert_does(text, lowercase) for text in texts), Counter())
    assert counted(count_words(texts, lowercase=lowercase)) == right


def test_words_that_bert_never_knows_are_not_counted() -> None:
    longest = "a" * MAX_WORD_CHARS
    assert counted(count_words([f"{longest} {longest}a b"], lowercase=True)) == {longest: 1, "b": 1}


def test_the_most_frequent_words_come_first_and_ties_go_by_code_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts = ["b a \u00e9 z z \uff5e \U0001f602"]
    found = most_frequent(count_words(texts, lowercase=False))["word"].to_pylist()
    assert found == ["z", "a", "b", "\u00e9", "\uff5e", "\U0001f602"]
    monkeypatch.setattr(word_counts, "MAX_WORDS", 3)
    assert most_frequent(count_words(texts, lowercase=False))["word"].to_pylist() == found[:3]


def test_signs_and_ideographs_continue_no_word() -> None:
    assert [letter for letter in "aé1,.[\u4e2d\u3042\uac00" if can_continue(letter)] == [
        *"aé1\u3042\uac00"
    ]
