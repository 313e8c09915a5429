"""Run a test file once more, with Triton's kernels interpreted."""

from __future__ import annotations

import os
import subprocess
import sys

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
