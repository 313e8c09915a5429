"""Retrieval: measures by hand, vectors text by text, collections whole and broken, the command."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from command_line import tiny_model, tiny_tokenizer

import prunekit as pk
from prunekit import checkpoint, cli
from prunekit.errors import PrunekitError
from prunekit.evaluation.retrieval import measures
from prunekit.evaluation.retrieval.collection import Collection, load_collection
from prunekit.evaluation.retrieval.embedding import embed
from prunekit.evaluation.retrieval.searching import INSTRUCTION


def test_measures_by_hand():
    scores = np.array([0.1, 0.9, 0.5, 0.5, 0.7])
    # order: 1, 4, 2, 3, 0; of the equal ones the first comes first
    assert measures.ranks(scores, [0, 1, 2, 3, 4]) == [5, 1, 3, 4, 2]
    assert measures.ranks(scores, [0, 2, 4], left_out=1) == [4, 2, 1]
    found, grades = [3, 1, 12], [2, 1, 3]
    gained = 2 / math.log2(4) + 1 / math.log2(2)
    ideal = 3 / math.log2(2) + 2 / math.log2(3) + 1 / math.log2(4)
    assert measures.ndcg(found, grades, 10) == pytest.approx(gained / ideal, rel=1e-15)
    assert measures.ndcg(found, grades, 2) == pytest.approx(1 / (3 + 2 / math.log2(3)), rel=1e-15)
    assert measures.ndcg([1, 2, 3], [3, 2, 1], 10) == 1
    assert measures.recall(found, 10) == 2 / 3 and measures.recall(found, 2) == 1 / 3
    assert measures.reciprocal_rank(found) == 1 and measures.reciprocal_rank([4, 9]) == 0.25
    with pytest.raises(PrunekitError, match="not finite"):
        measures.ranks(np.array([0.0, np.nan]), [0])


@pytest.fixture(scope="module")
def model():
    return tiny_model()


TEXTS = ["a", "some longer text than the others, by far", "short", "of the same", "size here!!"]


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("eos", [False, True])
def test_vectors_are_those_of_each_text_alone(model, pooling, eos):
    tokenizer = tiny_tokenizer()
    got = embed(
        model, tokenizer, TEXTS, pooling=pooling, max_length=20, append_eos=eos, batch_size=3
    )
    for text, vector in zip(TEXTS, got, strict=True):
        ids = tokenizer(text).input_ids[: 20 - eos] + [tokenizer.eos_token_id] * eos
        with torch.inference_mode():
            states = model.model(torch.tensor([ids])).last_hidden_state[0].double()
        want = states[-1] if pooling == "last" else states.mean(0)
        want = (want / want.norm()).numpy()
        assert np.abs(vector - want).max() < 2e-6
    assert got.dtype == np.float32 and np.abs(np.linalg.norm(got, axis=1) - 1).max() < 1e-6


def test_a_model_finds_the_document_that_is_the_query(model):
    documents = {f"d{i}": text for i, text in enumerate(TEXTS)}
    queries = {f"q{i}": text for i, text in enumerate(TEXTS)}
    relevant = {f"q{i}": {f"d{i}": 1} for i in range(len(TEXTS))}
    same = Collection("same", documents, queries, relevant)
    found = pk.retrieve(model, tiny_tokenizer(), same, instruction="")
    assert all((values == 1).all() for values in found.values.values())
    assert found.ranks == ((1,),) * len(TEXTS) and found.interval("ndcg@10").n == len(TEXTS)
    # a document with the query's id does not take part
    twins = {**documents, **queries}
    found = pk.retrieve(
        model, tiny_tokenizer(), Collection("twins", twins, queries, relevant), instruction=""
    )
    assert found.ranks == ((1,),) * len(TEXTS)
    asked = pk.retrieve(model, tiny_tokenizer(), same, instruction="x" * 40)
    assert asked.ranks != found.ranks
    assert found.change(asked, "mrr").mean == pytest.approx(asked.values["mrr"].mean() - 1)
    with pytest.raises(PrunekitError, match="use one of ndcg@10"):
        found.interval("map")


def test_the_built_in_collection_is_whole():
    built_in = load_collection()
    assert len(built_in.documents) == len(built_in.queries) == 64 and not built_in.notes
    assert len(set(built_in.documents.values())) == 64
    assert {d for found in built_in.relevant.values() for d in found} == set(built_in.documents)
    assert "question" in INSTRUCTION.lower()


def folder_of(path, corpus, queries, qrels, split="test"):
    (path / "qrels").mkdir(parents=True)
    for name, lines in (("corpus", corpus), ("queries", queries)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    head = "query-id\tcorpus-id\tscore\n"
    (path / "qrels" / f"{split}.tsv").write_text(head + qrels, encoding="utf-8")
    return path


DOCUMENTS = [
    {"_id": "1", "title": "One", "text": "first"},
    {"_id": "2", "title": "", "text": "second"},
]
QUERIES = [{"_id": "a", "text": "which?"}, {"_id": "b", "text": "none?"}]


def test_a_collection_as_beir_has_it(tmp_path):
    qrels = "a\t2\t2\na\t1\t1\nb\t1\t0\n"
    found = load_collection(folder_of(tmp_path / "beir", DOCUMENTS, QUERIES, qrels))
    assert found.documents == {"1": "One first", "2": "second"}
    assert found.queries == {"a": "which?"} and found.relevant == {"a": {"2": 2, "1": 1}}
    assert found.notes == ("1 query without a relevant document is left out",)
    trec = folder_of(tmp_path / "trec", DOCUMENTS, QUERIES, "a\t0\t2\t1\n", split="dev")
    assert load_collection(trec, "dev").relevant == {"a": {"2": 1}}


@pytest.mark.parametrize(
    ("corpus", "queries", "qrels", "message"),
    [
        (DOCUMENTS, QUERIES, "a\t3\t1\n", r"test.tsv, line 2: document '3' is not in corpus.jsonl"),
        (DOCUMENTS, QUERIES, "c\t1\t1\n", "query 'c' is not in queries.jsonl"),
        (DOCUMENTS, QUERIES, "a 1 1\n", "between tabs"),
        (DOCUMENTS, QUERIES, "a\t1\t0\n", "no document is relevant"),
        ([{"id": 1, "body": "x"}], QUERIES, "", r"missing \(fields: id, body\)"),
        ([*DOCUMENTS, DOCUMENTS[0]], QUERIES, "", "occurs twice"),
        ([{"_id": "1", "text": " "}], QUERIES, "", "the text is empty"),
    ],
    ids=["document", "query", "tabs", "grades", "fields", "twice", "empty"],
)
def test_broken_collections_are_named(tmp_path, corpus, queries, qrels, message):
    with pytest.raises(PrunekitError, match=message):
        load_collection(folder_of(tmp_path / "c", corpus, queries, qrels))


def test_the_command(tmp_path, capsys, model):
    checkpoint.save(model, tiny_tokenizer(), tmp_path / "dense")
    other = tiny_model()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.zero_()
    checkpoint.save(other, tiny_tokenizer(), tmp_path / "pruned")
    qrels = "a\t2\t1\nb\t1\t1\n"
    folder = folder_of(tmp_path / "beir", DOCUMENTS, QUERIES, qrels)
    out = tmp_path / "found.json"
    line = f"retrieval {tmp_path / 'dense'} {tmp_path / 'pruned'} --collection {folder}"
    assert cli.main([*line.split(), "--json", "--output", str(out)]) == 0
    told = json.loads(capsys.readouterr().out)
    dense, pruned = told["models"]
    assert (told["queries"], told["documents"], dense["name"]) == (2, 2, "dense")
    ends = pruned["change"]["ndcg@10"]
    levels = [row["measures"]["ndcg@10"]["mean"] for row in told["models"]]
    assert ends["mean"] == pytest.approx(levels[1] - levels[0]) and ends["n"] == 2
    written = json.loads(out.read_text())
    alone = pk.retrieve(*checkpoint.load(tmp_path / "pruned"), load_collection(folder))
    ranks = [tuple(query["models"]["pruned"]["ranks"]) for query in written["queries"]]
    assert tuple(ranks) == alone.ranks
    assert cli.main([*line.split(), "--limit", "1", "--pooling", "mean"]) == 0
    shown = capsys.readouterr().out
    assert "1 query, 2 documents, mean pooling" in shown and "Better, worse" in shown
    for words, message in (
        ("--collection nowhere", "is no folder"),
        ("--max-length 0", "whole number from 1"),
        ("--max-length 600", "600"),
        (f"--output {tmp_path}", "is a folder"),
    ):
        status = cli.main([*line.split()[:2], "--collection", str(folder), *words.split()])
        err = capsys.readouterr().err
        if words != "--max-length 600":  # the texts are shorter than the model's context
            assert status == 2 and message in err and err.count("\n") == 1
        else:
            assert status == 0
