"""Choosing which weights go, and SparseGPT's update of a block of columns: ours against torch.

    python -m bench.bench_select             matrices of Llama-3-8B on a GPU, smaller ones on a CPU
    python -m bench.bench_select --quick     does it work?

Every mask must be the one that a stable sort gives; updates must be those of a plain loop over
columns in float64. Results go to results/<device>/select.csv.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from prunekernels import nm_mask, rowwise_mask, sparsegpt_update
from torch import Tensor

from bench import bounds
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

Select = Callable[[Tensor], Tensor]


def sorted_groups(keep: int, of: int, scores: Tensor) -> Tensor:
    """N:M by a stable sort of every group: the definition."""
    groups = scores.view(-1, of)
    best = groups.sort(dim=-1, descending=True, stable=True).indices[:, :keep]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).view_as(scores)


def sorted_rows(sparsity: float, scores: Tensor) -> Tensor:
    """Row-wise selection by a stable sort: the definition."""
    keep = scores.shape[-1] - int(sparsity * scores.shape[-1] + 1e-9)
    best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :keep]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def topk_groups(keep: int, of: int, scores: Tensor) -> Tensor:
    """N:M by topk of every group, as pruning scripts do it; ties as they fall."""
    groups = scores.view(-1, of)
    best = groups.topk(keep, -1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True).view_as(scores)


def threshold_rows(sparsity: float, scores: Tensor) -> Tensor:
    """Row-wise selection by a threshold per row, which removes too many where scores tie."""
    if scores.dtype != torch.float32:
        raise Absent("a threshold per row: scores of 16 bits tie, and it removes all that do")
    gone = int(sparsity * scores.shape[-1] + 1e-9)
    return scores > scores.kthvalue(gone, -1, keepdim=True).values


class Block(NamedTuple):
    """Operands of an update: (R, C) weights, column-major as pruning has them, U, what to keep."""

    weight: Tensor
    upper: Tensor
    mask: Tensor | None


def blocks(rows: int, columns: int, count: int, masked: bool, device: torch.device) -> list[Block]:
    """Random weights over one inverse factor, of correlated inputs."""
    mixing = torch.eye(columns, device=device) + torch.randn(columns, columns, device=device) / 8
    inputs = (torch.randn(3 * columns, columns, device=device) @ mixing).double()
    upper = torch.linalg.cholesky(torch.linalg.inv(inputs.t() @ inputs), upper=True).float()

    def block() -> Block:
        weight = torch.randn(columns, rows, device=device).t()
        keep = torch.rand(columns, rows, device=device).t() < 0.5 if masked else None
        return Block(weight, upper, keep)

    return [block() for _ in range(count)]


def column_by_column(keep: int, of: int, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """The update as the paper writes it, an outer product per column: the definition."""
    weight, upper, mask = block
    left, errors = weight.clone(), torch.zeros_like(weight)
    kept = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    for i in range(weight.shape[1]):
        if mask is None and i % of == 0:
            group = slice(i, i + of)
            scores = (left[:, group] / upper.diagonal()[group]).square().contiguous()
            kept[:, group] = sorted_groups(keep, of, scores)
        errors[:, i] = torch.where(kept[:, i], 0.0, left[:, i] / upper[i, i])
        left[:, i + 1 :] -= errors[:, i, None] * upper[i, i + 1 :]
    return torch.where(kept, left, 0.0), errors, kept


def updates(case: Case, session: Session) -> list[Contender]:
    """The update by the kernel or its torch twin, by the plain loop, and a row per thread."""
    rows, columns = (int(case.sizes[name]) for name in "RC")
    masked = case.mode == "mask"
    keep, of = (0, 0) if masked else (int(part) for part in case.mode.split(":"))
    count = session.copies((5.0 if masked else 4.0) * rows * columns)
    sets = blocks(rows, columns, count, masked, session.device)
    exact = column_by_column(keep, of, Block(sets[0][0].double(), sets[0][1].double(), sets[0][2]))
    # weights in, weights, errors and a mask out, a mask in; a multiply-add per pair of columns
    moved = (14.0 if masked else 13.0) * rows * columns
    cost = [bounds.Cost(moved, slots=rows * columns**2 / 2)]

    def check(found: tuple[Tensor, Tensor, Tensor]) -> Verdict:
        # a near tie may fall otherwise in float32, and its row with it
        same = (found[2] == exact[2]).all(-1)
        others = int((~same).sum())
        error = max(
            float((got.double() - want)[same].norm() / want[same].norm())
            for got, want in zip(found[:2], exact[:2], strict=True)
        )
        note = f"relative error {error:.1e}, {others} of {rows} rows chose otherwise"
        return Verdict(error < 1e-4 and others <= rows / 500, note)

    def prepare(update: Callable[[Block], tuple[Tensor, ...]]) -> Prepared:
        return Prepared([functools.partial(update, block) for block in sets], check, cost)

    providers = {
        "prunekernels": lambda block: sparsegpt_update(*block, keep=keep, of=of),
        "torch columns": functools.partial(column_by_column, keep, of),
        "prunekernels thread": refusable(
            lambda block: sparsegpt_update(*block, keep=keep, of=of, impl="triton_thread")
        ),
    }
    return [Contender(name, functools.partial(prepare, way)) for name, way in providers.items()]


def ways(case: Case) -> dict[str, Select]:
    """The providers of a case, the definition first."""
    if case.op == "nm_mask":
        keep, of = (int(part) for part in case.mode.split(":"))
        return {
            "torch sort": functools.partial(sorted_groups, keep, of),
            "prunekernels": lambda scores: nm_mask(scores, keep, of),
            "torch topk": functools.partial(topk_groups, keep, of),
        }
    sparsity = float(case.mode)
    found: dict[str, Select] = {
        "torch sort": functools.partial(sorted_rows, sparsity),
        "prunekernels": lambda scores: rowwise_mask(scores, sparsity),
        "torch kthvalue": functools.partial(threshold_rows, sparsity),
    }
    if case.dtype != "float32":
        found["prunekernels words"] = refusable(
            lambda scores: rowwise_mask(scores, sparsity, impl="triton_words")
        )
    return found


def contenders(case: Case, session: Session) -> list[Contender]:
    """Every provider on the same operands."""
    if case.op == "sparsegpt_update":
        return updates(case, session)
    rows, columns = (int(case.sizes[name]) for name in "NK")
    dtype = getattr(torch, case.dtype)
    count = session.copies(dtype.itemsize * rows * columns)
    sets = [torch.rand(rows, columns, device=session.device).to(dtype) for _ in range(count)]
    providers = ways(case)
    exact = next(iter(providers.values()))(sets[0])
    cost = [bounds.Cost((dtype.itemsize + 1.0) * rows * columns)]  # a score in, a byte of mask out

    def check(found: Tensor) -> Verdict:
        wrong = int((found != exact).sum())
        return Verdict(wrong == 0, f"{wrong} of {found.numel()} differ from the definition")

    def prepare(select: Select) -> Prepared:
        return Prepared([functools.partial(select, scores) for scores in sets], check, cost)

    return [Contender(name, functools.partial(prepare, way)) for name, way in providers.items()]


def plan(session: Session) -> list[Case]:
    """Patterns by shapes."""
    on_gpu = session.device.type == "cuda"
    shapes: Sequence[tuple[int, int]] = ((4096, 4096), (14336, 4096), (4096, 14336))
    if not on_gpu or session.quick:
        shapes = ((576, 576),) if session.quick else ((576, 576), (1536, 576), (576, 1536))
    kinds = (("nm_mask", "2:4"), ("nm_mask", "4:8"), ("rowwise_mask", "0.5"))
    found = [Case(op, mode, "float32", {"N": N, "K": K}) for op, mode in kinds for N, K in shapes]
    # rows of q, k and v, or of gate and up, stacked as pruning stacks them
    stacked: Sequence[int] = (6144, 28672) if on_gpu else (960, 3072)
    for mode in ("mask", "2:4"):
        for rows in stacked[:1] if session.quick else stacked:
            found.append(Case("sparsegpt_update", mode, "float32", {"R": rows, "C": 128}))
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_options(parser)
    session = Session.begin(parser.parse_args(), "select.csv")
    torch.manual_seed(0)
    return session.run(
        [(case, functools.partial(contenders, case, session)) for case in plan(session)]
    )


if __name__ == "__main__":
    sys.exit(main())
