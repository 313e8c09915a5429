"""Prune a model block by block: calibrate a block, prune it, run it pruned, go on to the next."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.data.calibration import CalibrationInput, batches, sequences
from prunekit.errors import PrunekitError
from prunekit.files.locks import locked
from prunekit.models import blocks
from prunekit.models.architectures import Architecture
from prunekit.models.masks import forget_masks
from prunekit.models.saveable import check_saveable
from prunekit.models.weight_refs import WeightRef
from prunekit.process import distributed
from prunekit.process.ambient import usual_torch
from prunekit.process.progress import track
from prunekit.pruning import rounding
from prunekit.pruning.folding import check_foldable, fold_permutations_, permutes
from prunekit.pruning.input_statistics import InputStatistics, LayerCollector
from prunekit.pruning.journal import Journal, run_facts
from prunekit.pruning.methods import prune_group
from prunekit.pruning.owl import budgeted
from prunekit.pruning.recipes import Method, Recipe
from prunekit.pruning.reconstruction import Reconstruction, Targets, reconstruct_
from prunekit.pruning.report import BlockFit, MatrixReport, PruneReport, dtype_name
from prunekit.pruning.rounding import Rounded
from prunekit.pruning.stream import Stream


@usual_torch()
@torch.inference_mode()
def prune_(
    model: PreTrainedModel,
    recipe: Recipe | Method,
    calibration: CalibrationInput | None = None,
    *,
    tokenizer: Any = None,
    batch_size: int | None = None,
    calibration_dtype: torch.dtype | None = None,
    offload: str | None = None,
    journal: Path | str | None = None,
    reconstruct: Reconstruction | None = None,
    progress: bool = True,
) -> PruneReport:
    """Set weights of the model's decoder layers to zero, by a recipe.

    Each layer is calibrated on what the layers before it give after their own pruning. Sparsity
    is exact: ⌊sparsity · count⌋ zeros are added per output row (Wanda) or per matrix (magnitude,
    the Wanda variant, SparseGPT), and N of every M weights are kept (N:M). Weights that are zero
    already count as pruned, and stay zero unless `SparseGPT(keep_zeros=False)` says otherwise.

    Under `torchrun` or `accelerate launch` the calibration batches are shared out and their
    statistics summed; every process ends with the same model.

    If this is interrupted, the layers done so far are pruned and the others are not: load the
    model again. With a journal, the same call then goes on after the last finished layer.

    Args:
        model: A model of a supported architecture; pruned in place.
        recipe: A method for all matrices, or a `Recipe`.
        calibration: What to calibrate on; see `prunekit.data.calibration`. Optional if magnitude is
            the only method: given, it only serves to measure output errors, given up to 128
            inputs per matrix.
        tokenizer: Needed if the calibration is a file or a data set.
        batch_size: Sequences that run together; None suits the device, see
            `prunekit.data.calibration.batches`.
        calibration_dtype: Run the calibration passes in this type, such as torch.bfloat16, which
            takes half of the time on processors that multiply it faster. Weights are scored and
            updated in float32 as ever; it is the activations that are rounded.
        offload: Where hidden states wait while other batches run: "cpu" or "disk". None keeps
            them on the model's device.
        journal: Folder that records every finished layer; see `prunekit.pruning.journal`. Delete
            it (`journal.remove`) once the model is saved.
        reconstruct: Fit each block to the dense model's own states after its pruning, its zeros
            held; see `prunekit.pruning.reconstruction`. Changes norms and biases, too.
        progress: Show a progress bar on a terminal.

    Returns:
        What was done to each matrix.

    Raises:
        PrunekitError: The model could not be saved (`prunekit.models.saveable`), a rule matches
            nothing, N:M doesn't divide a matrix, weights are NaN or infinite, calibration is
            missing or unusable, or the journal is another run's or in use. The model is unchanged
            then, except when an activation overflows in the middle.
    """
    check_saveable(model)
    arch = Architecture(model)
    recipe = Recipe.of(recipe)
    layers = [list(arch.weights(index)) for index in range(len(arch.layers))]
    names = [ref.name for refs in layers for ref in refs]
    if not names:
        raise PrunekitError("nothing is left to prune: all of the model's sublayers were dropped")
    assigned = recipe.assign(names)
    chosen = [[ref for ref in refs if ref.name in assigned] for refs in layers]
    _check(chosen, assigned, calibrated=calibration is not None)
    check_foldable(arch, assigned)
    if reconstruct is not None and calibration is None:
        raise PrunekitError(
            "reconstruction needs calibration: pass calibration tokens, or a Calibration()"
        )
    if recipe.budget is not None and calibration is None:
        raise PrunekitError("OWL needs calibration: pass calibration tokens, or a Calibration()")
    rounds = next((name for name, method in assigned.items() if method.bits is not None), None)
    if reconstruct is not None and rounds is not None:
        raise PrunekitError(
            f"reconstruction would move {rounds} off its {assigned[rounds].bits}-bit values: leave "
            "out bits, or reconstruct"
        )
    device = model.get_input_embeddings().weight.device
    forget_masks(model)  # zeros of an earlier pruning may become weights again
    with evaluating(model), contextlib.ExitStack() as held:
        record = None
        if journal is not None and distributed.is_main():
            held.enter_context(locked(journal))
        if journal is not None:
            settings = {
                "recipe": recipe.to_dict(),
                "batch_size": batch_size,
                "calibration_dtype": str(calibration_dtype),
                "device": device.type,  # decides about the batches, too
                "reconstruct": None if reconstruct is None else reconstruct.to_dict(),
            }
            record = Journal(journal, run_facts(model, calibration, settings))
        found: list[Tensor] = []
        stream = dense = None
        if calibration is not None:

            def compute() -> list[Tensor]:
                texts = sequences(calibration, model, tokenizer, progress=progress)
                if reconstruct is not None:
                    reconstruct.split(texts)  # too few are refused before anything is recorded
                return texts

            found = compute() if record is None else record.tokens(compute)
            _check_tokens(chosen, assigned, sum(map(len, found)))
            parts = [found] if reconstruct is None else reconstruct.split(found)
            runs = [batches(part, batch_size, device) for part in parts]
            together = [batch for run in runs for batch in run]
            stream = Stream(arch, together, dtype=calibration_dtype, offload=offload)
            if reconstruct is not None:
                targets = Stream(arch, together, dtype=calibration_dtype, offload=offload)
                dense = Targets(targets, range(len(runs[0]), len(together)), reconstruct)
            if recipe.budget is not None:
                dense_run = Stream(arch, together, dtype=calibration_dtype, offload=offload)
                assigned = budgeted(
                    arch, dense_run, chosen, assigned, recipe.budget, progress=progress
                )
                chosen = [[ref for ref in refs if ref.name in assigned] for refs in chosen]
                del dense_run
        if record is not None:
            record.start()
        reports: list[MatrixReport] = []
        fits: list[BlockFit] = []
        last = max(index for index, refs in enumerate(chosen) if refs)
        for index in track(range(last + 1), "pruning", enabled=progress):
            refs = chosen[index]
            changed = {ref.name: ref.matrix for ref in refs}
            if dense is not None:
                dense.states.advance(index)  # while the layer is dense
                changed = arch.parameters(index) if refs else {}
            if permutes(refs, assigned):
                changed = arch.parameters(index)
            changed = {**changed, **_prepare_roundings_(refs, assigned)}
            done = record.restore(index, changed) if record is not None and refs else None
            if done is None:
                # unnamed, so that its sums are gone before the next layer's are allocated
                pruned = _prune_layer_(
                    arch, refs, assigned, _observe(arch, stream, index, refs, assigned)
                )
                fit = None
                if dense is not None and stream is not None and refs:
                    fit = reconstruct_(stream, dense, index)
                done = pruned, fit
                if record is not None and refs:
                    record.write(index, changed, *done)
            reports += done[0]
            fits += [done[1]] if done[1] is not None else []
            if stream is not None and index < last:
                stream.advance(index)
    return PruneReport(
        recipe.to_dict(),
        tuple(reports),
        tuple(name for name in names if name not in assigned),
        len(found),
        sum(map(len, found)),
        None if calibration is None else dtype_name(calibration_dtype),
        None if reconstruct is None else reconstruct.to_dict(),
        tuple(fits),
    )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _check(
    layers: Sequence[Sequence[WeightRef]], assigned: Mapping[str, Method], *, calibrated: bool
) -> None:
    """Raise a PrunekitError for whatever would fail later, before anything is changed."""
    needy = next((name for name, method in assigned.items() if method.calibrated), None)
    if needy is not None and not calibrated:
        raise PrunekitError(
            f"{assigned[needy].name} needs calibration for {needy}: pass calibration tokens, or a "
            "Calibration()"
        )
    for ref in (ref for refs in layers for ref in refs):
        matrix, pattern = ref.matrix, assigned[ref.name].target
        if pattern.structured and matrix.shape[1] % pattern.of:
            raise PrunekitError(
                f"{ref.name} has {matrix.shape[1]} inputs, which is no multiple of {pattern.of}: "
                f"use another pattern than {pattern.name}, or ignore it"
            )
        if matrix.is_meta:
            raise PrunekitError(
                f"{ref.name} is offloaded, so it can't be changed: load the model with a "
                "device_map that keeps every layer on a device, and offload activations instead"
            )
        # extremes carry a NaN along, and are found many times faster than `isfinite().all()`
        if not bool(torch.stack(torch.aminmax(matrix)).isfinite().all()):
            raise PrunekitError(f"{ref.name} holds NaN or infinite weights: repair the checkpoint")


def _check_tokens(
    layers: Sequence[Sequence[WeightRef]], assigned: Mapping[str, Method], tokens: int
) -> None:
    """Raise a PrunekitError where fewer tokens than inputs are to be fitted (experts: noted)."""
    refs = (ref for refs in layers for ref in refs if ref.expert is None)
    fitted = [ref for ref in refs if assigned[ref.name].fits]
    widest = max(fitted, key=lambda ref: ref.matrix.shape[1], default=None)
    if widest is not None and tokens < (needed := widest.matrix.shape[1]):
        raise PrunekitError(
            f"{assigned[widest.name].name} as set fits {needed} weights a row of {widest.name}: "
            f"calibrate on at least {needed} tokens, not {tokens}"
        )


def _observe(
    arch: Architecture,
    stream: Stream | None,
    layer: int,
    refs: Sequence[WeightRef],
    assigned: Mapping[str, Method],
) -> dict[str, InputStatistics]:
    """Run the layer as it is, for the statistics of each input group; {} without calibration."""
    if stream is None or not refs:
        return {}
    hessians = {ref.name for ref in refs if assigned[ref.name].needs_hessian}
    collector = LayerCollector(refs, hessians, stream.total)
    stream.visit(
        layer,
        lambda hidden, batch, kwargs: collector.observe(
            lambda: blocks.run_layer(arch, layer, hidden, kwargs), batch
        ),
    )
    collector.finish()
    return collector.groups


def _prepare_roundings_(
    refs: Sequence[WeightRef], assigned: Mapping[str, Method]
) -> dict[str, Tensor]:
    """Room beside the linear layers for codes and scales, by name: a journal holds them, too."""
    room: dict[str, Tensor] = {}
    for ref in refs:
        method, (rows, width) = assigned[ref.name], ref.matrix.shape
        if method.bits is not None and ref.expert is None:
            empty = Rounded.empty((rows, width), method.bits, method.group, ref.matrix.device)
            rounding.attach_(ref.module, empty)
            room |= {f"{ref.name}.integers": empty.codes, f"{ref.name}.scales": empty.scales}
    return room


def _prune_layer_(
    arch: Architecture,
    refs: Sequence[WeightRef],
    assigned: Mapping[str, Method],
    statistics: Mapping[str, InputStatistics],
) -> list[MatrixReport]:
    """Prune one layer's matrices in place."""
    if refs:
        fold_permutations_(arch, refs[0].layer, refs, assigned, statistics)
    together: dict[tuple[str, Method], list[WeightRef]] = {}
    for ref in refs:
        together.setdefault((ref.input_group, assigned[ref.name]), []).append(ref)
    done: dict[str, MatrixReport] = {}
    errors: dict[str, Tensor] = {}
    for (group, method), members in together.items():
        inputs = statistics.get(group)
        results = prune_group([ref.matrix for ref in members], method, inputs)
        for ref, result in zip(members, results, strict=True):
            if inputs is not None:
                errors[ref.name] = _output_squares(inputs.sampled, ref.matrix, result.weights)
            ref.matrix.copy_(result.weights)
            if result.rounded is not None and ref.expert is None:
                rounding.fill_(ref.module, result.rounded)
            done[ref.name] = MatrixReport(
                name=ref.name,
                layer=ref.layer,
                shape=(ref.matrix.shape[0], ref.matrix.shape[1]),
                method=method.name,
                pattern=method.pattern,
                kept=int(result.mask.sum()),
                zeros=int((ref.matrix == 0).sum()),
                relative_error=None,
                note=result.note,
                bits=None if result.rounded is None else result.rounded.bits,
            )
        del result, results  # before the next group's H is factored
    return _with_errors([done[ref.name] for ref in refs], errors)


def _output_squares(inputs: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """‖X(W - W')ᵀ‖² and ‖XWᵀ‖² for this process's sampled inputs: (2,), float64."""
    after = after.to(before.dtype).float()  # as it will be stored
    before = before.float()
    outputs = (inputs @ (before - after).t(), inputs @ before.t())
    return torch.stack([values.square().sum(dtype=torch.float64) for values in outputs])


def _with_errors(
    reports: Sequence[MatrixReport], errors: Mapping[str, Tensor]
) -> list[MatrixReport]:
    """Fill in relative errors, from squares summed over all processes at once."""
    if not errors:
        return list(reports)
    squares = distributed.all_reduce_(torch.stack([errors[report.name] for report in reports]))
    filled = []
    for report, (error, total) in zip(reports, squares.tolist(), strict=True):
        relative = (error / total) ** 0.5 if total > 0 else None
        filled.append(replace(report, relative_error=relative))
    return filled
