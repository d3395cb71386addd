"""What the model will see of pictures, before any training: a sheet of rows, and a report."""

import io
import warnings
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from pipelines.cluster import cluster
from pipelines.config import RunConfig
from pipelines.console import say
from pipelines.data.batches import RowSource
from pipelines.data.decode import FORMATS
from pipelines.data.fields import KEY, field_of_each
from pipelines.data.gate import ledger_table, place_of
from pipelines.data.images import ImageRows
from pipelines.data.manifest import Manifest, Picture
from pipelines.data.plan import Plan
from pipelines.data.shards import Rejected
from pipelines.run import index_data
from pipelines.tables import table
from pipelines.use.pictures import Slot, changes, draw_rows
from pipelines.use.sheet import write_png

SAMPLE_PICTURES, SAMPLE_BYTES = 1000, 64_000_000
"""The report is of the first pictures of the run, up to about one of these."""
NAMED_BROKEN = 10


@dataclass(frozen=True, kw_only=True)
class PictureReport:
    """What the pictures of a sample are like, and what is drawn for their views."""

    pictures: int
    sides: tuple[tuple[int, float, int], tuple[int, float, int]]
    """Smallest, median and largest shorter side in pixels, and longer side."""
    formats: dict[str, int]
    copies: int
    """Pictures with the bytes of an earlier one."""
    broken: dict[str, str]
    """Pictures that cannot be decoded, by SHARD: KEY, SHARD: row N or path, and why; they become
    rows of no weight."""
    views: int
    median_crop: float
    """Share of the picture."""
    changed: dict[str, float]
    """Share of the views that each change is made to."""


class _Read(NamedTuple):
    """A picture, and the block that it was read from."""

    picture: Picture
    block: int


def preview_images(config: RunConfig, out: Path) -> dict[str, Any]:
    """Draw the first rows of a run that has not begun, and print its report; return the report.

    Raises:
        UserError: If there is no data, or the recipe is not of images.
        DataError: If the data cannot be trusted.
        StorageError: If the sheet cannot be written.
    """
    with cluster(config.address, 1, verbose=config.verbose):
        manifest = index_data(config)
    plan = Plan(manifest, config.seed, config.order.blocks_per_order, config.weights)
    maker = ImageRows(config.images)
    write_png(out, draw_rows(maker, first_slot(plan, maker, config.order.rows_per_slot)))
    report = describe_pictures(plan, maker)
    rows_per_epoch = sum(
        manifest.blocks[visit.block].training
        for number in range(plan.orders_per_epoch)
        for visit in plan.order(number).blocks
    )
    steps_per_epoch = rows_per_epoch / config.order.rows_per_step
    say(f"{ledger_table(manifest.ledger)}\n")
    for entry in manifest.quarantined[:NAMED_BROKEN]:
        say(place_of(entry))
    say(_report_table(report, rows_per_epoch, steps_per_epoch))
    for name, reason in list(report.broken.items())[:NAMED_BROKEN]:
        say(f"{name}: {reason}")
    say(f"\n{out}: the first rows of the run, as the model sees them")
    return {
        "recipe": config.recipe,
        "sheet": str(out),
        "rows_per_epoch": rows_per_epoch,
        "steps_per_epoch": steps_per_epoch,
        **asdict(report),
    }


def first_slot(plan: Plan, maker: ImageRows, num_rows: int) -> Slot:
    """Return the slot 0 of the step 0 of a run: the first rows of its stream."""
    source, tables = RowSource(plan, maker), []
    pictures: list[Picture] = []
    for order in plan.orders(0):
        tables.append(source.table(order))
        items = [
            picture._replace(visit=visit)
            for block, visit in order.blocks
            for picture in plan.manifest.read(block, "training")
        ]
        places = plan.row_permutation(order.number, len(items))  # a picture is a row
        pictures += [items[place] for place in places.tolist()]
        if len(pictures) >= num_rows:
            break
    rows = pa.concat_tables(tables).slice(0, num_rows).combine_chunks()
    batch = maker.collate(rows, seed=plan.seed, step=0, slot=0)
    return Slot(pictures[:num_rows], batch, plan.seed)


def describe_pictures(plan: Plan, maker: ImageRows) -> PictureReport:
    """Return what the first pictures of a run are like."""
    formats, changed = Counter[str](), Counter[str]()
    sides, crops = [], []
    broken: dict[str, str] = {}
    sample = _sample(plan)
    for picture, block in sample:
        pixels = maker.decoded(picture, plan.seed)
        if isinstance(pixels, Rejected):
            broken[_name(plan.manifest, picture, block)] = pixels.reason
            continue
        kind, size = _header(picture.data)
        formats[kind] += 1
        sides.append(sorted(size))
        height, width, channels = pixels.shape
        for view in maker.views(picture, pixels, plan.seed):
            crops.append(view.width * view.height / (width * height))
            changed.update(changes(view, channels).keys())
    contents = {read.picture.record: read.picture.content for read in sample}
    shorter, longer = np.array(sides, dtype=np.int64).reshape(-1, 2).T
    return PictureReport(
        pictures=len(sample),
        sides=(_spread(shorter), _spread(longer)),
        formats=dict(formats.most_common()),
        copies=len(contents) - len(set(contents.values())),
        broken=broken,
        views=len(crops),
        median_crop=float(np.median(crops)) if crops else 0.0,
        changed={name: count / len(crops) for name, count in changed.most_common()},
    )


def _sample(plan: Plan) -> list[_Read]:
    found: list[_Read] = []
    num_bytes = 0
    for number in range(plan.orders_per_epoch):
        for block, visit in plan.order(number).blocks:
            if len(found) >= SAMPLE_PICTURES or num_bytes >= SAMPLE_BYTES:
                return found
            read = plan.manifest.read(block, "training")
            found += [_Read(picture._replace(visit=visit), block) for picture in read]
            num_bytes += plan.manifest.blocks[block].bytes
    return found


def _header(data: bytes) -> tuple[str, tuple[int, int]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has been judged
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    return str(image.format), image.size


def _name(manifest: Manifest, picture: Picture, number: int) -> str:
    block = manifest.blocks[number]
    place = picture.record - block.first_record
    if block.files:
        return block.files[place]
    shard = manifest.shards[block.shard]
    if shard.form == "parquet-images":
        return f"{shard.path}: row {block.offset + place}"
    return f"{shard.path}: {field_of_each(manifest, number, [picture], KEY)[0]}"


def _spread(sizes: Any) -> tuple[int, float, int]:
    if not len(sizes):
        return 0, 0.0, 0
    return int(sizes.min()), float(np.median(sizes)), int(sizes.max())


def _report_table(report: PictureReport, rows_per_epoch: int, steps_per_epoch: float) -> str:
    def sides(spread: tuple[int, float, int]) -> str:
        low, median, high = spread
        return f"{low} to {high}, median {median:g}"

    formats = ", ".join(f"{count} {name}" for name, count in report.formats.items())
    reasons = Counter(report.broken.values())
    rows = {
        "shorter side in pixels": sides(report.sides[0]),
        "longer side in pixels": sides(report.sides[1]),
        "formats": formats or "none",
        "exact copies of an earlier picture": f"{report.copies / report.pictures:.1%}",
        "broken": ", ".join(f"{count} {reason}" for reason, count in reasons.items()) or "none",
        "rows per epoch": f"{rows_per_epoch:,}",
        "steps per epoch": f"{steps_per_epoch:,.1f}",
        "views looked at": f"{report.views:,}",
        "  crop, median share of the picture": f"{report.median_crop:.1%}",
        **{f"  {name}": f"{share:.1%}" for name, share in report.changed.items()},
    }
    return table(("pictures looked at", f"{report.pictures:,}"), list(rows.items()))
