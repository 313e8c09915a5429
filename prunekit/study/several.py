"""`compare_several`: one dense model and its copies, quality beside size and speed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from prunekit.analysis.grid import interval_to_dict
from prunekit.analysis.provenance import versions
from prunekit.divergence.candidates import Side, check_tokenizer, sides
from prunekit.divergence.loading import bytes_in_memory
from prunekit.errors import PrunekitError, one_line
from prunekit.evaluation.intervals import Interval, paired, paired_difference
from prunekit.evaluation.items import Choice
from prunekit.files.atomic import replaced_folder
from prunekit.models import generation
from prunekit.models.causal import check_causal
from prunekit.packed.sizes import weight_count
from prunekit.process import distributed
from prunekit.report import overview
from prunekit.report.charts import compact
from prunekit.speed.beside import Speed, beside
from prunekit.study.baseline import Baseline
from prunekit.study.comparison import compare
from prunekit.study.study import Study

FILES = ("comparison.json", "comparison.csv", "steps.csv", "index.html")
FIGURE = "steps.png"
SCHEMA_VERSION = 1
# Numbers of `Study.summary` that a copy's row carries, where the study has them.
_SHOWN = (
    *("kl_dense_pruned", "kl_pruned_dense", "p_cosine", "z_cosine", "h_cosine", "flipped"),
    *("pruned_accuracy", "accuracy_difference", "pruned_identical", "pruned_exact_prefix_share"),
    *("pruned_exact_match", "exact_match_difference", "pruned_same_answer", "pruned_same_text"),
    *("pruned_chrf", "pruned_perplexity", "pruned_repetition"),
)


@dataclass(frozen=True)
class Copy:
    """One copy, compared with the dense model.

    Attributes:
        name: What tables call it.
        study: The comparison; None where it failed.
        speed: Beside the dense model; None where it was not timed.
        bytes_on_disk: Of its weight files; None for a model that the caller holds.
        bytes_in_memory: Parameters and buffers, packed ones as they are held.
        notes: What a reader should know about it.
        error: Why it failed, or "".
    """

    name: str
    study: Study | None = None
    speed: Speed | None = None
    bytes_on_disk: int | None = None
    bytes_in_memory: int | None = None
    notes: tuple[str, ...] = ()
    error: str = ""

    @property
    def size(self) -> int | None:
        """Bytes on disk, in memory where there are no files."""
        return self.bytes_on_disk or self.bytes_in_memory


@dataclass(frozen=True)
class Several:
    """Copies of one dense model; what `compare_several` returns.

    Attributes:
        meta: The dense model's name, size and parameters; seed, versions, counts.
        copies: The closest (smallest mean KL) first, those that failed last.
    """

    meta: dict[str, Any]
    copies: tuple[Copy, ...]

    @property
    def failed(self) -> list[Copy]:
        """Copies without a result."""
        return [copy for copy in self.copies if copy.study is None]

    def to_dict(self) -> dict[str, Any]:
        """All but the studies themselves, JSON-able (see docs/study.md)."""
        studies = [(copy, copy.study) for copy in self.copies if copy.study is not None]
        pairs = [
            _pair(one.name, first, other.name, second, int(self.meta["seed"]))
            for (one, first), (other, second) in combinations(studies, 2)
        ]
        rows = [self._row(copy) for copy in self.copies]
        sizes = {copy.name: copy.size for copy in self.copies}
        for row in rows:
            row["beaten_by"] = _beaten_by(row["name"], sizes, pairs)
        return {
            "schema_version": SCHEMA_VERSION,
            "meta": self.meta,
            "copies": rows,
            "pairs": pairs,
        }

    def table(self) -> Any:
        """The ranking, for a terminal."""
        return overview.table(self.to_dict())

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write one page, JSON and CSV, and every copy's study into a folder below.

        Under several processes only the main one writes.

        Args:
            folder: Where to; its parents are created.
            overwrite: Whether to replace an earlier comparison or study there.

        Returns:
            The folder.

        Raises:
            PrunekitError: The folder is not empty, holds something else, or can't be written.
        """
        if not distributed.is_main():
            return Path(folder)
        from prunekit.report import png  # matplotlib is slow to import, and only needed here

        told = self.to_dict()
        replaceable = (FILES[0], "study.json")
        with replaced_folder(folder, overwrite=overwrite, replaceable=replaceable) as part:
            for copy, row in zip(self.copies, told["copies"], strict=True):
                if copy.study is not None:
                    copy.study.save(part / row["folder"])
            texts = (
                json.dumps(told, ensure_ascii=False, allow_nan=False, indent=1) + "\n",
                overview.csv(told),
                overview.steps_csv(told),
                overview.render(told),
            )
            for name, text in zip(FILES, texts, strict=True):
                (part / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            if any(row.get("steps") for row in told["copies"]):
                png.draw(overview.steps_figure(told), part / FIGURE)
        return Path(folder)

    def _row(self, copy: Copy) -> dict[str, Any]:
        if copy.study is None:
            return {"name": copy.name, "error": copy.error}
        summary = copy.study.summary()
        change = copy.study.accuracy_change()
        numbers = {name: summary[name] for name in _SHOWN if name in summary}
        return {
            "name": copy.name,
            "error": None,
            "folder": self._folders()[copy.name],
            "notes": list(copy.notes),
            "bytes_on_disk": copy.bytes_on_disk,
            "bytes_in_memory": copy.bytes_in_memory,
            "size": copy.size,
            "bits_per_weight": 8 * copy.size / self.meta["parameters"] if copy.size else None,
            "speed": None if copy.speed is None else asdict(copy.speed),
            "scores": {
                name: interval_to_dict(value) if isinstance(value, Interval) else value
                for name, value in numbers.items()
            },
            "gained": None if change is None else change.gained,
            "lost": None if change is None else change.lost,
            "mcnemar_p": None if change is None else change.p,
            "needed": None if change is None else change.needed,
            "steps": _steps(copy.study),
        }

    def _folders(self) -> dict[str, str]:
        """A folder's name for each copy, none twice and none of `FILES`."""
        found: dict[str, str] = {}
        for copy in self.copies:
            plain = re.sub(r"[^\w.@-]+", "-", copy.name).strip("-.") or "copy"
            name, number = plain, 1
            while name in found.values() or name in (*FILES, FIGURE):
                number += 1
                name = f"{plain}-{number}"
            found[copy.name] = name
        return found


def compare_several(
    dense: PreTrainedModel,
    copies: Sequence[str | PreTrainedModel] | Mapping[str, str | PreTrainedModel],
    prompts: Sequence[str],
    *,
    tokenizer: Any,
    speed: bool = True,
    name: str = "dense",
    bytes_on_disk: int | None = None,
    dtype: str | None = None,
    max_new_tokens: int = 48,
    batch_size: int = 8,
    chat: generation.Chat = "auto",
    choices: Sequence[Choice] | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Several:
    """Compare a dense model with each of several copies, whatever made them smaller.

    Copies are loaded when their turn comes, so that two models are in memory at a time. One that
    cannot be compared is reported, and the others go on. The dense model's own texts and answers
    are computed once.

    Args:
        dense: The dense model.
        copies: Sources as `prunekit kld` takes them (folders, quantised ones and adapters too,
            .gguf files, "demo", Hub ids), or models; or either by name.
        prompts: Texts to continue, at least one.
        tokenizer: The tokenizer of all.
        speed: Time every copy in turns with the dense model; never under several processes.
        name: What to call the dense model.
        bytes_on_disk: Size of the dense model's files.
        dtype: Type to load copies in; None keeps a checkpoint's, which must be the dense model's.
        max_new_tokens: Longest continuation.
        batch_size: Prompts run together.
        chat: Whether prompts are asked through the chat template, see `generation.encode`.
        choices: Multiple-choice questions.
        seed: Seed of every interval's resampling.
        progress: Show progress bars (on a terminal only).
        **options: Further arguments of `compare`.

    Raises:
        PrunekitError: No copy is given, one is no model, or all of them fail.
    """
    check_causal(dense)
    asked = sides(copies, dtype)
    if not asked:
        raise PrunekitError("no copies to compare: give at least one")
    for side in asked:
        if side.kind != "model":
            raise PrunekitError(
                f"{side.name} holds recorded predictions and is no model: rank it with prunekit kld"
            )
    told: dict[str, Any] = {
        **{"max_new_tokens": max_new_tokens, "batch_size": batch_size},
        **{"chat": chat, "progress": progress},
    }
    baseline = Baseline(dense, tokenizer, **told)
    told |= {"choices": choices, "seed": seed, "baseline": baseline, "tokenizer": tokenizer}
    timed = speed and distributed.world_size() == 1
    done = []
    for side in asked:
        names = (name, side.name) if name != side.name else (f"{name} (dense)", side.name)
        done.append(_compared(dense, side, prompts, timed=timed, names=names, **told, **options))
    if all(copy.study is None for copy in done):
        raise PrunekitError(f"{done[0].name}: {done[0].error}")
    meta = {
        "name": name,
        "parameters": weight_count(dense),
        "bytes_on_disk": bytes_on_disk,
        "bytes_in_memory": bytes_in_memory(dense),
        "device": str(dense.device),
        "dtype": str(dense.dtype).removeprefix("torch."),
        "seed": seed,
        "prompts": len(prompts),
        "choices": len(choices or ()),
        "max_new_tokens": max_new_tokens,
        "versions": versions(),
    }
    return Several(meta, tuple(sorted(done, key=_distance)))


def _compared(
    dense: PreTrainedModel,
    side: Side,
    prompts: Sequence[str],
    *,
    timed: bool,
    tokenizer: Any,
    seed: int,
    **options: Any,
) -> Copy:
    """One copy: loaded, compared, timed; or why not."""
    try:
        loaded = side.load(str(dense.device), dense.config.name_or_path or None)
        notes = [*loaded.notes, *check_tokenizer(tokenizer, loaded.tokenizer or tokenizer)]
        study = compare(dense, loaded.model, prompts, tokenizer=tokenizer, seed=seed, **options)
    except PrunekitError as error:
        return Copy(side.name, error=one_line(error))
    speed = None
    if timed:
        try:
            speed = beside(dense, loaded.model, seed=seed)
        except PrunekitError as error:
            notes.append(one_line(error))
    memory = bytes_in_memory(loaded.model)
    return Copy(side.name, study, speed, loaded.bytes_on_disk, memory, tuple(notes))


def _distance(copy: Copy) -> float:
    study = copy.study
    if study is None or study.decoding is None:
        return float("inf")
    return float(study.decoding.teacher_forced.interval("kl_dense_pruned").mean)


def _steps(study: Study) -> dict[str, list[Any]] | None:
    """Means over prompts along the dense model's own texts, and how many prompts reach a step."""
    if study.decoding is None:
        return None
    grid = study.decoding.teacher_forced
    reached = np.sum(~np.isnan(grid["kl_dense_pruned"]), axis=0)
    means = {key: compact(grid.mean(key, keep=("step",))) for key, *_ in overview.STEPS}
    return {"step": list(grid.labels["step"]), "prompts": reached.tolist(), **means}


def _beaten_by(
    name: str, sizes: Mapping[str, int | None], pairs: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Copies that are no larger and closer, by a paired interval of the KLs without zero."""
    mine, found = sizes[name], []
    for pair in pairs:
        # second less first: copies are in the order of their mean KL
        theirs = sizes[pair["first"]]
        if pair["second"] == name and mine is not None and theirs is not None and theirs <= mine:
            low = pair.get("kl", {}).get("low")
            if isinstance(low, float | int) and low > 0:
                found.append(pair["first"])
    return found


def _pair(one: str, first: Study, other: str, second: Study, seed: int) -> dict[str, Any]:
    """Two copies on the same prompts and questions: second less first, paired."""
    found: dict[str, Any] = {"first": one, "second": other}
    if first.decoding is not None and second.decoding is not None:
        kls = (
            s.teacher_forced.per_prompt("kl_dense_pruned")
            for s in (first.decoding, second.decoding)
        )
        found["kl"] = interval_to_dict(paired_difference(*kls, seed=seed))
        chrf = (s.sequence["chrf"] for s in (first.decoding, second.decoding))
        found["chrf"] = interval_to_dict(paired_difference(*chrf, seed=seed))
    if first.right is not None and second.right is not None:
        change = paired(first.right["pruned"], second.right["pruned"], seed=seed)
        found["accuracy"] = {
            **interval_to_dict(change.difference),
            **{"gained": change.gained, "lost": change.lost, "p": change.p},
            "needed": change.needed,
        }
    return found
