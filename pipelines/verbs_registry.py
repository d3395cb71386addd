"""The verbs of the model registry: promote, roll back, list."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from pipelines.data.shards import SourceConfig
from pipelines.use.gate_config import GateConfig
from pipelines.verbs import Address, all_of, indexed

Name = Annotated[tyro.conf.Positional[str], tyro.conf.arg(help="Name of a registered model.")]


@dataclass(frozen=True, kw_only=True)
class Promote:
    """Compare the candidate of a model with its champion on held-out data; promote what passes.

    Without a champion, the candidate has to beat what knows nothing: the frequencies of words, or
    chance. The report goes to the candidate's MLflow run. Exits with 3 if it is not promoted.
    """

    name: Name
    data: tuple[str, ...]
    """Files, folders or quoted globs that neither was trained on; all of it counts as held out."""
    gate: Annotated[GateConfig, tyro.conf.arg(name="")] = field(default_factory=GateConfig)
    tracking_uri: str = "sqlite:///mlflow.db"
    """Where the model is registered."""
    address: Address = ""
    source: SourceConfig = field(default_factory=SourceConfig)
    """How --data is read."""

    def run(self) -> dict[str, Any]:
        """Print the comparison and what became of the champion."""
        from pipelines.use.promotion import judge_pair, open_pair, pin_pair, settle, uri_of

        pair = pin_pair(self.name, self.tracking_uri)
        uri = uri_of(pair.candidate)
        if pair.is_settled:
            print(f"{uri} is the champion already")
            return {"status": "PASS", "champion": uri}
        encoders = open_pair(pair, self.tracking_uri)
        source, cache = all_of(self.source), Path("runs/.index/promote.json")
        with indexed(self, source, cache, encoders[0].modality) as data:
            report = judge_pair(pair, encoders, data, self.gate, self.tracking_uri)
        print("\n".join(report.lines()), flush=True)
        settle(pair, report, self.tracking_uri)
        passed = report.verdict == "passed"
        if passed:
            undo = f"; `rayssl rollback {self.name}` undoes it" if pair.champion else ""
            print(f"{uri} is the champion now{undo}")
        else:
            print(f"the champion stays {report.champion or 'none'}")
        return {
            "status": "PASS" if passed else "REFUSED",
            "champion": uri if passed else report.champion,
            "report": json.loads(report.to_json()),
        }


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Make the previous champion of a model champion again; once more, it changes nothing."""

    name: Name
    tracking_uri: str = "sqlite:///mlflow.db"
    """Where the model is registered."""

    def run(self) -> dict[str, Any]:
        """Say which version is champion now."""
        from pipelines.use.promotion import roll_back

        champion, before = roll_back(self.name, self.tracking_uri)
        if champion == before:
            print(f"{champion} is the champion already: nothing to roll back")
        else:
            print(f"{champion} is the champion again, {before} is not")
        return {"champion": champion, "before": before}


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the versions of registered models: aliases, held-out figures, and the gate's verdict."""

    name: tyro.conf.Positional[str] = ""
    """Name of a registered model; all of them without one."""
    tracking_uri: str = "sqlite:///mlflow.db"
    """Where they are registered."""

    def run(self) -> dict[str, Any]:
        """Print a table, the newest version of each model first."""
        from pipelines.use.versions import list_versions, versions_table

        versions = list_versions(self.name, self.tracking_uri)
        print(versions_table(versions))
        return {"versions": [dataclasses.asdict(version) for version in versions]}
