"""What `rayssl embed` costs beside the encoder: Ray, reading, ids and Parquet.

    python -m infra.bench.embed samples/wikipedia

The documents are the paragraphs of DATA. The bare loop is `Encoder.encode` on the texts of the
same units, so on the same batches, in one process with one thread. Both run in turn, several
times, against one warm local Ray with one worker; medians count. The ratio is what carries over to
other machines.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import torch

from pipelines.cluster import cluster
from pipelines.data.vocabulary_training import train_vocabulary
from pipelines.recipes import text_mini
from pipelines.run import index
from pipelines.use.embed import EmbedJob, embed
from pipelines.use.registry import Encoder
from ssl_models import build_objective

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure, print the result and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {"bare": [], "embed": []}
    with tempfile.TemporaryDirectory() as folder, cluster("", 1, verbose=False):
        job = _job(given.data, Path(folder))
        texts = [
            [d.text for block in unit for d in job.manifest.read(block, "training")]
            for unit in job.units
        ]
        embed(job, 1)  # warms Ray's workers
        for _ in range(given.repeats):
            shutil.rmtree(job.out)
            start = time.perf_counter()
            embed(job, 1)
            seconds["embed"].append(time.perf_counter() - start)
            start = time.perf_counter()
            for unit in texts:
                job.encoder.encode(unit)
            seconds["bare"].append(time.perf_counter() - start)
    documents = sum(map(len, texts))
    ratios = [b / e for b, e in zip(seconds["bare"], seconds["embed"], strict=True)]
    result = {
        "what": "documents to Parquet with one worker, beside the bare Encoder.encode loop",
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "encoder": "text-mini",
        "repeats": given.repeats,
        "documents": documents,
        "files": len(texts),
        "embed_documents_per_second": round(documents / statistics.median(seconds["embed"]), 1),
        "bare_documents_per_second": round(documents / statistics.median(seconds["bare"]), 1),
        "bare_to_embed_seconds_ratio": round(statistics.median(ratios), 3),
    }
    text = json.dumps(result, indent=1)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"embed_{result['date']}.json").write_text(text + "\n")
    print(text)


def _job(data: list[str], folder: Path) -> EmbedJob:
    config = text_mini()
    source = replace(config.source, heldout_ratio=0.0)
    paragraphs = folder / "paragraphs.jsonl"
    with paragraphs.open("w") as file:
        for text in index(data, source, folder / "whole.json").texts("training"):
            for paragraph in text.split("\n"):
                file.write(json.dumps({"text": paragraph}) + "\n")
    manifest = index([str(paragraphs)], source, folder / "manifest.json")
    vocabulary = train_vocabulary(manifest.texts("training"), config.vocabulary)
    sized = replace(config.objective.encoder, vocab_size=vocabulary.size)
    objective = replace(config.objective, encoder=sized)
    return EmbedJob(
        encoder=Encoder(
            {"objective": asdict(objective)}, vocabulary, build_objective(objective).eval()
        ),
        model="text-mini, not trained",
        bundle_sha256="",
        manifest=manifest,
        out=folder / "out",
    )


if __name__ == "__main__":
    main()
