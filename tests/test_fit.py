"""Training on labels, in this process: what stops it, what it keeps, and what it can learn."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipelines.data.vocabulary import Vocabulary
from pipelines.errors import DataError
from pipelines.training.spool import read_spool
from pipelines.use.classification_figures import figures
from pipelines.use.classifier import probabilities
from pipelines.use.encoder import Encoder
from pipelines.use.finetune_config import FinetuneConfig
from pipelines.use.fit import FitTask, Fitted, _Examples, fit
from pipelines.use.inputs import PictureInputs, TextInputs, inputs_of
from pipelines.use.labelled import Example, Labelled, deal, labelled
from pipelines.use.registry import load_encoder
from ssl_models.classification import Classification
from tests.labelled import examples_of, pairs, topics, write_image_encoder, write_text_encoder
from tests.pictures import make_picture

CPU = torch.device("cpu")
Fit = Callable[[FitTask], Fitted]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary) -> Encoder:
    return load_encoder(str(write_text_encoder(tmp_path_factory.mktemp("e") / "e", vocabulary)))


@pytest.fixture
def group(tmp_path: Path, one_thread: None) -> Iterator[None]:
    del one_thread
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def dealt(examples: list[Example]) -> Labelled:
    return labelled(*deal(examples, 0.15, 0.15))


def task_of(encoder: Encoder, data: Labelled, **changes: Any) -> FitTask:
    config = FinetuneConfig(
        **({"epochs": 1, "least_steps": 40, "rows_per_step": 16, "evaluations": 8} | changes)
    )
    return FitTask(config=config, encoder=encoder, labelled=data)


@pytest.mark.usefixtures("group")
def test_it_stops_when_nothing_gets_better_and_keeps_the_best(
    encoder: Encoder, tmp_path: Path
) -> None:
    # Labels at random: nothing that is learned serves the validation examples for long.
    coin = np.random.default_rng(0)
    lines = [line | {"coin": str(coin.integers(2))} for line in topics(120)]
    data = dealt(examples_of(lines, "coin"))
    task = task_of(encoder, data, patience=3, least_steps=400, evaluations=40)
    fitted = fit(task, CPU, tmp_path / "spool")
    assert fitted.steps_made == fitted.step + 3 * 10 < 400
    records = [r for r in read_spool(tmp_path / "spool", {}) if "validation" in r.attempt]
    told = [(r.metrics["validation/accuracy"], -r.metrics["validation/loss"]) for r in records]
    assert [r.step for r in records] == list(range(10, fitted.steps_made + 1, 10))
    assert told.index(max(told)) == fitted.step // 10 - 1
    assert max(told) == (fitted.accuracy, -fitted.loss)
    kept = Classification(task.objective)
    kept.load_state_dict(fitted.weights)
    inputs = inputs_of(encoder)
    found = probabilities(kept, inputs, inputs.rows([e.item for e in data.validation]))
    numbers = data.numbers(data.validation)
    assert np.mean(found.argmax(axis=1) == numbers) == pytest.approx(fitted.accuracy)


@pytest.mark.usefixtures("group")
def test_the_same_task_gives_the_same_bytes(encoder: Encoder, tmp_path: Path) -> None:
    task = task_of(encoder, dealt(examples_of(topics(60), "topic")), least_steps=10, evaluations=1)
    one, two = (fit(task, CPU, tmp_path / "spool") for _ in range(2))
    steps = [r.step for r in read_spool(tmp_path / "spool", {}) if "validation" in r.attempt]
    assert steps == [10, 10]
    assert len(list((tmp_path / "spool").iterdir())) == 4  # two attempts, told apart
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)


@pytest.mark.usefixtures("group")
def test_pairs_learn_a_rule_that_needs_both(encoder: Encoder, tmp_path: Path) -> None:
    data = dealt(examples_of(pairs(400), "label", "second"))
    task = task_of(encoder, data, least_steps=200, learning_rate=5e-3, patience=20)
    assert fit(task, CPU, tmp_path / "both").accuracy > 0.9
    alone = dealt(examples_of(pairs(400), "label"))
    first = task_of(encoder, alone, least_steps=100, patience=20)
    assert fit(first, CPU, tmp_path / "first").accuracy < 0.75


def test_a_start_from_scratch_shares_nothing_with_the_encoder(encoder: Encoder) -> None:
    task = task_of(encoder, dealt(examples_of(topics(60), "topic")))
    name = "token_embeddings.weight"
    given = encoder.state[f"encoder.{name}"]
    assert torch.equal(task.build().encoder.state_dict()[name], given)
    fresh = replace(task, from_scratch=True).build().encoder.state_dict()[name]
    assert fresh.shape == given.shape
    assert not torch.isclose(fresh, given).any(dim=1).all()


def test_a_pass_gives_every_example_once(encoder: Encoder) -> None:
    data = dealt(examples_of(topics(90), "topic"))
    count = len(data.training)
    task = task_of(encoder, data, rows_per_step=count, slots=count)
    made = _Examples(task)
    inputs = TextInputs(encoder)
    rows = [tuple(row.ids) for row in inputs.rows([e.item for e in data.training])]
    passes = [
        [tuple(made.slot(step, slot)["input_ids"][0].tolist()) for slot in range(count)]
        for step in (0, 1)
    ]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(rows)
    assert passes[0] != passes[1]


def test_balance_weighs_classes_alike(encoder: Encoder) -> None:
    uneven = topics(200, 2)
    uneven = [line for i, line in enumerate(uneven) if line["topic"] == "sea" or i % 6 == 1]
    data = dealt(examples_of(uneven, "topic"))
    count = len(data.training)
    task = task_of(encoder, data, rows_per_step=count, slots=1, balance=True)
    batch = _Examples(task).slot(0, 0)
    sums = np.bincount(batch["labels"], weights=batch["weight"])
    assert sums == pytest.approx(count / 2)
    plain = _Examples(replace(task, config=replace(task.config, balance=False))).slot(0, 0)
    assert (plain["weight"] == 1).all()


def test_the_longer_of_a_pair_is_cut_first(encoder: Encoder) -> None:
    inputs, vocabulary = TextInputs(encoder), encoder.vocabulary
    long, short = "sailor " * 60, "judge"
    num_short = len(vocabulary.encode([short])[0])
    rows = inputs.rows([(long, short), (short, long), (long, long), (short, short)])
    limit = encoder.max_tokens
    assert [len(row.ids) for row in rows] == [limit, limit, limit, 2 * num_short + 3]
    room = limit - 3
    expected = [room - num_short, num_short, (room + 1) // 2, num_short]
    assert [row.a_length - 2 for row in rows] == expected
    batch = inputs.batch(rows)
    for row, types, ids in zip(rows, batch["token_type_ids"], batch["input_ids"], strict=True):
        assert types.tolist() == [0] * row.a_length + [1] * (len(row.ids) - row.a_length) + [0] * (
            limit - len(row.ids)
        )
        assert ids[0] == vocabulary.cls
        assert ids[row.a_length - 1] == ids[len(row.ids) - 1] == vocabulary.sep


def test_pictures_have_another_view_in_each_pass_and_a_plain_one_to_judge(tmp_path: Path) -> None:
    encoder = load_encoder(str(write_image_encoder(tmp_path / "images")))
    inputs = PictureInputs(encoder)
    views = inputs.maker.config.views
    assert (views.jitter, views.greyscale, views.rotation, views.inversion) == (0, 0, 0, 0)
    assert views.crop_scale[0] == 0.6
    kept = inputs.kept([make_picture(i) for i in range(4)])
    first, again, second = (
        inputs.training_batch(kept, [visit] * 4, seed=0)["image"] for visit in (0, 0, 1)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)
    assert first.shape == (4, 3, 16, 16)
    plain = inputs.batch(inputs.rows([make_picture(0)]))["image"]
    assert np.array_equal(plain[0], encoder.image_rows.plain(make_picture(0)))


def test_parts_are_those_that_pretraining_holds_out_first() -> None:
    examples = examples_of(topics(400), "topic")
    training, validation, test = deal(examples, 0.2, 0.1)
    assert len(training) + len(validation) + len(test) == 400
    assert all(e.content < 0.1 * 2**64 for e in test)
    assert all(0.1 * 2**64 <= e.content < 0.3 * 2**64 for e in validation)


def test_copies_of_test_examples_are_not_trained_on() -> None:
    examples = examples_of(topics(60), "topic")
    data = labelled(examples, examples[:6], examples[3:12])
    assert [len(part) for part in (data.training, data.validation, data.test)] == [48, 3, 9]
    with pytest.raises(DataError, match="validation examples are 'law'"):
        labelled(examples[12:], [examples[0]._replace(label="law")], examples[3:12])


def test_copies_are_no_examples_of_their_own() -> None:
    examples = examples_of(topics(60), "topic")
    data = labelled(examples[:40] * 3, examples[40:50] * 2, examples[50:] * 5)
    assert [len(part) for part in (data.training, data.validation, data.test)] == [40, 10, 10]
    pairs = [
        example._replace(item=(str(example.item), second))
        for example in examples
        for second in ("first", "second", "second")
    ]
    data = labelled(pairs[:120], pairs[120:150], pairs[150:])  # one text in two pairs
    assert [len(part) for part in (data.training, data.validation, data.test)] == [80, 20, 20]


def test_figures_are_those_of_the_definition() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    told = np.array([0, 0, 1, 1, 1, 0])
    found = figures(("a", "b", "c"), labels, np.eye(3, dtype=np.float32)[told] * 0.8 + 0.1)
    assert found.confusion == ((2, 1, 0), (0, 2, 0), (1, 0, 0))
    assert found.accuracy == pytest.approx(4 / 6)
    assert found.precision == pytest.approx((2 / 3, 2 / 3, 0))
    assert found.recall == pytest.approx((2 / 3, 1, 0))
    assert found.macro_f1 == pytest.approx((2 / 3 + 0.8 + 0) / 3)
    assert found.loss == pytest.approx(-(4 * np.log(0.9) + 2 * np.log(0.1)) / 6)
    assert "the most frequent class is 50.0%" in found.lines()[0]
