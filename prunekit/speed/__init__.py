"""The speed of models: decoding, timing, and the variants that are compared."""

from prunekit.speed.decoding import (
    CACHES,
    TOLERANCE,
    Continuation,
    check_cached,
    random_prompts,
)

__all__ = ["CACHES", "TOLERANCE", "Continuation", "check_cached", "random_prompts"]
