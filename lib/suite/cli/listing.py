"""The command `list`: models, what each optimization is, and the state of every run with the reason. Runs nothing."""

import re
import sys
from pathlib import Path

from lib.models import parameters as parameter_files
from lib.suite import build
from lib.suite.plan import plan
from lib.suite.plan import template as templates
from lib.suite.plan.plan import Request
from lib.suite.plan.template import Template
from lib.suite.store.result_folder import Folder

FIRST_SENTENCE = re.compile(r"^.+?[.!?:](?=\s|$)", re.DOTALL)
WIDTH = 110


def show(request: Request, out: Path) -> int:
    """Print the listing; return 0, or 2 if a model's file has a fault, which is printed last."""
    planned, faults = plan.plan_each(request)
    surveyed = build.survey(Folder(out), planned)
    print("models:")
    known = [*plan.models(), *parameter_files.registered()]
    width = max(map(len, known), default=0)
    for name, scales in parameter_files.takes_part(known).items():
        print(f"  {name:{width}}  {' '.join(scales)}".rstrip())
    print("optimizations:")
    names = plan.optimizations()
    width = max(map(len, names), default=0)
    read = {job.optimization: job.template for job in planned}
    for name in names:
        template = read.get(name) or templates.read(plan.NOTEBOOKS / f"{name}.ipynb")
        print(f"  {name:{width}}  {about(template)}".rstrip())
    print(f"results:       {build.shown(out)}")
    build.print_stand_in_note(out)
    width = max((len(job.stem) for job, _, _ in surveyed), default=0)
    for job, _, state in surveyed:
        word = state.status if state.kind in ("finished", "unrendered") else state.kind
        first = f"at effort {state.effort} so far; " if state.effort and state.effort != job.effort else ""
        print(f"  {word:14}  {job.stem:{width}}  {first}{state.why}".rstrip())
    for fault in faults:
        print(f"build.py: {fault}", file=sys.stderr)
    return 2 if faults else 0


def about(template: Template) -> str:
    """Return an optimization in one line: the first sentence below its notebook's title, or nothing."""
    prose = next((source for kind, source, _ in template.cells if kind == "markdown"), "")
    text = " ".join(line for line in prose.splitlines() if not line.startswith("#")).strip()
    first = FIRST_SENTENCE.match(text)
    line = " ".join((first[0] if first else text).split())
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1].rstrip()}…"
