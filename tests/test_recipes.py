"""The large recipes: BERT's sizes and schedule, blocks that can travel, and one true step."""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import BertConfig as PeerConfig
from transformers import BertForPreTraining, BertModel

from pipelines.data.text import TextRows
from pipelines.data.vocabulary import Vocabulary
from pipelines.recipes import RECIPES, recipe
from pipelines.training.loop import build_learner, train_step
from ssl_models.masked_language import MaskedLanguage
from ssl_models.optim import learning_rate
from tests.corpus import make_documents

LARGE = [name for name in RECIPES if name.startswith(("text-base", "text-large"))]
STEPS_PER_SECOND = {128: 50, 512: 20}
"""More than any machine that these recipes are meant for makes."""


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "layers", "width", "heads", "encoder", "whole"),
    [
        ("text-base", 12, 768, 12, 109_482_240, 110_106_428),
        ("text-large", 24, 1024, 16, 335_141_888, 336_226_108),
    ],
)
def test_the_sizes_are_those_of_bert_uncased(
    name: str, layers: int, width: int, heads: int, encoder: int, whole: int
) -> None:
    peer_config = PeerConfig(
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    with torch.device("meta"):
        ours = MaskedLanguage(recipe(name).masked_language)
        peers = [BertModel(peer_config), BertForPreTraining(peer_config)]
    assert [num_parameters(peer) for peer in peers] == [encoder, whole]
    assert num_parameters(ours.encoder) == encoder
    assert num_parameters(ours) == whole
    assert ours.encoder.config.num_heads == heads
    assert ours.encoder.config.max_length == peer_config.max_position_embeddings


@pytest.mark.parametrize("name", ["text-base", "text-large"])
def test_both_phases_together_are_the_steps_and_the_schedule_of_bert(name: str) -> None:
    """A million steps of 256 rows; to 1e-4 in 10,000 of them, then in a line to 0."""
    first, second = recipe(name), recipe(f"{name}-512")
    assert (first.steps, second.steps) == (900_000, 100_000)
    assert (first.text.max_length, second.text.max_length) == (128, 512)
    assert first.objective == second.objective
    assert first.order.rows_per_step == second.order.rows_per_step == 256
    assert first.register == f"rayssl-{name}"
    assert second.init_from == f"models:/{first.register}@candidate"
    assert second.register == f"rayssl-{name}-512"

    def rate(step: int) -> float:
        if step < first.steps:
            return learning_rate(first.optimizer, step, first.steps)
        return learning_rate(second.optimizer, step - first.steps, second.steps)

    assert rate(4_999) == pytest.approx(0.5e-4)
    assert rate(9_999) == pytest.approx(1e-4)
    for step in (10_000, 300_000, 600_000, 899_999, 901_000, 950_000, 999_999):
        in_a_line = 1e-4 * (1_000_000 - step) / 990_000
        assert rate(step) == pytest.approx(in_a_line, rel=0.02), step


@pytest.mark.parametrize("name", LARGE)
def test_its_blocks_are_large_enough_to_travel_and_few_enough(
    name: str, vocabulary: Vocabulary
) -> None:
    config = recipe(name)
    maker = TextRows(config.text, vocabulary)
    rows = maker.rows(make_documents(40, num_sentences=120), seed=0, order=0)
    bytes_per_block = rows.nbytes / rows.num_rows * config.order.rows_per_block
    assert 0.1e6 < bytes_per_block < 8e6
    blocks_per_step = config.order.slots / config.order.steps_per_block
    assert blocks_per_step * STEPS_PER_SECOND[config.text.max_length] < 30
    assert config.workers <= config.order.slots


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """Be the only rank of a process group."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_step_of_the_true_size_can_be_made(alone: None, vocabulary: Vocabulary) -> None:
    del alone
    made = recipe("text-base")
    config = replace(made, order=replace(made.order, rows_per_step=2, slots=2), workers=1)
    maker = TextRows(config.text, vocabulary)
    rows = maker.rows(make_documents(4), seed=0, order=0)
    slots = {slot: maker.collate(rows.slice(slot, 1).combine_chunks()) for slot in range(2)}
    learner = build_learner(config, torch.device("cpu"))

    total, weight = train_step(learner, slots, 0)["loss"]

    chance = math.log(30522) + math.log(2)
    assert float(total / weight) == pytest.approx(chance, rel=0.1)
    # Adam's first step is the sign of the gradient; this bias starts at 0.
    moved = learner.objective.state_dict()["encoder.pooler.bias"].abs().max().item()
    assert moved == pytest.approx(learning_rate(config.optimizer, 0, config.steps), rel=0.01)
