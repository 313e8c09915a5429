"""A GPU that this machine does not have, for tests of what would run there."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from typing import Any

import pytest
import torch
from prunekernels.sparse import dispatch


class FakeActivations:
    """Shape, type and device of activations on a GPU."""

    def __init__(self, tokens: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.shape, self.dtype = (tokens, columns), dtype
        self.device = torch.device("cuda", 0)


def fake_gpu(monkeypatch: pytest.MonkeyPatch, real: dispatch.Dispatch) -> Any:
    """Pretend a Hopper GPU until the test ends.

    Returns:
        An object: `dispatch` is `real` with nothing tested yet. Its kernels' self-test counts its
        `runs` and returns (or raises) `problem`; `capturing` and `capability` are the GPU's.
    """
    state = types.SimpleNamespace(problem=None, runs=0, capturing=False, capability=(9, 0))

    def self_test(device: torch.device) -> str | None:
        state.runs += 1
        if isinstance(state.problem, Exception):
            raise state.problem
        return state.problem

    module = types.SimpleNamespace(CAPABILITIES=((9, 0),), self_test=self_test)
    monkeypatch.setattr(dispatch.Dispatch, "kernel", lambda self, name: module)
    monkeypatch.setattr(dispatch, "triton_installed", lambda: True)
    monkeypatch.setattr(dispatch, "interpreting", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: state.capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    state.dispatch = dataclasses.replace(real, tested={})
    return state
