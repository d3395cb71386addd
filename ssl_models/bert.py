"""BERT: token, position and segment embeddings, a transformer encoder and a pooler.

Shapes: B rows, L length, D hidden size. A batch holds `input_ids` int64 (B, L), `token_type_ids`
int64 (B, L), 0 in the first segment and 1 in the second, and `attention_mask` bool (B, L), True at
real tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssl_models.objective import Batch
from ssl_models.transformer import LAYER_NORM_EPSILON, TransformerEncoder

NUM_SEGMENTS = 2


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """Devlin et al. 2018, BERT: Pre-training of Deep Bidirectional Transformers, arXiv:1810.04805.

    The defaults are BERT-Tiny of Turc et al. 2019, Well-Read Students Learn Better,
    arXiv:1908.08962, without dropout.
    """

    vocab_size: int
    """Number of token ids, special tokens included."""
    max_length: int = 128
    """Longest row in tokens, specials included; the number of position embeddings."""
    hidden_size: int = 128
    num_layers: int = 2
    num_heads: int = 2
    intermediate_size: int = 512
    dropout: float = 0.0
    """Probability of dropping a hidden unit or an attention weight in training."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights. BERT's 0.02 suits widths near 768; a narrow
    encoder starts with almost uniform attention under it, and learns slowly."""

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size",
            "max_length",
            "hidden_size",
            "num_layers",
            "num_heads",
            "intermediate_size",
        )
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_heads {self.num_heads}: "
                "choose a multiple, every head gets an equal part"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"dropout must be at least 0 and below 1, got {self.dropout}: 0 turns it off"
            )
        if not self.initializer_range > 0.0:
            raise ValueError(f"initializer_range must be above 0, got {self.initializer_range}")

    @property
    def feature_size(self) -> int:
        """Width of the features."""
        return self.hidden_size


class BertEncoder(nn.Module):
    """The part of BERT that is kept after pretraining."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_length, config.hidden_size)
        self.segment_embeddings = nn.Embedding(NUM_SEGMENTS, config.hidden_size)
        self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPSILON)
        self.dropout = nn.Dropout(config.dropout)
        self.transformer = TransformerEncoder(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            intermediate_size=config.intermediate_size,
            dropout=config.dropout,
        )
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
        initialize(self, config.initializer_range)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the last hidden states (B, L, D) and the pooled first token (B, D).

        Raises:
            ValueError: If the rows are longer than `max_length`.
        """
        embedded_BLD = self._embed(batch["input_ids"], batch["token_type_ids"])
        hidden_BLD = self.transformer(embedded_BLD, batch["attention_mask"])
        return hidden_BLD, torch.tanh(self.pooler(hidden_BLD[:, 0]))

    def _embed(self, input_ids_BL: Tensor, token_type_ids_BL: Tensor) -> Tensor:
        length = input_ids_BL.shape[1]
        if length > self.config.max_length:
            raise ValueError(
                f"rows of {length} tokens, but max_length is {self.config.max_length}: "
                "cut the rows, or pretrain with a larger max_length"
            )
        embedded_BLD = (
            self.token_embeddings(input_ids_BL)
            + self.position_embeddings.weight[:length]
            + self.segment_embeddings(token_type_ids_BL)
        )
        normed_BLD: Tensor = self.dropout(self.embedding_norm(embedded_BLD))
        return normed_BLD


def mean_of_tokens(hidden_BLD: Tensor, attention_mask_BL: Tensor) -> Tensor:
    """Return the mean of the hidden states over real tokens, float32 (B, D); 0 where are none."""
    is_real_BL1 = attention_mask_BL[:, :, None]
    sum_BD: Tensor = (hidden_BLD.float() * is_real_BL1).sum(dim=1)
    return sum_BD / is_real_BL1.sum(dim=1).clamp(min=1)


def initialize(model: nn.Module, deviation: float) -> None:
    """Draw the weights of all linear and embedding layers anew; biases become 0.

    "truncated_normal_initializer" in google-research/bert redraws what falls outside two
    deviations.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            bound = 2 * deviation
            nn.init.trunc_normal_(module.weight, std=deviation, a=-bound, b=bound)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
