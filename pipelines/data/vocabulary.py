"""WordPiece vocabularies: trained on the training split, held as one `tokenizer.json`.

The tokenizer that reads raw text knows no control tokens, so a literal "[MASK]" in a document
becomes "[", "mask", "]" and never the control token of that name.
"""

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer

from pipelines.data.spans import Ints, Tokens
from pipelines.errors import DataError, UserError

CONTROL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""In this order, so that padding is id 0."""


@dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
    """How a vocabulary is trained when none is given."""

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
        missing = [token for token in CONTROL_TOKENS if token not in pieces]
        if missing:
            raise DataError(
                f"its vocabulary lacks {', '.join(missing)}: train it with rayssl vocab"
            )
        self.size: int = max(pieces.values()) + 1
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

    def encode(self, texts: list[str]) -> list[NDArray[Any]]:
        """Return the ids of each text, without control tokens."""
        # One task has one core: threads of its own would only fight the other tasks.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype) for encoding in encodings]

    def encode_flat(self, texts: list[str]) -> tuple[Tokens, Ints]:
        """Return the joined ids of the texts, without control tokens, and how many each has."""
        encoded = self.encode(texts)
        lengths = np.array([len(ids) for ids in encoded], dtype=np.int64)
        return np.concatenate([np.zeros(0, self.dtype), *encoded]), lengths


def train_vocabulary(texts: Callable[[], Iterable[str]], config: VocabularyConfig) -> Vocabulary:
    """Return a vocabulary trained on the texts; the same texts give the same vocabulary.

    `texts` is called twice, once for the alphabet and once for the words.
    """
    trained = _tokenizer(WordPiece(unk_token="[UNK]"), config.lowercase)
    # Every character is two pieces: one that starts a word, and one that continues it.
    most = (config.size - len(CONTROL_TOKENS)) // 2
    alphabet = _alphabet(texts(), trained, min(config.alphabet, most))
    trainer = WordPieceTrainer(
        vocab_size=config.size,
        min_frequency=config.min_frequency,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        # The trainer numbers continuations in the order of a hash map, which differs from run
        # to run and decides between equally frequent merges; as special tokens they are fixed.
        special_tokens=[*CONTROL_TOKENS, *(f"##{c}" for c in alphabet if not _is_punctuation(c))],
        show_progress=False,
    )
    trained.train_from_iterator(texts(), trainer)
    # A new tokenizer around the pieces: the trained one would see control tokens in raw text.
    pieces = WordPiece(trained.get_vocab(), unk_token="[UNK]", max_input_chars_per_word=100)
    return Vocabulary(_tokenizer(pieces, config.lowercase).to_str())


def _alphabet(texts: Iterable[str], tokenizer: Tokenizer, size: int) -> list[str]:
    """Return the most frequent characters of the normalised texts, ties by code point."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(tokenizer.normalizer.normalize_str(text))
    letters = [character for character in counts if not character.isspace()]
    return sorted(sorted(letters, key=lambda c: (-counts[c], c))[:size])


def _is_punctuation(character: str) -> bool:
    """Return whether BERT's pre-tokenizer makes a word of its own from the character."""
    ascii_symbol = character.isascii() and not character.isalnum()
    return ascii_symbol or unicodedata.category(character).startswith("P")


def load_vocabulary(path: Path) -> Vocabulary:
    """Return the vocabulary of a `tokenizer.json` that `rayssl vocab` wrote.

    Raises:
        UserError: If there is no such file.
        DataError: If it is not a WordPiece tokenizer with our control tokens.
    """
    if not path.is_file():
        raise UserError(f"no vocabulary at {path}: train one with rayssl vocab --out {path}")
    try:
        return Vocabulary(path.read_text())
    except Exception as error:  # tokenizers raises nothing narrower
        raise DataError(f"{path} is not a tokenizer.json of ours: {error}") from error


def _tokenizer(model: WordPiece, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return tokenizer
