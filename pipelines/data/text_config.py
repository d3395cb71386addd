"""How documents become rows: the numbers of the text pipeline."""

from dataclasses import dataclass
from typing import Literal

from pipelines.data.reference import MASK_TOKEN_RATIO, NOTNEXT_RATIO, RANDOM_TOKEN_RATIO

Pairing = Literal["honest", "reference", "sentence-order"]

REFERENCE_RATIOS = {
    "notnext_ratio": NOTNEXT_RATIO,
    "mask_token_ratio": MASK_TOKEN_RATIO,
    "random_token_ratio": RANDOM_TOKEN_RATIO,
}
"""What BERT's own code has no flag for."""


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
    pairing: Pairing = "honest"
    """`honest`: neighbours A and B, half of which exchange their Bs with other documents; every
    token once an epoch, and only the words tell the label. `reference`: BERT's own algorithm,
    draw for draw; it repeats text. `sentence-order`: the neighbours of `honest`, half of them
    swapped (ALBERT)."""
    notnext_ratio: float = 0.5
    """Probability that B is not the next segment; in `sentence-order`, that the two are swapped."""
    short_ratio: float | None = None
    """Probability that a document is cut into shorter rows, all lengths alike; by default 0.1 in
    `reference`, as BERT, and 0 otherwise, because short rows are mostly padding."""
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
        ratios = ("notnext_ratio", "mask_ratio", "mask_token_ratio", "random_token_ratio")
        for name in (*ratios, "short_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in 0..1, got {value}")
        if not 0 < self.span_stop_ratio <= 1:
            raise ValueError(f"span_stop_ratio must be in 0..1, not 0, got {self.span_stop_ratio}")
        if not 1 <= self.span_max_words <= 255:
            raise ValueError(f"span_max_words must be in 1..255, got {self.span_max_words}")
        if self.mask_token_ratio + self.random_token_ratio > 1:
            raise ValueError(
                "mask_token_ratio + random_token_ratio must be at most 1, got "
                f"{self.mask_token_ratio} + {self.random_token_ratio}"
            )
        if self.pairing == "reference" and self.masking == "spans":
            raise ValueError("masking spans is not in BERT's own code: choose words or pieces")
        for name, value in REFERENCE_RATIOS.items():
            if self.pairing == "reference" and getattr(self, name) != value:
                raise ValueError(
                    f"{name} is {value} in reference pairing, which is BERT's own, got "
                    f"{getattr(self, name)}; choose another pairing to change it"
                )

    @property
    def short_probability(self) -> float:
        """Return `short_ratio`, or the default of the pairing."""
        if self.short_ratio is None:
            return 0.1 if self.pairing == "reference" else 0.0
        return self.short_ratio
