"""The measurements of one copy: both kinds of answers, KL, speed and size, as plain data."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from prunekit.analysis import quality
from prunekit.analysis.answers import reply_measures
from prunekit.checkpoint import check_finite
from prunekit.divergence.loading import bytes_in_memory
from prunekit.divergence.run import kld
from prunekit.errors import PrunekitError
from prunekit.evaluation.answering import Asking, Reply, answered, answered_after
from prunekit.evaluation.items import Choice
from prunekit.evaluation.questions import Question
from prunekit.models import generation
from prunekit.packed.sizes import weight_count
from prunekit.process import distributed
from prunekit.speed import decoding
from prunekit.speed.timing import interleaved
from prunekit.sweeping.points import Made
from prunekit.sweeping.prediction import flips_by_entropy

_SPEED_ROUNDS, _SPEED_PROMPT, _SPEED_NEW = 5, 16, 12


@dataclass(frozen=True)
class Asked:
    """What every copy is asked, and how.

    Attributes:
        dense: The dense model.
        tokenizer: The tokenizer of all copies.
        choices: Multiple-choice questions; may be empty.
        questions: Questions that are answered with text; may be empty.
        asking: How.
        text: Texts of the KL divergence; None leaves it out.
        context: Tokens per window of them.
        speed: Whether decoding is timed.
        device: Where models are.
        folder: Of the sweep.
        progress: Show bars.
    """

    dense: PreTrainedModel
    tokenizer: Any
    choices: Sequence[Choice]
    questions: Sequence[Question]
    asking: Asking
    text: Sequence[str] | None
    context: int
    speed: bool
    device: str | None
    folder: Path
    progress: bool

    def of_dense(self) -> dict[str, Any]:
        """The dense model's own answers."""
        check_finite(self.dense)
        return {
            "choices": self._choices(self.dense),
            "replies": [_reply_to_dict(reply) for reply in self._replies(self.dense, "dense")],
            **_sizes(self.dense),
        }

    def complete(self, dense: dict[str, Any]) -> list[int]:
        """After how many tokens the answer of each of the dense model's texts is complete."""
        replies = [reply_from_dict(data) for data in dense["replies"]]
        return [
            answered_after(self.tokenizer, reply, question, self.asking)
            for reply, question in zip(replies, self.questions, strict=True)
        ]

    def of_copy(self, key: str, label: str, made: Made, dense: dict[str, Any]) -> dict[str, Any]:
        """The numbers of one copy.

        Args:
            key: The point's name on disk.
            label: And in captions.
            made: The copy.
            dense: What `of_dense` returned.

        Raises:
            PrunekitError: The copy can't be measured.
        """
        started = time.perf_counter()
        model = made.model
        check_finite(model)
        replies = self._replies(model, label)
        ours = [reply_from_dict(data) for data in dense["replies"]]
        measures = reply_measures(ours, replies) if replies else {}
        found = {
            "facts": made.facts,
            "choices": self._choices(model),
            "answers": {name: _plain(values) for name, values in measures.items()},
            "given": [reply.given for reply in replies],
            "kl": None if self.text is None else self._divergence(key, label, model),
            "speed": self._speed(model) if self.speed else None,
            **_sizes(model),
            "bytes_on_disk": made.bytes_on_disk,
        }
        return {**found, "seconds": round(time.perf_counter() - started, 1)}

    def _choices(self, model: PreTrainedModel) -> dict[str, Any] | None:
        if not self.choices:
            return None
        found = quality.single_step(model, self.tokenizer, self.choices, progress=self.progress)
        return {"right": list(found.right), "chance": float(found.scores["chance"].mean)}

    def _replies(self, model: PreTrainedModel, label: str) -> list[Reply]:
        if not self.questions:
            return []
        return answered(
            model,
            self.tokenizer,
            self.questions,
            self.asking,
            ends=generation.end_tokens(self.dense),
            entropies=model is self.dense,
            progress=self.progress,
            label=label,
        )

    def _divergence(self, key: str, label: str, model: PreTrainedModel) -> dict[str, Any]:
        """`kld`'s means with their intervals, and what the prediction is made from."""
        found = kld(
            self.dense,
            {label: model},
            self.text,
            context=self.context,
            output=self.folder / "kl" / key,
            reference_cache=self.folder / "reference",
            floor="none",
            device=self.device,
            tokenizer=self.tokenizer,
            progress=self.progress,
        )
        (row,) = found.rows
        if row.found is None:
            raise PrunekitError(row.error)
        values = row.found.values
        return {
            "means": found[label]["means"],
            "positions": found.plan["positions"],
            "flips": flips_by_entropy(values["entropy_base"], values["flipped"]),
        }

    def _speed(self, model: PreTrainedModel) -> dict[str, Any]:
        """Seconds per token of the copy and of the dense model, in turns."""
        prompts = decoding.random_prompts(self.dense, 1, _SPEED_PROMPT)
        sides = {
            name: decoding.Continuation(one, prompts, _SPEED_NEW)
            for name, one in (("dense", self.dense), ("own", model))
        }
        for side in sides.values():
            side.decode()
        times = interleaved({name: side.decode for name, side in sides.items()}, _SPEED_ROUNDS)
        (told,) = distributed.gather(
            [{name: list(found.seconds) for name, found in times.items()}]
            if distributed.is_main()
            else []
        )
        return told


def reply_from_dict(data: dict[str, Any]) -> Reply:
    """A dense reply as it was recorded."""
    return Reply(
        tuple(data["ids"]), data["text"], data["given"], data["right"], tuple(data["entropies"])
    )


def _reply_to_dict(reply: Reply) -> dict[str, Any]:
    rounded = [round(value, 6) for value in reply.entropies]
    return {**vars(reply), "ids": list(reply.ids), "entropies": rounded}


def _sizes(model: PreTrainedModel) -> dict[str, Any]:
    return {"parameters": weight_count(model), "bytes_in_memory": bytes_in_memory(model)}


def _plain(values: np.ndarray[Any, Any]) -> list[float | None]:
    return [None if math.isnan(value) else float(value) for value in values]
