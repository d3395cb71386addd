"""Shards appear whole, once, and only from known bytes."""

import bz2
import hashlib
import io
import json
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path

import pytest

from pipelines.data.samples import (
    SAMPLES,
    SOURCE_FILE,
    Sample,
    read_members,
    write_archive,
    write_sample,
)
from pipelines.data.text_samples import (
    NUM_SHARDS,
    Document,
    parse_addresses,
    parse_articles,
    write_documents,
)
from pipelines.errors import DataError, UserError

MEMBER = (
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
)
PROSE = "The river rises in the hills and reaches the sea after two long days. " * 20


def page(title: str, wikitext: str, *, namespace: int = 0, redirect: bool = False) -> str:
    mark = '<redirect title="Elsewhere" />' if redirect else ""
    return (
        f"<page><title>{title}</title><ns>{namespace}</ns><id>{len(title)}</id>{mark}"
        f"<revision><id>7</id><text>{escape(wikitext)}</text></revision></page>"
    )


def make_dump(*pages: str) -> bytes:
    namespace = "http://www.mediawiki.org/xml/export-0.10/"
    return bz2.compress(f'<mediawiki xmlns="{namespace}">{"".join(pages)}</mediawiki>'.encode())


def make_wheel(folder: Path, dump: bytes) -> tuple[Sample, Path]:
    archive = folder / "package.whl"
    with zipfile.ZipFile(archive, "w") as package:
        package.writestr(MEMBER, dump)
        package.writestr("gensim/__init__.py", "")
    sha256 = hashlib.sha256(dump).hexdigest()
    return replace(SAMPLES["wikipedia"], sha256=sha256), archive


def rivers(count: int) -> bytes:
    return make_dump(*(page("R" * number, PROSE) for number in range(1, count + 1)))


def test_only_articles_are_read_in_their_order() -> None:
    dump = make_dump(
        page("Zeus", PROSE),
        page("Jove", PROSE, redirect=True),
        page("Talk", PROSE, namespace=4),
        page("Zeus (disambiguation)", PROSE + "\n{{Disambiguation}}"),
        page("Ares", PROSE),
    )
    assert list(parse_articles([dump])) == [
        Document(id="4", title="Zeus", text=PROSE.strip()),
        Document(id="4", title="Ares", text=PROSE.strip()),
    ]


def test_a_source_archive_is_read_as_a_wheel_is(tmp_path: Path) -> None:
    sample, wheel = make_wheel(tmp_path, rivers(3))
    sdist = tmp_path / "package.tar.gz"
    with tarfile.open(sdist, "w:gz") as package:
        member = tarfile.TarInfo(f"package-1.0/{MEMBER}")
        member.size = len(rivers(3))
        package.addfile(member, io.BytesIO(rivers(3)))
    assert list(read_members(sample, wheel).values()) == [rivers(3)]
    assert list(read_members(sample, sdist).values()) == [rivers(3)]


def test_unexpected_bytes_are_refused(tmp_path: Path) -> None:
    _, archive = make_wheel(tmp_path, rivers(3))
    with pytest.raises(DataError, match="does not hold the expected documents of gensim"):
        write_archive(SAMPLES["wikipedia"], archive, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_documents_are_dealt_over_the_shards(tmp_path: Path) -> None:
    dump = make_dump(*(page("R" * n, PROSE + "\u4e2d.") for n in range(1, 20)), page("S", "Short."))
    sample, archive = make_wheel(tmp_path, dump)
    report = write_archive(sample, archive, tmp_path / "new" / "out")
    assert (report.name, report.records, report.left_out) == ("wikipedia", 19, 1)
    assert len(report.shards) == NUM_SHARDS
    assert report.bytes == sum(shard.stat().st_size for shard in report.shards)
    lines = [shard.read_text(encoding="utf-8").splitlines() for shard in report.shards]
    titles = [[len(json.loads(line)["title"]) for line in shard] for shard in lines]
    assert titles == [list(range(first, 20, NUM_SHARDS)) for first in range(1, NUM_SHARDS + 1)]
    assert json.loads(lines[0][0]).keys() == {"id", "title", "text"}
    assert "\u4e2d" in lines[0][0]


def refuse_to_run(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
    raise AssertionError("a command was run")


def test_a_complete_sample_is_not_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, archive = make_wheel(tmp_path, rivers(9))
    report = write_archive(sample, archive, tmp_path / "out")
    monkeypatch.setattr(subprocess, "run", refuse_to_run)
    assert write_sample("wikipedia", tmp_path / "out") == report


@pytest.mark.parametrize("damaged", [SOURCE_FILE, "wikipedia-03.jsonl"])
def test_an_incomplete_sample_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: str
) -> None:
    sample, archive = make_wheel(tmp_path, rivers(9))
    out = tmp_path / "out"
    report = write_archive(sample, archive, out)
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    (out / damaged).unlink()
    monkeypatch.setattr(subprocess, "run", refuse_to_run)
    with pytest.raises(AssertionError, match="a command was run"):
        write_sample("wikipedia", out)
    assert write_archive(sample, archive, out) == report
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_a_sample_of_another_version_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample, archive = make_wheel(tmp_path, rivers(9))
    report = write_archive(sample, archive, tmp_path / "out")
    source = tmp_path / "out" / SOURCE_FILE
    source.write_text(source.read_text().replace('"records"', '"documents"'))
    monkeypatch.setattr(subprocess, "run", refuse_to_run)
    with pytest.raises(AssertionError, match="a command was run"):
        write_sample("wikipedia", tmp_path / "out")
    assert write_archive(sample, archive, tmp_path / "out") == report


def test_a_changed_shard_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, archive = make_wheel(tmp_path, rivers(9))
    report = write_archive(sample, archive, tmp_path / "out")
    report.shards[0].write_text("{}", encoding="utf-8")
    monkeypatch.setattr(subprocess, "run", refuse_to_run)
    with pytest.raises(AssertionError, match="a command was run"):
        write_sample("wikipedia", tmp_path / "out")


def unwritable(_: list[bytes]) -> Iterator[Document]:
    yield Document(id="1", title="first", text=PROSE)
    yield Document(id="2", title="a lone surrogate is not UTF-8", text=PROSE + "\ud800")


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    sample, archive = make_wheel(tmp_path, rivers(1))
    broken = replace(sample, write=partial(write_documents, unwritable))
    with pytest.raises(UnicodeEncodeError):
        write_archive(broken, archive, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [archive]


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    sample, archive = make_wheel(tmp_path, rivers(1))
    with pytest.raises(UserError, match=r"holds package\.whl, which is no part of the sample"):
        write_archive(sample, archive, tmp_path)
    with pytest.raises(UserError, match=r"holds package\.whl, which is no part of the sample"):
        write_sample("wikipedia", tmp_path)
    assert list(tmp_path.iterdir()) == [archive]


def test_an_unknown_name_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'wiki'\. Did you mean 'wikipedia'"):
        write_sample("wiki", tmp_path)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="out is no folder: choose another"):
        write_sample("wikipedia", tmp_path / "out")


def test_a_failed_download_says_what_pip_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess[str]([], 1, stderr="WARNING: old\nERROR: No match\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    expected = r"cannot download gensim==4.4.0 from pypi: ERROR: No match \(this needs a network"
    with pytest.raises(UserError, match=expected):
        write_sample("wikipedia", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_addresses_without_npm_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="install it, or use wikipedia, newsgroups, mnist"):
        write_sample("state-of-the-union", tmp_path / "out")


def test_addresses_are_titled_by_president_and_year() -> None:
    address = {"year": 1790, "name": "A President", "party": "none", "text": "Fellow &amp;\n you. "}
    assert list(parse_addresses([json.dumps(address).encode()])) == [
        Document(id="0", title="A President, 1790", text="Fellow & you.")
    ]
