"""Old import paths lead to the modules of today."""

from __future__ import annotations

import subprocess
import sys

import pytest

OLD = {
    "prunekernels.eager": "prunekernels.metrics.eager",
    "prunekernels.gluon_compat": "prunekernels.sparse.gluon_compat",
    "prunekernels.language": "prunekernels.metrics.sums.triton",
    "prunekernels.sparse.dispatch": "prunekernels.sparse.layer",
    "prunekernels.sparse.format24": "prunekernels.sparse.two_four.format",
    "prunekernels.sparse.format_bitmap": "prunekernels.sparse.bitmap.format",
    "prunekit.calibration": "prunekit.data.calibration",
    "prunekit.comparison": "prunekit.study.comparison",
    "prunekit.generation": "prunekit.models.generation",
    "prunekit.modeling": "prunekit.models.dropped",
    "prunekit.progress": "prunekit.process.progress",
    "prunekit.pruning.scores": "prunekit.pruning.importance",
    "prunekit.report.figures": "prunekit.report.png",
}


@pytest.mark.parametrize("old", OLD)
def test_an_old_name_is_the_same_module_as_the_new_one(old: str) -> None:
    script = f"""
import importlib, pickle, sys
import prunekit
new = importlib.import_module({OLD[old]!r})
spec = new.__spec__
again = importlib.import_module({old!r})
assert again is new and sys.modules[{old!r}] is new
assert new.__spec__ is spec and new.__name__ == {OLD[old]!r}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_objects_pickled_under_an_old_name_load() -> None:
    script = """
import pickle
import prunekit, torch
from prunekernels import Sparse24, sparse24_pack
packed = sparse24_pack(torch.tensor([[1.0, 0.0, 2.0, 0.0] * 8] * 16, dtype=torch.bfloat16))
data = pickle.dumps(packed, protocol=0)
old = data.replace(b"prunekernels.sparse.two_four.format", b"prunekernels.sparse.format24")
assert old != data
assert torch.equal(pickle.loads(old).to_dense(), packed.to_dense())
assert isinstance(pickle.loads(old), Sparse24)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_name_is_still_refused() -> None:
    script = "import prunekernels, prunekernels.no_such_module"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1 and "No module named 'prunekernels.no_such_module'" in done.stderr
