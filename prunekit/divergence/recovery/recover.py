"""Fine-tune a pruned model on the dense model's distributions, its zeros held.

All parameters of the decoder layers and the final norm are trained; embeddings and head stay, which
keeps the meaning of both models' states alike. With p the dense model's next-token distribution and
q the pruned one's, the loss is a divergence of p and q over the whole vocabulary, and if asked the
cross-entropy of q with the text. The dense model runs once: its final states wait on disk, in the
format of `prunekit kld`'s reference.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from prunekernels import PairStats, summarize
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit import checkpoint
from prunekit.data.calibration import Calibration, CalibrationInput, batches, sequences
from prunekit.divergence.candidates import Side
from prunekit.divergence.capture import Capture
from prunekit.divergence.recovery.loss import check_heads, loss_of
from prunekit.divergence.recovery.settings import RecoverReport, Recovery
from prunekit.divergence.reference import cached
from prunekit.divergence.row_statistics import ASKED
from prunekit.divergence.rows import Options, Readout, Rows, compare, states_of
from prunekit.divergence.windows import planned
from prunekit.errors import PrunekitError
from prunekit.files.locks import locked
from prunekit.models.architectures import Architecture, input_device
from prunekit.models.masks import Masks
from prunekit.models.saveable import check_saveable
from prunekit.process import distributed
from prunekit.process.ambient import usual_torch
from prunekit.process.progress import counter
from prunekit.pruning.descent import descend, split
from prunekit.pruning.journal import Journal, run_facts
from prunekit.pruning.report import dtype_name
from prunekit.pruning.sequential import evaluating

_TEACHER, _DESCENT = "teacher", "descent.safetensors"
_BATCH_TOKENS = 1024  # of the passes that take statistics


@usual_torch()
def recover_(
    model: PreTrainedModel,
    teacher: PreTrainedModel | str,
    calibration: CalibrationInput | None = None,
    *,
    recovery: Recovery | None = None,
    tokenizer: Any = None,
    batch_size: int | None = None,
    calibration_dtype: torch.dtype | None = None,
    journal: Path | str | None = None,
    progress: bool = True,
) -> RecoverReport:
    """Fine-tune a pruned or dropped model towards the dense one; every zero stays.

    Under several processes each takes its share of the batches, and gradients are summed.

    Args:
        model: What was pruned, or what sublayers or blocks were dropped from; changed in place
            once all is done, to the state of the least held-out loss.
        teacher: The dense model, or what `prunekit.load` takes; it is gone from memory before
            training begins if it was loaded here.
        calibration: The text; see `prunekit.data.calibration`. None: the teacher writes it.
        recovery: How; `Recovery()` by default.
        tokenizer: Needed if the calibration is a file or a data set.
        batch_size: Sequences that run together; see `prunekit.data.calibration.batches`.
        calibration_dtype: Type of the model's passes, such as torch.bfloat16; gradients are summed
            and weights updated in float32. The teacher runs in its own type.
        journal: Folder that records the teacher's states, and the run at every check: the same
            call goes on from there. Delete it (`prunekit.pruning.journal.remove`) once the model
            is saved.
        progress: Show progress.

    Returns:
        Statistics before and after on held-out sequences, and the course between them.

    Raises:
        PrunekitError: The teacher is of another vocabulary, its or the model's head is no plain
            matrix, the model is packed or could not be saved, there are too few tokens, the loss
            is not finite at the start, or the journal is another run's. The model is unchanged.
    """
    recovery = recovery or Recovery()
    calibration = calibration if calibration is not None else Calibration()
    check_saveable(model)
    masks = Masks.of(model)
    with contextlib.ExitStack() as held:
        held.enter_context(evaluating(model))
        with torch.inference_mode():
            student = Readout.of(model)
        folder = None if journal is None else Path(journal)
        if folder is not None and distributed.is_main():
            held.enter_context(locked(folder))
        temporary = ""
        if folder is None and distributed.is_main():
            temporary = held.enter_context(tempfile.TemporaryDirectory())
        temporary = distributed.gather([temporary])[0]  # of the main process
        settings = {
            "recovery": recovery.to_dict(),
            "batch_size": batch_size,
            "calibration_dtype": str(calibration_dtype),
            "device": input_device(model).type,
        }
        # the teacher is alive inside of this call only, if it was loaded there
        data = _taught(
            model,
            teacher,
            student,
            calibration,
            recovery,
            tokenizer=tokenizer,
            batch_size=batch_size,
            journal=None if folder is None else (folder, settings),
            states=(folder or Path(temporary)) / _TEACHER,
            progress=progress,
        )
        before = data.statistics(model)
        told = held.enter_context(counter("recovering", enabled=progress))
        start, keep = _trained(model, masks)
        best, course = descend(
            start,
            keep,
            data.errors(model, set(start), student, recovery, calibration_dtype),
            distributed.shard(range(data.first_held)),
            distributed.shard(range(data.first_held, len(data.items))),
            {item: ids.numel() for item, ids in enumerate(data.items)},
            recovery,
            record=None if folder is None else folder / _DESCENT,
            tell=told,
        )
        if not course.curve:
            raise PrunekitError(
                "the loss is not finite before any update: check the model's weights, or run the "
                "passes in float32"
            )
        parameters = dict(model.named_parameters())
        for key, value in best.items():
            parameters[key].data.copy_(value)
        masks.hold_()
        masks.remember(model)
        after = data.statistics(model)
    kept_out = data.items[data.first_held :]
    return RecoverReport(
        recovery.to_dict(),
        teacher if isinstance(teacher, str) else type(teacher).__name__,
        sum(map(len, data.items)),
        sum(ids.numel() for ids in data.items),
        sum(map(len, kept_out)),
        course.steps,
        tuple(course.curve),
        before,
        after,
        sum(int((~keep).sum()) for keep in masks.keep.values()),
        dtype_name(calibration_dtype),
        course.note,
    )


def _taught(
    model: PreTrainedModel,
    teacher: PreTrainedModel | str,
    student: Readout,
    calibration: CalibrationInput,
    recovery: Recovery,
    *,
    tokenizer: Any,
    batch_size: int | None,
    journal: tuple[Path, dict[str, Any]] | None,
    states: Path,
    progress: bool,
) -> _Data:
    """The data and the teacher's states of it, after everything was checked."""
    device = input_device(model)
    if isinstance(teacher, str):
        name, (teacher, own) = teacher, checkpoint.load(teacher, device=str(device))
        tokenizer = _same_tokens(tokenizer, own, name)
    with torch.inference_mode(), evaluating(teacher):
        check_heads(student, Readout.of(teacher))
        record = None
        if journal is not None:
            folder, settings = journal
            settings["teacher"] = Side(teacher, "teacher").identity()
            record = Journal(folder, run_facts(model, calibration, settings))
        dense = teacher

        def compute() -> list[Tensor]:
            texts = sequences(calibration, dense, tokenizer, progress=progress)
            split(texts, recovery.held_out, "recovery")  # too few are refused before all else
            return texts

        texts = compute() if record is None else record.tokens(compute)
        parts = split(texts, recovery.held_out, "recovery")
        fitted, kept_out = (batches(part, batch_size, device) for part in parts)
        if record is not None:
            record.start()
        return _Data.captured(teacher, fitted, kept_out, states, progress)


def _same_tokens(tokenizer: Any, own: Any, name: str) -> Any:
    """The tokenizer to use: the teacher's own, unless another with the same vocabulary is given.

    Raises:
        PrunekitError: The vocabularies differ.
    """
    if tokenizer is not None and tokenizer.get_vocab() != own.get_vocab():
        raise PrunekitError(
            f"the tokenizer of {name} has another vocabulary than the model's: recover with the "
            "model that it was pruned from"
        )
    return own if tokenizer is None else tokenizer


def _trained(model: PreTrainedModel, masks: Masks) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """float32 copies of what is trained, by name: layers and final norm; and their masks."""
    layout = Architecture(model).layout
    ours = (f"{layout.layers}.", f"{layout.final_norm}.")
    start = {
        name: parameter.detach().float().clone()
        for name, parameter in model.named_parameters()
        if name.startswith(ours)
    }
    return start, {name: keep for name, keep in masks.keep.items() if name in start}


class _Data:
    """Batches of sequences, and the teacher's states of each token but the last.

    Args:
        items: (sequences, tokens) batches; the held-out ones last.
        first_held: Index of the first held-out one.
        capture: The states, a window per sequence.
    """

    def __init__(self, items: Sequence[Tensor], first_held: int, capture: Capture) -> None:
        self.items, self.first_held, self.capture = list(items), first_held, capture
        self._windows: list[range] = []
        for ids in self.items:
            start = self._windows[-1].stop if self._windows else 0
            self._windows.append(range(start, start + len(ids)))

    @classmethod
    def captured(
        cls,
        teacher: PreTrainedModel,
        fitted: Sequence[Tensor],
        kept_out: Sequence[Tensor],
        folder: Path,
        progress: bool,
    ) -> _Data:
        """Run the teacher over the batches, or take what `folder` has of that."""
        items = [*fitted, *kept_out]
        windows = planned(
            "documents",
            [row.tolist() for ids in items for row in ids],
            context=max(ids.shape[1] for ids in items),
        )
        options = Options(batch_tokens=_BATCH_TOKENS, progress=progress)
        reference = cached(Side(teacher, "teacher"), lambda _: windows, folder, options)
        assert isinstance(reference.held, Capture)
        return cls(items, len(fitted), reference.held)

    def errors(
        self,
        model: PreTrainedModel,
        trained: set[str],
        student: Readout,
        settings: Recovery,
        dtype: torch.dtype | None,
    ) -> Any:
        """The loss of an item under other parameters `trained` of `model`, and its tokens."""
        base = Architecture(model).base
        prefix = f"{Architecture(model).layout.base}."
        dtype = dtype or model.dtype
        assert student.weight is not None
        teacher = student
        if not self.capture.has_head(student.weight):
            assert self.capture.readout is not None
            teacher = self.capture.readout.to(student.weight.device)
        fixed = {
            name: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in (*base.named_parameters(), *base.named_buffers())
            if prefix + name not in trained
        }
        device = input_device(model)

        def errors(state: Mapping[str, Tensor], item: int) -> tuple[Tensor, int]:
            ids = self.items[item].to(device)
            rounded = {name.removeprefix(prefix): part.to(dtype) for name, part in state.items()}
            given = _states(base, {**fixed, **rounded}, ids[:, :-1])
            wanted = self.capture.rows(self._windows[item]).values.to(device)
            labels = ids[:, 1:].reshape(-1)
            total = loss_of(given.flatten(0, 1), wanted, labels, student, teacher, settings)
            return total, labels.numel()

        return errors

    @torch.inference_mode()
    def statistics(self, model: PreTrainedModel) -> dict[str, float]:
        """`prunekernels.summarize` of both models' predictions on the held-out items."""
        readout = Readout.of(model)
        parts: list[PairStats] = []
        for item in distributed.shard(range(self.first_held, len(self.items))):
            fed = [row.tolist() for row in self.items[item]]
            states = states_of(model, fed, [1] * len(fed), _BATCH_TOKENS)
            labels = [token for row in fed for token in row[1:]]
            theirs = self.capture.rows(self._windows[item])
            found = compare(theirs, Rows(states, readout), labels, level="full", fields=ASKED)
            parts.append(found.to("cpu"))
        rows = PairStats.cat(distributed.gather(parts))
        assert rows.js is not None
        return {**summarize(rows), "js_mean": float(rows.js.double().mean())}


def _states(base: nn.Module, tensors: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """(batch, tokens, width) final normed states under other parameters."""
    out: Any = torch.func.functional_call(
        base, dict(tensors), (), {"input_ids": ids, "use_cache": False}
    )
    states: Tensor = out.last_hidden_state
    return states
