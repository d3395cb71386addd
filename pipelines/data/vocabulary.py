"""WordPiece vocabularies: trained or given, held as one `tokenizer.json`.

The tokenizer that reads raw text knows no control tokens, so a literal "[MASK]" in a document
becomes "[", "mask", "]" and never the control token of that name.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, compress
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from pipelines.data.fast_tokens import FastTokenizer, fast_tokenizer
from pipelines.data.spans import Ints, Tokens
from pipelines.errors import DataError, UserError

CONTROL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""In this order, so that padding is id 0."""


@dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
    """How a vocabulary is trained when none is given; of a given vocab.txt, how it is read."""

    size: int = 8192
    """Largest number of pieces, control tokens included."""
    lowercase: bool = True
    """Fold case and strip accents, as BERT uncased."""
    alphabet: int = 512
    """How many characters, the most frequent ones; a word with any other becomes [UNK]."""
    min_frequency: int = 2
    """A piece must be seen so often."""

    def __post_init__(self) -> None:
        if self.size < 300:
            raise ValueError(f"vocabulary size must be at least 300, got {self.size}")
        for name in ("alphabet", "min_frequency"):
            if getattr(self, name) < 1:
                raise ValueError(f"vocabulary {name} must be at least 1, got {getattr(self, name)}")


class Vocabulary:
    """A tokenizer, and what masking needs to know of its ids."""

    def __init__(self, tokenizer_json: str) -> None:
        # Whatever it was made for: control tokens are no text here, and nothing is cut or added.
        bare: dict[str, Any] = {"added_tokens": []}
        bare |= dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
        self.tokenizer = Tokenizer.from_str(json.dumps(json.loads(tokenizer_json) | bare))
        self.json = self.tokenizer.to_str()
        if not isinstance(self.tokenizer.model, WordPiece):
            raise DataError("its pieces are not WordPiece: train it with rayssl vocab")
        pieces = self.tokenizer.get_vocab()
        _refuse_broken(pieces)
        if self.tokenizer.model.unk_token != "[UNK]":
            raise DataError(f"its unknown words are {self.tokenizer.model.unk_token}, not [UNK]")
        self.size = len(pieces)
        self.pad, self.unknown, self.cls, self.sep, self.mask = (
            int(pieces[token]) for token in CONTROL_TOKENS
        )
        self.dtype = np.dtype(np.uint16 if self.size <= 1 << 16 else np.uint32)
        self.continues = np.zeros(self.size, dtype=bool)
        """Whether an id continues a word (`##...`)."""
        self.continues[[i for piece, i in pieces.items() if piece.startswith("##")]] = True
        control = {pieces[token] for token in CONTROL_TOKENS}
        self.ordinary = np.array(sorted(set(pieces.values()) - control), dtype=self.dtype)
        """The ids that a random replacement is drawn from."""

    def __reduce__(self) -> tuple[type["Vocabulary"], tuple[str]]:
        """Travel as the JSON alone."""
        return Vocabulary, (self.json,)

    def encode(self, texts: list[str]) -> list[Tokens]:
        """Return the ids of each text, without control tokens."""
        flat, lengths = self.encode_flat(texts)
        return np.split(flat, np.cumsum(lengths))[:-1]

    def encode_flat(self, texts: list[str]) -> tuple[Tokens, Ints]:
        """Return the joined ids of the texts, without control tokens, and how many each has.

        The ids are those of `tokenizers`, whichever way they are made.
        """
        quick = self._fast.knows(texts) if self._fast else np.zeros(len(texts), dtype=bool)
        lengths = np.zeros(len(texts), dtype=np.int64)
        quick_ids, lengths[quick] = self._encode_quickly([*compress(texts, quick)])
        exact_ids, lengths[~quick] = self._encode_exactly([*compress(texts, ~quick)])
        is_quick = np.repeat(quick, lengths)
        flat = np.zeros(len(is_quick), dtype=self.dtype)
        flat[is_quick], flat[~is_quick] = quick_ids, exact_ids
        return flat, lengths

    @property
    def slow_because(self) -> str:
        """Why `tokenizers` makes all ids itself, which takes longer; nothing if it need not."""
        return self._fast_or_reason[1]

    @property
    def _fast(self) -> FastTokenizer | None:
        return self._fast_or_reason[0]

    @cached_property
    def _fast_or_reason(self) -> tuple[FastTokenizer | None, str]:
        return fast_tokenizer(self.tokenizer)

    def _encode_quickly(self, texts: list[str]) -> tuple[Tokens, Ints]:
        if self._fast is None:
            return np.zeros(0, self.dtype), np.zeros(0, np.int64)
        return self._fast.encode(texts)

    def _encode_exactly(self, texts: list[str]) -> tuple[Tokens, Ints]:
        # One task has one core: threads of its own would only fight the other tasks.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        lengths = np.array([len(found) for found in ids], dtype=np.int64)
        return np.fromiter(chain.from_iterable(ids), self.dtype, int(lengths.sum())), lengths


def bert_tokenizer(pieces: Sequence[str], *, lowercase: bool) -> Tokenizer:
    """Return the tokenizer of BERT, cased or uncased, for these pieces; ids are their places."""
    ids = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return tokenizer


def load_vocabulary(path: Path, *, lowercase: bool = True) -> Vocabulary:
    """Return the vocabulary of a WordPiece `tokenizer.json`, or of the `vocab.txt` of a BERT.

    A `vocab.txt` has a piece a line and does not say whether it is uncased: `lowercase` does. A
    `tokenizer.json`, ours or another's, says itself how it normalises.

    Raises:
        UserError: If there is no such file.
        DataError: If it is not a WordPiece vocabulary with our control tokens, whole and without
            doubles.
    """
    if not path.is_file():
        raise UserError(f"no vocabulary at {path}: train one with rayssl vocab --out {path}")
    try:
        text = path.read_bytes().decode()
        if path.suffix == ".txt":
            return Vocabulary(bert_tokenizer(_lines(text), lowercase=lowercase).to_str())
        return Vocabulary(text)
    except Exception as error:  # tokenizers raises nothing narrower
        raise DataError(f"{path} is not a vocabulary of ours: {error}") from error


def _lines(text: str) -> list[str]:
    """Return the pieces of a vocab.txt. No other line break counts: some are pieces."""
    pieces = text.removesuffix("\n").replace("\r\n", "\n").removesuffix("\r").split("\n")
    lines: dict[str, int] = {}
    for number, piece in enumerate(pieces, 1):
        if piece in lines:
            raise DataError(f"{piece!r} is on line {lines[piece]} and on line {number}")
        lines[piece] = number
    return pieces


def _refuse_broken(pieces: dict[str, int]) -> None:
    missing = [token for token in CONTROL_TOKENS if token not in pieces]
    if missing:
        raise DataError(f"its vocabulary lacks {', '.join(missing)}: train it with rayssl vocab")
    ids = sorted(pieces.items(), key=lambda item: item[1])
    for (before, last), (piece, i) in zip([("", -1), *ids], ids, strict=False):
        if i == last:
            raise DataError(f"its pieces {before!r} and {piece!r} share the id {i}")
        if i != last + 1:
            raise DataError(f"no piece has the id {last + 1}, before {piece!r} with {i}")
