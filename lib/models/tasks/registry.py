"""Which tasks there are, by name: light, so that a request is checked before anything runs. Knows no item of them."""

from collections.abc import Iterable

from lib.errors import UserError, suggest

CLASSIFY = {
    "topic": "which module a passage of documentation is about",
    "code_origin": "which package a function comes from",
    "digits": "the handwritten digit in a picture",
}
GENERATE = {"retrieval": "the value that followed a key many tokens ago"}
HARNESS = "lm_eval:"  # before the name of a task of lm-evaluation-harness (`lib.measure.quality.lm_eval`)


def check_tasks(names: Iterable[str]) -> None:
    """Raise UserError for a name that is no task."""
    known = [*CLASSIFY, *GENERATE]
    for name in names:
        if name not in known and not name.startswith(HARNESS):
            raise UserError(
                f'unknown task "{name}"; expected one of {", ".join(known)}, or {HARNESS}NAME.{suggest(name, known)}'
            )


def classifies(name: str) -> bool:
    """Return whether a task is answered by the likeliest of several labels."""
    return name in CLASSIFY or name.startswith(HARNESS)
