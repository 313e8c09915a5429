"""Choosing which weights go: N:M groups and row-wise thresholds, ours against torch.

    python bench/bench_select.py             matrices of Llama-3-8B on a GPU, smaller ones on a CPU
    python bench/bench_select.py --quick     does it work?

Every mask must be the one that a stable sort gives. Results go to results/<device>/select.csv.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence

import model
import torch
from harness import Case, Contender, Prepared, Session, Verdict, add_options
from prunekernels import nm_mask, rowwise_mask
from torch import Tensor

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
    gone = int(sparsity * scores.shape[-1] + 1e-9)
    return scores > scores.kthvalue(gone, -1, keepdim=True).values


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
    return {
        "torch sort": functools.partial(sorted_rows, sparsity),
        "prunekernels": lambda scores: rowwise_mask(scores, sparsity),
        "torch kthvalue": functools.partial(threshold_rows, sparsity),
    }


def contenders(case: Case, session: Session) -> list[Contender]:
    """Every provider on the same scores."""
    rows, columns = (int(case.sizes[name]) for name in "NK")
    count = session.copies(4 * rows * columns)
    sets = [torch.rand(rows, columns, device=session.device) for _ in range(count)]
    providers = ways(case)
    exact = next(iter(providers.values()))(sets[0])
    cost = [model.Cost(5.0 * rows * columns)]  # a float32 score in, a byte of mask out

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
    return [Case(op, mode, "float32", {"N": N, "K": K}) for op, mode in kinds for N, K in shapes]


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
