"""Short phrases for a measurement, in one notation: "prefill 19 % faster", "answers unchanged", "weights 26 % smaller".

A change is that of the metric itself, in percent of the baseline or in points of a score, never of its reciprocal. A
number without a verdict is shown without a direction. Independent of records and pages.
"""

import re
from collections.abc import Iterable

from lib.measure.metrics.digits import MINUS, signed, with_ends
from lib.measure.metrics.measurement import Measurement
from lib.report.text import sentence
from lib.report.text.quantities import quantity, share
from lib.report.text.wording import words

MOST_WORDS = 25
CLAUSE = 6  # words that a cut text may lose in addition, if it then ends with a clause
WORD = re.compile(r"[^\W_]\S*")  # a sign alone, such as "%" or "×", is not a word
SENTENCE_END = re.compile(r"(?<=[.!?…])\s+(?=[A-Z])")
CALLED = ("better", "worse", "not_maintained")
OPEN = {"inconclusive": "undecided", "informative": "not judged", "unavailable": "not measured", "invalid": "invalid"}


def phrase(measurement: Measurement) -> str:
    """Return a measurement as a phrase: its name, and by how much it changed or why no change is claimed."""
    if sentence.same_answers(measurement):
        return _unchanged_answers(measurement)
    return f"{sentence.subject(measurement)} {outcome(measurement)}"


def outcome(measurement: Measurement) -> str:
    """Return the phrase of a measurement without its name: `19 % faster`, `unchanged`, `undecided`."""
    if sentence.same_answers(measurement):
        return "unchanged"
    if measurement.verdict in CALLED and (changed := change(measurement)):
        return changed
    if measurement.verdict in ("equivalent", "better", "worse"):
        return "unchanged" if measurement.verdict == "equivalent" else measurement.verdict
    return OPEN.get(measurement.verdict, words(measurement.verdict))


def value(measurement: Measurement) -> str:
    """Return a measurement as a table cell: the change in words if its verdict names one, else as a signed number."""
    if sentence.same_answers(measurement):
        return _unchanged_answers(measurement)
    if measurement.verdict in CALLED and (changed := change(measurement)):
        return changed
    if measurement.verdict in ("unavailable", "invalid", "not_exercised"):
        return words(measurement.verdict)
    if measurement.verdict == "equivalent":
        return "unchanged"
    return number(measurement) or quantity(measurement.optimized, measurement.unit)


def _unchanged_answers(measurement: Measurement) -> str:
    """Return `answers unchanged`, with the number of items where these were too few for a conclusion."""
    few = measurement.verdict == "inconclusive" and measurement.n
    return f"{measurement.n} answers unchanged" if few else "answers unchanged"


def change(measurement: Measurement) -> str:
    """Return the change of the metric itself in words: `19 % faster`, `4.1 points lower`; empty where there is nothing
    to compare.
    """
    known = sentence.change(measurement)
    if known is None:
        return ""
    value, _, _, unit = known
    size = share(abs(value) / 100) if unit == "%" else f"{abs(value):.1f} {unit}"
    if value == 0:
        return "unchanged"
    return f"{size} {_direction(measurement)[value > 0]}"


def _direction(measurement: Measurement) -> tuple[str, str]:
    """Return the words for a decrease and an increase of a metric, such as `lower` and `higher`."""
    if measurement.dimension == "performance":
        better, worse = sentence.comparatives(measurement)
        return (worse, better) if measurement.higher_is_better else (better, worse)
    if measurement.unit in ("bytes", "parameters"):
        return "smaller", "larger"
    return "lower", "higher"


def number(measurement: Measurement) -> str:
    """Return the change as a signed number: `+19 %`, `−0.4 points`; empty where there is nothing to compare.

    A change of 0 is `unchanged` only where the verdict says so; without a verdict it is a number like any other.
    """
    known = sentence.change(measurement)
    if known is None:
        return ""
    value, _, _, unit = known
    if value == 0 and measurement.verdict in ("equivalent", "maintained"):
        return "unchanged"
    if unit != "%":
        return f"{signed(value)} {unit}"
    size = share(abs(value) / 100)
    if not float(size.removesuffix(" %")):  # rounds to 0: no direction
        return "0 %"
    return f"{'+' if value > 0 else MINUS}{size}"


def spread(measurement: Measurement) -> str:
    """Return the uncertainty of a change with its unit: a score's bound, else the interval; empty where there is
    neither.
    """
    if measurement.dimension == "accuracy" and measurement.bound is not None:
        bound = next(iter(sentence.score(measurement)[1]), "")
        return f"{bound} points" if bound and measurement.unit == "share" else bound
    known = sentence.change(measurement)
    if known is None:
        return ""
    value, low, high, unit = known
    _, ends = with_ends(value, low, high, 0, signs=True)
    return f"{ends} {unit}" if ends and not low == high == 0 else ""


def count(text: str) -> int:
    """Return the number of words in a text; numbers count, isolated signs do not."""
    return len(WORD.findall(text))


def split(text: str) -> list[str]:
    """Return the sentences of a text."""
    return [part for part in SENTENCE_END.split(text.strip()) if part]


def clipped(text: str, most: int = MOST_WORDS) -> str:
    """Return `text` cut to at most `most` words, with an ellipsis; at the end of a clause if one is near."""
    ends = [match.end() for match in WORD.finditer(text)]
    if len(ends) <= most:
        return text
    kept = text[: ends[most - 1]]
    clause = max((kept.rfind(mark) for mark in ("; ", ": ", ", ")), default=-1)
    if clause > 0 and count(kept[:clause]) > most - CLAUSE:
        kept = kept[:clause]
    return f"{kept.rstrip(' ,;:(')} …"


def joined(phrases: Iterable[str], opening: str = "") -> str:
    """Return phrases joined to sentences of at most MOST_WORDS words; `opening`, if any, starts the first sentence and
    "And" the others.
    """
    sentences: list[list[str]] = []
    for text in phrases:
        room = MOST_WORDS - count(opening)
        text = clipped(text, room)
        if sentences and count(", ".join([*sentences[-1], text])) <= room:
            sentences[-1].append(text)
        else:
            sentences.append([text])
    openings = [opening, *(["And" if opening else ""] * len(sentences))]
    texts = [f"{first} {', '.join(members)}".strip() for first, members in zip(openings, sentences)]
    return " ".join(f"{text[:1].upper()}{text[1:]}." for text in texts)
