"""A small kernel, its launch, and a GPU that notes what it would be launched with."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import pytest
import torch
from prunekernels.launch import Launch
from prunekernels.launch import calls as launches
from prunekernels.runtime import triton_installed

if triton_installed():
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["n"])
    def scaled_kernel(
        x_ptr, extra_ptr, y_ptr, n, stride, wide: tl.int64, scale, BLOCK: tl.constexpr
    ):  # fmt: skip
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x_ptr + offs * stride, mask=offs < n, other=0.0) * scale
        tl.store(y_ptr + offs, value + wide, mask=offs < n)


def scaled(x: torch.Tensor, y: torch.Tensor, wide: int = 32, block: int = 8) -> Launch:
    """y = 2·x + wide."""
    n = y.numel()
    grid = (-(-n // block),)
    return Launch(scaled_kernel, grid, (x, None, y, n, x.stride(0), wide, 2.0), {"BLOCK": block})


class _Driver:
    """As much of Triton's driver as the binding of a kernel asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def jit_sees(call: Launch) -> dict[str, Any]:
    """Signature, constants and attributes that Triton's own launch path would compile."""
    from triton import knobs
    from triton.runtime.driver import driver

    seen: dict[str, Any] = {}

    def hook(**given: Any) -> bool:
        seen.update(given["compile"])
        return True  # nothing is compiled

    before = driver._active
    driver.set_active(_Driver())
    knobs.runtime.jit_cache_hook = hook
    try:
        call.kernel.device_caches.clear()
        call.kernel.run(
            *call.arguments, grid=call.grid, warmup=True, **call.constants, **(call.options or {})
        )
    finally:
        knobs.runtime.jit_cache_hook = None
        driver._active = before
        call.kernel.device_caches.clear()
    return seen


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A GPU whose kernels note what they are launched with."""
    state = types.SimpleNamespace(launched=[], compiled=0, capturing=False, current=0)
    compiled = types.SimpleNamespace(
        function=11,
        packed_metadata=(4, 1, 0),
        run=lambda *given: state.launched.append(given),
        _init_handles=lambda: None,
    )

    def run(*arguments: Any, **options: Any) -> Any:
        state.compiled += 1
        return compiled

    monkeypatch.setattr(scaled_kernel, "run", run)
    monkeypatch.setattr(launches, "_compiled", {})
    monkeypatch.setattr(launches, "current_stream", lambda device: 5)
    monkeypatch.setattr(launches, "current_device", lambda: state.current)
    monkeypatch.setattr(launches, "on", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state
