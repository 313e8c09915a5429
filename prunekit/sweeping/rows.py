"""The recorded numbers of a point as scores with intervals, paired with the dense model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prunekit.analysis.answers import expected_agreement, reply_scores
from prunekit.analysis.grid import interval_to_dict
from prunekit.analysis.quality import Scores
from prunekit.evaluation.intervals import Interval, Paired, bootstrap_mean, paired, wilson
from prunekit.sweeping.floors import Floor, floor_of
from prunekit.sweeping.prediction import hazards, predicted, survival


@dataclass(frozen=True)
class Row:
    """One point of a sweep.

    Attributes:
        label: Its name.
        x: Its place in its series.
        scores: "accuracy", and those of `reply_scores`, each with its interval.
        changes: "accuracy" and "exact_match" against the dense model, paired by question.
        kl: `kld`'s means, each {mean, low, high}; None where it was left out.
        speed: How many times as fast as the dense model it decodes, over the rounds.
        sizes: parameters, bytes_in_memory, bytes_on_disk (None where there are no files).
        by_chance: `expected_agreement` of the answers with the dense model's; None without any.
        prediction: See `prediction.predicted`; None without KL or questions.
        floor: The predicted floor of its exact match; None without KL or questions.
        facts: What was done to it.
        seconds: How long measuring it took.
        error: Why there are no numbers, or "".
    """

    label: str
    x: float
    scores: Scores
    changes: dict[str, Paired]
    kl: dict[str, Any] | None
    speed: Interval | None
    sizes: dict[str, int | None]
    by_chance: float | None
    prediction: dict[str, Any] | None
    floor: Floor | None
    facts: dict[str, Any]
    seconds: float
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "label": self.label,
            "x": self.x,
            "error": self.error,
            "scores": {name: interval_to_dict(one) for name, one in self.scores.items()},
            "changes": {
                name: {**vars(one), "difference": interval_to_dict(one.difference)}
                for name, one in self.changes.items()
            },
            "kl": self.kl,
            "speed": None if self.speed is None else interval_to_dict(self.speed),
            **self.sizes,
            "same_answer_by_chance": self.by_chance,
            "prediction": self.prediction,
            "exact_match_floor": None if self.floor is None else _floor_to_dict(self.floor),
            "facts": self.facts,
            "seconds": self.seconds,
        }


def failed(label: str, x: float, error: str) -> Row:
    """A point that could not be made or measured."""
    return Row(label, x, {}, {}, None, None, {}, None, None, None, {}, 0.0, error)


def row(
    label: str, x: float, found: Mapping[str, Any], dense: Mapping[str, Any], *, seed: int
) -> Row:
    """The row of a copy, from what `Asked.of_copy` and `Asked.of_dense` recorded.

    `dense` also has what `Asked.complete` makes of it, as "complete".
    """
    changes: dict[str, Paired] = {}
    if found["choices"]:
        ours, theirs = (one["choices"]["right"] for one in (dense, found))
        changes["accuracy"] = paired(ours, theirs, seed=seed)
    measures = {name: np.array(values, np.float64) for name, values in found["answers"].items()}
    right = [reply["right"] for reply in dense["replies"]]
    theirs_right = [bool(one) for one in measures.get("right", ())]
    if measures:
        changes["exact_match"] = paired(right, theirs_right, seed=seed)
    scores = choice_scores(found) | (reply_scores(measures, seed=seed) if measures else {})
    kl, speed = found["kl"], found["speed"]
    by_chance = prediction = floor = None
    if measures:
        by_chance = expected_agreement([one["given"] for one in dense["replies"]], found["given"])
    if kl and measures:
        paths = [reply["entropies"] for reply in dense["replies"]]
        first = found["answers"]["first_divergence"]
        prediction = predicted(kl["flips"], paths, first)
        curves = survival(hazards(kl["flips"]), paths)
        floor = floor_of(curves, dense["complete"], first, right, theirs_right, seed=seed)
    ratio = None
    if speed:
        ratio = bootstrap_mean(np.array(speed["dense"]) / np.array(speed["own"]), seed=seed)
    return Row(
        label,
        x,
        scores,
        changes,
        kl["means"] if kl else None,
        ratio,
        {name: found[name] for name in ("parameters", "bytes_in_memory", "bytes_on_disk")},
        by_chance,
        prediction,
        floor,
        found["facts"],
        found["seconds"],
    )


def choice_scores(found: Mapping[str, Any]) -> Scores:
    """The single-step accuracy of recorded answers, and what guessing would reach."""
    if not found["choices"]:
        return {}
    right, chance = found["choices"]["right"], found["choices"]["chance"]
    return {
        "accuracy": wilson(sum(right), len(right)),
        "chance": Interval(chance, chance, chance, len(right)),
    }


def _floor_to_dict(floor: Floor) -> dict[str, Any]:
    told = {name: getattr(floor, name) for name in ("floor", "observed", "kept", "strayed")}
    return {**told, "above": interval_to_dict(floor.above)}


def dense_scores(dense: Mapping[str, Any]) -> Scores:
    """The dense model's own: accuracy and exact match."""
    right: Sequence[bool] = [reply["right"] for reply in dense["replies"]]
    found = choice_scores(dense)
    return found | ({"exact_match": wilson(sum(right), len(right))} if right else {})
