"""Charts of a `MetricGrid`: curves over layers or steps with their intervals over prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prunekit.analysis.grid import MetricGrid
from prunekit.report.charts import Chart, Figure, Series

_SUBLAYERS = {"attn": "Attention", "mlp": "MLP"}
_SPACES = (("h", "hidden state h"), ("z", "logit z"), ("p", "probability p"))
_COSINE_LABEL = "cosine(dense, pruned)"
_COMPLEMENT = "1 − cosine(dense, pruned)"


def curve(
    grid: MetricGrid, metric: str, axis: str, name: str, role: str, *, estimate: bool = False
) -> Series:
    """Mean of `metric` along `axis` with its interval; every other axis is averaged per prompt.

    Args:
        grid: Where the metric is.
        metric: Its name.
        axis: "layer" or "step".
        name: For the legend.
        role: A key of `charts.COLORS`.
        estimate: The metric is a second-order estimate: drawn dashed, without a band, with the
            share of positions where it is valid.
    """
    found = grid.interval(metric, keep=(axis,))
    x = [float(label) for label in grid.labels[axis]]
    if estimate:
        valid = grid.mean("estimate_valid", keep=(axis,)) if not metric.startswith("h_") else ()
        return Series(name, role, x, _floats(found.mean), dashed=True, valid=_floats(valid))
    return Series(name, role, x, _floats(found.mean), _floats(found.low), _floats(found.high))


def similarity(grid: MetricGrid, axis: str) -> list[Series]:
    """The cosines of h, z and p along `axis`."""
    return [curve(grid, f"{space}_cosine", axis, name, space) for space, name in _SPACES]


@dataclass(frozen=True)
class Traced:
    """The layerwise part of a study, and how to speak of it.

    Attributes:
        grid: (prompt, step, layer, sublayer).
        removal: Whether the twin of each sublayer is nothing at all, instead of its pruned copy.
        dropped: Per sublayer the layers whose sublayer the pruned model lacks.
        kl: The metric that the KL estimate belongs to.
    """

    grid: MetricGrid
    removal: bool
    dropped: Mapping[str, Sequence[int]]
    kl: str = "kl_dense_pruned"

    @property
    def what(self) -> str:
        """The change that is made to one sublayer at a time."""
        return "removed" if self.removal else "replaced by its pruned twin"


def layerwise_similarity(traced: Traced) -> Figure:
    """Similarity per space over layers, attention and MLP side by side."""
    charts = [
        Chart(
            f"layerwise-{sublayer}",
            f"{title}, one layer at a time",
            "layer",
            _COSINE_LABEL,
            similarity(traced.grid.select(sublayer=sublayer), "layer"),
            log_complement=_COMPLEMENT,
            marks=traced.dropped.get(sublayer, ()),
            marks_name="dropped",
        )
        for sublayer, title in _SUBLAYERS.items()
    ]
    extra = (
        " Every sublayer of the dense model was tried this way; those that the pruned model really "
        "lacks are shaded."
        if traced.removal
        else ""
    )
    return Figure(
        "layerwise_similarity",
        "Which layer matters, and in which space",
        f"At each layer one sublayer is {traced.what} while everything before it stays dense: h is "
        "the state behind it, z and p are what the model would output if it stopped there. 1 means "
        f"unchanged.{extra}",
        charts,
        share_y=True,
    )


def layerwise_estimates(traced: Traced) -> Figure | None:
    """KL and 1 − cos p against their second-order estimates over layers; None if all are zero."""
    direction = "dense‖pruned" if traced.kl == "kl_dense_pruned" else "pruned‖dense"
    charts = []
    for sublayer, title in _SUBLAYERS.items():
        part = traced.grid.select(sublayer=sublayer)
        if not np.nansum(part[traced.kl]):
            continue
        charts += [
            Chart(
                f"estimate-{name}-{sublayer}",
                f"{title}: {label} and its estimate",
                "layer",
                unit,
                [
                    curve(part, metric, "layer", "exact", "p"),
                    curve(part, estimate, "layer", "estimate", "estimate", estimate=True),
                ],
                log=True,
            )
            for name, label, unit, metric, estimate in (
                ("kl", "KL", f"KL({direction}) (nats)", traced.kl, "kl_estimate"),
                (
                    "cos",
                    "1 − cos p",
                    "1 − cosine of p",
                    "p_one_minus_cosine",
                    "p_one_minus_cosine_estimate",
                ),
            )
        ]
    if not charts:
        return None
    return Figure(
        "layerwise_estimates",
        "Does the second-order theory hold here?",
        "The estimate is the variance of the logit change, Var(Δz)/2T², weighted by p for KL and by"
        " p² for 1 − cosine. It holds for small changes only: × marks layers where at least half of"
        " the positions are outside its range. Layers without any change have no place on a"
        " logarithmic axis.",
        charts,
    )


def accumulated_similarity(grid: MetricGrid) -> Figure:
    """Similarity and KL of the two whole models after each layer."""
    return Figure(
        "accumulated",
        "How the difference builds up through the layers",
        "Both models run on the same tokens, each with all of its changes; the states after each"
        " layer are compared. The last layer is what the models really output.",
        [
            Chart(
                "accumulated-similarity",
                "Similarity after each layer",
                "layer",
                _COSINE_LABEL,
                similarity(grid, "layer"),
                log_complement=_COMPLEMENT,
            ),
            Chart(
                "accumulated-kl",
                "Divergence after each layer",
                "layer",
                "KL (nats)",
                _divergences(grid, "layer"),
                log=True,
            ),
        ],
    )


def stepwise(grid: MetricGrid, first_divergence: list[int | None]) -> Figure:
    """Similarity and KL over decode steps, and where the free-running texts first differ.

    Args:
        grid: Teacher-forced metrics over (prompt, step).
        first_divergence: Per prompt the step of the first different token, None if there is none.
    """
    charts = [
        Chart(
            "stepwise-similarity",
            "Similarity at each step",
            "decode step (tokens)",
            _COSINE_LABEL,
            similarity(grid, "step"),
            log_complement=_COMPLEMENT,
        ),
        Chart(
            "stepwise-kl",
            "Divergence at each step",
            "decode step (tokens)",
            "KL (nats)",
            _divergences(grid, "step"),
            log=True,
        ),
        _first_divergence(first_divergence, len(grid.labels["step"])),
    ]
    return Figure(
        "stepwise",
        "What happens while decoding",
        "Similarity and KL are teacher-forced: both models read the dense model's own text, so "
        "every step compares like with like. The histogram is free-running: each model continues "
        "its own text, and a text counts at the first token where they differ.",
        charts,
    )


def _divergences(grid: MetricGrid, axis: str) -> list[Series]:
    return [
        curve(grid, "kl_dense_pruned", axis, "KL(dense‖pruned)", "kl"),
        curve(grid, "kl_pruned_dense", axis, "KL(pruned‖dense)", "reverse"),
        curve(grid, "kl_estimate", axis, "estimate", "estimate", estimate=True),
    ]


def _first_divergence(steps: list[int | None], length: int) -> Chart:
    width = max(1, -(-length // 24))
    differing = [step for step in steps if step is not None]
    edges = np.arange(0, max([length, *(step + 1 for step in differing)]) + width, width)
    counts, _ = np.histogram(differing, edges)
    same = len(steps) - len(differing)
    bins = "" if width == 1 else f", in bins of {width}"
    return Chart(
        "first-divergence",
        "First different token",
        f"decode step{bins}",
        "texts",
        [Series("texts", "generative", edges[:-1].tolist(), counts.tolist())],
        kind="histogram",
        note=f"{same} of {len(steps)} texts are identical to the end.",
    )


def _floats(values: object) -> list[float]:
    return np.asarray(values, float).tolist()
