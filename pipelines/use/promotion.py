"""The gate: `champion` moves to a candidate that was compared with it, and can move back.

    candidate          -> the newest version, set by every run that registers
    champion           -> what consumers load, moved by `settle` and `roll_back` alone
    previous_champion  -> what `roll_back` returns to

Versions are pinned before anything is read. MLflow cannot compare and set an alias: `settle` looks
at the champion right before it moves it, so between two promotions of one model that end within the
same few milliseconds the later one wins; both have passed against the champion that they replace.
"""

import hashlib
import json
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pipelines.data.manifest import Manifest
from pipelines.errors import TrackingError, UserError
from pipelines.training.mlflow_client import answered, open_client
from pipelines.use.compare_models import compare
from pipelines.use.comparison import Finding, findings_table, judge
from pipelines.use.encoder import Encoder
from pipelines.use.gate_config import GateConfig
from pipelines.use.registry import MANIFEST_TAG, load_encoder, pin

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous_champion"
GATE_TAG = "rayssl.gate"
"""passed, failed or rolled-back: the last word on a version."""
REPORT_TAG = "rayssl.gate_report"
"""SHA-256 of the report in the version's MLflow run."""
PROMOTED_TAG = "rayssl.promoted_at"
REPORT_FOLDER = "gate"
AGAIN = "the same command goes on once it answers"


class GateError(UserError):
    """A version that may not become champion; exit code 3."""

    exit_code = 3


class Pair(NamedTuple):
    """A candidate and the champion it has to beat, as they were when the gate began."""

    name: str
    candidate: Any
    """Version of MLflow."""
    champion: Any | None

    @property
    def is_settled(self) -> bool:
        """Whether the candidate is the champion already."""
        return self.champion is not None and uri_of(self.candidate) == uri_of(self.champion)


@dataclass(frozen=True, kw_only=True)
class GateReport:
    """What was compared, how, and what came out."""

    candidate: str
    champion: str
    """Empty where there is none yet."""
    candidate_sha256: str
    champion_sha256: str
    fingerprint: str
    """Of the data."""
    gate: GateConfig
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    verdict: Literal["passed", "failed"]
    made_at: str
    """UTC."""

    def to_json(self) -> str:
        """Return the report as JSON."""
        record = asdict(self) | {"findings": [finding.record() for finding in self.findings]}
        return json.dumps(record, indent=1, allow_nan=False) + "\n"

    def lines(self) -> list[str]:
        """Return the report in words."""
        against = f"champion {self.champion}" if self.champion else "no champion"
        rule = self.gate.rule if self.champion else "better than what knows nothing"
        reference = "champion" if self.champion else "baseline"
        return [
            f"gate ({rule}): candidate {self.candidate}, {against}, data {self.fingerprint[:16]}",
            *findings_table(self.findings, reference).splitlines(),
            *(f"note: {note}" for note in self.notes),
            f"{self.verdict}: {self.candidate}",
        ]


def uri_of(version: Any) -> str:
    """Return models:/NAME/VERSION, which always means the same bytes."""
    return f"models:/{version.name}/{version.version}"


def pin_pair(name: str, tracking_uri: str) -> Pair:
    """Return the versions that the aliases mean now.

    Raises:
        BundleError: If there is no such model, or it has no candidate.
        GateError: If the candidate is a champion that was rolled back.
    """
    pin(f"models:/{name}@{CANDIDATE}", tracking_uri)  # says what is missing
    with answered(tracking_uri, AGAIN) as client:
        candidate = client.get_model_version_by_alias(name, CANDIDATE)
        pair = Pair(name, candidate, _version_at(client, name, CHAMPION))
    if candidate.tags.get(GATE_TAG) == "rolled-back" and not pair.is_settled:
        raise GateError(f"{uri_of(candidate)} was rolled back: register another candidate")
    return pair


def open_pair(pair: Pair, tracking_uri: str) -> tuple[Encoder, Encoder | None]:
    """Return the candidate and the champion.

    Raises:
        BundleError: If a model is not what was registered.
    """
    candidate = load_encoder(uri_of(pair.candidate), tracking_uri)
    champion = load_encoder(uri_of(pair.champion), tracking_uri) if pair.champion else None
    return candidate, champion


def judge_pair(
    pair: Pair,
    encoders: tuple[Encoder, Encoder | None],
    data: Manifest,
    gate: GateConfig,
    tracking_uri: str,
) -> GateReport:
    """Compare both models on the same data, of which all documents or pictures count.

    Raises:
        UserError: If the models cannot be compared.
        DataError: If there is too little data.
    """
    candidate, champion = encoders
    compared = compare(candidate, champion, data, gate.labels)
    count = len(compared.comparisons)
    findings = judge(compared.comparisons, gate.bounds(count) if champion else [0.0] * count)
    seen = [
        note
        for version in (pair.candidate, pair.champion)
        if version and (note := _seen_in_training(version, data, tracking_uri))
    ]
    return GateReport(
        candidate=uri_of(pair.candidate),
        champion=uri_of(pair.champion) if pair.champion else "",
        candidate_sha256=pair.candidate.tags[MANIFEST_TAG],
        champion_sha256=pair.champion.tags[MANIFEST_TAG] if pair.champion else "",
        fingerprint=data.fingerprint,
        gate=gate,
        findings=tuple(findings),
        notes=(*compared.notes, *seen),
        verdict="passed" if all(finding.passed for finding in findings) else "failed",
        made_at=_now(),
    )


def settle(pair: Pair, report: GateReport, tracking_uri: str) -> None:
    """Log the report in the candidate's run, tag the version, and move the alias if it passed.

    A call that was cut short can be made again.

    Raises:
        TrackingError: If the champion has moved since the pair was pinned, or MLflow fails.
    """
    version = pair.candidate
    with answered(tracking_uri, AGAIN) as client:
        _log_report(client, pair, report)
        digest = hashlib.sha256(report.to_json().encode()).hexdigest()
        for key, value in ((REPORT_TAG, digest), (GATE_TAG, report.verdict)):
            client.set_model_version_tag(pair.name, version.version, key, value)
        if report.verdict == "failed":
            return
        _refuse_moved(client, pair)
        if pair.champion:
            client.set_registered_model_alias(pair.name, PREVIOUS, pair.champion.version)
        client.set_registered_model_alias(pair.name, CHAMPION, version.version)
        client.set_model_version_tag(pair.name, version.version, PROMOTED_TAG, _now())


def roll_back(name: str, tracking_uri: str) -> tuple[str, str]:
    """Point `champion` at the previous one; return the URIs of the champion now and before.

    Again it changes nothing, since the champion is the previous one then. The version that was
    champion is tagged, so that the gate does not take it again.

    Raises:
        BundleError: If there is no such model, or it has no champion or no previous one.
    """
    for alias in (CHAMPION, PREVIOUS):
        pin(f"models:/{name}@{alias}", tracking_uri)
    with answered(tracking_uri, AGAIN) as client:
        champion, previous = (
            client.get_model_version_by_alias(name, alias) for alias in (CHAMPION, PREVIOUS)
        )
        if uri_of(champion) != uri_of(previous):
            client.set_model_version_tag(name, champion.version, GATE_TAG, "rolled-back")
            client.set_registered_model_alias(name, CHAMPION, previous.version)
    return uri_of(previous), uri_of(champion)


def _version_at(client: Any, name: str, alias: str) -> Any | None:
    number = client.get_registered_model(name).aliases.get(alias)
    return None if number is None else client.get_model_version(name, str(number))


def _refuse_moved(client: Any, pair: Pair) -> None:
    now = _version_at(client, pair.name, CHAMPION)
    was, now_is = (uri_of(version) if version else "none" for version in (pair.champion, now))
    if was != now_is:
        raise TrackingError(
            f"the champion of {pair.name} was {was} when {uri_of(pair.candidate)} was compared "
            f"with it, and is {now_is} now: not moved; the same command compares with the new one"
        )


def _log_report(client: Any, pair: Pair, report: GateReport) -> None:
    """Log JSON and markdown under a name of this pair, so that no other report is lost."""
    against = pair.champion.version if pair.champion else "none"
    stem = f"{pair.name}-{pair.candidate.version}-against-{against}"
    said = "\n".join(report.lines())
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, f"{stem}.json").write_text(report.to_json())
        Path(folder, f"{stem}.md").write_text(f"# Gate of {report.candidate}\n\n```\n{said}\n```\n")
        client.log_artifacts(pair.candidate.run_id, folder, REPORT_FOLDER)


def _seen_in_training(version: Any, data: Manifest, tracking_uri: str) -> str:
    """Return a warning if blocks of the data are among those that a version was trained on.

    Told by the hashes in the manifest that its run has logged, if it has. Blocks of corpora of
    other sizes have other borders: it finds the same shards, not every copy.
    """
    from mlflow.exceptions import MlflowException

    client = open_client(tracking_uri)
    with (
        tempfile.TemporaryDirectory() as folder,
        suppress(MlflowException, OSError, ValueError),
    ):
        path = client.download_artifacts(version.run_id, "run/manifest.json", folder)
        trained = Manifest.from_json(Path(path).read_text())
        known = {block.sha256 for block in trained.blocks}
        shared = sum(block.sha256 in known for block in data.blocks)
        if shared:
            return (
                f"{uri_of(version)} was trained on {shared} of {len(data.blocks)} blocks of this "
                "data, but for what it held out: its scores are flattered"
            )
    return ""


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
