"""Shared fixtures: every test is seeded, and uninitialised memory is poisoned."""

from __future__ import annotations

import pytest
import torch


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
