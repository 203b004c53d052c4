"""Errors that a user can act on, each in one line. Independent of who raises them and how they are printed."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a request, in one line: what, where, what was expected, what to do. `build.py` exits with 2."""


class NotApplicable(UserError):
    """An optimization has nothing to act on in this model, cannot act on it as loaded, or cannot reach the requested
    strength: a result, not a fault.

    Raised in a template's cell, it ends the run with status `not_applicable` and its message as the reason.
    """

    def _render_traceback_(self) -> list[str]:
        return [f"Not applicable: {self}"]


class ClusterLost(Exception):
    """The scheduler or the last worker of a cluster disappeared while a build used it; the message is one line."""


def suggest(name: str, valid: Iterable[str]) -> str:
    """Return ` Did you mean "x"?` for the nearest valid name, or an empty string if none is close."""
    near = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f' Did you mean "{near[0]}"?' if near else ""
