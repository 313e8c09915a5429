"""Compile and prove all that some calls will need, before they are timed or captured."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from prunekernels import runtime
from prunekernels.compilation import source_type
from prunekernels.launch.calls import Launch, record
from prunekernels.runtime import interpreting, on, triton_installed


def warm_up(
    calls: Sequence[Callable[[], Any]],
    *,
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Compile all kernels that calls of ops launch, run their self-tests, and run the calls once.

    After it, calls with such tensors launch at once and can be captured in a CUDA graph. Kernels
    are compiled in processes of their own, several at a time, into Triton's cache on disk. Without
    a GPU, without Triton and in its interpreter there is nothing to compile.

    Args:
        calls: Functions without arguments that call ops, such as
            `lambda: sparse24_linear(x, weight)`. Each runs twice, the first time without its
            kernels, so that what it computes from their results must not matter.
        jobs: Processes that compile at once; None: one per CPU, at most 16.
        progress: Called with the kernels that are compiled and all that there are.

    Returns:
        How many kernels had to be compiled.
    """
    if not torch.cuda.is_available() or interpreting() or not triton_installed():
        return 0
    wanted: dict[tuple[Any, ...], Compilation] = {}
    proven: set[tuple[runtime.Kernel, torch.device]] = set()
    for call in calls:
        with record() as launches:
            call()
            for kernel, device in set(runtime.recording.untested or ()) - proven:
                proven.add((kernel, device))
                with contextlib.suppress(Exception):  # its results are not there
                    kernel.load().self_test(device)
        for launch in launches:
            _want(launch, wanted)
    if torch.version.hip is None:
        compile_apart(list(wanted.values()), jobs, progress)
    for call in calls:
        call()
    torch.cuda.synchronize()
    return len(wanted)


def _want(call: Launch, wanted: dict[tuple[Any, ...], Compilation]) -> None:
    """Add what has to be compiled before a call can run."""
    with on(call.first):
        device = torch.cuda.current_device()
    specialisation = call.specialisation()
    key = (*call.key(device), specialisation)
    if key not in wanted and call.compiled(device, specialisation) is None:
        major, minor = torch.cuda.get_device_capability(device)
        wanted[key] = compilation_of(call, 10 * major + minor)


def compilation_of(call: Launch, arch: int) -> Compilation:
    """What Triton's launch path would compile for a call on an NVIDIA GPU."""
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    kernel, options = call.kernel, call.compiler_options
    given = {
        **options,
        "debug": options.get("debug", kernel.debug) or knobs.runtime.debug,
        "instrumentation_mode": knobs.compilation.instrumentation_mode,
    }
    bound, kinds, rest = call.binder(*call.arguments, **call.constants, **given)
    parsed, signature, constants, attributes = kernel._pack_args(
        make_backend(GPUTarget("cuda", arch, 32)), {**call.constants, **given}, bound, kinds, rest
    )
    return Compilation(
        kernel.fn.__module__,
        kernel.fn.__qualname__,
        signature,
        constants,
        attributes,
        dict(parsed.__dict__),
        arch,
    )


class Compilation(NamedTuple):
    """A compilation that another process can do: a kernel by its name, and Triton's own arguments.

    Attributes:
        module: The kernel's module.
        name: Its name there.
        signature: Type of every parameter, "constexpr" for constants.
        constants: Values of constants by path of parameters.
        attributes: What is known of values, such as divisibility, by path of parameters.
        options: All options of the compiler.
        arch: Compute capability.
    """

    module: str
    name: str
    signature: Mapping[str, Any]
    constants: Mapping[tuple[int, ...], Any]
    attributes: Mapping[tuple[int, ...], Any]
    options: Mapping[str, Any]
    arch: int

    def run(self) -> Any:
        """Compile it, into Triton's cache on disk."""
        import triton
        from triton.backends.compiler import GPUTarget

        kernel = getattr(importlib.import_module(self.module), self.name)
        source = source_type(kernel)(kernel, self.signature, self.constants, self.attributes)
        target = GPUTarget("cuda", self.arch, 32)
        return triton.compile(source, target=target, options=dict(self.options))


def compile_apart(
    compilations: Sequence[Compilation],
    jobs: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Compile in processes of their own, several at a time; what fails is left to the first use.

    The processes start from nothing and import this package alone, not the caller's main module.

    Args:
        compilations: What to compile.
        jobs: Processes at once; None: one per CPU, at most 16.
        progress: Called with the number of those that are done and of all.
    """
    total = len(compilations)
    count = min(total, jobs or min(os.cpu_count() or 1, 16))
    code = f"from {__name__} import compile_sent; compile_sent()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
        for _ in range(count)
    ]
    done, lock = 0, threading.Lock()

    def follow(worker: subprocess.Popen[bytes], share: Sequence[Compilation]) -> None:
        nonlocal done
        assert worker.stdin is not None and worker.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            worker.stdin.write(pickle.dumps(share))
            worker.stdin.close()
        for _ in worker.stdout:
            with lock:
                done += 1
                if progress is not None:
                    progress(done, total)
        worker.wait()

    threads = [
        threading.Thread(target=follow, args=(worker, compilations[place::count]))
        for place, worker in enumerate(workers)
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()


def compile_sent() -> None:
    """What a process of `compile_apart` does: read what to compile, print a line for each."""
    for compilation in pickle.loads(sys.stdin.buffer.read()):
        with contextlib.suppress(Exception):
            compilation.run()
        print(compilation.name, flush=True)
