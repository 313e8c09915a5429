"""Orders the inputs of a matrix and folds the order into the matrices before it.

What enters a gated MLP's last matrix is activation(gate(x)) · up(x), element by element: rows of
gate and up in another order give the same elements in that order, and a stock model holds it. All
other matrices read the residual stream or a head's values, in an order that other layers or the
heads share.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from prunekit.errors import PrunekitError
from prunekit.models.architectures import Architecture
from prunekit.models.weight_refs import WeightRef
from prunekit.pruning import importance
from prunekit.pruning.input_statistics import InputStatistics
from prunekit.pruning.permutation import permutation
from prunekit.pruning.recipes import RIA, Method


def permutes(refs: Iterable[WeightRef], assigned: Mapping[str, Method]) -> bool:
    """Whether a method of these matrices orders inputs."""
    return any(_asks(assigned[ref.name]) for ref in refs)


def check_foldable(arch: Architecture, assigned: Mapping[str, Method]) -> None:
    """Raise a PrunekitError where a method is to order inputs and no matrix of it allows that."""
    last = {
        f"{path}.{names.down}"
        for layer in range(len(arch.layers))
        for path, names in arch.gated_mlps(layer)
    }
    for method in dict.fromkeys(filter(_asks, assigned.values())):
        its = [name for name, other in assigned.items() if other == method]
        if not last.intersection(its):
            raise PrunekitError(
                f"RIA can't permute the inputs of {its[0]} or its rule's other matrices: only the "
                "last matrix of a gated MLP has inputs that nothing else reads; leave out permute"
            )


def fold_permutations_(
    arch: Architecture,
    layer: int,
    refs: Sequence[WeightRef],
    assigned: Mapping[str, Method],
    statistics: Mapping[str, InputStatistics],
) -> None:
    """Order the inputs that a layer's methods ask for; statistics, gate and up follow."""
    if not permutes(refs, assigned):
        return
    pruned = {ref.name: ref for ref in refs}
    matrices = {ref.name: ref.matrix for ref in arch.weights(layer)}
    for path, names in arch.gated_mlps(layer):
        down = pruned.get(f"{path}.{names.down}")
        method = None if down is None else assigned[down.name]
        if down is None or not isinstance(method, RIA) or not method.permute:
            continue
        inputs, pattern = statistics[down.input_group], method.target
        scores = importance.relative(down.matrix, inputs.mean_square, method.power)
        order = permutation(scores, pattern.keep, pattern.of)
        down.matrix.copy_(down.matrix[:, order])
        inputs.permute_(order)
        for name in (names.gate, names.up):
            matrix = matrices[f"{path}.{name}"]
            matrix.copy_(matrix[order])
            bias: Tensor | None = arch.model.get_submodule(f"{path}.{name}").bias
            if bias is not None:
                bias.data.copy_(bias.data[order])


def _asks(method: Method) -> bool:
    return isinstance(method, RIA) and method.permute
