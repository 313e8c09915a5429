"""Old and new kernels side by side: one draw decides which of them stays.

    python -m bench.bench_candidates             about a minute on a GPU, after compiling
    python -m bench.bench_candidates --quick     does it work?
    python -m bench.bench_candidates --verdict   only say what candidates.csv decides

A kernel that has not run on hardware runs by name alone. Here it meets the kernel that `auto`
takes, on the same operands, in turns, beside the dense product or torch. Results go to
results/<device>/candidates.csv; the verdict is a line per case.
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench import bench_block, bench_metrics, bench_select, bench_sparse, loss_peers
from bench.harness import Case, Contender, Session, add_options, say

#: The matrices of Llama-3-8B that take most of its time.
SHAPES = ((14336, 4096), (4096, 14336), (4096, 4096))


class Draw(NamedTuple):
    """A new kernel for one place, and those that it would replace.

    Attributes:
        op: Op of the cases.
        mode: Their mode.
        old: Providers that `auto` may take today.
        new: The provider that has not run on hardware.
        beside: Providers that both are measured against.
    """

    op: str
    mode: str
    old: tuple[str, ...]
    new: str
    beside: tuple[str, ...]


DRAWS = (
    Draw(
        "linear",
        "2:4",
        ("2:4 mma_sp", "2:4 wgmma_sp"),
        "2:4 wgmma_tma",
        ("dense", "cuSPARSELt best", "TileLang gemm_sp"),
    ),
    *(
        Draw(
            "linear",
            "2:4",
            ("dense", "2:4 mma_sp", f"{name} auto"),
            f"{name} mma_sp",
            beside,
        )
        for name, beside in (
            ("2:4-int8", ("int8 weight-only", "int8 mma_sync")),
            ("2:4-int4", ("int4 weight-only", "torchao int4 preshuffled", "int4 mma_sync")),
        )
    ),
    Draw(
        "linear",
        "2:4",
        ("2:4-fp8 mma_sp", "2:4-fp8 auto"),
        "2:4-fp8 x fp8 mma_sp",
        ("dense", "int8 weight-only"),
    ),
    Draw("block", "2:4", ("2:4 auto", "2:4 wgmma_sp"), "2:4 wgmma_tma", ("dense",)),
    Draw("linear", "unstructured", ("dense",), "bitmap mma", ("bitmap triton",)),
    *(
        Draw(
            "pair_stats",
            "statistics",
            (f"prunekernels {level}",),
            f"prunekernels {level} warp",
            ("copy",),
        )
        for level in ("core", "KL", "full")
    ),
    Draw(
        "vector_stats",
        "statistics",
        ("prunekernels",),
        "prunekernels warp",
        ("torch cosine fp32",),
    ),
    *(
        Draw("head_pair_loss", kind, ("prunekernels",), "prunekernels triton", beside)
        for kind, beside in (("kl", ("torch",)), ("js", ("torch", "Liger fused jsd")))
    ),
    Draw("rowwise_mask", "0.5", ("prunekernels",), "prunekernels words", ("torch kthvalue",)),
    *(
        Draw("sparsegpt_update", mode, ("prunekernels",), "prunekernels thread", ("torch columns",))
        for mode in ("mask", "2:4")
    ),
)


def plan(session: Session) -> list[Case]:
    """The cases of every draw, those of one weight one after the other."""
    if session.quick:
        small = {"N": 64, "K": 256}
        return [
            Case("linear", "2:4", "bfloat16", {"M": 1, **small, "sparsity": 0.5}),
            Case("linear", "unstructured", "bfloat16", {"M": 1, **small, "sparsity": 0.5}),
            *bench_block.plan(session),
            Case("pair_stats", "statistics", "float32", {"N": 4, "V": 1000}),
            Case("vector_stats", "statistics", "float32", {"N": 4, "D": 64}),
            *(
                Case("head_pair_loss", kind, "float32", {"N": 4, "D": 64, "V": 1000})
                for kind in loss_peers.KINDS
            ),
            Case("rowwise_mask", "0.5", "bfloat16", small),
            *(
                Case("sparsegpt_update", mode, "float32", {"R": 64, "C": 32})
                for mode in ("mask", "2:4")
            ),
        ]
    cases = []
    for N, K in SHAPES:
        for M in (1, 16, 64, 256, 1024, 4096):
            sizes = {"M": M, "N": N, "K": K, "sparsity": 0.5}
            cases.append(Case("linear", "2:4", "bfloat16", sizes))
    cases += bench_block.plan(session)
    for sparsity in bench_sparse.SPARSITIES:
        for M in (1, 16):
            sizes = {"M": M, "N": 14336, "K": 4096, "sparsity": sparsity}
            cases.append(Case("linear", "unstructured", "bfloat16", sizes))
    for dtype, N, V in (
        *(("bfloat16", rows, 152064) for rows in (2048, 64, 1)),
        ("float32", 2048, 152064),
        ("bfloat16", 2048, 32000),
    ):
        cases.append(Case("pair_stats", "statistics", dtype, {"N": N, "V": V}))
    for N in (2048, 60):
        cases.append(Case("vector_stats", "statistics", "bfloat16", {"N": N, "D": 4096}))
    for kind in loss_peers.KINDS:
        sizes = {"N": 2048, "D": 4096, "V": 128256}
        cases.append(Case("head_pair_loss", kind, "bfloat16", sizes))
    for N, K in SHAPES:
        cases.append(Case("rowwise_mask", "0.5", "bfloat16", {"N": N, "K": K}))
    for mode in ("mask", "2:4"):
        for rows in (6144, 28672):
            cases.append(Case("sparsegpt_update", mode, "float32", {"R": rows, "C": 128}))
    return cases


def draws(case: Case) -> list[Draw]:
    """The draws that a case belongs to."""
    return [draw for draw in DRAWS if (draw.op, draw.mode) == (case.op, case.mode)]


def maker(options: argparse.Namespace, session: Session) -> Callable[[Case], Sequence[Contender]]:
    """What makes a case's contenders: those of its draws."""
    linear = bench_sparse.maker(session)

    def make(case: Case) -> Sequence[Contender]:
        names = {name for draw in draws(case) for name in (*draw.old, draw.new, *draw.beside)}
        found: Sequence[Contender]
        if case.op == "linear":
            found = linear(case)
        elif case.op == "block":
            found = bench_block.make(session, case)
        elif case.op in ("rowwise_mask", "sparsegpt_update"):
            found = bench_select.contenders(case, session)
        else:
            found = bench_metrics.make(case, options, session)
        return [contender for contender in found if contender.provider in names]

    return make


def verdicts(path: Path) -> list[str]:
    """A line per case and draw: the times of old and new, and which of them stays."""
    times: dict[tuple[str, ...], dict[str, float]] = {}
    said, troubles = [], []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            case = (row["op"], row["mode"], row["dtype"], row["shape"])
            found = times.setdefault(case, {})
            if row["status"] == "ok":
                found[row["provider"]] = float(row["p50_ms"])
            elif row["status"] != "absent":
                what = f"{row['provider']} at {row['shape']}"
                troubles.append(f"{what}: {row['status']}, {row['note']}")
    for case, found in times.items():
        for draw in DRAWS:
            rivals = [(found[name], name) for name in draw.old if name in found]
            if (draw.op, draw.mode) != case[:2] or draw.new not in found or not rivals:
                continue
            (old, old_name), new = min(rivals), found[draw.new]
            said.append(
                f"{' '.join(case)}: {old_name} {1000 * old:.1f} µs, {draw.new} {1000 * new:.1f} µs "
                f"({old / new:.2f}×): {draw.new if new < old else old_name} stays"
            )
    return said + troubles


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    parser.add_argument("--verdict", action="store_true", help="measure nothing, read the file")
    options = parser.parse_args()
    session = Session.begin(options, "candidates.csv")
    torch.manual_seed(0)
    status = 0
    if not options.verdict:
        make = maker(options, session)
        cases = plan(session)
        status = session.run([(case, functools.partial(make, case)) for case in cases])
    if options.compile is None and session.path.is_file():
        for line in verdicts(session.path):
            say(line)
    return status


if __name__ == "__main__":
    sys.exit(main())
