"""The same model pruned in each way that could make it smaller or faster, to compare their speed.

Which weights or sublayers go makes no difference to speed, so the cheapest choice is made: the
smallest weights, the last attentions. For a model worth keeping, use `prune_` and `drop_`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from prunekit.errors import PrunekitError
from prunekit.models.architectures import Architecture
from prunekit.models.dropped import drop_sublayers_
from prunekit.packed.formats import FORMATS
from prunekit.pruning import Magnitude, prune_
from prunekit.speed import decoding as speed
from prunekit.swap import exact_formats, swap_, unswap_

#: Every variant by name: formats are packed under their own.
VARIANTS = ("dense", "dropped", *FORMATS)
#: Those that are compared unless others are named: no value is rounded.
USUAL = ("dense", "dropped", *exact_formats())


@dataclass(frozen=True)
class Variant:
    """A model to be timed.

    Attributes:
        name: One of `VARIANTS`, or the name of a given checkpoint.
        model: The model, in eval mode.
        what: What was done to it.
        difference: How far packing moved its logits from those of the same weights, rounded ones
            where the format rounds, as dense zeros: largest difference over their standard
            deviation; 0 where nothing is packed.
    """

    name: str
    model: PreTrainedModel
    what: str
    difference: float = 0.0


def build(dense: PreTrainedModel, name: str, *, sparsity: float = 0.5) -> Variant:
    """One variant of a model.

    Args:
        dense: The model; not changed, and shared by the variant "dense".
        name: One of `VARIANTS`.
        sparsity: Share of weights that "bitmap" sets to zero, and of attentions that "dropped"
            takes out, halved (a quarter of them at 0.5).

    Returns:
        The variant.

    Raises:
        PrunekitError: The name is unknown, or no layer of the model fits the format.
    """
    if name not in VARIANTS:
        raise PrunekitError(f"variant '{name}' is unknown: use {', '.join(VARIANTS)}")
    if name == "dense":
        return Variant(name, dense, "as it is")
    model = copy.deepcopy(dense)
    if name == "dropped":
        present = [i for i, part in enumerate(Architecture(model).attentions()) if part is not None]
        count = max(1, round(sparsity / 2 * len(present)))
        drop_sublayers_(model, attn=present[-count:])
        return Variant(name, model, f"{count} of {len(present)} attentions dropped")
    two_four = name.startswith("2:4")
    prune_(model, Magnitude(pattern="2:4") if two_four else Magnitude(sparsity=sparsity))
    return _packed(name, model)


def _packed(name: str, model: PreTrainedModel) -> Variant:
    """Sparse kernels swapped in, and what that did to the logits."""
    prompts = speed.random_prompts(model, 1, 16)
    before = _logits(model, prompts)
    report = swap_(model, formats=[name], min_speedup=0.0)
    if not report.swapped:
        why = next((module.reason for module in report.modules), "it has no linear layers")
        raise PrunekitError(f"{name}: no layer was packed ({why}): leave it out of --variants")
    what = f"{len(report.swapped)} of {len(report.modules)} linear layers packed"
    if not FORMATS[name].exact:
        # rounding is no fault of the kernels: they meet the rounded weights
        rounded = copy.deepcopy(model)
        unswap_(rounded)
        before = _logits(rounded, prompts)
        what += f", values rounded to nearest; {report.swapped[0].reason}"
    difference = float((_logits(model, prompts) - before).abs().max() / before.std())
    return Variant(name, model, what, difference)


@torch.inference_mode()
def _logits(model: PreTrainedModel, prompts: torch.Tensor) -> torch.Tensor:
    device = model.get_input_embeddings().weight.device
    logits: torch.Tensor = model(input_ids=prompts.to(device), use_cache=False).logits
    return logits.float()
