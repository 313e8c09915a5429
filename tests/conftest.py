"""Shared fixtures: every test is seeded, and uninitialised memory is poisoned.

A test that breaks the GPU for its process (an illegal access) ends the session with the status
`BROKEN`, and the last lines name the test: bench/gpu.sh then runs the others in a new process.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import torch
from torch.utils._device import _device_constructors

# torch lists, once, the functions that `with torch.device(…)` concerns: before they are poisoned
_device_constructors()

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import patch_language_once

    patch_language_once()

BROKEN = 76  # bench/gpu.sh and bench/guard.py use the same exit status
_BROKE = pytest.StashKey[bool]()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill `torch.empty*` with NaN (floats) so that reading unwritten memory shows.

    Applies to direct calls from Python; allocations inside ATen are not reached.
    """

    def poisoned(allocate):  # type: ignore[no-untyped-def]
        def wrapper(*args, **kwargs):  # type: ignore[no-untyped-def]
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point() and tensor.device.type != "meta" and tensor.numel():
                tensor.detach().fill_(float("nan"))
            return tensor

        return wrapper

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(autouse=True)
def _finish_gpu_work(request: pytest.FixtureRequest) -> Generator[None]:
    """Wait for a GPU test's kernels, so that what they break is blamed on it."""
    yield
    if request.node.get_closest_marker("gpu") and torch.cuda.is_available():
        torch.cuda.synchronize()


def _gpu_answers() -> bool:
    """Whether the GPU still works: after an illegal access every later call of CUDA fails."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Stop after a GPU test that failed and left the GPU unusable."""
    report = yield
    on_gpu = item.get_closest_marker("gpu") and torch.cuda.is_available()
    if report.failed and on_gpu and not _gpu_answers():
        item.config.stash[_BROKE] = True
        item.session.shouldfail = f"{item.nodeid} broke the GPU"
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Say by the exit status that tests are left to run elsewhere."""
    if session.config.stash.get(_BROKE, False):
        session.exitstatus = BROKEN
