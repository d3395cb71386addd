"""The command: a typo gets the nearest right name, errors are one line, exit codes mean something.

Exit codes: 0 done, 1 failed, 2 usage, 65 data that cannot be trusted, 130 interrupted.
"""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.cli import VERBS, main
from pipelines.data.batches import Rank, chain, local_blocks, slot_digest, steps
from pipelines.data.plan import Cursor
from pipelines.recipes import RECIPES, recipe
from pipelines.run import Run, load_run, locked, open_run
from pipelines.training.checkpoint import START_DIGEST, Commit, CommitLog
from tests.command import command

NUM_STEPS = 6


def run_main(*arguments: str) -> int:
    """Return the exit code, whichever way the command line parser ends."""
    try:
        return main(list(arguments))
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 1


@pytest.fixture(scope="module")
def trained(ray_session: None, corpus_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run whose commits tell of planned batches; no model is trained."""
    del ray_session
    runs = tmp_path_factory.mktemp("cli") / "runs"
    config = replace(recipe("text-tiny"), data=(str(corpus_dir),), name="whales", runs=str(runs))
    with locked(config) as run_dir:
        commit_planned_batches(open_run(config, run_dir))
    return run_dir


def commit_planned_batches(run: Run) -> None:
    order, source, start = run.config.order, run.source, Cursor()
    made = steps(local_blocks(source, order, start), source, order, start, Rank())
    digests = [START_DIGEST]
    for step in islice(made, NUM_STEPS):
        slots = [slot_digest(step.slots[slot]) for slot in sorted(step.slots)]
        digests.append(chain(digests[-1], slots))
    commit = Commit(
        step=NUM_STEPS,
        attempt=1,
        parent="",
        cursor=step.cursor,
        digests=tuple(digests[1:]),
        fates={},
        workers=1,
        manifest_sha256="",
    )
    weights = {"weight": torch.zeros(2)}
    run.log.save(commit, weights, weights)


@pytest.fixture
def edited(trained: Path, tmp_path: Path) -> Callable[[Callable[[Any], None]], list[str]]:
    """Return a function that edits a copy of run.json and gives the words that name the run."""

    def edit(change: Callable[[Any], None]) -> list[str]:
        shutil.copytree(trained, tmp_path / "runs" / "whales")
        path = tmp_path / "runs" / "whales" / "run.json"
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record))
        return ["whales", "--runs", str(tmp_path / "runs")]

    return edit


def only_line(capfd: pytest.CaptureFixture[str]) -> str:
    """Return the one line of an error; nothing else was printed anywhere."""
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("rayssl: ")
    return err.removeprefix("rayssl: ").strip()


def told(capfd: pytest.CaptureFixture[str]) -> str:
    """Return the words in the box that the command line parser draws around an error."""
    out, err = capfd.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return " ".join(err.replace("│", " ").split())


def test_without_a_verb_the_help_is_shown_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main() == 2
    assert capsys.readouterr().out.startswith("usage: rayssl VERB")


def test_the_help_tells_of_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("--help") == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.split()[0] for line in lines if line.startswith("  ")]
    assert listed == list(VERBS)
    column = 4 + max(map(len, VERBS))
    assert all(line[column - 1] == " " != line[column] for line in lines if line[:2] == "  ")
    assert all(len(line) <= 88 for line in lines)


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"rayssl \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [([], 2), (["--data", "x.jsonl"], 2), (["--steps", "3", "text-tiny"], 2), (["--help"], 0)],
)
@pytest.mark.parametrize("verb", ["pretrain", "preview"])
def test_a_recipe_that_is_not_named_first_is_missed(
    verb: str, arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, *arguments])
    assert ended.value.code == code
    assert f"usage: rayssl {verb} RECIPE --data" in capsys.readouterr().out


def test_a_wrong_flag_and_an_interruption_are_json_objects_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["verify", "x", "--bogus", "--json"])
    assert ended.value.code == 2
    assert json.loads(capsys.readouterr().out)["exit_code"] == 2
    with pytest.raises(SystemExit) as ended:
        main(["verify", "--help", "--json"])
    assert not ended.value.code
    assert "{" not in capsys.readouterr().out.splitlines()[-1]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pipelines.verbs.Verify.run", interrupt)
    assert main(["verify", "x", "--json"]) == 130
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": "interrupted", "exit_code": 130}
    assert err == "\nrayssl: interrupted\n"


def test_an_error_is_a_json_object_too_where_one_was_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["pretrian", "--json"]) == 2
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["exit_code"] == 2
    assert err == f"rayssl: {told['error']}\n"


@pytest.mark.parametrize("verb", ["index", "vocab"])
def test_raw_data_is_not_written_over(
    verb: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shard = tmp_path / "a.jsonl"
    shard.write_text('{"text": "the sea"}\n')
    assert main([verb, str(shard), "--out", str(shard)]) == 2
    assert "is a raw shard by its name: choose another --out" in capfd.readouterr().err
    assert shard.read_text() == '{"text": "the sea"}\n'


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(verb, "--help") == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: rayssl {verb}")
    assert len(out.splitlines()) > 3
    assert err == ""


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("pretrain", name, "--help") == 0
    out = capsys.readouterr().out
    assert "--order.slots" in out
    assert "--objective.kind" in out


def test_pretrain_without_a_recipe_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main("pretrain") == 2
    listed = capsys.readouterr().out
    assert all(f"  {name}" in listed for name in RECIPES)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["pretrian"], "no verb 'pretrian'. Did you mean 'pretrain'?"),
        (["pretrain", "text-tny"], "no recipe 'text-tny'. Did you mean 'text-tiny'?"),
        (["samples", "wikipdia"], "no sample 'wikipdia'. Did you mean 'wikipedia'?"),
        (["zzz"], "no verb 'zzz'. Known: duplicates, embed, evaluate, export, "),
    ],
)
def test_a_mistyped_name_gets_the_nearest_right_one(
    arguments: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_main(*arguments) == 2
    assert only_line(capfd).startswith(said)


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        (["pretrain", "text-tiny", "--stepz", "3"], "--steps"),
        (["pretrain", "text-tiny", "--order.slot", "3"], "--order.slots"),
        (["index", "corpus", "--source.heldout-ration", "0.1"], "--source.heldout-ratio"),
        (["fill-mask", "a", "b", "--topp", "3"], "--top"),
    ],
)
def test_a_mistyped_flag_gets_the_nearest_right_one(
    arguments: list[str], right: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_main(*arguments) == 2
    assert f"Perhaps you meant: {right} " in told(capfd)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--workers", "9"], "workers must be in 1..4, the slots of this recipe, got 9"),
        (["--steps", "0"], "steps must be at least 1, got 0"),
        (["--order.slots", "3"], "rows_per_step 16 is not a multiple of slots 3"),
        (["--text.max-length", "64"], "raise --objective.encoder.max-length"),
        (["--seed", "many"], "--seed"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_a_value_that_cannot_be_is_refused(
    flags: list[str], said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_main("pretrain", "text-tiny", *flags) == 2
    assert said in told(capfd)


def test_a_mistyped_run_gets_the_nearest_right_one(
    trained: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_main("verify", "wales", "--runs", str(trained.parent)) == 2
    assert only_line(capfd).endswith("Did you mean 'whales'?")


@pytest.mark.parametrize("verb", ["verify", "evaluate"])
def test_where_no_run_is_none_is_guessed(
    verb: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_main(verb, "whales", "--runs", str(tmp_path)) == 2
    assert only_line(capfd).endswith("There are no runs yet.")


@pytest.mark.parametrize("verb", [["index"], ["vocab"], ["pretrain", "text-tiny", "--data"]])
def test_a_missing_path_is_named(
    ray_session: None,
    verb: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    del ray_session
    monkeypatch.chdir(tmp_path)
    assert run_main(*verb, "absent/*.jsonl") == 2
    assert only_line(capfd).startswith("no shards match 'absent/*.jsonl'")


@pytest.mark.parametrize(
    ("group", "wrong", "right"),
    [
        (None, "stepz", "steps"),
        ("order", "slotz", "order.slots"),
        ("text", "max_lenght", "text.max_length"),
    ],
)
def test_an_unknown_recorded_key_gets_the_nearest_right_one(
    edited: Callable[[Callable[[Any], None]], list[str]],
    group: str | None,
    wrong: str,
    right: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def rename(record: Any) -> None:
        fields = record["config"][group] if group else record["config"]
        fields[wrong] = 1

    assert run_main("verify", *edited(rename)) == 65
    line = only_line(capfd)
    place = f"{group}.{wrong}" if group else wrong
    assert line.startswith(f"recorded config: {place}: unknown key. Did you mean '{right}")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["config"].update(steps="many"), "recorded config: steps: "),
        (lambda r: r["config"].pop("objective"), "recorded config: objective: "),
        (lambda r: r.update(format_version=2), "has format 2, not 1"),
        (lambda r: r.update(fingerprint="0" * 64), "is not the one the run was started with"),
        (lambda r: r.pop("fingerprint"), "run.json"),
        (lambda r: r.pop("config"), "run.json"),
        (lambda r: r.pop("key"), "run.json"),
    ],
    ids=["type", "missing", "version", "fingerprint", "no fingerprint", "no config", "no key"],
)
def test_a_record_that_cannot_be_is_refused(
    edited: Callable[[Callable[[Any], None]], list[str]],
    change: Callable[[Any], None],
    said: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert run_main("verify", *edited(change)) == 65
    assert said in only_line(capfd)


@pytest.mark.parametrize("name", ["run.json", "manifest.json", "tokenizer.json"])
@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}"], ids=repr)
def test_a_file_of_a_run_that_is_gone_or_broken_is_named(
    trained: Path,
    tmp_path: Path,
    name: str,
    content: str | None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run_dir = shutil.copytree(trained, tmp_path / "runs" / "whales")
    if content is None:
        (run_dir / name).unlink()
    else:
        (run_dir / name).write_text(content)

    code = run_main("verify", "whales", "--runs", str(run_dir.parent))

    line = only_line(capfd)
    assert name in line or "no run 'whales'" in line
    assert code == 65 or (code == 2 and content is None)


def test_another_vocabulary_than_at_the_start_is_refused(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(trained, tmp_path / "runs" / "whales")
    pieces = run_dir / "tokenizer.json"
    pieces.write_text(pieces.read_text().replace('"lowercase":true', '"lowercase":false'))

    assert run_main("verify", "whales", "--runs", str(run_dir.parent)) == 65
    assert "tokenizer.json is not the one the run was started with" in only_line(capfd)


def test_a_broken_cache_of_the_index_is_made_anew(
    ray_session: None, corpus_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    del ray_session
    cache = tmp_path / "manifest.json"
    cache.write_text("{")
    assert run_main("index", str(corpus_dir), "--out", str(cache)) == 0
    assert "6 shards" in capfd.readouterr().out
    assert json.loads(cache.read_text())["state"]


def test_index_prints_the_ledger_and_one_json_object(
    ray_session: None,
    corpus_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    del ray_session
    monkeypatch.chdir(tmp_path)
    assert run_main("index", str(corpus_dir), "--json") == 0
    *table, last = capsys.readouterr().out.splitlines()

    result = json.loads(last)
    assert result["shards"] == 6
    assert sum(entry["records"] for entry in result["ledger"].values()) == 120
    assert table[0].split() == ["records", "bytes"]
    assert table[-2].split()[:2] == ["total", "120"]
    assert result["fingerprint"].startswith(table[-1].split()[-1])


def test_verify_prints_pass_and_one_json_object(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main("verify", "whales", "--json", "--runs", str(trained.parent)) == 0
    first, last = capsys.readouterr().out.splitlines()

    verdict = json.loads(last)
    assert verdict["status"] == "PASS"
    assert verdict["steps"] == NUM_STEPS
    assert first == f"PASS: 6 steps, digest {verdict['digest']}"


def test_a_failed_verification_exits_with_1(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(trained, tmp_path / "runs" / "whales")
    (path,) = (run_dir / "commits").iterdir()
    commit = json.loads(path.read_text())
    commit["digests"][3] = "f" * 64
    path.write_text(json.dumps(commit))

    assert run_main("verify", "whales", "--json", "--runs", str(run_dir.parent)) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first == "FAIL: step 4 was not trained on as planned"
    verdict = json.loads(last)
    assert (verdict["status"], verdict["first_different_step"]) == ("FAIL", 4)


def test_shards_that_changed_cannot_be_verified(
    trained: Path, corpus_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus = shutil.copytree(corpus_dir, tmp_path / "corpus")
    run_dir = shutil.copytree(trained, tmp_path / "runs" / "whales")
    manifest = json.loads((run_dir / "manifest.json").read_text())
    manifest["root"] = str(corpus)  # no part of the fingerprint
    (run_dir / "manifest.json").write_text(json.dumps(manifest))
    runs = ["--runs", str(run_dir.parent)]
    assert run_main("verify", "whales", *runs) == 0
    capfd.readouterr()

    for shard in corpus.iterdir():
        shard.write_bytes(shard.read_bytes().replace(b"the", b"teh"))

    assert run_main("verify", "whales", *runs) == 65
    assert "changed since they were indexed" in only_line(capfd)


def test_a_run_without_commits_cannot_be_verified(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(trained, tmp_path / "runs" / "whales")
    shutil.rmtree(run_dir / "commits")
    assert run_main("verify", "whales", "--runs", str(run_dir.parent)) == 2
    assert "has no commit yet" in only_line(capfd)


def test_ctrl_c_promises_nothing_that_a_verb_does_not_keep(tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    os.mkfifo(tmp_path / "encoder" / "config.json")
    with (
        command(tmp_path, "fill-mask", "encoder", "a [MASK]") as waiting,
        (tmp_path / "encoder" / "config.json").open("w"),  # once the command has opened it, too
    ):
        waiting.kill(signal.SIGINT)
        assert waiting.wait() == 130
    assert [line for line in waiting.err if line] == ["rayssl: interrupted"]


def test_ctrl_c_ends_all_that_was_started_and_says_how_to_go_on(
    corpus_dir: Path, tmp_path: Path
) -> None:
    log = CommitLog(tmp_path / "runs" / "long")
    order = ["text-tiny", "--data", str(corpus_dir), "--name", "long", "--steps", "100000"]
    with command(tmp_path, "pretrain", *order) as training:
        training.wait_until(log.newest)
        assert len(training.session()) > 3
        training.kill(signal.SIGINT)
        assert training.wait() == 130
        training.wait_for_session()

    said = [line for line in training.err if line]
    assert said == ["rayssl: interrupted; the same command goes on from the newest commit"]
    assert not [line for line in training.out if "Traceback" in line]
    commit = load_run(log.run_dir).log.newest()
    assert commit is not None
    assert not log._wrong(commit.name)
