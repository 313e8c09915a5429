"""Tasks of EleutherAI's lm-evaluation-harness, for models that prunekit has pruned.

What the field quotes (ARC, HellaSwag, MMLU, GSM8K, …) is run by the harness itself; this module
only hands it a model that is loaded already, dropped sublayers, packed weights and all.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunekit.errors import PrunekitError, install, one_line
from prunekit.evaluation.intervals import Interval, mcnemar, needed_pairs, paired_difference
from prunekit.process import distributed

#: Tasks by the name of a preset, each with its number of examples before a question. "paper": the
#: nine tasks of arXiv 2603.24652 with the shots of its code.
PRESETS: dict[str, dict[str, int]] = {
    "paper": {
        "boolq": 0,
        "rte": 0,
        "openbookqa": 0,
        "piqa": 0,
        "mmlu": 5,
        "winogrande": 5,
        "gsm8k": 5,
        "hellaswag": 10,
        "arc_challenge": 25,
    }
}
_LONGEST = 2000  # characters of an answer that are kept


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: Name of the task or group.
        metric: Name of the metric; with the filter behind a comma where the task has several.
        value: As the harness reports it (accuracies as a share of 1).
        stderr: Standard error over the task's documents, None where the harness gives none.
        documents: Scored documents, None for a group.
        higher_is_better: None where the task does not say.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    documents: int | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskItem:
    """One document of a task and what the model made of it.

    Attributes:
        task: Name of the task (of the subtask in a group).
        filter: How the answer was taken from the response, as the harness calls it.
        document: Its index in the task.
        digest: The harness's hash of the document: equal documents have equal ones.
        values: Metrics that are numbers, by name.
        target: The right answer, as text.
        answer: What the model answered behind the filter, as text; the end of long ones is cut.
    """

    task: str
    filter: str
    document: int
    digest: str
    values: Mapping[str, float]
    target: str
    answer: str


@dataclass(frozen=True)
class TaskRun:
    """Scores of one model, and the items behind them.

    Attributes:
        scores: One per task and metric, in the harness's order.
        items: One per document and filter.
        groups: Names of the subtasks of each group.
    """

    scores: tuple[TaskScore, ...]
    items: tuple[TaskItem, ...] = ()
    groups: Mapping[str, Sequence[str]] | None = None

    def values(self, score: TaskScore) -> dict[tuple[str, int, str], float]:
        """The values of a score's metric by task, document and digest; a group's are its tasks'."""
        metric, _, kind = score.metric.partition(",")
        tasks = set(self._tasks(score.task))
        return {
            (item.task, item.document, item.digest): item.values[metric]
            for item in self.items
            if item.task in tasks and metric in item.values and kind in ("", item.filter)
        }

    def _tasks(self, name: str) -> Iterator[str]:
        below = (self.groups or {}).get(name, ())
        yield name
        for task in below:
            if task != name:
                yield from self._tasks(task)


@dataclass(frozen=True)
class TaskChange:
    """How one metric changed between two models on the same documents.

    Attributes:
        task: Name of the task or group.
        metric: As in `TaskScore`.
        difference: Mean of the second model less that of the first, with its paired interval.
        gained: Documents that only the second gets right; None where values are not 0 or 1.
        lost: Documents that only the first gets right.
        p: McNemar's exact p-value.
        needed: How many such documents would show a change of 2 points, see `needed_pairs`.
    """

    task: str
    metric: str
    difference: Interval
    gained: int | None = None
    lost: int | None = None
    p: float | None = None
    needed: int | None = None


def changes(first: TaskRun, second: TaskRun, *, seed: int = 0) -> list[TaskChange]:
    """The paired changes of all metrics that are means over documents which both models answered.

    Others (a corpus BLEU, a perplexity) have no value per document and are left out.

    Args:
        first: Usually the dense model's.
        second: Another model's, of the same tasks.
        seed: Seed of the intervals' resampling.
    """
    scores = {(score.task, score.metric): score for score in second.scores}
    found = []
    for score in first.scores:
        other = scores.get((score.task, score.metric))
        if other is None:
            continue
        ours, theirs = first.values(score), second.values(other)
        both = [key for key in ours if key in theirs]
        before, after = ([values[key] for key in both] for values in (ours, theirs))
        if not both or not (_is_mean(before, score) and _is_mean(after, other)):
            continue
        difference = paired_difference(before, after, seed=seed)
        change = TaskChange(score.task, score.metric, difference)
        if set(before) | set(after) <= {0.0, 1.0}:
            gained = sum(b > a for a, b in zip(before, after, strict=True))
            lost = sum(a > b for a, b in zip(before, after, strict=True))
            change = replace(
                change,
                gained=gained,
                lost=lost,
                p=mcnemar(gained, lost),
                needed=needed_pairs(gained + lost, len(both)),
            )
        found.append(change)
    return found


def _is_mean(values: Sequence[float], score: TaskScore) -> bool:
    return bool(np.isclose(np.mean(values), score.value, rtol=1e-6, atol=1e-9))


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    few_shot: int | Mapping[str, int] | None = None,
    task_folder: str | Path | None = None,
    chat: bool = False,
    batch_size: int = 8,
    seed: int = 0,
) -> TaskRun:
    """Score a model on tasks of the lm-evaluation-harness.

    A task may download its data set: naming it asks for that. Tasks in `task_folder` can use files.

    Args:
        model: In eval mode, where it shall run.
        tokenizer: Its tokenizer.
        tasks: Names that the harness knows, or that `task_folder` defines.
        limit: At most this many documents of each task.
        few_shot: Examples before each question, for all tasks or by task (`PRESETS`); the task's
            own number by default.
        task_folder: A folder with task definitions (.yaml), beside the harness's own.
        chat: Ask through the tokenizer's chat template.
        batch_size: Requests run together.
        seed: Of the choice of few-shot examples and of sampling.

    Returns:
        A score per task and metric, and every document's own.

    Raises:
        PrunekitError: The harness is not installed, a task is unknown or its data can't be had, or
            there are several processes.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise PrunekitError(f"lm-eval is not installed: run {install('eval')}")
    if distributed.world_size() > 1:
        raise PrunekitError(
            "lm-eval tasks run in one process: start prunekit eval without launcher"
        )
    if not tasks:
        raise PrunekitError("no tasks: name some, such as arc_easy or gsm8k")
    if task_folder is not None and not Path(task_folder).is_dir():
        raise PrunekitError(
            f"task folder {task_folder} does not exist: give a folder of .yaml files"
        )
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    manager = TaskManager(include_path=None if task_folder is None else str(task_folder))
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    parts: list[Mapping[str, Any]] = []
    for shots, asked in _by_shots(tasks, few_shot):
        try:
            found = lm_eval.simple_evaluate(
                wrapped,
                tasks=asked,
                task_manager=manager,
                num_fewshot=shots,
                limit=limit,
                apply_chat_template=chat,
                log_samples=True,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except KeyError as error:
            raise PrunekitError(
                f"lm-eval does not know one of {', '.join(asked)} ({error.args[0]}): list its "
                "tasks with `lm-eval ls tasks`, or give the folder that defines yours"
            ) from error
        except (OSError, ValueError, ImportError) as error:
            raise PrunekitError(
                f"lm-eval could not run {', '.join(asked)} ({one_line(error)}): check the "
                "network, the task's data set and the packages that it needs"
            ) from error
        parts.append(found)
    return TaskRun(
        tuple(score for part in parts for score in _scores(part)),
        tuple(item for part in parts for item in _items(part)),
        {name: tuple(below) for part in parts for name, below in _groups(part).items()},
    )


def _by_shots(
    tasks: Sequence[str], few_shot: int | Mapping[str, int] | None
) -> list[tuple[int | None, list[str]]]:
    """Tasks that are asked with the same number of examples, together."""
    found: dict[int | None, list[str]] = {}
    for task in tasks:
        shots = few_shot.get(task) if isinstance(few_shot, Mapping) else few_shot
        found.setdefault(shots, []).append(task)
    return list(found.items())


def _groups(found: Mapping[str, Any]) -> Mapping[str, Sequence[str]]:
    return {name: below for name, below in (found.get("group_subtasks") or {}).items() if below}


def _items(found: Mapping[str, Any]) -> Iterator[TaskItem]:
    """The harness's logged samples."""
    for task, samples in (found.get("samples") or {}).items():
        for sample in samples:
            asked = sample.get("metrics") or [
                name for name, value in sample.items() if isinstance(value, bool | float)
            ]
            values = {
                name: float(sample[name])
                for name in asked
                if isinstance(sample.get(name), bool | int | float | np.number)
            }
            yield TaskItem(
                task,
                str(sample.get("filter", "none")),
                int(sample["doc_id"]),
                str(sample.get("doc_hash", "")),
                values,
                str(sample.get("target", ""))[:_LONGEST],
                str(sample.get("filtered_resps", ""))[:_LONGEST],
            )


def _scores(found: Mapping[str, Any]) -> list[TaskScore]:
    """The harness's "metric,filter" numbers, the standard errors beside what they belong to."""
    scores = []
    for task, table in found["results"].items():
        filters = {key.partition(",")[2] for key in table if "," in key}
        for key, value in table.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = table.get(f"{metric}_stderr,{kind}")
            scores.append(
                TaskScore(
                    task,
                    metric if len(filters) == 1 else key,
                    float(value),
                    float(stderr) if isinstance(stderr, int | float) else None,
                    found.get("n-samples", {}).get(task, {}).get("effective"),
                    found.get("higher_is_better", {}).get(task, {}).get(metric),
                )
            )
    return scores
