"""How documents become rows: the numbers of the text pipeline."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """How documents become masked sentence pairs.

    Devlin et al. 2019, BERT, arXiv:1810.04805, sections 3.1 and A.1.
    """

    kind: Literal["text"] = "text"
    language: str = "en"
    """Whose rules split sentences (ISO 639-1)."""
    max_length: int = 128
    """Tokens of a row, control tokens included."""
    notnext_ratio: float = 0.5
    """Probability that B is not the next segment."""
    mask_ratio: float = 0.15
    """Share of a row's text tokens that are to be predicted."""
    mask_token_ratio: float = 0.8
    """Share of those that are replaced by [MASK]."""
    random_token_ratio: float = 0.1
    """Share of those that are replaced by a random piece; the rest stay as they are."""
    masking: Literal["words", "pieces", "spans"] = "words"
    """What is chosen: whole words, pieces, or runs of whole words."""
    span_stop_ratio: float = 0.2
    """Probability that a span ends after any of its words."""
    span_max_words: int = 10
    """Words of the longest span."""

    def __post_init__(self) -> None:
        if not 16 <= self.max_length <= 4096:
            raise ValueError(f"max_length must be in 16..4096, got {self.max_length}")
        for name in ("notnext_ratio", "mask_ratio", "mask_token_ratio", "random_token_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if not 0 < self.span_stop_ratio <= 1:
            raise ValueError(f"span_stop_ratio must be in 0..1, not 0, got {self.span_stop_ratio}")
        if not 1 <= self.span_max_words <= 255:
            raise ValueError(f"span_max_words must be in 1..255, got {self.span_max_words}")
        if self.mask_token_ratio + self.random_token_ratio > 1:
            raise ValueError(
                "mask_token_ratio + random_token_ratio must be at most 1, got "
                f"{self.mask_token_ratio} + {self.random_token_ratio}"
            )
