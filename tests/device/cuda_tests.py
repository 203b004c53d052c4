"""Runs the tests of tests/test_cuda.py in order of value and reports each as it ends: `python -m
tests.device.cuda_tests`.

One case of every function runs first, led by the functions that have never run on a device; then the other cases.
Standard output has one line of JSON per test; pytest's own output goes to standard error.
"""

import json
import os
import sys
from typing import Any

from tests.device.processes import end_with_parent

FILE = "tests/test_cuda.py"
FIRST = (
    "test_sparse_execution_equals_masked_weights",
    "test_flex_attention_equals_a_dense_mask",
    "test_streamed_and_resident_weights_give_the_same_answers",
    "test_stream_marks_are_in_order",
    "test_the_allocator_in_this_process_agrees_with_a_child",
    "test_peaks_are_read_in_place_if_another_copy_does_not_fit",
    "test_energy_and_utilization_come_from_the_gpu",
    "test_ceilings_are_those_of_a_gpu",
)
# The case of a function that runs first; for other functions, the first one collected.
FIRST_CASES = ("2:4", "all-64", "smallest")


def in_order(names: list[str]) -> list[int]:
    """Return the positions of tests (`function[case]`) in execution order."""
    functions = [name.partition("[")[0] for name in names]
    collected = list(dict.fromkeys(functions))
    value = {name: FIRST.index(name) if name in FIRST else len(FIRST) + at for at, name in enumerate(collected)}
    seen: dict[str, int] = {}
    ranks = []
    for at in sorted(range(len(names)), key=lambda at: (not any(case in names[at] for case in FIRST_CASES), at)):
        round_ = seen.get(functions[at], 0)
        seen[functions[at]] = round_ + 1
        ranks.append((round_, value[functions[at]], at))
    return [at for _, _, at in sorted(ranks)]


class Teller:
    """A pytest plugin that orders the tests and reports each one."""

    def __init__(self, tell: Any):
        self.tell = tell

    def pytest_collection_modifyitems(self, items: list) -> None:
        items[:] = [items[at] for at in in_order([item.name for item in items])]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
            entry = {"name": report.nodeid.rpartition("::")[2], "outcome": report.outcome}
            entry |= {"seconds": round(report.duration, 2)}
            if report.failed:
                entry["reason"] = str(report.longrepr).strip().splitlines()[-1][:300]
            elif report.skipped and isinstance(report.longrepr, tuple):
                entry["reason"] = str(report.longrepr[2])
            self.tell(entry)


def main() -> int:
    """Run the tests; return pytest's exit code."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    end_with_parent()
    import pytest

    def tell(entry: dict[str, Any]) -> None:
        events.write(json.dumps({"event": "test", **entry}) + "\n")
        events.flush()

    code = int(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", FILE], plugins=[Teller(tell)]))
    events.write(json.dumps({"event": "ended", "code": code}) + "\n")
    events.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
