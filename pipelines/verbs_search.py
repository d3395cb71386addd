"""The verbs that compare embeddings: near-duplicates, and the nearest of an index."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from pipelines.data.shards import SourceConfig
from pipelines.errors import UserError
from pipelines.tables import table
from pipelines.verbs import Address, Model, embed_job, print_ledger


@dataclass(frozen=True, kw_only=True)
class Duplicates:
    """Find near-duplicates by embeddings, and tell which to drop.

    Writes pairs.parquet, groups.parquet and, of pictures, sheet.png.
    """

    model: Model
    data: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders or quoted globs; --source.heldout-ratio keeps none of them out."""
    out: Path
    """Folder of what is found; the embeddings below it are made once."""
    threshold: float = 0.97
    """Cosine from which two items are a pair; which one is right depends on the encoder."""
    top: int = 20
    """How many pairs to show, on the sheet too."""
    id_field: str = ""
    """Field of a record that holds its id; without one an id is SHARD:RECORD, counted from 0, or
    the path of a loose picture."""
    workers: int = 2
    """Processes that hold the encoder, one CPU each."""
    tracking_uri: str = "sqlite:///mlflow.db"
    """Where the model is registered."""
    address: Address = ""
    source: SourceConfig = field(default_factory=SourceConfig)

    def run(self) -> dict[str, Any]:
        """Print the most alike pairs and how much is surplus."""
        from pipelines.use.duplicates import LIKENESS, find_duplicates
        from pipelines.use.embed import embed
        from pipelines.use.nearest import EMBEDDINGS
        from pipelines.use.registry import open_model

        if not -1 <= self.threshold <= 1:
            raise UserError(f"--threshold must be in -1..1, a cosine, got {self.threshold}")
        _check_top(self.top)
        opened = open_model(self.model, self.tracking_uri)
        with embed_job(self, opened, self.out / EMBEDDINGS) as job:
            embedded = embed(job, self.workers)
            found = find_duplicates(job, self.out, self.threshold, self.top)
        print_ledger(job.manifest.without(embedded.quarantined), "embedded")
        head = ("first", "second", "similarity", LIKENESS[job.encoder.modality])
        rows = [(*pair[:2], f"{pair.similarity:.4f}", f"{pair.likeness:.4g}") for pair in found.top]
        print(table(head, rows))
        print(
            f"{found.pairs} pairs of {found.items} reach {self.threshold:g}, in {found.groups} "
            f"groups of at most {found.largest_group}; "
            f"one of each is left without {found.surplus}\n"
            f"in {', '.join(found.files)}"
        )
        if found.kept_pairs < found.pairs:
            print(f"pairs.parquet holds the {found.kept_pairs} most alike; the groups count all")
        top = [pair._asdict() for pair in found.top]
        return {"model": job.model, **dataclasses.asdict(found), "top": top}


@dataclass(frozen=True, kw_only=True)
class Nearest:
    """Show which items of an index are most like a text or a picture."""

    model: Model
    index: tyro.conf.Positional[Path]
    """Folder that `rayssl embed` or `rayssl duplicates` wrote with this model."""
    query: tyro.conf.Positional[str]
    """A text, or for a model of images the path of a picture."""
    top: int = 10
    """How many to show."""
    ann: bool = False
    """Search a graph, made once beside the index: nearly exact, for millions of items."""
    tracking_uri: str = "sqlite:///mlflow.db"
    """Where the model is registered."""

    def run(self) -> dict[str, Any]:
        """Print ids and cosines, the nearest first."""
        from pipelines.use.nearest import embed_query, nearest, probably_nearest, read_index
        from pipelines.use.registry import open_model

        _check_top(self.top)
        model, sha256, encoder = open_model(self.model, self.tracking_uri)
        index = read_index(self.index)
        query = embed_query(encoder, sha256, index, self.query)
        found = (probably_nearest if self.ann else nearest)(index, query, self.top)
        rows = [(neighbour.id, f"{neighbour.similarity:.4f}") for neighbour in found]
        print(table(("id", "similarity"), rows))
        return {"model": model, "nearest": [neighbour._asdict() for neighbour in found]}


def _check_top(top: int) -> None:
    if top < 1:
        raise UserError(f"--top must be at least 1, got {top}")
