"""`prunekit compare`: what pruning did, from hidden state to logit to probability."""

from __future__ import annotations

import argparse
from math import isnan
from pathlib import Path
from typing import Any, TextIO

from prunekit.commands import open_questions, options
from prunekit.errors import PrunekitError

SUMMARY = "compare pruned copies with their dense model: h → z → p"
DESCRIPTION = """\
Compare a dense model and its pruned copy layer by layer, step by step and text by text, and write
JSON, CSV, figures and one HTML page.

Given several copies, quantised ones too, write one page more: quality against size and speed,
and which copies can be told apart on the same prompts and questions. Two models are in memory at
a time.

Prompts and questions come from the built-in set unless files are given: prompts as .txt (one a
line), .jsonl or .json; questions as .jsonl or .json with question, options and answer. With
--generate both models also answer open questions with text, which is scored by exact match: files
of GSM8K, SVAMP, MAWPS and MATH as they are, or any with question and answer.

With --kl-report: print the statistics of llama.cpp's --kl-divergence instead, over a text: mean,
median, percentiles and maximum of KL(dense || pruned), agreement of the top token, change of the
actual token's probability, ratio of perplexities. No study is written.
"""
EXAMPLE = "prunekit compare demo out/wanda24 --output out/study"
STUDY = ("study.json", "comparison.json")  # by which a saved study is known


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("dense", nargs="?", metavar="DENSE", help="'demo', folder, .gguf, Hub id")
    parser.add_argument("pruned", nargs="*", metavar="PRUNED", help="its pruned or dropped copies")
    parser.add_argument("--prompts", metavar="FILE", help="open prompts (the built-in ones)")
    parser.add_argument("--prompt-field", default="prompt", help="their field in rows (prompt)")
    parser.add_argument("--choices", metavar="FILE", help="questions (the built-in ones)")
    parser.add_argument("--no-choices", action="store_true", help="leave questions out")
    parser.add_argument(
        "--limit",
        type=options.positive,
        help="use at most so many of each; of a --kl-report, windows",
    )
    parser.add_argument(
        "--max-new-tokens", type=options.positive, default=48, help="longest text (48)"
    )
    parser.add_argument(
        "--temperature", type=options.above_zero, default=1.0, help="T in p = softmax(z/T) (1)"
    )
    parser.add_argument(
        "--lens",
        choices=("final_norm", "raw"),
        default="final_norm",
        help="read layers through the final norm (default), or raw: without it",
    )
    parser.add_argument(
        "--chat",
        choices=("auto", "always", "never"),
        default="auto",
        help="use the chat template; auto (default): if there is one",
    )
    parser.add_argument(
        "--layerwise-prompts", type=options.positive, default=8, help="prompts read by layer (8)"
    )
    parser.add_argument(
        "--layerwise-steps", type=options.positive, default=16, help="steps of each of them (16)"
    )
    parser.add_argument("--no-speed", action="store_true", help="several copies: time none of them")
    open_questions.add_arguments(parser.add_argument_group("scored generation"), default="none")
    report = parser.add_argument_group("instead of a study")
    report.add_argument("--kl-report", action="store_true", help="statistics of KL over a text")
    report.add_argument(
        "--text", metavar="FILE", help="its text: .txt, .jsonl, .json, .parquet (a built-in one)"
    )
    report.add_argument(
        "--context", type=options.positive, default=512, help="tokens per window of it (512)"
    )
    options.add_output(parser, "folder for the study", "out/study")
    options.add_running(parser)
    options.add_common(parser)


def run(args: argparse.Namespace, answer: TextIO) -> None:
    """Carry the command out."""
    source = options.needed(args.dense, "dense model")
    copies = list(args.pruned) or [options.needed(None, "pruned model")]
    if args.kl_report:
        if len(copies) > 1:
            raise PrunekitError(
                f"--kl-report compares two models, not {1 + len(copies)}: rank them with "
                "prunekit kld"
            )
        _kl_report([source, copies[0]], args, answer)
        return
    if args.text is not None:
        raise PrunekitError("--text is the text of --kl-report: add that, or leave --text out")
    folder = options.output(args, STUDY)

    from prunekit.evaluation.items import load_choices, load_prompts

    prompts = [item.prompt for item in load_prompts(args.prompts, args.prompt_field)][: args.limit]
    choices = None if args.no_choices else load_choices(args.choices)[: args.limit]
    questions, asking = open_questions.load(args, args.batch_size)

    options.find([source, *copies])
    dense, tokenizer = options.load(source, args)
    asked = {
        "tokenizer": tokenizer,
        "choices": choices,
        "questions": questions,
        "asking": asking,
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "lens": args.lens,
        "batch_size": args.batch_size,
        "layerwise_prompts": args.layerwise_prompts,
        "layerwise_steps": args.layerwise_steps,
        "chat": args.chat,
        "seed": args.seed,
        "progress": not args.quiet,
    }
    if len(copies) > 1:
        _several(dense, copies, prompts, asked, folder, args, answer)
        return

    from prunekit.study.comparison import compare

    pruned = options.load_copy(copies[0], args, source).model
    study = compare(dense, pruned, prompts, names=_names(source, copies[0]), **asked)
    study.save(folder, overwrite=args.overwrite)
    page = str(Path(folder) / "index.html")
    options.emit(
        args,
        answer,
        lambda: {"output": folder, "html": page, "summary": summary_data(study)},
        lambda: _shown(study, page),
    )


def _several(
    dense: Any,
    copies: list[str],
    prompts: list[str],
    asked: dict[str, Any],
    folder: str,
    args: argparse.Namespace,
    answer: TextIO,
) -> None:
    from prunekit.checkpoint.sources import located
    from prunekit.divergence.loading import disk_files
    from prunekit.study.several import compare_several

    source = options.needed(args.dense, "dense model")
    found = compare_several(
        dense,
        list(dict.fromkeys(copies)),
        prompts,
        speed=not args.no_speed,
        name=_name(source),
        bytes_on_disk=sum(file.stat().st_size for file in disk_files(located(source))),
        dtype=args.dtype,
        **asked,
    )
    found.save(folder, overwrite=args.overwrite)
    page = str(Path(folder) / "index.html")
    options.emit(
        args,
        answer,
        lambda: {"output": folder, "html": page, **found.to_dict()},
        lambda: _listed(found, page),
    )
    if found.failed:
        first = found.failed[0]
        raise PrunekitError(
            f"{len(found.failed)} of {len(found.copies)} copies failed, first {first.name} "
            f"({first.error}); the others are in {folder}"
        )


def _kl_report(sources: list[str], args: argparse.Namespace, answer: TextIO) -> None:
    from prunekit.data import text_files
    from prunekit.evaluation.items import load_heldout

    text = load_heldout() if args.text is None else "\n\n".join(text_files.read_file(args.text))

    options.find(sources)
    from prunekit.divergence.two_models import kl_report
    from prunekit.report.divergence import kl_table

    dense, tokenizer = options.load(sources[0], args)
    pruned, _ = options.load(sources[1], args)
    found = kl_report(
        dense,
        pruned,
        tokenizer,
        text,
        context=args.context,
        limit=args.limit,
        batch_size=args.batch_size,
        progress=not args.quiet,
    )
    names = _names(*sources)
    numbers = {name: None if isnan(value) else value for name, value in found.items()}
    numbers["context"] = int(found["context"])
    data = {"dense": names[0], "pruned": names[1], **numbers}
    options.emit(args, answer, lambda: data, lambda: kl_table(found, names))


def summary_data(study: Any) -> dict[str, Any]:
    """`Study.summary()` as JSON-able data."""
    from prunekit.analysis.grid import interval_to_dict
    from prunekit.evaluation.intervals import Interval

    return {
        name: interval_to_dict(value) if isinstance(value, Interval) else value
        for name, value in study.summary().items()
    }


def _names(dense: str, pruned: str) -> tuple[str, str]:
    """Short names for the two models, longer ones where the short ones are the same."""
    short = _name(dense), _name(pruned)
    return options.told_apart(
        *(short if short[0] != short[1] or dense == pruned else (dense, pruned))
    )


def _name(source: str) -> str:
    """A short name for a model: the last part of its path."""
    return "SmolLM2-135M-Instruct" if source == "demo" else Path(source).name or source


def _shown(study: Any, page: str) -> Any:
    from rich.console import Group
    from rich.text import Text

    from prunekit.report import terminal

    return Group(terminal.study_summary(study), Text(f"\nOpen {page}"))


def _listed(found: Any, page: str) -> Any:
    from rich.console import Group
    from rich.text import Text

    return Group(found.table(), Text(f"\nOpen {page}"))
