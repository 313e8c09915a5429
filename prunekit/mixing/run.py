"""`pk.search`: the mix of compressed sublayers with the least KL at a size or a speed."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import prunekit
from prunekit import checkpoint
from prunekit.checkpoint.sources import located
from prunekit.data import calibration as calibrating
from prunekit.data import text_files
from prunekit.data.calibration import Calibration
from prunekit.divergence.capture import save_tensors
from prunekit.divergence.windows import Windows, of_text
from prunekit.errors import PrunekitError
from prunekit.evaluation.items import load_heldout
from prunekit.files.atomic import replaced_file
from prunekit.files.locks import locked
from prunekit.mixing.copies import DENSE, DROP, Mixture
from prunekit.mixing.fitness import Fitness, Record
from prunekit.mixing.mixes import Costs, Mix, Stage, evolve, frontier, least_damage
from prunekit.mixing.result import Point, SearchResult
from prunekit.models.causal import check_measured
from prunekit.models.saveable import check_saveable
from prunekit.process import distributed
from prunekit.process.ambient import usual_torch
from prunekit.process.progress import track
from prunekit.pruning import journal, prune_
from prunekit.pruning.recipes import Method

_FACTS, _RECORD, _COPIES = "run.json", "measured.jsonl", "copies"
_TOKENS = "calibration.safetensors"
_CPU_TOKENS, _GPU_TOKENS = 1024, 8192  # per forward pass
_FRONT = 9  # mixes of the additive model that are measured along the front, from
_BELOW = 0.75  # of the budget
_HELD_OUT = 4  # one of so many windows is kept for the end
#: Shares of the searched windows that a stage measures on, and of the offspring that survive it.
_STAGES = ((1 / 8, 1 / 4), (1 / 2, 1 / 16), (1.0, 0.0))


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

    Nothing in `output` is computed again: a killed search goes on, and one with another budget or
    more generations begins with all that was measured.

    Args:
        model: The dense model. It becomes the mix that was found, dropped sublayers gone, masked
            weights not packed (`swap_` packs them). If the search fails it is dense again.
        tokenizer: Its tokenizer.
        choices: What a sublayer may become, by name: a method that prunes a copy of the model, a
            checkpoint of a copy, or None to drop it. "dense" is always there.
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
    with locked(folder), contextlib.ExitStack() as closing:
        facts = _begun(folder, model, windows, choices, calibration, tokens)
        mixture = Mixture(
            model, folder / _COPIES, json.dumps([journal.fingerprint(model), tokens]), tokens
        )
        closing.callback(mixture.close)
        closing.push(lambda kind, *_: None if kind is None else mixture.restore_())
        calibrated = _Calibrated(calibration, tokenizer, folder / _TOKENS, progress)
        for name, choice in choices.items():
            _offer(mixture, name, choice, facts, calibrated, folder, progress)
        limits = _Limits(mixture, bytes, speed)
        measured = _Measured(mixture, windows, Record(folder / _RECORD), model, progress)
        damage = measured.alone()
        start = limits.start(damage)
        named = {(0,) * len(mixture.parts): DENSE, start: "additive model"}
        for number, name in enumerate(mixture.choices):
            if name in (DENSE, DROP):
                continue
            exists = np.isfinite(limits.costs.parts[:, number])
            named.setdefault(tuple(np.where(exists, number, 0).tolist()), f"all {name}")
        whole = frontier(damage, limits.costs, _BELOW * limits.limit, _FRONT)
        for mix in track([*named, *whole], "front", enabled=progress):
            measured.whole(mix)
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
        result.save(folder)
        mixture.drop_(found)
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


class _Calibrated:
    """The tokens that all copies are calibrated on, made once."""

    def __init__(
        self,
        calibration: Calibration,
        tokenizer: PreTrainedTokenizerBase,
        path: Path,
        progress: bool,
    ) -> None:
        self._calibration, self._tokenizer = calibration, tokenizer
        self._path, self._progress = path, progress

    def tokens(self, model: PreTrainedModel) -> Tensor:
        """(samples, length), from the dense model, or from disk."""
        told = json.dumps(_facts_of(self._calibration))
        if self._path.is_file():
            with safe_open(self._path, framework="pt") as held:
                if (held.metadata() or {}).get("calibration") == told:
                    found: Tensor = held.get_tensor("tokens")
                    return found
        given = self._calibration, model, self._tokenizer
        found = calibrating.tokens(*given, progress=self._progress)
        save_tensors(self._path, {"tokens": found}, {"calibration": told})
        return found


class _Measured:
    """KLs of mixes, each measured once and for all."""

    def __init__(
        self,
        mixture: Mixture,
        windows: Windows,
        record: Record,
        model: PreTrainedModel,
        progress: bool,
    ) -> None:
        self._mixture, self._record, self._progress = mixture, record, progress
        self._batch = _CPU_TOKENS if model.device.type == "cpu" else _GPU_TOKENS
        self._windows, self._model = windows, model
        self._fitness: Fitness | None = None
        everything = range(len(windows))
        self._held_out = [i for i in everything if i % _HELD_OUT == _HELD_OUT - 1]
        self.searched = [i for i in everything if i not in self._held_out]

    def _kl(self, mix: Mix, indices: Sequence[int]) -> float:
        data = ",".join(map(str, indices))
        known = 0.0 if not any(mix) else self._record.get(mix, data)
        if known is None:
            if self._fitness is None:  # a search that is only read again runs no model
                self._mixture.apply_((0,) * len(mix))
                self._fitness = Fitness(self._model, self._windows, self._batch)
            self._mixture.apply_(mix)
            known = self._fitness.kl(indices)
            self._record.add(mix, data, known)
        return known

    def whole(self, mix: Mix) -> float:
        """On all windows that are searched on."""
        return self._kl(mix, self.searched)

    def held_out(self, mix: Mix) -> float:
        """On the windows that are not."""
        return self._kl(mix, self._held_out)

    def all_whole(self) -> dict[Mix, float]:
        """Every mix that was measured on all windows that are searched on."""
        dense = {(0,) * len(self._mixture.parts): 0.0}
        return dense | self._record.measured(",".join(map(str, self.searched)))

    def alone(self) -> Any:
        """(parts, choices) KL of each choice in each part alone, on the first stage's windows."""
        costs = self._mixture.costs("bytes").parts
        damage = np.zeros(costs.shape)
        places = [tuple(place) for place in np.argwhere(np.isfinite(costs)).tolist() if place[1]]
        # choice by choice, so that few tensors change from one measurement to the next
        for part, choice in track(places, "each part alone", enabled=self._progress):
            mix = [0] * len(damage)
            mix[part] = choice
            damage[part, choice] = self._kl(tuple(mix), self._share(_STAGES[0][0]))
        return damage

    def stages(self, offspring: int) -> list[Stage]:
        """The rounds of selection."""
        return [
            Stage(number, max(1, round(share * offspring)))
            for number, (_, share) in enumerate(_STAGES)
        ]

    def staged(self, mix: Mix, stage: int) -> float:
        """On the windows of a stage."""
        return self._kl(mix, self._share(_STAGES[stage][0]))

    def _share(self, share: float) -> list[int]:
        return self.searched[: max(1, round(share * len(self.searched)))]


def _check(
    model: PreTrainedModel,
    choices: Mapping[str, Any],
    bytes: float | None,
    speed: float | None,
) -> None:
    check_measured(model)
    check_saveable(model)
    if distributed.world_size() > 1:
        raise PrunekitError("the search runs in one process: start it without torchrun")
    if (bytes is None) == (speed is None):
        raise PrunekitError("give one budget: bytes (--bytes 60%) or speed (--speed 1.3x)")
    if bytes is not None and not 0 < bytes < 1:
        raise PrunekitError(f"bytes is {bytes:g} of the dense model's: use more than 0, below 1")
    if speed is not None and not speed > 1:
        raise PrunekitError(f"speed is {speed:g} of the dense model's: use more than 1")
    if not choices:
        raise PrunekitError("nothing to choose from: name copies, or --choices such as 2:4,drop")
    if DENSE in choices:
        raise PrunekitError("'dense' is always a choice: give the copy another name")
    for name, choice in choices.items():
        if (choice is None) != (name == DROP):
            raise PrunekitError(f"{name!r}: None, and only None, is called 'drop'")
        if getattr(choice, "bits", None) is not None:
            raise PrunekitError(f"{name!r}: a mix keeps no rounded values: leave bits out")


def _windows(
    text: str | Path | Sequence[str] | None,
    field: str,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    limit: int | None,
) -> Windows:
    if text is None:
        documents = [load_heldout()]
    elif isinstance(text, str | Path):
        documents = text_files.read_file(text, text_field=field)
    else:
        documents = list(text)
    windows = of_text(tokenizer, documents, kind="strided", context=context, limit=limit)
    if len(windows) < _HELD_OUT:
        raise PrunekitError(
            f"the text gives {len(windows)} windows of {context} tokens, and the search needs "
            f"{_HELD_OUT}: pass a longer text or a smaller --context"
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
    """What each choice is made of; refuses a folder of measurements that are not comparable."""
    dense = journal.fingerprint(model)
    made = {
        name: json.dumps([dense, _made_of(choice, calibration), tokens])
        for name, choice in choices.items()
    }
    facts = {
        "version": 1,
        "model": dense,
        "windows": windows.digest(),
        "choices": {name: hashlib.sha256(of.encode()).hexdigest() for name, of in made.items()},
        "torch": torch.__version__,
    }
    path = folder / _FACTS
    if path.is_file():
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            held = {}
        for name, value in facts.items():
            if held.get(name) != value:
                raise PrunekitError(
                    f"{folder} holds a search with another {name}: choose another --output, or "
                    "delete it"
                )
        return made
    folder.mkdir(parents=True, exist_ok=True)
    with replaced_file(path) as written:
        written.write_text(json.dumps(facts, indent=2), encoding="utf-8")
    return made


def _made_of(choice: Method | str | Path | None, calibration: Calibration) -> Any:
    if choice is None:
        return DROP
    if isinstance(choice, str | Path):
        path = located(str(choice))
        files = [path] if path.is_file() else sorted(path.iterdir())
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return [choice.to_dict(), _facts_of(calibration) if choice.calibrated else None]


def _facts_of(calibration: Calibration) -> dict[str, Any]:
    return {**asdict(calibration), "source": str(calibration.source)}


def _offer(
    mixture: Mixture,
    name: str,
    choice: Method | str | Path | None,
    made: Mapping[str, str],
    calibrated: _Calibrated,
    folder: Path,
    progress: bool,
) -> None:
    """Make a choice's copy, where it is not on disk, and offer it."""
    if choice is None:
        mixture.add(DROP)
        return
    if not mixture.has(name, made[name]):
        if isinstance(choice, str | Path):
            _copied(mixture, name, choice, made[name])
        else:
            model = mixture.arch.model
            record = folder / f"{_COPIES}.journal"
            prune_(
                model,
                choice,
                calibrated.tokens(model) if choice.calibrated else None,
                journal=record if choice.calibrated else None,
                progress=progress,
            )
            mixture.write(name, model, made[name])
            mixture.restore_()
            journal.remove(record)
    mixture.add(name)


def _copied(mixture: Mixture, name: str, source: str | Path, made_of: str) -> None:
    copy, _ = checkpoint.load(str(source))
    mixture.write(name, copy, made_of)


def _result(
    mixture: Mixture,
    measured: _Measured,
    named: Mapping[Mix, str],
    found: Mix,
    limits: _Limits,
    model: PreTrainedModel,
    windows: Windows,
    seed: int,
) -> SearchResult:
    size, read = mixture.costs("bytes"), mixture.costs("read")
    dense = read.of((0,) * len(mixture.parts))

    def point(mix: Mix, kl: float) -> Point:
        held_out = measured.held_out(mix) if mix in named else None
        speed = dense / read.of(mix)
        within = limits.costs.of(mix) <= limits.limit
        return Point(mix, named.get(mix, ""), int(size.of(mix)), speed, kl, within, held_out)

    points = {mix: point(mix, kl) for mix, kl in measured.all_whole().items()}
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
