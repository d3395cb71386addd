"""Warm starts: the first step starts from the weights that were given, or there is no run."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import BertConfig as PeerConfig
from transformers import BertModel

from pipelines import run as runs
from pipelines.config import RunConfig, to_record, with_vocab_size
from pipelines.data.vocabulary import Vocabulary, VocabularyConfig, load_vocabulary
from pipelines.data.vocabulary_training import train_vocabulary
from pipelines.errors import DataError, UserError
from pipelines.recipes import recipe
from pipelines.run import open_run
from pipelines.training.checkpoint import START_DIGEST, CommitLog
from pipelines.training.loop import build_learner, resume, train_step
from pipelines.training.start import Start, commit_start, draw, load_start
from pipelines.use.bundle import BundleError, write_bundle
from pipelines.use.registry import load_encoder
from tests.corpus import serial_map
from tests.test_train_step import slots

CPU = torch.device("cpu")


def tiny(source: Path, **encoder: Any) -> RunConfig:
    """Return the tiny recipe from a source, with another size for its vocabulary."""
    config = recipe("text-tiny")
    changed = replace(config.masked_language.encoder, vocab_size=400, **encoder)
    return replace(
        config, init_from=str(source), objective=replace(config.masked_language, encoder=changed)
    )


def start(config: RunConfig) -> tuple[Start, str]:
    """Return the start of a run, and what was said."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        return load_start(config), out.getvalue().strip()


@pytest.fixture(scope="module")
def bundle(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the bundle of a tiny run."""
    folder = make_bundle(
        tmp_path_factory.mktemp("source") / "runs" / "first" / "bundle", vocabulary
    )
    (folder.parent / "run.json").write_text("{}")
    return folder


def make_bundle(folder: Path, vocabulary: Vocabulary) -> Path:
    """Write a bundle whose weights are not those of a fresh draw."""
    config = with_vocab_size(recipe("text-tiny"), vocabulary.size)
    objective = draw(config)
    for parameter in objective.parameters():
        nn.init.normal_(parameter, std=0.1)
    record = to_record(config)
    write_bundle(
        folder,
        config={name: record[name] for name in ("objective", "text", "recipe")},
        state=objective.state_dict(),
        tokenizer_json=vocabulary.json,
        lineage={},
        card="",
    )
    return folder


@pytest.fixture(scope="module")
def headless(vocabulary: Vocabulary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a BertModel as transformers saves it: it has no heads, and two embeddings more."""
    folder = tmp_path_factory.mktemp("headless")
    config = PeerConfig(
        vocab_size=vocabulary.size + 2,
        max_position_embeddings=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    BertModel(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(vocabulary.json)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Be the only rank of a process group."""
    store = tmp_path_factory.mktemp("start") / "one"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("what", ["bundle", "run"])
def test_a_run_takes_weights_and_vocabulary_of_a_bundle_or_a_finished_run(
    bundle: Path, vocabulary: Vocabulary, what: str
) -> None:
    source = bundle if what == "bundle" else bundle.parent
    found, said = start(tiny(source, dropout=0.1, initializer_range=0.5))
    assert found.source == str(source)
    assert said == f"starts from {source}"
    assert found.vocabulary.json == vocabulary.json
    assert found.vocab_size == vocabulary.size
    fresh = draw(with_vocab_size(tiny(source), found.vocab_size)).state_dict()
    assert found.weights.keys() == fresh.keys()
    assert not any(torch.equal(found.weights[name], fresh[name]) for name in fresh)


def test_heads_that_the_source_has_not_are_those_of_a_fresh_run_and_named(
    headless: Path, vocabulary: Vocabulary
) -> None:
    found, said = start(tiny(headless))
    fresh = draw(with_vocab_size(tiny(headless), found.vocab_size)).state_dict()
    heads = {name for name in fresh if name.startswith(("mlm_head", "nsp_head"))}
    assert all(torch.equal(found.weights[name], fresh[name]) for name in heads)
    assert not torch.equal(found.weights["encoder.pooler.weight"], fresh["encoder.pooler.weight"])
    assert f"drawn anew: {', '.join(name for name in fresh if name in heads)}" in said
    assert found.vocab_size == vocabulary.size + 2


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("max_length", 64, "is 32, of this run 64: set --objective.encoder.max-length 32"),
        ("hidden_size", 64, "is 32, of this run 64: set --objective.encoder.hidden-size 32"),
        ("num_layers", 1, "is 2, of this run 1: set --objective.encoder.num-layers 2"),
        ("num_heads", 4, "is 2, of this run 4: set --objective.encoder.num-heads 2"),
        ("intermediate_size", 32, "set --objective.encoder.intermediate-size 64"),
    ],
)
def test_the_first_misfit_is_named_with_the_way_out(
    bundle: Path, field: str, value: int, said: str
) -> None:
    with pytest.raises(UserError) as refused:
        load_start(tiny(bundle, **{field: value}))
    assert said in str(refused.value)
    assert str(refused.value).startswith(f"{field} of {bundle}")


def test_another_vocabulary_is_refused_and_the_same_one_is_not(
    bundle: Path, vocabulary: Vocabulary, tmp_path: Path
) -> None:
    same, other = tmp_path / "same.json", tmp_path / "other.json"
    same.write_text(vocabulary.json)
    trained = train_vocabulary(["some other text"] * 9, VocabularyConfig(size=300))
    other.write_text(trained.json)
    start(replace(tiny(bundle), vocabulary_file=str(same)))
    with pytest.raises(UserError, match=r"other\.json is not the vocabulary of .*leave --vocab"):
        load_start(replace(tiny(bundle), vocabulary_file=str(other)))


def test_a_cased_vocab_txt_is_read_as_the_run_reads_it(
    vocabulary: Vocabulary, tmp_path: Path
) -> None:
    path = tmp_path / "vocab.txt"
    ids = vocabulary.tokenizer.get_vocab()
    path.write_text("\n".join(sorted(ids, key=ids.__getitem__)))
    cased = load_vocabulary(path, lowercase=False)
    source = make_bundle(tmp_path / "cased", cased)
    config = replace(tiny(source), vocabulary_file=str(path))
    with pytest.raises(UserError, match=r"vocab\.txt is not the vocabulary of"):
        load_start(config)
    reading = replace(config, vocabulary=replace(config.vocabulary, lowercase=False))
    assert start(reading)[0].vocabulary.json == cased.json


def test_a_start_that_was_killed_before_its_record_leaves_no_weights(
    bundle: Path, headless: Path, corpus_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "parallel_map", serial_map)
    config = replace(tiny(bundle), data=(str(corpus_dir),), name="run", runs=str(tmp_path))
    folder = tmp_path / "run"
    open_run(config, folder)
    (folder / "run.json").unlink()

    run = open_run(replace(config, init_from=str(headless)), folder)
    commit = run.log.newest()
    assert commit is not None
    assert run.started_from == str(headless)
    weights, _ = run.log.load(commit)
    name = "encoder.pooler.weight"
    assert torch.equal(weights[name], load_encoder(str(headless)).state[name])
    (folder / "run.json").unlink()
    assert open_run(replace(config, init_from=""), folder).log.newest_whole() == (None, ())

    run.log.begin_attempt(1)
    (folder / "run.json").unlink()
    with pytest.raises(DataError, match=r"run has lost its run\.json: restore it"):
        open_run(config, folder)


def test_a_source_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        load_start(tiny(tmp_path / "nowhere"))
    with pytest.raises(BundleError, match="there is no registry at"):
        load_start(
            replace(
                tiny(tmp_path),
                init_from="models:/encoder@champion",
                tracking_uri=f"sqlite:///{tmp_path}/mlflow.db",
            )
        )


def test_given_weights_are_the_commit_of_step_0_and_training_goes_on_from_it(
    alone: None, bundle: Path, tmp_path: Path
) -> None:
    del alone
    log, (_, weights, _, size) = CommitLog(tmp_path), load_start(tiny(bundle))
    config = with_vocab_size(tiny(bundle), size)
    batches = slots()
    for batch in batches.values():
        for name in ("input_ids", "masked_ids"):
            batch[name] = np.minimum(batch[name], size - 1)
    commit_start(log, weights)

    attempt = log.begin_attempt(1)
    learner = build_learner(config, CPU)
    position = resume(log, attempt, learner)
    assert (position.step, position.digest) == (0, START_DIGEST)
    assert position.parent == attempt.commit != ""
    for name, tensor in learner.objective.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    train_step(learner, batches, 0)
    expected = {name: tensor.clone() for name, tensor in learner.objective.state_dict().items()}
    assert any(not torch.equal(expected[name], weights[name]) for name in weights)

    # The same step from weights that were never saved: the optimizer starts from nothing.
    plain = build_learner(config, CPU)
    plain.objective.load_state_dict(weights)
    train_step(plain, batches, 0)
    for name, tensor in plain.objective.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
