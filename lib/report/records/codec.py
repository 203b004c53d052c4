"""Converts a notebook's values into plain JSON and back, without any loss that could mislead.

JSON has no NaN and no infinities; they are encoded as `{"$float": "nan"}`. Independent of records and scrapbook.
"""

import dataclasses
import datetime
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

TAG = "$float"
NOT_FINITE = ("nan", "inf", "-inf")  # the values tagged; anything else under the tag is damage and left unchanged


def encode(value: Any, where: str = "value") -> Any:
    """Return `value` as dict, list, str, int, finite float, bool and None only.

    Takes numpy scalars and arrays, pandas frames (as a list of rows), dataclasses, pydantic models, paths, dates, sets
    and tuples. Raises TypeError, naming the place, for anything else.
    """
    if value is None or isinstance(value, (bool, str)):
        return str(value) if isinstance(value, Enum) else value
    if isinstance(value, Enum):
        return encode(value.value, where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {TAG: str(float(value))}
    if isinstance(value, Mapping):
        return {_key(key): encode(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return [encode(item, where) for item in sorted(value, key=str)]
    return _encode_foreign(value, where)


def _encode_foreign(value: Any, where: str) -> Any:
    """Encode a value that is neither a JSON type nor a built-in container; recognised by its attributes, so that numpy
    need not be imported.
    """
    if isinstance(value, (Path, datetime.date, datetime.time)):
        return value.isoformat() if hasattr(value, "isoformat") else str(value)
    if hasattr(value, "model_dump"):
        return encode(value.model_dump(by_alias=True), where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return encode({field.name: getattr(value, field.name) for field in dataclasses.fields(value)}, where)
    if hasattr(value, "to_dict") and hasattr(value, "columns"):
        return encode(value.to_dict("records"), where)
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return encode(value.tolist(), where)
    raise TypeError(f"{where}: a {type(value).__name__} does not fit into a record; give numbers, text, lists or dicts")


def _key(key: Any) -> str:
    return str(key.item()) if hasattr(key, "item") else str(key)


def decode(value: Any) -> Any:
    """Return `value`, as read from JSON, with the floats tagged by `encode` as floats again."""
    if isinstance(value, dict):
        if len(value) == 1 and value.get(TAG) in NOT_FINITE:
            return float(value[TAG])
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return value
