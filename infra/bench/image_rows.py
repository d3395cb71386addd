"""How fast photos become two augmented views through Ray Data, against Pillow in a DataLoader.

    python -m infra.bench.image_rows photos/

Photos are made anew as JPEGs of two sizes. Both contestants make two views of 224 pixels of each,
with SimCLR's changes (Chen et al. 2020, arXiv:2002.05709, appendix A), in as many processes:

    ours    tar shards -> manifest -> plan -> rows -> travelling blocks     Ray Data
    peer    files -> Pillow -> the operations of torchvision -> batches     torch DataLoader

They run in turn, several times; what counts are the CPU seconds of their workers, as /proc tells,
once all have started. The pure functions, in this process, run in turn with them. The hue is
turned in HSV by the peer, as by torchvision, and by a matrix of ours.
"""

import argparse
import io
import tarfile
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from PIL import Image, ImageOps
from torch.utils.data import DataLoader

from infra.bench.measure import Watch, cpu_seconds, in_turn, keep, rates, ratio, wall_seconds
from infra.bench.pillow_views import loader
from pipelines.cluster import SPARE_CPUS, cluster
from pipelines.data.batches import Rank, RowSource, ray_blocks, slot_digest, steps
from pipelines.data.decode import decode
from pipelines.data.images import ImageConfig, ImageRows
from pipelines.data.indexing import build
from pipelines.data.plan import Cursor, OrderConfig, Plan
from pipelines.data.shards import EXTENSIONS, Rejected, SourceConfig, find_shards
from pipelines.data.views import ViewConfig

VIEWS = ViewConfig(size=224, blur=0.5)
ORDER = OrderConfig(rows_per_step=64, slots=4, steps_per_block=1, blocks_per_order=8)
SMALLEST_SIDE = 300
"""Of the photos that are used: smaller ones would be blown up."""
BLOCK_BYTES = (1_000_000, 8_000_000)
NUM_SHARDS = 4
VIEW_COLUMNS = ("first", "second")


class Size(NamedTuple):
    """A size that photos are made in."""

    width: int
    height: int
    quality: int
    share: int
    """One of so many pictures is made in it: large ones take longer."""


SIZES = (Size(500, 375, 95, 1), Size(2000, 1500, 90, 3))


class Contest(NamedTuple):
    """Pictures of one size, for both contestants."""

    source: RowSource
    peer: DataLoader[Any]
    num_pictures: int
    megabytes: float

    def blocks(self) -> Iterator[Any]:
        """Yield the travelling blocks of one epoch, made by Ray Data.

        Raises:
            RuntimeError: If one of them is too small or too large to travel well.
        """
        tasks = [range(n, n + 1) for n in range(self.source.plan.orders_per_epoch)]
        for block in ray_blocks(self.source, ORDER, Cursor(), tasks):
            if block.num_rows == ORDER.rows_per_block and not _fits(block):
                raise RuntimeError(f"a travelling block of {block.nbytes} bytes: {block.schema}")
            yield block

    def make_on_ray(self) -> None:
        """Make the rows of one epoch with Ray Data."""
        self._check(sum(block.num_rows for block in self.blocks()))

    def make_pure(self) -> None:
        """Make the rows of one epoch in this process."""
        plan = self.source.plan
        orders = map(plan.order, range(plan.orders_per_epoch))
        self._check(sum(t.num_rows for order in orders for t in self.source.tables(order)))

    def make_with_peer(self) -> None:
        """Make two views of every picture with the peer."""
        self._check(sum(len(first) for first, _ in self.peer))

    def _check(self, num_made: int) -> None:
        if num_made != self.num_pictures:
            raise RuntimeError(f"{num_made} of {self.num_pictures} pictures were made into views")


def main() -> None:
    """Measure, print the result and keep it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", nargs="+", help="files, or folders of files")
    parser.add_argument("--pictures", type=int, default=1500, help="of the smaller size")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    # Ray Data keeps half of its CPUs for the step that cuts rows into blocks.
    cpus = 2 * given.workers - SPARE_CPUS
    with TemporaryDirectory() as folder, cluster("", cpus, verbose=False):
        result = {}
        for size in SIZES:
            name = f"{size.width}x{size.height} q{size.quality}"
            count = given.pictures // size.share
            contest = prepare(given.photos, size, count, Path(folder) / name, given.workers)
            result[name] = measure(contest, given.repeats)
        keep(
            "image_rows",
            {
                "what": "photos to two augmented views of 224 px, CPU seconds of the workers",
                "workers": given.workers,
                "repeats": given.repeats,
            }
            | result,
        )


def prepare(
    names: Sequence[str], size: Size, num_pictures: int, folder: Path, workers: int
) -> Contest:
    """Write the photos in a size, over and over again, as files and as tar shards."""
    photos = list(read_photos(names, size))
    if not photos:
        raise ValueError(f"no photo of {SMALLEST_SIDE} px or more in {', '.join(names)}")
    (folder / "shards").mkdir(parents=True)
    files = [folder / f"{number:06}.jpg" for number in range(num_pictures)]
    for file, photo in zip(files, cycle(photos), strict=False):
        file.write_bytes(photo)
    for shard in range(NUM_SHARDS):
        path = folder / "shards" / f"{shard}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for file in islice(files, shard, None, NUM_SHARDS):
                tar.add(file, file.name)
    source = SourceConfig(heldout_ratio=0.0)
    shards = find_shards([str(folder / "shards")])
    manifest = build(shards, source, lambda index, paths: [*map(index, paths)])
    return Contest(
        RowSource(Plan(manifest, 0, ORDER.blocks_per_order), ImageRows(ImageConfig(views=VIEWS))),
        loader(files, VIEWS, batch_size=ORDER.rows_per_slot, workers=workers),
        num_pictures,
        sum(file.stat().st_size for file in files) / 1e6,
    )


def read_photos(names: Sequence[str], size: Size) -> Iterator[bytes]:
    """Yield the photos that are large enough, cut and scaled to a size, as JPEGs."""
    for name in names:
        path = Path(name)
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix[1:].lower() not in EXTENSIONS:
                continue
            pixels = decode(file.read_bytes(), 3)
            if isinstance(pixels, Rejected) or min(pixels.shape[:2]) < SMALLEST_SIDE:
                continue
            made = ImageOps.fit(
                Image.fromarray(pixels), (size.width, size.height), Image.Resampling.LANCZOS
            )
            out = io.BytesIO()
            made.save(out, "JPEG", quality=size.quality)
            yield out.getvalue()


def measure(contest: Contest, repeats: int) -> dict[str, Any]:
    """Return the speed and the memory of both."""
    contest.make_on_ray()  # starts the workers of both
    contest.make_with_peer()
    watches: dict[str, list[Watch]] = {"ours": [], "peer": []}
    wall: dict[str, list[float]] = {"ours": [], "peer": []}

    def watched(name: str, role: str) -> float:
        with Watch() as watch:
            make = contest.make_on_ray if name == "ours" else contest.make_with_peer
            wall[name].append(wall_seconds(make))
        watches[name].append(watch)
        return watch.cpu_seconds(role)

    seconds = in_turn(
        repeats,
        {
            "ours": partial(watched, "ours", "workers"),
            "peer": partial(watched, "peer", "loaders"),
            "pure": partial(cpu_seconds, contest.make_pure),
        },
    )
    everything = {
        "ours": [watch.cpu_seconds("workers", "driver", "ray") for watch in watches["ours"]],
        "peer": [watch.cpu_seconds("loaders", "driver") for watch in watches["peer"]],
    }
    views = 2 * contest.num_pictures
    return {
        "pictures": contest.num_pictures,
        "mean_picture_kilobytes": round(1000 * contest.megabytes / contest.num_pictures, 1),
        **{f"{name}_views_per_cpu_second": rates(views, found) for name, found in seconds.items()},
        **{f"{name}_views_per_second": rates(views, found) for name, found in wall.items()},
        "ours_to_peer_speed_ratio": ratio(seconds["peer"], seconds["ours"]),
        "pure_to_peer_speed_ratio": ratio(seconds["peer"], seconds["pure"]),
        "workers_to_pure_cpu_ratio": ratio(seconds["ours"], seconds["pure"]),
        "all_processes_speed_ratio": ratio(everything["peer"], everything["ours"]),
        "peak_megabytes_of_a_worker": {
            f"{name}{', its own' if own else ''}": max(
                max(watch.peak_megabytes(role, own=own)) for watch in watches[name]
            )
            for name, role in (("ours", "workers"), ("peer", "loaders"))
            for own in (False, True)
        },
        "consumer": measure_consumer(contest, repeats),
    }


def measure_consumer(contest: Contest, repeats: int) -> dict[str, Any]:
    """Return how fast a train worker makes batches of the blocks, and their digests."""
    blocks = list(contest.blocks())
    megabytes = sum(block.nbytes for block in blocks) / 1e6

    def batches() -> None:
        for step in steps(blocks, contest.source, ORDER, Cursor(), Rank()):
            for batch in step.slots.values():
                slot_digest(batch)

    seconds = in_turn(repeats, {"batches": partial(cpu_seconds, batches)})
    return {
        "block_megabytes": round(blocks[0].nbytes / 1e6, 2),
        "block_rows": blocks[0].num_rows,
        "megabytes_per_cpu_second": rates(megabytes, seconds["batches"]),
    }


def _fits(block: Any) -> bool:
    """Return whether a block holds its views as bytes and is of a good size."""
    least, most = BLOCK_BYTES
    is_bytes = all(block.schema.field(name).type.value_type == "uint8" for name in VIEW_COLUMNS)
    return is_bytes and least <= block.nbytes <= most


if __name__ == "__main__":
    main()
