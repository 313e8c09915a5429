"""One candidate against the reference: group by group of windows, each on disk as it is done."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from prunekernels import PairStats
from safetensors import SafetensorError, safe_open
from torch import Tensor

from prunekit.divergence.candidates import Side, check_tokenizer, memory_of
from prunekit.divergence.capture import Capture, save_tensors
from prunekit.divergence.llama_file import LlamaFile
from prunekit.divergence.processes import by_main, free_memory, together
from prunekit.divergence.reference import Reference
from prunekit.divergence.row_statistics import ASKED, FIELDS
from prunekit.divergence.rows import Options, Readout, Rows, compare, states_of
from prunekit.divergence.windows import Windows
from prunekit.errors import PrunekitError
from prunekit.files.atomic import replaced_file
from prunekit.process import distributed
from prunekit.process.progress import track

VERSION = 1  # of the rows on disk
WORST = 20  # positions of each group whose top tokens are kept: all that a page shows
SHOWN = 5  # their tokens
_DONE, _FACTS = "done.json", "candidate.json"


@dataclass(frozen=True)
class Compared:
    """A candidate that was compared.

    Attributes:
        facts: What is known of it: name, sizes, dtype, notes.
        values: Per name of `row_statistics.FIELDS`, and `overlap`, an array (positions,).
        worst: The positions with the largest KL: place, KL, and both sides' likeliest tokens.
    """

    facts: dict[str, Any]
    values: dict[str, NDArray[Any]]
    worst: list[dict[str, Any]]


def compared(
    reference: Reference, side: Side, folder: Path, options: Options, label: str
) -> Compared:
    """A candidate's rows, computed where `folder` lacks them; every process ends up with all.

    Raises:
        PrunekitError: It can't be loaded or compared; what was computed before stays.
    """
    key = _key(reference, side, options)
    by_main(lambda: _prepare(folder, key))
    if not (folder / _DONE).is_file():
        facts = together(lambda: _run(reference, side, folder, options, label))
        by_main(lambda: _write_json(folder / _DONE, facts))
    return _read(folder, reference.windows)


def _key(reference: Reference, side: Side, options: Options) -> str:
    told = [VERSION, reference.identity, side.identity(), options.topk, reference.windows.digest()]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _prepare(folder: Path, key: str) -> None:
    """Leave in `folder` only what belongs to this comparison."""
    path = folder / _FACTS
    try:
        same = json.loads(path.read_text(encoding="utf-8"))["key"] == key
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if same:
        return
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    _write_json(path, {"key": key})


@torch.inference_mode()
def _run(
    reference: Reference, side: Side, folder: Path, options: Options, label: str
) -> dict[str, Any]:
    """Compute the groups that are missing; what is to be said about the candidate."""
    windows = reference.windows
    groups = distributed.shard(windows.groups())
    rows, facts = _opened(reference, side, options)
    free_memory()  # what reading the files took
    missing = [group for group in groups if not _readable(folder / _name(group))]
    held, readout = reference.held, None
    for group in track(missing, label, enabled=options.progress):
        theirs = rows(group)  # before the reference's states are beside its activations
        ours = reference.rows(group)
        if group is missing[0]:
            same = held.has_head if isinstance(held, Capture) else None
            readout = shared_readout(ours.readout, theirs.readout, same)
            readout = None if readout is None else readout.to(theirs.values.device)
        ours = Rows(ours.values, readout)
        found = compare(
            ours,
            theirs,
            windows.labels(group),
            level="full",
            fields=ASKED,
            topk=min(options.topk, ours.vocabulary, theirs.vocabulary),
        ).to("cpu")
        check_finite(found, windows, group)
        _save(folder / _name(group), found, windows, group)
        if theirs.values.device.type == "cpu":
            free_memory()  # what the logits took would lie beside the next group's activations
    return facts


def _opened(
    reference: Reference, side: Side, options: Options
) -> tuple[Callable[[range], Rows], dict[str, Any]]:
    """What gives a candidate's rows, and its facts."""
    windows = reference.windows
    if side.kind != "model":
        recorded = side.recorded()
        recorded.check(windows)
        facts = recorded.facts if isinstance(recorded, Capture) else {"kind": "llama"}
        vocabulary = recorded.rows(range(1)).vocabulary
        told = {name: facts.get(name) for name in ("bytes_on_disk", "bytes_in_memory", "dtype")}
        dtype = told["dtype"] or "16-bit log-probabilities"
        notes = _vocabulary_note(reference, vocabulary)
        if isinstance(recorded, LlamaFile):
            notes.append("llama.cpp's file cuts log-probabilities 16 below the largest")
        return recorded.rows, {**told, "name": side.name, "dtype": dtype, "notes": notes}

    loaded = side.load(options.device, reference.source)
    model = loaded.model
    if model.training:
        raise PrunekitError("the model is in training mode: call model.eval() first")
    notes = [*loaded.notes, *check_tokenizer(reference.tokenizer, loaded.tokenizer)]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, windows.ids)) - 1
    if limit is not None and longest > limit:
        raise PrunekitError(
            f"windows of {longest} tokens exceed its context of {limit}: use --context {limit}"
        )
    readout = Readout.of(model)
    notes += _vocabulary_note(reference, readout.vocabulary)
    most = max(max(ids) for ids in windows.ids)
    if most >= readout.vocabulary:
        raise PrunekitError(
            f"the text has token {most}, its vocabulary ends at {readout.vocabulary - 1}: compare "
            "copies of one model"
        )

    def rows(group: range) -> Rows:
        ids = [windows.ids[index] for index in group]
        firsts = [windows.firsts[index] for index in group]
        return Rows(states_of(model, ids, firsts, options.batch_tokens), readout)

    facts = {
        "name": side.name,
        "bytes_on_disk": None if side.retyped else loaded.bytes_on_disk,
        "bytes_in_memory": memory_of(loaded),
        "dtype": str(model.dtype).removeprefix("torch."),
        "notes": notes,
    }
    return rows, facts


def _vocabulary_note(reference: Reference, vocabulary: int) -> list[str]:
    ours = reference.vocabulary
    if ours == vocabulary:
        return []
    common = min(ours, vocabulary)
    return [
        f"heads of {ours} (reference) and {vocabulary} tokens: compared over the first {common}"
    ]


Either = TypeVar("Either", Readout, Readout | None)


def shared_readout(
    ours: Either, theirs: Readout | None, same: Callable[[Tensor], bool] | None = None
) -> Either:
    """The reference's readout, with the candidate's matrix for its own where they are equal.

    One matrix for both sides is read once, and equal states then meet in equal logits.

    Args:
        ours: The reference's.
        theirs: The candidate's.
        same: Whether the reference's matrix is a given one; None compares the tensors.
    """
    if ours is None or theirs is None or ours.weight is None or theirs.weight is None:
        return ours
    mine, own = ours.weight, theirs.weight
    if mine.shape != own.shape or mine.dtype != own.dtype:
        return ours
    equal = torch.equal(mine.to(own.device), own) if same is None else same(own)
    return replace(ours, weight=own) if equal else ours


def check_finite(
    found: PairStats,
    windows: Windows,
    group: range,
    names: tuple[str, str] = ("reference", "candidate"),
) -> None:
    """See that both sides' logits are numbers.

    Raises:
        PrunekitError: Some are NaN or infinite; the message names the first position.
    """
    for whose, best in zip(names, (found.argmax_base, found.argmax_other), strict=True):
        broken = torch.nonzero(best < 0)
        if not len(broken):
            continue
        before = sum(windows.scored[index] for index in range(group.start))
        window, at = windows.where(before + int(broken[0]))
        raise PrunekitError(
            f"the {whose}'s logits are not finite at {len(broken)} positions, first at token {at} "
            f"of window {window}: check its weights, or use another dtype"
        )


def _name(group: range) -> str:
    return f"rows-{group.start:06d}-{group.stop:06d}.safetensors"


def _save(path: Path, found: PairStats, windows: Windows, group: range) -> None:
    tensors = {name: getattr(found, field) for field, name in FIELDS.items()}
    if found.topk is not None:
        tensors["overlap"] = found.topk.overlap
        order = found.kl_base_other.argsort(descending=True)[:WORST]
        before = sum(windows.scored[index] for index in range(group.start))
        tensors["worst.position"] = order + before
        for name in ("ids_base", "ids_other", "prob_base", "prob_other"):
            tensors[f"worst.{name}"] = getattr(found.topk, name)[order, :SHOWN]
    save_tensors(path, tensors)


def _readable(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


def _read(folder: Path, windows: Windows) -> Compared:
    parts: list[dict[str, NDArray[Any]]] = []
    for group in windows.groups():
        with safe_open(folder / _name(group), framework="np") as tensors:
            parts.append({name: tensors.get_tensor(name) for name in tensors.keys()})  # noqa: SIM118
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    values = {name: column for name, column in joined.items() if not name.startswith("worst.")}
    facts = json.loads((folder / _DONE).read_text(encoding="utf-8"))
    return Compared(facts, values, _worst(joined, values, windows))


def _worst(
    joined: Mapping[str, NDArray[Any]], values: Mapping[str, NDArray[Any]], windows: Windows
) -> list[dict[str, Any]]:
    """The kept positions, largest KL first."""
    positions = joined.get("worst.position", np.zeros(0, np.int64))
    found = []
    for row, position in enumerate(positions.tolist()):
        window, at = windows.where(position)
        told: dict[str, Any] = {
            "position": position,
            "window": window,
            "index": at,
            "kl": float(values["kl"][position]),
        }
        for whose in ("base", "other"):
            ids, shares = (joined[f"worst.{name}_{whose}"][row] for name in ("ids", "prob"))
            told[whose] = list(zip(ids.tolist(), shares.tolist(), strict=True))
        found.append(told)
    return sorted(found, key=lambda each: -each["kl"])


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    with replaced_file(path) as written:
        written.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
