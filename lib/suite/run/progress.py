"""Progress of a build: a live table in a terminal, plain lines elsewhere. Independent of processes."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

STYLES = {"ok": "green", "not_applicable": "yellow", "failed": "red", "running": "cyan"}
SHOWN_ENDED = 8


class Reporter(Protocol):
    """Receives the progress of jobs: the progress table, or, on a cluster's worker, an object that forwards it to the
    build.
    """

    side_by_side: int

    def start(self, stem: str, doing: Callable[[], str]) -> None:
        """Register a started job; `doing` returns its current step."""

    def end(self, stem: str, status: str, seconds: float, reason: str | None) -> None:
        """Register an ended job."""

    def line(self, text: str) -> None:
        """Print a line."""


@dataclass
class Progress:
    """The waiting, running and ended jobs of a build. `expected` maps a stem to its expected seconds."""

    waiting: list[str]
    side_by_side: int
    expected: Mapping[str, float] = field(default_factory=dict)
    running: dict[str, tuple[float, Callable[[], str]]] = field(default_factory=dict)
    ended: list[tuple[str, str, float]] = field(default_factory=list)
    console: Console = field(default_factory=lambda: Console(file=sys.stderr, highlight=False, soft_wrap=True))
    live: Live | None = None

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self.live = Live(console=self.console, get_renderable=self.picture, refresh_per_second=2, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()

    @property
    def total(self) -> int:
        """How many jobs the build runs."""
        return len(self.waiting) + len(self.running) + len(self.ended)

    def start(self, stem: str, doing: Callable[[], str]) -> None:
        """Register a started job; `doing` returns its current step."""
        if stem in self.waiting:
            self.waiting.remove(stem)
        self.running[stem] = (time.monotonic(), doing)

    def end(self, stem: str, status: str, seconds: float, reason: str | None) -> None:
        """Register an ended job."""
        self.running.pop(stem, None)
        self.ended.append((stem, status, seconds))
        left = self.left()
        after = f", {duration(left)} left" if left and (self.waiting or self.running) else ""
        text = f"[{len(self.ended)}/{self.total}] {stem}: {status}, {duration(seconds)}{after}"
        self.line(f"{text}: {reason}" if reason else text, STYLES.get(status, ""))

    def line(self, text: str, style: str = "") -> None:
        """Print a line, above the table if there is one."""
        self.console.print(Text(text, style=style if self.console.is_terminal else ""))

    def left(self) -> float | None:
        """Return the estimated remaining seconds, from earlier runs of the same jobs or from this build."""
        took = [seconds for _, _, seconds in self.ended]
        usual = sum(took) / len(took) if took else None
        now, total = time.monotonic(), 0.0
        for stem in [*self.waiting, *self.running]:
            seconds = self.expected.get(stem, usual)
            if seconds is None:
                return None
            total += seconds if stem in self.waiting else max(seconds - (now - self.running[stem][0]), 0.0)
        return total / self.side_by_side

    def picture(self) -> Group:
        """Return the table of running jobs, with a summary line."""
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for stem, status, seconds in self.ended[-SHOWN_ENDED:]:
            table.add_row(Text(status, style=STYLES.get(status, "")), stem, duration(seconds), "")
        for stem, (began, doing) in self.running.items():
            table.add_row(Text("running", style="cyan"), stem, duration(time.monotonic() - began), doing())
        failed = sum(status == "failed" for _, status, _ in self.ended)
        left = self.left()
        done = len(self.ended) - failed
        summary = f"{len(self.running)} running, {done} done, {failed} failed, {len(self.waiting)} waiting"
        summary += f", {duration(left)} left" if left is not None else ""
        return Group(table, Text(summary, style="bold"))


def duration(seconds: float) -> str:
    """Return seconds in words: `3.2 s`, `4 min 10 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
