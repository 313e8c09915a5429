"""The commands of the command line, one module each; importing them imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from prunekit.commands import (
    bench,
    compare,
    demo,
    doctor,
    drop,
    inspect,
    kld,
    prune,
    recover,
    retrieval,
    search,
    swap,
    sweep,
)
from prunekit.commands import eval as evaluate


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        summary: One line for the list of commands.
        description: What it does, for its own `--help`.
        example: A command line that runs.
        add_arguments: Adds its arguments to a parser.
        run: Carries it out; its answer goes to the given stream, everything else to stderr.
    """

    summary: str
    description: str
    example: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, TextIO], None]


COMMANDS = {
    module.__name__.rpartition(".")[2]: Command(
        module.SUMMARY, module.DESCRIPTION, module.EXAMPLE, module.add_arguments, module.run
    )
    for module in (
        demo,
        prune,
        drop,
        recover,
        search,
        swap,
        compare,
        sweep,
        kld,
        evaluate,
        retrieval,
        bench,
        inspect,
        doctor,
    )
}
