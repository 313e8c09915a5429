"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from prunekit.errors import PrunekitError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from prunekit.data.calibration import Calibration
    from prunekit.divergence.loading import LoadedModel

CHECKPOINT = ("config.json", "prunekit.json")  # files by which a saved model is known


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every command."""
    group = parser.add_argument_group("output of the command")
    group.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
    group.add_argument("--quiet", action="store_true", help="no progress bars and no tables")
    group.add_argument("--config", metavar="FILE.yaml", help="read options from a file; flags win")


def add_running(parser: argparse.ArgumentParser, *, batch_size: int | None = 8) -> None:
    """Options of commands that run a model; a `batch_size` of None suits the device."""
    group = parser.add_argument_group("running the model")
    group.add_argument("--seed", type=whole, default=0, help="seed of everything random (0)")
    add_placement(group)
    usual = "8; on a CPU 1024 tokens" if batch_size is None else batch_size
    group.add_argument(
        "--batch-size", type=positive, default=batch_size, help=f"run together ({usual})"
    )


def add_placement(group: Any) -> None:
    """Add the options that place a model: device and type."""
    group.add_argument("--device", help="cpu, cuda, cuda:1, … (a GPU if there is one)")
    group.add_argument("--dtype", help="float32, bfloat16 or float16 (the checkpoint's)")


def add_output(parser: argparse.ArgumentParser, what: str, default: str | None = None) -> None:
    """Add the options of the output folder."""
    shown = f" ({default})" if default else ""
    parser.add_argument("-o", "--output", metavar="DIR", default=default, help=f"{what}{shown}")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier result there")


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """Add the options of the calibration data."""
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration",
        default="self",
        metavar="SOURCE",
        help="'self': text the model writes itself (default); a .txt, .jsonl, .json or .parquet "
        "file; or a Hub dataset id",
    )
    group.add_argument("--samples", type=positive, default=16, help="sequences (16)")
    group.add_argument("--length", type=positive, default=256, help="tokens per sequence (256)")
    group.add_argument("--text-field", default="text", help="field of the text in rows (text)")
    group.add_argument(
        "--calibration-dtype",
        choices=("bfloat16", "float32"),
        help="run the calibration passes in this type (the model's own)",
    )


def calibration_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """The type that `--calibration-dtype` names."""
    import torch

    name = args.calibration_dtype
    return None if name is None else getattr(torch, name)


def calibration(args: argparse.Namespace) -> Calibration:
    """The calibration that the options describe, its file checked to exist.

    Raises:
        PrunekitError: No such file, or an option is out of range.
    """
    from prunekit.data import text_files
    from prunekit.data.calibration import SELF, Calibration

    source = args.calibration
    if source != SELF and not text_files.is_hub_id(source) and not Path(source).is_file():
        raise PrunekitError(
            f"calibration file {source} does not exist: give a file, 'self' or a Hub dataset id"
        )
    return Calibration(source, args.samples, args.length, args.seed, args.text_field)


def output(args: argparse.Namespace, replaceable: Sequence[str]) -> str:
    """The output folder, checked to be writable, and empty or allowed to be replaced.

    From here to the command's end no other run may write it.

    Raises:
        PrunekitError: It is missing or can't be used, or another run is writing it.
    """
    from prunekit.files.locks import locked

    folder = needed_output(args)
    check_output(folder, args, replaceable)
    if os.environ.get("RANK", "0") == "0":  # of a launch's processes one writes
        args.until_end.enter_context(locked(folder))
    return folder


def needed_output(args: argparse.Namespace) -> str:
    """The output folder.

    Raises:
        PrunekitError: It is missing.
    """
    if not args.output:
        raise PrunekitError("where to? give --output DIR")
    return str(args.output)


def check_output(folder: str, args: argparse.Namespace, replaceable: Sequence[str]) -> None:
    """See that a folder can be written, and is empty or allowed to be replaced.

    Raises:
        PrunekitError: It can't be used.
    """
    from prunekit.files.atomic import check_target

    try:
        check_target(folder, overwrite=args.overwrite, replaceable=replaceable)
    except PrunekitError as error:
        raise PrunekitError(str(error).replace("allow overwriting", "add --overwrite")) from error


def check_file(path: str | None) -> None:
    """See that a file could be written at `path`, if one is asked for.

    Raises:
        PrunekitError: Its folder does not exist, or it is a folder.
    """
    if path and Path(path).is_dir():
        raise PrunekitError(f"--output {path} is a folder: name a file in it")
    if path and not Path(path).absolute().parent.is_dir():
        raise PrunekitError(f"--output {path}: its folder does not exist; create it first")


def resumable(args: argparse.Namespace, ours: Sequence[str]) -> Path:
    """The output folder: new, or one of an earlier run, which goes on.

    Args:
        args: With `output`.
        ours: Names of which an earlier run left one.

    Raises:
        PrunekitError: It holds something else, or can't be used.
    """
    folder = Path(args.output).expanduser()
    held = folder.is_dir() and any(folder.iterdir())
    if held and not any((folder / name).exists() for name in ours):
        raise PrunekitError(f"{folder} holds something else: choose another --output")
    if not held:
        output(args, ours)
    return folder


def needed(value: str | None, what: str) -> str:
    """`value` of a positional argument, which a configuration file may give as well.

    Raises:
        PrunekitError: It is missing.
    """
    if value is None:
        raise PrunekitError(f"which {what}? give 'demo', a folder, a .gguf file or a Hub id")
    return value


def find(sources: Iterable[str]) -> None:
    """Find all models before one is loaded: a wrong second name must not show after hours.

    Raises:
        PrunekitError: One is nowhere.
    """
    from prunekit.checkpoint.sources import located

    for source in sources:
        located(source)


def told_apart(dense: str, pruned: str) -> tuple[str, str]:
    """Two names as they are, or with the role of each behind it where they are the same."""
    return (dense, pruned) if dense != pruned else (f"{dense} (dense)", f"{pruned} (pruned)")


def load(source: str, args: argparse.Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model where --device and --dtype say.

    Raises:
        PrunekitError: The device or dtype can't be used, or the model can't be loaded.
    """
    place = device(args.device)  # before anything is read
    from prunekit import checkpoint

    return checkpoint.load(source, dtype=args.dtype, device=place)


def load_copy(source: str, args: argparse.Namespace, base: str) -> LoadedModel:
    """Load a copy of a model that only has to run: quantised ones and adapters too.

    Args:
        source: The copy.
        args: Of a command with --device and --dtype.
        base: The model that an adapter goes on.

    Raises:
        PrunekitError: The device or dtype can't be used, or the copy can't be loaded.
    """
    place = device(args.device)
    from prunekit.divergence.loading import load_any

    return load_any(source, dtype=args.dtype, device=place, base=base)


def device(name: str | None) -> str:
    """A device that exists: `name`, or by default this process's GPU if there is one.

    Raises:
        PrunekitError: There is no such device.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % gpus}" if gpus else "cpu"
    try:
        wanted = torch.device(name)
    except RuntimeError:
        raise PrunekitError(f"--device {name} is unknown: use cpu, cuda or cuda:0") from None
    if wanted.type == "cuda" and (wanted.index or 0) >= gpus:
        raise PrunekitError(f"--device {name}: this machine has {gpus} usable GPUs: use cpu")
    return name


def emit(
    args: argparse.Namespace, answer: TextIO, data: Callable[[], Any], shown: Callable[[], Any]
) -> None:
    """Print a command's result: as JSON, as a rich renderable, or (--quiet) not at all.

    Under several processes only the main one prints.
    """
    from prunekit.process import distributed

    if not distributed.is_main():
        return
    if args.json:
        answer.write(_json(data(), answer.encoding or "utf-8") + "\n")
    elif not args.quiet:
        from prunekit.report import terminal

        terminal.show(shown(), answer)


def _json(data: Any, encoding: str) -> str:
    """`data` as JSON that `encoding` can hold: characters that it lacks become escapes."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, indent=2)
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return json.dumps(data, allow_nan=False, indent=2)
    return text


def given(args: argparse.Namespace, names: Iterable[str], prefix: str = "") -> dict[str, Any]:
    """The values by name of the options, each called by prefix and name, that were given."""
    found = {name: getattr(args, prefix + name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def whole(text: str) -> int:
    """A whole number from 0."""
    return _at_least(text, 0)


def positive(text: str) -> int:
    """A whole number from 1."""
    return _at_least(text, 1)


def _at_least(text: str, low: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number from {low}")
    return value


def fraction(text: str) -> float:
    """A number; its range is checked where it is used."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None


def above_zero(text: str) -> float:
    """A finite number above 0."""
    value = fraction(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number above 0")
    return value
