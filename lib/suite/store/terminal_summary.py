"""A finished run in a few lines for the terminal: its verdict, three numbers, the path of its report."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.suite.store.result_folder import Folder

NUMBERS = 3


def lines(folder: Folder, stem: str, shown: Callable[[Path], Path]) -> list[str]:
    """Return the lines of one run; none for a failed run, which is reported elsewhere.

    `shown` returns the form in which a path is printed.
    """
    from lib.report.analysis import summary
    from lib.report.records import record as records
    from lib.report.text import sentence

    try:
        record = records.read(folder.of(stem, ".json"))
    except UserError:
        return []
    if record.status == "failed":
        return []
    lines = [f"{stem}: {summary.sentence(record)}"]
    first = {m.dimension: m for m in reversed(summary.chosen(record))} if record.status == "ok" else {}
    by_dimension = [first[name] for name in ("performance", "accuracy", "resources", "efficiency") if name in first]
    numbers = [summary.number(m, sentence.subject(m)) for m in by_dimension[:NUMBERS]]
    lines += [f"  {' · '.join(map(_number, numbers))}"] if numbers else []
    return [*lines, f"  {shown(folder.of(stem, '.html'))}"]


def _number(number: Any) -> str:
    # "16 answers unchanged" needs no name before it.
    phrase = number.change if "answers unchanged" in number.change else f"{number.name} {number.change}"
    return f"{phrase} ({number.spread})" if number.spread else phrase
