"""The adapter for lm-evaluation-harness: its numbers are the model's own likelihoods."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import prunekit as pk
from prunekit import checkpoint, cli
from prunekit.errors import PrunekitError
from prunekit.evaluation.intervals import needed_pairs
from prunekit.evaluation.tasks import (
    PRESETS,
    TaskItem,
    TaskRun,
    TaskScore,
    _by_shots,
    _items,
    _scores,
    changes,
    run_tasks,
)

installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed: pip install 'prunekit[eval]'",
)
QUESTIONS = [
    {"question": "Which of these is a fruit?", "options": ["an apple", "a stone"], "answer": 0},
    {"question": "Which of these swims?", "options": ["a brick", "a fish"], "answer": 1},
    {"question": "What falls from clouds?", "options": ["rain", "soup"], "answer": 1},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that defines one multiple-choice task on a local file."""
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "tiny.yaml").write_text(
        f"""
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "data.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_choice: options
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
    )
    return tmp_path


def own_accuracy(model: Any, tokenizer: Any) -> float:
    """Accuracy by the summed log-likelihood of " option", one sequence at a time."""
    right = 0
    for item in QUESTIONS:
        prefix = tokenizer(f"{item['question']}\nAnswer:")["input_ids"]
        sums = []
        for option in item["options"]:
            ids = tokenizer(f"{item['question']}\nAnswer: {option}")["input_ids"]
            with torch.inference_mode():
                logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            tail = range(len(prefix), len(ids))
            sums.append(sum(float(logs[at - 1, ids[at]]) for at in tail))
        right += sums.index(max(sums)) == item["answer"]
    return right / len(QUESTIONS)


@installed
def test_the_harness_scores_dense_and_dropped_models(folder: Path) -> None:
    model, tokenizer = pk.load("demo")
    for count in (0, 8):
        if count:
            pk.drop_(model, pk.Drop("attn", count), torch.randint(100, 9000, (2, 16)))
        found = run_tasks(model, tokenizer, ["tiny_choice"], task_folder=folder, batch_size=2)
        (score,) = found.scores
        assert (score.task, score.metric) == ("tiny_choice", "acc")
        assert score.value == pytest.approx(own_accuracy(model, tokenizer))
        assert score.documents == 3 and score.higher_is_better
        assert len(found.items) == 3 and sum(found.values(score).values()) / 3 == score.value


@installed
def test_the_command_puts_both_models_side_by_side(folder: Path, capsys: Any) -> None:
    line = ["eval", "demo", "demo", "--tasks", "tiny_choice", "--task-folder", str(folder)]
    assert cli.main([*line, "--limit", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["demo (dense)", "demo (pruned)"]
    for scores in found.values():
        assert [score["documents"] for score in scores] == [2]
    (ours,), (theirs,) = found.values()
    change = theirs.pop("change")
    assert ours == theirs and (change["mean"], change["n"], change["p"]) == (0, 2, 1)
    assert (
        cli.main(["eval", "demo", "--tasks", "nothing_like_it", "--task-folder", str(folder)]) == 2
    )
    assert "nothing_like_it" in capsys.readouterr().err


def test_a_wrong_second_model_is_found_before_the_first_is_scored(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(checkpoint, "load", lambda *a, **k: pytest.fail("loaded the first"))
    assert cli.main(["eval", "demo", "./no/such/model", "--tasks", "arc_easy"]) == 2
    assert "./no/such/model doesn't exist" in capsys.readouterr().err


def a_run(right: list[int], f1: float, *, group: bool = False) -> TaskRun:
    """One task of 0 and 1, and one whose metric is no mean; the first within a group if asked."""
    n = len(right)
    items = [TaskItem("arc", "none", i, f"#{i}", {"acc": v}, "A", "B") for i, v in enumerate(right)]
    items += [TaskItem("squad", "none", i, f"#{i}", {"f1": 0.5}, "", "") for i in range(n)]
    scores = [
        TaskScore("arc", "acc", sum(right) / n, 0.1, n, True),
        TaskScore("squad", "f1", f1, None, n, True),
    ]
    if group:
        scores.append(TaskScore("all", "acc", sum(right) / n, None, None, True))
    return TaskRun(tuple(scores), tuple(items), {"all": ("arc",)} if group else None)


def test_changes_are_paired_by_document() -> None:
    first, second = a_run([1, 1, 1, 0, 0], 0.9, group=True), a_run([0, 0, 1, 1, 0], 0.8, group=True)
    found = changes(first, second)
    # f1 of the whole is not the mean of the documents': nothing is claimed of it
    assert [(change.task, change.metric) for change in found] == [("arc", "acc"), ("all", "acc")]
    for change in found:
        assert change.difference.mean == pytest.approx(-0.2) and change.difference.n == 5
        assert (change.gained, change.lost, change.p) == (1, 2, 1.0)
        assert change.needed == needed_pairs(3, 5)
    # documents that the second does not have are left out, and those that changed under it
    fewer = TaskRun(second.scores, second.items[:1])
    assert changes(first, fewer) == []
    other = TaskRun(first.scores, tuple(replace(item, digest="other") for item in first.items))
    assert changes(first, other) == []


def test_samples_of_the_harness_become_items() -> None:
    sample = {"doc_id": 3, "doc_hash": "x", "target": 1, "filtered_resps": ["18"], "doc": {}}
    found = {
        "samples": {
            "gsm8k": [
                {**sample, "filter": "strict", "metrics": ["exact_match"], "exact_match": 0.0},
                {**sample, "filter": "flexible", "metrics": ["exact_match"], "exact_match": 1.0},
            ],
            "pile": [{**sample, "metrics": ["word"], "word": (-3.0, 5)}],
        }
    }
    strict, flexible, pile = _items(found)
    assert strict.values == {"exact_match": 0.0} and flexible.answer == "['18']"
    assert pile.values == {} and pile.filter == "none" and strict.target == "1"
    run = TaskRun((), (strict, flexible))
    score = TaskScore("gsm8k", "exact_match,flexible", 1.0, None, 1, True)
    assert run.values(score) == {("gsm8k", 3, "x"): 1.0}


def test_scores_and_items_are_written_where_output_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    from prunekit.commands import options
    from prunekit.evaluation import tasks

    asked: list[Any] = []

    def run(model: Any, tokenizer: Any, names: Any, **given: Any) -> TaskRun:
        asked.append((model, list(names), given["few_shot"]))
        return a_run([1, 0] if model == "demo" else [1, 1], 0.5)

    loaded = lambda name, *a: SimpleNamespace(model=name, tokenizer=0)  # noqa: E731
    monkeypatch.setattr(options, "load_copy", loaded)
    monkeypatch.setattr(options, "find", lambda sources: None)
    monkeypatch.setattr(tasks, "run_tasks", run)
    file = tmp_path / "scores.json"
    line = ["eval", "demo", "one", "two", "--tasks", "arc,squad", "--limit", "4"]
    assert cli.main([*line, "--json", "--output", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["scores"] == json.loads(capsys.readouterr().out)
    assert list(written["models"]) == ["demo", "one", "two"] and written["limit"] == 4
    change = written["scores"]["two"][0]["change"]
    assert (change["mean"], change["gained"], change["lost"]) == (0.5, 1, 0)
    assert "change" not in written["scores"]["demo"][0]
    assert len(written["items"]["one"]) == 4 and written["items"]["one"][0]["values"] == {"acc": 1}
    assert cli.main([*line, "--output", str(tmp_path / "none" / "x.json")]) == 2
    assert "create it first" in capsys.readouterr().err
    assert cli.main(line) == 0
    assert "Change: one" in capsys.readouterr().out

    asked.clear()
    preset = ["eval", "demo", "--preset", "paper"]
    assert cli.main([*preset, "--json"]) == 0
    assert asked == [("demo", list(PRESETS["paper"]), PRESETS["paper"])]
    assert cli.main([*preset, "--tasks", "gsm8k,mmlu", "--few-shot", "1", "--json"]) == 0
    assert asked[1] == ("demo", ["gsm8k", "mmlu"], 1)
    capsys.readouterr()
    for words, message in (
        (["--tasks", "squad"], "'squad' is not in the preset"),
        (["--preset", "papers"], "use paper"),
    ):
        assert cli.main([*preset, *words]) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_tasks_of_a_preset_are_asked_by_their_shots() -> None:
    paper = PRESETS["paper"]
    assert _by_shots(list(paper), paper) == [
        (0, ["boolq", "rte", "openbookqa", "piqa"]),
        (5, ["mmlu", "winogrande", "gsm8k"]),
        (10, ["hellaswag"]),
        (25, ["arc_challenge"]),
    ]
    assert _by_shots(["a", "b"], None) == [(None, ["a", "b"])]


def test_numbers_are_taken_with_their_errors_and_filters() -> None:
    results = {
        "arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 4},
        "gsm": {
            "exact_match,strict": 0.25,
            "exact_match_stderr,strict": "N/A",
            "exact_match,flexible": 0.75,
        },
    }
    samples = {"arc": {"effective": 4}}
    found = _scores({"results": results, "n-samples": samples, "higher_is_better": {}})
    assert [(s.task, s.metric, s.value, s.stderr, s.documents) for s in found] == [
        ("arc", "acc", 0.5, 0.1, 4),
        ("gsm", "exact_match,strict", 0.25, None, None),
        ("gsm", "exact_match,flexible", 0.75, None, None),
    ]


def test_without_the_harness_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else stock(name, *a)
    )
    with pytest.raises(PrunekitError, match=r"-m pip install .*\[eval\]"):
        run_tasks(torch.nn.Linear(1, 1), None, ["arc_easy"])  # type: ignore[arg-type]
