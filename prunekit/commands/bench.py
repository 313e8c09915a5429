"""`prunekit bench`: how fast a model is, dense and pruned in every way there is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from prunekit.commands import options
from prunekit.errors import PrunekitError

if TYPE_CHECKING:
    from prunekit.speed.timing import Times
    from prunekit.speed.variants import Variant

SUMMARY = "measure a model's speed and size: dense, dropped, 2:4, bitmap, your checkpoints"
DESCRIPTION = """\
Time one model on this machine: reading a prompt and writing tokens with a KV cache, as it is,
with a quarter of its attentions dropped, packed 2:4 and packed as a bitmap. The variants take
turns, so that a change of clocks hits all alike, and each is checked before it is timed.

Which weights go makes no difference to speed, so they are chosen by size alone: prune with
`prunekit prune` or `drop` for a model worth keeping. Such checkpoints are measured as they are
when they follow the model. All variants are in memory at once.

2:4-int8, 2:4-fp8 and 2:4-int4 also round the kept values, to the nearest, so they are measured
only where they are named: --variants 2:4 2:4-int8 2:4-int4. Until their kernels have run on
hardware, such a layer expands its weight for each call on a GPU too; the variant says so.
"""
EXAMPLE = "prunekit bench demo --variants 2:4 2:4-int8 2:4-int4 --new 16 --output out/bench"
FILES = ("bench.json", "speed.png")
_ROLES = {"dense": "dense", "dropped": "h", "2:4": "p", "bitmap": "z", "2:4-int8": "reverse"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="'demo', folder, .gguf, Hub id")
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="pruned, dropped or packed copies, measured as they are",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        metavar="NAME",
        help="dense, dropped, 2:4, bitmap (these four), 2:4-int8, 2:4-fp8, 2:4-int4",
    )
    parser.add_argument(
        "--sparsity",
        type=options.fraction,
        default=0.5,
        help="zeros of the bitmap variant; half as large a share of attentions is dropped (0.5)",
    )
    parser.add_argument(
        "--batch", type=options.positive, nargs="+", default=[1], help="sequences together (1)"
    )
    parser.add_argument("--prompt", type=options.positive, default=128, help="tokens (128)")
    parser.add_argument("--new", type=options.positive, default=32, help="tokens to write (32)")
    parser.add_argument(
        "--cache",
        help="dynamic, static or graph (one CUDA graph per token): graph on a GPU, else dynamic",
    )
    parser.add_argument("--rounds", type=options.positive, default=5, help="samples of each (5)")
    options.add_output(parser, "folder for bench.json and speed.png")
    group = parser.add_argument_group("running the model")
    group.add_argument("--seed", type=options.whole, default=0, help="seed of the prompts (0)")
    options.add_placement(group)
    options.add_common(parser)


def run(args: argparse.Namespace, answer: TextIO) -> None:
    """Carry the command out."""
    source = options.needed(args.model, "model")
    folder = options.output(args, FILES) if args.output else None
    from prunekit.speed import decoding as speed
    from prunekit.speed import variants

    args.variants = args.variants or variants.USUAL
    for name in args.variants:
        if name not in variants.VARIANTS:
            raise PrunekitError(f"variant '{name}' is unknown: use {', '.join(variants.VARIANTS)}")
    if not 0 < args.sparsity < 1:
        raise PrunekitError(f"--sparsity {args.sparsity} is not between 0 and 1: use 0.5")
    options.find([source, *args.checkpoints])
    model, _ = options.load(source, args)
    model.eval()
    given = _given(args)
    cache = args.cache or ("graph" if model.device.type == "cuda" else "dynamic")
    # a bad length or cache is refused before anything takes time
    for asked in (model, *(variant.model for variant in given)):
        longest = speed.random_prompts(asked, 1, args.prompt, args.seed)
        speed.Continuation(asked, longest, args.new, cache)
    built, absent = _build(args, model, given, cache)
    found = {
        "model": source,
        "device": _device_name(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "cache": cache,
        "prompt": args.prompt,
        "new": args.new,
        "rounds": args.rounds,
        "variants": _measured(args, built, cache),
        "absent": absent,
    }
    if folder is not None:
        _write(found, folder, args.overwrite)
    options.emit(args, answer, lambda: found, lambda: _shown(found, folder))


def _given(args: argparse.Namespace) -> list[Variant]:
    """The checkpoints that were given, as they are, under names that tell them apart."""
    from prunekit.speed.variants import VARIANTS, Variant

    sources = list(dict.fromkeys(args.checkpoints))
    short = [Path(source).name or source for source in sources]
    found = []
    for source, name in zip(sources, short, strict=True):
        if name in VARIANTS or short.count(name) > 1:
            name = f"{source} (given)"
        model = options.load_copy(source, args, args.model).model
        found.append(Variant(name, model.eval(), "as given"))
    return found


def _build(
    args: argparse.Namespace, model: Any, given: Sequence[Variant], cache: str
) -> tuple[list[tuple[Variant, float]], dict[str, str]]:
    """The variants that can be had here, how far their logits are off, and why others are not."""
    from prunekit.speed import decoding as speed
    from prunekit.speed import variants

    built, absent = [], {}
    makers: dict[str, Callable[[], Variant]] = {
        name: partial(variants.build, model, name, sparsity=args.sparsity)
        for name in ("dense", *args.variants)
    }
    makers |= {variant.name: partial(_same, variant) for variant in given}
    for name, make in makers.items():
        try:
            variant = make()
        except PrunekitError as error:
            absent[name] = str(error)
            continue
        prompts = speed.random_prompts(variant.model, 1, 32, args.seed)
        off = max(variant.difference, speed.check_cached(variant.model, prompts, cache))
        if off < speed.TOLERANCE:
            built.append((variant, off))
        else:
            absent[name] = f"{name}: wrong logits, off by {off:.2g} standard deviations: not timed"
    if not built or built[0][0].name != "dense":
        raise PrunekitError(f"the model as it is cannot be timed ({absent['dense']})")
    return built, absent


def _same(variant: Variant) -> Variant:
    return variant


def _measured(
    args: argparse.Namespace, built: Sequence[tuple[Variant, float]], cache: str
) -> list[dict[str, Any]]:
    """One record per batch and variant, the variants in turns."""
    from prunekit.packed.sizes import weight_bytes
    from prunekit.packed.warming import warm_up_
    from prunekit.process.progress import track
    from prunekit.speed import decoding as speed
    from prunekit.speed import timing

    rows = []
    work = [(batch, op) for batch in args.batch for op in ("prefill", "decode")]
    times: dict[tuple[int, str], dict[str, Times]] = {}
    for variant, _ in built:
        # all kernels at once, in processes of their own
        calls = [batch * count for batch in args.batch for count in (1, args.prompt)]
        warm_up_(variant.model, calls, progress=not args.quiet)
    for batch, op in track(work, "timing", enabled=not args.quiet):
        samplers = {}
        for variant, _ in built:
            prompts = speed.random_prompts(variant.model, batch, args.prompt, args.seed)
            continuation = speed.Continuation(variant.model, prompts, args.new, cache)
            sampler = getattr(continuation, op)
            sampler()  # warm up
            samplers[variant.name] = sampler
        times[batch, op] = timing.interleaved(samplers, args.rounds)
    dense_bytes = weight_bytes(built[0][0].model)
    for batch in args.batch:
        for variant, off in built:
            reading, writing = (times[batch, op][variant.name] for op in ("prefill", "decode"))
            dense = times[batch, "decode"]["dense"].median
            held = weight_bytes(variant.model)
            rows.append(
                {
                    "variant": variant.name,
                    "what": variant.what,
                    "batch": batch,
                    "weight_bytes": held,
                    "size": held / dense_bytes,
                    "prefill_tokens_per_second": batch * args.prompt / reading.median,
                    "decode_tokens_per_second": batch / writing.median,
                    "decode_low": batch / writing.percentile(80),
                    "decode_high": batch / writing.percentile(20),
                    "decode_speedup": dense / writing.median,
                    "prefill_ms": reading.milliseconds(),
                    "decode_ms": writing.milliseconds(),
                    "logit_difference": off,
                }
            )
    return rows


def _device_name(model: Any) -> str:
    import torch

    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' * (threads > 1)}"


def _write(found: dict[str, Any], folder: str, overwrite: bool) -> None:
    from prunekit.files.atomic import replaced_folder
    from prunekit.report import png

    with replaced_folder(folder, overwrite=overwrite, replaceable=FILES) as part:
        (part / FILES[0]).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        png.draw(_figure(found), part / FILES[1])


def _figure(found: dict[str, Any]) -> Any:
    """Tokens per second and size of every variant."""
    from prunekit.report.charts import DISTINCT, Chart, Figure, Series

    rows = found["variants"]
    names = list(dict.fromkeys(row["variant"] for row in rows))
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    taken = {_ROLES[name] for name in names if name in _ROLES}
    others = cycle([role for role in DISTINCT if role not in taken] or DISTINCT)
    roles = {name: _ROLES.get(name) or next(others) for name in names}

    def series(name: str, *columns: str) -> Series:
        own = [row for row in rows if row["variant"] == name]
        mean, *ends = ([float(row[column]) for row in own] for column in columns)
        low, high = ends or ((), ())
        return Series(name, roles[name], list(range(len(own))), mean, low, high)

    writing = Chart(
        "decode",
        f"Writing, {found['cache']} cache",
        "batch",
        "tokens / s",
        [series(n, "decode_tokens_per_second", "decode_low", "decode_high") for n in names],
        kind="bars",
        categories=[str(batch) for batch in batches],
        note=f"{found['device']}, {found['dtype']}; bars: 20th to 80th percentile",
    )
    reading = Chart(
        "prefill",
        f"Reading {found['prompt']} tokens",
        "batch",
        "tokens / s",
        [series(n, "prefill_tokens_per_second") for n in names],
        kind="bars",
        categories=[str(batch) for batch in batches],
    )
    sizes = {row["variant"]: row["weight_bytes"] / 1e6 for row in rows}
    size = Chart(
        "size",
        "Weights",
        "",
        "MB",
        [Series(name, roles[name], [0], [sizes[name]]) for name in names],
        kind="bars",
        categories=["at any batch"],
    )
    return Figure("speed", f"Speed and size of {found['model']}", "", [writing, reading, size])


def _shown(found: dict[str, Any], folder: str | None) -> Any:
    from rich.console import Group
    from rich.text import Text

    from prunekit.report import terminal

    lines = [
        {
            "Batch": row["batch"],
            "Variant": row["variant"],
            "What": row["what"],
            "Weights": f"{terminal.size(row['weight_bytes'])} ({100 * row['size']:.0f} %)",
            "Reading": f"{row['prefill_tokens_per_second']:.0f} tokens/s",
            "Writing": f"{row['decode_tokens_per_second']:.1f} tokens/s",
            "20–80 %": f"{row['decode_low']:.1f} to {row['decode_high']:.1f}",
            "× dense": f"{row['decode_speedup']:.2f}",
        }
        for row in found["variants"]
    ]
    title = (
        f"{found['model']} on {found['device']}, {found['dtype']}, {found['cache']} cache, "
        f"{found['prompt']} + {found['new']} tokens"
    )
    notes = [f"Not measured: {why}" for why in found["absent"].values()]
    slower = [
        r for r in found["variants"] if r["decode_speedup"] < 0.98 and r["variant"] != "dense"
    ]
    if slower:
        names = ", ".join(dict.fromkeys(row["variant"] for row in slower))
        notes.append(f"Slower than dense here: {names}. Smaller is not always faster.")
    if folder is not None:
        notes.append(f"Written: {folder}/{FILES[0]} and {folder}/{FILES[1]}")
    spare = ["What", "20–80 %", "Reading"]
    return Group(terminal.records(title, lines, spare), *(Text(note) for note in notes))
