"""What one call of an op costs the host, beside `F.linear` in the same process.

    python -m bench.bench_host                 a table: microseconds, ratio, Python calls
    python -m bench.bench_host --csv FILE      and a file

Without a GPU, launches do nothing: ops run on CPU tensors as they would on a GPU, up to the call
that hands a kernel to the driver (`idle_gpu`), and `F.linear` is the smallest product on the CPU:
what ATen's own dispatch costs, without the launch that it makes on a GPU. The goals are for a GPU,
where everything is launched and the clock stops when the host is free again. Tensors are small, so
that arithmetic does not matter.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib
import pkgutil
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import prunekernels
import torch
import torch.nn.functional as F
from prunekernels import runtime
from prunekernels.launch import calls as launch
from prunekernels.runtime import Choice, Op

from prunekit.packed.modules import PackedLinear

#: A module is compared with the module that it replaces, everything else with `F.linear`.
BESIDE = {"PackedLinear": "nn.Linear"}
#: Calls of the host may cost so many times what those cost.
GOALS = {
    "sparse24_linear": 2.5,
    "sparse24_gate_up": 2.5,
    "bitmap_linear": 2.5,
    "PackedLinear": 2.5,
    "vector_stats": 4.0,
    "pair_stats KL": 8.0,
    "pair_stats core": 8.0,
}


class Cost(NamedTuple):
    """What one call costs.

    Attributes:
        name: The op.
        microseconds: Of the fastest round: others were disturbed.
        ratio: To `F.linear`, or to what `BESIDE` names.
        calls: Calls of Python functions and of C functions from Python, in one call.
    """

    name: str
    microseconds: float
    ratio: float
    calls: int


@contextlib.contextmanager
def idle_gpu() -> Iterator[None]:
    """Let ops take CPU tensors for those of a Hopper GPU whose launches do nothing."""

    def compiled(*_: Any, **__: Any) -> Any:
        return types.SimpleNamespace(function=0, packed_metadata=(), run=lambda *_: None)

    def select(op: Op, problem: Any, impl: str = "auto") -> Choice:
        proven = [name for name, kernel in op.kernels.items() if kernel.tensor_cores]
        return Choice((*proven, *op.kernels)[0], "nothing is launched")

    # a module that was imported while functions are replaced would keep the replacements
    for info in pkgutil.walk_packages(prunekernels.__path__, "prunekernels."):
        importlib.import_module(info.name)
    with contextlib.ExitStack() as stack:
        for target, name, value in (
            (launch, "_compiled", {}),
            (launch.Launch, "_compile", compiled),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (torch.cuda, "current_stream", lambda *_: mock.MagicMock()),
            (Op, "select", select),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        for home, name, value in (
            (runtime, "processors", 132),
            (runtime, "capability", (9, 0)),
            (launch, "current_stream", 0),
            (launch, "current_device", 0),
        ):
            real = getattr(home, name)
            for module in list(sys.modules.values()):
                if getattr(module, name, None) is real:
                    patched = mock.patch.object(module, name, lambda *_, value=value: value)
                    stack.enter_context(patched)
        for op in runtime.ops().values():
            op.forget()
            stack.callback(op.forget)
        yield


def cases(device: torch.device) -> dict[str, Callable[[], Any]]:
    """The ops on small tensors, `F.linear` first."""
    generator = torch.Generator().manual_seed(0)
    # wide enough for columns to be split between programs, which costs the host more
    dense = torch.randn(256, 2048, generator=generator)
    dense *= torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat(512)
    dense = dense.to(device, torch.bfloat16)
    x = torch.randn(1, 2048, generator=generator).to(device, torch.bfloat16)
    two_four, bitmap = prunekernels.sparse24_pack(dense), prunekernels.bitmap_pack(dense)
    module = PackedLinear(two_four, None, "2:4")
    linear = torch.nn.Linear(8, 8, bias=False, device="meta")
    # on a CPU the smallest product there is, so that ATen's dispatch is what is timed
    plain = (x, dense) if device.type == "cuda" else (torch.ones(1, 8), torch.ones(8, 8))
    linear.weight = torch.nn.Parameter(plain[1], requires_grad=False)
    return {
        "F.linear": lambda: F.linear(*plain),
        "sparse24_linear": lambda: prunekernels.sparse24_linear(x, two_four),
        "sparse24_gate_up": lambda: prunekernels.sparse24_gate_up(x, two_four, two_four),
        "bitmap_linear": lambda: prunekernels.bitmap_linear(x, bitmap),
        # the module that `swap_` puts into a model, and what it stands for
        "nn.Linear": lambda: linear(plain[0]),
        "PackedLinear": lambda: module(x),
        "vector_stats": lambda: prunekernels.vector_stats(x, x),
        # a field is made when it is read
        "pair_stats KL": lambda: (
            prunekernels.pair_stats(x, x, fields=("kl_base_other",)).kl_base_other
        ),
        "pair_stats core": lambda: prunekernels.pair_stats(x, x),
    }


def count_calls(call: Callable[[], Any]) -> int:
    """Calls of functions, Python's and C's, that one call of `call` makes once it is warm."""
    for _ in range(3):
        call()
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    # the last call that is seen ends the profile
    return count - 1


def measure(rounds: int = 30, calls: int = 200) -> list[Cost]:
    """Cost of every case; rounds of all cases take turns, so that slow moments meet them all."""
    gpu = torch.cuda.is_available()
    with torch.inference_mode(), contextlib.nullcontext() if gpu else idle_gpu():
        ready = cases(torch.device("cuda" if gpu else "cpu"))
        counts = {name: count_calls(call) for name, call in ready.items()}
        times: dict[str, list[float]] = {name: [] for name in ready}
        for _ in range(rounds):
            for name, call in ready.items():
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                times[name].append((time.perf_counter() - start) / calls * 1e6)
                if gpu:
                    torch.cuda.synchronize()
    least = {name: min(found) for name, found in times.items()}
    return [
        Cost(name, spent, spent / least[BESIDE.get(name, "F.linear")], counts[name])
        for name, spent in least.items()
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--csv", type=Path, help="where to write the table too")
    options = parser.parse_args()
    costs = measure()
    for cost in costs:
        goal = f"  goal {GOALS[cost.name]}" if cost.name in GOALS else ""
        print(
            f"{cost.name:20} {cost.microseconds:8.2f} µs  {cost.ratio:6.2f} × "
            f"{BESIDE.get(cost.name, 'F.linear'):9} {cost.calls:4d} calls{goal}"
        )
    if options.csv is not None:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([Cost._fields, *costs])


if __name__ == "__main__":
    main()
