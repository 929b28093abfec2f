"""What is installed is what lies in the tree, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
# Where a package of the wheel lies in the tree, when not under its own name.
ELSEWHERE = {"adapterhub_lite.cli": "cli", "adapterhub_lite.recipes": "recipes"}


def folder_of(package: str) -> Path:
    """Where a package lies in the tree."""
    for name, folder in ELSEWHERE.items():
        if package == name or package.startswith(f"{name}."):
            return ROOT / folder / Path(*package.removeprefix(name).strip(".").split("."))
    return ROOT / Path(*package.split("."))


def packages_in_the_tree() -> set[str]:
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "adapterhub_lite").rglob("__init__.py")}
    for name, folder in ELSEWHERE.items():
        for path in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join([name, *path.parent.relative_to(ROOT / folder).parts]))
    return found


def test_every_package_is_listed():
    assert set(SETTINGS["tool"]["setuptools"]["packages"]) == packages_in_the_tree()


def test_every_folder_with_code_is_a_package():
    for root in (ROOT / "adapterhub_lite", ROOT / "cli"):
        for path in root.rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), f"{path.parent} would not be installed"


def test_the_listed_folders_are_mapped():
    mapped = SETTINGS["tool"]["setuptools"]["package-dir"]
    for package in SETTINGS["tool"]["setuptools"]["packages"]:
        name = max((m for m in mapped if package == m or package.startswith(f"{m}.")), key=len, default=None)
        where = (
            ROOT / mapped[name] / Path(*package.removeprefix(name).strip(".").split("."))
            if name
            else ROOT / package.replace(".", "/")
        )
        assert where.resolve() == folder_of(package).resolve()
        assert where.is_dir()


def test_every_recipe_and_its_data_are_installed():
    patterns = SETTINGS["tool"]["setuptools"]["package-data"]["adapterhub_lite.recipes"]
    shipped = {path for pattern in patterns for path in (ROOT / "recipes").glob(pattern)}
    wanted = {p for p in (ROOT / "recipes").rglob("*") if p.is_file() and p.suffix in (".yaml", ".jsonl")}
    assert wanted
    assert wanted <= shipped


def test_the_wheel_holds_the_tree(tmp_path: Path):
    """Built without a network from a copy, so that no build folder is left in the tree."""
    import shutil
    import zipfile

    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
        else:
            (copy / name).write_text("")
    for name in ("adapterhub_lite", "cli", "recipes"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools import build_meta; print(build_meta.build_wheel({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        held = {name for name in file.namelist() if ".dist-info/" not in name}
    expected = set()
    for package in packages_in_the_tree():
        folder = folder_of(package)
        expected |= {f"{package.replace('.', '/')}/{path.name}" for path in folder.glob("*.py")}
    assert {name for name in held if name.endswith(".py") and "/recipes/data/" not in name} == expected
    assert "adapterhub_lite/py.typed" in held
    assert {name.split("/")[0] for name in held} == {"adapterhub_lite"}
    data = {f"adapterhub_lite/recipes/{p.relative_to(ROOT / 'recipes')}" for p in (ROOT / "recipes").rglob("*.jsonl")}
    assert data <= held
