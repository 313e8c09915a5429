"""Tasks of EleutherAI's lm-evaluation-harness, for models that prunekit has pruned.

What the field quotes (ARC, HellaSwag, MMLU, GSM8K, …) is run by the harness itself; this module
only hands it a model that is loaded already, dropped sublayers, packed weights and all.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prunekit.errors import PrunekitError, install, one_line
from prunekit.process import distributed


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


def run_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    few_shot: int | None = None,
    task_folder: str | Path | None = None,
    chat: bool = False,
    batch_size: int = 8,
    seed: int = 0,
) -> list[TaskScore]:
    """Score a model on tasks of the lm-evaluation-harness.

    A task may download its data set: naming it asks for that. Tasks in `task_folder` can use files.

    Args:
        model: In eval mode, where it shall run.
        tokenizer: Its tokenizer.
        tasks: Names that the harness knows, or that `task_folder` defines.
        limit: At most this many documents of each task.
        few_shot: Examples before each question; the task's own number by default.
        task_folder: A folder with task definitions (.yaml), beside the harness's own.
        chat: Ask through the tokenizer's chat template.
        batch_size: Requests run together.
        seed: Of the choice of few-shot examples and of sampling.

    Returns:
        A score per task and metric, in the harness's order.

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
    try:
        found = lm_eval.simple_evaluate(
            wrapped,
            tasks=list(tasks),
            task_manager=manager,
            num_fewshot=few_shot,
            limit=limit,
            apply_chat_template=chat,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except KeyError as error:
        raise PrunekitError(
            f"lm-eval does not know one of {', '.join(tasks)} ({error.args[0]}): list its tasks "
            "with `lm-eval ls tasks`, or give the folder that defines yours"
        ) from error
    except (OSError, ValueError, ImportError) as error:
        raise PrunekitError(
            f"lm-eval could not run {', '.join(tasks)} ({one_line(error)}): check the network, "
            "the task's data set and the packages that it needs"
        ) from error
    return _scores(found)


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
