"""A GPU that this machine does not have, for tests of what would run there."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from typing import Any

import pytest
import torch
from prunekernels import runtime
from prunekernels.runtime import Choice, Kernel, Op, Problem


def fake_gpu(monkeypatch: pytest.MonkeyPatch, real: Op) -> Any:
    """Pretend a Hopper GPU until the test ends.

    Returns:
        An object: `op` is `real` with nothing tested or chosen yet, `select(tokens, dtype, impl)`
        its choice for a 4096 × 4096 layer. The kernels' self-test counts its `runs` and returns (or
        raises) `problem`; `capturing` and `capability` are the GPU's.
    """
    state = types.SimpleNamespace(problem=None, runs=0, capturing=False, capability=(9, 0))

    def self_test(device: torch.device) -> str | None:
        state.runs += 1
        if isinstance(state.problem, Exception):
            raise state.problem
        return state.problem

    def select(tokens: int, dtype: torch.dtype = torch.bfloat16, impl: str = "auto") -> Choice:
        return state.op.select(Problem(torch.device("cuda", 0), dtype, (tokens, 4096, 4096)), impl)

    module = types.SimpleNamespace(CAPABILITIES=((9, 0),), self_test=self_test)
    monkeypatch.setattr(Kernel, "load", lambda self: module)
    monkeypatch.setattr(runtime, "triton_installed", lambda: True)
    monkeypatch.setattr(runtime, "interpreting", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: state.capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    state.op, state.select = dataclasses.replace(real, tested={}, prepared={}, _choices={}), select
    return state
