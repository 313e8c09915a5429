"""`prunekit drop`: take sublayers or blocks out of a model and save the checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from prunekit.commands import options
from prunekit.errors import PrunekitError

if TYPE_CHECKING:
    from prunekit.commands.measures import CacheSize
    from prunekit.pruning import DropReport

SUMMARY = "take attentions, MLPs or whole blocks out of a model"
DESCRIPTION = """\
Drop the sublayers or blocks that change the hidden state least, and save the smaller model.

What is dropped is really gone: no parameters, no compute, and no cache entry for a dropped
attention. Dropped blocks leave a stock model; dropped sublayers make a prunekit_<architecture>
that transformers loads after `import prunekit`, or with --format zeroed a stock model of the
old size that computes the same.

--preset paper writes the six models of arXiv 2603.24652 into folders of the output: 4 and 8
attentions, MLPs and blocks dropped, all by the same calibration text.
"""
#: Units and counts by the name of a preset.
PRESETS = {"paper": tuple((unit, count) for unit in ("attn", "mlp", "block") for count in (4, 8))}
EXAMPLE = "prunekit drop demo --unit attn --count 8 --strategy discrete --output out/attn8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="'demo', folder, .gguf, Hub id")
    parser.add_argument("--unit", default="attn", help="attn (default), mlp, all or block")
    parser.add_argument("--count", type=options.whole, help="how many to drop")
    parser.add_argument(
        "--preset", metavar="NAME", help="paper: several models, instead of a count"
    )
    parser.add_argument(
        "--strategy", default="discrete", help="discrete (default), consecutive or iterative"
    )
    parser.add_argument("--format", default="auto", help="auto (default) or zeroed")
    options.add_output(parser, "folder for the checkpoint")
    options.add_calibration(parser)
    options.add_running(parser, batch_size=None)
    options.add_common(parser)


def run(args: argparse.Namespace, answer: TextIO) -> None:
    """Carry the command out."""
    source = options.needed(args.model, "model")
    if args.preset is not None:
        _preset(source, args, answer)
        return
    folder = options.output(args, options.CHECKPOINT)
    if args.count is None:
        raise PrunekitError("how many? give --count, for example --count 8")

    from prunekit import checkpoint
    from prunekit.commands import measures
    from prunekit.process import distributed
    from prunekit.pruning import Drop, drop_

    drop = Drop(args.unit, args.count, args.strategy)
    if args.format not in checkpoint.SAVE_FORMATS:
        raise PrunekitError(
            f"format '{args.format}' is unknown: use {' or '.join(checkpoint.SAVE_FORMATS)}"
        )
    calibration = options.calibration(args)
    model, tokenizer = options.load(source, args)
    before = measures.cache_size(model)
    report = drop_(
        model,
        drop,
        calibration,
        tokenizer=tokenizer,
        batch_size=args.batch_size,
        calibration_dtype=options.calibration_dtype(args),
        progress=not args.quiet,
    )
    after = measures.cache_size(model)
    if not distributed.is_main():
        return
    checkpoint.save(
        model,
        tokenizer,
        folder,
        format=args.format,
        overwrite=args.overwrite,
        report={"drop": report.to_dict()},
    )
    size = measures.folder_bytes(folder)
    options.emit(
        args,
        answer,
        lambda: {
            "model": source,
            "output": folder,
            "folder_bytes": size,
            "cache_before": vars(before),
            "cache_after": vars(after),
            "report": report.to_dict(),
        },
        lambda: _shown(report, before, after, folder, size, args.format),
    )


def _preset(source: str, args: argparse.Namespace, answer: TextIO) -> None:
    """Write every model of a preset into a folder of its own."""
    if args.preset not in PRESETS:
        raise PrunekitError(f"preset '{args.preset}' is unknown: use {', '.join(PRESETS)}")
    if args.count is not None:
        raise PrunekitError("--preset and --count exclude one another: give one of them")
    wanted = PRESETS[args.preset]
    folders = {f"{unit}-{count}": (unit, count) for unit, count in wanted}
    folder = Path(options.needed_output(args))
    for name in folders:
        options.check_output(str(folder / name), args, options.CHECKPOINT)

    import copy

    from prunekit import checkpoint
    from prunekit.commands import measures
    from prunekit.data import calibration
    from prunekit.models.architectures import Architecture
    from prunekit.process import distributed
    from prunekit.pruning import Drop, drop_

    asked = options.calibration(args)
    model, tokenizer = options.load(source, args)
    layers, most = len(Architecture(model).layers), max(count for _, count in wanted)
    if layers <= most:
        raise PrunekitError(
            f"preset '{args.preset}' drops up to {most} of a kind, and the model has {layers} "
            "layers: use --unit and --count"
        )
    tokens = calibration.tokens(asked, model, tokenizer, progress=not args.quiet)
    written: list[dict[str, Any]] = []
    for name, (unit, count) in folders.items():
        place = folder / name
        dropped = copy.deepcopy(model)
        report = drop_(
            dropped,
            Drop(unit, count, args.strategy),
            tokens,
            batch_size=args.batch_size,
            calibration_dtype=options.calibration_dtype(args),
            progress=not args.quiet,
        )
        if distributed.is_main():
            checkpoint.save(
                dropped,
                tokenizer,
                place,
                format=args.format,
                overwrite=args.overwrite,
                report={"drop": report.to_dict()},
            )
            size = measures.folder_bytes(place)
            facts = {"folder_bytes": size, "report": report.to_dict()}
            written.append({"name": name, "output": str(place), **facts})
    options.emit(
        args,
        answer,
        lambda: {"model": source, "output": str(folder), "models": written},
        lambda: _listed(written, str(folder)),
    )


def _listed(written: list[dict[str, Any]], folder: str) -> Any:
    from prunekit.report import terminal

    rows = [
        {
            "Model": row["name"],
            "On disk": terminal.size(row["folder_bytes"]),
            "Parameters": f"{row['report']['parameters_after']:,}",
        }
        for row in written
    ]
    return terminal.records(f"Written to {folder}", rows)


def _shown(
    report: DropReport, before: CacheSize, after: CacheSize, folder: str, size: int, form: str
) -> Any:
    from rich.console import Group
    from rich.text import Text

    from prunekit.report import terminal

    gone = [
        f"{name} of layers {', '.join(map(str, layers))}"
        for name, layers in (
            ("attn", report.dropped_attn),
            ("mlp", report.dropped_mlp),
            ("blocks", report.dropped_blocks),
        )
        if layers
    ]
    kept = report.parameters_after / report.parameters_before
    lines = [
        "Mean cosine of a layer part's input and output (the highest go):",
        report.table(),
        "",
        f"Dropped: {'; '.join(gone)}.",
        f"Parameters: {report.parameters_before:,} → {report.parameters_after:,} "
        f"({100 * kept:.1f} %).",
        f"KV cache: {before.entries} → {after.entries} entries, "
        f"{before.bytes_per_token:,} → {after.bytes_per_token:,} bytes per token.",
        f"Saved to {folder} ({terminal.size(size)}).",
    ]
    if form == "zeroed":
        lines.append(
            "Not smaller and not faster in this format: the dropped sublayers are there as zeros, "
            "so that every program can load the model."
        )
    return Group(*(Text(line) for line in lines))
