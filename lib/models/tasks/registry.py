"""The names of the tasks, and the names they had in earlier versions.

Importing it is cheap, so that a request can be checked before anything runs. It holds no items.
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
# Former names and the present ones; `lib.report.records.migration.TASKS` holds the same for stored records.
RENAMED = {"recall": "retrieval"}

log = logging.getLogger(__name__)


def check_tasks(names: Iterable[str]) -> list[str]:
    """Return the present names of the tasks, in order, each once, the paths of files absolute. A former name is
    accepted, with one log line per process.

    Raises UserError for a name that is not a task, of the harness either.
    """
    known = [*CLASSIFY, *GENERATE, *BENCHMARKS]
    present = []
    for name in names:
        name = _present(name)
        if name.startswith(HARNESS):
            name = harness_names.check(name)
        elif name not in known:
            raise UserError(
                f'unknown task "{name}"; expected one of {", ".join(known)}, or {HARNESS}NAME.{suggest(name, known)}'
            )
        present.append(name)
    return list(dict.fromkeys(present))


def classifies(name: str) -> bool:
    """Return whether a task is put item by item, with answers that are right or wrong (of the harness: mostly)."""
    return name in CLASSIFY or name in BENCHMARKS or name.startswith(HARNESS)


@functools.cache
def _present(name: str) -> str:
    if name in RENAMED:
        log.warning('task "%s" is now called "%s"; please use the new name', name, RENAMED[name])
    return RENAMED.get(name, name)
