"""Tests of the strict tar reader: nothing is lost without a word."""

import io
import random
import tarfile
import tracemalloc
from collections import Counter
from collections.abc import Callable

import pytest

from pipelines.data import tar
from pipelines.data.tar import BLOCK, PassedOver, Sample, files, samples

NUM_SAMPLES = 12


def content_of(number: int) -> bytes:
    dice = random.Random(number)
    return dice.randbytes([0, 1, 511, 512, 513, 3000][number % 6])


def make_tar(
    format: int = tarfile.USTAR_FORMAT,
    edit: Callable[[tarfile.TarInfo, int], object] = lambda *_: None,
) -> bytes:
    """Return a tar of samples of two files each, `part/00.jpeg` and `part/00.cls`."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for number in range(NUM_SAMPLES):
            for extension, content in (("jpeg", content_of(number)), ("cls", b"%d" % number)):
                info = tarfile.TarInfo(f"part/{number:02}.{extension}")
                info.size = len(content)
                edit(info, number)
                tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def read(data: bytes) -> list[Sample | PassedOver]:
    return list(samples(io.BytesIO(data)))


def whole(found: list[Sample | PassedOver]) -> dict[str, dict[str, bytes]]:
    return {piece.key: files(piece.data) for piece in found if isinstance(piece, Sample)}


def num_bytes(piece: Sample | PassedOver) -> int:
    return len(piece.data) if isinstance(piece, Sample) else piece.num_bytes


def reasons(found: list[Sample | PassedOver]) -> Counter[str]:
    return Counter(piece.reason for piece in found if isinstance(piece, PassedOver))


EXPECTED = {
    f"part/{number:02}": {"jpeg": content_of(number), "cls": b"%d" % number}
    for number in range(NUM_SAMPLES)
}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("path", ["", "d" * 90 + "/", "long/" * 40, "\u00fcmlaut \u6f22/"])
def test_samples_are_the_files_of_a_key(format: int, path: str) -> None:
    if format == tarfile.USTAR_FORMAT and len(path) > 150:
        pytest.skip("longer than a ustar header can say")

    def edit(info: tarfile.TarInfo, number: int) -> None:
        info.name = path + info.name
        info.mtime = 0.5 if number % 2 else 1

    data = make_tar(format, edit)
    found = read(data)
    assert whole(found) == {path + key: value for key, value in EXPECTED.items()}
    assert reasons(found) == {"filtered:end-of-archive": 1}
    assert sum(map(num_bytes, found)) == len(data)


def test_a_sample_is_its_bytes_of_the_shard() -> None:
    data = make_tar(tarfile.PAX_FORMAT, lambda info, _: setattr(info, "mtime", 0.25))
    found = read(data)
    assert (
        b"".join(piece.data for piece in found if isinstance(piece, Sample))
        == data[: -num_bytes(found[-1])]
    )


def test_a_shard_can_be_read_from_any_sample_on() -> None:
    data = make_tar()
    found = read(data)
    start = 0
    for number, piece in enumerate(found):
        assert read(data[start:]) == found[number:]
        start += num_bytes(piece)


@pytest.mark.parametrize("seed", range(200))
def test_whatever_is_cut_or_flipped_is_used_or_named(seed: int) -> None:
    """A flipped bit of a file's own content is the content: the manifest's hash holds it."""
    data = make_tar([tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT][seed % 2])
    end = len(data.rstrip(b"\0")) // BLOCK * BLOCK + BLOCK
    dice = random.Random(seed)
    place = dice.randrange(end)
    if seed % 4 < 2:
        harmed = data[:place]
    else:
        flipped = data[place] ^ 1 << dice.randrange(8)
        harmed = data[:place] + bytes([flipped]) + data[place + 1 :]
    found = read(harmed)
    assert sum(map(num_bytes, found)) == len(harmed)
    used = whole(found)
    lost = [key for key, value in EXPECTED.items() if used.get(key) != value]
    assert len(lost) <= 1 if seed % 4 >= 2 else lost == _ending_behind(data, place)
    named = [reason for reason in reasons(found) if reason.startswith("quarantined")]
    hit = _part_at(data, place)
    match hit:
        case "header" if seed % 4 >= 2:
            assert named, "a flipped header bit passed unseen"
        case "content" if seed % 4 >= 2:
            assert not named
            assert used.keys() == EXPECTED.keys()
    if seed % 4 < 2 and place % BLOCK:
        assert named == ["quarantined:cut"] or named == ["quarantined:bad-header"]


def _ending_behind(data: bytes, place: int) -> list[str]:
    """Return the keys of the samples that a cut takes something from."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        ends = {
            member.name.partition(".")[0]: member.offset_data + member.size + -member.size % BLOCK
            for member in tar
        }
    return [key for key, end in ends.items() if end > place]


def _part_at(data: bytes, place: int) -> str:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            if member.offset <= place < member.offset_data:
                return "header"
            if member.offset_data <= place < member.offset_data + member.size:
                return "content"
    return "padding"


@pytest.mark.parametrize("number", range(NUM_SAMPLES - 1))
def test_a_zeroed_header_is_not_the_end(number: int) -> None:
    data = make_tar()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offset = tar.getmember(f"part/{number:02}.jpeg").offset
    found = read(data[:offset] + bytes(BLOCK) + data[offset + BLOCK :])
    used = whole(found)
    assert used.keys() == EXPECTED.keys()
    assert used[f"part/{number:02}"] == {"cls": b"%d" % number}
    assert sum(reason.startswith("quarantined") for reason in reasons(found)) == 1


def test_zeros_between_two_archives_are_named_and_both_are_read() -> None:
    data = make_tar()
    found = read(data + data)
    assert len([piece for piece in found if isinstance(piece, Sample)]) == 2 * NUM_SAMPLES
    assert reasons(found) == {"quarantined:zeroed": 1, "filtered:end-of-archive": 1}


@pytest.mark.parametrize(
    ("type", "reason"),
    [
        (tarfile.SYMTYPE, "quarantined:link"),
        (tarfile.LNKTYPE, "quarantined:link"),
        (tarfile.CHRTYPE, "quarantined:device"),
        (tarfile.BLKTYPE, "quarantined:device"),
        (tarfile.FIFOTYPE, "quarantined:device"),
        (tarfile.DIRTYPE, "filtered:directory"),
        (tarfile.GNUTYPE_SPARSE, "quarantined:sparse-file"),
    ],
)
def test_what_is_no_file_is_named(type: bytes, reason: str) -> None:
    def edit(info: tarfile.TarInfo, number: int) -> None:
        if number == 5 and info.name.endswith("cls"):
            info.type, info.size, info.linkname = type, 0, "/etc/passwd"

    found = read(make_tar(edit=edit))
    assert reasons(found) == {reason: 1, "filtered:end-of-archive": 1}
    assert whole(found)["part/05"] == {"jpeg": content_of(5)}


def test_a_sparse_file_of_pax_is_named() -> None:
    def edit(info: tarfile.TarInfo, number: int) -> None:
        if number == 5 and info.name.endswith("cls"):
            info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.name": "a.cls"}

    assert reasons(read(make_tar(tarfile.PAX_FORMAT, edit)))["quarantined:sparse-file"] == 1


def test_a_file_without_extension_is_named() -> None:
    found = read(make_tar(edit=lambda info, _: setattr(info, "name", info.name.split(".")[0])))
    assert reasons(found)["filtered:no-extension"] == 2 * NUM_SAMPLES


def with_leftovers(order: str, content: bytes) -> bytes:
    """Pack what macOS leaves beside files, before or behind each."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(NUM_SAMPLES):
            for extension, data in (("cls", b"%d" % number), ("jpeg", content_of(number))):
                both = [(f"._{number:02}.{extension}", content), (f"{number:02}.{extension}", data)]
                for name, its in both if order == "before" else both[::-1]:
                    info = tarfile.TarInfo(f"part/{name}")
                    info.size = len(its)
                    tar.addfile(info, io.BytesIO(its))
    return out.getvalue()


@pytest.mark.parametrize("order", ["before", "behind"])
def test_what_macos_packs_between_the_files_of_a_sample_does_not_part_them(order: str) -> None:
    data = with_leftovers(order, b"Mac OS X" * 20)
    found = read(data)
    assert whole(found) == EXPECTED
    assert sum(map(num_bytes, found)) == len(data)
    assert reasons(found)["filtered:no-extension"] == NUM_SAMPLES
    assert len([piece for piece in found if isinstance(piece, Sample)]) == NUM_SAMPLES


def test_much_between_two_files_is_not_held_and_parts_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tar, "MAX_BETWEEN_BYTES", 600)
    data = with_leftovers("before", b"Mac OS X" * 100)
    found = read(data)
    assert sum(map(num_bytes, found)) == len(data)
    assert reasons(found)["filtered:no-extension"] == 2 * NUM_SAMPLES


def test_a_key_that_comes_again_is_a_sample_of_its_own() -> None:
    def edit(info: tarfile.TarInfo, _: int) -> None:
        info.name = info.name.replace("part/07", "part/03")

    keys = [piece.key for piece in read(make_tar(edit=edit)) if isinstance(piece, Sample)]
    assert [number for number, key in enumerate(keys) if key == "part/03"] == [3, 7]


def test_two_files_of_one_extension_are_refused() -> None:
    found = read(make_tar(edit=lambda info, _: setattr(info, "name", info.name[:7] + ".JPG")))
    (first, *_) = [piece for piece in found if isinstance(piece, Sample)]
    with pytest.raises(ValueError, match=r"two files \.jpg of one key"):
        files(first.data)


@pytest.mark.parametrize("content", [b"", b"<html>", b"\0", b"\0" * 5000, b"\xff" * 5000])
def test_what_is_no_tar_gives_no_sample(content: bytes) -> None:
    found = read(content)
    assert not whole(found)
    assert sum(map(num_bytes, found)) == len(content)


def test_a_sample_that_is_too_long_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.data.tar.MAX_SAMPLE_BYTES", 3000)
    data = make_tar()
    found = read(data)
    long = [key for key, value in EXPECTED.items() if len(value["jpeg"]) == 3000]
    assert whole(found) == {key: value for key, value in EXPECTED.items() if key not in long}
    assert reasons(found)["quarantined:too-long"] == len(long) > 0
    assert sum(map(num_bytes, found)) == len(data)


def test_a_sample_of_too_many_files_is_not_held_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.data.tar.MAX_SAMPLE_BYTES", 1_000_000)
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for number in range(200):  # cat.0.jpg, cat.1.jpg ...: one key
            info = tarfile.TarInfo(f"cat.{number}.jpg")
            info.size = 100_000
            archive.addfile(info, io.BytesIO(bytes([number]) * info.size))
        info = tarfile.TarInfo("dog.jpg")
        archive.addfile(info, io.BytesIO())
    data.seek(0)
    tracemalloc.start()
    found = list(samples(data))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5_000_000
    assert isinstance(found[0], PassedOver)
    assert found[0].reason == "quarantined:too-long"
    assert isinstance(found[1], Sample)
    assert sum(map(num_bytes, found)) == len(data.getvalue())


@pytest.mark.parametrize(
    "records", [b"0 a=b\n", b"7 a=b\n", b"9999999 a=b", b"size=1", b"\xff" * 9]
)
def test_pax_records_that_lie_do_no_harm(records: bytes) -> None:
    def edit(info: tarfile.TarInfo, _: int) -> None:
        info.pax_headers = {"comment": "x" * 40}

    data = make_tar(tarfile.PAX_FORMAT, edit)
    place = data.index(b"comment=") - 3
    harmed = data[:place] + records + data[place + len(records) :]
    found = read(harmed)
    assert sum(map(num_bytes, found)) == len(harmed)
    assert whole(found) == EXPECTED
