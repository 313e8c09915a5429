"""`prunekit demo`: prune a real model two ways, and show what that did."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from prunekit.commands import options

if TYPE_CHECKING:
    from prunekit.pruning import DropReport
    from prunekit.study.study import Study
    from prunekit.sweeping.result import Sweep

Item = TypeVar("Item")

SUMMARY = "prune a small real model two ways and show what that did"
DESCRIPTION = """\
On SmolLM2-135M-Instruct, which comes with prunekit: drop attentions, and prune to 2:4 with Wanda;
compare each with the dense model from hidden state to logit to probability; and drop more and
more attentions to see what breaks first, choosing an answer or writing one. Prints one table and
writes an HTML page for each. Minutes on two CPU cores; nothing is downloaded.
"""
EXAMPLE = "prunekit demo --output out/demo --quick"
DEMO = ("demo.json",)  # by which a saved demo is known


@dataclass(frozen=True)
class Plan:
    """The size of the demo."""

    prompts: int
    choices: int
    tokens: int
    samples: int
    length: int
    layerwise_prompts: int
    layerwise_steps: int
    dropped: int
    sweep: tuple[int, ...] = ()
    questions: int = 0
    examples: int = 8
    answer_tokens: int = 8


FULL = Plan(
    prompts=14,
    choices=54,
    tokens=32,
    samples=16,
    length=128,
    layerwise_prompts=6,
    layerwise_steps=8,
    dropped=4,
    sweep=(2, 4, 8),
    questions=64,
)
QUICK = Plan(
    prompts=6,
    choices=24,
    tokens=16,
    samples=8,
    length=64,
    layerwise_prompts=2,
    layerwise_steps=4,
    dropped=4,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", nargs="?", metavar="MODEL", default="demo", help="another model")
    parser.add_argument("--quick", action="store_true", help="fewer prompts, no sweep: a glance")
    options.add_output(parser, "folder for the studies", "out/demo")
    options.add_running(parser, batch_size=12)
    options.add_common(parser)


def run(args: argparse.Namespace, answer: TextIO) -> None:
    """Carry the command out."""
    folder = options.output(args, DEMO)
    start = time.perf_counter()
    studies, found = _studies(args, QUICK if args.quick else FULL)

    from prunekit.commands.compare import summary_data
    from prunekit.files.atomic import replaced_folder
    from prunekit.process import distributed

    names = [*studies, *([] if found is None else ["sweep"])]
    pages = {name: str(Path(folder) / name / "index.html") for name in names}
    if distributed.is_main():
        _say(args, "writing the pages")
        with replaced_folder(folder, overwrite=args.overwrite, replaceable=DEMO) as new:
            for name, study in studies.items():
                study.save(new / name)
            if found is not None:
                found.save(new / "sweep")
            (new / DEMO[0]).write_text(json.dumps({"studies": names}) + "\n")
    seconds = time.perf_counter() - start
    options.emit(
        args,
        answer,
        lambda: {
            "output": folder,
            "html": pages,
            "summary": {name: summary_data(study) for name, study in studies.items()},
            "sweep": None if found is None else found.to_dict(),
            "seconds": round(seconds, 1),
        },
        lambda: _shown(studies, found, pages, seconds),
    )


def _studies(args: argparse.Namespace, plan: Plan) -> tuple[dict[str, Study], Sweep | None]:
    from prunekit.data import calibration
    from prunekit.evaluation.items import load_choices, load_prompts
    from prunekit.pruning import Drop, Wanda, drop_, prune_
    from prunekit.study.baseline import Baseline
    from prunekit.study.comparison import compare

    prompts = [item.prompt for item in _spread(load_prompts(), plan.prompts)]
    choices = _spread(load_choices(), plan.choices)
    progress = not args.quiet
    _say(args, "loading the dense model")
    dense, tokenizer = options.load(args.model, args)
    _say(args, "calibrating on text that it writes itself")
    wanted = calibration.Calibration(samples=plan.samples, length=plan.length, seed=args.seed)
    tokens = calibration.tokens(wanted, dense, progress=progress)
    name = "SmolLM2-135M-Instruct" if args.model == "demo" else Path(args.model).name

    asked: dict[str, Any] = {"max_new_tokens": plan.tokens, "batch_size": args.batch_size}
    asked["baseline"] = Baseline(dense, tokenizer, progress=progress, **asked)

    def study(pruned: Any, what: str) -> Study:
        return compare(
            dense,
            pruned,
            prompts,
            tokenizer=tokenizer,
            choices=choices,
            layerwise_prompts=plan.layerwise_prompts,
            layerwise_steps=plan.layerwise_steps,
            seed=args.seed,
            progress=progress,
            names=(name, what),
            **asked,
        )

    _say(args, f"dropping {plan.dropped} attentions, and comparing")
    pruned = copy.deepcopy(dense)
    dropped = drop_(
        pruned, Drop("attn", plan.dropped), tokens, batch_size=args.batch_size, progress=progress
    )
    attention = study(pruned, f"{plan.dropped} attentions dropped")
    _say(args, "pruning to 2:4 with Wanda, and comparing")
    pruned = copy.deepcopy(dense)
    prune_(pruned, Wanda(pattern="2:4"), tokens, batch_size=args.batch_size, progress=progress)
    wanda = study(pruned, "Wanda 2:4")
    found = None
    if plan.sweep:
        _say(args, "dropping more and more attentions")
        found = swept(dense, tokenizer, dropped, plan, name, args.seed, progress)
    return {"attention-drop": attention, "wanda-2-4": wanda}, found


def swept(
    dense: Any,
    tokenizer: Any,
    dropped: DropReport,
    plan: Plan,
    name: str,
    seed: int,
    progress: bool,
) -> Sweep:
    """The demo's sweep: the built-in questions of both kinds, at the plan's counts."""
    from prunekit.evaluation.answering import Asking
    from prunekit.evaluation.items import load_choices
    from prunekit.evaluation.questions import load_questions, split_examples
    from prunekit.process import distributed
    from prunekit.sweeping.run import sweep

    examples, questions = split_examples(load_questions(), plan.examples)
    with contextlib.ExitStack() as kept:
        shared = None  # several processes share a record on disk
        if distributed.world_size() > 1:
            given = [kept.enter_context(tempfile.TemporaryDirectory())] * distributed.is_main()
            (shared,) = distributed.gather(given)
        return sweep(
            dense,
            tokenizer,
            [dropped],
            counts=plan.sweep,
            choices=_spread(load_choices(), plan.choices),
            questions=_spread(questions, plan.questions),
            asking=Asking(tuple(examples), plan.answer_tokens),
            kl=False,
            speed=False,
            output=shared,
            seed=seed,
            progress=progress,
            name=name,
        )


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items, evenly spread: the built-in set is ordered by topic."""
    return [items[index * len(items) // count] for index in range(min(count, len(items)))]


def _say(args: argparse.Namespace, what: str) -> None:
    from prunekit.process import distributed

    if not args.quiet and distributed.is_main():
        print(f"prunekit: {what} …", file=sys.stderr)


def _whose(counts: Mapping[str, int], found: Sweep | None) -> str:
    """What the demo's numbers are numbers of."""
    part = "" if found is None else f", and the sweep's {found.meta['questions']} open questions,"
    return (
        f"The {counts['choices']} questions and {counts['prompts']} prompts{part} are prunekit's "
        "own: the numbers compare these models on them and stand for no public benchmark. Another "
        "CPU may give other texts with the same seed.\n"
    )


def _shown(
    studies: Mapping[str, Study], found: Sweep | None, pages: Mapping[str, str], seconds: float
) -> Any:
    from rich.console import Group
    from rich.text import Text

    from prunekit.report import sentences, terminal

    named = {study.meta["names"]["pruned"]: study for study in studies.values()}
    parts: list[Any] = [terminal.studies_side_by_side(named)]
    if found is not None:
        parts += [found.table(), Text()]
    for name, study in named.items():
        parts.append(Text(name, style="bold"))
        parts += [terminal.sentence(said) for said in sentences.describe(study)]
        parts.append(Text())
    counts = next(iter(studies.values())).meta["counts"]
    parts.append(Text(_whose(counts, found)))
    parts.append(Text(f"Done in {seconds:.0f} s. Open the pages:"))
    parts += [Text(f"  {page}") for page in pages.values()]
    return Group(*parts)
