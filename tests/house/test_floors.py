"""The house: who may import whom, what the lower floors load, and what no file may call."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "adapterhub_lite"
FLOORS = (
    ("names", "errors", "places"),
    ("recipe", "formats", "events"),
    ("store",),
    ("kernels",),
    ("bases", "adapters", "tasks"),
    ("training", "runtime", "merging", "combining"),
    ("evaluation", "exporting"),
    ("workflows",),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# names raises the one exception that it has; both are single modules of the ground floor.
ALLOWED = {("names", "errors")}
HEAVY = ("torch", "transformers", "peft", "datasets", "numpy")
LONGEST_FILE, LONGEST_FUNCTION = 350, 60


def sources() -> dict[str, Path]:
    """Module name -> file, of all code that is installed."""
    found = {}
    for folder, name in (
        (ROOT / PACKAGE, PACKAGE),
        (ROOT / "cli", f"{PACKAGE}.cli"),
        (ROOT / "recipes", f"{PACKAGE}.recipes"),
    ):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([name, *(p for p in parts if p != "__init__")])] = path
    return found


SOURCES = sources()


def room_of(module: str) -> str | None:
    """The room of a module of ours: adapterhub_lite.bases.load -> bases; None outside the package and for its root."""
    parts = module.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def imports(module: str, path: Path, tree: ast.AST | None = None) -> Iterator[str]:
    """Absolute names of the modules that a module imports, anywhere in it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree or ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*stem, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def test_every_room_has_a_floor():
    rooms = {room_of(module) for module in SOURCES} - {None, "recipes"}
    assert rooms <= set(FLOOR), f"no floor for {sorted(rooms - set(FLOOR))}"


@pytest.mark.parametrize("module", [m for m in SOURCES if room_of(m) in FLOOR])
def test_a_room_imports_lower_floors_only(module: str):
    own = room_of(module)
    wrong = set()
    for name in imports(module, SOURCES[module]):
        other = room_of(name)
        if other in FLOOR and other != own and FLOOR[other] >= FLOOR[own] and (own, other) not in ALLOWED:
            wrong.add(f"{own} (floor {FLOOR[own]}) imports {other} (floor {FLOOR[other]})")
    assert not wrong


@pytest.mark.parametrize("room", [room for room, floor in FLOOR.items() if floor <= 2])
def test_the_lower_floors_load_nothing_heavy(room: str):
    modules = sorted(m for m in SOURCES if room_of(m) == room)
    code = f"import sys, importlib\nfor m in {modules}: importlib.import_module(m)\n"
    code += f"print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, adapterhub_lite as a; dir(a); print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there():
    import adapterhub_lite

    for name in adapterhub_lite.__all__:
        assert getattr(adapterhub_lite, name) is not None
    assert set(dir(adapterhub_lite)) == set(adapterhub_lite.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        adapterhub_lite.nothing  # noqa: B018


CALLS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    ("torch", "load"), ("torch", "save"), ("yaml", "load"), ("yaml", "unsafe_load"), ("yaml", "full_load"),
    ("os", "system"),
}  # fmt: skip
NAMES = ("pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle")
ANYWHERE = {"extractall", "unpack_archive", "hotswap_adapter", "mktemp"}
ON = {"trust_remote_code", "shell", "allow_pickle"}


def forbidden(tree: ast.AST) -> Iterator[str]:
    """What a file does that no file of ours may."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield f"{node.func.id}( in line {node.lineno}"
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and (node.value.id, node.attr) in ATTRIBUTES:
                yield f"{node.value.id}.{node.attr} in line {node.lineno}"
            if node.attr in ANYWHERE:
                yield f"{node.attr} in line {node.lineno}"
        if isinstance(node, ast.keyword) and node.arg in ON and not _is_false(node.value):
            yield f"{node.arg} in line {node.value.lineno}"
        if isinstance(node, ast.Name | ast.alias) and "AutoPeft" in (
            getattr(node, "id", "") or getattr(node, "name", "")
        ):
            yield "AutoPeft"


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


@pytest.mark.parametrize("module", SOURCES)
def test_no_file_does_what_is_forbidden(module: str):
    tree = ast.parse(SOURCES[module].read_text("utf-8"))
    found = list(forbidden(tree))
    found += [name for name in imports(module, SOURCES[module], tree) if name.split(".")[0] in NAMES]
    assert not found


@pytest.mark.parametrize(
    "code",
    [
        "eval('1')", "exec('1')", "torch.load(p)", "yaml.load(t)", "tar.extractall()", "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)", "run(c, shell=True)", "from peft import AutoPeftModel", "m.hotswap_adapter()",
        "np.load(p, allow_pickle=x)",
    ],
)  # fmt: skip
def test_the_check_itself_finds(code: str):
    assert list(forbidden(ast.parse(code)))


def test_the_check_lets_pass():
    assert not list(forbidden(ast.parse("f(trust_remote_code=False); yaml.safe_load(t); model.eval(); re.compile(p)")))


@pytest.mark.parametrize("module", [m for m in SOURCES if room_of(m) != "recipes"])
def test_files_and_functions_are_short(module: str):
    text = SOURCES[module].read_text("utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    ]
    assert not long


def test_each_room_says_what_it_takes_and_gives():
    for module, path in SOURCES.items():
        room = room_of(module)
        if path.name == "__init__.py" and room in FLOOR and module.count(".") == 1:
            text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
            assert "Never" in text, f"{path} does not say what the room never does"
