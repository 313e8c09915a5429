"""Local reconstruction: gradient descent on the output of a pruned block, its zeros held.

A mask method chooses which weights stay, and at best corrects each matrix by itself. A block
(norms, attention, MLP, residual sums) is more than its matrices: their errors pass through its
nonlinearities and cancel or add up. With x_t the inputs that reach the pruned block when all
earlier blocks are pruned, y_t the dense model's own output there, and f_W the block, this minimises

    E(W) = mean over tokens t of ‖f_W(x_t) − y_t‖² / ‖y_t‖²

by Adam under a one-cycle learning rate, over all parameters of the block, zeros of its matrices
held. Each token counts alike however large its states are: the next block normalises them. y comes
from the dense prefix and x from the pruned one, so a block also makes up for what earlier ones
lost. Tokens held out decide: the state of the least held-out error is kept, if the start's is more.

Source: "A Free Lunch in LLM Compression: Revisiting Retraining after Pruning", arXiv 2510.14444.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from prunekit.errors import PrunekitError
from prunekit.models import blocks
from prunekit.process import distributed
from prunekit.pruning.report import BlockFit
from prunekit.pruning.stream import Stream

#: Computes (sum of errors, number of tokens) of an item of data under some parameters.
Errors = Callable[[Mapping[str, Tensor], int], tuple[Tensor, int]]


@dataclass(frozen=True)
class Reconstruction:
    """The settings of local reconstruction.

    Attributes:
        steps: Updates per block.
        tokens: Tokens per update, at least one batch of sequences.
        lr: Highest learning rate, as a fraction of each tensor's root mean square: what Adam may
            change about its weights in one update.
        held_out: Share of the calibration sequences that gradients never see, in (0, 1).
        checks: How often per block the held-out error is measured.
        patience: Checks without improvement after which a block is done.
        seed: Of the order of batches.
    """

    steps: int = 64
    tokens: int = 2048
    lr: float = 0.01
    held_out: float = 0.0625
    checks: int = 8
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "tokens", "checks", "patience"):
            if getattr(self, name) < 1:
                raise PrunekitError(
                    f"reconstruction {name} {getattr(self, name)} is too small: use at least 1"
                )
        if not 0 < self.lr < math.inf:
            raise PrunekitError(
                f"reconstruction lr {self.lr} is not positive: use for example 0.01"
            )
        if not 0 < self.held_out < 1:
            raise PrunekitError(
                f"reconstruction held_out {self.held_out} is no share between 0 and 1: use for "
                "example 0.0625"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def split(self, sequences: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Sequences for the gradients, and held-out ones, spread evenly over the given order.

        Raises:
            PrunekitError: There are fewer than two.
        """
        if len(sequences) < 2:
            raise PrunekitError(
                f"reconstruction holds some calibration sequences out, and there is "
                f"{len(sequences)}: give at least 2 samples, better 64 of 512 tokens"
            )
        count = min(len(sequences) - 1, max(1, round(self.held_out * len(sequences))))
        held = {(2 * index + 1) * len(sequences) // (2 * count) for index in range(count)}
        return (
            [tokens for index, tokens in enumerate(sequences) if index not in held],
            [tokens for index, tokens in enumerate(sequences) if index in held],
        )


@dataclass(frozen=True)
class Targets:
    """The dense model's states, and how pruned blocks are fitted to them.

    Attributes:
        states: At the exit of the block that is fitted.
        held: Indices of the batches that are held out; the others are fitted.
        settings: How.
    """

    states: Stream
    held: range
    settings: Reconstruction


def reconstruct_(inputs: Stream, targets: Targets, index: int) -> BlockFit:
    """Fit a pruned block to the dense model's states; the zeros of its matrices stay.

    Args:
        inputs: At the entrance of the block; runs in the type that `calibration_dtype` says, while
            gradients and updates are float32.
        targets: What it is fitted to.
        index: Of the block.

    Returns:
        The errors before and after. A block whose held-out error does not fall stays as it was.
    """
    layer = inputs.arch.layers[index]
    with torch.inference_mode(False):
        tensors = dict(layer.named_parameters())
        start = {name: tensor.detach().float().clone() for name, tensor in tensors.items()}
        keep = {name: tensor != 0 for name, tensor in start.items() if tensor.ndim > 1}

        def errors(state: Mapping[str, Tensor], position: int) -> tuple[Tensor, int]:
            hidden, kwargs = _plain(inputs.at(position, index))
            wanted = _plain(targets.states.at(position, index)[0]).float()
            given = blocks.run_layer_with(layer, state, hidden, kwargs).float()
            error = (given - wanted).square().sum(-1) / wanted.square().sum(-1)
            return error.sum(), error.numel()

        sizes = dict(enumerate(inputs.tokens))
        fitted = [at for at, number in enumerate(inputs.indices) if number not in targets.held]
        checked = [at for at, number in enumerate(inputs.indices) if number in targets.held]
        best, fit = descend(start, keep, errors, fitted, checked, sizes, targets.settings, index)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.data.copy_(best[name])
    return fit


def descend(
    start: Mapping[str, Tensor],
    keep: Mapping[str, Tensor],
    errors: Errors,
    fitted: Sequence[int],
    checked: Sequence[int],
    sizes: Mapping[int, int],
    settings: Reconstruction,
    index: int = 0,
) -> tuple[dict[str, Tensor], BlockFit]:
    """Minimise the mean error of `fitted`; of all states that were checked, return the best.

    Knows no model. Under several processes each gives its own items; gradients are summed.

    Args:
        start: float32 tensors by name; unchanged.
        keep: Masks of some of them, True where a value may change; elsewhere it is zero and stays.
        errors: The error of one item, differentiable.
        fitted: Items for the gradients.
        checked: Items that decide.
        sizes: Tokens of each item.
        settings: How.
        index: Of the block, for the report.

    Returns:
        The best state, and the errors before and after.
    """
    state = {name: value.clone().requires_grad_() for name, value in start.items()}
    device = next(iter(state.values())).device
    rates = [settings.lr * _scale(value, keep.get(name)) for name, value in start.items()]
    optimizer = torch.optim.Adam(
        [
            {"params": [value], "lr": rate}
            for value, rate in zip(state.values(), rates, strict=True)
        ],
        betas=(0.9, 0.95),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: one_cycle(step, settings.steps)
    )
    checks = {round((at + 1) * settings.steps / settings.checks) for at in range(settings.checks)}
    before = least = _mean(errors, state, checked)
    best = dict(start)
    note, waited, done = "", 0, 0
    for items in _batches(fitted, sizes, settings):
        optimizer.zero_grad()
        total = torch.zeros(2, dtype=torch.float64, device=device)
        with torch.enable_grad():
            for item in items:
                error, count = errors(state, item)
                torch.autograd.backward(error)
                total += _counted(error, count)
        summed, tokens = distributed.all_reduce_(total).tolist()
        if not math.isfinite(summed):
            note = f"the error was not finite at update {done + 1}: stopped there"
            break
        for name, value in state.items():
            gradient = torch.zeros_like(value) if value.grad is None else value.grad
            distributed.all_reduce_(gradient)
            gradient /= tokens
            value.grad = gradient if name not in keep else gradient.mul_(keep[name])
        optimizer.step()
        schedule.step()
        done += 1
        if done not in checks:
            continue
        found = _mean(errors, state, checked)
        waited += 1
        if found < least:
            least, waited = found, 0
            best = {name: value.detach().clone() for name, value in state.items()}
        if waited == settings.patience:
            break
    if not least < before:
        note = note or "its error on held-out tokens did not fall: left as pruned"
    return best, BlockFit(index, before, least, done, note)


def one_cycle(step: int, steps: int, warm: float = 0.2) -> float:
    """The share of the highest learning rate at `step` of `steps`: a line up, a cosine down."""
    rising = max(1, round(warm * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _batches(
    items: Sequence[int], sizes: Mapping[int, int], settings: Reconstruction
) -> Iterator[list[int]]:
    """Items of each update: everyone's share of `tokens`, in an order drawn anew every round."""
    share = settings.tokens / distributed.world_size()
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
    """The root mean square of the values that may change; 0.02 for a tensor of zeros."""
    values = tensor if keep is None else tensor[keep]
    return float(values.square().mean().sqrt()) or 0.02


def _plain(nest: Any) -> Any:
    """A nest whose tensors autograd may keep: those made in inference mode are copied."""
    if isinstance(nest, Tensor):
        return nest.clone() if nest.is_inference() else nest
    if isinstance(nest, list | tuple):
        return type(nest)(_plain(part) for part in nest)
    if isinstance(nest, dict):
        return {key: _plain(value) for key, value in nest.items()}
    return nest
