"""The reference: run once, its final states and head on disk, gone from memory before a candidate.

A cache is a capture (see `capture`) with the reference's tokenizer beside it, and in its facts the
digests of the plan (text and windows), the tokenizer and the model. What does not fit is refused,
what is missing is computed: a killed run goes on, another text's cache is not mistaken for this.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from prunekit.divergence.candidates import Side, memory_of
from prunekit.divergence.capture import Capture, CaptureWriter, check_same, is_capture, read_facts
from prunekit.divergence.llama_file import LlamaFile
from prunekit.divergence.llama_file import write as write_llama
from prunekit.divergence.loading import LoadedModel
from prunekit.divergence.processes import by_main, free_memory, together
from prunekit.divergence.rows import Options, Readout, Rows, states_of
from prunekit.divergence.windows import Windows
from prunekit.errors import PrunekitError
from prunekit.process import distributed
from prunekit.process.progress import track

_TOKENIZER = "tokenizer"
Planner = Callable[[PreTrainedTokenizerBase | None], Windows]


@dataclass(frozen=True)
class Reference:
    """The reference's side of every comparison.

    Attributes:
        held: Where its rows come from.
        windows: The plan.
        tokenizer: Its tokenizer, where there is one.
        facts: name, sizes, dtype, parameters, notes.
        identity: Changes when its rows do.
        source: What a candidate's adapter goes on; None where the reference is no model by name.
    """

    held: Capture | LlamaFile
    windows: Windows
    tokenizer: PreTrainedTokenizerBase | None
    facts: dict[str, Any]
    identity: str
    source: str | None

    def rows(self, group: range) -> Rows:
        """Its rows of the windows `group`."""
        return self.held.rows(group)

    @property
    def vocabulary(self) -> int:
        """Number of logits per position."""
        return self.rows(range(1)).vocabulary


def recorded(
    side: Side,
    plan: Planner | None,
    tokenizer: PreTrainedTokenizerBase | None,
    limit: int | None = None,
) -> Reference:
    """A reference that another engine wrote: a capture, or llama.cpp's file.

    Args:
        side: Where it is.
        plan: Makes the plan; None takes the file's own (llama.cpp's files only).
        tokenizer: Of the text; its beginning-of-text token starts each chunk of a file.
        limit: Windows of the file's own plan to use; None: all.

    Raises:
        PrunekitError: It can't be read, or was made of another plan.
    """
    held = side.recorded()
    if plan is not None:
        windows = plan(tokenizer)
    elif isinstance(held, LlamaFile):
        windows = held.windows(_begins(held, tokenizer), limit)
    else:
        raise PrunekitError("a capture as the reference needs its text: give --text")
    held.check(windows)
    facts = dict(held.facts) if isinstance(held, Capture) else {"dtype": "16-bit log-probabilities"}
    facts = {"notes": [], **facts, "name": side.name}
    return Reference(held, windows, tokenizer, facts, side.identity(), None)


def cached(
    side: Side,
    plan: Planner,
    folder: Path,
    options: Options,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Reference:
    """The reference from its cache, after running whatever the cache lacks.

    Args:
        side: A model.
        plan: Makes the plan once the tokenizer is known.
        folder: The cache.
        options: How to run it.
        tokenizer: Used instead of the model's own.

    Raises:
        PrunekitError: The cache is of another text, model or version; or the model can't be run.
    """
    identity = side.identity()
    loaded: LoadedModel | None = None
    if tokenizer is None and is_capture(folder) and read_facts(folder).get("model") == identity:
        tokenizer = _kept_tokenizer(folder)
    if tokenizer is None:
        loaded = side.load(options.device)
        tokenizer = loaded.tokenizer
    windows = plan(tokenizer)
    wanted = {"plan": windows.facts(), "tokenizer": _digest(tokenizer), "model": identity}
    if not together(lambda: _complete(folder, wanted)):
        loaded = loaded or side.load(options.device)
        facts = _told(side, loaded, wanted)
        free_memory()  # what reading the files and the text took
        _write(folder, windows, loaded, facts, tokenizer, options)
        loaded = None
    if not side.is_loaded:  # a model that the caller holds stays
        free_memory()
    held = Capture(folder)
    held.check(windows)
    source = side.source if isinstance(side.source, str) else None
    return Reference(held, windows, tokenizer, dict(held.facts), identity, source)


def write_reference(path: Path, held: Reference) -> None:
    """Write a comparison's reference as a file that llama.cpp's `--kl-divergence` reads.

    Raises:
        PrunekitError: See `write`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    vocabulary = held.vocabulary

    def logits(index: int) -> Tensor:
        rows = held.rows(range(index, index + 1))
        return rows.logits(slice(None), vocabulary, torch.device("cpu"))

    by_main(lambda: write_llama(path, held.windows, logits, vocabulary))


def _told(side: Side, loaded: LoadedModel, wanted: dict[str, Any]) -> dict[str, Any]:
    model = loaded.model
    return {
        "name": side.name,
        "model": wanted["model"],
        "tokenizer": wanted["tokenizer"],
        "dtype": str(model.dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes_on_disk": loaded.bytes_on_disk,
        "bytes_in_memory": memory_of(loaded),
        "notes": list(loaded.notes),
    }


@torch.inference_mode()
def _write(
    folder: Path,
    windows: Windows,
    loaded: LoadedModel,
    facts: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    options: Options,
) -> None:
    model = loaded.model
    if model.training:
        raise PrunekitError("the reference is in training mode: call model.eval() first")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, windows.ids)) - 1
    if limit is not None and longest > limit:
        raise PrunekitError(
            f"windows of {longest} tokens exceed the reference's context of {limit}: use "
            f"--context {limit}"
        )
    readout = Readout.of(model).plain()
    assert readout.weight is not None
    size = readout.weight.shape[1] * windows.positions * model.dtype.itemsize
    _check_room(folder, size + readout.weight.nbytes)

    def writer() -> CaptureWriter:
        return CaptureWriter(
            folder,
            windows,
            "states",
            facts=facts,
            head=readout.weight,
            bias=readout.bias,
            softcap=readout.softcap,
            scale=readout.scale,
        )

    def begin() -> None:
        writer()
        if tokenizer is not None and not (folder / _TOKENIZER).is_dir():
            tokenizer.save_pretrained(folder / _TOKENIZER)

    def run() -> None:
        kept = writer()
        groups = [group for group in distributed.shard(windows.groups()) if kept.missing(group)]
        for group in track(groups, "reference", enabled=options.progress):
            ids = [windows.ids[index] for index in group]
            firsts = [windows.firsts[index] for index in group]
            states = states_of(model, ids, firsts, options.batch_tokens)
            broken = torch.nonzero(~states.isfinite().all(1))
            if len(broken):
                before = sum(windows.scored[: group.start])
                window, at = windows.where(before + int(broken[0]))
                raise PrunekitError(
                    f"the reference's states are not finite at token {at} of window {window}: "
                    "check its weights, or use another dtype"
                )
            kept.add(group, states)

    by_main(begin)
    together(run)


def _complete(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether the cache has all rows of this work (alike in every process)."""
    if not is_capture(folder):
        return False
    check_same(folder, read_facts(folder), wanted)
    try:
        Capture(folder)
    except PrunekitError:
        return False
    return True


def _kept_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    kept = folder / _TOKENIZER
    return AutoTokenizer.from_pretrained(kept) if kept.is_dir() else None


def _digest(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """SHA-256 of a tokenizer's vocabulary."""
    pairs = [] if tokenizer is None else sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()


def _begins(held: LlamaFile, tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    """The token that llama.cpp put at each chunk's start: there where the text starts with it."""
    begin = None if tokenizer is None else tokenizer.bos_token_id
    return begin if begin is not None and int(held.ids[0, 0]) == begin else None


def _check_room(folder: Path, needed: int) -> None:
    parent = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise PrunekitError(
            f"the reference's states and head take {needed} bytes, {free} are free in {parent}: "
            "use another --reference-cache, a smaller --limit, or free some space"
        )
