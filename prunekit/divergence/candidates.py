"""What is compared: models by name or in memory, captures of other engines, llama.cpp's files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunekit.divergence.capture import Capture, is_capture
from prunekit.divergence.llama_file import LlamaFile, is_llama_file
from prunekit.divergence.loading import (
    LoadedModel,
    bytes_in_memory,
    fingerprint,
    fingerprint_of,
    load_any,
)
from prunekit.errors import PrunekitError
from prunekit.models.causal import check_causal

DTYPES = ("float32", "bfloat16", "float16")
_WITH_DTYPE = re.compile(rf"(.+)@({'|'.join(DTYPES)})")


@dataclass(frozen=True, eq=False)
class Side:
    """A reference or a candidate, before anything of it is read.

    Attributes:
        source: What `prunekit.load` takes, or a model in memory, or where a capture is.
        name: What tables call it.
        kind: "model", "capture" or "llama" (a file of llama.cpp's `--kl-divergence-base`).
        dtype: Load it in this type; None: its own.
        retyped: Whether the type is what is compared: the files then say nothing about its size.
    """

    source: str | PreTrainedModel
    name: str
    kind: str = "model"
    dtype: str | None = None
    retyped: bool = False

    @property
    def is_loaded(self) -> bool:
        """Whether it is a model that the caller holds."""
        return not isinstance(self.source, str)

    def load(self, device: str | None, base: str | None = None) -> LoadedModel:
        """The model, loaded (or as the caller holds it)."""
        if isinstance(self.source, str):
            return load_any(self.source, dtype=self.dtype, device=device, base=base)
        return LoadedModel(self.source, None, None)

    def recorded(self) -> Capture | LlamaFile:
        """The capture or the file."""
        path = Path(str(self.source)).expanduser()
        return LlamaFile(path) if self.kind == "llama" else Capture(path)

    def identity(self) -> str:
        """A digest that changes when what is compared does."""
        if not isinstance(self.source, str):
            told: Any = fingerprint_of(self.source)
        elif self.kind == "model":
            told = fingerprint(self.source)
        else:
            path = Path(self.source).expanduser()
            files = [path] if path.is_file() else sorted(path.iterdir())
            told = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        text = json.dumps([self.kind, self.dtype, told])
        return hashlib.sha256(text.encode()).hexdigest()


def sides(
    given: Sequence[str | PreTrainedModel] | Mapping[str, str | PreTrainedModel],
    dtype: str | None = None,
) -> list[Side]:
    """Candidates as the user named them, with names that differ.

    Args:
        given: Sources ("demo", folders, .gguf files, Hub ids, captures, llama.cpp's files), each
            with `@bfloat16` or its like behind it for another type; or models; or either by name.
        dtype: Type of those that name none.
    """
    named = list(given.items()) if isinstance(given, Mapping) else [(None, each) for each in given]
    found: list[Side] = []
    for name, source in named:
        if isinstance(source, str):
            path, own = _split(source)
            kind = _kind(path)
            short = _short(path) + (f" in {own}" if own else "")
            side = Side(path, name or short, kind, own or dtype, own is not None)
        else:
            check_causal(source)
            held = getattr(source.config, "name_or_path", "") or type(source).__name__
            side = Side(source, name or _short(str(held)))
        found.append(side)
    return _told_apart(found)


def floor_side(reference: Side, dtype: str) -> Side | None:
    """The row that shows rounding alone: the reference in another type; None where it can't be.

    A model in memory is the caller's, and a copy of it would be a second one.
    """
    if reference.kind != "model" or reference.is_loaded:
        return None
    return Side(reference.source, f"reference in {dtype}", "model", dtype, True)


def check_tokenizer(
    ours: PreTrainedTokenizerBase | None, theirs: PreTrainedTokenizerBase | None
) -> list[str]:
    """See that two tokenizers give the same ids to the same tokens.

    Returns:
        What is to be noted: ids that one of them alone has, or that there is none to compare.

    Raises:
        PrunekitError: Ids stand for other tokens; the message counts them and names the first.
    """
    if ours is None or theirs is None:
        return ["its tokenizer could not be compared"] if theirs is None else []
    mine, other = ({i: t for t, i in each.get_vocab().items()} for each in (ours, theirs))
    differs = sorted(i for i in mine.keys() & other.keys() if mine[i] != other[i])
    if differs:
        first = differs[0]
        raise PrunekitError(
            f"its tokenizer is another one: {len(differs)} ids stand for other tokens, first "
            f"{first} ({mine[first]!r} in the reference, {other[first]!r} here): compare copies "
            "of one model"
        )
    alone = sorted(mine.keys() ^ other.keys())
    return [f"{len(alone)} ids are in one tokenizer only, first {alone[0]}"] if alone else []


def memory_of(loaded: LoadedModel) -> int:
    """Bytes of a loaded model."""
    return bytes_in_memory(loaded.model)


def _split(source: str) -> tuple[str, str | None]:
    match = _WITH_DTYPE.fullmatch(source)
    if match is None or Path(source).expanduser().exists():
        return source, None
    return match[1], match[2]


def _kind(source: str) -> str:
    path = Path(source).expanduser()
    return "llama" if is_llama_file(path) else "capture" if is_capture(path) else "model"


def _short(source: str) -> str:
    return "SmolLM2-135M-Instruct" if source == "demo" else Path(source).name or source


def _told_apart(found: list[Side]) -> list[Side]:
    """The same sides with longer names, then numbers, where names are equal."""
    names = [side.name for side in found]
    whole = [
        str(side.source) if isinstance(side.source, str) and names.count(side.name) > 1 else name
        for side, name in zip(found, names, strict=True)
    ]
    final, seen = [], dict.fromkeys(whole, 0)
    for name in whole:
        seen[name] += 1
        final.append(name if whole.count(name) == 1 else f"{name} ({seen[name]})")
    return [replace(side, name=name) for side, name in zip(found, final, strict=True)]
