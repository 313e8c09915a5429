"""Modules that stand where a dropped sublayer was."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Absent(nn.Module):
    """Stands where a dropped sublayer was: contributes a 0-dimensional zero to the residual.

    The stock decoder layer's own forward stays in charge, so signatures and residual wiring are
    always the installed transformers version's. Adding a broadcast scalar zero is all that remains.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return a 0-dimensional zero of `hidden_states`' dtype and device."""
        return hidden_states.new_zeros(())


class AbsentAttention(Absent):
    """An `Absent` with an attention's return convention (output, weights).

    When a model has no attention left at all, the first of these keeps the cache's length (one
    number per token), because learned position embeddings are looked up from it.
    """

    def __init__(self, counts_tokens: bool = False) -> None:
        super().__init__()
        self.counts_tokens = counts_tokens

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Return (0-dimensional zero, None)."""
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if self.counts_tokens and cache is not None:
            marker = hidden_states[:, None, :, :1]  # (batch, 1 head, tokens, 1)
            cache.update(marker, marker, 0)
        return super().forward(hidden_states), None
