"""A launch is compiled for what it is launched with, and launched by handle from then on."""

from __future__ import annotations

import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from interpreter import run_interpreted
from prunekernels import runtime
from prunekernels.launch import calls as launches
from prunekernels.launch import meta
from prunekernels.runtime import interpreting, triton_installed
from small_kernel import gpu, jit_sees, scaled

__all__ = ["gpu"]
pytestmark = pytest.mark.skipif(not triton_installed(), reason="needs Triton")
compiled_only = pytest.mark.skipif(interpreting(), reason="reads how kernels are compiled")


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
        with ThreadPoolExecutor(1) as other:
            # another thread's launches are its own
            assert other.submit(lambda: runtime.recording.launches).result() is None
    assert [call.grid for call in recorded] == [(2, 1, 1)] and not y.any()
    assert runtime.recording.launches is None


@compiled_only
def test_a_case_has_what_the_arguments_have():
    case = scaled(meta((16,), torch.bfloat16), meta((16,), torch.float32, aligned=False)).case("c")
    assert case.signature == {
        "x_ptr": "*bf16", "y_ptr": "*fp32", "n": "i32", "wide": "i64", "scale": "fp32",
    }  # fmt: skip
    # None and a stride of one are constants; a size that is not specialised is not divisible
    assert case.constants == {"extra_ptr": None, "stride": 1, "BLOCK": 8}
    assert case.divisible == ("x_ptr", "wide")


@compiled_only
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("wide", [1, 7, 32, 1 << 40])
def test_what_a_case_compiles_is_what_triton_would_launch(aligned: bool, wide: int):
    x = torch.ones(17)[0 if aligned else 1 :][:16]
    call = scaled(x, torch.ones(32)[::2], wide)
    case, seen = call.case("c"), jit_sees(call)
    names = call.kernel.arg_names
    assert {n: k for n, k in seen["signature"].items() if k != "constexpr"} == case.signature
    assert {names[p[0]]: v for p, v in seen["constants"].items()} == case.constants
    divisible = [names[p[0]] for p, attributes in seen["configs"][0].items() if attributes]
    assert divisible == list(case.divisible)


def product_of(name: str, tokens: int, rows: int, columns: int) -> launches.Launch:
    """The call of a tensor-core kernel for packed weights, with the tile of few tokens."""
    from prunekernels.sparse.bitmap import layout as bitmaps
    from prunekernels.sparse.bitmap import mma as bitmap
    from prunekernels.sparse.bitmap.tuning import BitmapMmaConfig
    from prunekernels.sparse.two_four import mma as two_four
    from prunekernels.sparse.two_four.layout import packed_shape
    from prunekernels.sparse.two_four.tuning import MmaConfig

    x, y = (meta((tokens, width), torch.bfloat16) for width in (columns, rows))
    if name == "2:4":
        packed = meta(packed_shape(rows, columns, x.dtype), torch.int32)
        return two_four.product(x, packed, None, None, y, "none", MmaConfig(1, 1, 2, 2))
    parts = bitmaps.meta_parts(rows, columns)
    return bitmap.product(x, *parts, 5, None, y, "none", BitmapMmaConfig(4, 1, 2, 2))


@compiled_only
@pytest.mark.parametrize("name", ["2:4", "bitmap"])
def test_layers_of_other_sizes_share_a_compiled_kernel(name: str):
    """A compilation takes seconds: M, N, units and splits, also 1 of them, are not worth one."""
    sizes = [(1, 4096, 8192), (7, 4096, 8192), (8, 4096, 4096), (1, 1, 4096), (3, 33, 12288)]
    kernels = {product_of(name, *size).specialisation() for size in sizes}
    assert len(kernels) == 1


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
    with pytest.raises(ValueError, match="scaled_kernel was bound to tensors aligned to 16 bytes"):
        bound.launch(x.data_ptr() + 4, None, y.data_ptr())


@compiled_only
def test_a_kernel_first_needed_inside_a_capture_is_named(gpu: types.SimpleNamespace):
    x, y = torch.ones(16), torch.ones(16)
    gpu.capturing = True
    for use in (scaled(x, y).run, scaled(x, y).bind):
        with pytest.raises(RuntimeError, match=r"scaled_kernel is first needed .*warm_up"):
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
