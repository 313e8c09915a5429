"""`prunekit demo`: prune a real model two ways, and show what that did."""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from prunekit.commands import options

if TYPE_CHECKING:
    from prunekit.study.study import Study

Item = TypeVar("Item")

SUMMARY = "prune a small real model two ways and show what that did"
DESCRIPTION = """\
On SmolLM2-135M-Instruct, which comes with prunekit: drop attentions, and prune to 2:4 with Wanda;
compare each with the dense model from hidden state to logit to probability; and drop more and
more attentions to see which score notices first. Prints one table and writes an HTML page for
each. Minutes on two CPU cores; nothing is downloaded.
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
    sweep_prompts: int = 0


FULL = Plan(
    prompts=14,
    choices=54,
    tokens=32,
    samples=16,
    length=128,
    layerwise_prompts=6,
    layerwise_steps=8,
    dropped=4,
    sweep=(0, 2, 4, 8),
    sweep_prompts=8,
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
    studies = _studies(args, QUICK if args.quick else FULL)

    from prunekit.commands.compare import summary_data
    from prunekit.files.atomic import replaced_folder
    from prunekit.process import distributed

    pages = {name: str(Path(folder) / name / "index.html") for name in studies}
    if distributed.is_main():
        _say(args, "writing the pages")
        with replaced_folder(folder, overwrite=args.overwrite, replaceable=DEMO) as new:
            for name, study in studies.items():
                study.save(new / name)
            (new / DEMO[0]).write_text(json.dumps({"studies": list(studies)}) + "\n")
    seconds = time.perf_counter() - start
    options.emit(
        args,
        answer,
        lambda: {
            "output": folder,
            "html": pages,
            "summary": {name: summary_data(study) for name, study in studies.items()},
            "sweep": next(iter(studies.values())).meta.get("sweep"),
            "seconds": round(seconds, 1),
        },
        lambda: _shown(studies, pages, seconds),
    )


def _studies(args: argparse.Namespace, plan: Plan) -> dict[str, Study]:
    from prunekit.data import calibration
    from prunekit.evaluation.items import load_choices, load_prompts
    from prunekit.pruning import Drop, Wanda, drop_, prune_
    from prunekit.study.baseline import Baseline
    from prunekit.study.comparison import compare
    from prunekit.study.drop_sweep import sweep

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
    if plan.sweep:
        _say(args, "dropping more and more attentions")
        scores = {layer: s for layer, s in enumerate(dropped.scores["attn"]) if s is not None}
        ranking = [("attn", layer) for layer in sorted(scores, key=lambda layer: -scores[layer])]
        rows = sweep(
            dense,
            tokenizer,
            ranking,
            plan.sweep,
            prompts=prompts[: plan.sweep_prompts],
            choices=choices,
            seed=args.seed,
            progress=progress,
            **asked,
        )
        attention = replace(attention, meta={**attention.meta, "sweep": rows})
    return {"attention-drop": attention, "wanda-2-4": wanda}


def _spread(items: Sequence[Item], count: int) -> list[Item]:
    """`count` of the items, evenly spread: the built-in set is ordered by topic."""
    return [items[index * len(items) // count] for index in range(min(count, len(items)))]


def _say(args: argparse.Namespace, what: str) -> None:
    from prunekit.process import distributed

    if not args.quiet and distributed.is_main():
        print(f"prunekit: {what} …", file=sys.stderr)


def _whose(counts: Mapping[str, int], swept: int) -> str:
    """What the demo's numbers are numbers of."""
    part = f" ({swept} of them in the sweep)" if swept else ""
    return (
        f"The {counts['choices']} questions and {counts['prompts']} prompts{part} are prunekit's "
        "own: the numbers compare these models on them and stand for no public benchmark. Another "
        "CPU may give other texts with the same seed.\n"
    )


def _shown(studies: Mapping[str, Study], pages: Mapping[str, str], seconds: float) -> Any:
    from rich.console import Group
    from rich.text import Text

    from prunekit.report import sentences, terminal

    named = {study.meta["names"]["pruned"]: study for study in studies.values()}
    parts: list[Any] = [terminal.studies_side_by_side(named)]
    rows = next(iter(studies.values())).meta.get("sweep")
    if rows:
        parts += [terminal.sweep_table(rows), Text()]
    for name, study in named.items():
        parts.append(Text(name, style="bold"))
        parts += [terminal.sentence(said) for said in sentences.describe(study)]
        parts.append(Text())
    counts = next(iter(studies.values())).meta["counts"]
    parts.append(Text(_whose(counts, rows[0]["scores"]["chrf"]["n"] if rows else 0)))
    parts.append(Text(f"Done in {seconds:.0f} s. Open the pages:"))
    parts += [Text(f"  {page}") for page in pages.values()]
    return Group(*parts)
