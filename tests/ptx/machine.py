"""What stands where a kernel stands in its launcher: it compiles it and runs all programs."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from prunekernels.compilation import KernelCase, compile_ptx

from ptx.memory import GlobalMemory
from ptx.parsing import PtxKernel
from ptx.program import Program

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
}
#: Launch options that decide nothing about results.
_OPTIONS = ("launch_pdl", "maxnreg", "num_stages")


class Machine:
    """Stands where the `@gluon.jit` kernel stands in the launcher: `machine[grid](...)`.

    Programs run one after another, in a random order.

    Args:
        kernel: The kernel.
        arch: Compute capability to compile for: 80, 90, ….
        lazy: Copies land as late as they may, else at once.
        seed: Seed of a random order of the warps; None for warps in step.
    """

    def __init__(self, kernel: Any, arch: int, lazy: bool = True, seed: int | None = None) -> None:
        self.kernel, self.arch, self.lazy = kernel, arch, lazy
        self.order = None if seed is None else random.Random(seed)
        self.shuffle = random.Random(0)
        self.launches = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self.run(grid, arguments, constants)

    def run(self, grid: tuple[int, ...], arguments: Any, constants: dict[str, Any]) -> None:
        """Compile the kernel for these arguments and run it; what it stores is in the tensors."""
        self.launches += 1
        constants = dict(constants)
        warps = constants.pop("num_warps")
        for option in _OPTIONS:
            constants.pop(option, None)
        names = self.kernel.arg_names[: len(arguments)]
        signature, divisible = {}, []
        for name, value in zip(names, arguments, strict=True):
            if isinstance(value, torch.Tensor):
                signature[name] = TYPES[value.dtype]
                assert value.data_ptr() % 16 == 0, "launches assume 16-byte aligned tensors"
                divisible.append(name)
            elif value == 1:
                # as Triton does: a 1 is a constant
                constants[name] = 1
            else:
                signature[name] = "i32"
                divisible += [name] * (value % 16 == 0)
        case = KernelCase("machine", self.kernel, signature, constants, warps, divisible=divisible)
        ptx, shared = compile_ptx(case, self.arch)
        # one array per allocation, however often it is passed
        tensors = {a.data_ptr(): a for a in arguments if isinstance(a, torch.Tensor)}
        memory = GlobalMemory([_bytes(t) for t in tensors.values()])
        address = dict(zip(tensors, memory.addresses, strict=True))
        parameters = [
            address[v.data_ptr()] if isinstance(v, torch.Tensor) else v
            for n, v in zip(names, arguments, strict=True)
            if n in signature
        ]
        # Triton adds two scratch pointers
        parameters += [0, 0]
        kernel = PtxKernel.parse(ptx)
        across, down, deep = (*grid, 1, 1)[:3]
        size = across, down, deep
        programs = [(i, j, k) for i in range(across) for j in range(down) for k in range(deep)]
        self.shuffle.shuffle(programs)
        threads = 32 * warps
        for ids in programs:
            Program(
                kernel, memory, parameters, ids, size, shared, threads, self.lazy, self.order
            ).run()
        for number, tensor in enumerate(tensors.values()):
            held = torch.from_numpy(memory.result(number))
            tensor.view(torch.uint8).reshape(-1).copy_(held)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.is_contiguous()
    return tensor.view(torch.uint8).reshape(-1).numpy().copy()
