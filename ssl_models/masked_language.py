"""BERT's two objectives: masked language modelling and next sentence prediction.

Shapes: B rows, L length, P predictions, D hidden size, V vocabulary. Besides the encoder's keys a
batch holds `masked_positions` int64 (B, P), the column of each prediction, 0 where there is none;
`masked_ids` int64 (B, P), the true id, -100 where there is no prediction; and `nsp_labels`
int64 (B,), 0 where B follows A (IsNext), 1 where it does not (NotNext, or the two are swapped),
-100 where there is no label. `input_ids` are masked already: nothing is random but dropout.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_models.bert import BertConfig, BertEncoder, initialize, mean_of_tokens
from ssl_models.objective import Batch, Objective, StepOutput
from ssl_models.transformer import LAYER_NORM_EPSILON

NO_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class MaskedLanguageConfig:
    """Devlin et al. 2018, BERT, arXiv:1810.04805, section 3.1.

    "The training loss is the sum of the mean masked LM likelihood and the mean next sentence
    prediction likelihood" (appendix A.2): both coefficients are 1.
    """

    encoder: BertConfig
    kind: Literal["mlm-nsp"] = "mlm-nsp"
    mlm_coefficient: float = 1.0
    nsp_coefficient: float = 1.0
    """0 trains by masked tokens alone."""

    def __post_init__(self) -> None:
        for name in ("mlm_coefficient", "nsp_coefficient"):
            value = getattr(self, name)
            if not (value >= 0.0 and math.isfinite(value)):
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        if self.mlm_coefficient == self.nsp_coefficient == 0.0:
            raise ValueError(
                "mlm_coefficient and nsp_coefficient are both 0.0: nothing would be learned, "
                "set one above 0"
            )


class MaskedTokenHead(nn.Module):
    """Scores every vocabulary entry; its decoder is the token embedding, with a bias of its own."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=LAYER_NORM_EPSILON)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        initialize(self, config.initializer_range)

    def forward(self, hidden_BPD: Tensor, embedding_VD: Tensor) -> Tensor:
        """Return logits (B, P, V)."""
        transformed_BPD = self.norm(F.gelu(self.dense(hidden_BPD)))
        return F.linear(transformed_BPD, embedding_VD, self.bias)


class Scores(NamedTuple):
    """Log probabilities, float32."""

    mlm: Tensor
    """(B * P, V), for each prediction."""
    nsp: Tensor
    """(B, 2), of IsNext and NotNext."""


class MaskedLanguage(Objective):
    """A BERT encoder with its two pretraining heads, trained on the terms `mlm` and `nsp`."""

    def __init__(self, config: MaskedLanguageConfig) -> None:
        super().__init__()
        self.coefficients = {"mlm": config.mlm_coefficient, "nsp": config.nsp_coefficient}
        self.encoder = BertEncoder(config.encoder)
        self.mlm_head = MaskedTokenHead(config.encoder)
        self.nsp_head = nn.Linear(config.encoder.hidden_size, 2)
        initialize(self.nsp_head, config.encoder.initializer_range)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Return the number of predictions, and of labelled pairs."""
        return {
            "mlm": (batch["masked_ids"] != NO_LABEL).sum(dtype=torch.float32),
            "nsp": (batch["nsp_labels"] != NO_LABEL).sum(dtype=torch.float32),
        }

    def forward(self, batch: Batch) -> StepOutput:
        """Return the summed cross entropies, computed in float32 even under autocast.

        Metrics are sums over predictions of `mlm_accuracy`, `entropy` of the predicted distribution
        in nats and `p_true`, the probability of the true token; over pairs of `nsp_accuracy`; both
        losses; and over rows of `tokens_per_row`.
        """
        return self.judge(self.score(batch), batch)

    def score(self, batch: Batch) -> Scores:
        """Return what both heads say of a batch."""
        hidden_BLD, pooled_BD = self.encoder(batch)
        mlm_logits = self._mask_logits(hidden_BLD, batch["masked_positions"]).flatten(0, 1)
        return Scores(
            mlm_logits.log_softmax(dim=-1, dtype=torch.float32),
            self.nsp_head(pooled_BD).log_softmax(dim=-1, dtype=torch.float32),
        )

    def judge(self, scores: Scores, batch: Batch) -> StepOutput:
        """Return the losses and metrics of scores, as `forward` says."""
        mlm_log_probs, nsp_log_probs = scores
        masked_ids, nsp_labels = batch["masked_ids"].flatten(), batch["nsp_labels"]
        mlm_losses = _cross_entropies(mlm_log_probs, masked_ids)
        nsp_losses = _cross_entropies(nsp_log_probs, nsp_labels)

        weights = self.weights(batch)
        sums = {"mlm": mlm_losses.sum(), "nsp": nsp_losses.sum()}
        mlm_metrics = {
            "mlm_loss": sums["mlm"].detach(),
            "mlm_accuracy": _num_correct(mlm_log_probs, masked_ids),
            **_confidence(mlm_log_probs.detach(), mlm_losses.detach(), masked_ids != NO_LABEL),
        }
        nsp_metrics = {
            "nsp_loss": sums["nsp"].detach(),
            "nsp_accuracy": _num_correct(nsp_log_probs, nsp_labels),
        }
        real = batch["attention_mask"]
        rows = real.any(dim=1).sum(dtype=torch.float32)
        return StepOutput(
            terms={name: (sums[name], weights[name]) for name in sums},
            metrics={name: (value, weights["mlm"]) for name, value in mlm_metrics.items()}
            | {name: (value, weights["nsp"]) for name, value in nsp_metrics.items()}
            | {"tokens_per_row": (real.sum(dtype=torch.float32), rows)},
        )

    def encode(self, batch: Batch) -> Tensor:
        """Return the mean of the last hidden states over real tokens, float32 (B, D).

        A row without real tokens gives zeros.
        """
        hidden_BLD, _ = self.encoder(batch)
        return mean_of_tokens(hidden_BLD, batch["attention_mask"])

    def mask_logits(self, batch: Batch) -> Tensor:
        """Return the vocabulary logits (B, P, V) at `masked_positions`."""
        hidden_BLD, _ = self.encoder(batch)
        return self._mask_logits(hidden_BLD, batch["masked_positions"])

    def nsp_logits(self, batch: Batch) -> Tensor:
        """Return the logits (B, 2) of IsNext and NotNext."""
        _, pooled_BD = self.encoder(batch)
        logits_B2: Tensor = self.nsp_head(pooled_BD)
        return logits_B2

    def _mask_logits(self, hidden_BLD: Tensor, positions_BP: Tensor) -> Tensor:
        """Project only the masked positions: a seventh of the work of projecting every token."""
        index_BPD = positions_BP[:, :, None].expand(-1, -1, hidden_BLD.shape[-1])
        hidden_BPD = hidden_BLD.gather(1, index_BPD)
        logits_BPV: Tensor = self.mlm_head(hidden_BPD, self.encoder.token_embeddings.weight)
        return logits_BPV


def _cross_entropies(log_probs_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Return the cross entropy (N,) of each label, 0 where there is no label."""
    return F.nll_loss(log_probs_NC, labels_N, ignore_index=NO_LABEL, reduction="none")


def _num_correct(log_probs_NC: Tensor, labels_N: Tensor) -> Tensor:
    return (log_probs_NC.argmax(dim=-1) == labels_N).sum(dtype=torch.float32)


def _confidence(log_probs_NV: Tensor, losses_N: Tensor, is_labelled_N: Tensor) -> dict[str, Tensor]:
    """Return the summed entropy and probability of the truth, from what the loss has computed."""
    entropies_N = -log_probs_NV.exp().mul_(log_probs_NV).sum(dim=-1)
    return {
        "entropy": (entropies_N * is_labelled_N).sum(),
        "p_true": (torch.exp(-losses_N) * is_labelled_N).sum(),
    }
