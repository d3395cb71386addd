"""Names of files: parsed, joined, matched and refused the same way wherever the files lie."""

from pathlib import Path

import pytest

from pipelines.data import filesystems
from pipelines.data.filesystems import Place, find_files, join, parse, split_root
from pipelines.data.shards import find_shards
from pipelines.errors import UserError

OPTIONS = "?endpoint_override=127.0.0.1:9000&scheme=http"


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("/a/b.txt", Place("", "a/b.txt", "")),
        ("/a/../b.txt", Place("", "b.txt", "")),
        ("file:///a/b c%20.txt", Place("", "a/b c%20.txt", "")),
        ("s3://bucket", Place("s3://bucket", "", "")),
        ("s3://bucket/a//b %20#1.txt", Place("s3://bucket", "a//b %20#1.txt", "")),
        (f"s3://bucket/a/{OPTIONS}", Place("s3://bucket", "a", OPTIONS)),
        (f"s3://bucket{OPTIONS}", Place("s3://bucket", "", OPTIONS)),
        ("s3://bucket/part-?.txt", Place("s3://bucket", "part-?.txt", "")),
        (f"s3://bucket/part-?.txt{OPTIONS}", Place("s3://bucket", "part-?.txt", OPTIONS)),
        ("gs://anonymous@bucket/a.txt", Place("gs://anonymous@bucket", "a.txt", "")),
        ("hdfs://host:8020/a@b.txt", Place("hdfs://host:8020", "a@b.txt", "")),
        ("s3://bucket/a:b@c//d:e@f.txt", Place("s3://bucket", "a:b@c//d:e@f.txt", "")),
    ],
)
def test_a_name_has_parts_and_is_made_of_them_again(name: str, place: Place) -> None:
    assert parse(name) == place
    assert parse(str(place)) == place


def test_a_relative_path_starts_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(parse("a/b.txt")) == str(tmp_path / "a" / "b.txt")


@pytest.mark.parametrize(
    ("names", "root", "paths"),
    [
        (["/a/b/c.txt", "/a/d.txt"], "/a", ["b/c.txt", "d.txt"]),
        (["/a/b.txt"], "/a", ["b.txt"]),
        (["/a/b.txt", "/c.txt"], "/", ["a/b.txt", "c.txt"]),
        (["/ab/c.txt", "/a/c.txt"], "/", ["ab/c.txt", "a/c.txt"]),
        (
            [f"s3://u/a/b.txt{OPTIONS}", f"s3://u/a/c/d.txt{OPTIONS}"],
            f"s3://u/a{OPTIONS}",
            ["b.txt", "c/d.txt"],
        ),
        (["s3://u/b.txt", "s3://u/a//b.txt"], "s3://u/", ["b.txt", "a//b.txt"]),
        (["s3://u/b.txt", "s3://v/b.txt"], "", ["s3://u/b.txt", "s3://v/b.txt"]),
        ([f"s3://u/b.txt{OPTIONS}", "/b.txt"], "", [f"s3://u/b.txt{OPTIONS}", "/b.txt"]),
    ],
)
def test_names_are_split_at_their_root_and_joined_again(
    names: list[str], root: str, paths: list[str]
) -> None:
    assert split_root(names) == (root, paths)
    assert [join(root, path) for path in paths] == names


@pytest.mark.parametrize(
    "name",
    [
        "s3://KEY:hidden@bucket/a.txt",
        "s3://KEY:hid/hidden@bucket/a.txt",
        "s3://KEY:1/hidden@bucket/a.txt",
        "s3://KEY:hidden?x/y\nhidden@bucket/a.txt",
        "hdfs://user:hidden@host:8020/a.txt",
        "s3://bucket/a.txt?secret_key=hidden",
        "s3://bucket/a.txt?region=us-east-1&access_key=hidden",
        "abfs://bucket/a.txt?sas_token=hidden",
    ],
)
def test_a_credential_in_a_name_is_refused_and_not_repeated(name: str) -> None:
    with pytest.raises(UserError, match="give them in the environment") as refused:
        list(find_files(name, bool))
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("s4://bucket/a.txt", "Unrecognized filesystem type"),
        ("s3://bucket/a.txt?flavour=sweet", "flavour"),
        ("s3://", "cannot list s3://"),
        ("://x", "no shards match"),
    ],
)
def test_a_name_of_no_store_is_refused_on_one_line(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        find_shards([name])
    assert "\n" not in str(refused.value)


TREE = ("a.txt", "ab.txt", "[x].txt", "d/a.txt", "d/e/a.txt", "d/e/b.jsonl", ".h/a.txt", ".i.txt")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.txt", "a.txt ab.txt [x].txt"),
        ("?.txt", "a.txt"),
        ("[ab]*.txt", "a.txt ab.txt"),
        ("[[]x].txt", "[x].txt"),
        ("[x].txt", "[x].txt"),
        (".*.txt", ".i.txt"),
        ("*/a.txt", "d/a.txt"),
        ("*/*/*", "d/e/a.txt d/e/b.jsonl"),
        ("**/a.txt", "a.txt d/a.txt d/e/a.txt"),
        ("d/**", "d/a.txt d/e/a.txt d/e/b.jsonl"),
        ("d/**/*.jsonl", "d/e/b.jsonl"),
        ("d/e*", "d/e/a.txt d/e/b.jsonl"),
        ("d", "d/a.txt d/e/a.txt d/e/b.jsonl"),
        (".", "a.txt ab.txt [x].txt d/a.txt d/e/a.txt d/e/b.jsonl"),
        ("none/*.txt", ""),
        ("a.txt/*", ""),
        ("A.txt", ""),
    ],
)
def test_a_glob_is_what_a_shell_takes_it_for(tmp_path: Path, pattern: str, found: str) -> None:
    for name in TREE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = {file.name for file in find_files(str(tmp_path / pattern), bool)}
    assert names == {str(tmp_path / name) for name in found.split()}


def test_what_a_library_says_is_one_line_that_is_the_same_every_time() -> None:
    error = OSError("AWS Error: it does not exist (Request ID: SZ1p)\nand more")
    assert filesystems.reason(error) == "AWS Error: it does not exist"


def test_links_to_folders_elsewhere_are_followed_once_and_never_in_circles(tmp_path: Path) -> None:
    for name in ("data/real", "else/where/deep", "else/other", "whole/part", "parts"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.txt").touch()
    links = {
        "data/class": "else/where",
        "data/again": "else/where",
        "data/inside": "data/real",
        "data/real/up": "data",
        "else/where/back": "data",
        "else/where/on": "else/other",
        "else/other/round": "else/where",
        "else/where/above": "else",
        "parts/a": "whole/part",
        "parts/b": "whole",
    }
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)

    def found(pattern: str) -> list[str]:
        names = [file.name for file in find_files(f"{tmp_path}/{pattern}", lambda _: True)]
        return [name.removeprefix(f"{tmp_path}/data/") for name in names]

    expected = ["again/deep/x.txt", "again/on/x.txt", "real/x.txt"]
    assert found("data") == expected
    assert found("data/*/x.txt") == expected[2:]
    assert found("data/*/*/x.txt") == expected[:2]
    # What holds a folder that is entered already holds other files, too.
    below = ["parts/a/x.txt", "parts/b/part/x.txt", "parts/b/y.txt", "parts/x.txt"]
    (tmp_path / "whole" / "y.txt").touch()
    assert [name.removeprefix(f"{tmp_path}/") for name in found("parts")] == below


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").touch()
    assert [file.name for file in find_files("~/*.txt", lambda _: True)] == [f"{tmp_path}/a.txt"]


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ä\n☃.txt").touch()
    assert len([*find_files(str(tmp_path), lambda _: True)]) == 1
    with open(bytes(tmp_path) + b"/\xff.txt", "wb"):
        pass
    with pytest.raises(UserError, match=r"\\udcff\.txt': its name is no UTF-8") as caught:
        [*find_files(str(tmp_path), lambda _: True)]
    str(caught.value).encode()
