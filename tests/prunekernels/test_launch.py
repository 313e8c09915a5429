"""A launch is compiled for what it is launched with, and launched by handle from then on."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import pytest
import torch
from interpreter import run_interpreted
from prunekernels import launch as launches
from prunekernels.launch import Launch, meta
from prunekernels.runtime import interpreting, triton_installed

pytestmark = pytest.mark.skipif(not triton_installed(), reason="needs Triton")
compiled_only = pytest.mark.skipif(interpreting(), reason="reads how kernels are compiled")

if triton_installed():
    import triton
    import triton.language as tl

    @triton.jit(do_not_specialize=["n"])
    def _scaled(
        x_ptr, extra_ptr, y_ptr, n, stride, wide: tl.int64, scale, BLOCK: tl.constexpr
    ):  # fmt: skip
        offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x_ptr + offs * stride, mask=offs < n, other=0.0) * scale
        tl.store(y_ptr + offs, value + wide, mask=offs < n)


def scaled(x: torch.Tensor, y: torch.Tensor, wide: int = 32, block: int = 8) -> Launch:
    """y = 2·x + wide."""
    n = y.numel()
    grid = (-(-n // block),)
    return Launch(_scaled, grid, (x, None, y, n, x.stride(0), wide, 2.0), {"BLOCK": block})


def test_an_interpreted_launch_runs_the_kernel():
    if not interpreting():
        run_interpreted(__file__)
        return
    x, y = torch.arange(20.0)[::2], torch.zeros(10)
    scaled(x, y).run()
    assert torch.equal(y, 2 * x + 32)


def test_recorded_launches_do_not_run():
    y = torch.zeros(10)
    with launches.record() as recorded:
        scaled(torch.ones(10), y).run()
    assert [call.grid for call in recorded] == [(2, 1, 1)] and not y.any()


@compiled_only
def test_a_case_has_what_the_arguments_have():
    case = scaled(meta((16,), torch.bfloat16), meta((16,), torch.float32, aligned=False)).case("c")
    assert case.signature == {
        "x_ptr": "*bf16", "y_ptr": "*fp32", "n": "i32", "wide": "i64", "scale": "fp32",
    }  # fmt: skip
    # None and a stride of one are constants; a size that is not specialised is not divisible
    assert case.constants == {"extra_ptr": None, "stride": 1, "BLOCK": 8}
    assert case.divisible == ("x_ptr", "wide")


class _Driver:
    """As much of Triton's driver as the binding of a kernel asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


def _jit_sees(call: Launch) -> dict[str, Any]:
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
        call.kernel.run(*call.arguments, grid=call.grid, warmup=True, **call.constants)
    finally:
        knobs.runtime.jit_cache_hook = None
        driver._active = before
        call.kernel.device_caches.clear()
    return seen


@compiled_only
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("wide", [1, 7, 32, 1 << 40])
def test_what_a_case_compiles_is_what_triton_would_launch(aligned: bool, wide: int):
    x = torch.ones(17)[0 if aligned else 1 :][:16]
    call = scaled(x, torch.ones(32)[::2], wide)
    case, seen = call.case("c"), _jit_sees(call)
    names = _scaled.arg_names
    assert {n: k for n, k in seen["signature"].items() if k != "constexpr"} == case.signature
    assert {names[p[0]]: v for p, v in seen["constants"].items()} == case.constants
    divisible = [names[p[0]] for p, attributes in seen["configs"][0].items() if attributes]
    assert divisible == list(case.divisible)


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

    monkeypatch.setattr(_scaled, "run", run)
    monkeypatch.setattr(launches, "_compiled", {})
    monkeypatch.setattr(launches, "_stream", lambda device: 5)
    monkeypatch.setattr(launches, "_current", lambda: state.current)
    monkeypatch.setattr(launches, "on", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: state.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    return state


@compiled_only
def test_the_second_launch_goes_by_handle(gpu: types.SimpleNamespace):
    x, y = torch.ones(16), torch.ones(16)
    scaled(x, y).run()
    assert (gpu.compiled, gpu.launched) == (1, [])
    scaled(x, y).run()
    addresses = (x.data_ptr(), None, y.data_ptr())
    wanted = (2, 1, 1, 5, 11, (4, 1, 0), None, None, None, *addresses, 16, 1, 32, 2.0, 8)
    assert (gpu.compiled, gpu.launched) == (1, [wanted])


@compiled_only
def test_a_handle_serves_its_specialisation_only(gpu: types.SimpleNamespace):
    base = torch.ones(64)
    scaled(base[:16], base[16:32]).run()
    for call, compilations in (
        (scaled(base[:12], base[16:28]), 1),  # another size that is not specialised
        (scaled(base[:16], base[16:32], wide=31), 2),  # not divisible
        (scaled(base[1:17], base[32:48]), 3),  # not aligned
        (scaled(base[:32:2], base[32:48]), 4),  # stride not one
        (scaled(base[:16], base[16:32], block=16), 5),  # another constant
        (scaled(base[:16].half(), base[16:32]), 6),  # another type
        (scaled(base[:16], base[16:32]), 6),
    ):
        call.run()
        assert gpu.compiled == compilations
    gpu.current = 1
    scaled(base[:16], base[16:32]).run()
    assert gpu.compiled == 7


@compiled_only
def test_a_bound_launch_takes_addresses_and_refuses_unaligned_ones(gpu: types.SimpleNamespace):
    x, y = torch.ones(16), torch.ones(17)[1:]
    bound = scaled(x, y).bind()
    assert (gpu.compiled, gpu.launched) == (1, [])
    bound.launch(x.data_ptr() + 160, None, y.data_ptr())
    assert gpu.launched[0][9:12] == (x.data_ptr() + 160, None, y.data_ptr())
    with pytest.raises(ValueError, match="_scaled was bound to tensors aligned to 16 bytes"):
        bound.launch(x.data_ptr() + 4, None, y.data_ptr())


@compiled_only
def test_a_kernel_first_needed_inside_a_capture_is_named(gpu: types.SimpleNamespace):
    x, y = torch.ones(16), torch.ones(16)
    gpu.capturing = True
    for use in (scaled(x, y).run, scaled(x, y).bind):
        with pytest.raises(RuntimeError, match=r"_scaled is first needed .*warm_up"):
            use()
    gpu.capturing = False
    scaled(x, y).run()
    gpu.capturing = True
    scaled(x, y).run()
    assert (gpu.compiled, len(gpu.launched)) == (1, 1)


@compiled_only
def test_profilers_see_launches(gpu: types.SimpleNamespace):
    from triton import knobs

    x, y = torch.ones(16), torch.ones(16)
    scaled(x, y).run()
    hook = lambda metadata: None  # noqa: E731
    chain = knobs.runtime.launch_enter_hook
    chain.add(hook)
    try:
        scaled(x, y).run()
    finally:
        chain.remove(hook)
    # through Triton's own path, which calls the hooks
    assert (gpu.compiled, gpu.launched) == (2, [])
