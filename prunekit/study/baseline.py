"""The dense model's own texts and scores, computed once for all comparisons with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from prunekit.analysis import quality
from prunekit.analysis.quality import SingleStep
from prunekit.evaluation.answering import Asking, Reply, answered
from prunekit.evaluation.items import Choice
from prunekit.evaluation.questions import Question
from prunekit.models import generation
from prunekit.models.generation import Rollout
from prunekit.process import distributed


class Baseline:
    """The dense model's greedy texts and single-step scores, each computed when first asked for.

    Several comparisons with the same dense model share one; it must not change meanwhile. Under
    several processes each computes its share, and all hold the whole.

    Args:
        dense: The dense model, in eval mode.
        tokenizer: Its tokenizer.
        max_new_tokens: Longest continuation.
        batch_size: Prompts run together.
        chat: Whether prompts are asked through the chat template, see `generation.encode`.
        progress: Show progress bars (on a terminal only).
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        tokenizer: Any,
        *,
        max_new_tokens: int = 48,
        batch_size: int = 8,
        chat: generation.Chat = "auto",
        progress: bool = True,
    ) -> None:
        self.dense, self.tokenizer = dense, tokenizer
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size
        self.chat, self.progress = chat, progress
        self._rollouts: dict[str, Rollout] = {}
        self._answers: dict[tuple[Choice, ...], SingleStep] = {}
        self._replies: dict[tuple[tuple[Question, ...], Asking], list[Reply]] = {}

    def rollouts(self, prompts: Sequence[str]) -> list[Rollout]:
        """The dense model's greedy continuation of each prompt.

        Raises:
            PrunekitError: A prompt is empty or too long for the model's context.
        """
        new = [text for text in dict.fromkeys(prompts) if text not in self._rollouts]
        if not new:
            return [self._rollouts[text] for text in prompts]
        encoded = generation.encode(self.tokenizer, new, chat=self.chat)
        generation.check_context(self.dense, encoded, self.max_new_tokens)
        found = generation.generate(
            self.dense,
            distributed.shard(encoded),
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            progress=self.progress,
            label="dense",
        )
        self._rollouts |= zip(new, distributed.gather(found), strict=True)
        return [self._rollouts[text] for text in prompts]

    def single_step(self, choices: Sequence[Choice]) -> SingleStep:
        """`quality.single_step` of the dense model."""
        asked = tuple(choices)
        if asked not in self._answers:
            self._answers[asked] = quality.single_step(
                self.dense, self.tokenizer, asked, progress=self.progress
            )
        return self._answers[asked]

    def replies(self, questions: Sequence[Question], asking: Asking) -> list[Reply]:
        """The dense model's generated answers to open questions."""
        asked = tuple(questions), asking
        if asked not in self._replies:
            self._replies[asked] = answered(
                self.dense, self.tokenizer, questions, asking, progress=self.progress, label="dense"
            )
        return self._replies[asked]
