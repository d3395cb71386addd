"""A second tokenizer, many times as fast, for the texts on which it is known to be equal.

The ids of a text are what `tokenizers` says. `tokie` says the same much faster, but it is young,
and it says otherwise in three cases, which are kept from it:

    other code points   its tables of Unicode are newer. What a code point becomes depends on no
                        other in either of them, so each text is looked up in one table
    dead ends           where pieces can begin a word and cannot end it, `tokenizers` says [UNK].
                        A vocabulary has them only if it holds a letter within longer pieces, a
                        K in [MASK] for one, and not by itself
    long texts          those of 64 KiB and more it cuts for its threads, even within a word

The tests hold the two equal on every code point of the table between various neighbours, on
vocabularies with all kinds of holes, and on texts of many languages.
"""

from importlib.metadata import version
from itertools import cycle
from tempfile import NamedTemporaryFile

import numpy as np
import tokie
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from pipelines.data.spans import Ints, Tokens
from pipelines.data.word_counts import can_continue

AGREED_RUNS = """
7f 1 2f8 2 6 4 7 1 1 1 14 1 18d 1 26 2 32 2 3 1 37 8 1b 4 6 b 1d 1 f0 1 3c 2 65 e 3b 3 30 2 f 1 1c 2
1 1 b 5 1f 11 2a 19 a1 1 8 2 2 2 16 1 7 1 1 3 4 2 9 2 2 2 4 8 1 4 2 1 5 2 17 4 3 1 6 4 2 2 16 1 7 1
2 1 2 1 2 2 1 1 5 4 2 2 3 3 1 7 4 1 1 7 10 b 3 1 9 1 3 1 16 1 7 1 2 1 5 2 a 1 3 1 3 2 1 f 4 2 c 7 1
7 3 1 8 2 2 2 16 1 7 1 2 1 5 2 9 2 2 2 3 8 2 4 2 1 5 2 12 a 2 1 6 3 3 1 4 3 2 1 1 1 2 3 2 3 3 3 c 4
5 3 3 1 4 2 1 6 1 e 15 5 4 1 8 1 3 1 17 1 10 3 8 1 3 1 4 7 2 1 3 2 1 2 4 2 a 8 c 1 8 1 3 1 17 1 a 1
5 2 9 1 3 1 4 7 2 6 2 1 4 2 a 1 3 d c 1 3 1 29 2 8 1 3 1 6 4 10 2 1a 2 2 1 12 3 18 1 9 1 1 2 7 3 1 4
6 1 1 1 8 6 a 2 3 c 3a 4 1d 25 2 1 1 1 5 1 18 1 1 1 13 1 3 2 5 1 1 1 6 2 a 2 4 20 48 1 24 4 27 1 24
1 f 1 d 25 c6 1 1 5 1 2 179 1 4 2 7 1 1 1 4 2 29 1 4 2 21 1 4 2 7 1 1 1 4 2 f 1 39 1 4 2 43 2 20 3
1a 6 56 2 6 2 26d 1 2f 3 59 7 16 9 15 1 2 9 14 c d 1 3 1 2 c 5e 2 a 6 a 6 f 1 a 6 59 7 5 2 24 5 46 a
1f 1 c 4 c 4 1 3 2a 2 5 b 2c 4 1a 6 b 3 3e 2 41 1 1d 2 b 6 a 6 e 2 f 41 4d 3 2d 3 74 8 3c 3 f 3 3e 5
2b 2 b 8 2b 5 f6 6 11a 2 6 2 26 2 6 2 8 1 1 1 1 1 1 1 1f 2 35 1 f 1 e 2 6 1 13 2 3 1 9 1 65 1 c 2 1b
1 d 3 21 f 21 f 8c 4 29a 16 b 15 714 2 20 1 15d 5 2d 1 1 5 1 2 38 7 2 e 18 9 7 1 7 1 7 1 7 1 7 1 7 1
7 1 7 1 63 d 2 2e 1a 1 59 c d6 1a 50 1 56 2 67 5 2b 1 5e 1 56 9 30 1 726d 3 37 9 15c 14 b8 8 ce 2 2
1 1 1 8 15 3a 4 a 6 38 8 45 9 c 6 1f 1 54 b 1e 3 3d 1 10 1 b 4 21 1 37 9 e 2 a 2 67 18 1c a 6 2 6 2
6 9 7 1 7 1 3c 4 7e 2 a 6 2ba4 c 17 4 31 2104 16e 2 6a 26 7 c 5 5 1a 1 5 1 1 1 2 1 2 1 7d 10 1bd 2
36 7 1 20 2a 6 33 1 13 1 4 4 5 1 87 2 1 1 be 3 6 2 6 2 6 2 3 3 7 1 7 a 5 d402 55 1 47 1 2 2 1 2 2 2
4 1 c 1 1 1 7 1 41 1 4 2 8 1 7 1 1c 1 4 1 5 1 1 3 7 1 154 2 124 2 32 1800 2c 4 64 c f 2 f 1 f 1 25 a
ae 38 1d d 2c 4 9 7 2 e 6 9a 3d8 4 11 3 d 3 77 4 5f 6 c 4 1 f c 4 38 8 a 6 28 8 1e 2 c 4 2 3e 154 c
e 2 d 3 a 5 38 7 f 2 b 6 9 7 93 1 66 406 a6e0 20 103a 6 de 102 1582 e 1d31 f 26e 9a2 21e 5e2 134b 5
1060 ddc50
"""
"""How many code points in a row, from 0 on, both agree on and do not, in turn; hexadecimal.

Made by asking the versions in MEASURED; without private use and scripts out of use.
"""

MEASURED = {"tokenizers": "0.23.3", "tokie": "0.1.4"}
"""The versions that the table was made with: others may have other tables of Unicode."""


def _agreed() -> NDArray[np.bool_]:
    lengths = [int(length, 16) for length in AGREED_RUNS.split()]
    return np.repeat([state for _, state in zip(lengths, cycle((True, False)))], lengths)


AGREED = _agreed()
"""Whether both tokenizers agree on a code point."""

MAX_CHARS = 16_000
"""Of a text: less than 64 KiB, whatever the characters are."""

FOLDS = ((True, None), (True, True), (False, None), (False, False))
"""Whether case is folded and accents are stripped: both or neither; None does as case does."""

SAMPLED_PIECES = 2000
"""Pieces of a vocabulary that the self-check compares."""


class FastTokenizer:
    """The fast form of one tokenizer, and the texts that may go there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        with NamedTemporaryFile("w", suffix=".json", encoding="utf-8") as file:
            file.write(tokenizer.to_str())
            file.flush()
            self._tokenizer = tokie.Tokenizer.from_json(file.name)
        self._safe = AGREED
        if dead := dead_ends(tokenizer):
            normalize = tokenizer.normalizer.normalize_str
            ends = [code for code in np.flatnonzero(AGREED) if dead & {*normalize(chr(code))}]
            self._safe = AGREED.copy()
            self._safe[ends] = False
        self._unsafe_ascii = [chr(code) for code in np.flatnonzero(~self._safe[:128])]

    def knows(self, texts: list[str]) -> NDArray[np.bool_]:
        """Return for which texts the ids are known to be those of `tokenizers`."""
        lengths = np.fromiter(map(len, texts), np.int64, len(texts))
        known = lengths <= MAX_CHARS
        plain = np.array([text.isascii() for text in texts], dtype=bool)
        for letter in self._unsafe_ascii:
            plain &= np.array([letter not in text for text in texts], dtype=bool)
        asked = np.flatnonzero(~plain)
        joined = "".join([texts[i] for i in asked])
        codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        unsafe = np.flatnonzero(~self._safe[codes])
        known[asked[np.searchsorted(np.cumsum(lengths[asked]), unsafe, side="right")]] = False
        return known

    def encode(self, texts: list[str]) -> tuple[Tokens, Ints]:
        """Return the joined ids of texts that it knows, and how many each has."""
        ids, lengths = self._tokenizer.encode_batch_flat(texts, add_special_tokens=False)
        return ids, lengths.astype(np.int64)


def fast_tokenizer(tokenizer: Tokenizer) -> tuple[FastTokenizer | None, str]:
    """Return the fast form of a WordPiece tokenizer without added tokens, or why it has none.

    It stands for BERT's normalizer and pre-tokenizer alone, is known to be equal in the measured
    versions, and has to pass a self-check first.
    """
    if reason := _not_measured() or _not_of_bert(tokenizer):
        return None, reason
    fast = FastTokenizer(tokenizer)
    if not _same(fast, tokenizer):
        return None, "the fast tokenizer has other ids for a sample of the pieces"
    return fast, ""


def dead_ends(tokenizer: Tokenizer) -> set[str]:
    """Return the letters of words that are within pieces and are none by themselves."""
    pieces = set(tokenizer.get_vocab())
    longer = [bare for piece in pieces if len(bare := piece.removeprefix("##")) > 1]
    normalize = tokenizer.normalizer.normalize_str
    return {
        letter
        for letter in {*"".join(longer)}
        if not pieces >= {letter, "##" + letter}
        # No word has the brackets of [MASK] in it, and where case is folded, none of its capitals.
        and can_continue(letter)
        and normalize(letter) == letter
    }


def _not_measured() -> str:
    """Return which library is not of the version that was measured, or nothing."""
    for name, measured in MEASURED.items():
        if (installed := version(name)) != measured:
            return f"{name} is {installed}, and the fast tokenizer was measured with {measured}"
    return ""


def _not_of_bert(tokenizer: Tokenizer) -> str:
    """Return what of a tokenizer the fast one has no equal of, or nothing."""
    normalizer, model = tokenizer.normalizer, tokenizer.model
    if not isinstance(normalizer, BertNormalizer):
        return "its normalizer is not BERT's"
    folds = (normalizer.lowercase, normalizer.strip_accents)
    if not (normalizer.clean_text and normalizer.handle_chinese_chars) or folds not in FOLDS:
        return "its normalizer is BERT's with other options"
    if not isinstance(tokenizer.pre_tokenizer, BertPreTokenizer):
        return "its pre-tokenizer is not BERT's"
    options = (model.unk_token, model.continuing_subword_prefix, model.max_input_chars_per_word)
    return "" if options == ("[UNK]", "##", 100) else f"its pieces are used otherwise: {options}"


def _same(fast: FastTokenizer, tokenizer: Tokenizer) -> bool:
    """Return whether both give the same ids for some of the pieces and of the code points."""
    pieces = sorted(tokenizer.get_vocab())
    some = pieces[:: len(pieces) // SAMPLED_PIECES + 1]
    first_of_runs = np.flatnonzero(np.diff(AGREED, prepend=False) & AGREED)
    texts = [*some, *(piece[::-1] for piece in some)]
    texts += [f"a{chr(code)}a {chr(code)}" for code in first_of_runs]
    texts = [text for text, known in zip(texts, fast.knows(texts), strict=True) if known]
    ids, lengths = fast.encode(texts)
    exact = [found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    together = [i for found in exact for i in found]
    return (ids.tolist(), lengths.tolist()) == (together, [len(found) for found in exact])
