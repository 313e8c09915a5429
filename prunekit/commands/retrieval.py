"""`prunekit retrieval`: how well hidden states find documents, dense beside pruned."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from prunekit.commands import options
from prunekit.errors import PrunekitError

if TYPE_CHECKING:
    from prunekit.evaluation.retrieval.searching import Retrieval

SUMMARY = "measure retrieval with a model's hidden states, dense beside pruned"
DESCRIPTION = """\
Rank documents for every query by the cosine of their vectors: pooled final hidden states of the
model. Give pruned copies too to see what pruning keeps of them, query by query.

The collection is a folder as BEIR has it: corpus.jsonl (_id, title, text), queries.jsonl (_id,
text) and qrels/test.tsv (query, document, grade). Without one a small built-in collection is
searched. A language model that was not trained for retrieval is a poor searcher: look at the change
from the dense model, not at the level.
"""
EXAMPLE = "prunekit retrieval demo out/drop4 --pooling mean"
_SHOWN = ("ndcg@10", "recall@10", "mrr")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="'demo', folder, .gguf, Hub id")
    parser.add_argument(
        "copies", nargs="*", metavar="COPY", help="pruned or quantised copies of it"
    )
    parser.add_argument("--collection", metavar="DIR", help="BEIR's layout (a built-in one)")
    parser.add_argument("--split", default="test", help="file of qrels (test)")
    parser.add_argument("--limit", type=options.positive, help="use at most so many queries (all)")
    parser.add_argument(
        "--pooling",
        choices=("last", "mean"),
        default="last",
        help="the last token's state, or the mean over all tokens (last)",
    )
    parser.add_argument("--instruction", metavar="TEXT", help="stands before queries (a plain one)")
    parser.add_argument(
        "--max-length", type=options.positive, default=512, help="longest text in tokens (512)"
    )
    parser.add_argument(
        "--append-eos", action="store_true", help="end texts as models such as E5-Mistral need it"
    )
    parser.add_argument("-o", "--output", metavar="FILE.json", help="write all ranks there too")
    options.add_running(parser)
    options.add_common(parser)


def run(args: argparse.Namespace, answer: TextIO) -> None:
    """Carry the command out."""
    source = options.needed(args.model, "model")
    options.check_file(args.output)

    from prunekit.evaluation.retrieval.collection import load_collection
    from prunekit.evaluation.retrieval.searching import INSTRUCTION, retrieve

    collection = load_collection(args.collection, args.split).limited(args.limit)
    copies = list(dict.fromkeys(args.copies))
    options.find([source, *copies])
    from prunekit.divergence.candidates import check_tokenizer, sides

    found: dict[str, Retrieval] = {}
    tokenizer: Any = None
    for side in sides([source, *copies], args.dtype):
        if side.kind != "model":
            raise PrunekitError(f"{side.source} holds no model: give a model or copies of it")
        loaded = side.load(options.device(args.device), source)
        tokenizer = tokenizer or loaded.tokenizer
        check_tokenizer(tokenizer, loaded.tokenizer or tokenizer)
        found[side.name] = retrieve(
            loaded.model,
            tokenizer,
            collection,
            pooling=args.pooling,
            instruction=INSTRUCTION if args.instruction is None else args.instruction,
            max_length=args.max_length,
            append_eos=args.append_eos,
            batch_size=args.batch_size,
            progress=not args.quiet,
        )
        del loaded  # before the next one is there
    data = _data(found, args.seed)
    if args.output:
        from prunekit.files.atomic import replaced_file
        from prunekit.process import distributed

        record = {**data, "queries": _queries(found)}
        if distributed.is_main():
            with replaced_file(Path(args.output)) as file:
                text = json.dumps(record, ensure_ascii=False, indent=1)
                file.write_text(text + "\n", encoding="utf-8")
    options.emit(args, answer, lambda: data, lambda: _shown(data))


def _data(found: Mapping[str, Retrieval], seed: int) -> dict[str, Any]:
    """Every measure of every model, and its change from the first, with intervals."""
    from prunekit.analysis.grid import interval_to_dict

    (first, dense), *_ = found.items()
    models = []
    for name, result in found.items():
        measures = {m: interval_to_dict(result.interval(m, seed=seed)) for m in result.values}
        row: dict[str, Any] = {"name": name, "measures": measures}
        if name != first:
            row["change"] = {
                m: interval_to_dict(dense.change(result, m, seed=seed)) for m in result.values
            }
            moved = result.values["ndcg@10"] - dense.values["ndcg@10"]
            row["better"], row["worse"] = int((moved > 0).sum()), int((moved < 0).sum())
        models.append(row)
    return {**dense.meta, "seed": seed, "models": models}


def _queries(found: Mapping[str, Retrieval]) -> list[dict[str, Any]]:
    """Per query the ranks of its relevant documents and its measures, by model."""
    (_, dense), *_ = found.items()
    return [
        {
            "id": query,
            "models": {
                name: {
                    "ranks": list(result.ranks[index]),
                    **{m: float(values[index]) for m, values in result.values.items()},
                }
                for name, result in found.items()
            },
        }
        for index, query in enumerate(dense.queries)
    ]


def _shown(data: Mapping[str, Any]) -> Any:
    from rich.console import Group
    from rich.text import Text

    from prunekit.report import terminal
    from prunekit.report.summary_tables import Value

    rows = []
    for model in data["models"]:
        row: dict[str, Any] = {"Model": model["name"]}
        row |= {name: Value.of_dict(model["measures"][name]) for name in _SHOWN}
        if len(data["models"]) > 1:
            change = model.get("change")
            row["Change of ndcg@10"] = "–" if change is None else Value.of_dict(change["ndcg@10"])
            moved = "–" if change is None else f"{model['better']}, {model['worse']}"
            row["Better, worse"] = moved
        rows.append(row)
    queries = "1 query" if data["queries"] == 1 else f"{data['queries']} queries"
    documents = "1 document" if data["documents"] == 1 else f"{data['documents']} documents"
    title = f"Retrieval, {data['collection']}: {queries}, {documents}, {data['pooling']} pooling"
    notes = [f"{note}." for note in data["notes"]]
    if data["collection"] == "built-in":
        notes.append(
            "The collection is prunekit's own and small: it compares these models and stands for "
            "no public benchmark."
        )
    if len(data["models"]) > 1:
        notes.append("Changes are paired by query (95 %); better, worse: queries by ndcg@10.")
    table = terminal.records(title, rows, ["Better, worse", "recall@10", "mrr"])
    return Group(table, *(Text(note) for note in notes))
