"""Check measured values against targets that were fixed before the first run."""


def is_reached(value: float | None, how: str, goal: float) -> bool | str:
    """Return whether `value` is "at least" or "at most" (`how`) the goal; "unknown" if `value` is None."""
    if value is None:
        return "unknown"
    return bool(value >= goal if how == "at least" else value <= goal)
