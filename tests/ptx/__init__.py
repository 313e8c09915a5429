"""A NumPy machine for the PTX that Triton emits: runs a compiled kernel without a GPU.

It executes the instructions of all threads of a program, for the subset of PTX that the package's
kernels compile to (an unknown instruction raises). Warps run in step, or in random turns. Memory is
checked: reading or writing outside the given arrays raises, shared memory starts poisoned, bytes
must not be used while a copy in flight writes them, and copies land as late as they may (`lazy`) or
at once: right code gives the same result both ways. Threads that use the same shared bytes, one of
them writing, must be ordered by barriers, whatever order they ran in (`ptx.memory`); else that
raises too. Programs run one after another.

`ptx.tensor_cores` has NVIDIA's tensor-core instructions, written from the PTX ISA. A `Machine`
stands where a GPU stands: it runs what `prunekernels.launch.Launch` describes.
"""

from ptx.machine import Machine
from ptx.memory import GlobalMemory
from ptx.parsing import PtxKernel
from ptx.program import Program

__all__ = ["GlobalMemory", "Machine", "Program", "PtxKernel"]
