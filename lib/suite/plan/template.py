"""A template notebook: its cells, and its declared parameters with types and bounds.

Reads the notebook's JSON with the standard library alone, so that listing is quick. Independent of what the cells do. A
test checks that it reads the same parameters as papermill.
"""

import ast
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib.errors import UserError, suggest
from lib.files import visible

LINE = re.compile(r"^(?P<name>[A-Za-z_]\w*)\s*:\s*(?P<type>[^=#]+?)\s*=\s*(?P<rest>.+)$")
NUMBER = r"[-+]?(?:inf|∞|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)"
INTERVAL = re.compile(rf"\bin\s+([\[(])\s*({NUMBER})\s*,\s*({NUMBER})\s*([\])])")
DEFAULT_BELOW = re.compile(r";\s*-1:\s")  # in a help text: -1 stands for a default, no other negative value is allowed
PAIR = re.compile(r"\btwo numbers\b")  # the length of a list
DIVISOR = re.compile(r"\ba divisor of (\w+)")  # of another parameter
STEMS = re.compile(r"\bstems joined by \+")  # of optimizations, each of which has a template
CHOICES = re.compile(r"\bone of\s+([^\s,;|]+(?:\|[^\s,;|]+)+)")


@dataclass(frozen=True)
class Parameter:
    """A declared parameter: `name: type = default  # help`. `interval` is (low, high, low included, high included)."""

    name: str
    type: str
    default: Any
    help: str
    interval: tuple[float, float, bool, bool] | None
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Template:
    """A notebook in `notebooks/`: `cells` as (type, source, tags), `parameters` by name."""

    path: Path
    cells: tuple[tuple[str, str, tuple[str, ...]], ...]
    parameters: dict[str, Parameter]

    @property
    def stem(self) -> str:
        """The optimization's name."""
        return self.path.stem


def read(path: Path) -> Template:
    """Read a template. Raises UserError where it is not a notebook or has no cell tagged `parameters`."""
    cells = read_cells(path)
    for kind, source, tags in cells:
        if kind == "code" and "parameters" in tags:
            return Template(path, cells, _declared(path, source))
    raise UserError(
        f'notebooks/{path.name}: no cell tagged "parameters"; tag the first code cell with it '
        "and declare one name per line there: name: type = default  # help"
    )


def read_cells(path: Path) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
    """Return the cells of a notebook as (type, source, tags). Raises UserError where the file is not a notebook."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return tuple(
            (cell["cell_type"], "".join(cell["source"]), tuple(cell.get("metadata", {}).get("tags", ())))
            for cell in content["cells"]
        )
    except OSError as error:
        raise UserError(f"notebooks/{path.name}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"notebooks/{path.name}: not a notebook; expected JSON with a list of cells") from None


def _declared(path: Path, source: str) -> dict[str, Parameter]:
    declared = {}
    for line in source.splitlines():
        match = LINE.match(line.strip())
        if not match:
            if line.strip() and not line.lstrip().startswith("#"):
                raise UserError(
                    f"notebooks/{path.name}: cannot read the parameter `{line.strip()}`; "
                    "expected: name: type = default  # help"
                )
            continue
        text, help_text = _split_comment(match["rest"])
        try:
            default = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            raise UserError(
                f'notebooks/{path.name}: parameter "{match["name"]}": the default {text} is not a plain value'
            ) from None
        declared[match["name"]] = Parameter(
            match["name"], match["type"].strip("\"' "), default, help_text, _interval(help_text), _choices(help_text)
        )
    return declared


def with_values(source: str, values: Mapping[str, Any]) -> str:
    """Return the source of a parameters cell with `values` filled in; all other lines stay unchanged."""
    lines = []
    for line in source.splitlines():
        match = LINE.match(line.strip())
        if match and match["name"] in values:
            text, help_text = _split_comment(match["rest"])
            if ast.literal_eval(text) != values[match["name"]]:
                line = f"{match['name']}: {match['type']} = {_as_source(values[match['name']])}"
                line += f"  # {help_text}" if help_text else ""
        lines.append(line)
    return "\n".join(lines)


def _as_source(value: Any) -> str:
    """Return a plain value as Python source, with strings in double quotes, as the formatter writes them."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return f"[{', '.join(map(_as_source, value))}]"
    return repr(value)


def _split_comment(rest: str) -> tuple[str, str]:
    """Split `"a#b"  # help` into the value and the help: the shortest head that is an expression by itself."""
    for at in (index for index, character in enumerate(rest) if character == "#"):
        try:
            ast.parse(rest[:at].strip(), mode="eval")
        except SyntaxError:
            continue
        return rest[:at].strip(), rest[at + 1 :].strip()
    return rest.strip(), ""


def _interval(text: str) -> tuple[float, float, bool, bool] | None:
    match = INTERVAL.search(text)
    if not match:
        return None
    low, high = (float(match[group].replace("∞", "inf")) for group in (2, 3))
    return low, high, match[1] == "[", match[4] == "]"


def _choices(text: str) -> tuple[str, ...]:
    match = CHOICES.search(text)
    return tuple(match[1].rstrip(".)").split("|")) if match else ()


def check(value: Any, parameter: Parameter, where: str) -> Any:
    """Return `value` as the parameter's type. Raises UserError, starting with `where`, for a wrong type or range.

    A string (from the command line) is parsed as the declared type; an int is accepted for a float.
    """
    converted = _convert(value, parameter.type)
    if converted is _WRONG:
        raise UserError(f"{where}: expected {parameter.type}, got {value!r}{_about(parameter)}")
    if isinstance(converted, (list, tuple)) and PAIR.search(parameter.help) and len(converted) != 2:
        raise UserError(f"{where}: expected two numbers, got {len(converted)}{_about(parameter)}")
    for item in converted if isinstance(converted, (list, tuple)) else [converted]:
        if parameter.choices and str(item) not in parameter.choices:
            raise UserError(f"{where}: expected one of {', '.join(parameter.choices)}, got {item!r}")
        if parameter.interval and isinstance(item, (int, float)) and not _within(item, parameter.interval):
            raise UserError(f"{where}: expected a value {_shown(parameter.interval)}, got {item!r}{_about(parameter)}")
        if DEFAULT_BELOW.search(parameter.help) and isinstance(item, float) and -1 < item < 0:
            raise UserError(f"{where}: expected -1 or a value of at least 0, got {item!r}{_about(parameter)}")
    return converted


def check_divisors(values: Mapping[str, Any], template: Template) -> None:
    """Raise UserError for a value that must divide another parameter's value, but does not."""
    for name, parameter in template.parameters.items():
        match = DIVISOR.search(parameter.help)
        if match and match[1] in values and values[match[1]] % values[name]:
            raise UserError(
                f'{template.stem}: "{name}": expected a divisor of {match[1]}, which is {values[match[1]]}, '
                f"got {values[name]}"
            )


def check_stems(values: Mapping[str, Any], template: Template) -> None:
    """Raise UserError for a value that must name optimizations, but names one without a template."""
    known = sorted(path.stem for path in visible(template.path.parent, "*.ipynb"))
    for name, parameter in template.parameters.items():
        if not STEMS.search(parameter.help) or values[name] == parameter.default:
            continue
        for stem in (part.strip() for part in str(values[name]).split("+")):
            if stem not in known:
                raise UserError(
                    f'{template.stem}: "{name}": no optimization "{stem}"; expected {parameter.help}.'
                    f"{suggest(stem, known)}"
                )


def _about(parameter: Parameter) -> str:
    return f" ({parameter.name}: {parameter.help})" if parameter.help else ""


def _within(value: float, interval: tuple[float, float, bool, bool]) -> bool:
    low, high, low_included, high_included = interval
    above = value > low or (low_included and value == low)
    return above and (value < high or (high_included and value == high))


def _shown(interval: tuple[float, float, bool, bool]) -> str:
    low, high, low_included, high_included = interval
    return f"in {'[' if low_included else '('}{low:g}, {high:g}{']' if high_included else ')'}"


_WRONG = object()


def _convert(value: Any, kind: str) -> Any:
    """Return `value` as `kind` (`float`, `list[int]`, `str | None` …), or _WRONG; unchanged for an unknown kind."""
    kinds = [part.strip() for part in kind.split("|")]
    if "None" in kinds and value in (None, "None", "none"):
        return None
    results = [_convert_one(value, part) for part in kinds if part != "None"]
    return next((result for result in results if result is not _WRONG), _WRONG)


def _convert_one(value: Any, kind: str) -> Any:
    inner = re.fullmatch(r"(list|tuple)(?:\[(\w+)(?:,.*)?\])?", kind)
    if inner:
        return _convert_items(value, inner[1], inner[2])
    if kind == "str":
        return value if isinstance(value, str) else _WRONG
    if kind == "bool":
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        return value if isinstance(value, bool) else words.get(str(value).lower(), _WRONG)
    if kind in ("int", "float"):
        return _convert_number(value, kind)
    if kind.startswith("dict"):
        value = _literal(value)
        return value if isinstance(value, dict) else _WRONG
    return value


def _convert_number(value: Any, kind: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return _WRONG
    if kind == "int" and isinstance(value, float):
        return _WRONG
    try:
        number = int(value) if kind == "int" else float(value)
    except ValueError:
        return _WRONG
    return number if math.isfinite(number) else _WRONG


def _convert_items(value: Any, kind: str, inner: str | None) -> Any:
    if isinstance(value, str):
        text = value.strip()
        literal = _literal(text if text[:1] in ("[", "(") else f"[{text}]")
        bare = literal is _WRONG and inner == "str"  # words without quotation marks: `-p tasks=topic,recall`
        value = [word.strip() for word in text.strip("[]()").split(",")] if bare else literal
    if not isinstance(value, (list, tuple)):
        return _WRONG
    items = [_convert_one(item, inner) if inner else item for item in value]
    return _WRONG if _WRONG in items else (tuple(items) if kind == "tuple" else items)


def _literal(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return _WRONG
