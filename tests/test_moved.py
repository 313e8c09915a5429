"""Old import paths lead to the modules of today."""

from __future__ import annotations

import importlib
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


def test_old_names_are_the_same_modules_as_the_new_ones() -> None:
    # one process for all of them: what takes long is importing torch and transformers
    script = f"""
import importlib, sys
import prunekit
for old, new in {OLD!r}.items():
    module = importlib.import_module(new)
    spec = module.__spec__
    again = importlib.import_module(old)
    assert again is module and sys.modules[old] is module, old
    assert module.__spec__ is spec and module.__name__ == new, old
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


#: Modules that have become folders still hand out what they had.
HANDED_ON = {
    "prunekit.packed": ("FORMATS", "PackedLinear", "packed_layers", "weight_bytes", "weight_count"),
    "prunekit.speed": ("CACHES", "Continuation", "check_cached", "random_prompts"),
}


@pytest.mark.parametrize("folder", HANDED_ON)
def test_a_module_that_became_a_folder_still_has_its_names(folder: str) -> None:
    found = vars(importlib.import_module(folder))
    assert set(HANDED_ON[folder]) <= set(found)


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
