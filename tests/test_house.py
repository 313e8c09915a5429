"""CONTRIBUTING's map names every room of both packages, and the rooms stay few and small."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels/prunekernels", "prunekit")
#: The most entries that may stand directly in a folder.
MOST = {"kernels/prunekernels": 11, "kernels/prunekernels/sparse": 10, "prunekit": 22}
LONGEST = 550  # lines of a source file


def drawn() -> set[str]:
    """Paths on the map, from the repository's root."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    house = text[text.index("## The house") :].split("```")[1]
    found, package = set(), ""
    for indent, name in re.findall(r"^( *)(\S+)", house, flags=re.MULTILINE):
        package = package if indent else name
        found.add(package + name if indent else name)
    return {path.rstrip("/") for path in found}


def rooms(package: str) -> set[str]:
    """Folders with modules at any depth, and the modules directly in the package."""
    top = ROOT / package
    folders = {path.parent for path in top.rglob("*.py")} - {top}
    alone = {path for path in top.glob("*.py") if path.name != "__init__.py"}
    return {str(path.relative_to(ROOT)) for path in folders | alone}


def test_the_map_names_every_room_and_no_other() -> None:
    assert drawn() - set(PACKAGES) - {"bench", "tests"} == set().union(*map(rooms, PACKAGES))


@pytest.mark.parametrize("folder", MOST)
def test_few_entries_stand_directly_in_a_folder(folder: str) -> None:
    entries = {path.name for path in (ROOT / folder).iterdir()} - {"__pycache__", "py.typed"}
    assert len(entries) <= MOST[folder], sorted(entries)


def test_no_source_file_is_long() -> None:
    files = [path for top in (*PACKAGES, "bench", "tests") for path in (ROOT / top).rglob("*.py")]
    assert len(files) > 200
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {str(path): count for path, count in lines.items() if count > LONGEST} == {}
