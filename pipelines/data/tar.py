r"""A strict tar reader: every byte of a shard is in a sample, or in a span with a reason.

webdataset's convention: the files of one sample stand next to each other and share a key, their
path up to the first dot of its last part.

    n01/a.jpg  n01/a.cls  |  n01/b.jpg  n01/b.json  |  zero blocks
    sample n01/a: jpg, cls   sample n01/b: jpg, json   filtered:end-of-archive

Ordinary readers take a zeroed block for the end of the data and a cut for the end of the file.
This one looks for the next header behind whatever it cannot read, and says what it passed over.
POSIX.1-2017, pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".
"""

import io
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol

from pipelines.data.records import Record, Seen

BLOCK = 512
MAX_SAMPLE_BYTES = 64 * 1024 * 1024
"""A longer sample is passed over without being held in memory."""
MAX_BETWEEN_BYTES = 1024 * 1024
"""So much without a key may stand between two files of one sample."""
MAX_EXTENSION_BYTES = 1024 * 1024
"""Long names and pax records that are longer are not believed."""

END = "filtered:end-of-archive"
CUT = "quarantined:cut"
NO_END = "quarantined:no-end-of-archive"
"""The fates that a shard can end with."""

NO_KEY = "filtered:no-extension"
"""The fate of a file that is none of a sample, such as the ._NAME that macOS packs beside NAME."""

_KEY = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_KINDS = {
    b"0": "regular",
    b"\0": "regular",
    b"7": "regular",
    b"1": "link",
    b"2": "link",
    b"3": "device",
    b"4": "device",
    b"5": "directory",
    b"6": "device",
    b"S": "sparse-file",
    b"g": "pax-global",
    b"L": "long-name",
    b"K": "long-link",
    b"x": "pax",
}
_EXTENSIONS = ("long-name", "long-link", "pax")
"""Headers that say something of the next one."""


class Readable(Protocol):
    """Anything that gives its bytes in order."""

    def read(self, size: int, /) -> bytes:
        """Return `size` bytes, fewer only at the end."""


class Sample(NamedTuple):
    """Adjacent files of one key, as the bytes of the shard that hold them, headers and all."""

    key: str
    data: bytes


class PassedOver(NamedTuple):
    """Bytes of the shard that give no sample."""

    num_bytes: int
    reason: str
    """`filtered:...` for what belongs to the format, `quarantined:...` for what is broken."""


def records(stream: Readable, seen: Seen | None = None) -> Iterator[Record]:
    """Yield the records of a shard, or of its rest after a record: samples and what is passed over.

    `seen` is given the bytes of samples, and of what is passed over its fate and its size: it may
    be longer than memory. Ordinary readers take a missing end for an end; here it is a record of
    no bytes.
    """
    fate = ""
    for piece in samples(stream):
        if isinstance(piece, Sample):
            fate = ""
            told, record = piece.data, Record(piece.data, len(piece.data), key=piece.key)
        else:
            fate = piece.reason
            told, record = f"{fate} {piece.num_bytes}".encode(), Record(None, piece.num_bytes, fate)
        if seen:
            seen(told)
        yield record
    if fate not in (END, CUT):
        yield Record(None, 0, NO_END)


def samples(stream: Readable) -> Iterator[Sample | PassedOver]:
    """Yield what a tar holds; the bytes of all that is yielded are those of the shard.

    A key that comes again later is a sample of its own: whoever reads the whole shard can tell.
    Small files without a key between two of one sample go with it.
    """
    pending: list[_Member] = []
    between: list[_Member] = []
    size = 0
    for member in _members(_Blocks(stream)):
        if pending and member.reason == NO_KEY and _size([*between, member]) <= MAX_BETWEEN_BYTES:
            between.append(member)
            continue
        if pending and (member.reason or member.key != pending[0].key):
            yield _join(pending)
            yield from map(_passed_over, between)
            pending, between, size = [], [], 0
        if member.reason:
            yield _passed_over(member)
            continue
        size += _size([*between, member])
        pending += [*between, member]
        between = []
        if size > MAX_SAMPLE_BYTES:  # will be passed over: that it was there is all to be held
            pending = [member._replace(num_bytes=size, headers=b"", content=b"")]
    if pending:
        yield _join(pending)
    yield from map(_passed_over, between)


def files(sample: bytes) -> dict[str, bytes]:
    """Return the files of a sample by their extension in lower case: `{"jpg": ..., "cls": ...}`.

    Raises:
        ValueError: If two files have one extension.
    """
    found: dict[str, bytes] = {}
    for member in _members(_Blocks(io.BytesIO(sample))):
        if member.reason:
            continue
        if member.extension in found:
            raise ValueError(f"two files .{member.extension} of one key")
        found[member.extension] = member.content
    return found


class _Member(NamedTuple):
    """A file with the headers before it, or bytes to pass over."""

    num_bytes: int
    reason: str = ""
    key: str = ""
    extension: str = ""
    headers: bytes = b""
    content: bytes = b""
    """Empty where it would be too long to hold."""


class _Header(NamedTuple):
    kind: str
    name: str
    size: int


class _Blocks:
    """A stream in blocks, with a look at the next one."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self.next = stream.read(BLOCK)

    def take(self) -> bytes:
        """Return the next block."""
        taken, self.next = self.next, self._stream.read(BLOCK)
        return taken

    def content(self, size: int, *, keep: bool) -> tuple[bytes, int]:
        """Return `size` bytes, empty unless kept, and how many there were with the padding."""
        padded = size + -size % BLOCK
        parts, left = [self.next[:padded]], padded - len(self.next[:padded])
        while left > 0 and (part := self._stream.read(min(left, 1 << 20))):
            left -= len(part)
            if keep:
                parts.append(part)
        if padded:
            self.next = self._stream.read(BLOCK)
        return (b"".join(parts)[:size] if keep else b""), padded - left


def _members(blocks: _Blocks) -> Iterator[_Member]:
    while blocks.next:
        header = _header(blocks.next)
        yield _member(blocks, header) if header else _pass_over(blocks)


def _pass_over(blocks: _Blocks) -> _Member:
    """Pass over everything up to the next header."""
    size, is_zero = 0, True
    while blocks.next and not _header(blocks.next):
        block = blocks.take()
        size += len(block)
        is_zero = is_zero and not block.strip(b"\0")
    if not is_zero:
        return _Member(size, "quarantined:bad-header")
    # Only at the end do zeros mean the end: elsewhere they stand where something was.
    return _Member(size, "quarantined:zeroed" if blocks.next else END)


def _member(blocks: _Blocks, header: _Header | None) -> _Member:
    """Read the headers of one file, the first of which is known, and its content."""
    headers, num_bytes = b"", 0
    said: dict[str, str] = {}
    while header and header.kind in _EXTENSIONS:
        if header.size > MAX_EXTENSION_BYTES:
            return _Member(num_bytes + len(blocks.take()), "quarantined:bad-header")
        block = blocks.take()
        content, size = blocks.content(header.size, keep=True)
        said |= _said(header.kind, content)
        headers += block + content + bytes(-len(content) % BLOCK)
        num_bytes += len(block) + size
        header = _header(blocks.next)
    if header is None:
        return _Member(num_bytes, "quarantined:bad-header" if blocks.next else CUT)
    header = header._replace(name=said.get("path", header.name))
    if said.get("size", "").isdecimal():
        header = header._replace(size=int(said["size"]))
    headers += blocks.take()
    match = _KEY.fullmatch(header.name)
    reason = _reason(header, said, is_named=match is not None)
    most = {"": MAX_SAMPLE_BYTES, NO_KEY: MAX_BETWEEN_BYTES}.get(reason, 0)
    is_held = len(headers) + header.size <= most
    content, found = blocks.content(header.size, keep=is_held)
    num_bytes += BLOCK + found
    if found < header.size + -header.size % BLOCK:
        return _Member(num_bytes, CUT)
    if match is None or reason:
        return _Member(num_bytes, reason, headers=headers, content=content)
    return _Member(num_bytes, "", match[1], match[2].lower(), headers, content)


def _reason(header: _Header, said: dict[str, str], *, is_named: bool) -> str:
    """Return why a member is no file of a sample; empty if it is one."""
    if any(name.startswith("GNU.sparse") for name in said):
        return "quarantined:sparse-file"
    if header.kind == "directory" or header.name.endswith("/"):
        return "filtered:directory"
    if header.kind == "pax-global":
        return "filtered:pax-global"
    if header.kind != "regular":
        return f"quarantined:{header.kind}"
    return "" if is_named else NO_KEY


def _size(members: list[_Member]) -> int:
    return sum(member.num_bytes for member in members)


def _passed_over(member: _Member) -> PassedOver:
    return PassedOver(member.num_bytes, member.reason)


def _join(members: list[_Member]) -> Sample | PassedOver:
    size = _size(members)
    whole = b"".join(
        part
        for member in members
        for part in (member.headers, member.content, bytes(-len(member.content) % BLOCK))
    )
    if size > MAX_SAMPLE_BYTES or len(whole) < size:
        return PassedOver(size, "quarantined:too-long")
    return Sample(members[0].key, whole)


# Those of a sample are read twice: in the shard, and where the files of the sample are told apart.
@lru_cache(maxsize=256)
def _header(block: bytes) -> _Header | None:
    """Return what a block says if it is a header, whole and of a known kind."""
    kind = _KINDS.get(block[156:157], "")
    checksum, size = _number(block[148:156]), _number(block[124:136])
    if len(block) < BLOCK or not kind or size is None:
        return None
    if checksum != sum(block[:148]) + 8 * ord(" ") + sum(block[156:]):
        return None
    name = _text(block[:100])
    # GNU tar keeps times where ustar keeps the front of a long path.
    if block[257:263] == b"ustar\0" and (prefix := _text(block[345:500])):
        name = f"{prefix}/{name}"
    return _Header(kind, name, size)


def _number(digits: bytes) -> int | None:
    """Return a number in octal, or in base 256 where GNU tar needs it; None if it is neither."""
    if digits[:1] == b"\x80":
        return int.from_bytes(digits[1:], "big")
    text = digits.strip(b" \0")
    return int(text or b"0", 8) if re.fullmatch(rb"[0-7]*", text) else None


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _said(kind: str, content: bytes) -> dict[str, str]:
    """Return what an extension says of the file behind it."""
    if kind == "long-name":
        return {"path": _text(content)}
    said: dict[str, str] = {}
    # The length of a record counts itself, so a smaller one is no length.
    while kind == "pax" and (match := re.match(rb"(\d{1,7}) ([^=\n]+)=", content)):
        end = max(int(match[1]), match.end() + 1)
        record, content = content[:end], content[end:]
        said[match[2].decode("utf-8", "replace")] = record[match.end() : -1].decode(
            "utf-8", "surrogateescape"
        )
    return said
