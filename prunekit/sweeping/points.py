"""What a sweep tries: series of copies that lose more and more, and single ready checkpoints."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.divergence.loading import load_any
from prunekit.errors import PrunekitError
from prunekit.models.architectures import Architecture
from prunekit.models.dropped import drop_blocks_, drop_sublayers_
from prunekit.pruning import Drop, DropReport, drop_, prune_
from prunekit.pruning.cosines import BLOCK, parts
from prunekit.pruning.patterns import UNSTRUCTURED
from prunekit.pruning.recipes import Magnitude, Method

#: What a sweep may be asked to try.
Plan: TypeAlias = Drop | DropReport | Method | str | PreTrainedModel
_UNITS = {"attn": "attention", "mlp": "MLP", "block": "block", "all": "sublayer"}


@dataclass(frozen=True)
class Made:
    """A copy of the dense model.

    Attributes:
        model: The copy, in eval mode.
        facts: What was done to it, as plain data.
        bytes_on_disk: Size of its files, where it came from files.
    """

    model: PreTrainedModel
    facts: dict[str, Any]
    bytes_on_disk: int | None = None


@dataclass(frozen=True)
class Point:
    """One copy to be measured.

    Attributes:
        key: Its name on disk.
        label: Its name in tables.
        x: Its place in the series: dropped parts, or the share of zeros.
        identity: What makes it what it is, as plain data.
        make: Makes the copy.
    """

    key: str
    label: str
    x: float
    identity: dict[str, Any]
    make: Callable[[], Made]


@dataclass(frozen=True)
class Series:
    """Copies of one kind, the one that loses least first.

    Attributes:
        name: What they are, such as "attentions dropped".
        axis: "count", "sparsity", or "checkpoint" for a single one.
        points: At least one.
    """

    name: str
    axis: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Workshop:
    """What copies are made from.

    Attributes:
        dense: The dense model; it stays as it is.
        tokenizer: Its tokenizer.
        calibration: Gives the calibration sequences, once.
        ranking: Gives the recorded report of a `Drop`, or records what the function makes.
        device: Where checkpoints are loaded.
        batch_size: Calibration sequences together; None suits the device.
        calibration_dtype: Type of the calibration passes; None: the model's own.
        progress: Show bars.
    """

    dense: PreTrainedModel
    tokenizer: Any
    calibration: Callable[[], list[Tensor]]
    ranking: Callable[[Drop, Callable[[], DropReport]], DropReport]
    device: str | None
    batch_size: int | None
    calibration_dtype: torch.dtype | None
    progress: bool


def series_of(
    plan: Plan,
    workshop: Workshop,
    *,
    name: str | None = None,
    counts: Sequence[int] | None = None,
    sparsities: Sequence[float] | None = None,
) -> Series:
    """The series of one plan.

    Args:
        plan: A `Drop` (its count is the most that goes) or the report of one; a method, of which
            an unstructured one is repeated at each of `sparsities`; a checkpoint's source; a model.
        workshop: What copies are made from.
        name: What to call a checkpoint or model.
        counts: How many parts go; by default every number up to the plan's count.
        sparsities: Shares of zeros; by default the method's own.

    Raises:
        PrunekitError: A count is beyond what the model has or the report ranks.
    """
    if isinstance(plan, DropReport):
        return _dropped(plan.unit, ranking_of(plan), workshop, counts)
    if isinstance(plan, Drop):
        if plan.strategy == "consecutive":
            raise PrunekitError("consecutive runs are no ranking: use discrete or iterative")
        wanted = counts or range(1, plan.count + 1)
        present = parts(Architecture(workshop.dense), plan.scored)
        most = _counts(plan.unit, len(present), wanted)[-1]
        report = _ranked(dataclasses.replace(plan, count=most), workshop)
        return _dropped(plan.unit, ranking_of(report), workshop, wanted)
    if isinstance(plan, Method):
        return _pruned(plan, workshop, sparsities)
    return _ready(plan, workshop, name)


def ranking_of(report: DropReport) -> list[tuple[str, int]]:
    """(part, layer) in the order in which they go; beyond the dropped ones by their score."""
    ranked = [(part.unit, part.layer) for part in report.dropped]
    if report.strategy != "discrete":
        return ranked
    left = [
        (-score, unit, layer)
        for unit, scores in report.scores.items()
        for layer, score in enumerate(scores)
        if score is not None and (unit, layer) not in ranked
    ]
    return [*ranked, *((unit, layer) for _, unit, layer in sorted(left))]


def _counts(unit: str, parts_left: int, counts: Sequence[int]) -> list[int]:
    """`counts` ascending, each once; 0 is the dense model, which is asked anyway.

    Raises:
        PrunekitError: One is beyond what the model can lose.
    """
    wanted = sorted({*counts} - {0})
    most = parts_left - (unit == BLOCK)  # a model without layers is none
    if not wanted or wanted[0] < 1 or wanted[-1] > most:
        raise PrunekitError(
            f"counts {', '.join(map(str, counts))} of {unit}: this model can lose 1 to {most}"
        )
    return wanted


def _ranked(drop: Drop, workshop: Workshop) -> DropReport:
    def made() -> DropReport:
        return drop_(
            copy.deepcopy(workshop.dense),
            drop,
            workshop.calibration(),
            batch_size=workshop.batch_size,
            calibration_dtype=workshop.calibration_dtype,
            progress=workshop.progress,
        )

    return workshop.ranking(drop, made)


def _dropped(
    unit: str,
    ranking: Sequence[tuple[str, int]],
    workshop: Workshop,
    counts: Sequence[int] | None,
) -> Series:
    wanted = _counts(unit, len(ranking), counts or range(1, len(ranking) + (unit != BLOCK)))
    what = _UNITS[unit]

    def point(count: int) -> Point:
        gone = ranking[:count]
        layers = {part: sorted(i for p, i in gone if p == part) for part in ("attn", "mlp", BLOCK)}

        def make() -> Made:
            model = copy.deepcopy(workshop.dense)
            if layers[BLOCK]:
                drop_blocks_(model, layers[BLOCK])
            if layers["attn"] or layers["mlp"]:
                drop_sublayers_(model, attn=layers["attn"], mlp=layers["mlp"])
            return Made(model, {"dropped": {part: at for part, at in layers.items() if at}})

        label = f"{count} {what}{'s' * (count > 1)}"
        return Point(f"{unit}-{count:03d}", label, count, {"gone": gone}, make)

    return Series(f"{what}s dropped", "count", tuple(point(count) for count in wanted))


def _pruned(method: Method, workshop: Workshop, sparsities: Sequence[float] | None) -> Series:
    """Unstructured at each sparsity; N:M, which fixes it, once."""
    free = method.pattern == UNSTRUCTURED
    shares = sorted(set(sparsities or ())) if free else []
    methods = [dataclasses.replace(method, sparsity=share) for share in shares] or [method]

    def point(one: Method) -> Point:
        share = one.target.sparsity
        what = f"{100 * share:g} %" if free else one.pattern

        def make() -> Made:
            model = copy.deepcopy(workshop.dense)
            report = prune_(
                model,
                one,
                workshop.calibration() if one.calibrated else None,
                batch_size=workshop.batch_size,
                calibration_dtype=workshop.calibration_dtype,
                progress=workshop.progress,
            )
            return Made(model, {"method": one.to_dict(), "sparsity": report.sparsity})

        key = f"{one.name}-{one.pattern.replace(':', '-')}-{1000 * share:03.0f}"
        return Point(key, f"{_titled(one)} {what}", share, one.to_dict(), make)

    pattern = "" if free else f" {method.pattern}"
    axis = "sparsity" if free else "checkpoint"
    return Series(f"{_titled(method)}{pattern}", axis, tuple(map(point, methods)))


def _titled(method: Method) -> str:
    """A method's name as people write it: a word, or a proper name."""
    return method.name if isinstance(method, Magnitude) else type(method).__name__


def _ready(source: str | PreTrainedModel, workshop: Workshop, name: str | None) -> Series:
    held = source if isinstance(source, str) else getattr(source.config, "name_or_path", "")
    label = name or Path(str(held)).name or str(held) or type(source).__name__

    def make() -> Made:
        if not isinstance(source, str):
            return Made(source, {"source": str(held)})
        dtype = str(workshop.dense.dtype).removeprefix("torch.")  # of what is not quantised
        loaded = load_any(source, dtype=dtype, device=workshop.device)
        return Made(loaded.model, {"source": source}, loaded.bytes_on_disk)

    key = "checkpoint-" + re.sub(r"[^\w.-]+", "-", label)[:60]
    return Series(label, "checkpoint", (Point(key, label, 0.0, {"source": str(held)}, make),))


def told_apart(series: Sequence[Series]) -> list[Series]:
    """The same series.

    Raises:
        PrunekitError: Two of their points would have the same name.
    """
    seen: Mapping[str, int] = {}
    for one in series:
        for point in one.points:
            seen = {**seen, point.key: seen.get(point.key, 0) + 1}
    twice = [key for key, count in seen.items() if count > 1]
    if twice:
        raise PrunekitError(f"{twice[0]} is asked for twice: name each once")
    return list(series)
