"""`prunekit eval`: tasks of the lm-evaluation-harness, dense beside pruned."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from prunekit.commands import options
from prunekit.errors import PrunekitError

if TYPE_CHECKING:
    from prunekit.evaluation.tasks import TaskScore

SUMMARY = "score models on tasks of the lm-evaluation-harness"
DESCRIPTION = """\
Run tasks of EleutherAI's lm-evaluation-harness on one model, or on a dense model and its pruned
copy side by side. Take one task that is answered in a single step and one that is generated to see
what pruning keeps and what it loses. Where the harness is not installed, the command says how.

A task may download its data set: naming it asks for that.
"""
EXAMPLE = "prunekit eval demo out/drop4 --tasks arc_easy,gsm8k --limit 100"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="'demo', folder, .gguf, Hub id")
    parser.add_argument("pruned", nargs="?", metavar="PRUNED", help="its pruned or dropped copy")
    parser.add_argument("--tasks", metavar="LIST", help="names, separated by commas")
    parser.add_argument("--limit", type=options.positive, help="documents of each task (all)")
    parser.add_argument("--few-shot", type=options.whole, help="examples (the task's own number)")
    parser.add_argument("--task-folder", metavar="DIR", help="task definitions of your own (.yaml)")
    parser.add_argument("--chat", action="store_true", help="ask through the chat template")
    parser.add_argument("-o", "--output", metavar="FILE.json", help="write the scores there too")
    options.add_running(parser)
    options.add_common(parser)


def run(args: argparse.Namespace, answer: TextIO) -> None:
    """Carry the command out."""
    source = options.needed(args.model, "model")
    tasks = [task.strip() for task in (args.tasks or "").split(",") if task.strip()]
    if not tasks:
        raise PrunekitError("which tasks? give --tasks, such as --tasks arc_easy,gsm8k")

    options.check_file(args.output)

    from prunekit.evaluation.tasks import run_tasks

    sources = {source: source}
    if args.pruned:
        both = (source, args.pruned)
        sources = dict(zip(options.told_apart(*both), both, strict=True))
    options.find(sources.values())
    found: dict[str, list[TaskScore]] = {}
    for label, name in sources.items():
        model, tokenizer = options.load(name, args)
        found[label] = run_tasks(
            model,
            tokenizer,
            tasks,
            limit=args.limit,
            few_shot=args.few_shot,
            task_folder=args.task_folder,
            chat=args.chat,
            batch_size=args.batch_size,
            seed=args.seed,
        )
        del model  # before the next one is loaded
    data = {name: [asdict(score) for score in scores] for name, scores in found.items()}
    if args.output:
        from prunekit.files.atomic import replaced_file

        asked = {"tasks": tasks, "limit": args.limit, "few_shot": args.few_shot, "chat": args.chat}
        record = {"models": sources, **asked, "seed": args.seed, "scores": data}
        with replaced_file(Path(args.output)) as file:
            file.write_text(json.dumps(record, ensure_ascii=False, indent=2) + "\n", "utf-8")
    options.emit(
        args,
        answer,
        lambda: data,
        lambda: _shown(found),
    )


def _shown(found: dict[str, list[TaskScore]]) -> Any:
    from prunekit.report import terminal

    def cell(score: TaskScore) -> str:
        error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
        return f"{score.value:.4f}{error}"

    rows = []
    for scores in zip(*found.values(), strict=True):
        first = scores[0]
        row: dict[str, Any] = {"Task": first.task, "Metric": first.metric}
        row["Documents"] = first.documents or "–"
        row |= {name: cell(score) for name, score in zip(found, scores, strict=True)}
        if len(scores) > 1:
            row["Change"] = f"{scores[1].value - first.value:+.4f}"
        rows.append(row)
    return terminal.records("lm-evaluation-harness (± one standard error)", rows)
