"""Ask questions, let a model write, and score the answer that its text ends with: exact match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from prunekit.errors import PrunekitError
from prunekit.evaluation.extraction import answer_end, given_answer, same_answer
from prunekit.evaluation.questions import Question
from prunekit.models import generation
from prunekit.process import distributed

# Where an answer to a few-shot prompt ends: the model goes on with questions of its own.
_BREAKS = ("\n\n", "\nQuestion:", "\nQ:")


@dataclass(frozen=True)
class Asking:
    """How questions are asked.

    Attributes:
        examples: Questions with their worked answers that stand before each question. With any,
            prompts are plain text, and an answer ends at an empty line or the next question;
            without, the chat template is used as `chat` says.
        max_new_tokens: Longest answer.
        batch_size: Questions answered together.
        chat: See `generation.encode`; without examples only.
    """

    examples: tuple[Question, ...] = ()
    max_new_tokens: int = 64
    batch_size: int = 32
    chat: generation.Chat = "auto"

    def prompts(self, questions: Sequence[Question]) -> list[str]:
        """The text that is asked for each question."""
        if not self.examples:
            return [one.question for one in questions]
        shown = "".join(f"Question: {e.question}\nAnswer: {e.worked}\n\n" for e in self.examples)
        return [f"{shown}Question: {one.question}\nAnswer:" for one in questions]

    def facts(self) -> dict[str, Any]:
        """What two runs must have in common to be compared, as plain data."""
        return {
            "examples": [asdict(example) for example in self.examples],
            "max_new_tokens": self.max_new_tokens,
            "batch_size": self.batch_size,
            "chat": self.chat,
        }


@dataclass(frozen=True)
class Reply:
    """One answer.

    Attributes:
        ids: Token ids of what the model wrote, up to where the answer ends.
        text: The same as text.
        given: The answer that was extracted, None if there is none.
        right: Whether it is the right one (`same_answer`).
        entropies: Entropy of each step, in nats, where they were asked for.
    """

    ids: tuple[int, ...]
    text: str
    given: str | None
    right: bool
    entropies: tuple[float, ...] = ()


def answered(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: Sequence[Question],
    asking: Asking,
    *,
    ends: Sequence[int] | None = None,
    entropies: bool = False,
    progress: bool = False,
    label: str = "answering",
) -> list[Reply]:
    """Greedy answers to all questions.

    Every process answers its share of the batches, which are the same for any number of
    processes, and all of them return all replies.

    Args:
        model: A causal language model, in eval mode.
        tokenizer: Its tokenizer.
        questions: At least one.
        asking: How they are asked.
        ends: Token ids that end a text; the model's own by default.
        entropies: Also record each step's entropy.
        progress: Show a progress bar (on a terminal only).
        label: Its caption.

    Raises:
        PrunekitError: There are no questions, or one is too long for the model's context.
    """
    if not questions:
        raise PrunekitError("no questions to answer: pass at least one")
    encoded = encode(tokenizer, questions, asking)
    batches = distributed.shard(generation.batches_by_length(encoded, asking.batch_size))
    mine = [index for batch in batches for index in batch]
    rollouts = generation.generate(
        model,
        [encoded[index] for index in mine],
        max_new_tokens=asking.max_new_tokens,
        batch_size=asking.batch_size,
        ends=ends,
        stop=_complete(tokenizer) if asking.examples else None,
        shared=generation.common_prefix(model, encoded) if asking.examples else 0,
        entropies=entropies,
        progress=progress,
        label=label,
    )
    replies = {
        index: _reply(tokenizer, rollout, questions[index], asking)
        for index, rollout in zip(mine, rollouts, strict=True)
    }
    shares = distributed.gather([[(index, replies[index]) for index in one] for one in batches])
    replies = dict(pair for share in shares for pair in share)
    return [replies[index] for index in range(len(questions))]


def answered_after(tokenizer: Any, reply: Reply, question: Question, asking: Asking) -> int:
    """How many tokens a reply has when its answer is complete (`answer_end`), the last included.

    A text with these tokens gives the same answer unless it gives another one later.
    """
    ids = list(reply.ids)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    end = _end(text) if asking.examples else None
    # the line break that the break begins with ends the answer
    place = answer_end(text if end is None else text[: end + 1], question.answer)
    if place is None:
        return len(ids)
    for count in range(1, len(ids)):
        if tokenizer.decode(ids[:count], skip_special_tokens=True).startswith(text[:place]):
            return count
    return len(ids)


def encode(tokenizer: Any, questions: Sequence[Question], asking: Asking) -> list[list[int]]:
    """Token ids of each question's prompt.

    Raises:
        PrunekitError: See `generation.encode`.
    """
    chat: generation.Chat = "never" if asking.examples else asking.chat
    return generation.encode(tokenizer, asking.prompts(questions), chat=chat)


def _complete(tokenizer: Any) -> generation.Stop:
    """Whether a few-shot answer, which begins on the prompt's last line, is complete."""

    def complete(ids: Sequence[int]) -> bool:
        # Two tokens may make a break together; a tail of a few holds every one that is new.
        return _end(tokenizer.decode(list(ids[-8:]))) is not None

    return complete


def _end(text: str) -> int | None:
    """Where the first break of `text` begins, None without one."""
    places = [place for place in (text.find(sign) for sign in _BREAKS) if place >= 0]
    return min(places) if places else None


def _reply(
    tokenizer: Any, rollout: generation.Rollout, question: Question, asking: Asking
) -> Reply:
    text = tokenizer.decode(list(rollout.continuation), skip_special_tokens=True)
    if asking.examples:
        text = text[: _end(text)]
    text = text.strip()
    given = given_answer(text, question.answer)
    right = same_answer(given, question.answer)
    return Reply(rollout.continuation, text, given, right, rollout.entropies)
