"""Validation of the options that the pair ops share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunekernels import checks
from prunekernels.metrics.needed_sums import PAIR_FIELDS
from prunekernels.metrics.result_rows import FULL_FLOATS, LABEL_FLOATS, LEVELS, WEIGHTS
from prunekernels.runtime import check_impl


def pair_options(
    op: str,
    *,
    lead: torch.Size,
    vocab: int,
    device: torch.device,
    temperature: float,
    labels: Tensor | None,
    subset: Tensor | Sequence[int] | None,
    topk: int,
    level: str,
    weights: str,
    impl: str,
) -> Tensor | None:
    """Check the options of the pair ops and return the subset as an int64 tensor."""
    check_impl(impl)
    if level not in LEVELS:
        raise ValueError(f"{op}: level must be one of {', '.join(LEVELS)}, got {level!r}")
    if weights not in WEIGHTS:
        raise ValueError(f"{op}: weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
    checks.positive(op, "temperature", temperature)
    if not 0 <= topk <= vocab:
        raise ValueError(f"{op}: topk must lie in 0..{vocab} (the vocabulary), got {topk}")
    if labels is not None:
        checks.integers(op, "labels", labels, device)
        if labels.shape != lead:
            raise ValueError(
                f"{op}: labels must have the logits' leading shape {tuple(lead)}, "
                f"got {tuple(labels.shape)}"
            )
    if subset is None:
        return None
    if not isinstance(subset, Tensor):
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"{op}: subset is a {type(subset).__name__}, and a CUDA graph is being captured; "
                f"pass torch.tensor(subset, device={str(device)!r}) made beforehand"
            )
        subset = torch.tensor(list(subset), dtype=torch.int64, device=device)
    checks.integers(op, "subset", subset, device)
    if subset.dim() != 1 or subset.numel() == 0:
        raise ValueError(
            f"{op}: subset must be a non-empty list of token ids, got shape {tuple(subset.shape)}"
        )
    return subset.long()


def pair_fields(op: str, fields: Sequence[str] | None, level: str, labels: bool) -> str:
    """Check the fields asked for; their names in the order of a result, "" for all of them."""
    if fields is None:
        return ""
    if isinstance(fields, str) or not fields:
        raise ValueError(
            f"{op}: fields must be a sequence of names, got {fields!r}; leave it out for all"
        )
    for name in fields:
        if name not in PAIR_FIELDS:
            raise ValueError(
                f"{op}: fields holds {name!r}, which is not one of {', '.join(PAIR_FIELDS)}"
            )
        if name in LABEL_FLOATS and not labels:
            raise ValueError(f"{op}: fields holds {name!r}, which needs labels=")
        if name in FULL_FLOATS and level != "full":
            raise ValueError(
                f"{op}: fields holds {name!r}, which needs level='full', got {level!r}"
            )
    return ",".join(name for name in PAIR_FIELDS if name in fields)
