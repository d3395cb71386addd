"""The contract of the loop: joint losses, slots, and the objective a config builds."""

import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from ssl_models import ObjectiveConfig, build_objective
from ssl_models.autoencoder import Autoencoder, AutoencoderConfig
from ssl_models.bert import BertConfig
from ssl_models.contrastive import Contrastive, ContrastiveConfig
from ssl_models.contrastive_losses import NTXentLossConfig
from ssl_models.masked_language import MaskedLanguage, MaskedLanguageConfig
from ssl_models.objective import Batch, Objective, StepOutput, Terms, joint_loss
from ssl_models.resnet import ResNetConfig
from ssl_models.vit import ViTConfig


class _Distance(Objective):
    """The smallest objective: weighted squared distance of one parameter to every row."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = {"distance": 2.0}
        self.centre = nn.Parameter(torch.tensor(0.5))

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        return {"distance": batch["weight"].sum()}

    def forward(self, batch: Batch) -> StepOutput:
        squares = (batch["x"] - self.centre) ** 2 * batch["weight"]
        term = (squares.sum(), self.weights(batch)["distance"])
        return StepOutput(terms={"distance": term}, metrics={})

    def encode(self, batch: Batch) -> Tensor:
        return batch["x"][:, None]


def _terms(**sums: float) -> Terms:
    return {name: (torch.tensor(value), torch.tensor(1.0)) for name, value in sums.items()}


def test_joint_loss_is_the_coefficient_sum_of_the_means() -> None:
    totals = {"mlm": torch.tensor(4.0), "nsp": torch.tensor(5.0)}
    loss = joint_loss(_terms(mlm=6.0, nsp=10.0), {"mlm": 1.0, "nsp": 0.25}, totals)
    assert loss.item() == 6.0 / 4.0 + 0.25 * 10.0 / 5.0


def test_a_term_without_weight_contributes_exactly_0_and_no_gradient() -> None:
    empty_sum = torch.tensor(0.0, requires_grad=True)
    terms = {"mlm": (empty_sum, torch.tensor(0.0)), **_terms(nsp=3.0)}
    totals = {"mlm": torch.tensor(0.0), "nsp": torch.tensor(2.0)}
    loss = joint_loss(terms, {"mlm": 1.0, "nsp": 1.0}, totals)
    torch.autograd.backward(loss)
    assert loss.item() == 1.5
    assert empty_sum.grad is not None
    assert empty_sum.grad.item() == 0.0


def test_a_term_that_is_not_finite_is_not_hidden() -> None:
    loss = joint_loss(_terms(mlm=float("nan")), {"mlm": 1.0}, {"mlm": torch.tensor(3.0)})
    assert loss.isnan()


def test_the_shares_of_unequal_slots_add_up_to_the_loss_and_gradient_of_the_batch() -> None:
    batch = {"x": torch.tensor([1.0, 2.0, 4.0]), "weight": torch.tensor([1.0, 0.0, 2.0])}
    objective = _Distance()
    totals = objective.weights(batch)
    shares = []
    for rows in (slice(0, 1), slice(1, 3)):
        slot = {name: value[rows] for name, value in batch.items()}
        shares.append(joint_loss(objective(slot).terms, objective.coefficients, totals))
    torch.autograd.backward(torch.stack(shares).sum())
    assert sum(share.item() for share in shares) == pytest.approx(2 * (0.5**2 + 2 * 3.5**2) / 3)
    assert objective.centre.grad is not None
    assert objective.centre.grad.item() == pytest.approx(-2 * 2 * (0.5 + 2 * 3.5) / 3)


def test_calling_an_objective_runs_its_hooks() -> None:
    seen: list[StepOutput] = []
    objective = _Distance()
    objective.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    output = objective({"x": torch.ones(2), "weight": torch.ones(2)})
    assert seen == [output]


def test_an_objective_that_does_not_join_slots_says_so() -> None:
    objective = _Distance()
    assert not objective.joins_slots
    with pytest.raises(NotImplementedError, match="_Distance does not join slots"):
        objective.embed({})
    with pytest.raises(NotImplementedError, match="_Distance does not join slots"):
        objective.join([], [])


def test_build_objective_builds_what_the_config_says() -> None:
    config = MaskedLanguageConfig(
        encoder=BertConfig(vocab_size=11, hidden_size=8, num_layers=1, intermediate_size=16),
        nsp_coefficient=0.5,
    )
    objective = build_objective(config)
    assert isinstance(objective, MaskedLanguage)
    assert objective.coefficients == {"mlm": 1.0, "nsp": 0.5}


@pytest.mark.parametrize(
    ("config", "kind", "coefficients"),
    [
        (
            ContrastiveConfig(encoder=ResNetConfig(width=4)),
            Contrastive,
            {"triplet": 1.0},
        ),
        (
            ContrastiveConfig(
                encoder=ViTConfig(hidden_size=8, num_layers=1, num_heads=1),
                loss=NTXentLossConfig(temperature=0.1),
                negatives_from="global",
            ),
            Contrastive,
            {"nt_xent": 1.0},
        ),
        (
            AutoencoderConfig(encoder=ResNetConfig(width=4, channels=1), image_size=28),
            Autoencoder,
            {"reconstruction": 1.0},
        ),
    ],
    ids=["triplet", "nt-xent", "autoencoder"],
)
def test_objectives_of_images_are_built_from_their_record(
    config: ObjectiveConfig, kind: type[Objective], coefficients: dict[str, float]
) -> None:
    adapter: TypeAdapter[ObjectiveConfig] = TypeAdapter(ObjectiveConfig)
    read = adapter.validate_json(adapter.dump_json(config))
    assert read == config
    objective = build_objective(read)
    assert type(objective) is kind
    assert objective.coefficients == coefficients
