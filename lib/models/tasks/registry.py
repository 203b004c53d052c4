"""The names of the tasks, and their former names.

Cheap to import, so that a request can be checked before anything runs. Holds no items.
"""

import functools
import logging
from collections.abc import Iterable

from lib.errors import UserError, suggest
from lib.models.tasks import harness_names
from lib.models.tasks.benchmarks import BENCHMARKS
from lib.models.tasks.harness_names import HARNESS

CLASSIFY = {
    "topic": "which module a passage of documentation is about",
    "code_origin": "which package a function comes from",
    "digits": "the handwritten digit in a picture",
}
GENERATE = {"retrieval": "the value that followed a key many tokens ago"}
# Former name → current name; `lib.report.records.migration.TASKS` holds the same for stored records.
RENAMED = {"recall": "retrieval"}

log = logging.getLogger(__name__)


def check_tasks(names: Iterable[str]) -> list[str]:
    """Return the current names of the tasks, in order, without duplicates and with absolute paths of files.

    A former name is accepted, with one log line per process. Raises UserError for a name that is neither a task here
    nor one of the harness.
    """
    known = [*CLASSIFY, *GENERATE, *BENCHMARKS]
    checked = []
    for name in names:
        name = _current(name)
        if name.startswith(HARNESS):
            name = harness_names.check(name)
        elif name not in known:
            raise UserError(
                f'unknown task "{name}"; expected one of {", ".join(known)}, or {HARNESS}NAME.{suggest(name, known)}'
            )
        checked.append(name)
    return list(dict.fromkeys(checked))


def classifies(name: str) -> bool:
    """Return whether a task has items with right and wrong answers, as most tasks of the harness have."""
    return name in CLASSIFY or name in BENCHMARKS or name.startswith(HARNESS)


@functools.cache
def _current(name: str) -> str:
    if name in RENAMED:
        log.warning('task "%s" is now called "%s"; please use the new name', name, RENAMED[name])
    return RENAMED.get(name, name)
