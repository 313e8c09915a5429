"""All findings about a dense model and its pruned copy, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from prunekit.analysis.answers import Answers
from prunekit.analysis.decoding import Decoding
from prunekit.analysis.grid import MetricGrid, interval_from_dict, interval_to_dict
from prunekit.analysis.quality import Scores
from prunekit.analysis.subspace import Subspace
from prunekit.errors import PrunekitError
from prunekit.evaluation.intervals import Interval, Paired, paired

SCHEMA_VERSION = 1
SECTIONS = (
    *("layerwise", "accumulated", "removal", "decoding", "subspace", "answers", "theory", "scores"),
)

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
class Findings:
    """The effect of pruning on a model; a section that nobody asked for is None.

    Attributes:
        meta: How it was made: names, models, versions, seed, options, counts, seconds per section.
        layerwise: (prompt, step, layer, sublayer), each sublayer's pruning alone.
        accumulated: (prompt, step, layer), both models run on their own.
        removal: (prompt, step, layer, sublayer), what removing each sublayer of the dense model
            alone would do; made for pruned models that lack sublayers.
        decoding: Both protocols, step by step, and the texts.
        subspace: Answer options against the full vocabulary.
        answers: Both models' generated answers to open questions.
        theory: Rows of `theory.theory`, on the layerwise grid (on `removal` where there is one).
        scores: For "dense" and "pruned", single-step and generative scores.
        right: For "dense" and "pruned", whether the single-step answer to each question is right;
            made with the scores.
    """

    meta: dict[str, Any]
    layerwise: MetricGrid | None = None
    accumulated: MetricGrid | None = None
    removal: MetricGrid | None = None
    decoding: Decoding | None = None
    subspace: Subspace | None = None
    answers: Answers | None = None
    theory: list[dict[str, Any]] | None = None
    scores: dict[str, Scores] | None = None
    right: dict[str, tuple[bool, ...]] | None = None

    def accuracy_change(self) -> Paired | None:
        """How the single-step accuracy changed on the same questions, or None without any."""
        if self.right is None:
            return None
        return paired(self.right["dense"], self.right["pruned"], seed=int(self.meta["seed"]))

    def answer_change(self) -> Paired | None:
        """How the exact match changed on the same open questions, or None without any."""
        if self.answers is None:
            return None
        return paired(*self.answers.right(), seed=int(self.meta["seed"]))

    def summary(self) -> dict[str, Interval | float]:
        """The study in some thirty numbers, each with its interval over prompts.

        From teacher-forced decoding: the similarities in h, z and p, KL both ways with estimate
        and validity, flipped (share of steps whose top token changed); `first_divergence` over
        the prompts that diverge. `layerwise_…` average over layers and sublayers, and the scores
        are named `dense_…` and `pruned_…`. `accuracy_difference` is pruned minus dense, paired by
        question; `accuracy_gained` and `accuracy_lost` count the questions that turn right and
        wrong, `accuracy_mcnemar_p` is McNemar's exact p-value, and `accuracy_needed` how many
        questions would show 2 points. `exact_match_…` says the same of generated answers.
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
        for name, change in (
            ("accuracy", self.accuracy_change()),
            ("exact_match", self.answer_change()),
        ):
            if change is not None:
                found[f"{name}_difference"] = change.difference
                found[f"{name}_gained"] = float(change.gained)
                found[f"{name}_lost"] = float(change.lost)
                found[f"{name}_mcnemar_p"] = change.p
                found[f"{name}_needed"] = float(change.needed)
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form without NaN; `from_dict` gives back an equal one."""
        return {
            "schema_version": SCHEMA_VERSION,
            "meta": self.meta,
            "layerwise": None if self.layerwise is None else self.layerwise.to_dict(),
            "accumulated": None if self.accumulated is None else self.accumulated.to_dict(),
            "removal": None if self.removal is None else self.removal.to_dict(),
            "decoding": None if self.decoding is None else self.decoding.to_dict(),
            "subspace": None if self.subspace is None else self.subspace.to_dict(),
            "answers": None if self.answers is None else self.answers.to_dict(),
            "theory": self.theory,
            "scores": None
            if self.scores is None
            else {
                model: {name: interval_to_dict(value) for name, value in values.items()}
                for model, values in self.scores.items()
            },
            "right": None
            if self.right is None
            else {model: list(answers) for model, answers in self.right.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
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
            "answers": Answers.from_dict,
            "theory": list,
            "scores": lambda models: {
                model: {name: interval_from_dict(value) for name, value in values.items()}
                for model, values in models.items()
            },
            "right": lambda models: {model: tuple(answers) for model, answers in models.items()},
        }
        sections = {
            name: None if data.get(name) is None else read(data[name])
            for name, read in readers.items()
        }
        return cls(dict(data["meta"]), **sections)
