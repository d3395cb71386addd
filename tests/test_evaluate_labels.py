"""Labels told from frozen features: the probes, their intervals, and the whole from raw shards."""

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import TfidfVectorizer
from threadpoolctl import threadpool_limits

from pipelines.cli import main
from pipelines.config import to_record
from pipelines.data.indexing import build
from pipelines.data.randomness import draws, key
from pipelines.data.records import Modality
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.data.vocabulary import Vocabulary
from pipelines.errors import UserError
from pipelines.recipes import recipe
from pipelines.training.start import draw, untrained
from pipelines.use.bundle import write_bundle
from pipelines.use.encoder import Encoder
from pipelines.use.evaluate_labels import LabelEvaluation, evaluate_labels
from pipelines.use.labelled_features import Part, embedded, labelled_items
from pipelines.use.probe import (
    INVERSE_STRENGTHS,
    kept_aside,
    linear_probe,
    nearest_neighbours,
    stratified,
    word_vectorizer,
)
from ssl_models import build_objective
from ssl_models.classification import ClassificationConfig
from ssl_models.resnet import ResNetConfig
from tests.bundles import image_bundle
from tests.corpus import make_text, serial_map
from tests.pictures import SHAPES, extension, make_picture, make_tar, write_pictures


@pytest.fixture(autouse=True)
def one_thread_of_sklearn() -> Iterator[None]:
    """Compute on one thread, as a worker does: for small matrices two only wait for each other."""
    with threadpool_limits(1):
        yield


def words_of(count: int, seed: int = 0) -> NDArray[np.uint64]:
    return draws(key(seed, "test"), np.arange(count, dtype=np.uint64))


def clouds(count: int, spread: float, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return points of three classes around three corners."""
    dice = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    return np.eye(3)[labels] * 3 + 1 + spread * dice.standard_normal((count, 3)), labels


def sparse_of(points: NDArray[np.float64]) -> Any:
    return DictVectorizer().fit_transform(
        [{str(i): value for i, value in enumerate(point)} for point in points]
    )


def test_each_class_has_its_share_whatever_the_order_of_the_items() -> None:
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    words = words_of(1000)
    chosen = stratified(labels, words, 100)
    assert np.bincount(labels[chosen]).tolist() == [60, 30, 10]
    assert len(np.unique(chosen)) == 100
    order = np.random.default_rng(0).permutation(1000)
    shuffled = stratified(labels[order], words[order], 100)
    assert set(order[shuffled]) == set(chosen)
    assert set(stratified(labels, words_of(1000, seed=1), 100)) != set(chosen)
    assert set(stratified(labels, words, 101)) > set(chosen)


def test_a_fifth_of_each_class_is_kept_aside() -> None:
    labels = np.repeat([0, 1, 2], [60, 7, 4])
    aside = kept_aside(labels, words_of(71))
    assert np.bincount(labels[aside], minlength=3).tolist() == [12, 1, 0]


def test_neighbours_vote_as_a_loop_over_them_does() -> None:
    given, labels = clouds(90, 1.5, seed=0)
    asked, _ = clouds(60, 1.5, seed=1)
    aside = kept_aside(labels, words_of(90))
    for rule in ("cosine", "euclidean"):
        expected = []
        for point in asked:
            if rule == "cosine":
                lengths = np.linalg.norm(given, axis=1) * np.linalg.norm(point)
                nearness = given @ point / lengths
                weights = np.exp(nearness / 0.07)
            else:
                nearness = -np.linalg.norm(given - point, axis=1)
                weights = -1 / nearness
            votes = np.zeros(3)
            for place in np.argsort(-nearness)[:20]:
                votes[labels[place]] += weights[place]
            expected.append(votes.argmax())
        told = nearest_neighbours(given, labels, aside, asked, (rule,))
        assert told.tolist() == expected
        sparse = sparse_of(given), labels, aside, sparse_of(asked)
        assert nearest_neighbours(*sparse, (rule,)).tolist() == expected


def test_the_rule_is_chosen_on_the_items_kept_aside() -> None:
    """Classes that differ in length alone are nothing to the cosine."""
    dice = np.random.default_rng(0)
    labels = np.arange(200) % 2
    given = np.ones((200, 4)) * (1 + labels[:, None]) + 0.1 * dice.standard_normal((200, 4))
    aside = kept_aside(labels, words_of(200))
    told = {
        rules: (nearest_neighbours(given, labels, aside, given, rules) == labels).mean()
        for rules in (("cosine",), ("euclidean",), ("cosine", "euclidean"))
    }
    assert told[("cosine",)] < 0.9 < told[("euclidean",)]
    assert told[("cosine", "euclidean")] == told[("euclidean",)]


def test_a_linear_probe_tells_what_is_linear_and_takes_a_class_too_rare_to_be_kept_aside() -> None:
    given, labels = clouds(99, 0.5, seed=0)
    asked, truth = clouds(300, 0.5, seed=1)
    given, labels = np.vstack([given, [[9.0, 9.0, 9.0]]]), np.append(labels, 3)
    aside = kept_aside(labels, words_of(100))
    assert (linear_probe(given, labels, aside, asked) == truth).mean() > 0.95
    scaled = [points * [1e-3, 1e3, 1.0] + 7 for points in (given, asked)]
    rescaled = linear_probe(scaled[0], labels, aside, scaled[1])
    assert (rescaled == truth).mean() > 0.95
    sparse = linear_probe(sparse_of(given), labels, aside, sparse_of(asked))
    assert (sparse == truth).mean() > 0.95


def test_the_strength_is_chosen_on_the_items_kept_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among much noise a weak probe is better, for a faint difference a strong one."""
    dice = np.random.default_rng(0)
    labels, truth = np.arange(300) % 2, np.arange(4000) % 2
    aside = kept_aside(labels, words_of(300))

    def noisy(classes: NDArray[np.int64]) -> NDArray[np.float64]:
        points = dice.standard_normal((len(classes), 250))
        points[:, :30] += 0.25 * (2 * classes[:, None] - 1)
        return points

    def faint(classes: NDArray[np.int64]) -> NDArray[np.float64]:
        points = dice.standard_normal((len(classes), 2))
        points[:, 1] = points[:, 0] + 0.02 * (2 * classes - 1)
        return points

    for make, too_much in ((noisy, (1.0, 100.0)), (faint, (1e-4, 1.0))):
        given, asked = make(labels), make(truth)

        def accuracy(strengths: tuple[float, ...], given: Any = given, asked: Any = asked) -> float:
            with monkeypatch.context() as patch:
                patch.setattr("pipelines.use.probe.INVERSE_STRENGTHS", strengths)
                return float((linear_probe(given, labels, aside, asked) == truth).mean())

        free = accuracy(INVERSE_STRENGTHS)
        assert all(free > accuracy((fixed,)) + 0.02 for fixed in too_much)


def test_words_are_those_of_any_script() -> None:
    texts = ["naïve cafés, two-fold 42 a", "lower UPPER x9"]
    usual = TfidfVectorizer(ngram_range=(1, 2)).fit(texts)
    assert word_vectorizer().fit(texts).vocabulary_.keys() == usual.vocabulary_.keys()
    chinese = word_vectorizer().fit(["今天天气很好", "今天下雨"])
    assert {"今", "今 天", "雨"} <= chinese.vocabulary_.keys()


def image_encoder(seed: int = 7) -> Encoder:
    config = dataclasses.replace(recipe("image-tiny"), seed=seed)
    return Encoder(to_record(config), None, draw(config).eval())


def parts_of(folder: Path, heldout_ratio: float = 0.2) -> tuple[Part, Part]:
    source = SourceConfig(heldout_ratio=heldout_ratio)
    modality: Modality = "images" if [*folder.glob("*.parquet")] else "text"
    manifest = build(find_shards([str(folder)]), source, serial_map, modality)
    return Part(manifest, "training"), Part(manifest, "heldout")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 240 labelled pictures, four without a label and two that are cut."""
    folder = tmp_path_factory.mktemp("labelled")
    write_pictures(folder, num_pictures=240)
    odd = [(f"n{i}.{extension(i)}", make_picture(1000 + i)) for i in range(4)]
    for i in range(2):
        odd += [(f"c{i}.png", make_picture(2001 + 2 * i)[:-40]), (f"c{i}.cls", b"1")]
    (folder / "odd.tar").write_bytes(make_tar(odd))
    return folder


@pytest.fixture(scope="module")
def evaluation(ray_session: None, pictures: Path) -> LabelEvaluation:
    del ray_session
    return evaluate_labels(image_encoder(), *parts_of(pictures), "cls", 150, 2)


def test_the_untrained_encoder_is_what_a_run_of_that_seed_starts_with() -> None:
    encoder = image_encoder()
    states = (untrained(encoder, 3).state, image_encoder(3).state)
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    before = torch.random.get_rng_state()
    other = untrained(encoder, 4).state
    assert torch.equal(before, torch.random.get_rng_state())
    assert any(not torch.equal(tensor, states[0][name]) for name, tensor in other.items())


def test_what_was_fine_tuned_has_an_untrained_one_too() -> None:
    config = ClassificationConfig(encoder=ResNetConfig(width=4), num_classes=2)
    objective = build_objective(config)
    encoder = Encoder({"objective": dataclasses.asdict(config)}, None, objective)
    fresh = untrained(encoder, 0)
    assert fresh.state.keys() == encoder.state.keys()
    assert fresh.dimension == encoder.dimension


def test_every_figure_is_there_and_what_was_left_out_is_said(evaluation: LabelEvaluation) -> None:
    metrics, lines = evaluation.metrics(), evaluation.lines()
    json.dumps(metrics, allow_nan=False)
    assert (evaluation.num_classes, evaluation.num_labelled) == (
        len(SHAPES),
        149,
    )  # one of 150 is cut
    assert 30 < evaluation.num_test < 70
    for name, value in metrics.items():
        if name.endswith(("_low", "_high")):
            assert (-1 if "_less_" in name else 0) <= value <= 1
    for probe in ("linear", "knn"):
        found = {kind: metrics[f"probe/{probe}/{kind}"] for kind in ("encoder", "raw", "untrained")}
        for kind in ("raw", "untrained"):
            name = f"probe/{probe}/encoder_less_{kind}"
            assert metrics[name] == pytest.approx(found["encoder"] - found[kind])
            assert metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"]
        seeds = [metrics[f"probe/{probe}/encoder_seed_{seed}"] for seed in range(2)]
        assert found["encoder"] == pytest.approx(sum(seeds) / 2)
    assert "4 records have no 'cls': left out" in lines
    assert "2 pictures cannot be decoded: left out" in lines
    assert "told by 149 labelled ones; 2 seeds" in "\n".join(lines)
    assert len([line for line in lines if line.startswith(("linear probe ", "kNN "))]) == 4
    assert len({len(line) for line in lines[-5].splitlines()}) == 1


def test_an_encoder_is_its_own_equal_when_untrained(
    evaluation: LabelEvaluation, pictures: Path
) -> None:
    same = evaluate_labels(image_encoder(0), *parts_of(pictures), "cls", 150, 1)
    for probe in ("linear", "knn"):
        assert same.differences[probe]["untrained"] == (0.0, 0.0, 0.0, (0.0,))
        raw = [found.accuracies[probe]["raw"].of_seeds[0] for found in (same, evaluation)]
        assert raw[0] == raw[1]
    assert "linear probe is not told from untrained encoder: +0.0 points" in "\n".join(same.lines())


def test_a_verdict_says_which_is_better_and_by_how_much(evaluation: LabelEvaluation) -> None:
    better = evaluation.differences["linear"]["raw"]._replace(mean=0.041, low=0.035, high=0.047)
    worse = better._replace(mean=-0.041, low=-0.047, high=-0.035)
    told = dataclasses.replace(
        evaluation,
        differences={probe: {"raw": better, "untrained": worse} for probe in ("linear", "knn")},
    ).lines()
    assert "linear probe beats raw pixels by 4.1 points (3.5 to 4.7)" in told
    assert "kNN misses untrained encoder by 4.1 points (3.5 to 4.7)" in told


@pytest.fixture
def contrasts(tmp_path: Path) -> Path:
    """Return a folder of noise, of which every other picture is pale; that is its label."""
    dice = np.random.default_rng(0)
    members: list[tuple[str, bytes]] = []
    for i in range(300):
        pixels = 128 + dice.choice([-1, 1], (24, 24, 3)) * (40 if i % 2 else 60)
        picture = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(picture, "PNG")
        members += [(f"{i:03}.png", picture.getvalue()), (f"{i:03}.cls", b"%d" % (i % 2))]
    (tmp_path / "x.tar").write_bytes(make_tar(members))
    return tmp_path


@pytest.mark.usefixtures("ray_session")
def test_each_kind_of_features_is_judged_by_its_own(contrasts: Path) -> None:
    """An encoder that holds the answer tells it; no pixel does; another is drawn for each seed."""

    class Contrast(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = config

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.float().std(dim=(1, 2, 3))[:, None].expand(-1, width)

    encoder, parts = image_encoder(), parts_of(contrasts)
    pool, asked = (labelled_items(part, "cls") for part in parts)
    drawn, width = untrained(encoder, 1), encoder.dimension
    network: Any = encoder.objective.encoder
    encoder.objective.encoder = Contrast(network.config)
    found = evaluate_labels(encoder, *parts, "cls", len(pool), 2).accuracies["linear"]
    assert found["encoder"].mean > 0.95
    assert found["raw"].mean < 0.7

    known, seen = (embedded(items, [drawn]).features[0] for items in (pool, asked))
    aside = kept_aside(pool.label.astype(int), draws(key(1, "labelled"), pool.content))
    told = linear_probe(known, pool.label.astype(int), aside, seen)
    assert found["untrained"].of_seeds[1] == (told == asked.label.astype(int)).mean()
    assert found["untrained"].of_seeds[1] != found["untrained"].of_seeds[0]


@pytest.mark.usefixtures("ray_session")
def test_copies_are_no_labels_of_their_own_and_what_cannot_be_read_none(tmp_path: Path) -> None:
    numbers = [*range(40)] * 3
    members: list[tuple[str, bytes]] = []
    for place, number in enumerate(numbers):
        members += [
            (f"{place}.png", make_picture(2 * number + 1)),
            (f"{place}.cls", b"%d" % (number % 2)),
        ]
    (tmp_path / "x.tar").write_bytes(make_tar(members))
    training, test = parts_of(tmp_path)
    found = evaluate_labels(image_encoder(), training, test, "cls", 20, 1)
    assert found.num_test == len(labelled_items(test, "cls").distinct()) < 20
    assert "80 pictures are copies of others: left out" in found.notes

    (tmp_path / "few").mkdir()
    members = []
    for number in range(60):
        data = make_picture(2 * number + 1)
        cut = data[:-40] if number % 2 and number > 7 else data
        members += [(f"{number}.png", cut), (f"{number}.cls", b"%d" % (number % 2))]
    (tmp_path / "few" / "x.tar").write_bytes(make_tar(members))
    parts = parts_of(tmp_path / "few")
    with pytest.raises(UserError, match=r"pictures that can be read (have|are too few)"):
        evaluate_labels(image_encoder(), *parts, "cls", 10, 1)


@pytest.mark.usefixtures("ray_session")
def test_what_cannot_be_told_apart_says_so_in_one_line(pictures: Path, tmp_path: Path) -> None:
    parts = parts_of(pictures)
    for folder, labels in (("one", b"7"), ("many", b"")):
        members: list[tuple[str, bytes]] = []
        for i in range(60):
            members += [(f"{i:03}.{extension(i)}", make_picture(i))]
            members += [(f"{i:03}.cls", labels or b"%d" % (i % 20))]
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.tar").write_bytes(make_tar(members))
    (tmp_path / "long").mkdir()
    lines = [json.dumps({"text": make_text(i, 90)}) for i in range(20)]
    (tmp_path / "long" / "x.jsonl").write_text("\n".join(lines))
    table = pa.table({"image": [make_picture(i) for i in range(20)]})
    (tmp_path / "columns").mkdir()
    pq.write_table(table, tmp_path / "columns" / "x.parquet")
    refused = {
        "'text' holds '.*'... of .* characters, which is no label: name another field": (
            (parts_of(tmp_path / "long"), "text", 9, 1)
        ),
        "no column 'cls' of .* choose one with --labels or": (
            (parts_of(tmp_path / "columns"), "cls", 9, 1)
        ),
        "none of .* records has a string or whole number 'class'": (parts, "class", 9, 1),
        "num-labelled must be in 1..1[0-9]{2}, the training pictures with a 'cls', got 900": (
            (parts, "cls", 900, 1)
        ),
        "seeds must be at least 1": (parts, "cls", 9, 0),
        "all of .* training pictures are also for testing": ((parts[0], parts[0]), "cls", 9, 1),
        "all of 30 training pictures with a 'cls' have '7': there is nothing to tell apart": (
            (parts_of(tmp_path / "one"), "cls", 30, 1)
        ),
        "too few for 20 classes: give --num-labelled 100 or more": (
            (parts_of(tmp_path / "many"), "cls", 20, 1)
        ),
    }
    for message, (both, labels_of, count, seeds) in refused.items():
        with pytest.raises(UserError, match=message):
            evaluate_labels(image_encoder(), *both, labels_of, count, seeds)


def test_what_only_a_probe_is_told_is_refused_without_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", "r", "--data", "a.tar", "--test", "b.tar"]) == 2
    assert "--test is what is asked of a probe: name a field" in capsys.readouterr().err
    model = image_bundle(tmp_path / "model")
    assert main(["evaluate", str(model), "--data", "a.tar"]) == 2
    assert "model is an encoder of images without what trained" in capsys.readouterr().err


@pytest.mark.usefixtures("ray_session")
def test_the_command_measures_text_beside_tf_idf(
    tmp_path: Path,
    vocabulary: Vocabulary,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    config = recipe("text-tiny")
    sizes = dataclasses.replace(config.masked_language.encoder, vocab_size=vocabulary.size)
    config = dataclasses.replace(
        config, objective=dataclasses.replace(config.masked_language, encoder=sizes)
    )
    record = to_record(config)
    write_bundle(
        tmp_path / "bundle",
        config={name: record[name] for name in ("objective", "text")},
        state=draw(config).state_dict(),
        tokenizer_json=vocabulary.json,
        lineage={},
        card="",
    )
    for name, numbers in (("train", range(120)), ("test", range(100, 180))):
        lines = [{"text": make_text(i, 4), "topic": "abcdef"[i % 6]} for i in numbers]
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    asked = ["evaluate", str(tmp_path / "bundle"), "--data", "train.jsonl", "--labels", "topic"]
    asked += ["--test", "test.jsonl", "--num-labelled", "60", "--seeds", "1", "--json"]
    assert main(asked) == 0
    out = capsys.readouterr().out.splitlines()
    metrics = json.loads(out[-1])
    assert (metrics["probe/classes"], metrics["probe/test"]) == (6, 80)
    assert metrics["probe/linear/raw"] > 0.95
    assert metrics["probe/knn/raw"] > 0.9
    assert "20 training documents are also for testing: left out" in out
    assert any(line.startswith("linear probe") and "TF-IDF by" in line for line in out)
