"""The names of the tasks, and the names they had in earlier versions.

Importing it is cheap, so that a request can be checked before anything runs. It holds no items.
"""

import functools
import logging
from collections.abc import Iterable

from lib.errors import UserError, suggest

CLASSIFY = {
    "topic": "which module a passage of documentation is about",
    "code_origin": "which package a function comes from",
    "digits": "the handwritten digit in a picture",
}
GENERATE = {"retrieval": "the value that followed a key many tokens ago"}
HARNESS = "lm_eval:"  # before the name of a task of lm-evaluation-harness (`lib.measure.quality.lm_eval`)
# Former names and the present ones; `lib.report.records.migration.TASKS` holds the same for stored records.
RENAMED = {"recall": "retrieval"}

log = logging.getLogger(__name__)


def check_tasks(names: Iterable[str]) -> list[str]:
    """Return the present names of the tasks, in order. A former name is accepted, with one log line per process.

    Raises UserError for a name that is not a task.
    """
    known = [*CLASSIFY, *GENERATE]
    present = []
    for name in names:
        name = _present(name)
        if name not in known and not name.startswith(HARNESS):
            raise UserError(
                f'unknown task "{name}"; expected one of {", ".join(known)}, or {HARNESS}NAME.{suggest(name, known)}'
            )
        present.append(name)
    return present


def classifies(name: str) -> bool:
    """Return whether a task is answered by the likeliest of several labels."""
    return name in CLASSIFY or name.startswith(HARNESS)


@functools.cache
def _present(name: str) -> str:
    if name in RENAMED:
        log.warning('task "%s" is now called "%s"; please use the new name', name, RENAMED[name])
    return RENAMED.get(name, name)
