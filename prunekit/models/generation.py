"""Batched continuation of prompts, the same way for every model.

Both models of a comparison must be asked in exactly the same way, so nothing is taken from a
checkpoint's own generation settings but its end-of-sequence tokens, and both see the same batches:
two identical models then give bitwise the same tokens.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    PreTrainedModel,
    StoppingCriteria,
)

from prunekit.errors import PrunekitError, one_line
from prunekit.files.texts import clean
from prunekit.models.architectures import Architecture, input_device
from prunekit.models.token_ids import check_ids, check_special, check_tokenizer, tokenize
from prunekit.process.ambient import usual_torch
from prunekit.process.progress import track

Chat = Literal["auto", "always", "never"]
#: Whether a continuation (its token ids so far) is complete.
Stop: TypeAlias = Callable[[Sequence[int]], bool]
# Fewer common tokens are not worth a pass of their own.
_SHORTEST_SHARED = 16


@dataclass(frozen=True)
class Rollout:
    """A prompt and a continuation of it, as token ids.

    Attributes:
        prompt: What the model was given, at least one token.
        continuation: What follows, without padding; ends with an end-of-sequence token if the
            model stopped by itself.
        entropies: Entropy of the model's next-token distribution at each token of `continuation`,
            in nats, where they were asked for.
    """

    prompt: tuple[int, ...]
    continuation: tuple[int, ...]
    entropies: tuple[float, ...] = field(default=(), compare=False)

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and continuation."""
        return self.prompt + self.continuation


def encode(
    tokenizer: Any, prompts: Sequence[str], *, chat: Chat = "auto", opening: str = ""
) -> list[list[int]]:
    """Token ids of each prompt, as one user turn where the tokenizer has a chat template.

    Args:
        tokenizer: A transformers tokenizer.
        prompts: Texts.
        chat: "auto" applies the chat template if there is one, "never" doesn't, "always" insists.
        opening: How the reply begins: behind the template's generation prompt, or on a line of its
            own behind a plain prompt.

    Returns:
        One list of token ids per prompt, unpadded.

    Raises:
        PrunekitError: A prompt is empty, `chat` is unknown, "always" without a chat template, or
            the template can't be applied to one user turn.
    """
    if chat not in get_args(Chat):
        raise PrunekitError(f"unknown chat '{chat}': use one of {', '.join(get_args(Chat))}")
    check_tokenizer(tokenizer)
    if isinstance(prompts, str) or not all(isinstance(text, str) for text in prompts):
        raise PrunekitError("prompts are not a list of texts: give one, such as ['Hello']")
    template = getattr(tokenizer, "chat_template", None)
    templated = chat == "always" or (chat == "auto" and bool(template))
    if templated and not template:
        raise PrunekitError("this tokenizer has no chat template: use chat='auto' or 'never'")
    found: list[list[int]] = []
    for index, text in enumerate(map(clean, prompts)):
        if not text.strip():
            raise PrunekitError(f"prompt {index} is empty: remove it or write something")
        if templated:
            text = _as_turn(tokenizer, text) + opening
        elif opening:
            text = f"{text}\n{opening}"
        # a rendered template already spells its special tokens out
        ids = tokenize(tokenizer, text, add_special_tokens=not templated)["input_ids"]
        if not ids:
            raise PrunekitError(f"prompt {index} has no tokens: write something longer")
        found.append([int(token) for token in ids])
    return found


def _as_turn(tokenizer: Any, text: str) -> str:
    """`text` as one user turn, through the tokenizer's chat template.

    Raises:
        PrunekitError: The template is not one that can be chosen, does not compile, wants other
            roles or parts, or leaves the text out.
    """

    def rendered(content: str) -> str:
        turn = [{"role": "user", "content": content}]
        try:
            made = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program, and raises what it likes
            named = tokenizer.chat_template
            which = f" (templates: {', '.join(named)})" if isinstance(named, dict) else ""
            raise PrunekitError(
                f"the tokenizer's chat template can't be applied to one user turn{which}: "
                f"{one_line(error)}; set tokenizer.chat_template to one that can, or use "
                "chat='never' (--chat never)"
            ) from error
        return str(made)

    found = rendered(text)
    # a template may change a text on its way in, but two texts must not become the same
    if found == rendered(f"{text} {text}"):
        raise PrunekitError(
            "the tokenizer's chat template leaves out what the user says as plain text: set "
            "tokenizer.chat_template to one that keeps it, or use chat='never' (--chat never)"
        )
    return found


def check_context(model: PreTrainedModel, prompts: Sequence[Sequence[int]], new: int) -> None:
    """Raise a PrunekitError unless the model can read each prompt and `new` more tokens.

    Raises:
        PrunekitError: They exceed its context, or a prompt holds an id that its embedding lacks.
    """
    limit = Architecture(model).context_length
    for index, ids in enumerate(prompts):
        check_ids(model, ids, f"prompt {index}")
        if len(ids) + new > limit:
            raise PrunekitError(
                f"prompt {index} has {len(ids)} tokens and {new} more are asked for, but the "
                f"model's context is {limit}: shorten the prompt or lower max_new_tokens"
            )


def common_prefix(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts have in common and a model can read once.

    0 where they are few, and for models whose attention slides: the padding behind the shared
    tokens would take room in their windows.
    """
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or ()
    if getattr(config, "sliding_window", None) or any("sliding" in kind for kind in kinds):
        return 0
    most = min((len(ids) for ids in prompts), default=1) - 1  # something is left of each
    common = next((i for i in range(most) if len({ids[i] for ids in prompts}) > 1), most)
    return common if common >= _SHORTEST_SHARED and len(prompts) > 1 else 0


@usual_torch()
@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 8,
    temperature: float = 0.0,
    seed: int = 0,
    ends: Sequence[int] | None = None,
    stop: Stop | None = None,
    shared: int = 0,
    entropies: bool = False,
    progress: bool = False,
    label: str = "generating",
) -> list[Rollout]:
    """Continue each prompt until an end-of-sequence token or `max_new_tokens`.

    Args:
        model: A transformers causal language model, in eval mode.
        prompts: Token ids, of any lengths (`encode` makes them).
        max_new_tokens: At least 1.
        batch_size: Prompts continued together, left-padded, similar lengths together.
        temperature: 0 decodes greedily; above, samples from softmax(logits / temperature).
        seed: Seed of the sampling.
        ends: Token ids that end a text; the model's own (`end_tokens`) by default.
        stop: Ends a text too, with the first token at which it is true.
        shared: How many leading tokens all prompts have in common (`common_prefix`): they are read
            once, and copies of their cache continued.
        entropies: Also record the entropy of each step's distribution.
        progress: Show a progress bar (on a terminal only).
        label: What the progress bar says.

    Returns:
        One `Rollout` per prompt, in order.

    Raises:
        PrunekitError: A prompt is empty or too long for the model's context, or an option is out
            of range.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise PrunekitError("max_new_tokens and batch_size must be at least 1: raise them")
    if temperature < 0:
        raise PrunekitError(f"temperature {temperature} is negative: use 0 (greedy) or more")
    if any(not len(ids) for ids in prompts):
        raise PrunekitError("a prompt has no tokens: remove it")
    check_context(model, prompts, max_new_tokens)
    ends = end_tokens(model) if ends is None else list(ends)
    config = _pinned(max_new_tokens, temperature, ends)
    device = input_device(model)
    prefix = list(prompts[0][:shared]) if shared else []
    cache = _read(model, prefix) if shared else None
    found: dict[int, Rollout] = {}
    with _own_defaults_set_aside(model), torch.random.fork_rng(enabled=temperature > 0):
        torch.manual_seed(seed) if temperature > 0 else None
        for indices in track(
            batches_by_length(prompts, batch_size), label, enabled=progress, count=len
        ):
            rests = [prompts[index][shared:] for index in indices]
            ids, mask = _behind(prefix, *left_padded(rests, config.pad_token_id))
            held = {} if cache is None else {"past_key_values": _copies(cache, len(indices))}
            watched = _Entropies()
            output = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=[watched] if entropies else None,
                stopping_criteria=None if stop is None else [_Stopped(stop, ids.shape[1])],
                **held,
            )
            for place, index in enumerate(indices):
                continuation = _until_end(output[place, ids.shape[1] :].tolist(), ends)
                continuation = continuation if stop is None else _until_stop(continuation, stop)
                steps = [float(step[place]) for step in watched.steps[: len(continuation)]]
                found[index] = Rollout(tuple(prompts[index]), tuple(continuation), tuple(steps))
    return [found[index] for index in range(len(prompts))]


class _Stopped(StoppingCriteria):
    """Ends each row of a batch when `stop` says so of what it has written."""

    def __init__(self, stop: Stop, width: int) -> None:
        self.stop, self.width = stop, width

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        rows = input_ids[:, self.width :].tolist()
        done = [self.stop(row) for row in rows]
        return torch.tensor(done, dtype=torch.bool, device=input_ids.device)


class _Entropies(LogitsProcessor):
    """Notes the entropy of every step's distributions, and leaves them as they are."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logs = scores.float().log_softmax(-1)
        self.steps.append(-(logs.exp() * logs).nan_to_num().sum(-1).double().cpu())
        return scores


def _read(model: PreTrainedModel, ids: Sequence[int]) -> Any:
    """The cache of one row of `ids`, or None for a model without one."""
    given = torch.tensor([list(ids)], device=input_device(model))
    return getattr(model(input_ids=given, use_cache=True), "past_key_values", None)


def _copies(cache: Any, count: int) -> Any:
    """`cache` of one row, as one of `count` rows."""
    made = copy.deepcopy(cache)
    made.batch_repeat_interleave(count)
    return made


def _behind(prefix: Sequence[int], ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ids and mask with the same tokens before all of them (and before their padding)."""
    if not prefix:
        return ids, mask
    before = torch.tensor(list(prefix)).expand(len(ids), -1)
    return torch.cat([before, ids], 1), torch.cat([torch.ones_like(before), mask], 1)


def end_tokens(model: PreTrainedModel) -> list[int]:
    """The token ids that end a text, by the model's generation settings or else its config.

    Raises:
        PrunekitError: One is no id of the model's embedding.
    """
    for config in (getattr(model, "generation_config", None), model.config):
        ends = getattr(config, "eos_token_id", None)
        if ends is not None:
            found = [ends] if isinstance(ends, int) else list(ends)
            check_special(model, "eos_token_id", found)
            return found
    return []


def batches_by_length(items: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    """Indices of `items` in groups of at most `batch_size`, similar lengths together."""
    order = sorted(range(len(items)), key=lambda index: len(items[index]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both (rows, longest) int64, padding on the left."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = torch.tensor(list(row), dtype=torch.int64)
        mask[index, longest - len(row) :] = 1
    return ids, mask


def _pinned(max_new_tokens: int, temperature: float, ends: list[int]) -> GenerationConfig:
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=1,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,  # masked, and cut off behind the end
        **(sampling if temperature > 0 else {"do_sample": False}),
    )


@contextlib.contextmanager
def _own_defaults_set_aside(model: PreTrainedModel) -> Iterator[None]:
    """Hide the checkpoint's generation settings: transformers fills every unset option from them.

    Without this a checkpoint's repetition penalty or minimum length would leak into greedy
    decoding.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _until_end(row: list[int], ends: list[int]) -> list[int]:
    """`row` up to and including its first end-of-sequence token."""
    stop = next((index for index, token in enumerate(row) if token in ends), len(row) - 1)
    return row[: stop + 1]


def _until_stop(row: list[int], stop: Stop) -> list[int]:
    """`row` up to and including the first token at which `stop` is true of it."""
    return next((row[:end] for end in range(1, len(row) + 1) if stop(row[:end])), row)
