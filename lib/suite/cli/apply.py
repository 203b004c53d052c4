"""The command `apply`: reads its options and plans the one job; `lib.suite.apply` does the work."""

from dataclasses import replace
from pathlib import Path

from lib.errors import UserError
from lib.suite.plan import plan
from lib.suite.plan.plan import Request


def apply(request: Request, stack: str | None, out: str | None, results: Path) -> int:
    """Apply one optimization to one model; return the exit code. Raises UserError for an incomplete request."""
    if len(request.optimizations) != 1 or len(request.models) != 1:
        raise UserError("apply takes one OPTIMIZATION and one --model")
    if not out:
        raise UserError("apply needs --out DIR, the folder of the new checkpoint")
    if stack and not Path(stack).is_file():
        raise UserError(f"--stack {stack}: no such file; expected a recipe as automl_components writes it")
    (job,) = plan.plan(replace(request, dimensions=()))
    from lib.suite import apply as applying

    return applying.apply(job, Path(stack) if stack else None, Path(out).expanduser(), results)
