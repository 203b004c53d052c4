"""Multiple-choice tasks of lm-evaluation-harness, asked of the same model in the same process, by its Python API.

`lm_eval:NAME` names a task of the harness, `lm_eval:PATH.yaml` one that is described in a file. Its prompts, examples
and choices are the harness's own; the log-likelihood of every choice comes back per item, so that arms are compared as
for any other task. Every cache of the harness is off: it names results after the model they were asked of, and an
optimized model must never inherit those of its baseline (issues 2715 and 4063 there). An optional extra:
`pip install "lm-eval>=0.4.13,<0.5"`. Knows nothing of verdicts.

Shapes: N items, L choices, as many as the item with the most has.
"""

import logging
from pathlib import Path

import numpy as np

from lib.errors import UserError
from lib.models.structure.anatomy import anatomy
from lib.models.tasks.registry import HARNESS

EXTRA = 'pip install "lm-eval>=0.4.13,<0.5"'
CHUNK_ELEMENTS = 2**26  # logits held at a time; the harness keeps those of all tokens of a batch
TOKENS = 256
NEVER = -1e9  # of a choice that an item does not have


def scores(
    loaded, task: str, split: str, limit: int, seed: int = 0
) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Return (names of the choices, ids of the items, truth_N the right choice's index, scores_NL log-likelihoods).

    An item with fewer choices than L has NEVER there. At most `limit` items: for the split "final" of every other item
    of the task, for any other split, by which something is chosen, of those between. Raises UserError where the harness
    is not installed, the task cannot be loaded, or is not one of multiple choice.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(f"{task}: lm-evaluation-harness is not installed ({error.name}); {EXTRA}") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found = _task(task)
    batch = max(1, min(16, CHUNK_ELEMENTS // (anatomy(loaded.model).vocabulary * TOKENS)))
    asked = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch, device=loaded.device)
    chance = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    caches = {"use_cache": None, "cache_requests": False}
    chosen = range(0 if split == "final" else 1, len(found.eval_docs), 2)[:limit]
    if not chosen:
        raise UserError(f'{task}: holds {len(found.eval_docs)} items, none for the split "{split}"')
    told = lm_eval.simple_evaluate(
        model=asked, tasks=[found], samples={found.config.task: [*chosen]}, log_samples=True, bootstrap_iters=0,
        **caches, **chance,
    )  # fmt: skip
    [samples] = told["samples"].values()
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    values = [[float(score) for score, _ in sample["filtered_resps"]] for sample in samples]
    most = max(map(len, values))
    scores_NL = np.array([row + [NEVER] * (most - len(row)) for row in values])
    truth_N = np.array([_index(found, sample) for sample in samples])
    return [str(choice) for choice in range(most)], [f"{task}-{s['doc_id']}" for s in samples], truth_N, scores_NL


def _task(task: str):
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
        [found] = get_task_dict([name], manager).values()
    except Exception as error:  # an unknown name, a data set that cannot be fetched: each library has its own
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{task}: the harness cannot load this task ({why})") from None
    if getattr(found, "OUTPUT_TYPE", None) != "multiple_choice":
        raise UserError(f"{task}: answers are compared by log-likelihood; expected a task of multiple choice")
    return found


def _index(task, sample: dict) -> int:
    """Return the index of the right choice of an item."""
    target = sample["target"]
    if isinstance(target, str) and not target.lstrip("-").isdigit():
        return [str(choice) for choice in task.doc_to_choice(sample["doc"])].index(target)
    return int(target)
