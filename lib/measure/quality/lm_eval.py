"""Multiple-choice tasks of lm-evaluation-harness, run on the same model in the same process through its Python API.

`lm_eval:NAME` names a task of the harness, `lm_eval:PATH.yaml` a task described in a file. Prompts, examples and
choices are the harness's own; it returns the log-likelihood of every choice per item, so that arms are compared as in
any other task. All caches of the harness are off: they are named after the model, and an optimized model must never
inherit the results of its baseline (issues 2715 and 4063 there). An optional extra:
`pip install "lm-eval>=0.4.13,<0.5"`. Knows nothing of verdicts.

Shapes: N items, L choices, as many as the item with the most has.
"""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import UserError
from lib.models.loading import Loaded
from lib.models.structure.anatomy import anatomy
from lib.models.tasks.registry import HARNESS

EXTRA = 'pip install "lm-eval>=0.4.13,<0.5"'
CHUNK_ELEMENTS = 2**26  # logits held at a time; the harness holds those of all tokens of a batch
TOKENS = 256  # of an item, about
NO_CHOICE = -1e9  # the log-likelihood of a choice that an item does not have


def scores(
    loaded: Loaded, task: str, split: str, limit: int, seed: int = 0
) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Return (names of the choices, ids of the items, truth_N the right choice's index, scores_NL log-likelihoods).

    Choices that an item lacks score NO_CHOICE. Of the task's items every second one belongs to the split "final", the
    others to every other split; at most `limit` are used. Raises UserError where the harness is not installed, or the
    task cannot be loaded or is not multiple choice.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(f"{task}: lm-evaluation-harness is not installed ({error.name}); {EXTRA}") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    harness_task = _task(task)
    batch = max(1, min(16, CHUNK_ELEMENTS // (anatomy(loaded.model).vocabulary * TOKENS)))
    wrapped = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch, device=loaded.device)
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    caches = {"use_cache": None, "cache_requests": False}
    chosen = range(0 if split == "final" else 1, len(harness_task.eval_docs), 2)[:limit]
    if not chosen:
        raise UserError(f'{task}: holds {len(harness_task.eval_docs)} items, none for the split "{split}"')
    results = lm_eval.simple_evaluate(
        model=wrapped,
        tasks=[harness_task],
        samples={harness_task.config.task: [*chosen]},
        log_samples=True,
        bootstrap_iters=0,
        **caches,
        **seeds,
    )
    [samples] = results["samples"].values()
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    values = [[float(score) for score, _ in sample["filtered_resps"]] for sample in samples]
    most = max(map(len, values))
    scores_NL = np.array([row + [NO_CHOICE] * (most - len(row)) for row in values])
    truth_N = np.array([_index(harness_task, sample) for sample in samples])
    return [str(choice) for choice in range(most)], [f"{task}-{s['doc_id']}" for s in samples], truth_N, scores_NL


def _task(task: str) -> Any:
    """Return the harness's task object."""
    from lm_eval.tasks import TaskManager, get_task_dict

    name = task.removeprefix(HARNESS)
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and not path.is_file():
        raise UserError(f"{task}: there is no such file")
    try:
        if path.is_file():
            manager = TaskManager(include_path=str(path.resolve().parent), include_defaults=False)
            name = next(iter(manager.all_tasks)) if len(manager.all_tasks) == 1 else path.stem
        else:
            manager = TaskManager()
        [harness_task] = get_task_dict([name], manager).values()
    except Exception as error:  # an unknown name or a data set that cannot be fetched: every library has its own class
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{task}: the harness cannot load this task ({why})") from None
    if getattr(harness_task, "OUTPUT_TYPE", None) != "multiple_choice":
        raise UserError(f"{task}: answers are compared by log-likelihood; expected a task of multiple choice")
    return harness_task


def _index(task: Any, sample: dict[str, Any]) -> int:
    """Return the index of the right choice of an item."""
    target = sample["target"]
    if isinstance(target, str) and not target.lstrip("-").isdigit():
        return [str(choice) for choice in task.doc_to_choice(sample["doc"])].index(target)
    return int(target)
