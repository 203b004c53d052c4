"""The progress of a notebook's run, as a line in the output of the running cell.

A cell that ends within a second shows nothing. The thread that updates the line wakes every two seconds for about a
millisecond, so that it does not disturb timings in the cell.
"""

import contextvars
import html
import threading
import time
from dataclasses import dataclass
from typing import Any

FIRST_SECONDS, EVERY_SECONDS = 1.0, 2.0


@dataclass(frozen=True)
class Place:
    """The position of a run: the cell's `number` of `total`, the heading above it, and the expected seconds of the cell
    and of the cells after it (`behind`); None where unknown.
    """

    number: int | None
    total: int
    heading: str
    seconds: float | None
    behind: float | None


def text(place: Place, seconds: float, over: bool) -> str:
    """Return the line after `seconds` of the cell; once the cell is `over`, a shorter one."""
    at = f"cell {place.number} of {place.total}" if place.number else "cell"
    parts = [at, place.heading] if place.heading else [at]
    if over:
        return " · ".join([*parts, duration(seconds)])
    known = place.seconds is not None and place.seconds > seconds
    parts.append(f"{duration(seconds)} of about {duration(place.seconds or 0)}" if known else duration(seconds))
    if place.behind is not None:
        parts.append(f"about {duration(max((place.seconds or 0) - seconds, 0) + place.behind)} to the end")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """Return whole seconds in words: `12 s`, `3 min 05 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def as_html(place: Place, line: str) -> str:
    """Return the line as HTML, with a progress bar of the finished cells."""
    text = html.escape(line)
    if not place.number:
        return f"<small>{text}</small>"
    bar = f'<progress value="{place.number - 1}" max="{place.total}" aria-label="cells that have run"></progress>'
    return f"<small>{bar} {text}</small>"


class ProgressLine(threading.Thread):
    """The progress line of one running cell; after `finish` it shows the time that the cell took."""

    def __init__(self, place: Place):
        super().__init__(name="cell progress", daemon=True)
        self.place = place
        self.began = time.monotonic()
        self.over = threading.Event()
        self.context = contextvars.copy_context()  # tells the display which cell this belongs to

    def run(self) -> None:
        """Show the line after a second, and update it until the cell is over."""
        if not self.over.wait(FIRST_SECONDS):
            self.context.run(self._follow)

    def _follow(self) -> None:
        from IPython.display import display

        handle = display(self._bundle(), raw=True, display_id=True)
        while not self.over.wait(EVERY_SECONDS):
            handle.update(self._bundle(), raw=True)
        handle.update(self._bundle(), raw=True)

    def _bundle(self) -> dict[str, Any]:
        line = text(self.place, time.monotonic() - self.began, self.over.is_set())
        shown = f"<small>{html.escape(line)}</small>" if self.over.is_set() else as_html(self.place, line)
        return {"text/html": shown, "text/plain": line}

    def finish(self) -> float:
        """End the line, and return the seconds since it began."""
        self.over.set()
        seconds = time.monotonic() - self.began
        self.join(timeout=EVERY_SECONDS)
        return seconds
