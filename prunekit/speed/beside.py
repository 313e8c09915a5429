"""How fast a copy of a model reads and writes, timed in turns with the model itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from transformers import PreTrainedModel

from prunekit.errors import PrunekitError
from prunekit.models.architectures import Architecture
from prunekit.packed.warming import warm_up_
from prunekit.speed import decoding
from prunekit.speed.timing import Times, interleaved


@dataclass(frozen=True)
class Speed:
    """Tokens per second of a copy, and of the model beside which it was timed.

    Attributes:
        prefill: Tokens of a prompt that the copy reads per second, the median.
        decode: Tokens that it writes per second, one sequence at a time, the median.
        dense_prefill: The model's own.
        dense_decode: The model's own.
        speedup: Seconds per written token of the model over those of the copy: the median of the
            rounds' ratios. Above 1 the copy is faster.
        low: 20th percentile of these ratios.
        high: 80th percentile.
    """

    prefill: float
    decode: float
    dense_prefill: float
    dense_decode: float
    speedup: float
    low: float
    high: float


def beside(
    dense: PreTrainedModel,
    copy: PreTrainedModel,
    *,
    prompt: int = 128,
    new: int = 32,
    rounds: int = 5,
    seed: int = 0,
) -> Speed:
    """Time a copy in turns with its model, after a check of its cached logits.

    A model whose context is shorter reads and writes a shorter text. On a GPU each step is one
    CUDA graph.

    Args:
        dense: The model, in eval mode.
        copy: Its copy, in eval mode, on the same device.
        prompt: Tokens to read.
        new: Tokens to write.
        rounds: Samples of each.
        seed: Seed of the prompt.

    Raises:
        PrunekitError: A model's logits with a cache are not those without: it would be timed doing
            something else.
    """
    cache = "graph" if dense.device.type == "cuda" else "dynamic"
    room = min(Architecture(model).context_length for model in (dense, copy))
    new = max(2, min(new, room // 4))
    prompt = max(4, min(prompt, room - new - 1))
    models = {"dense": dense, "copy": copy}
    for name, model in models.items():
        warm_up_(model, (1, prompt))
        asked = decoding.random_prompts(model, 1, min(prompt, 32), seed)
        off = decoding.check_cached(model, asked, cache)
        if not off < decoding.TOLERANCE:
            raise PrunekitError(
                f"the {name} model's cached logits are off by {off:.2g} standard deviations: "
                "its speed is not measured"
            )
    text = decoding.random_prompts(dense, 1, prompt, seed)
    runs = {name: decoding.Continuation(model, text, new, cache) for name, model in models.items()}

    def timed(sampler: Callable[[decoding.Continuation], float]) -> dict[str, Times]:
        samplers = {name: partial(sampler, run) for name, run in runs.items()}
        for sample in samplers.values():
            sample()  # warm up
        return interleaved(samplers, rounds)

    reading = timed(decoding.Continuation.prefill)
    writing = timed(decoding.Continuation.decode)
    ratios = np.array(writing["dense"].seconds) / np.array(writing["copy"].seconds)
    low, middle, high = (float(end) for end in np.percentile(ratios, (20, 50, 80)))
    return Speed(
        prompt / reading["copy"].median,
        1 / writing["copy"].median,
        prompt / reading["dense"].median,
        1 / writing["dense"].median,
        middle,
        low,
        high,
    )
