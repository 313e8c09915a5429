"""`pk.kld`: any number of candidates against one reference, one model in memory at a time."""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from prunekit.checkpoint.sources import located
from prunekit.data import text_files
from prunekit.divergence import windows as plans
from prunekit.divergence.candidates import Side, floor_side, sides
from prunekit.divergence.loading import load_any
from prunekit.divergence.measuring import Compared, compared
from prunekit.divergence.processes import by_main, free_memory
from prunekit.divergence.reference import Planner, Reference, cached, recorded
from prunekit.divergence.result import Candidate, Kld
from prunekit.divergence.rows import Options
from prunekit.errors import PrunekitError, one_line
from prunekit.evaluation.items import load_heldout
from prunekit.files.locks import locked
from prunekit.models.token_ids import tokenize
from prunekit.process import distributed
from prunekit.process.ambient import usual_torch

Given: TypeAlias = str | PreTrainedModel
_CPU_TOKENS = 1024  # per forward pass: more don't run faster there


@usual_torch()
def kld(
    reference: Given,
    candidates: Sequence[Given] | Mapping[str, Given],
    text: str | Path | Sequence[str] | None = None,
    *,
    context: int = 512,
    windows: str = "llama.cpp",
    stride: int | None = None,
    limit: int | None = None,
    dataset: str | None = None,
    text_field: str = "text",
    output: str | Path | None = None,
    reference_cache: str | Path | None = None,
    floor: str = "auto",
    topk: int = 10,
    dtype: str | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Kld:
    """Statistics of KL(reference ‖ candidate) and its kin over a text, exactly, per candidate.

    The reference is run first and its final states are kept on disk; then each candidate in turn.
    What is on disk already, in `output` and `reference_cache`, is not computed again. A candidate
    that fails has a row that says why, and the others go on. Under `torchrun` or `accelerate
    launch` the processes share the windows (on one file system) and all return the whole result.

    Args:
        reference: What `prunekit.load` takes, any folder that transformers loads, a model in
            memory, a capture, or a file of llama.cpp's `--kl-divergence-base`.
        candidates: The same, PEFT adapters of the reference, and `SOURCE@bfloat16` and its like;
            a mapping names them.
        text: A file (.txt, .jsonl, .json, .parquet), or texts themselves; None: a built-in one.
        context: Longest window, in tokens.
        windows: "llama.cpp", "strided" or "documents": see `prunekit.divergence.windows`.
        stride: Of strided windows; None means `context`.
        limit: Use at most so many windows.
        dataset: A Hub dataset id instead of a text; needs `limit`.
        text_field: Field of the text in rows.
        output: Folder of rows, table and page; None keeps rows in a temporary one.
        reference_cache: Folder of the reference's states; None: inside `output`.
        floor: Type of the row "reference in …", which shows rounding alone; "auto": bfloat16, or
            float32 where that is the reference's own; "none" leaves it out.
        topk: Likeliest tokens whose overlap is reported.
        dtype: Type of reference and candidates that are not quantised; None: each its own.
        device: Where models go; "auto" spreads them; None: the CPU.
        batch_size: Windows per forward pass; None: 8, on a CPU as many as hold 1024 tokens.
        tokenizer: Of the text, where the reference has none (a capture, llama.cpp's file, a model
            in memory).
        seed: Of the bootstrap, and of the order of a dataset's documents.
        progress: Show bars on a terminal.

    Raises:
        PrunekitError: The text is too short, an option is out of range, the reference can't be
            loaded, or a cache belongs to something else.
    """
    if dataset is not None and (text is not None or limit is None):
        raise PrunekitError("--dataset takes the place of --text and needs --limit: give that")
    if topk < 0:
        raise PrunekitError(f"topk is {topk}: use 0 or more")
    base = sides([reference], dtype)[0]
    others = sides(candidates, dtype)
    if not others and floor == "none":
        raise PrunekitError("nothing to compare: name a candidate")
    tokens = _batch_tokens(batch_size, context, device)
    options = Options(topk, tokens, device, progress)

    def plan(known: PreTrainedTokenizerBase | None) -> plans.Windows:
        if known is None:
            raise PrunekitError(f"{base.name} has no tokenizer: pass one")
        documents = _documents(text, dataset, text_field, seed, (limit or 0) * context, known)
        return plans.of_text(
            known, documents, kind=windows, context=context, stride=stride, limit=limit
        )

    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as kept:
        folder = Path(temporary if output is None else output).expanduser()
        if distributed.world_size() > 1 and output is None:
            raise PrunekitError("several processes share their rows on disk: give an output folder")
        cache = Path(reference_cache or folder / "reference").expanduser()
        has_text = text is not None or dataset is not None
        if output is not None:
            by_main(lambda: kept.enter_context(locked(folder)))
        with contextlib.ExitStack() as writing:
            by_main(lambda: writing.enter_context(locked(cache)))
            held = _reference(base, plan, cache, has_text, options, tokenizer, limit)
        extra = _floor(base, held, floor)
        rows = [*others, *([] if extra is None else [extra])]
        found = [
            _compared(held, side, folder, options, f"{number} of {len(rows)}: {side.name}")
            for number, side in enumerate(rows, 1)
        ]
        result = Kld.of(held, found, seed=seed, topk=topk)
        if output is not None:
            by_main(lambda: result.save(folder))
        return result


def tokenizer_of(source: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, for references that have none.

    Raises:
        PrunekitError: The source is nowhere, or has none either.
    """
    path = located(source)
    found = AutoTokenizer.from_pretrained(path) if path.is_dir() else load_any(source).tokenizer
    if found is None:
        raise PrunekitError(f"{source} holds no tokenizer: name another --tokenizer")
    known: PreTrainedTokenizerBase = found
    return known


def _reference(
    side: Side,
    plan: Planner,
    folder: Path,
    has_text: bool,
    options: Options,
    tokenizer: PreTrainedTokenizerBase | None,
    limit: int | None,
) -> Reference:
    if side.kind != "model":
        return recorded(side, plan if has_text else None, tokenizer, limit)
    return cached(
        side,
        plan,
        folder,
        options,
        tokenizer=tokenizer,
    )


def _floor(base: Side, held: Reference, floor: str) -> Side | None:
    if floor == "none":
        return None
    if floor == "auto":
        floor = "float32" if held.facts.get("dtype") == "bfloat16" else "bfloat16"
    return floor_side(base, floor)


def _compared(
    reference: Reference, side: Side, folder: Path, options: Options, label: str
) -> Candidate:
    """A candidate's result, or why there is none."""
    digest = hashlib.sha256(
        f"{side.source if isinstance(side.source, str) else ''}{side.dtype}{side.name}".encode()
    ).hexdigest()[:8]
    slug = re.sub(r"[^\w.-]+", "-", side.name)[:48]
    found: Compared | None = None
    error = ""
    try:
        found = compared(
            reference, side, folder / "candidates" / f"{slug}-{digest}", options, label
        )
    except Exception as failed:  # a model's own code may fail in any way; the others go on
        known = isinstance(failed, PrunekitError)
        error = one_line(failed) if known else f"{type(failed).__name__}: {one_line(failed)}"
    if not side.is_loaded:  # a model that the caller holds stays
        free_memory()
    return Candidate(side.name, found, error)


def _batch_tokens(batch_size: int | None, context: int, device: str | None) -> int:
    if batch_size is not None:
        return batch_size * context
    on_cpu = device is None or device == "cpu"
    return _CPU_TOKENS if on_cpu else 8 * context


def _documents(
    text: str | Path | Sequence[str] | None,
    dataset: str | None,
    text_field: str,
    seed: int,
    tokens: int,
    tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    """The texts that are read; of a dataset as many as fill so many tokens."""
    if dataset is not None:
        found, held = [], 0
        for document in islice(text_files.read(dataset, text_field=text_field, seed=seed), tokens):
            found.append(document)
            held += len(tokenize(tokenizer, document, verbose=False)["input_ids"])
            if held >= tokens:
                break
        return found
    return documents(text, text_field)


def documents(text: str | Path | Sequence[str] | None, text_field: str) -> list[str]:
    """The texts of a file, texts as they are, or the built-in one."""
    if text is None:
        return [load_heldout()]
    if isinstance(text, str | Path):
        return text_files.read_file(text, text_field=text_field)
    return list(text)
