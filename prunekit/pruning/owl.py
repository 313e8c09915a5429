"""OWL on a model: one pass of the dense model, then every layer its own sparsity or N of M."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from prunekit.models import blocks
from prunekit.models.architectures import Architecture
from prunekit.models.blocks import Keywords
from prunekit.models.weight_refs import WeightRef
from prunekit.process.progress import track
from prunekit.pruning import budgets, importance
from prunekit.pruning.budgets import Part
from prunekit.pruning.input_statistics import LayerCollector
from prunekit.pruning.recipes import OWL, Method, Wanda
from prunekit.pruning.stream import Stream

Layers = Sequence[Sequence[WeightRef]]


def budgeted(
    arch: Architecture,
    stream: Stream,
    layers: Layers,
    assigned: Mapping[str, Method],
    owl: OWL,
    *,
    progress: bool = True,
) -> dict[str, Method]:
    """The methods with the sparsity or pattern that each layer gets; the model stays as it is.

    Every method's own total stays: its matrices share out what they would lose alike.

    Args:
        arch: The dense model.
        stream: Its calibration batches at the first layer; used up.
        layers: The matrices to prune of every layer.
        assigned: The method of each of them.
        owl: How far budgets may differ.
        progress: Show a progress bar on a terminal.

    Returns:
        The method of each matrix; those that keep N of N are left out.
    """
    shares = _outlier_shares(arch, stream, layers, assigned, owl.outlier, progress=progress)
    found: dict[str, Method] = {}
    for method in dict.fromkeys(assigned.values()):
        mine = [[ref for ref in refs if assigned[ref.name] == method] for refs in layers]
        taking = [index for index, refs in enumerate(mine) if refs]
        wanted = budgets.sparsities(
            [shares[method, index] for index in taking],
            [_size(mine[index]) for index in taking],
            method.target.sparsity,
            owl.spread,
        )
        by_layer = [(mine[index], part) for index, part in zip(taking, wanted, strict=True)]
        found |= _shared_out(by_layer, method)
    return {name: found[name] for name in assigned if name in found}


def _size(refs: Sequence[WeightRef]) -> int:
    return sum(ref.matrix.numel() for ref in refs)


def _outlier_shares(
    arch: Architecture,
    stream: Stream,
    layers: Layers,
    assigned: Mapping[str, Method],
    outlier: float,
    *,
    progress: bool,
) -> dict[tuple[Method, int], float]:
    """`budgets.outlier_share` of each method's matrices in each layer."""
    shares = {}
    last = max(index for index, refs in enumerate(layers) if refs)
    for index in track(range(last + 1), "finding outliers", enabled=progress):
        refs = layers[index]
        collector = LayerCollector(refs, set(), stream.total)

        def observed(
            hidden: Tensor,
            batch: int,
            kwargs: Keywords,
            index: int = index,
            collector: LayerCollector = collector,
        ) -> Tensor:
            return collector.through(lambda: blocks.run_layer(arch, index, hidden, kwargs), batch)

        stream.advance(index, observed)
        collector.finish()
        for method in dict.fromkeys(assigned[ref.name] for ref in refs):
            scores = [
                importance.wanda(ref.matrix, collector.groups[ref.input_group].mean_square)
                for ref in refs
                if assigned[ref.name] == method
            ]
            shares[method, index] = budgets.outlier_share(scores, outlier)
    return shares


def _shared_out(
    layers: Sequence[tuple[Sequence[WeightRef], float]], method: Method
) -> dict[str, Method]:
    """The methods of one method's matrices, given the sparsity that each layer wants."""
    pattern = method.target
    size = sum(_size(refs) for refs, _ in layers)
    of = pattern.of
    if pattern.structured:
        units = [{ref.name: ref.matrix.numel() // of for ref in refs} for refs, _ in layers]
        parts = [
            Part(unit, wanted * of, of - 1) for unit, (_, wanted) in zip(units, layers, strict=True)
        ]
        gone = budgets.apportion(parts, size // of * (of - pattern.keep))
        return {
            name: replace(method, pattern=f"{of - steps}:{of}", sparsity=None)
            for name, steps in gone.items()
            if steps
        }
    by_row = isinstance(method, Wanda) and not method.variant
    parts = []
    exact: dict[str, tuple[float, int]] = {}
    for refs, wanted in layers:
        groups: dict[str, list[WeightRef]] = {}
        for ref in refs:
            groups.setdefault(ref.input_group if by_row else ref.name, []).append(ref)
        for members in groups.values():
            rows = {ref.name: ref.matrix.shape[0] if by_row else 1 for ref in members}
            whole = members[0].matrix.numel() // next(iter(rows.values()))
            parts.append(Part(rows, wanted * whole, whole - 1))
            exact |= {ref.name: (wanted, whole) for ref in members}
    steps = budgets.apportion(parts, int(pattern.sparsity * size + 1e-9))
    return {
        name: replace(method, sparsity=_sparsity(*exact[name], steps=steps[name]))
        for name in steps
        if steps[name]
    }


def _sparsity(wanted: float, whole: int, *, steps: int) -> float:
    """A sparsity that prunes `steps` of `whole`: the layer's own where it does.

    Matrices that share a sparsity are pruned together. The quarter outlives the division.
    """
    return wanted if int(wanted * whole + 1e-9) == steps else (steps + 0.25) / whole
