"""The table of label fractions: one part of the examples for every contestant, and its figures."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.data.vocabulary import Vocabulary
from pipelines.errors import StorageError, UserError
from pipelines.use.finetune_config import FinetuneConfig, LabelledData
from pipelines.use.fit import FitTask
from pipelines.use.label_table import (
    SETTINGS,
    Row,
    Trial,
    at_most,
    label_table,
    part_of,
    run_trial,
    show,
)
from pipelines.use.labelled import Example, Labelled, deal, labelled
from pipelines.use.registry import load_encoder
from pipelines.verbs_finetune import LabelTable
from tests.labelled import examples_of, topics, write_image_encoder, write_text_encoder
from tests.pictures import SHAPES, make_picture


def data_of(count: int) -> Labelled:
    return labelled(*deal(examples_of(topics(count), "topic"), 0.15, 0.15))


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary) -> FitTask:
    encoder = load_encoder(str(write_text_encoder(tmp_path_factory.mktemp("e") / "e", vocabulary)))
    config = FinetuneConfig(epochs=1, least_steps=4, evaluations=1, rows_per_step=8)
    return FitTask(config=config, encoder=encoder, labelled=data_of(120))


def test_parts_are_shares_of_every_class_and_grow() -> None:
    data = data_of(300)
    parts = {fraction: part_of(data, fraction, 0) for fraction in (0.01, 0.1, 0.5, 1.0)}
    for name in ("training", "validation"):
        held = [set(getattr(part, name)) for part in parts.values()]
        assert held[0] < held[1] < held[2] < held[3] == set(getattr(data, name))
        for label in data.classes:
            of_class = [sum(e.label == label for e in part) for part in held]
            assert of_class[0] == 1
            assert of_class[2] == round(0.5 * of_class[3])
    assert all(part.test == data.test and part.classes == data.classes for part in parts.values())
    assert part_of(data, 0.1, 1).training != parts[0.1].training
    assert part_of(data, 0.1, 0).training == parts[0.1].training


def test_at_most_so_many_count_as_all() -> None:
    data = data_of(300)
    there = len(data.training) + len(data.validation)
    few = at_most(data, 60)
    assert len(few.training) + len(few.validation) == pytest.approx(60, abs=len(data.classes))
    assert set(few.training) < set(data.training)
    assert few.test == data.test
    assert at_most(data, 0) is at_most(data, there) is data


@pytest.mark.slow
def test_every_contestant_is_given_and_judged_on_the_same_examples(
    ray_session: None, task: FitTask
) -> None:
    del ray_session
    (row,) = label_table(task, [0.2], seeds=2)
    part = part_of(task.labelled, 0.2, 0)
    assert row.labels == len(part.training) + len(part.validation)
    assert {name: found.shape for name, found in row.right.items()} == dict.fromkeys(
        SETTINGS, (2, len(task.labelled.test))
    )
    for name, setting in row.settings.items():
        again = [run_trial(task, Trial(name, 0.2, seed, setting)).right for seed in (0, 1)]
        assert np.array_equal(row.right[name], again), name
    assert not np.array_equal(row.right["fine-tuned"], row.right["from scratch"])


def test_the_linear_baseline_learns_topics_by_their_words(task: FitTask) -> None:
    found = run_trial(task, Trial("linear", 1.0, 0, 10.0))
    assert found.validation > 0.9
    assert found.right.mean() > 0.9


def test_the_seed_that_is_asked_for_is_that_of_the_first_trial(task: FitTask) -> None:
    third = run_trial(task, Trial("from scratch", 0.3, 3, 1.0))
    from_three = replace(task, config=replace(task.config, seed=3))
    assert np.array_equal(
        run_trial(from_three, Trial("from scratch", 0.3, 0, 1.0)).right, third.right
    )
    other = run_trial(task, Trial("from scratch", 0.3, 0, 1.0))
    assert not np.array_equal(other.right, third.right)


def test_the_linear_baseline_of_pictures_sees_raw_pixels(task: FitTask, tmp_path: Path) -> None:
    pictures = [
        Example(make_picture(i), i * 2**64 // 60, SHAPES[i % len(SHAPES)]) for i in range(60)
    ]
    encoder = load_encoder(str(write_image_encoder(tmp_path / "images")))
    of_pictures = replace(task, encoder=encoder, labelled=labelled(*deal(pictures, 0.2, 0.2)))
    found = run_trial(of_pictures, Trial("linear", 1.0, 0, 1.0))
    assert len(found.right) == len(of_pictures.labelled.test)
    assert found.labels == 48


def test_a_lead_is_paired_and_has_an_interval() -> None:
    dice = np.random.default_rng(0)
    scratch = (dice.random((3, 2000)) < 0.6).astype(np.int64)
    ahead = scratch.copy()
    ahead[:, :100] = 1
    row = Row(
        fraction=0.01,
        labels=30,
        settings=dict.fromkeys(SETTINGS, 1.0),
        right={"fine-tuned": ahead, "from scratch": scratch, "linear": ahead},
    )
    lead, low, high = row.lead("from scratch")
    assert lead == pytest.approx((ahead - scratch).mean())
    # Unpaired, an interval of 2000 examples would be some 3 % wide to either side.
    assert 0 < lead - 0.01 < low < lead < high < lead + 0.01
    assert row.lead("linear") == (0, 0, 0)
    assert "+0.0 (+0.0 to +0.0)" in show([row])
    assert "1%" in show([row])
    assert f"± {row.accuracies('from scratch').std(ddof=1):.1%}" in show([row])
    assert row.record()["lead_over_scratch"] == (lead, low, high)


def test_where_the_table_goes_is_seen_to_before_anything_is_trained(tmp_path: Path) -> None:
    source = LabelledData(data=("d",), labels="l")
    with pytest.raises(StorageError, match=r"cannot write .*/none/table\.json: No such file"):
        LabelTable(model="m", source=source, out=tmp_path / "none" / "table.json").run()
    (tmp_path / "raw.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"raw\.jsonl is a raw shard by its name"):
        LabelTable(model="m", source=source, out=tmp_path / "raw.jsonl").run()


def test_a_table_of_nothing_is_refused() -> None:
    source = LabelledData(data=("d",), labels="l")
    with pytest.raises(UserError, match="fractions must be above 0 and at most 1"):
        LabelTable(model="m", source=source, fractions=(0.0, 1.0))
    with pytest.raises(UserError, match="seeds must be at least 1"):
        LabelTable(model="m", source=source, seeds=0)
    with pytest.raises(UserError, match="most must be at least 0"):
        LabelTable(model="m", source=source, most=-1)
