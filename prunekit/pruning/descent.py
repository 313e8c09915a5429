"""Adam under masks, whatever is minimised: what reconstruction and recovery have in common.

Knows no model: it has tensors by name, masks of some of them, and a function that gives the error
of an item of data under given tensors. Held-out items decide which state is returned. Under several
processes each gives its own items, and gradients are summed. A run that was recorded goes on behind
its last check, with the same numbers as one that was never killed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prunekit.errors import PrunekitError, one_line
from prunekit.files.atomic import replaced_file
from prunekit.process import distributed

#: Computes (sum of errors, number of tokens) of an item of data under some tensors.
Errors = Callable[[Mapping[str, Tensor], int], tuple[Tensor, int]]
_WARM = 0.2  # share of the updates over which the learning rate rises
_BETAS = 0.9, 0.95
_ZEROS = 0.02  # stands for the root mean square of a tensor of zeros


class Schedule(Protocol):
    """The settings of a descent.

    Attributes:
        steps: Updates.
        tokens: Tokens per update, at least one item.
        lr: Highest learning rate, as a fraction of each tensor's root mean square.
        checks: How often the held-out error is measured.
        patience: Checks without improvement after which it ends.
        seed: Of the order of items.
    """

    @property
    def steps(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def checks(self) -> int: ...
    @property
    def patience(self) -> int: ...
    @property
    def seed(self) -> int: ...


def check_schedule(settings: Schedule, what: str) -> None:
    """Raise a PrunekitError for settings that are out of range."""
    for name in ("steps", "tokens", "checks", "patience"):
        if getattr(settings, name) < 1:
            raise PrunekitError(
                f"{what} {name} {getattr(settings, name)} is too small: use at least 1"
            )
    if not 0 < settings.lr < math.inf:
        raise PrunekitError(f"{what} lr {settings.lr} is not positive: use for example 0.01")


def check_share(held_out: float, what: str) -> None:
    """Raise a PrunekitError unless `held_out` is a share of sequences."""
    if not 0 < held_out < 1:
        raise PrunekitError(
            f"{what} held_out {held_out} is no share between 0 and 1: use for example 0.0625"
        )


def split(
    sequences: Sequence[Tensor], share: float, what: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Sequences for the gradients, and held-out ones, spread evenly over the given order.

    Raises:
        PrunekitError: There are fewer than two.
    """
    if len(sequences) < 2:
        raise PrunekitError(
            f"{what} holds some calibration sequences out, and there is {len(sequences)}: give at "
            "least 2 samples, better 64 of 512 tokens"
        )
    count = min(len(sequences) - 1, max(1, round(share * len(sequences))))
    held = {(2 * index + 1) * len(sequences) // (2 * count) for index in range(count)}
    return (
        [tokens for index, tokens in enumerate(sequences) if index not in held],
        [tokens for index, tokens in enumerate(sequences) if index in held],
    )


@dataclass
class Course:
    """The course of a descent.

    Attributes:
        before: Mean held-out error per token at the start.
        least: The same of the state that is returned.
        steps: Updates that were made; those after the best check are undone.
        curve: (update, held-out error) of every check, the start first.
        waited: Checks since the best one.
        note: What was unusual, or "".
    """

    before: float
    least: float
    steps: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)
    waited: int = 0
    note: str = ""


def descend(
    start: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    errors: Errors,
    fitted: Sequence[int],
    held: Sequence[int],
    sizes: Mapping[int, int],
    settings: Schedule,
    *,
    record: Path | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Tensor], Course]:
    """Minimise the mean error of `fitted`; of all states that were checked, return the best.

    Args:
        start: float32 tensors by name; unchanged.
        keep: Masks of some of them, True where a value may change; elsewhere it is zero and stays.
        errors: The error of one item, differentiable.
        fitted: Items for the gradients.
        held: Items that decide.
        sizes: Tokens of each item.
        settings: How.
        record: File from which a killed run goes on; written at every check.
        tell: Called with the updates done, and all.

    Returns:
        The best state, and the course. An error that is not finite ends it at the last good state.

    Raises:
        PrunekitError: The record can't be read or written.
    """
    state = {name: value.clone().requires_grad_() for name, value in start.items()}
    device = next(iter(state.values())).device
    optimizer = torch.optim.Adam(
        [
            {"params": [value], "rate": settings.lr * _scale(start[name], keep.get(name))}
            for name, value in state.items()
        ],
        betas=_BETAS,
    )
    best = dict(start)
    if record is not None and record.is_file():
        best, course = _resumed(record, state, best, optimizer)
    else:
        error = _mean(errors, state, held)
        if not math.isfinite(error):
            return best, Course(error, error, note="the error is not finite at the start")
        course = Course(error, error, curve=[(0, error)])
    checks = {round((at + 1) * settings.steps / settings.checks) for at in range(settings.checks)}
    for step, items in enumerate(_batches(fitted, sizes, settings)):
        if step < course.steps:
            continue
        if course.waited >= settings.patience:
            break
        optimizer.zero_grad()
        total = torch.zeros(2, dtype=torch.float64, device=device)
        with torch.enable_grad():
            for item in items:
                found, count = errors(state, item)
                torch.autograd.backward(found)
                total += _counted(found, count)
        summed, tokens = distributed.all_reduce_(total).tolist()
        if not math.isfinite(summed):
            course.note = f"the error was not finite at update {step + 1}: stopped there"
            break
        for name, value in state.items():
            gradient = torch.zeros_like(value) if value.grad is None else value.grad
            distributed.all_reduce_(gradient)
            gradient /= tokens
            value.grad = gradient if name not in keep else gradient.mul_(keep[name])
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * one_cycle(step, settings.steps)
        optimizer.step()
        course.steps = step + 1
        if tell is not None:
            tell(course.steps, settings.steps)
        if course.steps not in checks:
            continue
        error = _mean(errors, state, held)
        course.curve.append((course.steps, error))
        course.waited += 1
        if error < course.least:
            course.least, course.waited = error, 0
            best = {name: value.detach().clone() for name, value in state.items()}
        if record is not None and distributed.is_main():
            _write(record, state, best, optimizer, course)
    if not course.least < course.before:
        course.note = course.note or "its error on held-out tokens did not fall: left as it was"
    return best, course


def one_cycle(step: int, steps: int) -> float:
    """The share of the highest learning rate at `step` of `steps`: a line up, a cosine down."""
    rising = max(1, round(_WARM * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _batches(
    items: Sequence[int], sizes: Mapping[int, int], settings: Schedule
) -> Iterator[list[int]]:
    """Items of each update: everyone's share of `tokens`, in an order drawn anew every round.

    An update takes no item twice: there may be fewer tokens than it asks for.
    """
    share = min(settings.tokens / distributed.world_size(), sum(sizes[item] for item in items))
    draw = torch.Generator().manual_seed(settings.seed)
    waiting: list[int] = []
    for _ in range(settings.steps):
        taken: list[int] = []
        while items and (not taken or sum(sizes[item] for item in taken) < share):
            if not waiting:
                waiting = [items[at] for at in torch.randperm(len(items), generator=draw)]
            taken.append(waiting.pop())
        yield taken


@torch.no_grad()
def _mean(errors: Errors, state: Mapping[str, Tensor], items: Sequence[int]) -> float:
    """The mean error per token of all processes' items."""
    total = torch.zeros(2, dtype=torch.float64, device=next(iter(state.values())).device)
    for item in items:
        total += _counted(*errors(state, item))
    summed, tokens = distributed.all_reduce_(total).tolist()
    return float(summed / tokens)


def _counted(error: Tensor, count: int) -> Tensor:
    """(sum of errors, tokens) as one float64 tensor."""
    return torch.stack([error.detach().double(), error.new_tensor(count, dtype=torch.float64)])


def _scale(tensor: Tensor, keep: Tensor | None) -> float:
    """The root mean square of the values that may change."""
    values = tensor if keep is None else tensor[keep]
    return float(values.square().mean().sqrt()) if values.any() else _ZEROS


def _write(
    path: Path,
    state: Mapping[str, Tensor],
    best: Mapping[str, Tensor],
    optimizer: torch.optim.Adam,
    course: Course,
) -> None:
    tensors = {f"state/{name}": value.detach() for name, value in state.items()}
    if course.waited:  # otherwise the state is the best
        tensors |= {f"best/{name}": value for name, value in best.items()}
    for name, value in state.items():
        moments = optimizer.state[value]
        tensors |= {f"{part}/{name}": moments[part] for part in ("exp_avg", "exp_avg_sq")}
    held = {name: value.cpu().contiguous() for name, value in tensors.items()}
    try:
        with replaced_file(path) as written:
            save_file(held, written, {"course": json.dumps(asdict(course))})
    except (OSError, SafetensorError) as error:
        raise PrunekitError(
            f"{path} can't be written ({one_line(error)}): free some space, or run without a "
            "journal"
        ) from error


def _resumed(
    path: Path,
    state: Mapping[str, Tensor],
    best: dict[str, Tensor],
    optimizer: torch.optim.Adam,
) -> tuple[dict[str, Tensor], Course]:
    """Put a recorded state into `state` and the optimizer; the best one and the course so far."""
    try:
        with safe_open(path, "pt") as file:
            course = Course(**json.loads(file.metadata()["course"]))
            course.curve = [(step, error) for step, error in course.curve]
            names = set(file.keys())
            for name, value in state.items():
                value.data.copy_(file.get_tensor(f"state/{name}"))
                optimizer.state[value] = {
                    "step": torch.tensor(float(course.steps)),
                    **{
                        part: file.get_tensor(f"{part}/{name}").to(value.device)
                        for part in ("exp_avg", "exp_avg_sq")
                    },
                }
                whose = "best" if f"best/{name}" in names else "state"
                best[name] = file.get_tensor(f"{whose}/{name}").to(value.device)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise PrunekitError(
            f"{path} can't be read ({one_line(error)}): delete it to start anew"
        ) from error
    return best, course
