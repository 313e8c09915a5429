"""What runs a kernel's calls in place of a GPU: it compiles each and executes all programs."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from prunekernels.compilation import compile_ptx
from prunekernels.launch import Launch

from ptx.memory import GlobalMemory
from ptx.parsing import PtxKernel
from ptx.program import Program
from ptx.tensor_copies import TensorMap


class Machine:
    """Runs calls of kernels in place of a GPU, once it was told to `take_over`.

    Programs run one after another, in a random order.

    Args:
        arch: Compute capability to compile for: 80, 90, ….
        lazy: Copies land as late as they may, else at once.
        seed: Seed of a random order of the warps; None for warps in step.
        mutate: What is done to the PTX first, to break it on purpose.
        mantissa: Bits that the adder of e4m3 products keeps (`mma_sp_m16n8k64_e4m3`); None: all.
    """

    def __init__(
        self,
        arch: int,
        lazy: bool = True,
        seed: int | None = None,
        mutate: Callable[[str], str] | None = None,
        mantissa: int | None = None,
    ) -> None:
        self.arch, self.lazy, self.mutate, self.mantissa = arch, lazy, mutate, mantissa
        self.order = None if seed is None else random.Random(seed)
        self.shuffle = random.Random(0)
        self.launches: list[Launch] = []

    def take_over(self, patch: pytest.MonkeyPatch) -> None:
        """Let every `Launch.run` be run here."""
        patch.setattr(Launch, "run", lambda launch: self.run(launch))

    def run(self, launch: Launch) -> None:
        """Run a call; what the kernel stores is in the call's tensors."""
        self.launches.append(launch)
        case = launch.case("machine")
        ptx, shared = compile_ptx(case, self.arch)
        if self.mutate is not None:
            ptx = self.mutate(ptx)
        # one array per allocation, however often it is passed
        tensors = {a.data_ptr(): a for a in launch.arguments if isinstance(a, torch.Tensor)}
        memory = GlobalMemory([_bytes(t) for t in tensors.values()])
        address = dict(zip(tensors, memory.addresses, strict=True))
        names = [n for n in launch.kernel.arg_names if n not in launch.constants]
        parameters: list[int] = []
        tensor_map = None
        for name, value in zip(names, launch.arguments, strict=True):
            if isinstance(value, torch.Tensor):
                parameters += [address[value.data_ptr()]] * (name in case.signature)
            elif hasattr(value, "block_shape"):
                # a descriptor is itself, its sizes and its strides
                tensor_map = _tensor_map(value)
                parameters += [0, *value.shape, *value.strides]
            else:
                parameters += [value] * (name in case.signature)
        # Triton adds two scratch pointers
        parameters += [0, 0]
        kernel = PtxKernel.parse(ptx)
        across, down, deep = launch.grid
        programs = [(i, j, k) for i in range(across) for j in range(down) for k in range(deep)]
        self.shuffle.shuffle(programs)
        threads = 32 * launch.num_warps
        for ids in programs:
            size = across, down, deep
            program = Program(
                kernel, memory, parameters, ids, size, shared, threads, self.lazy, self.order
            )
            program.tensor_map, program.mantissa = tensor_map, self.mantissa
            program.run()
        for number, tensor in enumerate(tensors.values()):
            held = torch.from_numpy(memory.result(number))
            tensor.view(torch.uint8).reshape(-1).copy_(held)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.is_contiguous()
    return tensor.view(torch.uint8).reshape(-1).numpy().copy()


def _tensor_map(descriptor: Any) -> TensorMap:
    """The matrix that a descriptor on the host describes, out of the process's memory."""
    (rows, columns), (stride, _) = descriptor.shape, descriptor.strides
    size = 2 * ((rows - 1) * stride + columns)
    held = np.frombuffer(ctypes.string_at(descriptor.base.data_ptr(), size), np.uint16)
    matrix = np.lib.stride_tricks.as_strided(held, (rows, columns), (2 * stride, 2))
    return TensorMap(matrix.copy(), descriptor.block_shape[0])
