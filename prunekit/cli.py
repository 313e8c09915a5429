"""The command line: parse, run one command, and turn every failure into one line that helps.

Exit status 0: done. 2: bad input, one line that names the fix. 130: interrupted. 1: a bug of
prunekit's, one line that says how to see the traceback. Commands live in `prunekit.commands`;
nothing here or there imports torch before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import errno
import io
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from prunekit.commands import COMMANDS, Command
from prunekit.commands.configuration import apply_config
from prunekit.errors import PrunekitError, one_line

_EPILOG = """\
examples:
  prunekit demo                                              see what pruning does, in minutes
  prunekit prune demo --method wanda --pattern 2:4 --output out/wanda24
  prunekit compare demo out/wanda24 --output out/study       h → z → p, with an HTML page
  prunekit bench demo --new 16                               how fast, dense and pruned
  prunekit COMMAND --help                                    every option of a command

MODEL is 'demo' (the small model that comes with prunekit), a local folder, a .gguf file or a
Hugging Face Hub id. Nothing is downloaded unless you name a Hub id.
"""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises a one-line PrunekitError instead of printing its usage."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting; `message` is argparse's."""
        raise PrunekitError(f"{message} (see: {self.prog} --help)")


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of `prunekit`, and that of each command."""
    parser = Parser(
        prog="prunekit",
        description="Prune Hugging Face language models and see what that did, from hidden state "
        "to logit to probability.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    parsers = {}
    for name, command in COMMANDS.items():
        example = f"example:\n  {command.example}\n"
        made = commands.add_parser(
            name, help=command.summary, description=command.description, epilog=example
        )
        command.add_arguments(made)
        parsers[name] = made
    return parser, parsers


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of one call, with the YAML file of `--config` behind the flags.

    Raises:
        PrunekitError: An unknown command, flag or key (the message names the nearest), or a value
            that does not fit.
        SystemExit: After printing `--help`.
    """
    parser, parsers = build_parser()
    words = [word for word in argv[:1] if not word.startswith("-")]
    if words and words[0] not in parsers:
        raise PrunekitError(
            f"unknown command '{words[0]}'{did_you_mean(words[0], parsers)} "
            f"(commands: {', '.join(parsers)})"
        )
    if words:
        command = parsers[words[0]]
        argv = [words[0], *apply_config(command, argv[1:])]
        # argparse may call a stray word an argument of the wrong parser: look at flags first
        known = {text for action in command._actions for text in action.option_strings}
        for word in argv[1:]:
            flag = word.partition("=")[0]
            if flag.startswith("--") and len(flag) > 2 and flag not in known:
                raise PrunekitError(
                    f"unknown option {flag}{did_you_mean(flag, known)} (see: {command.prog} --help)"
                )
    args, extra = parser.parse_known_args(argv)
    if extra:
        prog = parsers[args.command].prog if args.command else parser.prog
        raise PrunekitError(f"unexpected argument {extra[0]} (see: {prog} --help)")
    return args


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """', did you mean X?' for the nearest of `known`, or nothing."""
    bare = {text.lstrip("-"): text for text in known}  # two dashes alone are no likeness
    near = difflib.get_close_matches(word.lstrip("-"), list(bare), n=1, cutoff=0.6)
    return f", did you mean {bare[near[0]]}?" if near else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `prunekit`; returns the exit status.

    Args:
        argv: Arguments without the program's name; the process's own by default.
    """
    _show_what_can_be_shown()
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except BaseException as error:
        if os.environ.get("PRUNEKIT_TRACEBACK") == "1" and not isinstance(error, SystemExit):
            raise
        status, line = explain(error)
        if line and (status != 2 or _speaks()):
            print(f"prunekit: {line}", file=sys.stderr)
        return status


def _run(argv: list[str]) -> int:
    args = parse(argv)
    if args.version:
        from prunekit.commands.doctor import own_version

        print(f"prunekit {own_version()}")
        return 0
    if args.command is None:
        build_parser()[0].print_help()
        return 0
    command: Command = COMMANDS[args.command]
    _quiet_libraries()
    answer = sys.stdout
    # Only the command's answer goes to stdout: what libraries print must not break --json.
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as args.until_end:
        command.run(args, answer)
    answer.flush()
    return 0


def explain(error: BaseException) -> tuple[int, str]:
    """Exit status and message (without 'prunekit: ') for whatever ended a command."""
    if isinstance(error, SystemExit):  # argparse, after --help
        return (error.code if isinstance(error.code, int) else 0), ""
    if isinstance(error, KeyboardInterrupt):
        return 130, (
            "interrupted (nothing half-written was left behind; run it again: prune, recover, kld "
            "and sweep go on where they stopped)"
        )
    if isinstance(error, BrokenPipeError):  # `prunekit inspect … | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (the interpreter flushes it at exit)
        return 141, ""
    if isinstance(error, PrunekitError):
        return 2, f"error: {one_line(error)}"
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return 2, "error: out of memory (lower --batch-size, use a smaller model or --device cpu)"
    if isinstance(error, RuntimeError) and "not implemented for '" in str(error):
        return 2, f"error: {one_line(error)}: this device lacks it in this type (--dtype float32)"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return 2, f"error: {one_line(error)} (free some space or use another --output)"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return 2, f"error: {one_line(error)} (check its permissions or use another path)"
    return 1, (
        f"internal error: {type(error).__name__}: {one_line(error)} "
        "(this is a bug in prunekit: set PRUNEKIT_TRACEBACK=1 to see the traceback, and report it)"
    )


def _show_what_can_be_shown() -> None:
    """Replace characters that the terminal's or file's encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _speaks() -> bool:
    """Whether this process reports errors that all processes of a launch see alike."""
    return os.environ.get("RANK", "0") == "0"


def _quiet_libraries() -> None:
    """Keep warnings and progress bars of the libraries off the user's terminal."""
    import logging
    import warnings

    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    for name in ("torchao", "torch.utils._pytree"):  # speak when transformers imports torchao
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


if __name__ == "__main__":
    sys.exit(main())
