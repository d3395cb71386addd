"""Recipes: sizes and schedules of the large ones, blocks that can travel, and one true step."""

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

from pipelines.data.images import ImageRows
from pipelines.data.manifest import Picture
from pipelines.data.text import TextRows
from pipelines.data.vocabulary import Vocabulary
from pipelines.recipes import RECIPES, recipe
from pipelines.training.loop import build_learner, train_step
from ssl_models.autoencoder import AutoencoderConfig
from ssl_models.contrastive import ContrastiveConfig
from ssl_models.image_encoder import build_image_encoder
from ssl_models.masked_language import MaskedLanguage
from ssl_models.optim import learning_rate
from tests.corpus import make_documents
from tests.pictures import make_picture

LARGE = [name for name in RECIPES if name.startswith(("text-base", "text-large"))]
SMALL = ["mnist-triplet", "mnist-nt-xent", "mnist-autoencoder", "fashion-triplet"]
GPUS = ["imagenet-triplet", "imagenet-vit"]
PICTURES = [*SMALL, "photos-triplet", *GPUS]
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


def contrastive(name: str) -> ContrastiveConfig:
    objective = recipe(name).objective
    assert isinstance(objective, ContrastiveConfig)
    return objective


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("imagenet-triplet", 25_557_032 - (2048 * 1000 + 1000)),
        ("imagenet-vit", 22_050_664 - (384 * 1000 + 1000) - 384 - 197 * 384),
    ],
)
def test_the_encoders_of_imagenet_have_their_published_sizes(name: str, parameters: int) -> None:
    """Those of torchvision's resnet50 and of DeiT-S, but for classifier, class token, positions."""
    with torch.device("meta"):
        encoder = build_image_encoder(contrastive(name).encoder)
    assert num_parameters(encoder) == parameters


@pytest.mark.parametrize("name", GPUS)
def test_the_runs_of_imagenet_make_a_hundred_epochs(name: str) -> None:
    config = recipe(name)
    trained_on = 1_281_167 * (1 - config.source.heldout_ratio)
    epochs = config.steps * config.order.rows_per_step / trained_on
    assert epochs == pytest.approx(100, rel=0.02)


@pytest.mark.parametrize("name", PICTURES)
def test_its_blocks_of_pictures_are_large_enough_to_travel(name: str) -> None:
    config = recipe(name)
    views = 2 if config.images.rows == "pairs" else 1
    bytes_per_row = views * config.images.channels * config.images.views.size**2
    assert 0.5e6 < bytes_per_row * config.order.rows_per_block < 8e6
    assert config.workers <= config.order.slots


def test_the_small_runs_differ_in_what_is_compared_alone() -> None:
    """So that their figures can stand in one table."""
    triplets, drawing = recipe("mnist-triplet"), recipe("mnist-autoencoder")
    assert isinstance(drawing.objective, AutoencoderConfig)
    assert drawing.objective.encoder == contrastive("mnist-triplet").encoder
    assert contrastive("mnist-nt-xent").encoder == contrastive("mnist-triplet").encoder
    for name in SMALL:
        assert recipe(name).order.rows_per_step == triplets.order.rows_per_step
        assert recipe(name).optimizer == triplets.optimizer
    assert drawing.images.views == triplets.images.views


def test_a_digit_is_not_mirrored_or_inverted() -> None:
    for name in SMALL[:3]:
        views = recipe(name).images.views
        assert (views.flip, views.inversion) == (0.0, 0.0)
        assert views.crop_scale[0] >= 0.5


def test_no_two_recipes_that_are_more_than_a_test_register_under_one_name() -> None:
    names = [name for name in RECIPES if "tiny" not in name and name != "text-mini"]
    assert len({recipe(name).register for name in names}) == len(names)


@pytest.mark.parametrize(
    "name", [*SMALL, *(pytest.param(name, marks=pytest.mark.slow) for name in PICTURES[4:])]
)
def test_a_step_can_be_made_of_real_files(name: str, alone: None) -> None:
    """Colour pictures in two formats, as wide as no view; every parameter that is used learns."""
    del alone
    made = recipe(name)
    config = replace(made, order=replace(made.order, rows_per_step=4, slots=2), workers=1)
    maker = ImageRows(config.images)
    side = made.images.views.size + 20
    pictures = [Picture(i, i + 1, make_picture(i, side)) for i in range(4)]
    rows = maker.rows(pictures, seed=0, order=0)
    slots = {
        slot: maker.collate(rows.slice(2 * slot, 2), seed=0, step=0, slot=slot) for slot in range(2)
    }
    learner = build_learner(config, torch.device("cpu"))

    total, weight = train_step(learner, slots, 0)["loss"]

    assert weight == 1.0
    assert 0.0 < float(total) < math.inf
    assert learner.gradients.vector.norm() > 0.0
