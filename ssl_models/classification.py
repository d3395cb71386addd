"""Classification by labels: an encoder that was pretrained without any, and a linear head on it.

Shapes: B rows, D feature size, K classes. Besides the encoder's keys a batch holds `labels`
int64 (B,), the class of each row, and `weight` float32 (B,), 0 for a placeholder.
"""

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ssl_models.bert import BertConfig, BertEncoder, initialize, mean_of_tokens
from ssl_models.image_encoder import ImageEncoderConfig, build_image_encoder
from ssl_models.objective import Batch, Objective, StepOutput

HEAD_DEVIATION = 0.02


@dataclass(frozen=True, kw_only=True)
class ClassificationConfig:
    """An encoder, dropout on its features, and a linear layer.

    The features of a text are the mean of its tokens' last states, those that `encode` gives: the
    pooled [CLS] of Devlin et al. 2018, arXiv:1810.04805, is only trained with sentence pairs.
    """

    encoder: BertConfig | ImageEncoderConfig
    num_classes: int
    kind: Literal["classification"] = "classification"
    dropout: float = 0.1
    """Probability of dropping a feature in training."""

    def __post_init__(self) -> None:
        if self.num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {self.num_classes}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")

    @property
    def feature_size(self) -> int:
        """Width of the features."""
        return self.encoder.feature_size


class Classification(Objective):
    """An encoder with a linear head, trained on one term, `cross_entropy`."""

    def __init__(self, config: ClassificationConfig) -> None:
        super().__init__()
        self.config = config
        self.coefficients = {"cross_entropy": 1.0}
        self.encoder: nn.Module
        if isinstance(config.encoder, BertConfig):
            self.encoder = BertEncoder(config.encoder)
        else:
            self.encoder = build_image_encoder(config.encoder)
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.feature_size, config.num_classes)
        initialize(self.head, HEAD_DEVIATION)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Return the summed weight of the rows."""
        return {"cross_entropy": batch["weight"].sum()}

    def forward(self, batch: Batch) -> StepOutput:
        """Return the summed cross entropy, computed in float32 even under autocast.

        Metrics are weighted sums over rows of `cross_entropy` and `accuracy`.
        """
        weight_B, labels_B = batch["weight"], batch["labels"]
        logits_BK = self.logits(batch)
        losses_B = F.cross_entropy(logits_BK, labels_B, reduction="none")
        right_B = logits_BK.detach().argmax(dim=1) == labels_B
        total = weight_B.sum()
        loss = (losses_B * weight_B).sum()
        return StepOutput(
            terms={"cross_entropy": (loss, total)},
            metrics={
                "cross_entropy": (loss.detach(), total),
                "accuracy": ((right_B * weight_B).sum(), total),
            },
        )

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits (B, K), float32."""
        logits_BK: Tensor = self.head(self.dropout(self.encode(batch)))
        return logits_BK.float()

    def encode(self, batch: Batch) -> Tensor:
        """Return the encoder's features, float32 (B, D)."""
        if isinstance(self.encoder, BertEncoder):
            hidden_BLD, _ = self.encoder(batch)
            return mean_of_tokens(hidden_BLD, batch["attention_mask"])
        features_BD: Tensor = self.encoder(batch["image"])
        return features_BD
