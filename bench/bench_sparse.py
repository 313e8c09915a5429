"""Linear layers with pruned weights: ours and every peer, over tokens, shapes and sparsities.

    python -m bench.bench_sparse             everything; small shapes on a CPU
    python -m bench.bench_sparse --quick     does it work?
    python -m bench.bench_sparse --minutes 9 --pattern 2:4      stop in time; call again to go on

Weights and activations are random, the same for all. Results go to results/<device>/sparse.csv.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from prunekernels import nm_mask, rowwise_mask
from torch import Tensor

from bench import bounds, peers
from bench.harness import Case, Contender, Prepared, Session, Verdict, add_options
from bench.peers import LINEAR, Layer, LinearPeer
from bench.quantized_peers import WEIGHT_ONLY

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
#: Rows × columns of the matrices of one layer.
SHAPES = {
    "Llama-3-8B": ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    "Llama-3-70B": ((8192, 8192), (28672, 8192), (8192, 28672)),
    "Qwen2.5-7B": ((3584, 3584), (18944, 3584), (3584, 18944)),
    "SmolLM2-135M": ((576, 576), (1536, 576), (576, 1536)),
}
SPARSITIES = (0.5, 0.6, 0.7, 0.8)
#: For what is compiled, with tuning, for every M and shape.
FEW_TOKENS, FEW_SHAPES = (1, 16, 4096), ((4096, 4096), (14336, 4096))


class Weights:
    """Copies of one pruned weight, and the layers that peers made of them.

    Args:
        case: Shape, sparsity and pattern.
        dtype: Of the weight.
        device: Where it is.
        count: How many layers of so many bytes rotate.
    """

    def __init__(
        self,
        case: Case,
        dtype: torch.dtype,
        device: torch.device,
        count: Callable[[int], int],
    ) -> None:
        self._new = functools.partial(self._pruned, case, dtype, device)
        self._count = count
        self.copies = [self._new()]
        self._layers: dict[str, list[Layer]] = {}

    @staticmethod
    def _pruned(case: Case, dtype: torch.dtype, device: torch.device) -> Tensor:
        rows, columns = int(case.sizes["N"]), int(case.sizes["K"])
        weight = torch.randn(rows, columns, device=device) / columns**0.5
        size = weight.abs()
        two_four = case.mode == "2:4"
        keep = nm_mask(size, 2, 4) if two_four else rowwise_mask(size, case.sizes["sparsity"])
        return (weight * keep).to(dtype)

    def layers(self, peer: LinearPeer, tokens: int) -> list[Layer]:
        """The layer that `peer` makes of as many copies as it needs; kept: packing takes long."""
        if peer.name not in self._layers:
            layers = [peer.build(self.copies[0], tokens)]
            for index in range(1, self._count(layers[0].held)):
                if index == len(self.copies):
                    self.copies.append(self._new())
                # the first alone is checked
                layers.append(peer.build(self.copies[index], tokens)._replace(exact=None))
            self._layers[peer.name] = layers
        return self._layers[peer.name]


def check(layer: Layer, weight: Tensor, x: Tensor) -> Callable[[Tensor], Verdict]:
    """Compares the first outputs with float64, allowing twice what the dense layer errs."""
    some = x[:32] if layer.rounds is None else layer.rounds(x[:32])
    exact = some.double() @ (weight if layer.exact is None else layer.exact).double().t()
    held = weight if layer.exact is None else layer.exact.to(x.dtype)
    plain = F.linear(some.to(x.dtype), held).double()
    allowed = 2 * (plain - exact).abs().max() + 1e-6 * exact.abs().max()

    def judge(found: Tensor) -> Verdict:
        if tuple(found.shape) != (x.shape[0], weight.shape[0]):
            return Verdict(False, f"shape {tuple(found.shape)}")
        error = (found[:32].double() - exact).abs().max()
        note = f"error {float(error):.2g}, allowed {float(allowed):.2g}"
        note += f", {layer.note}" * bool(layer.note)
        return Verdict(bool(error <= allowed) and bool(found.isfinite().all()), note)

    return judge


def contenders(weights: Weights, case: Case, dtype: torch.dtype) -> list[Contender]:
    """Every peer that this case is for."""
    M, N, K = (int(case.sizes[name]) for name in "MNK")
    device = weights.copies[0].device
    x = torch.randn(M, K, device=device).to(dtype)
    # nothing is compiled for a CPU
    long = device.type == "cuda" and not (M in FEW_TOKENS and (N, K) in FEW_SHAPES)

    def prepare(peer: LinearPeer) -> Prepared:
        layers = weights.layers(peer, M)
        kind = layers[0].kind(x) if layers[0].kind else peer.kind
        taken = x.to(layers[0].takes or x.dtype)
        return Prepared(
            [lambda layer=layer: layer.apply(taken) for layer in layers],
            check(layers[0], weights.copies[0], taken),
            bounds.linear(kind, M, N, K, case.sizes["sparsity"], x.element_size()),
            layers[0].held,
            graph=peer.graph,
        )

    return [
        Contender(peer.name, functools.partial(prepare, peer))
        for peer in (*LINEAR, *WEIGHT_ONLY)
        if case.mode in peer.patterns and peer.most_tokens >= M and not (peer.few and long)
    ]


def plan(options: argparse.Namespace, session: Session) -> list[Case]:
    """The cases, those of one weight one after the other."""
    dtype = "bfloat16"
    on_gpu = session.device.type == "cuda"
    models = options.model or (list(SHAPES)[:3] if on_gpu else list(SHAPES)[3:])
    shapes: Sequence[tuple[int, int]] = [shape for name in models for shape in SHAPES[name]]
    tokens: Sequence[int] = options.tokens or (TOKENS if on_gpu else TOKENS[::3])
    sparsities: Sequence[float] = options.sparsity or (SPARSITIES if on_gpu else SPARSITIES[::2])
    if session.quick:
        shapes, tokens, sparsities = shapes[:1], options.tokens or (1, 64), sparsities[:2]
    cases = []
    for pattern in options.pattern:
        for N, K in dict.fromkeys(shapes):
            for sparsity in (0.5,) if pattern == "2:4" else sparsities:
                for M in tokens:
                    sizes = {"M": M, "N": N, "K": K, "sparsity": sparsity}
                    cases.append(Case("linear", pattern, dtype, sizes))
    return cases


def maker(session: Session) -> Callable[[Case], list[Contender]]:
    """A function that makes a case's contenders; the copies of one weight serve every M."""
    held: dict[tuple[object, ...], Weights] = {}

    def make(case: Case) -> list[Contender]:
        N, K, sparsity = int(case.sizes["N"]), int(case.sizes["K"]), case.sizes["sparsity"]
        key = (case.mode, N, K, sparsity)
        if key not in held:
            held.clear()  # one shape at a time: copies are large
            torch._dynamo.reset()  # dynamo compiles a function for eight shapes, then no more
            held[key] = Weights(case, torch.bfloat16, session.device, session.copies)
        return contenders(held[key], case, torch.bfloat16)

    return make


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--model", nargs="*", choices=SHAPES, help="whose shapes")
    parser.add_argument("--pattern", nargs="*", choices=peers.PATTERNS, default=peers.PATTERNS)
    parser.add_argument("--tokens", nargs="*", type=int, help="M")
    parser.add_argument("--sparsity", nargs="*", type=float, help="of unstructured weights")
    options = parser.parse_args()
    session = Session.begin(options, "sparse.csv")
    torch.manual_seed(0)
    make = maker(session)
    return session.run([(case, functools.partial(make, case)) for case in plan(options, session)])


if __name__ == "__main__":
    sys.exit(main())
