"""Times how fast a model reads a prompt and writes tokens, with a real KV cache.

Three ways of decoding: "dynamic" (a cache that grows, as `generate` uses by default), "static" (a
cache of fixed size) and "graph" (static, with the whole step replayed as one CUDA graph, so that
launching kernels costs nothing). Every model is fed its own greedy tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from prunekit.errors import PrunekitError
from prunekit.models.architectures import Architecture
from prunekit.speed.timing import stopwatch

CACHES = ("dynamic", "static", "graph")
#: Largest difference of logits, in their standard deviations, that rounding could explain.
TOLERANCE = 0.5


class Continuation:
    """One batch of equally long prompts and the tokens that follow.

    Args:
        model: A causal language model in eval mode.
        prompts: (batch, length) token ids.
        new_tokens: Tokens to write per prompt.
        cache: One of `CACHES`.

    Raises:
        PrunekitError: The cache is unknown or needs a GPU, or the texts exceed the model's context.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Tensor, new_tokens: int, cache: str = "dynamic"
    ) -> None:
        self.device = model.get_input_embeddings().weight.device
        if cache not in CACHES:
            raise PrunekitError(f"cache '{cache}' is unknown: use {', '.join(CACHES)}")
        if cache == "graph" and self.device.type != "cuda":
            raise PrunekitError("cache 'graph' needs an NVIDIA GPU: use dynamic or static")
        length, limit = prompts.shape[1] + new_tokens, Architecture(model).context_length
        if new_tokens < 1 or not prompts.numel():
            raise PrunekitError("prompts and new_tokens must not be empty: ask for at least one")
        if length > limit:
            raise PrunekitError(
                f"{prompts.shape[1]} + {new_tokens} tokens exceed the model's context of {limit}: "
                "use a shorter prompt or fewer new tokens"
            )
        self.model, self.new_tokens, self.kind = model, new_tokens, cache
        self.prompts = prompts.to(self.device)
        self._token = self.prompts[:, -1:].clone()
        self._cache: Cache | None = None
        self._length = length
        self._graph: Any = None
        self._last: Tensor | None = None  # (batch, V), always at one address: a graph writes there

    def prefill(self) -> float:
        """Seconds to read the prompts into an empty cache, up to the first new token."""
        with torch.inference_mode():
            self._empty_cache()
            return stopwatch(lambda: self._step(self.prompts), self.device)

    def decode(self) -> float:
        """Seconds per further token of the whole batch, after a prefill that is not counted."""
        with torch.inference_mode():
            self._empty_cache()
            self._step(self.prompts)
            run = self._replay() if self.kind == "graph" else self._one_more

            def write() -> None:
                for _ in range(self.new_tokens - 1):
                    run()

            return stopwatch(write, self.device) / max(1, self.new_tokens - 1)

    def logits(self, following: Tensor) -> Tensor:
        """(batch, count, V) float32 logits after each of `following`, fed one at a time.

        Args:
            following: (batch, count) token ids that come after the prompts.
        """
        with torch.inference_mode():
            self._empty_cache()
            self._step(self.prompts)
            run = self._replay() if self.kind == "graph" else self._one_more
            found = []
            for token in torch.split(following.to(self.device), 1, dim=1):
                self._token.copy_(token)
                run()
                assert self._last is not None  # written by the prompts' step
                found.append(self._last.float().clone())
        return torch.stack(found, 1)

    def _empty_cache(self) -> None:
        if self.kind == "dynamic":
            self._cache = DynamicCache(config=self.model.config)
        elif self._cache is None:
            self._cache = StaticCache(config=self.model.config, max_cache_len=self._length)
        else:
            self._cache.reset()  # in place: a graph holds its addresses

    def _step(self, ids: Tensor) -> None:
        out = self.model(
            input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        last = out.logits[:, -1]
        if self._last is None:
            self._last = torch.empty_like(last, memory_format=torch.contiguous_format)
        self._last.copy_(last)
        self._token.copy_(last.argmax(-1, keepdim=True))

    def _one_more(self) -> None:
        self._step(self._token)

    def _replay(self) -> Callable[[], None]:
        """The captured step; captured at its first use, from a state that is then restored."""
        if self._graph is None:
            side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._one_more()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._one_more()
            self._graph = graph
            self._empty_cache()
            self._step(self.prompts)
        run: Callable[[], None] = self._graph.replay
        return run


def check_cached(model: PreTrainedModel, prompts: Tensor, cache: str, tokens: int = 3) -> float:
    """Largest difference of cached from uncached logits, relative to the spread of the latter.

    Args:
        model: A causal language model in eval mode.
        prompts: (batch, length) token ids; the last `tokens` are fed through the cache.
        cache: One of `CACHES`.
        tokens: How many.

    Returns:
        max |cached − uncached| / std of the uncached: rounding alone leaves it under `TOLERANCE`
        even in bfloat16, a wrong position or mask does not.
    """
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        whole = model(input_ids=prompts.to(device), use_cache=False).logits[:, -tokens:].float()
    start = prompts[:, :-tokens]
    cached = Continuation(model, start, tokens + 1, cache).logits(prompts[:, -tokens:])
    return float((cached - whole).abs().max() / whole.std())


def random_prompts(model: PreTrainedModel, batch: int, length: int, seed: int = 0) -> Tensor:
    """(batch, length) random token ids: what is written does not change the time it takes."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch, length), generator=generator)
