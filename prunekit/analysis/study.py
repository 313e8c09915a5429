"""`compare`: the whole analysis of a dense model and its pruned copy, as one `Study`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from prunekit import distributed, generation
from prunekit.analysis import scores
from prunekit.analysis.decoding import Decoding, decode
from prunekit.analysis.grid import MetricGrid, interval_from_dict, interval_to_dict
from prunekit.analysis.hierarchy import accumulated, layerwise
from prunekit.analysis.provenance import absent_sublayers, describe, versions
from prunekit.analysis.scores import Scores
from prunekit.analysis.sharing import gather_decoding, gather_grid, gather_subspace
from prunekit.analysis.spaces import Lens, Reader, Weights, check_pair
from prunekit.analysis.subspace import Subspace, option_tokens, subspace
from prunekit.analysis.theory import theory
from prunekit.architectures import Architecture
from prunekit.checkpoint import check_finite
from prunekit.errors import PrunekitError
from prunekit.evaluation.items import Choice
from prunekit.evaluation.statistics import Interval

SCHEMA_VERSION = 1
SECTIONS = ("layerwise", "accumulated", "removal", "decoding", "subspace", "theory", "scores")

# Summary name -> metric of the teacher-forced grid.
_STEPWISE = {
    "h_cosine": "h_cosine",
    "z_cosine": "z_cosine",
    "p_cosine": "p_cosine",
    "p_one_minus_cosine": "p_one_minus_cosine",
    "p_one_minus_cosine_estimate": "p_one_minus_cosine_estimate",
    "kl_dense_pruned": "kl_dense_pruned",
    "kl_pruned_dense": "kl_pruned_dense",
    "kl_estimate": "kl_estimate",
    "estimate_valid": "estimate_valid",
    "flipped": "flipped",
}


@dataclass(frozen=True)
class Study:
    """What pruning did to a model; a section that was not asked for is None.

    Attributes:
        meta: How it was made: names, models, versions, seed, options, counts, seconds per section.
        layerwise: (prompt, step, layer, sublayer), each sublayer's pruning alone.
        accumulated: (prompt, step, layer), both models run on their own.
        removal: (prompt, step, layer, sublayer), what removing each sublayer of the dense model
            alone would do; made for pruned models that lack sublayers.
        decoding: Both protocols, step by step, and the texts.
        subspace: Answer options against the full vocabulary.
        theory: Rows of `theory.theory`, on the layerwise grid (on `removal` where there is one).
        scores: For "dense" and "pruned", single-step and generative scores.
    """

    meta: dict[str, Any]
    layerwise: MetricGrid | None = None
    accumulated: MetricGrid | None = None
    removal: MetricGrid | None = None
    decoding: Decoding | None = None
    subspace: Subspace | None = None
    theory: list[dict[str, Any]] | None = None
    scores: dict[str, Scores] | None = None

    def summary(self) -> dict[str, Interval | float]:
        """The study in some thirty numbers, each with its interval over prompts.

        From teacher-forced decoding: the similarities in h, z and p, KL both ways with estimate
        and validity, flipped (share of steps whose top token changed); `first_divergence` over
        the prompts that diverge. `layerwise_…` average over layers and sublayers, and the scores
        are named `dense_…` and `pruned_…`.
        """
        found: dict[str, Interval | float] = {}
        seed = int(self.meta["seed"])
        if self.decoding is not None:
            steps = self.decoding.teacher_forced
            for name, metric in _STEPWISE.items():
                found[name] = steps.interval(metric, seed=seed)
            first = self.decoding.sequence["first_divergence"]
            labels = {"prompt": self.decoding.prompts}
            column = MetricGrid(("prompt",), labels, {"first_divergence": first})
            found["first_divergence"] = column.interval("first_divergence", seed=seed)
        if self.layerwise is not None:
            for space in ("h", "z", "p"):
                metric = f"{space}_cosine"
                found[f"layerwise_{metric}"] = self.layerwise.interval(metric, seed=seed)
        if self.subspace is not None:
            for metric in ("agreement", "kendall", "subset_kl_dense_pruned", "kl_dense_pruned"):
                found[f"options_{metric.removeprefix('subset_')}"] = self.subspace.grid.interval(
                    metric, seed=seed
                )
        for model, values in (self.scores or {}).items():
            found |= {f"{model}_{name}": value for name, value in values.items()}
        return found

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write JSON, CSV, figures and one self-contained HTML page; see `prunekit.report`.

        Under several processes only the main one writes.

        Returns:
            The folder.
        """
        from prunekit import report  # draws with matplotlib, which analysis alone does not need

        if distributed.is_main():
            report.save(self, folder, overwrite=overwrite)
        return Path(folder)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form without NaN; `from_dict` gives back an equal study."""
        return {
            "schema_version": SCHEMA_VERSION,
            "meta": self.meta,
            "layerwise": None if self.layerwise is None else self.layerwise.to_dict(),
            "accumulated": None if self.accumulated is None else self.accumulated.to_dict(),
            "removal": None if self.removal is None else self.removal.to_dict(),
            "decoding": None if self.decoding is None else self.decoding.to_dict(),
            "subspace": None if self.subspace is None else self.subspace.to_dict(),
            "theory": self.theory,
            "scores": None
            if self.scores is None
            else {
                model: {name: interval_to_dict(value) for name, value in values.items()}
                for model, values in self.scores.items()
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Study:
        """Undo `to_dict`.

        Raises:
            PrunekitError: The data is of another schema version, or no study.
        """
        version = data.get("schema_version")
        if version != SCHEMA_VERSION:
            raise PrunekitError(
                f"study of schema version {version}, this prunekit reads {SCHEMA_VERSION}: make "
                "the study again or install the version that made it"
            )
        readers: dict[str, Any] = {
            "layerwise": MetricGrid.from_dict,
            "accumulated": MetricGrid.from_dict,
            "removal": MetricGrid.from_dict,
            "decoding": Decoding.from_dict,
            "subspace": Subspace.from_dict,
            "theory": list,
            "scores": lambda models: {
                model: {name: interval_from_dict(value) for name, value in values.items()}
                for model, values in models.items()
            },
        }
        sections = {
            name: None if data.get(name) is None else read(data[name])
            for name, read in readers.items()
        }
        return cls(dict(data["meta"]), **sections)


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
    seconds: dict[str, float] = {}
    common: dict[str, Any] = {"temperature": temperature, "weights": weights}
    common |= {"batch_size": batch_size, "progress": progress}

    with _timed(seconds, "generation"):
        rollouts = distributed.gather(
            generation.generate(
                dense,
                distributed.shard(encoded),
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                progress=progress,
                label="dense",
            )
        )
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
            found["scores"] = {
                name: scores.generative(found["decoding"].sequence, dense=model is dense, seed=seed)
                | (
                    scores.single_step(model, tokenizer, choices, progress=progress)
                    if choices
                    else {}
                )
                for name, model in (("dense", dense), ("pruned", pruned))
            }
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
