"""Collections to search: documents, queries and judgements, in the three files that BEIR has.

`data/` holds a small one that was written for this project.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from prunekit.errors import PrunekitError
from prunekit.files.texts import clean, utf8

if TYPE_CHECKING:  # Python 3.10 keeps it elsewhere
    from importlib.resources.abc import Traversable

CORPUS, QUERIES, QRELS = "corpus.jsonl", "queries.jsonl", "qrels"


@dataclass(frozen=True)
class Collection:
    """Documents, queries, and which documents answer which query.

    Attributes:
        name: What to call it.
        documents: Text of each document by its id; the title, if there is one, comes first.
        queries: Text of each judged query by its id.
        relevant: Per query the ids of its relevant documents with their grades, 1 or more.
        notes: What was left out, in words.
    """

    name: str
    documents: Mapping[str, str]
    queries: Mapping[str, str]
    relevant: Mapping[str, Mapping[str, int]]
    notes: tuple[str, ...] = ()

    def limited(self, queries: int | None) -> Collection:
        """The same collection with at most so many queries, the first ones."""
        kept = dict(list(self.queries.items())[:queries])
        relevant = {query: self.relevant[query] for query in kept}
        return Collection(self.name, self.documents, kept, relevant, self.notes)


def load_collection(folder: str | Path | None = None, split: str = "test") -> Collection:
    """Read a collection.

    Args:
        folder: Holds `corpus.jsonl` (lines with `_id`, `text` and perhaps `title`),
            `queries.jsonl` (`_id`, `text`) and `qrels/SPLIT.tsv` (a header line, then query,
            document and grade, separated by tabs; 0 and less is not relevant). None reads the
            built-in set.
        split: Name of the file in `qrels`.

    Raises:
        PrunekitError: A file is missing or malformed, or a judgement names a query or document
            that is not there; the message names the file, the line and the fix.
    """
    if folder is None:
        root: Traversable = resources.files("prunekit.evaluation.retrieval") / "data"
        name, split = "built-in", "test"
    else:
        root, name = Path(folder).expanduser(), Path(folder).name
        if not Path(root).is_dir():
            raise PrunekitError(
                f"{folder} is no folder: give one with {CORPUS}, {QUERIES} and {QRELS}/{split}.tsv"
            )
    documents = dict(_texts(root / CORPUS, with_title=True))
    queries = dict(_texts(root / QUERIES))
    relevant = _judgements(root / QRELS / f"{split}.tsv", queries, documents)
    judged = {query: text for query, text in queries.items() if query in relevant}
    left = len(queries) - len(judged)
    several = f"{left} queries without a relevant document are left out"
    note = "1 query without a relevant document is left out" if left == 1 else several
    notes = (note,) if left else ()
    return Collection(name, documents, judged, relevant, notes)


def _texts(source: Traversable, *, with_title: bool = False) -> Iterator[tuple[str, str]]:
    """Id and text of every line."""
    seen: set[str] = set()
    for number, line in enumerate(_read(source).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        try:
            record: Any = json.loads(line)
        except json.JSONDecodeError as error:
            _fail(where, f"not valid JSON ({error.msg})", "correct it there")
        if not isinstance(record, dict):
            _fail(where, "not a JSON object", 'write {"_id": "...", "text": "..."}')
        text = record.get("text")
        title = record.get("title", "") if with_title else ""
        if "_id" not in record or not isinstance(text, str) or not isinstance(title, str):
            found = ", ".join(map(str, record)) or "none"
            _fail(where, f"'_id' or 'text' is missing (fields: {found})", "add it")
        whole = clean(f"{title} {text}".strip())
        if not whole:
            _fail(where, "the text is empty", "add it, or leave the line out")
        name = str(record["_id"])
        if name in seen:
            _fail(where, f"the _id {name!r} occurs twice", "make ids unique")
        seen.add(name)
        yield name, whole
    if not seen:
        _fail(f"{source}", "no lines", "add at least one")


def _judgements(
    source: Traversable, queries: Mapping[str, str], documents: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    """Relevant documents with their grades, per query that has any."""
    found: dict[str, dict[str, int]] = {}
    for number, line in enumerate(_read(source).split("\n"), 1):
        if not line.strip() or number == 1:  # the header
            continue
        where = f"{source}, line {number}"
        parts = [part.strip() for part in line.split("\t")]
        if len(parts) == 4:  # TREC's form has a second column without meaning
            parts.pop(1)
        try:
            query, document, grade = parts[0], parts[1], int(parts[2])
        except (IndexError, ValueError):
            _fail(where, "no query, document and grade between tabs", "correct it there")
        for what, name, known in (("query", query, queries), ("document", document, documents)):
            if name not in known:
                other = QUERIES if what == "query" else CORPUS
                _fail(where, f"{what} {name!r} is not in {other}", "add it, or leave the line out")
        if grade > 0:
            found.setdefault(query, {})[document] = grade
    if not found:
        _fail(f"{source}", "no document is relevant to any query", "give grades above 0")
    return found


def _read(source: Traversable) -> str:
    if not source.is_file():
        raise PrunekitError(
            f"{source} is missing: a collection has {CORPUS}, {QUERIES} and {QRELS}/SPLIT.tsv"
        )
    return utf8(source)


def _fail(where: str, what: str, fix: str) -> NoReturn:
    raise PrunekitError(f"{where}: {what}; {fix}")
