"""A kernel call is written once: what is launched is what is compiled, checked and warmed up.

A module that owns a kernel writes one function which builds the call, from tensors that are real
or on the meta device, and uses it for both:

    def product(x, packed, y, config) -> Launch:
        return Launch(
            _kernel, grid, (x, packed, y, x.stride(0), len(x)), {"BLOCK": config.block}, num_warps=4
        )

    product(x, packed, y, config).run()                                       # the launcher
    product(*meta_tensors, config).case("name", opcodes=("HMMA",), archs=(90,))  # compile_cases()

Signature, alignment and constants of a case are those that Triton derives from the same arguments.
A tensor that may be unaligned at run time is given to a case as an unaligned view. Tensors (or
None) come first among a kernel's parameters; `do_not_specialize` names its sizes, so that one
compilation serves all of them, but not the strides whose divisibility makes loads wide.

On an NVIDIA GPU `run` launches a compiled kernel by its handle: Triton's binder is asked for the
specialisation, and nothing else of its launch path runs after the first launch. A caller on a hot
path keeps `launch.bind()` under a key of its own (shapes, types, device) and calls it with
addresses alone.
"""

from prunekernels.launch.calls import (
    Bound,
    Launch,
    UnalignedError,
    allocator,
    current_device,
    current_stream,
    meta,
    record,
)
from prunekernels.launch.warming import warm_up

__all__ = [
    "Bound",
    "Launch",
    "UnalignedError",
    "allocator",
    "current_device",
    "current_stream",
    "meta",
    "record",
    "warm_up",
]
