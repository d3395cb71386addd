"""What an encoder of text tells of masked tokens, as a table: the same tokens at every step."""

import csv
import io
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from pipelines.data.manifest import Split
from pipelines.data.text import IGNORED, TextRows
from pipelines.data.vocabulary import Vocabulary
from pipelines.run import Run
from pipelines.storage import write_text
from pipelines.use.heldout import SEED, Held
from ssl_models.masked_language import MaskedLanguage
from ssl_models.objective import Batch, Objective

DOCUMENTS, CHARACTERS = 8, 4000
"""Of so many documents, and so much of each, rows are made."""
ROWS = 8
"""From all of them, whose masked tokens are shown."""
GUESSES = 3
COLUMNS = (
    *("row", "text", "place", "token", "probability", "entropy"),
    *(f"{what} {n + 1}" for n in range(GUESSES) for what in ("guess", "probability")),
)


def write_predictions(objective: Objective, run: Run, folder: Path) -> list[Path]:
    """Write predictions.csv: masked tokens of held-out documents and what is told of each.

    Of training documents if nothing is held out. `text` is the tokens that the model sees; `place`
    the one among them, counted from 0, that it is asked for; `token` what was there, `probability`
    what the model gives it, and `entropy`, in nats, that of the distribution over the vocabulary,
    which gets spikier as training goes on. Then come the likeliest tokens.

    Raises:
        StorageError: If it cannot be written.
    """
    assert isinstance(objective, MaskedLanguage)
    maker = TextRows(run.config.text, run.vocabulary)
    split: Split = "heldout" if run.manifest.records_where("heldout") else "training"
    held = islice(Held(run.manifest, split, DOCUMENTS).items(), DOCUMENTS)
    documents = [document._replace(text=document.text[:CHARACTERS]) for document in held]
    rows = maker.rows(documents, seed=SEED, order=0)
    places = np.linspace(0, len(rows) - 1, min(len(rows), ROWS)).astype(int)
    rows = rows.take(places).combine_chunks()
    batch = {name: torch.from_numpy(array) for name, array in maker.collate(rows).items()}
    out = io.StringIO()
    lines = _told(objective, batch, run.vocabulary)
    csv.writer(out, lineterminator="\n").writerows([COLUMNS, *lines])
    path = folder / "predictions.csv"
    write_text(path, out.getvalue())
    return [path]


def _told(
    objective: MaskedLanguage, batch: Batch, vocabulary: Vocabulary
) -> Iterator[list[object]]:
    """Yield a line of the table for each masked token of a batch."""
    name = vocabulary.tokenizer.id_to_token
    objective.eval()
    with torch.no_grad():
        log_probs_BPV = objective.mask_logits(batch).double().log_softmax(dim=-1)
    for row, number in (batch["masked_ids"] != IGNORED).nonzero().tolist():
        log_probs_V, token = log_probs_BPV[row, number], int(batch["masked_ids"][row, number])
        seen = batch["input_ids"][row][batch["attention_mask"][row]].tolist()
        probs_V = log_probs_V.exp()
        best = probs_V.topk(min(GUESSES, vocabulary.size))
        guesses = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        yield [
            row,
            " ".join(str(name(piece)) for piece in seen),
            int(batch["masked_positions"][row, number]),
            name(token),
            f"{probs_V[token]:.4f}",
            f"{-(probs_V * log_probs_V).sum():.3f}",
            *(cell for piece, share in guesses for cell in (name(piece), f"{share:.4f}")),
        ]
