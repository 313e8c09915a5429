"""Full-vocabulary statistics and losses: logits, heads, vectors; ours and every peer.

    python -m bench.bench_metrics                       everything
    python -m bench.bench_metrics --quick               does it work?
    python -m bench.bench_metrics --research PATH       the research code's function as well

Logits are random, with a peaked distribution and a difference as pruning makes it. Results go to
results/<device>/metrics.csv.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence

import prunekernels
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import bounds, loss_peers, metric_peers
from bench.harness import (
    Absent,
    Case,
    Contender,
    Prepared,
    Session,
    Verdict,
    add_options,
    refusable,
)
from bench.metric_peers import Inputs, MetricPeer

VOCABULARIES = (32000, 50257, 128256, 152064, 262144)
PROBE = 4  # rows that are compared with float64


def logits(N: int, V: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Rows of logits that a model could have written, and what pruning could make of them."""
    base = 2.5 * torch.randn(N, V, device=device)
    other = base + 0.4 * torch.randn(N, V, device=device)
    labels = torch.randint(V, (N,), device=device)
    return Inputs(base.to(dtype), other.to(dtype), labels)


def hidden(N: int, D: int, V: int, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Hidden states and a head whose logits have the same spread."""
    base = torch.randn(N, D, device=device)
    other = base + 0.15 * torch.randn(N, D, device=device)
    head = 2.5 * torch.randn(V, D, device=device) / D**0.5
    labels = torch.randint(V, (N,), device=device)
    return Inputs(base.to(dtype), other.to(dtype), labels, head.to(dtype))


def contender(peer: MetricPeer, sets: Sequence[Inputs], cost: list[bounds.Cost]) -> Contender:
    """A peer on every set of inputs."""

    def prepare() -> Prepared:
        if not peer.on_cpu and sets[0].base.device.type == "cpu":
            raise Absent("measured on an NVIDIA GPU only")
        probe = sets[0].first(PROBE)

        def check(found: object) -> Verdict:
            return metric_peers.judge(peer, probe, found) if peer.returns else Verdict(True)

        return Prepared(
            [functools.partial(peer.run, inputs) for inputs in sets],
            check,
            cost,
            probe=functools.partial(peer.run, probe) if peer.mean else None,
            graph=peer.graph,
        )

    return Contender(peer.name, prepare)


def vectors(case: Case, dtype: torch.dtype, session: Session) -> list[Contender]:
    """Cosines of hidden states: ours against torch's."""
    N, D, device = int(case.sizes["N"]), int(case.sizes["D"]), session.device
    sets = []
    for _ in range(session.copies(2 * N * D * dtype.itemsize)):
        base = torch.randn(N, D, device=device)
        sets.append((base.to(dtype), (base + 0.1 * torch.randn(N, D, device=device)).to(dtype)))
    exact = F.cosine_similarity(sets[0][0].double(), sets[0][1].double(), dim=-1)

    def check(found: Tensor) -> Verdict:
        error = float((found.double() - exact).abs().max())
        return Verdict(error < 5e-3, f"error {error:.1e}")

    ways = {
        "prunekernels": lambda a, b: prunekernels.vector_stats(a, b, fields=("cosine",)).cosine,
        "prunekernels warp": refusable(
            lambda a, b: (
                prunekernels.vector_stats(a, b, fields=("cosine",), impl="triton_warp").cosine
            )
        ),
        "torch cosine": lambda a, b: F.cosine_similarity(a, b, dim=-1),
        "torch cosine fp32": lambda a, b: F.cosine_similarity(a.float(), b.float(), dim=-1),
    }
    cost = bounds.vector_stats(N, D, dtype.itemsize)

    def prepare(name: str) -> Prepared:
        return Prepared([functools.partial(ways[name], *pair) for pair in sets], check, cost)

    return [Contender(name, functools.partial(prepare, name)) for name in ways]


def make(case: Case, options: argparse.Namespace, session: Session) -> list[Contender]:
    """The contenders of one case."""
    dtype, device = getattr(torch, case.dtype), session.device
    sizes = {name: int(value) for name, value in case.sizes.items()}
    if case.op == "vector_stats":
        return vectors(case, dtype, session)
    if case.op == "head_pair_loss":
        return loss_peers.contenders(case, session)
    if case.op == "head_pair_stats":
        N, D, V = sizes["N"], sizes["D"], sizes["V"]
        count = min(4, session.copies(V * D * dtype.itemsize))
        sets = [hidden(N, D, V, dtype, device) for _ in range(count)]
        cost = bounds.head_pair_stats(N, D, V, dtype.itemsize)
        return [contender(peer, sets, cost) for peer in metric_peers.head_peers(options.research)]
    N, V = sizes["N"], sizes["V"]
    count = session.copies(2 * N * V * dtype.itemsize)
    sets = [logits(N, V, dtype, device) for _ in range(count)]
    torch._dynamo.reset()  # dynamo compiles a function for eight shapes, then no more
    found = []
    for peer in metric_peers.logit_peers(options.research):
        level = peer.name.split()[1] if peer.name.startswith("prunekernels") else "core"
        cost = bounds.pair_stats(N, V, dtype.itemsize, level)
        if peer.name == "copy":  # writes as much as it reads
            cost = [bounds.Cost(2 * cost[0].bytes)]
        elif not peer.name.startswith("prunekernels"):
            cost = [step._replace(slots=0.0) for step in cost]
        found.append(contender(peer, sets, cost))
    return found


def plan(session: Session) -> list[Case]:
    """Over the vocabulary at many rows, over rows at one vocabulary, heads, losses, vectors."""
    on_gpu = session.device.type == "cuda"
    rows, vocabularies = (2048, VOCABULARIES) if on_gpu else (16, VOCABULARIES)
    dtypes = ("bfloat16", "float32") if on_gpu else ("float32",)
    fewer = (1, 64) if on_gpu else (1,)
    heads = ((1, 4096), (64, 4096), (2048, 4096), (2048, 1024)) if on_gpu else ((16, 576),)
    # rows of one model's step: 30 layers × 2 sublayers
    widths = ((2048, 4096), (60, 4096)) if on_gpu else ((2048, 576),)
    head_vocabulary = 152064 if on_gpu else 49152
    losses = (2048, 4096, 128256) if on_gpu else (128, 576, 49152)
    if session.quick:
        rows, vocabularies, dtypes = rows // 8, (32000,), dtypes[:1]
        heads, widths, fewer = heads[:1], widths[:1], fewer[:1]
    cases = []
    if not on_gpu:  # one decode step of the embedded model: what the research code takes row by row
        cases.append(Case("pair_stats", "statistics", "float32", {"N": 64, "V": 49152}))
    for dtype in dtypes:
        for V in vocabularies:
            cases.append(Case("pair_stats", "statistics", dtype, {"N": rows, "V": V}))
        for N in fewer:
            cases.append(Case("pair_stats", "statistics", dtype, {"N": N, "V": 152064}))
    for N, D in heads:
        sizes = {"N": N, "D": D, "V": head_vocabulary}
        cases.append(Case("head_pair_stats", "statistics", dtypes[0], sizes))
    for kind in loss_peers.KINDS[: 1 if session.quick else None]:
        sizes = dict(zip("NDV", losses, strict=True))
        cases.append(Case("head_pair_loss", kind, dtypes[0], sizes))
    for N, D in widths:
        cases.append(Case("vector_stats", "statistics", dtypes[0], {"N": N, "D": D}))
    return cases


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    options = parser.parse_args()
    session = Session.begin(options, "metrics.csv")
    torch.manual_seed(0)
    cases = plan(session)
    return session.run([(case, functools.partial(make, case, options, session)) for case in cases])


if __name__ == "__main__":
    sys.exit(main())
