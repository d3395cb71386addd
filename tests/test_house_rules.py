"""House rules that a reader relies on: who imports whom, how long a module is, what it may call."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("infra", "pipelines", "ssl_models")
MODULES = sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))
MAX_LINES = 400

RUNNERS = {"ray", "pyarrow", "webdataset", "mlflow"}
"""What `pipelines` alone imports."""
UNPICKLERS = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "os.system",
    "os.popen",
    "torch.load",
    "torch.save",
}


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the top-level package of every import, wherever in the module it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield str(node.module).partition(".")[0]


def called(tree: ast.Module) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def package_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


@pytest.fixture(params=MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def module(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def test_the_rules_see_the_modules() -> None:
    names = {str(path.relative_to(ROOT)) for path in MODULES}
    assert {"pipelines/training/loop.py", "pipelines/cli.py", "ssl_models/bert.py"} <= names


def test_imports_go_one_way(module: Path) -> None:
    above = PACKAGES[: PACKAGES.index(package_of(module))]
    wrong = set(imported(tree_of(module))) & {*above, "tests"}
    assert not wrong, f"{module.name} imports {wrong}"


def test_only_pipelines_imports_what_runs_it(module: Path) -> None:
    if package_of(module) != "pipelines":
        wrong = set(imported(tree_of(module))) & RUNNERS
        assert not wrong, f"{module.name} imports {wrong}"


def test_the_mathematics_needs_torch_and_numpy_alone(module: Path) -> None:
    if package_of(module) == "ssl_models":
        known = {"ssl_models", "torch", "numpy", *sys.stdlib_module_names}
        wrong = set(imported(tree_of(module))) - known
        assert not wrong, f"{module.name} imports {wrong}"


def test_every_module_says_what_it_is_for(module: Path) -> None:
    assert ast.get_docstring(tree_of(module)), f"{module.name} has no docstring"


def test_no_module_is_too_long_to_read(module: Path) -> None:
    lines = len(module.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{module.name} has {lines} lines"


def test_nothing_is_unpickled_or_run_from_text(module: Path) -> None:
    tree = tree_of(module)
    wrong = set(imported(tree)) & UNPICKLERS
    for call in called(tree):
        wrong |= {ast.unparse(call.func)} & FORBIDDEN_CALLS
        for keyword in call.keywords:
            is_shell = keyword.arg == "shell" and ast.unparse(keyword.value) != "False"
            wrong |= {f"shell=, line {call.lineno}"} if is_shell else set()
    assert not wrong, f"{module.name} uses {wrong}"


def test_nothing_is_left_to_do(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    assert not [word for word in ("TODO", "FIXME", "XXX") if word in text]
