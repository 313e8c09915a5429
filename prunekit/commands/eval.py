"""`prunekit eval`: tasks of the lm-evaluation-harness, dense beside pruned."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from prunekit.commands import options
from prunekit.errors import PrunekitError

if TYPE_CHECKING:
    from prunekit.evaluation.tasks import TaskRun

SUMMARY = "score models on tasks of the lm-evaluation-harness"
DESCRIPTION = """\
Run tasks of EleutherAI's lm-evaluation-harness on one model, or on a dense model and its pruned
copies side by side. Take one task that is answered in a single step and one that is generated to
see what pruning keeps and what it loses: changes are paired, document by document. Where the
harness is not installed, the command says how.

--preset paper: the nine tasks of arXiv 2603.24652 with their numbers of examples (boolq, rte,
openbookqa, piqa 0; mmlu, winogrande, gsm8k 5; hellaswag 10; arc_challenge 25).

A task may download its data set: naming it asks for that.
"""
EXAMPLE = "prunekit eval demo out/drop4 --tasks arc_easy,gsm8k --limit 100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="'demo', folder, .gguf, Hub id")
    parser.add_argument(
        "pruned", nargs="*", metavar="PRUNED", help="its pruned or quantised copies"
    )
    parser.add_argument("--tasks", metavar="LIST", help="names, separated by commas")
    parser.add_argument("--preset", metavar="NAME", help="paper: its tasks and numbers of examples")
    parser.add_argument("--limit", type=options.positive, help="documents of each task (all)")
    parser.add_argument("--few-shot", type=options.whole, help="examples (the task's own number)")
    parser.add_argument("--task-folder", metavar="DIR", help="task definitions of your own (.yaml)")
    parser.add_argument("--chat", action="store_true", help="ask through the chat template")
    parser.add_argument(
        "-o", "--output", metavar="FILE.json", help="write scores and every item there too"
    )
    options.add_running(parser)
    options.add_common(parser)


def run(args: argparse.Namespace, answer: TextIO) -> None:
    """Carry the command out."""
    source = options.needed(args.model, "model")
    tasks, few_shot = _asked(args)
    options.check_file(args.output)

    from prunekit.evaluation.tasks import run_tasks

    copies = [copy for copy in dict.fromkeys(args.pruned) if copy != source]
    sources = [source, *copies]
    if source in args.pruned:  # a check of the command itself
        sources.insert(1, source)
    options.find(sources)
    named = dict(zip(_names(sources), sources, strict=True))
    found: dict[str, TaskRun] = {}
    for label, name in named.items():
        loaded = options.load_copy(name, args, source)
        if loaded.tokenizer is None:
            raise PrunekitError(f"{name} has no tokenizer: save it with the model")
        found[label] = run_tasks(
            loaded.model,
            loaded.tokenizer,
            tasks,
            limit=args.limit,
            few_shot=few_shot,
            task_folder=args.task_folder,
            chat=args.chat,
            batch_size=args.batch_size,
            seed=args.seed,
        )
        del loaded  # before the next one is there
    data = _data(found, args.seed)
    if args.output:
        from prunekit.files.atomic import replaced_file

        asked = {"tasks": tasks, "limit": args.limit, "few_shot": few_shot, "chat": args.chat}
        items = {name: [asdict(item) for item in each.items] for name, each in found.items()}
        record = {"models": named, **asked, "seed": args.seed, "scores": data, "items": items}
        with replaced_file(Path(args.output)) as file:
            file.write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", "utf-8")
    options.emit(args, answer, lambda: data, lambda: _shown(data))


def _asked(args: argparse.Namespace) -> tuple[list[str], Any]:
    """Tasks, and their numbers of examples: one for all, or one for each.

    Raises:
        PrunekitError: Neither tasks nor a preset, both, or an unknown one.
    """
    tasks = [task.strip() for task in (args.tasks or "").split(",") if task.strip()]
    if args.preset is None:
        if not tasks:
            raise PrunekitError("which tasks? give --tasks, such as --tasks arc_easy,gsm8k")
        return tasks, args.few_shot
    from prunekit.evaluation.tasks import PRESETS

    if args.preset not in PRESETS:
        raise PrunekitError(f"preset '{args.preset}' is unknown: use {', '.join(PRESETS)}")
    preset = PRESETS[args.preset]
    unknown = [task for task in tasks if task not in preset]
    if unknown:
        raise PrunekitError(
            f"task '{unknown[0]}' is not in the preset: use some of {', '.join(preset)}, or leave "
            "--preset out"
        )
    chosen = tasks or list(preset)
    shots = {task: preset[task] for task in chosen}
    return chosen, shots if args.few_shot is None else args.few_shot


def _names(sources: Sequence[str]) -> list[str]:
    """What to call the models: a dense one compared with itself gets its role behind its name."""
    if len(sources) > 1 and sources[0] == sources[1]:
        return [*options.told_apart(*sources[:2]), *sources[2:]]
    return list(sources)


def _data(found: Mapping[str, TaskRun], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Scores by model; those of copies with their paired change from the first model."""
    from prunekit.analysis.grid import interval_to_dict
    from prunekit.evaluation.tasks import changes

    (first, dense), *_ = found.items()
    data = {}
    for name, each in found.items():
        data[name] = [asdict(score) for score in each.scores]
        paired = [] if name == first else changes(dense, each, seed=seed)
        told = {
            (change.task, change.metric): {
                **interval_to_dict(change.difference),
                **{"gained": change.gained, "lost": change.lost, "p": change.p},
                "needed": change.needed,
            }
            for change in paired
        }
        for score in data[name] if name != first else ():
            score["change"] = told.get((score["task"], score["metric"]))
    return data


def _flips(change: Any) -> str:
    return f"{change['lost']}, {change['gained']}"


def _shown(data: Mapping[str, list[dict[str, Any]]]) -> Any:
    from rich.console import Group
    from rich.text import Text

    from prunekit.report import terminal
    from prunekit.report.summary_tables import NONE, Value

    def cell(score: Mapping[str, Any] | None) -> str:
        if score is None:
            return NONE
        error = "" if score["stderr"] is None else f" ± {score['stderr']:.4f}"
        return f"{score['value']:.4f}{error}"

    def moved(score: Mapping[str, Any] | None, first: Mapping[str, Any]) -> object:
        change = None if score is None else score["change"]
        if change is None or change["low"] is None:
            return NONE if score is None else f"{score['value'] - first['value']:+.4f}"
        return Value(change["mean"], change["low"], change["high"])

    (_, dense), *others = data.items()
    rows = []
    for first in dense:
        key = (first["task"], first["metric"])
        row: dict[str, Any] = {"Task": first["task"], "Metric": first["metric"]}
        row["Documents"] = first["documents"] or NONE
        row[next(iter(data))] = cell(first)
        for name, scores in others:
            score = next((s for s in scores if (s["task"], s["metric"]) == key), None)
            row[name] = cell(score)
            row["Change" if len(others) == 1 else f"Change: {name}"] = moved(score, first)
            change = None if score is None else score["change"]
            if len(others) == 1:
                told = change is not None and change["lost"] is not None
                row["Lost, gained"] = _flips(change) if told else NONE
        rows.append(row)
    title = "lm-evaluation-harness (± one standard error)"
    table = terminal.records(title, rows, ["Lost, gained", "Documents"])
    if not others:
        return table
    note = "Changes are paired by document, with 95 % intervals where the task tells each one's."
    return Group(table, Text(note))
