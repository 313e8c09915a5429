"""Pruning one decoder layer with random 16-bit weights: what `bench_prune --layer` measures.

Three ops, each unstructured and 2:4, over all seven matrices of a Llama layer:
`wanda_mask` chooses what stays, given the inputs' mean squares; `sparsegpt` prunes and updates,
given the inputs' Hessians; `wanda` is the whole of pruning, calibrated on a few tokens so that
the passes weigh little, because the research code has no function for the choice alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import bench_model, bench_select, bounds, research
from bench.harness import Case, Contender, Prepared, Session, Verdict
from prunekit.models.architectures import Architecture
from prunekit.models.weight_refs import WeightRef
from prunekit.pruning import Wanda, importance, prune_, sparsegpt
from prunekit.pruning.patterns import Pattern, parse
from prunekit.speed import timing

SHAPES = {"8B": "Llama-3-8B", "1B": "Llama-3.2-1B", "tiny": "tiny"}
OPS = ("wanda_mask", "sparsegpt", "wanda")
MODES = ("0.5", "2:4")
TOKENS = 16  # of the whole pruning's calibration
SAMPLES = 2
BLOCK, DAMPING = 128, 0.01  # SparseGPT's, in both codes


def pattern_of(case: Case) -> Pattern:
    """The case's pattern."""
    return parse("2:4") if case.mode == "2:4" else parse("unstructured", float(case.mode))


@dataclass(frozen=True)
class Group:
    """Matrices that read one input, and what is known of it.

    Attributes:
        refs: The matrices, (out, in) each.
        mean_square: (in,), float32.
        hessian: (in, in), float32.
    """

    refs: list[WeightRef]
    mean_square: Tensor
    hessian: Tensor


class Layer:
    """A model of one decoder layer with random weights, and statistics of random inputs."""

    def __init__(self, shape: str, device: torch.device) -> None:
        self.model = bench_model.load(
            SHAPES[shape], device, torch.bfloat16, num_hidden_layers=1, vocab_size=512
        )
        self.device = device
        found: dict[str, list[WeightRef]] = {}
        for ref in Architecture(self.model).weights(0):
            found.setdefault(ref.input_group or ref.name, []).append(ref)
        self.groups = [self._group(refs) for refs in found.values()]
        self.dense = [ref.matrix.clone() for ref in self.refs]
        self.tokens = torch.randint(512, (SAMPLES, TOKENS), device=device)

    def _group(self, refs: list[WeightRef]) -> Group:
        """Inputs whose features differ in size and are correlated with their neighbours."""
        width = refs[0].matrix.shape[1]
        rows = torch.randn(2 * width, width, device=self.device)
        rows = (rows + 0.7 * rows.roll(1, 1)) * torch.exp(torch.randn(width, device=self.device))
        hessian = torch.zeros(width, width, device=self.device)
        sparsegpt.accumulate_(hessian, rows.bfloat16())
        sparsegpt.mirror_(hessian)
        return Group(refs, hessian.diagonal() / len(rows), hessian / len(rows))

    @property
    def refs(self) -> list[WeightRef]:
        """Every matrix, group by group."""
        return [ref for group in self.groups for ref in group.refs]

    @property
    def elements(self) -> int:
        """Weights of the layer's matrices."""
        return sum(matrix.numel() for matrix in self.dense)

    def restore(self) -> None:
        """Dense weights again."""
        for ref, dense in zip(self.refs, self.dense, strict=True):
            ref.matrix.copy_(dense)

    def sampler(self, run: Callable[[], object]) -> tuple[Callable[[], float], str]:
        """Times `run` from dense weights each time; restoring them is not timed."""

        def sample() -> float:
            self.restore()
            return timing.stopwatch(run, self.device)

        return sample, "host"

    def probed(self, run: Callable[[], object]) -> list[Tensor]:
        """The matrices that `run` leaves, from dense weights."""
        self.restore()
        run()
        return [ref.matrix.clone() for ref in self.refs]


def choices(layer: Layer, case: Case) -> list[Contender]:
    """Masks from given mean squares: ours, torch's, and a copy of the weights beside them."""
    pattern = pattern_of(case)
    squares = [group.mean_square for group in layer.groups for _ in group.refs]
    pairs = list(zip(layer.dense, squares, strict=True))
    plain = torch_choice(pattern)
    wanted = [plain(importance.wanda(*pair)) for pair in pairs]

    def check(found: list[Tensor]) -> Verdict:
        wrong = sum(int((got != want).sum()) for got, want in zip(found, wanted, strict=True))
        return Verdict(wrong == 0, f"{wrong} of {layer.elements} differ from a stable sort's")

    def prepare(choose: Callable[[Tensor, Tensor], Tensor]) -> Prepared:
        cost = [bounds.Cost(3.0 * layer.elements)]  # 16 bits in, a byte out
        return Prepared([lambda: [choose(*pair) for pair in pairs]], check, cost, graph=False)

    def copied() -> Prepared:
        targets = [torch.empty_like(dense) for dense in layer.dense]
        both = list(zip(targets, layer.dense, strict=True))

        def equal(found: list[Tensor]) -> Verdict:
            return Verdict(all(map(torch.equal, found, layer.dense)), "copies")

        cost = [bounds.Cost(4.0 * layer.elements)]
        run = lambda: [target.copy_(source) for target, source in both]  # noqa: E731
        return Prepared([run], equal, cost, graph=False)

    ours = functools.partial(importance.wanda_mask, pattern=pattern)
    return [
        Contender("prunekit", functools.partial(prepare, ours)),
        Contender("torch sort", functools.partial(prepare, lambda *p: plain(importance.wanda(*p)))),
        Contender("copy", copied),
    ]


def torch_choice(pattern: Pattern) -> Callable[[Tensor], Tensor]:
    """The definition: a stable sort of every row or group."""
    if pattern.structured:
        return functools.partial(bench_select.sorted_groups, pattern.keep, pattern.of)
    return functools.partial(bench_select.sorted_rows, pattern.sparsity)


def exact_sparsegpt(matrix: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """SparseGPT in float64, column by column: the definition. Returns the pruned matrix."""
    weight, damped = matrix.double(), hessian.double()
    damped.diagonal().add_(DAMPING * damped.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    for start in range(0, weight.shape[1], BLOCK):
        now = slice(start, min(start + BLOCK, weight.shape[1]))
        factor, mask = upper[now, now], None
        if not pattern.structured:
            worth = (weight[:, now] / factor.diagonal()).square()
            mask = bench_select.sorted_rows(pattern.sparsity, worth.reshape(1, -1))
            mask = mask.view(worth.shape)
        block = bench_select.Block(weight[:, now], factor, mask)
        pruned, errors, _ = bench_select.column_by_column(pattern.keep, pattern.of, block)
        weight[:, now] = pruned
        weight[:, now.stop :] -= errors @ upper[now, now.stop :]
    return weight


def loss(matrix: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """Mean square of the output error that pruning leaves: tr((W−Ŵ)·H·(W−Ŵ)ᵀ)."""
    error = (matrix - pruned).double()
    return float((error @ hessian.double() * error).sum())


def sparsegpts(layer: Layer, case: Case, checkout: Path | None) -> list[Contender]:
    """From Hessians to pruned weights: ours, and the research code's class."""
    pattern = pattern_of(case)
    # the matrix with the fewest rows is done exactly: rows are what the definition is slow in
    rows = [matrix.shape[0] for matrix in layer.dense]
    judged = rows.index(min(rows))
    group = next(g for g in layer.groups if layer.refs[judged] in g.refs)
    dense = layer.dense[judged]
    least = loss(
        dense, exact_sparsegpt(dense, group.hessian, pattern).to(dense.dtype), group.hessian
    )

    def check(found: list[Tensor]) -> Verdict:
        ratio = loss(dense, found[judged], group.hessian) / least
        zeros = sum(int((matrix == 0).sum()) for matrix in found) / layer.elements
        right = abs(ratio - 1) < 0.02 and abs(zeros - 0.5) < 1e-3
        return Verdict(right, f"error {ratio:.4f} of float64's, {zeros:.4%} zeros")

    def ours() -> None:
        for group in layer.groups:
            upper = sparsegpt.inverse_factor(group.hessian, DAMPING).upper
            matrices = [ref.matrix for ref in group.refs]
            pruned = sparsegpt.sparsify(matrices, upper, pattern, BLOCK)
            for matrix, (values, _) in zip(matrices, pruned, strict=True):
                matrix.copy_(values)

    def prepare(run: Callable[[], None]) -> Prepared:
        probe = functools.partial(layer.probed, run)
        return Prepared([run], check, probe=probe, sampler=layer.sampler(run), graph=False)

    def theirs() -> Prepared:
        kind = research.sparsegpt_class(checkout, layer.device)
        keep, of = (pattern.of - pattern.keep, pattern.of) if pattern.structured else (0, 0)

        def run() -> None:
            for group in layer.groups:
                for ref in group.refs:
                    pruner = kind(linear(ref))
                    pruner.H = group.hessian.clone()
                    pruner.fasterprune(pattern.sparsity, keep, of, BLOCK, DAMPING)

        return prepare(run)

    return [
        Contender("prunekit", functools.partial(prepare, ours)),
        Contender("research code", theirs),
    ]


def linear(ref: WeightRef) -> nn.Linear:
    """The layer that holds a matrix of a Llama model."""
    assert isinstance(ref.module, nn.Linear)
    return ref.module


def whole(layer: Layer, case: Case, checkout: Path | None) -> list[Contender]:
    """Wanda with its calibration, by prunekit and by the research code."""
    pattern = pattern_of(case)
    method = Wanda(pattern="2:4") if pattern.structured else Wanda(sparsity=pattern.sparsity)
    plain = torch_choice(pattern)
    layer.restore()
    squares = dict(mean_squares(layer))
    wanted = [plain(importance.wanda(ref.matrix, squares[ref.name])) for ref in layer.refs]

    def check(found: list[Tensor]) -> Verdict:
        # sums in another order move what lies near the threshold
        kept = sum(int(((got != 0) != want).sum()) for got, want in zip(found, wanted, strict=True))
        share = kept / layer.elements
        return Verdict(share < 0.01, f"{share:.3%} chosen otherwise than by float64 sums")

    def prepare(run: Callable[[], object]) -> Prepared:
        probe = functools.partial(layer.probed, run)
        return Prepared([run], check, probe=probe, sampler=layer.sampler(run), graph=False)

    def ours() -> None:
        prune_(layer.model, method, layer.tokens, batch_size=SAMPLES, progress=False)

    def theirs() -> Prepared:
        functions = research.pruning_functions(layer.model, layer.tokens, checkout)
        return prepare(functions["wanda 2:4" if pattern.structured else "wanda"])

    return [
        Contender("prunekit", functools.partial(prepare, ours)),
        Contender("research code", theirs),
    ]


@torch.no_grad()
def mean_squares(layer: Layer) -> Iterator[tuple[str, Tensor]]:
    """(name, (in,) float64 means of the squared inputs) of every matrix, by hooks."""
    seen: dict[str, Tensor] = {}
    handles = [
        linear(ref).register_forward_pre_hook(
            lambda _, inputs, name=ref.name: seen.update({name: inputs[0].flatten(0, -2)})
        )
        for ref in layer.refs
    ]
    layer.model(layer.tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    for name, inputs in seen.items():
        yield name, inputs.double().square().mean(0)


def run(session: Session, shape: str, checkout: Path | None) -> int:
    """Measure every op and pattern of one layer; returns the process's exit status."""
    torch.manual_seed(0)
    layers: list[Layer] = []  # built when the first case needs it

    def make(case: Case) -> list[Contender]:
        if not layers:
            layers.append(Layer(shape, session.device))
        if case.op == "wanda_mask":
            layers[0].restore()
            return choices(layers[0], case)
        return (sparsegpts if case.op == "sparsegpt" else whole)(layers[0], case, checkout)

    known = bench_model.SHAPES[SHAPES[shape]]
    sizes = {"D": known["hidden_size"], "F": known["intermediate_size"]}
    cases = [Case(op, mode, "bfloat16", sizes) for op in OPS for mode in MODES]
    return session.run([(case, functools.partial(make, case)) for case in cases])
