"""The model card of a run: what the encoder is, and what decided it, for people."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.config import FREE_TO_CHANGE, RunConfig, to_flat, to_record
from pipelines.run import Run

SHARDS_LISTED = 20


def model_card(run: Run, figures: Sequence[str], lineage: dict[str, Any]) -> str:
    """Return the card, in Markdown; its title and first paragraph describe the version.

    Not told is where the data lies and where the run was tracked: the card goes far.
    """
    config, manifest = run.config, run.manifest
    encoder, knows, things = (
        ("A BERT", "the language and the subjects", "documents")
        if run.pieces
        else ("An image", "the subjects", "pictures")
    )
    names = [f"- {Path(shard.path).name}" for shard in manifest.shards]
    more = len(names) - SHARDS_LISTED
    shards = names[:SHARDS_LISTED] + ([f"- and {more} more"] if more > 0 else [])
    ledger = ", ".join(f"{entry.records} {fate}" for fate, entry in manifest.ledger.items())
    settings = to_flat(to_record(config))
    unused = ("images.",) if run.pieces else ("text.", "vocabulary.")
    decided = {
        name: value
        for name, value in settings.items()
        if name not in FREE_TO_CHANGE and not name.startswith(unused)
    }
    sections = {
        "Use": _usage(config, is_text=run.pieces is not None),
        "Data": "\n".join(
            [
                f"Licence of the data: {config.data_licence or 'not given'}\n",
                f"{ledger} {things}; fingerprint {manifest.fingerprint}\n",
                *shards,
            ]
        ),
        "Recipe": _table("setting", decided),
        "Held-out figures": "\n".join(f"- {line.strip()}" for line in figures),
        "Limits": f"Knows {knows} of its data and nothing else, its errors and slants included. It "
        "was measured on held-out data of the same source: measure it on your task before use.",
        "Lineage": _table("origin", lineage),
    }
    return (
        f"# {config.register}\n\n{encoder} encoder pretrained without labels by rayssl: recipe "
        f"{config.recipe}, {config.steps} steps of {config.order.rows_per_step} rows.\n\n"
        + "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
        + "\n"
    )


def _usage(config: RunConfig, *, is_text: bool) -> str:
    if is_text:
        items = '["A sentence to embed."]'
        seen = f"A text is cut to {config.text.max_length} tokens."
    else:
        items = '[open("picture.png", "rb").read()]'
        size, colours = config.images.views.size, "grey" if config.images.channels == 1 else "RGB"
        seen = f"Seen is the largest square of the middle, in {colours}, at {size} x {size} pixels."
    return (
        "```python\nfrom pipelines.use.registry import load_encoder\n\n"
        f'encoder = load_encoder("models:/{config.register}@champion", "sqlite:///mlflow.db")\n'
        f"embeddings = encoder.encode({items})  # float32 (items, width)\n```\n\n{seen}"
    )


def _table(head: str, values: dict[str, Any]) -> str:
    rows = (f"| {name} | {value} |" for name, value in values.items())
    return "\n".join([f"| {head} | value |", "| --- | --- |", *rows])
