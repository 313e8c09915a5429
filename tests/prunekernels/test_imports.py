"""One direction of imports, and a package that works where Triton does not exist."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels" / "prunekernels"
PRUNEKIT = ROOT / "prunekit"
FOLDERS = ("metrics", "pruning", "sparse")


def imported(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by absolute name, not relatively"
            assert node.module is not None
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def files(folder: Path) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    assert found
    return found


def inside(names: set[str], package: str) -> set[str]:
    return {name for name in names if name == package or name.startswith(package + ".")}


@pytest.mark.parametrize("path", files(KERNELS), ids=lambda path: str(path.relative_to(KERNELS)))
def test_prunekernels_stands_alone(path: Path) -> None:
    names = imported(path)
    for package in ("prunekit", "transformers", "numpy", "bench", "tests"):
        assert not inside(names, package), f"{path.name} imports {package}"
    assert not inside(names, "prunekernels.reference"), "the reference is imported by tests only"
    if path.parent == KERNELS and path.name != "__init__.py":
        for folder in FOLDERS:
            assert not inside(names, f"prunekernels.{folder}"), f"{path.name} imports {folder}"


@pytest.mark.parametrize("path", files(PRUNEKIT), ids=lambda path: str(path.relative_to(PRUNEKIT)))
def test_prunekit_does_not_import_what_builds_on_it(path: Path) -> None:
    names = imported(path)
    for package in ("bench", "tests", "prunekernels.reference"):
        assert not inside(names, package), f"{path.name} imports {package}"


def test_all_is_sorted_and_complete() -> None:
    import prunekernels

    assert prunekernels.__all__ == sorted(prunekernels.__all__)
    for name in prunekernels.__all__:
        assert getattr(prunekernels, name) is not None
    for name in ("PairStats", "VectorStats", "head_pair_stats", "nm_mask", "pair_stats"):
        assert name in prunekernels.__all__
    for name in ("rowwise_mask", "summarize", "vector_stats"):
        assert name in prunekernels.__all__


def test_works_where_triton_cannot_be_imported() -> None:
    script = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
import torch
import prunekernels
from prunekernels import runtime

assert not runtime.triton_installed()
stats = prunekernels.pair_stats(torch.zeros(2, 5), torch.ones(2, 5))
assert stats.kl_base_other.tolist() == [0.0, 0.0]
assert prunekernels.nm_mask(torch.zeros(1, 4), 2, 4).sum() == 2
try:
    prunekernels.vector_stats(torch.ones(1, 2), torch.ones(1, 2), impl="triton")
except ValueError as error:
    assert "cannot run" in str(error), error
else:
    raise AssertionError("impl='triton' ran without Triton")
assert all(row["impl"] == "eager" for row in runtime.describe())
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
assert "prunekit" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
