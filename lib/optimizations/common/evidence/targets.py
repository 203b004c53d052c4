"""Targets that were fixed before the first run: whether a value reaches its goal. Knows no optimization."""


def is_reached(value: float | None, how: str, goal: float) -> bool | str:
    """Return whether `value` is "at least" or "at most" (`how`) the goal; "unknown" where it was not measured."""
    if value is None:
        return "unknown"
    return bool(value >= goal if how == "at least" else value <= goal)
