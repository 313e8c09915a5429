"""Score sublayers or blocks by how little they turn the hidden state: mean token cosines."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TypeAlias

import torch
from prunekernels import vector_stats
from prunekernels.metrics.closed_form import angle_fields
from torch import Tensor

from prunekit.errors import PrunekitError
from prunekit.models import blocks
from prunekit.models.architectures import Architecture
from prunekit.models.blocks import Keywords
from prunekit.models.layouts import SUBLAYERS
from prunekit.process import distributed
from prunekit.process.progress import track
from prunekit.pruning.stream import Stream

BLOCK = "block"

Part: TypeAlias = tuple[str, int]  # ("attn" | "mlp" | "block", layer)


def parts(arch: Architecture, units: Collection[str]) -> list[Part]:
    """The parts of the given kinds that the model still has."""
    return [
        (unit, layer)
        for layer in range(len(arch.layers))
        for unit in units
        if unit == BLOCK or not arch.is_dropped(layer, unit)
    ]


@torch.inference_mode()
def mean_cosines(
    arch: Architecture,
    batches: Sequence[Tensor],
    units: Collection[str],
    *,
    without: Collection[Part] = (),
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> dict[Part, float]:
    """Score every part of the given kinds in one pass over the tokens.

    Args:
        arch: The model.
        batches: (sequences, tokens) each, without padding.
        units: "attn" and / or "mlp", or "block" alone.
        without: Parts that are left out: they add nothing to the residual stream, and get no
            score.
        dtype: Run layers in this type instead of their own.
        progress: Show a progress bar on a terminal.

    Returns:
        Mean over tokens of cos(x, x + what the part adds to x), the sums in float64.

    Raises:
        PrunekitError: A score is NaN.
    """
    run = _BlockPass(arch, units, without) if BLOCK in units else _Pass(arch, units, without)
    stream = Stream(arch, batches, dtype=dtype)
    for layer in track(range(len(arch.layers)), "scoring", enabled=progress):
        run.layer = layer
        stream.advance(layer, run)
    tokens = sum(batch.numel() for batch in batches)
    sums = distributed.all_reduce_(torch.stack(list(run.angles.values())))
    scores = dict(zip(run.angles, (1 - sums / tokens).tolist(), strict=True))
    for (unit, layer), score in scores.items():
        if math.isnan(score):
            raise PrunekitError(
                f"the {unit} of layer {layer} gives NaN on calibration data: check the model's "
                "weights, or use a wider dtype"
            )
    return scores


class _Pass:
    """Runs layers sublayer by sublayer and sums 1 - cos, which keeps the digits near cos = 1."""

    def __init__(
        self, arch: Architecture, units: Collection[str], without: Collection[Part]
    ) -> None:
        self.arch = arch
        self.without = set(without)
        self.layer = 0
        device = arch.model.get_input_embeddings().weight.device
        self.angles = {
            part: torch.zeros((), dtype=torch.float64, device=device)
            for part in parts(arch, units)
            if part not in self.without
        }

    def __call__(self, hidden: Tensor, batch: int, kwargs: Keywords) -> Tensor:
        """Output of the current layer for `hidden` (batch, tokens, hidden)."""
        out = hidden
        for unit in SUBLAYERS:
            entering = hidden if self.arch.parallel else out
            out = out + self._contribution(unit, entering, kwargs)
        return out

    def _contribution(self, unit: str, entering: Tensor, kwargs: Keywords) -> Tensor:
        if (unit, self.layer) in self.without:
            return torch.zeros_like(entering)
        added = self.arch.contribution(self.layer, unit, entering, kwargs)
        self._score(unit, entering, added)
        return added

    def _score(self, unit: str, before: Tensor, added: Tensor) -> None:
        if (unit, self.layer) in self.angles:
            # in float32: a sum rounded to bfloat16 turns by more than a weak sublayer does
            total = _turned(before.float(), added.float()).sum(dtype=torch.float64)
            self.angles[unit, self.layer] += total.to(self.angles[unit, self.layer].device)


class _BlockPass(_Pass):
    """Runs whole layers."""

    def __call__(self, hidden: Tensor, batch: int, kwargs: Keywords) -> Tensor:
        """Output of the current layer for `hidden` (batch, tokens, hidden)."""
        if (BLOCK, self.layer) in self.without:
            return hidden
        out = blocks.run_layer(self.arch, self.layer, hidden, kwargs)
        if (BLOCK, self.layer) in self.angles:
            self._score(BLOCK, hidden, out.float() - hidden.float())
        return out


def _turned(before: Tensor, added: Tensor) -> Tensor:
    """1 - cos(before, before + added) of float32 vectors (…, hidden).

    On a GPU one kernel reads everything once. On a CPU the closed form of ‖x‖², ⟨x, f⟩ and ‖f‖²
    takes a third of the time of `vector_stats`, whose float64 copies only matter where f is
    parallel to x: summed in float32 these are off by some 1e-7·‖f‖²/‖x + f‖².
    """
    if before.device.type != "cpu":
        return vector_stats(before, before + added).one_minus_cosine
    pairs = ((before, before), (before, added), (added, added))
    norm, along, length = (torch.linalg.vecdot(*pair).double() for pair in pairs)
    after = (norm + 2 * along + length).clamp_min_(0.0)  # of f = -x nearly nothing is left
    sums = (norm, along, length, norm + along, after)
    return angle_fields(*sums)["one_minus_cosine"]
