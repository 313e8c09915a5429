"""Gluon names that moved between Triton 3.6 and 3.7; nothing else looks at the version."""

from __future__ import annotations

from triton.experimental.gluon import language as gl

#: Barrier over the program's threads: `thread_barrier` until Triton 3.6.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
