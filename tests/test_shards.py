"""Which shards a pattern names, and what of a record is a document or why it is none."""

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from pipelines.data.filesystems import File
from pipelines.data.records import MAX_RECORD_BYTES, Form
from pipelines.data.shards import Rejected, SourceConfig, document, find_shards, form_of
from pipelines.errors import UserError

SOURCE = SourceConfig(heldout_ratio=0)


@pytest.mark.parametrize(
    ("record", "form", "reason"),
    [
        (b"", "txt-file", "filtered:no-words"),
        (b"\n", "jsonl", "filtered:no-words"),
        (b" \t ...\n", "txt-blank-line", "filtered:no-words"),
        (b'{"text": "?!"}', "jsonl", "filtered:no-words"),
        (b'{"text": ""}', "jsonl", "filtered:no-words"),
        (b"\xff\xfe", "txt-file", "quarantined:bad-utf8"),
        (b"\xed\xa0\x80 in UTF-8", "txt-file", "quarantined:bad-utf8"),
        (b'{"text": "caf\xe9"}', "jsonl", "quarantined:bad-utf8"),
        (b'{"text": "cut', "jsonl", "quarantined:bad-json"),
        (b'{"text": "a"} {"text": "b"}', "jsonl", "quarantined:bad-json"),
        (b"[" * 200_000, "jsonl", "quarantined:bad-json"),
        (b'{"text": "a", "n": ' + b"1" * 5000 + b"}", "jsonl", "quarantined:bad-json"),
        (b'{"title": "a"}', "jsonl", "quarantined:no-text-field"),
        (b'{"text": 7}', "jsonl", "quarantined:no-text-field"),
        (b'{"text": null}', "jsonl", "quarantined:no-text-field"),
        (b'["text"]', "jsonl", "quarantined:no-text-field"),
        (b"null", "jsonl", "quarantined:no-text-field"),
        (b'{"text": "a \\ud800 b"}', "jsonl", "quarantined:lone-surrogate"),
        (b"a" * (MAX_RECORD_BYTES + 1), "txt-file", "quarantined:too-long"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_record_that_is_no_document_says_why(record: bytes, form: Form, reason: str) -> None:
    assert document(record, form, SOURCE) == Rejected(reason)


@pytest.mark.parametrize(
    ("record", "form", "text"),
    [
        (b'{"text": "a", "n": 1e999}', "jsonl", "a"),
        (b'{"text": "\\ud83d\\ude00 a"}', "jsonl", "\U0001f600 a"),
        (b'{"text": "7\\u0000"}', "jsonl", "7\x00"),
        (b"  spaces stay \n", "txt-file", "  spaces stay \n"),
        ("\u4e2d".encode(), "txt-blank-line", "\u4e2d"),
        (b"a" * MAX_RECORD_BYTES, "txt-file", "a" * MAX_RECORD_BYTES),
    ],
    ids=lambda value: repr(value[:30]),
)
def test_a_document_is_its_text_unchanged(record: bytes, form: Form, text: str) -> None:
    assert document(record, form, SOURCE) == text


def test_the_text_field_can_be_named() -> None:
    source = SourceConfig(text_field="body")
    assert document(b'{"body": "a", "text": "b"}', "jsonl", source) == "a"


def names(found: Sequence[File]) -> list[str]:
    return [file.name for file in found]


def test_files_folders_and_globs_name_shards_once_and_sorted(tmp_path: Path) -> None:
    shards = ["b.jsonl", "a.txt.gz", "deep/er/c.ndjson.zst", "d.txt", "deep/e.parquet"]
    for name in [*shards, "README.md", "e.jsonl.bz2", "f.gz", "_SUCCESS", ".hidden", "deep/x.crc"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    expected = sorted(str(tmp_path / name) for name in shards)
    assert names(find_shards([str(tmp_path)])) == expected
    assert names(find_shards([str(tmp_path), str(tmp_path / "*.txt"), expected[0]])) == expected
    assert names(find_shards([str(tmp_path / "**" / "*.ndjson*")])) == [str(tmp_path / shards[2])]


def test_a_folder_with_the_name_of_a_shard_is_a_folder(tmp_path: Path) -> None:
    for name in ("x.jsonl/part-0.jsonl", "x.jsonl/_SUCCESS", "y.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    both = [str(tmp_path / name) for name in ("x.jsonl/part-0.jsonl", "y.jsonl")]
    assert names(find_shards([str(tmp_path / "x.jsonl")])) == both[:1]
    assert names(find_shards([str(tmp_path / "*.jsonl")])) == both


def test_links_to_one_file_are_one_shard_of_the_name_that_tells_its_form(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / "5f3a"
    blob.write_bytes(b"one\n")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).symlink_to(blob)
    (tmp_path / "blobs" / "round").symlink_to(tmp_path)  # not to be followed in circles
    assert find_shards([str(tmp_path)]) == find_shards([str(tmp_path / "a.txt")])


def test_no_pattern_at_all_is_refused() -> None:
    with pytest.raises(UserError, match="no data: name raw shards"):
        find_shards(())


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").touch()
    for pattern in [str(tmp_path), str(tmp_path / "*.jsonl"), str(tmp_path / "gone.txt"), ""]:
        with pytest.raises(UserError, match=r"no shards match .*: check the path, and quote"):
            find_shards([pattern] if pattern else [str(tmp_path / "[")])


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl.bz2", "a.gz", "a", "a.parquet.gz"])
def test_a_file_of_unknown_form_is_refused_with_the_known_ones(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(
        UserError, match=rf"{name}: unknown form; .*\.jsonl.*\.parquet.*\.gz.*\.zst"
    ):
        find_shards([str(tmp_path / name)])


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


def make_broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("make", [make_fifo, make_socket, make_broken_link])
def test_what_is_no_file_is_refused_and_never_waited_for(
    tmp_path: Path, make: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    (tmp_path / "good.jsonl").touch()
    make(Path("bad.jsonl"))
    make(Path("bad"))  # of no form: nobody asks for it
    for pattern in (str(tmp_path), str(tmp_path / "*.jsonl")):
        with pytest.raises(UserError, match=r"bad\.jsonl: not a file that can be read"):
            find_shards([pattern])


def test_a_device_is_refused() -> None:
    with pytest.raises(UserError, match=r"/dev/zero: not a file"):
        find_shards(["/dev/zero"])


def test_separate_sources_number_their_shards_and_share_none(tmp_path: Path) -> None:
    for name in ("a/1.txt", "a/2.txt", "b/3.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    patterns = [str(tmp_path / "b"), str(tmp_path / "a")]
    assert [file.source for file in find_shards(patterns)] == [0, 0, 0]
    assert [file.source for file in find_shards(patterns, separate=True)] == [1, 1, 0]
    with pytest.raises(UserError, match=r"b/3\.txt is in two sources"):
        find_shards([str(tmp_path), str(tmp_path / "b")], separate=True)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_the_name_tells_the_form(suffix: str) -> None:
    stanzas = SourceConfig(txt_documents="blank-line")
    assert form_of(f"/a.jsonl{suffix}", stanzas) == "jsonl"
    assert form_of(f"/a.ndjson{suffix}", SOURCE) == "jsonl"
    assert form_of(f"/a.txt{suffix}", SOURCE) == "txt-file"
    assert form_of(f"/a.txt{suffix}", stanzas) == "txt-blank-line"
    assert form_of("s3://bucket/a.parquet?scheme=http", SOURCE) == "parquet"


@pytest.mark.parametrize("ratio", [-0.1, 1, 7])
def test_an_impossible_heldout_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"heldout_ratio must be in \[0, 1\), got"):
        SourceConfig(heldout_ratio=ratio)


def test_an_impossible_gate_is_refused() -> None:
    for ratio in (-0.1, 2):
        with pytest.raises(ValueError, match=f"max_quarantined_ratio must be .*, got {ratio}"):
            SourceConfig(max_quarantined_ratio=ratio)
    with pytest.raises(ValueError, match=r"max_expansion must be at least 1, got 0\.5"):
        SourceConfig(max_expansion=0.5)
