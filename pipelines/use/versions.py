"""What is registered: every version with its aliases, its figures and the last word of the gate."""

from dataclasses import dataclass
from typing import Any

from pipelines.errors import nearest
from pipelines.tables import table
from pipelines.training.mlflow_client import answered
from pipelines.use.bundle import BundleError
from pipelines.use.promotion import AGAIN, GATE_TAG
from pipelines.use.registry import RECIPE_TAG, open_registry

FIGURES = ("heldout/", "test/")
"""Prefixes of the metrics of a version's run that are shown; classifiers have the second."""
SHOWN = (
    *("mlm_loss", "nsp_accuracy", "triplet_loss", "nt_xent_loss", "reconstruction_loss"),
    *("accuracy", "macro_f1"),
)


@dataclass(frozen=True, kw_only=True)
class Version:
    """A registered version."""

    name: str
    version: int
    aliases: tuple[str, ...]
    recipe: str
    gate: str
    """passed, failed or rolled-back; empty where it was not asked."""
    figures: dict[str, float]
    """Held-out figures of the run that made it."""


def list_versions(name: str, tracking_uri: str) -> list[Version]:
    """Return the versions of a model, or of all models where the name is empty, newest first.

    Raises:
        BundleError: If there is no registry, or no such model.
        TrackingError: If MLflow fails.
    """
    open_registry(tracking_uri, name or "models")
    with answered(tracking_uri, AGAIN) as client:
        models = {model.name: model for model in client.search_registered_models(max_results=1000)}
        if name and name not in models:
            raise BundleError(f"no model {name!r} is registered.{nearest(name, models)}")
        return [
            _version(client, version, models[known].aliases)
            for known in sorted([name] if name else models)
            for version in sorted(
                client.search_model_versions(f"name = '{known}'"),
                key=lambda version: -int(version.version),
            )
        ]


def versions_table(versions: list[Version]) -> str:
    """Return versions in columns for people."""
    rows = [
        (
            f"models:/{version.name}/{version.version}",
            ", ".join(version.aliases),
            version.recipe,
            version.gate,
            ", ".join(f"{n} {version.figures[n]:.3f}" for n in SHOWN if n in version.figures),
        )
        for version in versions
    ]
    return table(("model", "aliases", "recipe", "gate", "held-out figures"), rows)


def _version(client: Any, version: Any, aliases: dict[str, str]) -> Version:
    metrics = client.get_run(version.run_id).data.metrics if version.run_id else {}
    number = int(version.version)
    return Version(
        name=version.name,
        version=number,
        aliases=tuple(sorted(alias for alias, named in aliases.items() if int(named) == number)),
        recipe=version.tags.get(RECIPE_TAG, ""),
        gate=version.tags.get(GATE_TAG, ""),
        figures={
            key.partition("/")[2]: value
            for key, value in metrics.items()
            if key.startswith(FIGURES)
        },
    )
