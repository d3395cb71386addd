"""The transformer encoder of BERT (post-norm) and of ViT (pre-norm), on PyTorch's fused attention.

Shapes: B rows, L length, D hidden size, H heads, E hidden size of one head.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPSILON = 1e-12
NormPlace = Literal["post", "pre"]
"""Where a sublayer's LayerNorm stands: on the sum with its input, or on its input alone."""


class SelfAttention(nn.Module):
    """Vaswani et al. 2017, Attention Is All You Need, arXiv:1706.03762, section 3.2.2."""

    def __init__(self, *, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query = nn.Linear(hidden_size, hidden_size)
        self.key = nn.Linear(hidden_size, hidden_size)
        self.value = nn.Linear(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_BLD: Tensor, visible_B11L: Tensor | None) -> Tensor:
        """Return (B, L, D): every position mixed from the visible ones."""
        query_BHLE, key_BHLE, value_BHLE = (
            project(hidden_BLD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        mixed_BHLE = F.scaled_dot_product_attention(
            query_BHLE,
            key_BHLE,
            value_BHLE,
            attn_mask=visible_B11L,
            dropout_p=self.dropout if self.training else 0.0,
        )
        output_BLD: Tensor = self.output(mixed_BHLE.transpose(1, 2).flatten(2))
        return output_BLD


class EncoderLayer(nn.Module):
    """Each sublayer is LayerNorm(x + sublayer(x)), or x + sublayer(LayerNorm(x)) with `pre`.

    The first is that of Devlin et al. 2018, BERT, arXiv:1810.04805, the second that of Dosovitskiy
    et al. 2021, ViT, arXiv:2010.11929. GELU is the exact one, by the error function. `dropout` acts
    on the attention weights and on the output of each sublayer.
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        dropout: float,
        norm: NormPlace,
    ) -> None:
        super().__init__()
        self.norm = norm
        self.attention = SelfAttention(
            hidden_size=hidden_size, num_heads=num_heads, dropout=dropout
        )
        self.attention_norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPSILON)
        self.intermediate = nn.Linear(hidden_size, intermediate_size)
        self.output = nn.Linear(intermediate_size, hidden_size)
        self.output_norm = nn.LayerNorm(hidden_size, eps=LAYER_NORM_EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_BLD: Tensor, visible_B11L: Tensor | None) -> Tensor:
        """Return (B, L, D)."""
        if self.norm == "pre":
            normed_BLD = self.attention_norm(hidden_BLD)
            hidden_BLD = hidden_BLD + self.dropout(self.attention(normed_BLD, visible_B11L))
            return hidden_BLD + self._feed_forward(self.output_norm(hidden_BLD))
        attended_BLD = self.dropout(self.attention(hidden_BLD, visible_B11L))
        hidden_BLD = self.attention_norm(hidden_BLD + attended_BLD)
        output_BLD: Tensor = self.output_norm(hidden_BLD + self._feed_forward(hidden_BLD))
        return output_BLD

    def _feed_forward(self, hidden_BLD: Tensor) -> Tensor:
        output_BLD: Tensor = self.dropout(self.output(F.gelu(self.intermediate(hidden_BLD))))
        return output_BLD


class TransformerEncoder(nn.Module):
    """A stack of encoder layers. With `pre` the last hidden states still want a norm."""

    def __init__(
        self,
        *,
        num_layers: int,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        dropout: float = 0.0,
        norm: NormPlace = "post",
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            EncoderLayer(
                hidden_size=hidden_size,
                num_heads=num_heads,
                intermediate_size=intermediate_size,
                dropout=dropout,
                norm=norm,
            )
            for _ in range(num_layers)
        )

    def forward(self, hidden_BLD: Tensor, attention_mask_BL: Tensor | None = None) -> Tensor:
        """Return (B, L, D), where no position sees a padding position.

        `attention_mask_BL` is boolean, True at real tokens; None says that all are, and lets
        PyTorch choose its fastest kernel.
        """
        visible_B11L = None if attention_mask_BL is None else _visible(attention_mask_BL)
        for layer in self.layers:
            hidden_BLD = layer(hidden_BLD, visible_B11L)
        return hidden_BLD


def _visible(attention_mask_BL: Tensor) -> Tensor:
    """Return the boolean mask (B, 1, 1, L) of the positions that attention may look at.

    A row without any real token sees all of its padding, because a softmax over nothing is NaN in
    some kernels. Boolean, because the smallest float32, a usual additive mask, rounds to minus
    infinity in bfloat16.
    """
    is_empty_B1 = ~attention_mask_BL.any(dim=1, keepdim=True)
    return (attention_mask_BL | is_empty_B1)[:, None, None, :]
