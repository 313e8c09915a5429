"""Every sensible tile of the 2:4 tensor-core kernels, to find what their tables should say.

    python -m bench.bench_sweep                          both kernels, three shapes
    python -m bench.bench_sweep --kernel wgmma_tma --tokens 64 1024 --minutes 5
    python -m bench.bench_sweep --quick                  does it work?

A row per configuration: `mma_sp (row tiles, token tiles, stages, splits, warps)` and
`wgmma_tma (warps, token tiles, splits, group)`, beside the dense layer, checked like any other
layer. Results go to results/<device>/sweep.csv; the last lines name the best of each case and what
`two_four/tuning.py` chooses.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import prunekernels
import torch
from prunekernels.sparse.two_four.tuning import (
    MmaConfig,
    WgmmaConfig,
    sparse24_mma,
    sparse24_wgmma,
)
from torch import Tensor

from bench import bounds
from bench.bench_sparse import Weights, check
from bench.harness import Absent, Case, Contender, Prepared, Session, add_options, say
from bench.peers import LINEAR, Layer, LinearPeer, need_gpu

SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096))
TOKENS = {"mma_sp": (1, 8, 16, 32, 64), "wgmma_tma": (32, 64, 128, 256, 1024, 4096)}


def mma_configurations(tokens: int) -> Iterator[MmaConfig]:
    """Tiles of `mma_sp` for so many tokens; those of four row tiles spill."""
    tiles = next((t for t in (1, 2, 4) if 8 * t >= tokens), 8)
    for rows, stages, splits, warps in itertools.product(
        (1, 2), (2, 4), (1, 2, 3, 4, 6, 8), (4, 8)
    ):
        # a ring of 64 tokens and four slots leaves room for one program
        if tiles < 8 or stages == 2:
            yield MmaConfig(rows, tiles, stages, splits, warps)


def wgmma_configurations(tokens: int) -> Iterator[WgmmaConfig]:
    """Tiles of `wgmma_tma` for so many tokens."""
    for warps, tiles in itertools.product((8, 16), (4, 8, 16)):
        if 8 * tiles >= 2 * max(tokens, 32) or (tiles < 16 and tokens > 128):
            continue
        for splits in (1, 2, 3, 4, 6, 8) if tokens <= 256 else (1, 2):
            yield WgmmaConfig(warps, tiles, splits, 0)
        if tokens > 8 * tiles:
            yield from (WgmmaConfig(warps, tiles, 1, group) for group in (4, 8, 16))


def configurations(kernel: str, tokens: int) -> list[MmaConfig] | list[WgmmaConfig]:
    """The tiles of a kernel that are tried."""
    return list(mma_configurations(tokens) if kernel == "mma_sp" else wgmma_configurations(tokens))


def chosen(kernel: str, tokens: int, rows: int, columns: int, processors: int) -> tuple[int, ...]:
    """What the table says."""
    table = sparse24_mma if kernel == "mma_sp" else sparse24_wgmma
    return tuple(table(tokens, rows, columns, False, processors))


def _layer(kernel: str, config: Any, weight: Tensor, tokens: int) -> Layer:
    need_gpu(weight)
    import importlib

    name = {"mma_sp": "mma", "wgmma_tma": "wgmma_tma"}[kernel]
    module = importlib.import_module(f"prunekernels.sparse.two_four.{name}")
    if torch.cuda.get_device_capability(weight.device) not in module.CAPABILITIES:
        raise Absent(f"{kernel}: not on this GPU")
    packed = prunekernels.sparse24_pack(weight)
    parts = packed.packed, None, weight.shape[0], None, "none"
    return Layer(lambda x: module.launch(x, *parts, config), packed.nbytes)


def contenders(weights: Weights, case: Case) -> list[Contender]:
    """The dense layer, and a kernel with each of its configurations."""
    M, N, K = (int(case.sizes[name]) for name in "MNK")
    x = torch.randn(M, K, device=weights.copies[0].device).to(weights.copies[0].dtype)

    def prepare(kind: str, build: Callable[[Tensor, int], Layer]) -> Prepared:
        # layers are made for this case alone: there are too many configurations to keep them
        layers = [build(copy, M) for copy in weights.copies]
        return Prepared(
            [functools.partial(layer.apply, x) for layer in layers],
            check(layers[0], weights.copies[0], x),
            bounds.linear(kind, M, N, K, 0.5),
            layers[0].held,
        )

    dense: LinearPeer = LINEAR[0]
    found = [Contender(dense.name, functools.partial(prepare, "dense", dense.build))]
    for config in configurations(case.mode, M):
        build = functools.partial(_layer, case.mode, config)
        name = f"{case.mode} {tuple(config)}"
        found.append(Contender(name, functools.partial(prepare, "24 wgmma", build)))
    return found


def maker(session: Session) -> Callable[[Case], Sequence[Contender]]:
    """What makes a case's contenders; cases of one shape share the weights."""
    held: dict[tuple[int, int], Weights] = {}

    def make(case: Case) -> Sequence[Contender]:
        N, K = int(case.sizes["N"]), int(case.sizes["K"])
        if (N, K) not in held:
            held.clear()
            count = session.copies(bounds.packed24_bytes(N, K))
            pruned = Case("linear", "2:4", "bfloat16", case.sizes)
            held[N, K] = Weights(pruned, torch.bfloat16, session.device, count)
        return contenders(held[N, K], case)

    return make


def plan(options: argparse.Namespace, session: Session) -> list[Case]:
    """The cases, those of one weight one after the other."""
    cases = []
    for N, K in ((64, 256),) if session.quick else SHAPES:
        for kernel in options.kernel:
            for M in options.tokens or (TOKENS[kernel][:1] if session.quick else TOKENS[kernel]):
                sizes = {"M": M, "N": N, "K": K, "sparsity": 0.5}
                cases.append(Case("linear", kernel, "bfloat16", sizes))
    return cases


def best(rows: Sequence[dict[str, str]], processors: int) -> list[str]:
    """A line per case: the fastest configuration, and the one of the table beside it."""
    lines = []
    cases = {(row["mode"], row["shape"]) for row in rows}
    for kernel, shape in sorted(cases):
        times = {
            row["provider"]: float(row["p50_ms"])
            for row in rows
            if (row["mode"], row["shape"], row["status"]) == (kernel, shape, "ok")
        }
        tried = {name: ms for name, ms in times.items() if name.startswith(f"{kernel} ")}
        if not tried or "dense" not in times:
            continue
        M, N, K = (int(part.split("=")[1]) for part in shape.split()[:3])
        table = f"{kernel} {chosen(kernel, M, N, K, processors)}"
        first = min(tried, key=tried.__getitem__)
        gain = {name: times["dense"] / ms for name, ms in tried.items()}
        said = f"{gain[table]:.2f}" if table in gain else "not tried"
        lines.append(f"{shape}: best {first} {gain[first]:.2f}× dense; table {table} {said}")
    return lines


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--kernel", nargs="*", choices=TOKENS, default=list(TOKENS))
    parser.add_argument("--tokens", nargs="*", type=int, help="M")
    options = parser.parse_args()
    session = Session.begin(options, "sweep.csv")
    torch.manual_seed(0)
    make = maker(session)
    status = session.run([(case, functools.partial(make, case)) for case in plan(options, session)])
    if session.device.type == "cuda" and session.path.is_file():
        processors = torch.cuda.get_device_properties(session.device).multi_processor_count
        for line in best(session._rows(), processors):
            say(line)
    return status


if __name__ == "__main__":
    sys.exit(main())
