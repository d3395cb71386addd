"""Where raw files lie: local paths and URIs of every pyarrow filesystem, opened by one code.

A file is named by an absolute local path or by `scheme://bucket/path?options`, in which the path
is what the store calls it, without percent codes. Options such as
`?endpoint_override=HOST:PORT&scheme=http` stay with the name wherever it is joined. Credentials
come from the environment alone, because names are recorded.
"""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from itertools import takewhile
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem, S3FileSystem

from pipelines.errors import DataError, OutageError, UserError

READ_ERRORS = (OSError, pa.ArrowException)
"""What pyarrow raises when a file cannot be found, read or decoded."""
S3_TIMEOUTS = {"connect_timeout": 5.0, "request_timeout": 10.0}
"""Seconds; each is tried three times. The 3 s that are the default come to 100 s of silence."""
GCS_RETRY_SECONDS = 30
"""Google's client tries for 15 minutes by itself."""

# A query starts at a question mark before `name=`; any other one is a wildcard.
_URI = re.compile(r"(?s)([A-Za-z][\w+.-]+)://([^/?]*)/?(.*?)(\?\w+=[^?]*)?")
# A secret may hold a slash. Only these stores have a port there, and so a colon without a secret.
_SECRET = re.compile(
    r"(?is)^(?:(?:hdfs|viewfs)://[^/]*:[^/]*@|(?!hdfs:|viewfs:)[^/]*//[^/]*:.*@)"
    r"|[?&]\w*(key|secret|token|password|sig)\w*="
)
_REQUEST_ID = re.compile(r" \(Request ID: [^)]*\)")


class File(NamedTuple):
    """One file as it was listed."""

    name: str
    """Absolute local path, or URI."""
    bytes: int
    mtime_ns: int | None
    source: int = 0
    """Which of several sources it belongs to."""


class Place(NamedTuple):
    """A name in parts."""

    head: str
    """Scheme and bucket or host; empty for local files."""
    path: str
    """Its path below that, without a leading slash."""
    options: str
    """From the question mark on."""

    def __str__(self) -> str:
        return f"{self.head}/{self.path}{self.options}"


def parse(name: str) -> Place:
    """Return the parts of a local path or URI.

    Raises:
        UserError: If it holds a credential.
    """
    if not (match := _URI.fullmatch(name)):
        return Place("", os.path.abspath(os.path.expanduser(name)).lstrip("/"), "")
    scheme, host, path, options = match.groups(default="")
    if scheme == "file":
        return Place("", os.path.abspath(f"/{path}").lstrip("/"), "")
    if holds_secret(name):
        raise UserError(
            f"{scheme}://...: credentials in a URI would be recorded with the run; give them in "
            "the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3)"
        )
    return Place(f"{scheme}://{host}", path.rstrip("/"), options)


def holds_secret(uri: str) -> bool:
    """Return whether a URI seems to hold a password, a key or a token."""
    return _SECRET.search(uri) is not None


def find_files(pattern: str, wanted: Callable[[str], bool]) -> Iterator[File]:
    """Yield the files that a file, folder or glob names; of a folder, all below it that is wanted.

    A glob knows `*`, `?`, `[]` and `**`. `wanted` is asked by name. What is hidden, as in folders
    that systems leave, is none of a folder.

    Raises:
        UserError: If the store cannot be reached or listed, or something named is no file.
    """
    place = parse(pattern)
    filesystem, base = _connect(place.head, place.options)
    with _told(pattern):
        named = [filesystem.get_file_info(_full(base, place.path))]
        if named[0].type == FileType.NotFound:
            named = list(_glob(filesystem, base, place.path))
        for info in named:
            if info.type == FileType.Directory:
                for found in _list(filesystem, info.path, 0):
                    hidden = "/." in found.path.removeprefix(info.path)
                    if found.type != FileType.Directory and not hidden and wanted(found.path):
                        yield _file(found, base, place)
            else:
                yield _file(info, base, place)


def open_file(name: str) -> pa.NativeFile:
    """Open a file for reading at any place.

    Raises:
        OSError: If there is none, or it cannot be read.
    """
    place = parse(name)
    filesystem, base = _connect(place.head, place.options)
    return filesystem.open_input_file(_full(base, place.path))


def read_through(name: str) -> int:
    """Read all bytes of a file, and return how many: what fails nevertheless is their content.

    Raises:
        DataError: If there is no such file any more.
        OutageError: If its store does not give all of it.
    """
    with reading(name), open_file(name) as file:
        return sum(map(len, iter(partial(file.read, 1 << 20), b"")))


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Tell what keeps the bytes of a file from being read.

    Raises:
        DataError: If there is no such file any more.
        OutageError: If its store does not give all of it.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{name}: is gone ({reason(error)}); restore this shard") from error
    except READ_ERRORS as error:
        raise OutageError(
            f"{name}: cannot be read ({reason(error)}); try again once its store answers"
        ) from error


def split_root(names: Sequence[str]) -> tuple[str, list[str]]:
    """Return the deepest folder that holds all files, and the path of each below it.

    Files of different stores have no such folder: the root is empty, and the names stay whole.
    """
    places = [parse(name) for name in names]
    if len({(place.head, place.options) for place in places}) > 1:
        return "", list(names)
    parts = [place.path.split("/") for place in places]
    levels = zip(*(part[:-1] for part in parts), strict=False)  # to the least deep of them
    depth = len([*takewhile(lambda level: len(set(level)) == 1, levels)])
    root = places[0]._replace(path="/".join(parts[0][:depth]))
    return str(root), ["/".join(part[depth:]) for part in parts]


def join(root: str, path: str) -> str:
    """Return the name of a file by its path below a root that `split_root` found."""
    if not root:
        return path
    place = parse(root)
    return str(place._replace(path=f"{place.path}/{path}".lstrip("/")))


def reason(error: BaseException) -> str:
    """Return what pyarrow said, on one line and without what differs from call to call."""
    return _REQUEST_ID.sub("", str(error).strip().split("\n")[0])[:300]


@lru_cache(maxsize=64)
def _connect(head: str, options: str) -> tuple[Any, str]:
    """Return the filesystem of a bucket or host, and the path of its root there."""
    if not head:
        return LocalFileSystem(), ""
    if head.startswith("gs://") and "retry_limit_seconds=" not in options:
        options += f"{'&' if options else '?'}retry_limit_seconds={GCS_RETRY_SECONDS}"
    with _told(head):
        filesystem, base = FileSystem.from_uri(head + options)
        if isinstance(filesystem, S3FileSystem):
            # A URI cannot hold the timeouts: the same filesystem is made again with them.
            make, (settings,) = filesystem.__reduce__()
            filesystem = make(settings | S3_TIMEOUTS)
        return filesystem, base.rstrip("/")


def _full(base: str, path: str) -> str:
    return f"{base}/{path}".rstrip("/") or "/"


def _file(info: FileInfo, base: str, place: Place) -> File:
    name = str(place._replace(path=info.path.removeprefix(base).lstrip("/")))
    if info.type != FileType.File:
        raise UserError(f"{name}: not a file that can be read to an end; remove it or name others")
    return File(name, info.size, info.mtime_ns)


def _glob(filesystem: FileSystem, base: str, pattern: str) -> Iterator[FileInfo]:
    parts = pattern.split("/")
    fixed = next((i for i, part in enumerate(parts) if re.search(r"[*?[]", part)), None)
    if fixed is None:
        return
    folder, wanted = _full(base, "/".join(parts[:fixed])), parts[fixed:]
    if filesystem.get_file_info(folder).type != FileType.Directory:
        return
    for info in _list(filesystem, folder, 0 if "**" in wanted else len(wanted)):
        if _matches(info.path.removeprefix(folder).strip("/").split("/"), wanted):
            yield info


def _list(filesystem: FileSystem, folder: str, depth: int) -> list[FileInfo]:
    """Return what lies so many levels below a folder, 0 for all, sorted."""
    if not isinstance(filesystem, LocalFileSystem):
        infos = filesystem.get_file_info(FileSelector(folder, recursive=depth != 1))
        return sorted(infos, key=lambda info: info.path)
    found: list[str] = []
    for path, folders, files in _walk(folder):
        found += (os.path.join(path, name) for name in [*folders, *files])
        if depth and path.removeprefix(folder).count("/") + 1 >= depth:
            folders.clear()
    for name in found:
        if not name.isascii() and re.search("[\ud800-\udfff]", name):  # how other bytes come
            raise UserError(f"{name!r}: its name is no UTF-8 and could not be recorded; rename it")
    infos = filesystem.get_file_info(sorted(found))
    return list(infos)


def _walk(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk as `os.walk`, through links to folders elsewhere, too, each once: never in circles.

    A file that lies below two links is found below both.
    """
    entered = {os.path.realpath(folder)}
    for path, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        folders.sort()
        for name in [name for name in folders if os.path.islink(os.path.join(path, name))]:
            target = os.path.realpath(os.path.join(path, name))
            leads_back = _is_below(os.path.realpath(path), target)
            if leads_back or any(_is_below(target, other) for other in entered):
                folders.remove(name)
            else:
                entered.add(target)
        yield path, folders, files


def _is_below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _raise(error: OSError) -> None:
    raise error


def _matches(parts: Sequence[str], wanted: Sequence[str]) -> bool:
    """Return whether a path matches a glob; as in a shell, `*` hides what starts with a dot."""
    if not wanted:
        return not parts
    shown = bool(parts) and not parts[0].startswith(".")
    if wanted[0] == "**":
        return _matches(parts, wanted[1:]) or (shown and _matches(parts[1:], wanted))
    if not parts or not (shown or wanted[0].startswith(".")):
        return False
    return fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])


@contextmanager
def _told(name: str) -> Iterator[None]:
    try:
        yield
    except READ_ERRORS as error:
        raise UserError(
            f"cannot list {name}: {reason(error)}; check the name, the options of the URI and the "
            "credentials in the environment"
        ) from error
