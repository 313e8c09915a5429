"""Run a test file once more, with Triton's kernels interpreted."""

from __future__ import annotations

import os
import subprocess
import sys


def run_interpreted(file: str, *options: str) -> None:
    """Run pytest on `file` in a process of its own: Triton decides at import what is interpreted.

    Args:
        file: The test file, `__file__` of the caller.
        options: Further options of pytest.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
