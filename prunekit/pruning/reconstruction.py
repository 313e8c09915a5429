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

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from prunekit.models import blocks
from prunekit.pruning.descent import check_schedule, check_share, descend, split
from prunekit.pruning.report import BlockFit
from prunekit.pruning.stream import Stream


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
        check_schedule(self, "reconstruction")
        check_share(self.held_out, "reconstruction")

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def split(self, sequences: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Sequences for the gradients, and held-out ones; see `descent.split`."""
        return split(sequences, self.held_out, "reconstruction")


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
        best, course = descend(start, keep, errors, fitted, checked, sizes, targets.settings)
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.data.copy_(best[name])
    return BlockFit(index, course.before, course.least, course.steps, course.note)


def _plain(nest: Any) -> Any:
    """A nest whose tensors autograd may keep: those made in inference mode are copied."""
    if isinstance(nest, Tensor):
        return nest.clone() if nest.is_inference() else nest
    if isinstance(nest, list | tuple):
        return type(nest)(_plain(part) for part in nest)
    if isinstance(nest, dict):
        return {key: _plain(value) for key, value in nest.items()}
    return nest
