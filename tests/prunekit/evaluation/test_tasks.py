"""The adapter for lm-evaluation-harness: its numbers are the model's own likelihoods."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import prunekit as pk
from prunekit import checkpoint, cli
from prunekit.errors import PrunekitError
from prunekit.evaluation.tasks import _scores, run_tasks

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
        (score,) = run_tasks(model, tokenizer, ["tiny_choice"], task_folder=folder, batch_size=2)
        assert (score.task, score.metric) == ("tiny_choice", "acc")
        assert score.value == pytest.approx(own_accuracy(model, tokenizer))
        assert score.documents == 3 and score.higher_is_better


@installed
def test_the_command_puts_both_models_side_by_side(folder: Path, capsys: Any) -> None:
    line = ["eval", "demo", "demo", "--tasks", "tiny_choice", "--task-folder", str(folder)]
    assert cli.main([*line, "--limit", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["demo (dense)", "demo (pruned)"]
    for scores in found.values():
        assert [score["documents"] for score in scores] == [2]
    assert found["demo (dense)"] == found["demo (pruned)"]
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


def test_scores_are_written_where_output_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    from prunekit.commands import options
    from prunekit.evaluation import tasks

    score = tasks.TaskScore("arc_easy", "acc", 0.5, 0.1, 4, True)
    monkeypatch.setattr(options, "load", lambda *a, **k: (None, None))
    monkeypatch.setattr(tasks, "run_tasks", lambda *a, **k: [score])
    file = tmp_path / "scores.json"
    line = ["eval", "demo", "--tasks", "arc_easy", "--limit", "4", "--json"]
    assert cli.main([*line, "--output", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written["scores"] == json.loads(capsys.readouterr().out)
    assert written["models"] == {"demo": "demo"} and written["limit"] == 4
    assert cli.main([*line, "--output", str(tmp_path / "none" / "x.json")]) == 2
    assert "create it first" in capsys.readouterr().err


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
