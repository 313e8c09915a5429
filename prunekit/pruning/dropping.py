"""Drop the sublayers or blocks that change the hidden state least.

Score: the mean over calibration tokens of cos(x, x + f(x)), x being what the sublayer or block
reads before its norm and f(x) what it adds to the residual stream; the highest scores go.
Sources: ShortGPT (arXiv 2403.03853) for blocks, "What Matters in Transformers?" (arXiv 2406.15786)
for sublayers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from prunekit.data.calibration import CalibrationInput, batches, sequences
from prunekit.errors import PrunekitError
from prunekit.models.architectures import Architecture
from prunekit.models.dropped import drop_blocks_, drop_sublayers_
from prunekit.models.layouts import SUBLAYERS
from prunekit.models.saveable import check_saveable
from prunekit.process.ambient import usual_torch
from prunekit.pruning.cosines import BLOCK, Part, mean_cosines, parts
from prunekit.pruning.report import align, calibrated_in, dtype_name
from prunekit.pruning.sequential import evaluating

UNITS = (*SUBLAYERS, "all", BLOCK)
STRATEGIES = ("discrete", "consecutive", "iterative")


@dataclass(frozen=True)
class Drop:
    """The parts to drop: their kind, their number and the strategy.

    Attributes:
        unit: "attn" or "mlp" sublayers, "all" for both ranked jointly, or whole "block"s.
        count: How many, at least 1.
        strategy: "discrete": the highest scores. "consecutive": the run of `count` layers with
            the highest mean score (not with "all", which has no order of layers). "iterative":
            the highest score, then all scores again without it, `count` times.

    Raises:
        PrunekitError: No such unit or strategy, or a count below 1.
    """

    unit: str
    count: int
    strategy: str = "discrete"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("unit", self.unit, UNITS),
            ("strategy", self.strategy, STRATEGIES),
        ):
            if value not in known:
                raise PrunekitError(f"{name} '{value}' is unknown: use {', '.join(known)}")
        if self.count < 1:
            raise PrunekitError(f"count {self.count} drops nothing: use at least 1")
        if self.unit == "all" and self.strategy == "consecutive":
            raise PrunekitError(
                "consecutive drops a run of layers, which unit 'all' does not rank: use unit attn, "
                "mlp or block, or strategy discrete or iterative"
            )

    @property
    def scored(self) -> tuple[str, ...]:
        """The kinds of parts that get scores."""
        return SUBLAYERS if self.unit == "all" else (self.unit,)


@dataclass(frozen=True)
class Dropped:
    """One dropped part: its kind ("attn", "mlp", "block"), layer, and score when it was chosen."""

    unit: str
    layer: int
    score: float


@dataclass(frozen=True)
class DropReport:
    """The report of `drop_`. It numbers layers as they were before.

    Attributes:
        unit: See `Drop`.
        count: See `Drop`.
        strategy: See `Drop`.
        scores: Score of every layer's "attn", "mlp" or "block" before anything was dropped; None
            for a sublayer that was absent already.
        dropped: The dropped parts, in the order in which they were chosen.
        parameters_before: Number of the model's parameters before.
        parameters_after: And after.
        sequences: Number of calibration sequences.
        tokens: Number of calibration tokens.
        calibration_dtype: See `prunekit.pruning.PruneReport`.
        notes: What other programs may get wrong with the smaller model.
    """

    unit: str
    count: int
    strategy: str
    scores: dict[str, list[float | None]]
    dropped: tuple[Dropped, ...]
    parameters_before: int
    parameters_after: int
    sequences: int
    tokens: int
    calibration_dtype: str | None = None
    notes: tuple[str, ...] = ()

    def _layers(self, unit: str) -> tuple[int, ...]:
        return tuple(sorted(part.layer for part in self.dropped if part.unit == unit))

    @property
    def dropped_attn(self) -> tuple[int, ...]:
        """Layers whose attention was dropped, ascending."""
        return self._layers("attn")

    @property
    def dropped_mlp(self) -> tuple[int, ...]:
        """Layers whose MLP was dropped, ascending."""
        return self._layers("mlp")

    @property
    def dropped_blocks(self) -> tuple[int, ...]:
        """Layers that were dropped whole, ascending."""
        return self._layers(BLOCK)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            **dataclasses.asdict(self),
            "dropped": [dataclasses.asdict(part) for part in self.dropped],
            "notes": list(self.notes),
            "dropped_attn": list(self.dropped_attn),
            "dropped_mlp": list(self.dropped_mlp),
            "dropped_blocks": list(self.dropped_blocks),
        }

    def table(self) -> str:
        """A plain-text table of scores; what was dropped is marked."""
        units = list(self.scores)
        gone = {(part.unit, part.layer) for part in self.dropped}
        rows = [("layer", *units)]
        for layer, values in enumerate(zip(*self.scores.values(), strict=True)):
            cells = []
            for unit, score in zip(units, values, strict=True):
                mark = "  dropped" if (unit, layer) in gone else ""
                cells.append("absent" if score is None else f"{score:.6f}{mark}")
            rows.append((str(layer), *cells))
        notes = [f"Note: {note}." for note in self.notes]
        return "\n".join([*align(rows), *notes, *calibrated_in(self.calibration_dtype)])


@usual_torch()
@torch.inference_mode()
def drop_(
    model: PreTrainedModel,
    drop: Drop,
    calibration: CalibrationInput,
    *,
    tokenizer: Any = None,
    batch_size: int | None = None,
    calibration_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> DropReport:
    """Take the sublayers or blocks out of the model that matter least on calibration data.

    Of equal scores, attention goes before MLP and earlier layers before later ones. Under
    `torchrun` or `accelerate launch` the calibration batches are shared out.

    Args:
        model: A model of a supported architecture; changed in place, at the very end.
        drop: The parts to drop: their kind, their number and the strategy.
        calibration: What to score on; see `prunekit.data.calibration`.
        tokenizer: Needed if the calibration is a file or a data set.
        batch_size: Sequences that run together; see `prunekit.pruning.prune_`.
        calibration_dtype: Run the calibration passes in this type, such as torch.bfloat16, with
            rounded copies of each layer's weights; see `prunekit.pruning.prune_`. Scores are formed
            in float32 as ever, from rounded activations.
        progress: Show a progress bar on a terminal.

    Returns:
        Scores, and what was dropped.

    Raises:
        PrunekitError: More is to be dropped than there is, calibration is unusable, or the model
            gives NaN. The model is unchanged then.
    """
    check_saveable(model)
    arch = Architecture(model)
    _check_count(arch, drop)
    with evaluating(model):
        found = sequences(calibration, model, tokenizer, progress=progress)
        together = batches(found, batch_size, model.get_input_embeddings().weight.device)

        def score(without: Collection[Part] = ()) -> dict[Part, float]:
            return mean_cosines(
                arch,
                together,
                drop.scored,
                without=without,
                dtype=calibration_dtype,
                progress=progress,
            )

        first = score()
        if drop.strategy == "iterative":
            chosen = _iterative(score, drop.count, first)
        elif drop.strategy == "consecutive":
            chosen = _best_window(first, drop)
        else:
            chosen = _highest(first)[: drop.count]
    before, layer_count = _parameters(model), len(arch.layers)
    layers = {unit: [part.layer for part in chosen if part.unit == unit] for unit in drop.scored}
    notes: list[str] = []
    if drop.unit == BLOCK:
        notes = drop_blocks_(model, layers[BLOCK])
    else:
        drop_sublayers_(model, attn=layers.get("attn", ()), mlp=layers.get("mlp", ()))
    return DropReport(
        unit=drop.unit,
        count=drop.count,
        strategy=drop.strategy,
        scores={
            unit: [first.get((unit, layer)) for layer in range(layer_count)] for unit in drop.scored
        },
        dropped=tuple(chosen),
        parameters_before=before,
        parameters_after=_parameters(model),
        sequences=len(found),
        tokens=sum(map(len, found)),
        calibration_dtype=dtype_name(calibration_dtype),
        notes=tuple(notes),
    )


def _check_count(arch: Architecture, drop: Drop) -> None:
    available = len(parts(arch, drop.scored))
    if drop.unit == BLOCK:
        available -= 1  # a model without layers is none
    if drop.count > available:
        what = "attn and mlp sublayers" if drop.unit == "all" else f"{drop.unit} sublayers"
        what = "of its blocks (one must stay)" if drop.unit == BLOCK else what
        raise PrunekitError(
            f"count {drop.count} exceeds the {available} {what} that this model can lose: use "
            f"count <= {available}"
        )


def _highest(scores: dict[Part, float]) -> list[Dropped]:
    """Parts by falling score; of equal scores attn before mlp, then the earlier layer."""
    ranked = sorted(scores, key=lambda part: (-scores[part], part))
    return [Dropped(unit, layer, scores[unit, layer]) for unit, layer in ranked]


def _best_window(scores: dict[Part, float], drop: Drop) -> list[Dropped]:
    """The run of `count` layers with the highest mean score; the earliest of equal ones."""
    layers = sorted(layer for _, layer in scores)
    best: tuple[float, list[int]] | None = None
    for start in range(len(layers) - drop.count + 1):
        window = layers[start : start + drop.count]
        if window[-1] - window[0] != drop.count - 1:
            continue  # a sublayer in between is absent already
        mean = sum(scores[drop.unit, layer] for layer in window) / drop.count
        if best is None or mean > best[0]:
            best = (mean, window)
    if best is None:
        raise PrunekitError(
            f"no {drop.count} consecutive layers still have their {drop.unit}: use a lower count "
            "or strategy discrete"
        )
    return [Dropped(drop.unit, layer, scores[drop.unit, layer]) for layer in best[1]]


def _iterative(
    score: Callable[[Collection[Part]], dict[Part, float]], count: int, first: dict[Part, float]
) -> list[Dropped]:
    """Choose one part at a time, scoring the rest anew without those chosen before."""
    chosen = _highest(first)[:1]
    while len(chosen) < count:
        scores = score([(part.unit, part.layer) for part in chosen])
        chosen.append(_highest(scores)[0])
    return chosen


def _parameters(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
