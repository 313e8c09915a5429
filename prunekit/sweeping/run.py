"""`pk.sweep`: the same questions to a dense model and to copies of it that lose more and more."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from prunekit.data.calibration import Calibration, CalibrationInput, facts, sequences
from prunekit.divergence.loading import fingerprint_of
from prunekit.divergence.processes import by_main, free_memory
from prunekit.errors import PrunekitError, one_line
from prunekit.evaluation.answering import Asking, encode
from prunekit.evaluation.items import Choice, load_heldout
from prunekit.evaluation.likelihood import encode_choices
from prunekit.evaluation.questions import Question
from prunekit.files.locks import locked
from prunekit.models import generation
from prunekit.process import distributed
from prunekit.process.ambient import usual_torch
from prunekit.sweeping.edges import is_lost
from prunekit.sweeping.findings import Swept
from prunekit.sweeping.measuring import Asked
from prunekit.sweeping.points import Plan, Point, Series, Workshop, series_of, told_apart
from prunekit.sweeping.record import Record
from prunekit.sweeping.result import Sweep
from prunekit.sweeping.rows import Row, failed, row


@usual_torch()
def sweep(
    dense: PreTrainedModel,
    tokenizer: Any,
    plans: Sequence[Plan] | Mapping[str, Plan],
    *,
    choices: Sequence[Choice] = (),
    questions: Sequence[Question] = (),
    asking: Asking | None = None,
    counts: Sequence[int] | None = None,
    sparsities: Sequence[float] | None = None,
    text: str | Sequence[str] | None = None,
    kl: bool = True,
    speed: bool = True,
    context: int = 512,
    budget: float | None = None,
    calibration: CalibrationInput | None = None,
    calibration_batch: int | None = None,
    calibration_dtype: torch.dtype | None = None,
    output: str | Path | None = None,
    device: str | None = None,
    seed: int = 0,
    progress: bool = True,
    name: str = "dense",
) -> Sweep:
    """Ask a dense model and copies of it that lose more and more, and tell where they break.

    Every copy answers the same multiple-choice questions (single-step) and writes an answer to the
    same open ones (generation); its KL divergence from the dense model is `prunekit.kld`'s. All
    differences are paired by question. What is recorded in `output` is not computed again. A copy
    that fails has a row that says why, and the others go on. Under `torchrun` or `accelerate
    launch` the processes share each copy's questions (on one file system); all return the whole.

    Args:
        dense: The dense model; it stays as it is.
        tokenizer: Its tokenizer.
        plans: What is tried: each a `Drop` (ranked once; its count is the most that goes), a
            `DropReport` (ranked already), a method such as `Wanda()`, the source of a checkpoint
            (quantised ones too), or a model; a mapping names checkpoints and models.
        choices: Multiple-choice questions (`evaluation.items.load_choices`).
        questions: Questions that are answered with text (`evaluation.questions.load_questions`).
        asking: How the latter are asked: examples, longest answer.
        counts: How many parts each drop takes out; by default every number up to its count.
        sparsities: Shares of zeros of unstructured methods; by default each method's own.
        text: Text, or texts, of the KL divergence; by default a built-in one.
        kl: Whether to measure it.
        speed: Whether to time decoding, in turns with the dense model.
        context: Tokens per window of the KL divergence.
        budget: Points of accuracy and exact match that may be lost. With one a series ends where
            both have lost more by their whole intervals; without, every point is measured and the
            sentences speak of 2 points.
        calibration: What rankings and methods are calibrated on, once for all; by default the
            model's own text.
        calibration_batch: Calibration sequences together; None suits the device.
        calibration_dtype: Type of the calibration passes, see `prunekit.drop_`.
        output: Folder of record, table and page; None keeps a record while it runs.
        device: Where checkpoints are loaded; None: the CPU.
        seed: Of every interval's resampling.
        progress: Show bars on a terminal.
        name: What to call the dense model.

    Raises:
        PrunekitError: Nothing is asked or tried, a count is beyond the model, a question is too
            long, two of its options are the same tokens, or `output` belongs to another sweep;
            found before the heavy work starts.
    """
    asking = asking or Asking()
    if not plans:
        raise PrunekitError("nothing to try: name something to drop, a method or a checkpoint")
    if not choices and not questions:
        raise PrunekitError("nothing to ask: give multiple-choice questions, open ones, or both")
    if budget is not None and not 0 < budget < 100:
        raise PrunekitError(f"budget is {budget} points: use a number above 0, such as 2")
    if distributed.world_size() > 1 and output is None:
        raise PrunekitError("several processes share their record on disk: give an output folder")
    if questions:
        generation.check_context(dense, encode(tokenizer, questions, asking), asking.max_new_tokens)
    encode_choices(tokenizer, choices)
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as kept:
        folder = Path(temporary if output is None else output).expanduser()
        if output is not None:
            by_main(lambda: kept.enter_context(locked(folder)))
        texts = None if not kl else _texts(text)
        asked = Asked(
            dense,
            tokenizer,
            choices,
            questions,
            asking,
            texts,
            context,
            speed,
            device,
            folder,
            progress,
        )
        told = _facts(asked, calibration, seed)
        if calibration_dtype is not None:
            told["calibration_dtype"] = str(calibration_dtype)
        record = Record(folder, told)

        def calibrated() -> list[Tensor]:
            given = Calibration(seed=seed) if calibration is None else calibration
            return sequences(given, dense, tokenizer, progress=progress)

        workshop = Workshop(
            dense,
            tokenizer,
            lambda: record.tokens(calibrated),
            record.ranking,
            device,
            calibration_batch,
            calibration_dtype,
            progress,
        )
        named = plans.items() if isinstance(plans, Mapping) else [(None, plan) for plan in plans]
        series = told_apart(
            [
                series_of(plan, workshop, name=key, counts=counts, sparsities=sparsities)
                for key, plan in named
            ]
        )
        own = record.point("dense", {"dense": True}, asked.of_dense)
        own["complete"] = asked.complete(own)  # from its texts: no part of the record
        swept = [_swept(one, asked, record, own, budget, seed) for one in series]
        result = Sweep(_meta(asked, name, budget, seed), own, tuple(swept), budget, seed)
        if output is not None:
            by_main(lambda: result.save(folder))
        return result


def _swept(
    series: Series,
    asked: Asked,
    record: Record,
    dense: dict[str, Any],
    budget: float | None,
    seed: int,
) -> Swept:
    """The rows of a series, up to where its budget ends it."""
    rows: list[Row] = []
    for point in series.points:
        rows.append(_row(point, asked, record, dense, seed))
        changes = rows[-1].changes.values()
        if budget is not None and changes and all(is_lost(one, budget) for one in changes):
            break
    left = [point.label for point in series.points[len(rows) :]]
    return Swept(series.name, series.axis, tuple(rows), tuple(left), series.points[: len(rows)])


def _row(point: Point, asked: Asked, record: Record, dense: dict[str, Any], seed: int) -> Row:
    def measure() -> dict[str, Any]:
        made = point.make()
        return asked.of_copy(point.key, point.label, made, dense)

    try:
        found = record.point(point.key, point.identity, measure)
    except KeyboardInterrupt:
        raise
    except Exception as error:  # a checkpoint's own code may fail in any way; the others go on
        known = isinstance(error, PrunekitError)
        said = one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"
        return failed(point.label, point.x, said)
    finally:
        free_memory()
    return row(point.label, point.x, found, dense, seed=seed)


def _texts(text: str | Sequence[str] | None) -> list[str]:
    if text is None:
        return [load_heldout()]
    return [text] if isinstance(text, str) else list(text)


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def _facts(asked: Asked, calibration: CalibrationInput | None, seed: int) -> dict[str, Any]:
    """What a record's numbers depend on."""
    calibrated = facts(Calibration(seed=seed) if calibration is None else calibration)
    return {
        "model": fingerprint_of(asked.dense)[:16],
        "choices": _digest([asdict(one) for one in asked.choices]),
        "questions": _digest([asdict(one) for one in asked.questions]),
        "asking": _digest(asked.asking.facts()),
        "text": _digest(asked.text),
        "context": asked.context,
        "speed": asked.speed,
        "calibration": _digest(calibrated),
    }


def _meta(asked: Asked, name: str, budget: float | None, seed: int) -> dict[str, Any]:
    from prunekit.analysis.provenance import versions

    return {
        "dense": name,
        "versions": versions(),
        "seed": seed,
        "budget": budget,
        "device": str(asked.dense.device),
        "dtype": str(asked.dense.dtype).removeprefix("torch."),
        "processes": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "choices": len(asked.choices),
        "questions": len(asked.questions),
        "examples": len(asked.asking.examples),
        "max_new_tokens": asked.asking.max_new_tokens,
    }


def emptied(folder: Path) -> None:
    """Remove a sweep's record, for `--overwrite`."""
    for part in ("points", "kl", "reference"):
        shutil.rmtree(folder / part, ignore_errors=True)
    for pattern in ("run.json", "ranking-*.json", "calibration.safetensors"):
        for path in folder.glob(pattern):
            path.unlink()
