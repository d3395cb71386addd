"""What `rayssl embed` costs beside the encoder: Ray, reading, ids and Parquet.

    python -m infra.bench.embed 'samples/newsgroups/*.jsonl'
    python -m infra.bench.embed 'samples/mnist/*.tar' --recipe mnist-triplet
    python -m infra.bench.embed 'samples/photos/*.tar' --recipe photos-triplet --copies 10

The items are the paragraphs of DATA, or its pictures; `--copies` makes more of a corpus so small
that starting would be what is measured. The bare loop is `Encoder.encode` on the
texts or bytes of the same units, so on the same batches, in one process with one thread. Both run
in turn, several times, against one warm local Ray with one worker; medians count. The ratios are
what carries over to other machines; that of seconds is of use on an idle machine alone, those of
CPU seconds, of Ray's workers and of all its processes, on a busy one too.
"""

import argparse
import json
import shutil
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from infra.bench.measure import Watch, cpu_seconds, in_turn, keep, rates, ratio, wall_seconds
from pipelines.cluster import cluster
from pipelines.config import RunConfig, to_record
from pipelines.data.manifest import Document, Manifest
from pipelines.data.shards import find_shards
from pipelines.data.vocabulary_training import train_vocabulary
from pipelines.recipes import RECIPES, recipe
from pipelines.run import index
from pipelines.training.start import draw
from pipelines.use.embed import EmbedJob, embed
from pipelines.use.encoder import Encoder
from ssl_models import build_objective


def main() -> None:
    """Measure, print the result and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--recipe", default="text-mini", choices=RECIPES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--copies", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, cluster("", 1, verbose=False):
        data = copied(given.data, given.copies, Path(folder))
        job = make_job(recipe(given.recipe), data, Path(folder))
        result = measure(job, given.repeats)
    told = {"encoder": given.recipe, "copies": given.copies}
    keep(f"embed_{given.recipe}", {**told, **result})


def measure(job: EmbedJob, repeats: int) -> dict[str, Any]:
    """Return the speed of both."""
    contents = [
        [
            item.text if isinstance(item, Document) else item.data
            for block in unit
            for item in job.manifest.read(block, "training")
        ]
        for unit in job.units
    ]
    embed(job, 1)  # warms Ray's workers

    watches: list[Watch] = []
    bare_cpu: list[float] = []

    def anew() -> None:
        shutil.rmtree(job.out)
        with Watch() as watch:
            embed(job, 1)
        watches.append(watch)

    def loop() -> None:
        for unit in contents:
            job.encoder.encode(unit)

    def bare() -> None:
        bare_cpu.append(cpu_seconds(loop))

    what = {"embed": partial(wall_seconds, anew), "bare": partial(wall_seconds, bare)}
    seconds = in_turn(repeats, what)
    workers_cpu = [watch.cpu_seconds("workers") for watch in watches]
    all_cpu = [watch.cpu_seconds("workers", "driver", "ray") for watch in watches]
    items = sum(map(len, contents))
    return {
        "what": f"{job.things} to Parquet with one worker, beside the bare Encoder.encode loop",
        "repeats": repeats,
        "items": items,
        "files": len(contents),
        "embed_items_per_second": rates(items, seconds["embed"]),
        "bare_items_per_second": rates(items, seconds["bare"]),
        "embed_to_bare_seconds_ratio": ratio(seconds["embed"], seconds["bare"]),
        "workers_to_bare_cpu_ratio": ratio(workers_cpu, bare_cpu),
        "all_processes_to_bare_cpu_ratio": ratio(all_cpu, bare_cpu),
    }


def copied(data: list[str], copies: int, folder: Path) -> list[str]:
    """Return shards that hold those of DATA so many times over."""
    if copies == 1:
        return data
    (folder / "shards").mkdir()
    for copy in range(copies):
        for file in find_shards(data):
            shutil.copy(file.name, folder / "shards" / f"{copy:03d}-{Path(file.name).name}")
    return [str(folder / "shards")]


def make_job(config: RunConfig, data: list[str], folder: Path) -> EmbedJob:
    """Return the embedding of some shards by an encoder of fresh weights."""
    source = replace(config.source, heldout_ratio=0.0)
    if config.modality == "images":
        manifest = index(data, source, folder / "manifest.json", "images")
        encoder = Encoder(to_record(config), None, draw(config).eval())
    else:
        manifest, encoder = _paragraphs(config, data, folder)
    return EmbedJob(
        encoder=encoder,
        model=f"{config.recipe}, not trained",
        bundle_sha256="",
        manifest=manifest,
        out=folder / "out",
    )


def _paragraphs(config: RunConfig, data: list[str], folder: Path) -> tuple[Manifest, Encoder]:
    """Return the paragraphs of some texts, and an encoder of their vocabulary."""
    source = replace(config.source, heldout_ratio=0.0)
    paragraphs = folder / "paragraphs.jsonl"
    with paragraphs.open("w") as file:
        for text in index(data, source, folder / "whole.json").texts("training"):
            for paragraph in text.split("\n"):
                file.write(json.dumps({"text": paragraph}) + "\n")
    manifest = index([str(paragraphs)], source, folder / "manifest.json")
    vocabulary = train_vocabulary(manifest.texts("training"), config.vocabulary)
    sized = replace(config.masked_language.encoder, vocab_size=vocabulary.size)
    objective = replace(config.masked_language, encoder=sized)
    built = build_objective(objective).eval()
    return manifest, Encoder({"objective": asdict(objective)}, vocabulary, built)


if __name__ == "__main__":
    main()
