"""`compare`: the whole analysis of a dense model and its pruned copy, as one `Study`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from prunekit.analysis import quality
from prunekit.analysis.answers import reply_scores
from prunekit.analysis.findings import SECTIONS
from prunekit.analysis.grid import MetricGrid
from prunekit.analysis.hierarchy import accumulated, layerwise
from prunekit.analysis.provenance import absent_sublayers, describe, versions
from prunekit.analysis.quality import Scores
from prunekit.analysis.spaces import Lens, Reader, Weights, check_pair
from prunekit.analysis.subspace import Subspace, option_tokens, subspace
from prunekit.analysis.theory import theory
from prunekit.checkpoint import check_finite
from prunekit.errors import PrunekitError
from prunekit.evaluation.answering import Asking, encode
from prunekit.evaluation.items import Choice
from prunekit.evaluation.likelihood import encode_choices
from prunekit.evaluation.questions import Question
from prunekit.models import generation
from prunekit.models.architectures import Architecture
from prunekit.models.causal import check_measured
from prunekit.models.generation import Rollout
from prunekit.process import distributed
from prunekit.process.ambient import usual_torch
from prunekit.study.baseline import Baseline
from prunekit.study.setup import Setup
from prunekit.study.sharing import gather_grid, gather_subspace, over_shares
from prunekit.study.study import Study


@usual_torch()
def compare(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    prompts: Sequence[str],
    *,
    tokenizer: Any,
    choices: Sequence[Choice] | None = None,
    questions: Sequence[Question] | None = None,
    asking: Asking | None = None,
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
        questions: Questions that both models answer with text, for the section "answers", which is
            left out without them.
        asking: How they are asked: examples, longest answer.
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
        baseline: The dense model's own texts and scores, which several comparisons may share;
            computed anew by default.

    Raises:
        PrunekitError: The models can't be compared, or a prompt or option is out of range; found
            before the heavy work starts.
    """
    setup = Setup(
        dense=dense,
        tokenizer=tokenizer,
        prompts=prompts,
        choices=choices or (),
        questions=questions or (),
        asking=asking or Asking(),
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        weights=weights,
        batch_size=batch_size,
        chat=chat,
        seed=seed,
        progress=progress,
        shared=baseline,
    )
    asked = _Comparison(setup, pruned, lens, layerwise_prompts, layerwise_steps, names)
    wanted = _checked(asked, sections)
    seconds: dict[str, float] = {}
    with _timed(seconds, "generation"):
        setup.rollouts()
    study = Study({})
    made = {*wanted, *(name for section in wanted for name in _MAKERS[section].needs)}
    for name in (name for name in SECTIONS if name in made):
        maker = _MAKERS[name]
        with _timed(seconds if maker.timed else {}, name):
            study = maker.add(asked, study)
    if "decoding" not in wanted:
        study = replace(study, decoding=None)
    return replace(study, meta=_meta(asked, wanted, seconds))


@dataclass(frozen=True)
class _Comparison:
    """One pruned model compared with the dense one.

    Attributes:
        setup: The settings.
        pruned: The pruned or dropped copy.
        lens: How the layerwise sections read a layer's state, see `Reader`.
        layerwise_prompts: At most so many prompts are analysed layer by layer.
        layerwise_steps: At most so many decode steps of them are.
        names: What to call the two models.
    """

    setup: Setup
    pruned: PreTrainedModel
    lens: Lens
    layerwise_prompts: int
    layerwise_steps: int
    names: tuple[str, str]

    def traced(self) -> tuple[list[int], list[int]]:
        """Indices of the prompts that are analysed layer by layer, and of their decode steps."""
        rollouts = self.setup.rollouts()
        prompts = _spread(len(rollouts), self.layerwise_prompts)
        longest = max(len(rollouts[index].continuation) for index in prompts)
        return prompts, _spread(longest, self.layerwise_steps)


def _checked(asked: _Comparison, sections: Sequence[str] | None) -> tuple[str, ...]:
    """The sections to make, once nothing is found that would stop them halfway.

    Raises:
        PrunekitError: See `compare`.
    """
    setup = asked.setup
    ours, theirs = check_pair(setup.dense, asked.pruned)
    for model in (setup.dense, asked.pruned):
        check_finite(model)
        check_measured(model)
    wanted = _sections(sections, theirs, len(ours.layers), setup)
    Reader(ours, theirs, temperature=setup.temperature, lens=asked.lens, weights=setup.weights)
    if asked.layerwise_prompts < 1 or asked.layerwise_steps < 1:
        raise PrunekitError("layerwise_prompts and layerwise_steps must be at least 1: raise them")
    if not setup.prompts:
        raise PrunekitError("no prompts: give at least one")
    encoded = generation.encode(setup.tokenizer, setup.prompts, chat=setup.chat)
    generation.check_context(setup.dense, encoded, setup.max_new_tokens)
    if "answers" in wanted:
        longest = setup.asking.max_new_tokens
        for model in (setup.dense, asked.pruned):
            asked_for = encode(setup.tokenizer, setup.questions, setup.asking)
            generation.check_context(model, asked_for, longest)
    encode_choices(setup.tokenizer, setup.choices)
    if "subspace" in wanted:
        option_tokens(setup.tokenizer, max(len(choice.options) for choice in setup.choices))
    return wanted


def _grid(
    asked: _Comparison, trace: Callable[..., MetricGrid], pruned: PreTrainedModel | None
) -> MetricGrid:
    """The grid of `trace` (`layerwise` or `accumulated`) over the traced prompts and steps."""
    setup = asked.setup
    prompts, steps = asked.traced()

    def traced(share: Sequence[Rollout]) -> MetricGrid:
        return trace(
            setup.dense,
            pruned,
            share,
            temperature=setup.temperature,
            lens=asked.lens,
            weights=setup.weights,
            positions=steps,
            batch_size=setup.batch_size,
            progress=setup.progress,
        )

    rollouts = setup.rollouts()
    chosen = [rollouts[index] for index in prompts]
    return over_shares(chosen, traced, gather_grid).relabelled(prompts)


def _layerwise(asked: _Comparison, study: Study) -> Study:
    return replace(study, layerwise=_grid(asked, layerwise, asked.pruned))


def _accumulated(asked: _Comparison, study: Study) -> Study:
    return replace(study, accumulated=_grid(asked, accumulated, asked.pruned))


def _removal(asked: _Comparison, study: Study) -> Study:
    return replace(study, removal=_grid(asked, layerwise, None))


def _decoding(asked: _Comparison, study: Study) -> Study:
    return replace(study, decoding=asked.setup.decode(asked.pruned))


def _subspace(asked: _Comparison, study: Study) -> Study:
    setup = asked.setup

    def answered(share: Sequence[Choice]) -> Subspace:
        return subspace(
            setup.dense,
            asked.pruned,
            setup.tokenizer,
            share,
            temperature=setup.temperature,
            weights=setup.weights,
            chat=setup.chat,
            batch_size=setup.batch_size,
            progress=setup.progress,
        )

    return replace(study, subspace=over_shares(setup.choices, answered, gather_subspace))


def _answers(asked: _Comparison, study: Study) -> Study:
    return replace(study, answers=asked.setup.answers(asked.pruned))


def _theory(asked: _Comparison, study: Study) -> Study:
    grid = study.layerwise if study.removal is None else study.removal
    assert grid is not None
    setup = asked.setup
    return replace(study, theory=theory(grid, weights=setup.weights, seed=setup.seed))


def _scores(asked: _Comparison, study: Study) -> Study:
    assert study.decoding is not None
    setup, sequence = asked.setup, study.decoding.sequence
    found: dict[str, Scores] = {}
    right: dict[str, tuple[bool, ...]] = {}
    for name, model in (("dense", setup.dense), ("pruned", asked.pruned)):
        found[name] = quality.generative(sequence, dense=name == "dense", seed=setup.seed)
        if setup.choices:
            answered = setup.single_step(model)
            found[name] |= answered.scores
            right[name] = answered.right
        if study.answers is not None:
            found[name] |= reply_scores(study.answers.measures(name), seed=setup.seed)
    return replace(study, scores=found, right=right or None)


class _Maker(NamedTuple):
    """Makes one section of a study.

    Attributes:
        add: The study with the section, from the study so far.
        needs: Sections that must be there before, besides those that `_sections` asks for.
        timed: Whether `meta["seconds"]` tells how long it took.
    """

    add: Callable[[_Comparison, Study], Study]
    needs: tuple[str, ...] = ()
    timed: bool = True


_MAKERS = {
    "layerwise": _Maker(_layerwise),
    "accumulated": _Maker(_accumulated),
    "removal": _Maker(_removal),
    "decoding": _Maker(_decoding),
    "subspace": _Maker(_subspace),
    "answers": _Maker(_answers),
    "theory": _Maker(_theory, timed=False),
    "scores": _Maker(_scores, needs=("decoding",)),
}


def _meta(
    asked: _Comparison, wanted: Sequence[str], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """`Findings.meta`: the settings, models, versions and seconds of the study."""
    setup, dense = asked.setup, asked.setup.dense
    prompts, steps = asked.traced()
    return {
        "names": dict(zip(("dense", "pruned"), asked.names, strict=True)),
        "models": {
            "dense": describe(Architecture(dense)),
            "pruned": describe(Architecture(asked.pruned)),
        },
        "versions": versions(),
        "seed": setup.seed,
        "device": str(dense.device),
        "dtype": str(dense.dtype).removeprefix("torch."),
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "temperature": setup.temperature,
        "lens": asked.lens,
        "weights": setup.weights,
        "chat": setup.chat,
        "sections": list(wanted),
        "counts": {
            "prompts": len(setup.prompts),
            "choices": len(setup.choices),
            "questions": len(setup.questions),
            "max_new_tokens": setup.max_new_tokens,
            "batch_size": setup.batch_size,
            "layerwise_prompts": len(prompts),
            "layerwise_steps": len(steps),
        },
        "seconds": dict(seconds),
    }


def _sections(
    asked: Sequence[str] | None,
    pruned: Architecture,
    dense_layers: int,
    setup: Setup,
) -> tuple[str, ...]:
    """The sections to make, in order.

    Raises:
        PrunekitError: One is unknown, or lacks what it is made from.
    """
    lacks = len(pruned.layers) < dense_layers or any(absent_sublayers(pruned).values())
    if asked is None:
        left_out = set() if lacks else {"removal"}
        if not setup.choices:
            left_out.add("subspace")
        if not setup.questions:
            left_out.add("answers")
        return tuple(name for name in SECTIONS if name not in left_out)
    unknown = [name for name in asked if name not in SECTIONS]
    if unknown:
        raise PrunekitError(f"unknown section '{unknown[0]}': use some of {', '.join(SECTIONS)}")
    if "theory" in asked and not {"layerwise", "removal"} & set(asked):
        raise PrunekitError("section theory is made from layerwise: ask for layerwise too")
    if "subspace" in asked and not setup.choices:
        raise PrunekitError("section subspace needs multiple-choice questions: give choices")
    if "answers" in asked and not setup.questions:
        raise PrunekitError("section answers needs open questions: give questions")
    return tuple(name for name in SECTIONS if name in asked)


def _spread(total: int, most: int) -> list[int]:
    """At most `most` of the indices below `total`, evenly spread, the first included."""
    return sorted({int(index) for index in np.linspace(0, total - 1, min(total, most)).round()})


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)
