"""One direction of imports inside prunekit: no circles, not even lazy ones."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "prunekit"
FACADE = "prunekit"  # hands out the public names of all the others


def modules(folder: Path) -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        parts = [folder.name, *path.relative_to(folder).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def graph(paths: Mapping[str, Path]) -> dict[str, set[str]]:
    """What each module imports of the others, at any depth of its code and for types too."""
    found = {}
    for module, path in paths.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: import by absolute name, not relatively"
                assert node.module is not None
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    names.add(whole if whole in paths else node.module)
        found[module] = {name for name in names if name in paths} - {module}
    return found


def part(module: str) -> str:
    """The folder or single file directly under the package that a module belongs to."""
    return ".".join(module.split(".")[:2])


def circle(edges: Mapping[str, set[str]]) -> list[str] | None:
    """Modules that import one another in a ring, if there are any."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        ring: list[str] = error.args[1]
        return ring
    return None


def collapsed(edges: Mapping[str, set[str]], name: Callable[[str], str]) -> dict[str, set[str]]:
    """The same graph between groups of modules."""
    found: dict[str, set[str]] = {}
    for module, imported in edges.items():
        group = found.setdefault(name(module), set())
        group.update(name(other) for other in imported)
        group.discard(name(module))
    return found


@pytest.fixture(scope="module")
def edges() -> dict[str, set[str]]:
    found = graph(modules(FOLDER))
    assert len(found) > 50 and "prunekit.report" in found["prunekit.study.study"]
    found.pop(FACADE)
    return found


def test_no_circle_of_modules(edges: dict[str, set[str]]) -> None:
    assert circle(edges) is None


def test_no_circle_of_folders(edges: dict[str, set[str]]) -> None:
    assert circle(collapsed(edges, part)) is None


def test_rooms_import_only_what_stands_above_them_on_the_map(edges: dict[str, set[str]]) -> None:
    text = (FOLDER.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    house = text[text.index("\nprunekit/") : text.index("\nbench/")]
    order = [f"{FACADE}.{name}" for name in re.findall(r"^    (\w+)", house, flags=re.MULTILINE)]
    for room, imported in collapsed(edges, part).items():
        below = set(order[order.index(room) :])
        assert not imported & below, f"{room} imports {imported & below}"


def test_a_lazy_circle_is_seen(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    (folder / "deep").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "deep" / "__init__.py").write_text("")
    (folder / "deep" / "one.py").write_text("from made import two\n")
    (folder / "two.py").write_text("def late():\n    from made.deep import one\n")
    found = graph(modules(folder))
    assert found["made.two"] == {"made.deep.one"}
    assert set(circle(found) or ()) == {"made.two", "made.deep.one"}
    (folder / "two.py").write_text("import made.deep\n")
    assert circle(graph(modules(folder))) is None
    assert circle(collapsed(graph(modules(folder)), part)) is not None
