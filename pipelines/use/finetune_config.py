"""How a classifier is trained; light, because the command reads it for its flags."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Full fine-tuning with warm-up, linear decay and early stopping."""

    epochs: int = 10
    """Passes over the training examples, if nothing stops it before."""
    least_steps: int = 300
    """Optimizer steps at least: few examples get more passes."""
    rows_per_step: int = 32
    slots: int = 4
    """Equal parts of a step, one forward pass each; the largest number of workers."""
    evaluations: int = 20
    """How often the validation examples are asked, spread over the steps."""
    patience: int = 5
    """Evaluations in a row without a better one that end the training."""
    learning_rate: float | None = None
    """The peak; by default 0.06 over the width of the features: 5e-4 at 128, 8e-5 at 768."""
    warmup_ratio: float = 0.1
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 0.01
    dropout: float = 0.1
    """Probability of dropping a feature before the linear head."""
    balance: bool = False
    """Weigh every class alike, however many examples it has."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "rows_per_step", "slots", "evaluations", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.rows_per_step % self.slots:
            raise ValueError(
                f"rows_per_step {self.rows_per_step} is not a multiple of slots {self.slots}"
            )
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")

    def steps(self, num_examples: int) -> int:
        """Return the optimizer steps for so many training examples."""
        return max(self.least_steps, -(-self.epochs * num_examples // self.rows_per_step))
