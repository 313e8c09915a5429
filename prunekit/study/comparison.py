"""`compare`: the whole analysis of a dense model and its pruned copy, as one `Study`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from prunekit import distributed, generation
from prunekit.analysis import quality
from prunekit.analysis.decoding import decode
from prunekit.analysis.findings import SECTIONS
from prunekit.analysis.grid import MetricGrid
from prunekit.analysis.hierarchy import accumulated, layerwise
from prunekit.analysis.provenance import absent_sublayers, describe, versions
from prunekit.analysis.spaces import Lens, Reader, Weights, check_pair
from prunekit.analysis.subspace import option_tokens, subspace
from prunekit.analysis.theory import theory
from prunekit.checkpoint import check_finite
from prunekit.errors import PrunekitError
from prunekit.evaluation.items import Choice
from prunekit.models.architectures import Architecture
from prunekit.study.baseline import Baseline, shared_baseline
from prunekit.study.sharing import gather_decoding, gather_grid, gather_subspace
from prunekit.study.study import Study


def compare(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    prompts: Sequence[str],
    *,
    tokenizer: Any,
    choices: Sequence[Choice] | None = None,
    max_new_tokens: int = 48,
    temperature: float = 1.0,
    lens: Lens = "final_norm",
    weights: Weights = "base",
    sections: Sequence[str] | None = None,
    batch_size: int = 8,
    layerwise_prompts: int = 8,
    layerwise_steps: int = 16,
    chat: generation.Chat = "auto",
    seed: int = 0,
    progress: bool = True,
    names: tuple[str, str] = ("dense", "pruned"),
    baseline: Baseline | None = None,
) -> Study:
    """Compare a dense model with its pruned copy along h → z → p.

    Under `accelerate launch` or `torchrun` every process takes its share of the prompts, and all
    of them return the whole study.

    Args:
        dense: The dense model.
        pruned: Its pruned or dropped copy.
        prompts: Texts to continue, at least one.
        tokenizer: The tokenizer of both.
        choices: Multiple-choice questions for the subspace and single-step sections, which are
            left out without them.
        max_new_tokens: Longest continuation.
        temperature: T in p = softmax(z / T).
        lens: "final_norm", or "raw" for the layerwise readings of the research code.
        weights: Whose distribution weighs the second-order estimates, see `Reader`.
        sections: Some of `SECTIONS`; by default all, "removal" only for a pruned model that lacks
            sublayers.
        batch_size: Prompts run together.
        layerwise_prompts: At most this many prompts, evenly spread, are analysed layer by layer.
        layerwise_steps: At most this many decode steps, evenly spread, of each of them.
        chat: Whether prompts are asked through the chat template, see `generation.encode`.
        seed: Seed of every interval's resampling.
        progress: Show progress bars (on a terminal only).
        names: What to call the two models.
        baseline: What the dense model does by itself, shared by several comparisons with it; made
            anew by default.

    Raises:
        PrunekitError: The models can't be compared, or a prompt or option is out of range; found
            before the heavy work starts.
    """
    ours, theirs = check_pair(dense, pruned)
    for model in (dense, pruned):
        check_finite(model)
    wanted = _sections(sections, theirs, len(ours.layers), choices)
    Reader(ours, theirs, temperature=temperature, lens=lens, weights=weights)
    if layerwise_prompts < 1 or layerwise_steps < 1:
        raise PrunekitError("layerwise_prompts and layerwise_steps must be at least 1: raise them")
    if not prompts:
        raise PrunekitError("no prompts: give at least one")
    encoded = generation.encode(tokenizer, prompts, chat=chat)
    generation.check_context(dense, encoded, max_new_tokens)
    if "subspace" in wanted:
        option_tokens(tokenizer, max(len(choice.options) for choice in choices or ()))
    baseline = shared_baseline(
        baseline,
        dense,
        tokenizer,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        chat=chat,
        progress=progress,
    )
    seconds: dict[str, float] = {}
    common: dict[str, Any] = {"temperature": temperature, "weights": weights}
    common |= {"batch_size": batch_size, "progress": progress}

    with _timed(seconds, "generation"):
        rollouts = baseline.rollouts(prompts)
    traced = _spread(len(rollouts), layerwise_prompts)
    steps = _spread(max(len(rollouts[i].continuation) for i in traced), layerwise_steps)
    found: dict[str, Any] = {}
    for name in ("layerwise", "accumulated", "removal"):
        if name not in wanted:
            continue
        with _timed(seconds, name):
            mine = [rollouts[index] for index in distributed.shard(traced)]
            options = {**common, "lens": lens, "positions": steps}
            grid = _TRACES[name](dense, pruned, mine, **options) if mine else None
            found[name] = gather_grid(grid).relabelled(traced)
    if {"decoding", "scores"} & set(wanted):
        with _timed(seconds, "decoding"):
            share = distributed.shard(list(prompts))
            mine = distributed.shard(rollouts)
            options = {**common, "max_new_tokens": max_new_tokens, "chat": chat}
            decoding = (
                decode(dense, pruned, tokenizer, share, rollouts=mine, **options) if share else None
            )
            found["decoding"] = gather_decoding(decoding)
    if "subspace" in wanted:
        with _timed(seconds, "subspace"):
            questions = distributed.shard(list(choices or ()))
            part = subspace(dense, pruned, tokenizer, questions, **common) if questions else None
            found["subspace"] = gather_subspace(part)
    if "theory" in wanted:
        grid = found["removal"] if "removal" in found else found["layerwise"]
        found["theory"] = theory(grid, weights=weights, seed=seed)
    if "scores" in wanted:
        with _timed(seconds, "scores"):
            sequence = found["decoding"].sequence
            found["scores"] = {
                name: quality.generative(sequence, dense=name == "dense", seed=seed)
                for name in ("dense", "pruned")
            }
            if choices:
                found["scores"]["dense"] |= baseline.single_step(choices)
                found["scores"]["pruned"] |= quality.single_step(
                    pruned, tokenizer, choices, progress=progress
                )
    if "decoding" not in wanted:
        found.pop("decoding", None)
    meta = {
        "names": {"dense": names[0], "pruned": names[1]},
        "models": {"dense": describe(ours), "pruned": describe(theirs)},
        "versions": versions(),
        "seed": seed,
        "device": str(dense.device),
        "dtype": str(dense.dtype).removeprefix("torch."),
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "temperature": temperature,
        "lens": lens,
        "weights": weights,
        "chat": chat,
        "sections": list(wanted),
        "counts": {
            "prompts": len(prompts),
            "choices": len(choices or ()),
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "layerwise_prompts": len(traced),
            "layerwise_steps": len(steps),
        },
        "seconds": seconds,
    }
    return Study(meta, **found)


def _removal(dense: PreTrainedModel, pruned: PreTrainedModel, *args: Any, **options: Any) -> Any:
    return layerwise(dense, None, *args, **options)


_TRACES: dict[str, Callable[..., MetricGrid]] = {
    "layerwise": layerwise,
    "accumulated": accumulated,
    "removal": _removal,
}


def _sections(
    asked: Sequence[str] | None,
    pruned: Architecture,
    dense_layers: int,
    choices: Sequence[Choice] | None,
) -> tuple[str, ...]:
    """The sections to make, in order.

    Raises:
        PrunekitError: One is unknown, or lacks what it is made from.
    """
    lacks = len(pruned.layers) < dense_layers or any(absent_sublayers(pruned).values())
    if asked is None:
        left_out = set() if lacks else {"removal"}
        if not choices:
            left_out.add("subspace")
        return tuple(name for name in SECTIONS if name not in left_out)
    unknown = [name for name in asked if name not in SECTIONS]
    if unknown:
        raise PrunekitError(f"unknown section '{unknown[0]}': use some of {', '.join(SECTIONS)}")
    if "theory" in asked and not {"layerwise", "removal"} & set(asked):
        raise PrunekitError("section theory is made from layerwise: ask for layerwise too")
    if "subspace" in asked and not choices:
        raise PrunekitError("section subspace needs multiple-choice questions: give choices")
    return tuple(name for name in SECTIONS if name in asked)


def _spread(total: int, most: int) -> list[int]:
    """At most `most` of the indices below `total`, evenly spread, the first included."""
    return sorted({int(index) for index in np.linspace(0, total - 1, min(total, most)).round()})


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)
