"""`pk.search`: the mix of compressed sublayers with the least KL at a size or a speed."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prunekernels.sparse.two_four.quantized.layout import GROUPS
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import prunekit
from prunekit import checkpoint
from prunekit.checkpoint.sources import located
from prunekit.data.calibration import Calibration, facts, sequences
from prunekit.divergence.capture import recorded_tensors
from prunekit.divergence.processes import by_main
from prunekit.divergence.run import documents
from prunekit.divergence.windows import Windows, of_text
from prunekit.errors import PrunekitError
from prunekit.files.atomic import replaced_file
from prunekit.files.locks import locked
from prunekit.mixing.copies import DENSE, DROP, Mixture
from prunekit.mixing.fitness import Record
from prunekit.mixing.measuring import HELD_OUT, Measured
from prunekit.mixing.mixes import Costs, Mix, evolve, frontier, least_damage, undominated
from prunekit.mixing.result import Point, SearchResult
from prunekit.models.causal import check_measured
from prunekit.models.saveable import check_saveable
from prunekit.process.ambient import usual_torch
from prunekit.process.progress import track
from prunekit.pruning import journal, prune_
from prunekit.pruning.recipes import Method

_FACTS, _RECORD, _COPIES = "run.json", "measured.jsonl", "copies"
_TOKENS = "calibration.safetensors"
_FRONT = 9  # mixes of the additive model that are measured along the front, from
_BELOW = 0.75  # of the budget


@usual_torch()
def search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    choices: Mapping[str, Method | str | Path | None],
    output: str | Path,
    *,
    bytes: float | None = None,
    speed: float | None = None,
    text: str | Path | Sequence[str] | None = None,
    text_field: str = "text",
    context: int = 256,
    limit: int | None = None,
    generations: int = 30,
    offspring: int = 16,
    tokens: int = 1,
    calibration: Calibration | None = None,
    seed: int = 0,
    progress: bool = True,
) -> SearchResult:
    """Find, per attention and MLP, the choice with which the whole model stays closest to itself.

    Every choice is a copy of the model. First each choice is measured alone in each sublayer; the
    mix that would be best if those KLs added up is the start, and mixes of the same kind at other
    sizes make the front. Then whole mixes evolve within the budget (`prunekit.mixing.mixes`). The
    KL is exact, over the whole vocabulary, on the same tokens for all. Every fourth window of the
    text is never searched on: what is reported as held out comes from there.

    Under `torchrun` or `accelerate launch` the processes share the mixes that are measured (on one
    file system); all return the whole. Only what is pruned here can differ from one process's, by
    the rounding of the calibration's sums.

    Nothing in `output` is computed again: a killed search goes on, and one with another budget or
    more generations begins with all that was measured.

    Args:
        model: The dense model. It becomes the mix that was found, dropped sublayers gone, masked
            weights not packed (`swap_` packs them, rounded ones as the numbers they were measured
            with). If the search fails it is dense again.
        tokenizer: Its tokenizer.
        choices: What a sublayer may become, by name: a method that prunes a copy of the model, a
            checkpoint of a copy, or None to drop it. "dense" is always there. Values of a method
            with `bits`, or of a copy that is packed so, keep their 8 or 4 bits.
        output: Folder of copies, measurements and result.
        bytes: Budget: the model's size over the dense model's, between 0 and 1.
        speed: Budget: decoding speed over the dense model's, expected from the bytes that are read
            and the kernels' tables, above 1. Give one of the two.
        text: A file (.txt, .jsonl, .json, .parquet) or texts; None: a built-in one.
        text_field: Field of the text in rows.
        context: Length of windows, in tokens.
        limit: Use at most so many windows.
        generations: Of the evolution; 0 takes the start.
        offspring: Mixes that are tried per generation.
        tokens: Tokens per call that speeds are for.
        calibration: For methods that need it; None: `Calibration()`.
        seed: Of the evolution.
        progress: Show bars on a terminal.

    Returns:
        The result; its files are in `output`.

    Raises:
        PrunekitError: No mix keeps the budget (the message names the smallest or fastest), a copy
            does not fit, the text is too short, or `output` belongs to another search.
    """
    _check(model, choices, bytes, speed)
    windows = _windows(text, text_field, tokenizer, context, limit)
    folder = Path(output).expanduser()
    calibration = calibration or Calibration()
    with contextlib.ExitStack() as closing:
        by_main(lambda: closing.enter_context(locked(folder)))
        made = _begun(folder, model, windows, choices, calibration, tokens)
        mixture = Mixture(model, folder / _COPIES, made[DENSE], tokens)
        closing.callback(mixture.close)
        closing.push(lambda kind, *_: None if kind is None else mixture.restore_())

        def calibrated() -> list[Tensor]:
            return recorded_tensors(
                folder / _TOKENS,
                lambda: sequences(calibration, model, tokenizer, progress=progress),
            )

        for name, choice in choices.items():
            _offer(mixture, name, choice, made[name], calibrated, folder, progress)
        limits = _Limits(mixture, bytes, speed)
        measured = Measured(mixture, windows, Record(folder / _RECORD), model, progress)
        damage = measured.alone()
        start = limits.start(damage)
        named = {(0,) * len(mixture.parts): DENSE, start: "additive model"}
        for number, name in enumerate(mixture.choices):
            if name in (DENSE, DROP):
                continue
            exists = np.isfinite(limits.costs.parts[:, number])
            named.setdefault(tuple(np.where(exists, number, 0).tolist()), f"all {name}")
        whole = frontier(damage, limits.costs, _BELOW * limits.limit, _FRONT)
        measured.whole([*named, *whole])
        found = evolve(
            start,
            damage,
            limits.costs,
            limits.limit,
            measured.staged,
            measured.stages(offspring),
            generations=track(range(generations), "generations", enabled=progress),
            offspring=offspring,
            seed=seed,
        )
        named[found] = named[found] if found in named and found != start else "found"
        result = _result(mixture, measured, named, found, limits, model, windows, seed)
        by_main(lambda: result.save(folder))
        mixture.keep_(found)
        return result


class _Limits:
    """The budget, as a limit on costs."""

    def __init__(self, mixture: Mixture, bytes: float | None, speed: float | None) -> None:
        kind = "read" if bytes is None else "bytes"
        self.costs: Costs = mixture.costs(kind)
        dense = self.costs.of((0,) * len(mixture.parts))
        share = 1 / speed if speed is not None else bytes
        assert share is not None
        self.limit = share * dense
        self.told = f"bytes ≤ {share:.1%}" if speed is None else f"speed ≥ {speed:g}× (expected)"
        if self.costs.least > self.limit:
            least = self.costs.least / dense
            best = f"{least:.1%} of the bytes" if speed is None else f"{1 / least:.3g}×"
            hint = "" if DROP in mixture.choices else ", or allow dropping"
            raise PrunekitError(
                f"no mix of {', '.join(mixture.choices)} keeps {self.told}: the most is {best}; "
                f"ask for less{hint}"
            )

    def start(self, damage: Any) -> Mix:
        return least_damage(damage, self.costs, self.limit)


def _check(
    model: PreTrainedModel,
    choices: Mapping[str, Any],
    bytes: float | None,
    speed: float | None,
) -> None:
    check_measured(model)
    check_saveable(model)
    if (bytes is None) == (speed is None):
        raise PrunekitError("give one budget: bytes (--bytes 60%) or speed (--speed 1.3x)")
    if bytes is not None and not 0 < bytes < 1:
        raise PrunekitError(
            f"bytes is {bytes:g} of the dense model's: use a share between 0 and 1, such as 60% or "
            "0.6"
        )
    if speed is not None and not speed > 1:
        raise PrunekitError(f"speed is {speed:g} of the dense model's: use more than 1")
    if not choices:
        raise PrunekitError("nothing to choose from: name copies, or --choices such as 2:4,drop")
    if DENSE in choices:
        raise PrunekitError("'dense' is always a choice: give the copy another name")
    for name, choice in choices.items():
        if (choice is None) != (name == DROP):
            raise PrunekitError(f"{name!r}: None, and only None, is called 'drop'")
        if isinstance(choice, Method) and choice.bits is not None:
            _check_packable(name, choice)


def _check_packable(name: str, method: Method) -> None:
    """Raise a PrunekitError unless a packed format holds the values that a method rounds."""
    if method.pattern != "2:4":
        raise PrunekitError(
            f"{name!r}: no packed format holds rounded values of pattern {method.pattern}, so that "
            "they would take 16 bits each: use pattern 2:4, or leave bits out"
        )
    if method.group not in (None, *GROUPS):
        raise PrunekitError(
            f"{name!r}: no packed format has a scale for each {method.group} columns: use "
            f"{GROUPS[0]} or {GROUPS[1]}, or leave group out"
        )


def _windows(
    text: str | Path | Sequence[str] | None,
    field: str,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    limit: int | None,
) -> Windows:
    texts = documents(text, field)
    windows = of_text(tokenizer, texts, kind="strided", context=context, limit=limit)
    if len(windows) < HELD_OUT:
        raise PrunekitError(
            f"the text gives {len(windows)} windows of {context} tokens, and the search needs "
            f"{HELD_OUT}: pass a longer text or a smaller --context"
        )
    return windows


def _begun(
    folder: Path,
    model: PreTrainedModel,
    windows: Windows,
    choices: Mapping[str, Any],
    calibration: Calibration,
    tokens: int,
) -> dict[str, str]:
    """What each choice, and "dense", is made of; refuses a folder of another search."""
    dense = journal.fingerprint(model)
    made = {
        name: json.dumps([dense, _made_of(choice, calibration), tokens])
        for name, choice in choices.items()
    }
    own = json.dumps([dense, tokens])
    told = {
        "version": 1,
        "model": dense,
        "windows": windows.digest(),
        "choices": {name: hashlib.sha256(of.encode()).hexdigest() for name, of in made.items()},
        "torch": torch.__version__,
    }
    by_main(lambda: _tell(folder, told))
    return made | {DENSE: own}


def _tell(folder: Path, told: dict[str, Any]) -> None:
    """Write what a search is, or compare it with what its folder says."""
    path = folder / _FACTS
    if path.is_file():
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            held = {}
        for name, value in told.items():
            if held.get(name) != value:
                raise PrunekitError(
                    f"{folder} holds a search with another {name}: choose another --output, or "
                    "delete it"
                )
        return
    folder.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as written:
        written.write_text(json.dumps(told, indent=2), encoding="utf-8")


def _made_of(choice: Method | str | Path | None, calibration: Calibration) -> Any:
    if choice is None:
        return DROP
    if isinstance(choice, str | Path):
        path = located(str(choice))
        files = [path] if path.is_file() else sorted(path.iterdir())
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return [choice.to_dict(), facts(calibration) if choice.calibrated else None]


def _offer(
    mixture: Mixture,
    name: str,
    choice: Method | str | Path | None,
    made_of: str,
    calibrated: Callable[[], list[Tensor]],
    folder: Path,
    progress: bool,
) -> None:
    """Make a choice's copy, where it is not on disk, and offer it."""
    if choice is None:
        mixture.add(DROP)
        return
    if not mixture.has(name, made_of):
        if isinstance(choice, str | Path):
            _copied(mixture, name, choice, made_of)
        else:
            model = mixture.arch.model
            record = folder / f"{_COPIES}.journal"
            prune_(
                model,
                choice,
                calibrated() if choice.calibrated else None,
                journal=record if choice.calibrated else None,
                progress=progress,
            )
            mixture.write(name, model, made_of)
            mixture.restore_()
            journal.remove(record)
    mixture.add(name)
    sizes = mixture.costs("bytes").parts
    if isinstance(choice, str | Path) and not (sizes[:, -1] < sizes[:, 0]).any():
        raise PrunekitError(
            f"{name} is nowhere smaller than the dense model, so that nothing speaks for it: only "
            "zeros save bytes here, and 8- or 4-bit values behind 2:4 (dense ones have no packed "
            "format); name a pruned copy"
        )


def _copied(mixture: Mixture, name: str, source: str | Path, made_of: str) -> None:
    copy, _ = checkpoint.load(str(source), device=mixture.arch.model.device)
    mixture.write(name, copy, made_of)


def _result(
    mixture: Mixture,
    measured: Measured,
    named: Mapping[Mix, str],
    found: Mix,
    limits: _Limits,
    model: PreTrainedModel,
    windows: Windows,
    seed: int,
) -> SearchResult:
    size, read = mixture.costs("bytes"), mixture.costs("read")
    dense = read.of((0,) * len(mixture.parts))
    known = measured.all_whole()
    best = undominated([(size.of(mix), kl) for mix, kl in known.items()])
    shown = list(dict.fromkeys([*named, *(list(known)[index] for index in best)]))
    held_out = dict(zip(shown, measured.held_out(shown), strict=True))

    def point(mix: Mix, kl: float) -> Point:
        speed = dense / read.of(mix)
        within = limits.costs.of(mix) <= limits.limit
        return Point(
            mix, named.get(mix, ""), int(size.of(mix)), speed, kl, within, held_out.get(mix)
        )

    points = {mix: point(mix, kl) for mix, kl in known.items()}
    facts = {
        "prunekit": prunekit.__version__,
        "model": model.config.name_or_path,
        "device": model.device.type,
        "windows": windows.facts(),
        "searched_windows": len(measured.searched),
        "seed": seed,
    }
    return SearchResult(
        tuple(mixture.parts),
        tuple(mixture.choices),
        tuple(points.values()),
        points[found],
        limits.told,
        facts,
    )
