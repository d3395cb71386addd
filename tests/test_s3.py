"""The same corpus on a real S3 server and on disk: one fingerprint, the same rows, clear errors."""

import gzip
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.data.batches import RowSource
from pipelines.data.fields import field_values
from pipelines.data.gate import check
from pipelines.data.images import ImageRows
from pipelines.data.indexing import build
from pipelines.data.manifest import Manifest
from pipelines.data.plan import Plan
from pipelines.data.records import Form
from pipelines.data.shards import SourceConfig, find_shards
from pipelines.data.text import TextRows
from pipelines.data.text_config import TextConfig
from pipelines.data.vocabulary import Vocabulary
from pipelines.errors import DataError, OutageError, UserError
from pipelines.recipes import recipe
from tests.command import command
from tests.corpus import make_text, serial_map
from tests.pictures import extension, make_picture, make_tar
from tests.servers import S3_KEYS, s3, s3_client

OPTIONS = "?endpoint_override={}&scheme=http&region=us-east-1"
SOURCE = SourceConfig(txt_documents="blank-line", heldout_ratio=0.2)


class Store(NamedTuple):
    """A bucket, and the folder that holds the same files."""

    client: Any
    options: str
    folder: Path

    def uri(self, path: str) -> str:
        """Return the URI of a path in the bucket."""
        return f"s3://shards/{path}{self.options}"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Return the address of the server that the tests share."""
    with pytest.MonkeyPatch.context() as patch, s3() as address:
        for name, value in S3_KEYS.items():
            patch.setenv(name, value)
        yield address


@pytest.fixture
def store(server: str, tmp_path: Path) -> Store:
    """Return a bucket with shards of every form, with odd names, and the same on disk."""
    folder = tmp_path / "disk"
    lines = [json.dumps({"text": make_text(i, 20)}) + "\n" for i in range(60)]
    files = {
        "a.jsonl": "".join(lines[:20]).encode(),
        "deep er/b#1%20+&=.jsonl.gz": gzip.compress("".join(lines[20:40]).encode()),
        "deep er/[c]?.jsonl.zst": bytes(pa.Codec("zstd").compress("".join(lines[40:]).encode())),
        "d.txt": "\n\n".join(make_text(i, 9) for i in range(60, 80)).encode(),
        "_SUCCESS": b"",
    }
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    texts = [make_text(i, 9) for i in range(80, 120)]
    pq.write_table(pa.table({"text": texts}), folder / "e.parquet", row_group_size=15)
    client = s3_client(server)
    client.create_bucket(Bucket="shards")
    for path in folder.rglob("*.*"):
        client.upload_file(path, "shards", f"corpus/{path.relative_to(folder)}")
    client.put_object(Bucket="shards", Key="corpus/_SUCCESS", Body=b"")
    return Store(client, OPTIONS.format(server), folder)


def manifest_of(pattern: str) -> Manifest:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.data.indexing.MIN_BLOCK_BYTES", 4000)
        return build(find_shards([pattern]), SOURCE, serial_map)


def test_a_corpus_has_the_same_fingerprint_and_rows_on_s3_as_on_disk(
    store: Store, vocabulary: Vocabulary
) -> None:
    remote, local = manifest_of(store.uri("corpus")), manifest_of(str(store.folder))
    assert remote.root == store.uri("corpus")
    assert remote.fingerprint == local.fingerprint
    assert len(remote.shards) == 5
    check(remote)
    maker = TextRows(TextConfig(max_length=32), vocabulary)
    plans = [Plan(manifest, 0, 6) for manifest in (remote, local)]
    for number in range(plans[0].orders_per_epoch):
        rows = [RowSource(plan, maker).table(plan.order(number)) for plan in plans]
        assert rows[0].equals(rows[1])
        assert rows[0].num_rows > 10


@pytest.mark.parametrize("form", ["files", "parquet-images", "tar"])
def test_pictures_have_the_same_fingerprint_and_rows_on_s3_as_on_disk(
    server: str, tmp_path: Path, form: Form
) -> None:
    pictures = {f"a/{i:03}.{extension(i)}": make_picture(i) for i in range(20)}
    folder = tmp_path / "disk"
    (folder / "a").mkdir(parents=True)
    if form == "files":
        for name, data in pictures.items():
            (folder / name).write_bytes(data)
    elif form == "tar":
        (folder / "a.tar").write_bytes(make_tar([*pictures.items()]))
    else:
        column = [{"bytes": data, "path": name} for name, data in pictures.items()]
        pq.write_table(pa.table({"image": column}), folder / "a.parquet", row_group_size=7)
    client = s3_client(server)
    client.create_bucket(Bucket=form)
    for path in folder.rglob("*.*"):
        client.upload_file(path, form, f"deep er/{path.relative_to(folder)}")
    uri = f"s3://{form}/deep er{OPTIONS.format(server)}"
    remote, local = (
        build(find_shards([name], "images"), SOURCE, serial_map, "images")
        for name in (uri, str(folder))
    )
    assert remote.fingerprint == local.fingerprint
    assert remote.shards[0].form == form
    maker = ImageRows(recipe("image-tiny").images)
    rows = [RowSource(plan := Plan(m, 0, 9), maker).table(plan.order(0)) for m in (remote, local)]
    assert rows[0].equals(rows[1])
    assert rows[0].num_rows == local.records_where("training") > 10

    if form == "files":
        assert [*field_values(remote, 0, "folder")] == ["a"] * 20
        client.put_object(Bucket=form, Key="deep er/a/003.png", Body=b"other")
        with pytest.raises(DataError, match=r"from s3://files/deep er/a/000\.jpeg\?.* changed"):
            remote.read(0, "training")
        client.delete_object(Bucket=form, Key="deep er/a/003.png")
        with pytest.raises(DataError, match=r"s3://files/deep er/a/003\.png\?.*: is gone \("):
            remote.read(0, "training")


@pytest.mark.parametrize(
    "pattern",
    ["", "*.jsonl", "?.*", "**/*.jsonl*", "deep er/*", "deep er/[[]c]?.jsonl.zst", "[ad].*", "*"],
)
def test_patterns_name_the_same_shards_on_s3_as_on_disk(store: Store, pattern: str) -> None:
    (store.folder / "_SUCCESS").unlink()
    store.client.delete_object(Bucket="shards", Key="corpus/_SUCCESS")
    remote = find_shards([store.uri(f"corpus/{pattern}")])
    local = find_shards([str(store.folder / pattern)])
    root = str(store.folder)
    named = {file.name.removeprefix(root): file.bytes for file in local}
    prefix = "s3://shards/corpus"
    assert named == {
        file.name.removeprefix(prefix).removesuffix(store.options): file.bytes for file in remote
    }
    assert named
    assert all(file.mtime_ns for file in remote)


def test_a_vanished_or_changed_object_is_refused_by_name(store: Store) -> None:
    manifest = manifest_of(store.uri("corpus/*.jsonl"))
    store.client.put_object(
        Bucket="shards", Key="corpus/a.jsonl", Body=(store.folder / "a.jsonl").read_bytes()[::-1]
    )
    with pytest.raises(DataError, match=r"^s3://shards/corpus/a\.jsonl\?.*: bytes .* changed"):
        manifest.read(0, "training")
    store.client.delete_object(Bucket="shards", Key="corpus/a.jsonl")
    with pytest.raises(DataError, match=r"^s3://shards/corpus/a\.jsonl\?.*: is gone \("):
        manifest.read(0, "training")


def test_a_store_that_fails_is_an_outage_and_no_harm_to_its_shards(server: str) -> None:
    del server  # for its credentials
    with s3() as address:
        client = s3_client(address)
        client.create_bucket(Bucket="brief")
        client.put_object(Bucket="brief", Key="a.txt.gz", Body=gzip.compress(b"the tide"))
        manifest = manifest_of(f"s3://brief{OPTIONS.format(address)}")
        assert list(manifest.texts("training")) == ["the tide"]
    with pytest.raises(OutageError, match=r"a\.txt\.gz\?.*: cannot be read \(.*connect"):
        manifest.read(0, "training")


def test_a_cut_object_is_a_cut_shard_and_a_vanished_one_is_not(store: Store) -> None:
    store.client.put_object(Bucket="shards", Key="cut/a.jsonl.gz", Body=gzip.compress(b"a")[:-1])
    manifest = manifest_of(store.uri("cut"))
    assert manifest.quarantined[0].detail == "Truncated compressed stream"
    files = find_shards([store.uri("cut")])
    store.client.delete_object(Bucket="shards", Key="cut/a.jsonl.gz")
    with pytest.raises(DataError, match=r"cut/a\.jsonl\.gz\?.*: is gone \("):
        build(files, SOURCE, serial_map)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("s3://other", "no shards match|cannot list s3://other"),
        ("s3://other/*.txt", "no shards match|cannot list s3://other"),
        ("s3://shards/none", "no shards match"),
        ("s3://shards/none/*.txt", "no shards match"),
    ],
)
def test_a_wrong_bucket_or_key_is_one_line(store: Store, name: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        find_shards([f"{name}{store.options}"])
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_a_dead_server_is_one_line(server: str) -> None:
    del server  # for its credentials
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
        with pytest.raises(UserError, match=r"cannot list s3://b/a\.txt.*connect.*credentials"):
            find_shards([f"s3://b/a.txt?endpoint_override=127.0.0.1:{port}&scheme=http"])


@pytest.mark.slow
def test_tasks_of_ray_read_the_same_uri(store: Store, tmp_path: Path) -> None:
    uri = store.uri("corpus")
    with command(tmp_path, "index", uri, "--source.txt-documents", "blank-line", "--json") as run:
        assert run.wait() == 0, run.err
        account = json.loads(run.out[-1])
    local = build(
        find_shards([str(store.folder)]), SourceConfig(txt_documents="blank-line"), serial_map
    )
    assert account["fingerprint"] == local.fingerprint
