"""Runs tasks of lm-evaluation-harness on the same model in the same process, through its Python API.

`lm_eval:NAME` names a task or a group of tasks of the harness, `lm_eval:PATH.yaml` a task described in a file. Prompts,
examples, choices, stop sequences and scores are the harness's own. Its `loglikelihood` requests are answered by
`lib.models.decoding.continuations`, which shares prefixes; every item scores as in the harness run by itself. Choices,
single continuations and generated answers are returned as `Classified`, rolling perplexity as `Rolled`.

All caches of the harness are off: they are named after the model, and an optimized model must never inherit its
baseline's results (issues 2715 and 4063 of the harness). `lib.measure.quality.answer_cache` caches the answers of
unchanged models instead. Knows nothing about verdicts.

Shapes: N items, L choices (the largest number of any item).
"""

import hashlib
import inspect
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from lib.errors import UserError
from lib.files import hash_of
from lib.measure.quality import answer_cache
from lib.measure.quality.answers import Classified, Rolled
from lib.measure.quality.benchmarks import NO_CHOICE
from lib.models.decoding import continuations
from lib.models.loading import Loaded
from lib.models.structure.anatomy import anatomy
from lib.models.tasks import harness_names, splits
from lib.models.tasks.benchmarks import BENCHMARKS
from lib.models.tasks.registry import HARNESS

INSTALL = 'pip install "lm-eval>=0.4.13,<0.5"'
CHUNK_ELEMENTS = 2**26  # logits held at a time while answers are generated
TOKENS = 256  # of a typical item
SCORES = {"acc": "accuracy", "acc_norm": "accuracy_norm", "exact_match": "exact_match"}  # the harness's names and ours
ROLLING = {"word_perplexity": ("word", 1.0), "byte_perplexity": ("byte", 1.0), "bits_per_byte": ("byte", 1.0)}
LONGEST_WORD = 30  # bytes of a mean word; a text with longer ones has no spaces, such as Chinese
CHOICES = "multiple_choice"
UNCONDITIONAL = "acc_mutual_info"  # a score that also needs every choice's likelihood without the question


def answers(loaded: Loaded, task: str, split: str, limit: int, seed: int = 0) -> Classified | Rolled:
    """Return the answers to at most `limit` items of a task's split (of all tasks together, for a group).

    The task's name determines which items belong to a split (`lib.models.tasks.splits`). Raises UserError if the
    harness is not installed, the task cannot be loaded, a group mixes kinds of tasks, or no score marks single items as
    right or wrong.
    """
    harness_tasks, manager = _tasks(task)
    each = max(1, math.ceil(limit / len(harness_tasks)))
    # Of a file its name, so that the same items are drawn wherever it lies.
    drawn = f"{HARNESS}{Path(task.removeprefix(HARNESS)).name}" if task.endswith(harness_names.FILES) else task
    indices = {
        name: splits.chosen(f"{drawn}/{name}" if len(harness_tasks) > 1 else drawn, len(member.eval_docs), split, each)
        for name, member in harness_tasks.items()
    }
    docs = {name: [harness_tasks[name].eval_docs[index] for index in chosen] for name, chosen in indices.items()}
    question: dict[str, object] = {
        "harness": [task, version("lm_eval"), seed],
        "items": indices,
        "docs": json.dumps(docs, default=str),
        "examples": {name: _examples(member) for name, member in harness_tasks.items()},
        "programs": {name: _programs(member) for name, member in harness_tasks.items()},
        "configurations": {name: json.dumps(_plain(member.dump_config())) for name, member in harness_tasks.items()},
    }
    kinds = {member.OUTPUT_TYPE for member in harness_tasks.values()}
    if len(kinds) > 1:
        raise UserError(f"{task}: mixes tasks of kinds {', '.join(sorted(kinds))}; name the tasks one by one")
    about = f"{task}, {len(harness_tasks)} tasks" if len(harness_tasks) > 1 else task
    arrays, day = answer_cache.known_or(
        loaded, question, lambda: _arrays(task, _samples(loaded, harness_tasks, manager, indices, seed))
    )
    ids = arrays["ids_N"].tolist()
    if "loss_N" in arrays:
        return Rolled(task, ids, arrays["loss_N"], str(arrays["unit"]), about)
    scores = {name.removeprefix("right:"): right for name, right in arrays.items() if name.startswith("right:")}
    metric = _judged(task, scores)
    others = {name: right.astype(bool) for name, right in scores.items() if name != metric}
    fields: dict[str, Any] = {"metric": metric, "others": others, "about": about, "answered": day}
    fields["given_N"] = arrays["given_N"]
    if kinds == {CHOICES}:
        fields["chance"] = float(arrays["chance"])
    right_N = scores[metric].astype(int)
    return Classified(task, ["wrong", "right"], ids, np.ones_like(right_N), right_N, arrays["scores_NL"], **fields)


def _judged(task: str, scores: dict[str, np.ndarray]) -> str:
    """Return the name of the judged score: the usually reported one if known, else the normalised accuracy, else the
    first available one.
    """
    benchmark = BENCHMARKS.get(task.removeprefix(HARNESS))
    preferred = [benchmark.metric] if benchmark else []
    return next(name for name in (*preferred, "accuracy_norm", "accuracy", *scores) if name in scores)


def _samples(
    loaded: Loaded, harness_tasks: dict[str, Any], manager: Any, indices: dict[str, list[int]], seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Return the harness's log of every item, by task, in item order."""
    import lm_eval

    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed)
    caches = {"use_cache": None, "cache_requests": False}
    results = lm_eval.simple_evaluate(
        model=wrapped(loaded),
        tasks=[*harness_tasks.values()],
        task_manager=manager,
        samples=indices,
        log_samples=True,
        bootstrap_iters=0,
        **caches,
        **seeds,
    )
    by_task: dict[str, list[dict[str, Any]]] = {}
    for name, samples in results["samples"].items():
        first_filter = samples[0]["filter"] if samples else None
        filtered = [sample for sample in samples if sample["filter"] == first_filter]
        by_task[name] = sorted(filtered, key=lambda sample: sample["doc_id"])
    return by_task


def wrapped(loaded: Loaded, shared: bool = True) -> Any:
    """Return the model wrapped for the harness; with `shared`, log-likelihoods are computed with shared prefixes.

    Raises UserError if the harness is not installed.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(f"lm-evaluation-harness is not installed ({error.name}); {INSTALL}") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    class SharedPrefixes(HFLM):
        """The harness's own wrapper, whose token log-likelihoods are computed with shared prefixes."""

        def _loglikelihood_tokens(
            self, requests: list, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            return continuations.loglikelihoods(self.model, [(context, text) for _, context, text in requests])

    batch = max(1, min(16, CHUNK_ELEMENTS // (anatomy(loaded.model).vocabulary * TOKENS)))
    options = {"tokenizer": loaded.tokenizer, "batch_size": batch, "device": loaded.device}
    return (SharedPrefixes if shared else HFLM)(pretrained=loaded.model, **options)


def _arrays(task: str, samples: dict[str, list[dict[str, Any]]]) -> dict[str, np.ndarray]:
    """Return the arrays that are kept of the samples: item ids with likelihoods and each score's correctness, or with
    the documents' losses.
    """
    items = [(f"{name}-{sample['doc_id']}", sample) for name, members in samples.items() for sample in members]
    ids_N = np.array([identity for identity, _ in items])
    metrics = items[0][1]["metrics"]
    rolling = next((name for name in ROLLING if name in metrics), None)
    if (
        rolling == "word_perplexity"
        and "byte_perplexity" in metrics
        and _without_spaces([sample for _, sample in items])
    ):
        rolling = "byte_perplexity"
    if rolling:
        pairs_N2 = np.array([sample[rolling] for _, sample in items], dtype=float)
        loss_N = -pairs_N2[:, 0] / pairs_N2[:, 1].mean()
        return {"ids_N": ids_N, "loss_N": loss_N, "unit": np.array(ROLLING[rolling][0])}
    scores = {ours: [sample.get(theirs) for _, sample in items] for theirs, ours in SCORES.items() if theirs in metrics}
    right = {f"right:{name}": np.array(values, dtype=float) for name, values in scores.items() if _binary(values)}
    if not right:
        raise UserError(f"{task}: none of its scores ({', '.join(metrics)}) marks single items as right or wrong")
    choices = [_likelihoods(sample) for _, sample in items]
    if UNCONDITIONAL in metrics:
        choices = [row[: len(row) // 2] for row in choices]
    most = max(map(len, choices))
    scores_NL = np.array([row + [NO_CHOICE] * (most - len(row)) for row in choices])
    uniform = float(np.mean([1 / max(1, len(row)) for row in choices]))
    chance = max(uniform, _most_frequent([sample for _, sample in items]))
    given_N = np.array([_given(sample, row) for (_, sample), row in zip(items, choices)])
    return {"ids_N": ids_N, "scores_NL": scores_NL, "given_N": given_N, "chance": np.array(chance)} | right


def _without_spaces(samples: list[dict[str, Any]]) -> bool:
    """Return whether the words of the documents are so long that they are no unit. Depends on the text alone, so both
    arms use the same unit.
    """
    words, size = (sum(sample[name][1] for sample in samples) for name in ("word_perplexity", "byte_perplexity"))
    return size > LONGEST_WORD * words


def _given(sample: dict[str, Any], likelihoods: list[float]) -> str:
    """Return an item's answer: the numbers of the likeliest choice and of the likeliest per character, or a hash of the
    generated text.
    """
    if any(isinstance(answer, (tuple, list)) for answer in sample["filtered_resps"]):
        texts = [str(arguments[-1]).removeprefix(" ") for arguments in sample.get("arguments", ())][: len(likelihoods)]
        lengths = [max(1, len(text)) for text in texts] if len(texts) == len(likelihoods) else [1] * len(likelihoods)
        return f"{np.argmax(likelihoods)} {np.argmax(np.divide(likelihoods, lengths))}"
    return hashlib.sha256(json.dumps(sample["filtered_resps"], default=str).encode()).hexdigest()[:16]


def _most_frequent(samples: list[dict[str, Any]]) -> float:
    """Return the accuracy of always giving the most frequent answer, if all items have the same choices (yes may be
    right more often than no); 0 if items have their own choices.
    """
    choices = {tuple(str(arguments[-1]) for arguments in sample.get("arguments", ())) for sample in samples}
    if len(choices) > 1 or () in choices:
        return 0.0
    return max(Counter(str(sample.get("target")) for sample in samples).values()) / len(samples)


def _binary(values: list[Any]) -> bool:
    return all(value in (0, 1) for value in values)


def _likelihoods(sample: dict[str, Any]) -> list[float]:
    """Return the log-likelihoods of an item's choices; 0 for a generated answer, which has none."""
    answers = sample["filtered_resps"]
    return [float(answer[0]) for answer in answers if isinstance(answer, (tuple, list))] or [0.0]


def _plain(config: dict[str, Any]) -> dict[str, str]:
    """Return a task's configuration as text, with functions by name, since their addresses change."""
    return {key: getattr(value, "__qualname__", str(value)) for key, value in config.items()}


def _programs(member: Any) -> list[str]:
    """Return the hash of every file that holds a function of a task: other code in these files may shape prompts."""
    files = set()
    for function in [type(member), *vars(member.config).values()]:
        with suppress(TypeError, OSError):  # not a function, or a built-in
            files.add(inspect.getsourcefile(getattr(function, "func", function)))
    return sorted(hash_of(Path(file)) for file in files if file)


def _examples(member: Any) -> str | None:
    """Return a hash of the documents that a task's few-shot examples are drawn from; None if it uses no examples."""
    if not member.config.num_fewshot:
        return None
    return hashlib.sha256(json.dumps([*member.fewshot_docs()], default=str).encode()).hexdigest()


def _of_group(manager: Any, described: dict[str, Any], folder: Path) -> Any:
    """Return a task manager (of class `manager`) that knows the tasks of a group. It indexes the files in the group's
    folder, and the harness's own tasks only if the group lists others, since indexing these takes seconds.
    """
    local = manager(include_path=str(folder), include_defaults=False)
    return local if harness_names.listed(described) <= {*local.all_tasks} else manager(include_path=str(folder))


@contextmanager
def _within(folder: Path) -> Iterator[None]:
    """Make `folder` the working directory inside the context: a task file names its data relative to its folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _tasks(task: str) -> tuple[dict[str, Any], Any]:
    """Return the harness's task objects by name (several for a group), and the manager that loaded them."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"{task}: lm-evaluation-harness is not installed ({error.name}); {INSTALL}") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    name = task.removeprefix(HARNESS)
    path = Path(name).resolve() if name.endswith(harness_names.FILES) else None
    described = {} if path is None else harness_names.described(path, task)
    try:
        if path is None:
            manager = TaskManager()
        elif "group" in described:
            manager, name = _of_group(TaskManager, described, path.parent), str(described["group"])
        else:
            manager, name = TaskManager(include_defaults=False), str(path)
        with nullcontext() if path is None else _within(path.parent):
            members = manager.load([name])["tasks"]
    except Exception as error:  # unknown name, or data that cannot be fetched: libraries raise classes of their own
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{task}: the harness cannot load this task ({why})") from None
    if not members:
        raise UserError(f"{task}: is not a task of the harness")
    return members, manager
