"""Which of the four dimensions a run was asked to measure: all of them, unless `WORKBENCH_DIMENSIONS` names some.

The runner sets the variable (`--dimension`); functions that measure whole dimensions leave out what nobody asked for,
and `lib.report.records.record.build` keeps only what was asked for, so that no template needs to know of it.
"""

import os

from lib.errors import UserError, suggest
from lib.measure.metrics.catalogue import DIMENSIONS

VARIABLE = "WORKBENCH_DIMENSIONS"


def asked() -> tuple[str, ...] | None:
    """Return the dimensions that were asked for, in their order; None where all are. Raises UserError for another."""
    named = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    for name in named:
        if name not in DIMENSIONS:
            raise UserError(f'{VARIABLE}: unknown dimension "{name}".{suggest(name, DIMENSIONS)}')
    chosen = tuple(name for name in DIMENSIONS if name in named)
    return None if not chosen or chosen == DIMENSIONS else chosen


def wanted(*names: str) -> bool:
    """Return whether any of these dimensions is to be measured."""
    chosen = asked()
    return chosen is None or bool(set(names) & set(chosen))


def left_out() -> str:
    """Return why a dimension is left out, for the notebook that goes on without it."""
    return f"left out: only {' and '.join(asked() or DIMENSIONS)} was asked for"
