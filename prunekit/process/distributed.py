"""Data parallelism over prompts: what torchrun or `accelerate launch` started, or one process.

Each process holds the whole model and takes every `world_size`-th item; sums are all-reduced in
float64, so scores do not depend on the number of processes beyond rounding.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Item = TypeVar("Item")


def ensure_initialized() -> None:
    """Join the process group that the launcher's environment describes, once."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def world_size() -> int:
    """Number of processes."""
    ensure_initialized()
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Index of this process; 0 writes files and prints."""
    ensure_initialized()
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def shard(items: Sequence[Item]) -> list[Item]:
    """This process's share of `items`: every world_size-th from its rank."""
    return list(items[rank() :: world_size()])


def all_reduce_(tensor: Tensor) -> Tensor:
    """Sum `tensor` over processes, in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(share: Sequence[Item]) -> list[Item]:
    """Undo `shard`: every process gets all items, in their original order."""
    if world_size() == 1:
        return list(share)
    shares: list[list[Item]] = [[] for _ in range(world_size())]
    dist.all_gather_object(shares, list(share))
    total = sum(map(len, shares))
    return [shares[index % len(shares)][index // len(shares)] for index in range(total)]
