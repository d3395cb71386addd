"""How often each word is seen, a word being what BERT's normalizer and pre-tokenizer make."""

from collections import Counter
from collections.abc import Iterable

import pyarrow as pa
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

MAX_WORDS = 1_000_000
"""How many words, the most frequent ones, a vocabulary is trained on.

That is far more than any vocabulary has pieces, what lies beyond is rarer than any piece of
worth, and such a table is all that a driver has to hold, whatever the corpus is.
"""

MAX_WORD_CHARS = 100
"""Longer words are [UNK] to BERT, so they do not count."""

SCHEMA = pa.schema({"word": pa.string(), "count": pa.int64()})


def count_words(texts: Iterable[str], *, lowercase: bool) -> pa.Table:
    """Return every word of the texts once, and how often it is seen: columns `word`, `count`.

    Each different chunk between blanks is read but once: to the normalizer and the pre-tokenizer
    a blank is the end of a word, and what lies beyond it has no say.
    """
    chunks: Counter[str] = Counter()
    for text in texts:
        blank = text.replace("\n", " ").replace("\t", " ").replace("\r", " ")
        chunks.update(blank.split(" "))
    normalizer, pre_tokenizer = BertNormalizer(lowercase=lowercase), BertPreTokenizer()
    words: Counter[str] = Counter()
    for chunk, count in chunks.items():
        if chunk.isascii() and chunk.isalnum():  # most of them; the long way would say the same
            words[chunk.lower() if lowercase else chunk] += count
            continue
        for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(chunk)):
            words[word] += count
    kept = {word: count for word, count in words.items() if len(word) <= MAX_WORD_CHARS}
    return pa.table([list(kept), list(kept.values())], schema=SCHEMA)


def can_continue(letter: str) -> bool:
    """Return whether words go on with the letter; punctuation and ideographs stand alone."""
    text = BertNormalizer(lowercase=False).normalize_str("a" + letter)
    return len(BertPreTokenizer().pre_tokenize_str(text)) == 1


def most_frequent(words: pa.Table) -> pa.Table:
    """Return the `MAX_WORDS` words that are seen most often in that order, ties by code point."""
    by = [("count", "descending"), ("word", "ascending")]
    return words.sort_by(by).slice(0, MAX_WORDS).combine_chunks()
