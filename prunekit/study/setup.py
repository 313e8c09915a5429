"""`Setup`: the settings of a comparison, which every part of a study shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from prunekit.analysis import decoding, quality
from prunekit.analysis.answers import Answers
from prunekit.analysis.decoding import Decoding
from prunekit.analysis.quality import SingleStep
from prunekit.analysis.spaces import Weights
from prunekit.errors import PrunekitError
from prunekit.evaluation.answering import Asking, answered
from prunekit.evaluation.items import Choice
from prunekit.evaluation.questions import Question
from prunekit.models import generation
from prunekit.models.generation import Rollout
from prunekit.study.baseline import Baseline
from prunekit.study.sharing import gather_decoding, over_shares


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The settings of comparisons with one dense model.

    Attributes:
        dense: The dense model.
        tokenizer: The tokenizer of all models.
        prompts: Texts to continue.
        choices: Multiple-choice questions; may be empty.
        questions: Questions that are answered with text; may be empty.
        asking: How they are asked.
        max_new_tokens: Longest continuation.
        temperature: T in p = softmax(z / T) of the metrics; decoding itself is greedy.
        weights: Whose distribution weighs the second-order estimates, see `Reader`.
        batch_size: Prompts run together.
        chat: Whether prompts are asked through the chat template, see `generation.encode`.
        seed: Seed of every interval's resampling.
        progress: Show progress bars (on a terminal only).
        shared: A baseline that other comparisons use too, or None.
    """

    dense: PreTrainedModel
    tokenizer: Any
    prompts: Sequence[str]
    choices: Sequence[Choice]
    questions: Sequence[Question] = ()
    asking: Asking = field(default_factory=Asking)
    max_new_tokens: int
    temperature: float
    weights: Weights = "base"
    batch_size: int
    chat: generation.Chat
    seed: int
    progress: bool
    shared: Baseline | None

    @cached_property
    def baseline(self) -> Baseline:
        """The dense model's own texts and scores: `shared` if there is one, else a new `Baseline`.

        Raises:
            PrunekitError: `shared` belongs to another model, or was asked in another way.
        """
        given = self.shared
        if given is None:
            return Baseline(
                self.dense,
                self.tokenizer,
                max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size,
                chat=self.chat,
                progress=self.progress,
            )
        asked = (self.max_new_tokens, self.chat)
        if given.dense is not self.dense or (given.max_new_tokens, given.chat) != asked:
            raise PrunekitError(
                "the baseline is of another model, max_new_tokens or chat: make it with those of "
                "the comparison, or leave it out"
            )
        return given

    def rollouts(self) -> list[Rollout]:
        """The dense model's greedy continuations of the prompts, generated when first asked for."""
        return self.baseline.rollouts(self.prompts)

    def decode(self, pruned: PreTrainedModel) -> Decoding:
        """Both protocols of `decoding.decode` on every prompt; each process decodes its share.

        Args:
            pruned: The model to compare; the dense model itself is not run twice.
        """

        def decoded(share: Sequence[tuple[str, Rollout]]) -> Decoding:
            return decoding.decode(
                self.dense,
                pruned,
                self.tokenizer,
                [prompt for prompt, _ in share],
                rollouts=[rollout for _, rollout in share],
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
                weights=self.weights,
                batch_size=self.batch_size,
                chat=self.chat,
                progress=self.progress,
            )

        asked = list(zip(self.prompts, self.rollouts(), strict=True))
        return over_shares(asked, decoded, gather_decoding)

    def single_step(self, model: PreTrainedModel) -> SingleStep:
        """`quality.single_step` of a model, the dense model's from the baseline."""
        if model is self.dense:
            return self.baseline.single_step(self.choices)
        return quality.single_step(model, self.tokenizer, self.choices, progress=self.progress)

    def answers(self, pruned: PreTrainedModel) -> Answers:
        """Both models' generated answers; the dense model's are the baseline's."""
        ours = theirs = self.baseline.replies(self.questions, self.asking)
        if pruned is not self.dense:
            theirs = answered(
                pruned,
                self.tokenizer,
                self.questions,
                self.asking,
                ends=generation.end_tokens(self.dense),
                progress=self.progress,
                label="pruned",
            )
        return Answers.of(self.questions, ours, theirs)
