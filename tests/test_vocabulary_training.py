"""A vocabulary is a function of the text of a corpus, not of how the corpus is cut or counted."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.cli import main
from pipelines.data import vocabulary_training, word_counts
from pipelines.data.manifest import Manifest
from pipelines.data.vocabulary import VocabularyConfig
from pipelines.data.vocabulary_training import train_on_corpus, train_vocabulary
from pipelines.errors import DataError
from tests.corpus import build_manifest, make_text

TEXTS = [make_text(i, 40) for i in range(140)]
CONFIG = VocabularyConfig(size=600, alphabet=64)


def write_shards(folder: Path, texts: list[str], num_shards: int) -> list[Path]:
    folder.mkdir(parents=True)
    paths = [folder / f"part-{shard}.jsonl" for shard in range(num_shards)]
    for shard, path in enumerate(paths):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[shard::num_shards])
        path.write_text("".join(lines), encoding="utf-8")
    return paths


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that sets how much text a task counts."""
    return lambda size: monkeypatch.setattr(vocabulary_training, "BYTES_PER_TASK", size)


@pytest.mark.usefixtures("ray_session")
def test_the_vocabulary_is_the_same_however_the_corpus_is_cut_and_counted(
    tmp_path: Path, small_tasks: Callable[[int], None]
) -> None:
    reference = train_vocabulary(TEXTS, CONFIG).json
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    cuts = [(TEXTS, 1, 20_000, 100_000), (TEXTS, 7, 4_000, 30_000), (shuffled, 7, 4_000, 10**9)]
    for number, (texts, num_shards, block_bytes, task_bytes) in enumerate(cuts):
        paths = write_shards(tmp_path / str(number), texts, num_shards)
        manifest = build_manifest(paths, block_bytes=block_bytes)
        small_tasks(task_bytes)
        assert train_on_corpus(manifest, CONFIG).json == reference


@pytest.mark.usefixtures("ray_session")
def test_only_the_most_frequent_words_come_to_the_driver(
    tmp_path: Path,
    small_tasks: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(word_counts, "MAX_WORDS", 30)
    manifest = build_manifest(write_shards(tmp_path / "a", TEXTS, 3))
    small_tasks(100_000)
    few = train_on_corpus(manifest, CONFIG)
    assert few.json == train_vocabulary(TEXTS, CONFIG).json
    monkeypatch.undo()
    assert few.size < train_vocabulary(TEXTS, CONFIG).size


def test_only_documents_for_training_are_counted(tmp_path: Path) -> None:
    manifest = build_manifest(write_shards(tmp_path / "a", TEXTS, 2), heldout_ratio=0.5)
    used = [*manifest.texts("training")]
    assert 0 < len(used) < len(TEXTS)
    assert train_on_corpus(manifest, CONFIG).json == train_vocabulary(used, CONFIG).json


@pytest.mark.usefixtures("ray_session")
def test_a_shard_that_changed_is_named(tmp_path: Path, small_tasks: Callable[[int], None]) -> None:
    paths = write_shards(tmp_path / "a", TEXTS, 3)
    manifest = build_manifest(paths)
    paths[1].write_bytes(paths[1].read_bytes().replace(b" the ", b" teh "))
    small_tasks(30_000)
    with pytest.raises(DataError, match=r"part-1\.jsonl: .*changed since") as raised:
        train_on_corpus(manifest, CONFIG)
    assert "\n" not in str(raised.value)


def test_tasks_are_as_large_as_they_have_to_be(
    tmp_path: Path, small_tasks: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = build_manifest(write_shards(tmp_path / "a", TEXTS, 2))
    numbers = manifest.blocks_of("training")

    def tasks(manifest: Manifest) -> list[list[int]]:
        found = vocabulary_training._tasks(manifest)
        assert [number for task in found for number in task] == numbers
        return found

    assert len(tasks(manifest)) == 1
    small_tasks(1)
    assert len(tasks(manifest)) == len(numbers) > 8
    monkeypatch.setattr(vocabulary_training, "MAX_TASKS", 4)
    assert len(tasks(manifest)) <= 4


@pytest.mark.usefixtures("ray_session")
def test_the_verb_takes_every_number_of_a_vocabulary_and_says_one_line(
    tmp_path: Path,
    small_tasks: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_shards(tmp_path / "a", TEXTS, 2)
    small_tasks(100_000)
    monkeypatch.chdir(tmp_path)
    flags = "--vocabulary.size 400 --vocabulary.no-lowercase --vocabulary.alphabet 50"
    flags += " --vocabulary.min-frequency 9 --source.heldout-ratio 0"
    assert main(["vocab", "a", "--out", "made.json", *flags.split()]) == 0
    config = VocabularyConfig(size=400, lowercase=False, alphabet=50, min_frequency=9)
    assert (tmp_path / "made.json").read_text() == train_vocabulary(TEXTS, config).json
    out, err = capfd.readouterr()
    assert (out, err) == ("400 pieces in made.json\n", "")
