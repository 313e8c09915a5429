"""Run a test file once more, with Triton's kernels interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

#: The kernels that tests of the metric ops ask for, by name.
IMPL = os.environ.get("PRUNEKERNELS_TEST_IMPL", "triton")


def run_interpreted(file: str, *options: str, impl: str = "triton") -> None:
    """Run pytest on `file` in a process of its own: Triton decides at import what is interpreted.

    Args:
        file: The test file, `__file__` of the caller.
        options: Further options of pytest.
        impl: What `IMPL` is there.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, file],
        env={**os.environ, "TRITON_INTERPRET": "1", "PRUNEKERNELS_TEST_IMPL": impl},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def patch_language_once() -> None:
    """Let a launch patch `triton.language` once, and not at each call of a device function.

    That takes half of the time of interpreting a kernel of many small functions. Both modules
    that functions may know are patched, so that a nested call finds nothing left to do.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    patch = getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if patch is None or scope is None:  # another version of Triton
        return
    both = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def once(_: Any) -> Any:
        return patch(both) if tl.core.is_builtin(tl.load) else scope()

    interpreter._patch_lang = once
