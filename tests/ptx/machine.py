"""What runs a kernel's calls in place of a GPU: it compiles each and executes all programs."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from prunekernels.compilation import compile_ptx
from prunekernels.launch import Launch

from ptx.memory import GlobalMemory
from ptx.parsing import PtxKernel
from ptx.program import Program


class Machine:
    """Runs calls of kernels in place of a GPU, once it was told to `take_over`.

    Programs run one after another, in a random order.

    Args:
        arch: Compute capability to compile for: 80, 90, ….
        lazy: Copies land as late as they may, else at once.
        seed: Seed of a random order of the warps; None for warps in step.
    """

    def __init__(self, arch: int, lazy: bool = True, seed: int | None = None) -> None:
        self.arch, self.lazy = arch, lazy
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
        # one array per allocation, however often it is passed
        tensors = {a.data_ptr(): a for a in launch.arguments if isinstance(a, torch.Tensor)}
        memory = GlobalMemory([_bytes(t) for t in tensors.values()])
        address = dict(zip(tensors, memory.addresses, strict=True))
        names = [n for n in launch.kernel.arg_names if n not in launch.constants]
        parameters = [
            address[v.data_ptr()] if isinstance(v, torch.Tensor) else v
            for n, v in zip(names, launch.arguments, strict=True)
            if n in case.signature
        ]
        # Triton adds two scratch pointers
        parameters += [0, 0]
        kernel = PtxKernel.parse(ptx)
        across, down, deep = launch.grid
        programs = [(i, j, k) for i in range(across) for j in range(down) for k in range(deep)]
        self.shuffle.shuffle(programs)
        threads = 32 * launch.num_warps
        for ids in programs:
            size = across, down, deep
            Program(
                kernel, memory, parameters, ids, size, shared, threads, self.lazy, self.order
            ).run()
        for number, tensor in enumerate(tensors.values()):
            held = torch.from_numpy(memory.result(number))
            tensor.view(torch.uint8).reshape(-1).copy_(held)


def _bytes(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.is_contiguous()
    return tensor.view(torch.uint8).reshape(-1).numpy().copy()
