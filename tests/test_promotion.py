"""The gate on a real MLflow registry on SQLite: which version becomes champion, and which never."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from pipelines.cli import main
from pipelines.config import to_record
from pipelines.data.indexing import build
from pipelines.data.manifest import Manifest
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.data.text import TextRows
from pipelines.data.vocabulary import Vocabulary
from pipelines.data.vocabulary_training import train_vocabulary
from pipelines.errors import DataError, TrackingError, UserError
from pipelines.recipes import recipe
from pipelines.training.mlflow_client import open_client
from pipelines.use.bundle import BundleError, write_bundle
from pipelines.use.compare_models import compare
from pipelines.use.evaluate import MAX_DOCUMENTS, measure
from pipelines.use.gate_config import GateConfig
from pipelines.use.heldout import Held
from pipelines.use.intervals import bootstrap
from pipelines.use.promotion import (
    GateError,
    GateReport,
    judge_pair,
    open_pair,
    pin_pair,
    roll_back,
    settle,
)
from pipelines.use.registry import load_encoder, register, resolve
from pipelines.use.versions import list_versions, versions_table
from ssl_models import build_objective
from ssl_models.objective import Objective, joint_loss
from tests.corpus import make_documents, serial_map, write_corpus

STEPS = 60


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Keep small matrices on one thread: several of them only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Shop(NamedTuple):
    """A registry, held-out data, and registered bundles that tests put on shelves of their own."""

    uri: str
    run_id: str
    data_dir: Path
    data: Manifest
    versions: dict[str, Any]

    def shelve(self, model: str, **aliases: str) -> None:
        """Register bundles as versions 1, 2 ... of a model of its own, and name them."""
        client = open_client(self.uri)
        client.create_registered_model(model)
        for alias, made in aliases.items():
            first = self.versions[made]
            version = client.create_model_version(
                model, first.source, run_id=self.run_id, tags=first.tags
            )
            client.set_registered_model_alias(model, alias, version.version)

    def alias(self, model: str, name: str, version: int) -> None:
        """Point an alias at a version."""
        open_client(self.uri).set_registered_model_alias(model, name, str(version))

    def aliases(self, model: str) -> dict[str, int]:
        """Return the aliases of a model."""
        found = open_client(self.uri).get_registered_model(model).aliases
        return {alias: int(version) for alias, version in found.items()}

    def tags(self, model: str, version: int) -> dict[str, str]:
        """Return the tags of a version."""
        tags: dict[str, str] = open_client(self.uri).get_model_version(model, str(version)).tags
        return tags

    def promote(self, model: str, gate: GateConfig | None = None) -> GateReport:
        """Do what the verb does."""
        pair = pin_pair(model, self.uri)
        report = judge_pair(
            pair, open_pair(pair, self.uri), self.data, gate or GateConfig(), self.uri
        )
        settle(pair, report, self.uri)
        return report


def manifest_of(folder: Path) -> Manifest:
    return build(find_shards([str(folder)]), SourceConfig(heldout_ratio=0.0), serial_map)


def trained(maker: TextRows, config: Any) -> Iterator[Objective]:
    """Yield an objective half way and at the end of a short training."""
    torch.manual_seed(0)
    objective = build_objective(config)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=5e-3)
    rows = maker.rows(make_documents(90, 20, seed=1), seed=0, order=0)
    for step in range(STEPS):
        if step == STEPS // 2:
            yield objective
        objective.train()
        part = rows.slice(step * 32 % (rows.num_rows - 32), 32).combine_chunks()
        batch = {name: torch.from_numpy(array) for name, array in maker.collate(part).items()}
        optimizer.zero_grad()
        terms = objective(batch).terms
        loss = joint_loss(terms, objective.coefficients, objective.weights(batch))
        torch.autograd.backward(loss)
        optimizer.step()
    yield objective


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, vocabulary: Vocabulary) -> Shop:
    folder = tmp_path_factory.mktemp("shop")
    base = recipe("text-tiny")
    pieces = {"own": vocabulary, "other": _other_vocabulary()}
    encoder = replace(base.masked_language.encoder, vocab_size=vocabulary.size, dropout=0.0)
    config = replace(base, objective=replace(base.masked_language, encoder=encoder))
    record = to_record(config)
    states = {}
    stages = trained(TextRows(config.text, vocabulary), config.objective)
    for name in ("half", "whole"):
        states[name] = {key: t.clone() for key, t in next(stages).state_dict().items()}
    states["noisy"] = {
        key: tensor + 0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        for key, tensor in states["whole"].items()
    }
    states["broken"] = {key: tensor * math.nan for key, tensor in states["whole"].items()}
    states["foreign"] = states["tampered"] = states["whole"]
    uri = f"sqlite:///{folder}/mlflow.db"
    client = open_client(uri)
    experiment = client.create_experiment("tests", artifact_location=(folder / "a").as_uri())
    run_id = client.create_run(experiment).info.run_id
    client.log_metric(run_id, "heldout/mlm_loss", 4.25)
    versions = {}
    for name, state in states.items():
        write_bundle(
            folder / name,
            config={key: record[key] for key in ("objective", "text", "recipe")},
            state=state,
            tokenizer_json=pieces["other" if name == "foreign" else "own"].json,
            lineage={},
            card=f"# Model {name}\n\nFor tests.\n\n## More\n",
        )
        tags = {"rayssl.run_key": name, "rayssl.recipe": "text-tiny"}
        registered = register(
            folder / name, tracking_uri=uri, run_id=run_id, name="stock", tags=tags
        )
        versions[name] = client.get_model_version("stock", str(registered.version))
    spoilt = resolve(f"models:/stock/{versions['tampered'].version}", uri) / "model.safetensors"
    data = bytearray(spoilt.read_bytes())
    data[-1] ^= 1
    spoilt.write_bytes(data)
    write_corpus(folder / "heldout", num_documents=48, num_sentences=10, seed=9)
    return Shop(uri, run_id, folder / "heldout", manifest_of(folder / "heldout"), versions)


def _other_vocabulary() -> Vocabulary:
    texts = [document.text for document in make_documents(60, seed=2)]
    config = replace(recipe("text-tiny").vocabulary, size=400)
    return train_vocabulary(texts, config)


def logged_reports(shop: Shop) -> list[str]:
    return [file.path for file in open_client(shop.uri).list_artifacts(shop.run_id, "gate")]


def test_a_worse_candidate_never_moves_the_alias(shop: Shop) -> None:
    shop.shelve("worse", champion="whole", candidate="noisy")
    for gate in (GateConfig(), GateConfig(rule="superior")):
        report = shop.promote("worse", gate)
        assert report.verdict == "failed"
    assert report.findings[0].high < 0
    assert shop.aliases("worse") == {"champion": 1, "candidate": 2}
    assert shop.tags("worse", 2)["rayssl.gate"] == "failed"
    assert "rayssl.promoted_at" not in shop.tags("worse", 2)


def test_a_candidate_that_is_not_finite_is_not_promoted(shop: Shop) -> None:
    shop.shelve("broken", champion="half", candidate="broken")
    report = shop.promote("broken", GateConfig(margin=1e9))
    assert report.verdict == "failed"
    assert json.loads(report.to_json())["findings"][0]["candidate"] is None
    assert shop.aliases("broken")["champion"] == 1


def test_the_same_model_again_is_not_inferior_and_not_superior(shop: Shop) -> None:
    shop.shelve("same", champion="whole", candidate="whole")
    assert shop.promote("same", GateConfig(rule="superior")).verdict == "failed"
    assert shop.aliases("same")["champion"] == 1
    report = shop.promote("same")
    assert [(found.low, found.high) for found in report.findings] == [(0, 0), (0, 0)]
    assert shop.aliases("same") == {"champion": 2, "candidate": 2, "previous_champion": 1}


def test_a_better_candidate_is_superior_and_can_be_rolled_back(shop: Shop) -> None:
    shop.shelve("better", champion="half", candidate="whole")
    assert shop.promote("better", GateConfig(rule="superior", gain=5.0)).verdict == "failed"
    report = shop.promote("better", GateConfig(rule="superior", margin=0.1))
    assert report.verdict == "passed"
    assert shop.aliases("better") == {"champion": 2, "candidate": 2, "previous_champion": 1}
    assert shop.tags("better", 2)["rayssl.gate"] == "passed"
    assert shop.tags("better", 2)["rayssl.promoted_at"] >= report.made_at
    assert pin_pair("better", shop.uri).is_settled

    assert roll_back("better", shop.uri) == ("models:/better/1", "models:/better/2")
    assert roll_back("better", shop.uri) == ("models:/better/1", "models:/better/1")
    assert shop.aliases("better") == {"champion": 1, "candidate": 2, "previous_champion": 1}
    with pytest.raises(GateError, match="models:/better/2 was rolled back") as error:
        pin_pair("better", shop.uri)
    assert error.value.exit_code == 3


def test_a_first_champion_has_to_beat_the_frequencies_of_words(shop: Shop) -> None:
    shop.shelve("first", candidate="whole")
    report = shop.promote("first")
    assert (report.champion, report.verdict) == ("", "passed")
    assert report.findings[0].above == 0
    assert shop.aliases("first") == {"candidate": 1, "champion": 1}
    with pytest.raises(BundleError, match="'first' has no alias 'previous_champion'"):
        roll_back("first", shop.uri)

    shop.shelve("worst", candidate="broken")
    assert shop.promote("worst").verdict == "failed"
    assert shop.aliases("worst") == {"candidate": 1}


def test_different_tokenizers_are_refused(shop: Shop) -> None:
    shop.shelve("foreign", champion="whole", candidate="foreign")
    with pytest.raises(UserError, match="different tokenizers"):
        shop.promote("foreign")
    assert shop.aliases("foreign")["champion"] == 1


def test_a_tampered_candidate_is_refused(shop: Shop) -> None:
    shop.shelve("tampered", champion="half", candidate="tampered")
    with pytest.raises(BundleError, match=r"model\.safetensors is not what was registered"):
        shop.promote("tampered")
    assert shop.aliases("tampered")["champion"] == 1


@pytest.mark.parametrize("before", [1, None])
def test_a_champion_that_moved_meanwhile_stays(shop: Shop, before: int | None) -> None:
    model = f"moved {before}"
    shop.shelve(model, champion="half", candidate="whole")
    if before is None:
        open_client(shop.uri).delete_registered_model_alias(model, "champion")
    shop.alias(model, "candidate", 2)
    pair = pin_pair(model, shop.uri)
    report = judge_pair(pair, open_pair(pair, shop.uri), shop.data, GateConfig(), shop.uri)
    assert report.verdict == "passed"
    open_client(shop.uri).create_model_version(model, shop.versions["half"].source)
    shop.alias(model, "champion", 3)

    with pytest.raises(TrackingError, match=f"is models:/{model}/3 now: not moved") as error:
        settle(pair, report, shop.uri)

    assert error.value.exit_code == 75
    assert shop.aliases(model) == {"champion": 3, "candidate": 2}


def test_the_report_equals_a_recomputation(shop: Shop, tmp_path: Path) -> None:
    shop.shelve("told", champion="half", candidate="whole")
    report = shop.promote("told")

    stem = "gate/told-2-against-1"
    assert {f"{stem}.json", f"{stem}.md"} <= set(logged_reports(shop))
    client = open_client(shop.uri)
    logged = Path(client.download_artifacts(shop.run_id, f"{stem}.json", str(tmp_path)))
    assert (
        shop.tags("told", 2)["rayssl.gate_report"]
        == hashlib.sha256(logged.read_bytes()).hexdigest()
    )
    told = json.loads(logged.read_text())
    assert (told["candidate"], told["champion"]) == ("models:/told/2", "models:/told/1")
    assert told["candidate_sha256"] == shop.versions["whole"].tags["rayssl.manifest_sha256"]
    assert told["fingerprint"] == shop.data.fingerprint
    assert told["verdict"] == report.verdict == "passed"
    said = Path(client.download_artifacts(shop.run_id, f"{stem}.md", str(tmp_path))).read_text()
    assert all(line in said for line in report.lines())

    encoders = [load_encoder(f"models:/told/{version}", shop.uri) for version in (2, 1)]
    maker = TextRows(recipe("text-tiny").text, encoders[0].vocabulary)
    held = Held(shop.data, "training", MAX_DOCUMENTS)
    new, old = (measure(encoder.objective, maker, held, folds=1) for encoder in encoders)
    masked, pairs = told["findings"]
    means = [measured.sums["mlm_loss"] for measured in (new, old)]
    assert [-masked["candidate"], -masked["reference"]] == pytest.approx(
        [float(total / weight) for total, weight in means], rel=1e-6
    )
    assert (masked["low"], masked["high"]) == bootstrap(old.losses - new.losses, new.predictions)
    accuracy = new.sums["nsp_accuracy"]
    assert pairs["candidate"] == pytest.approx(float(accuracy[0] / accuracy[1]))
    assert (pairs["low"], pairs["high"]) == bootstrap(new.right - old.right, new.pairs)


def test_data_that_was_trained_on_is_told_of(shop: Shop, tmp_path: Path) -> None:
    client = open_client(shop.uri)
    run_id = client.create_run(client.get_run(shop.run_id).info.experiment_id).info.run_id
    (tmp_path / "manifest.json").write_text(shop.data.to_json())
    client.log_artifact(run_id, str(tmp_path / "manifest.json"), "run")
    shop.shelve("known", champion="half", candidate="whole")
    known = shop.versions["whole"]
    client.create_model_version("known", known.source, run_id=run_id, tags=known.tags)
    shop.alias("known", "candidate", 3)

    pair = pin_pair("known", shop.uri)
    report = judge_pair(pair, open_pair(pair, shop.uri), shop.data, GateConfig(), shop.uri)

    count = len(shop.data.blocks)
    (note,) = [note for note in report.notes if "was trained on" in note]
    assert note.startswith(f"models:/known/3 was trained on {count} of {count} blocks")
    assert f"note: {note}" in report.lines()


def test_too_little_data_is_refused(shop: Shop, tmp_path: Path) -> None:
    shop.shelve("little", champion="half", candidate="whole")
    write_corpus(tmp_path / "few", num_documents=8, num_shards=1, num_sentences=9)
    pair = pin_pair("little", shop.uri)
    with pytest.raises(DataError, match="items are too few for an interval"):
        judge_pair(
            pair, open_pair(pair, shop.uri), manifest_of(tmp_path / "few"), GateConfig(), shop.uri
        )


def test_shorter_rows_and_other_pairs_are_told_of(shop: Shop) -> None:
    champion = load_encoder(f"models:/stock/{shop.versions['half'].version}", shop.uri)
    other = champion.config["text"] | {"pairing": "sentence-order", "max_length": 16}
    candidate = replace(champion, config=champion.config | {"text": other})
    found = compare(candidate, champion, shop.data)
    assert len(found.comparisons) == 1
    np.testing.assert_array_equal(found.comparisons[0].candidate, found.comparisons[0].reference)
    assert [note.split()[0] for note in found.notes] == ["pairs", "rows"]


def test_versions_are_listed_with_what_is_known_of_them(shop: Shop) -> None:
    shop.shelve("listed", champion="whole", candidate="noisy")
    shop.promote("listed")
    newest, oldest = list_versions("listed", shop.uri)
    assert (newest.version, newest.aliases, newest.gate) == (2, ("candidate",), "failed")
    assert (oldest.version, oldest.aliases, oldest.gate) == (1, ("champion",), "")
    assert oldest.figures == {"mlm_loss": 4.25}
    head, first, _ = versions_table([newest, oldest]).splitlines()
    assert head.split()[:2] == ["model", "aliases"]
    assert first.split() == [
        "models:/listed/2",
        "candidate",
        "text-tiny",
        "failed",
        "mlm_loss",
        "4.250",
    ]
    assert len(list_versions("", shop.uri)) > len(list_versions("stock", shop.uri))
    with pytest.raises(BundleError, match=r"'lised' is registered\. Did you mean 'listed'"):
        list_versions("lised", shop.uri)


def test_the_description_of_a_version_is_the_head_of_its_card(shop: Shop) -> None:
    assert shop.versions["half"].description == "# Model half\n\nFor tests."


@pytest.mark.usefixtures("ray_session")
def test_the_commands_promote_roll_back_and_list(
    shop: Shop,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shop.shelve("command", champion="half", candidate="noisy")
    heldout = shutil.copytree(shop.data_dir, tmp_path / "heldout")

    def call(*words: str) -> tuple[int, list[str], dict[str, Any]]:
        code = main([*words, "--tracking-uri", shop.uri, "--json"])
        *said, last = capsys.readouterr().out.splitlines()
        return code, said, json.loads(last)

    promote = ("promote", "command", "--data", str(heldout))
    code, said, result = call(*promote, "--rule", "superior", "--gain", "9")
    assert (code, result["status"], result["champion"]) == (3, "REFUSED", "models:/command/1")
    assert said[-1] == "the champion stays models:/command/1"
    assert result["report"]["gate"] == {
        "rule": "superior",
        "margin": 0.02,
        "gain": 9.0,
        "labels": "",
    }

    code, said, result = call(*promote, "--margin", "99")
    assert (code, result["champion"]) == (0, "models:/command/2")
    assert said[-1] == "models:/command/2 is the champion now; `rayssl rollback command` undoes it"
    code, said, _ = call(*promote)
    assert (code, said) == (0, ["models:/command/2 is the champion already"])

    code, said, _ = call("models", "command")
    assert code == 0
    assert said[1].split()[:4] == ["models:/command/2", "candidate,", "champion", "text-tiny"]

    for outcome in ("is the champion again", "nothing to roll back"):
        code, said, result = call("rollback", "command")
        assert (code, result["champion"]) == (0, "models:/command/1")
        assert outcome in said[0]
    code, said, result = call(*promote)
    assert (code, result["exit_code"]) == (3, 3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["rollback", "nothing"], "models:/nothing@champion: there is no registry at "),
        (["models"], "models: there is no registry at "),
        (["promote", "nothing", "--data", "x"], "models:/nothing@candidate: there is no registry"),
    ],
)
def test_without_a_registry_none_is_made(
    words: Sequence[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(list(words)) == 65
    assert said in capfd.readouterr().err
    assert not list(tmp_path.iterdir())
