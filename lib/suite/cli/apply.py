"""The command `apply`: saves an optimization, or a stack of them, as a checkpoint folder with a model card.

A separate process does the work (`lib.optimizations.modular_components.saving`), so that this one needs no torch; the
folder appears only after the saved checkpoint has been loaded again and compared. A model that does not fit into memory
is written block by block; an interrupted run leaves DIR.part, and the same command resumes there. Runs no notebook and
measures nothing.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.errors import UserError
from lib.files import expanded
from lib.suite.plan import cache_key, declared, plan
from lib.suite.plan.plan import Job, Request
from lib.suite.run.stop import BuildStopped, stoppable
from lib.suite.store.result_folder import Folder, require_place

PROGRAM = "lib.optimizations.modular_components.saving"


def apply(request: Request, stack: str | None, out: str | None, results: Path) -> int:
    """Apply one optimization (or the recipe `stack`) to one model and save it in `out`; return the exit code.

    `results` is the result folder whose record the model card quotes. Raises UserError for an incomplete request, and
    where the optimization changes no weights, does not apply, or cannot be saved; `out` then does not exist. A signal
    that ends the command also ends the saving process.
    """
    if len(request.optimizations) != 1 or len(request.models) != 1:
        with_stack = "; with --stack, OPTIMIZATION is the one whose search wrote the recipe" if stack else ""
        raise UserError(f"apply takes one OPTIMIZATION and one --model{with_stack}")
    if not out:
        raise UserError("apply needs --out DIR, the folder of the new checkpoint")
    target, recipe = expanded(out), str(expanded(stack)) if stack else None  # the process works in another folder
    if target.is_symlink():  # such as to a larger disk
        target = Path(os.path.realpath(target))
    if recipe and not Path(recipe).is_file():
        raise UserError(f"--stack {stack}: no such file; expected a recipe written by automl_components")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--out {out}: exists already; give a folder that does not")
    if target.is_dir() and (os.path.ismount(target) or target == Path.cwd()):
        raise UserError(f"--out {out}: a mount point or the working folder cannot be replaced; give a folder inside it")
    require_place(target.parent if target.is_dir() else target)  # an empty folder is replaced
    if stack is None and (reason := declared.why_not_savable(request.optimizations[0])):
        raise UserError(reason)  # before the model is fetched
    (job,) = plan.plan(replace(request, dimensions=()))
    key = cache_key.of(cache_key.parts(job, cache_key.Hashes(Folder(results).hashes)))
    from lib.report.pages import model_card

    unfinished = target.with_name(f"{target.name}.part")
    new_folders = [place for place in target.parents if not place.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with stoppable(), tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as folder:
            place = Path(folder) / "checkpoint"
            answer = _save(job, recipe, place, unfinished)
            card = model_card.text(job, stack, answer, target.name, results, key)
            (place / "README.md").write_text(card, "utf-8")
            if target.is_dir():
                target.rmdir()  # empty, as checked above
            shutil.move(place, target)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written to ({error.strerror})") from None
    except BuildStopped as stopped:
        kept = f"; {unfinished} is kept, and the same command resumes" if unfinished.exists() else ""
        print(f"\nbuild.py: stopped{kept}", file=sys.stderr)
        return stopped.exit_code
    finally:
        for place in new_folders:
            with contextlib.suppress(OSError):  # not empty: it has the checkpoint or an unfinished one
                place.rmdir()
    again = "written and read back block by block" if answer["by_blocks"] else "saved, loaded again"
    print(f"{out}: {again}, and equal to the applied model")
    if answer.get("unfit"):
        print(f"{stack}: {answer['unfit']}")
    print(model_card.usage(out, answer["loads"], answer["tokenizer"], answer["latent"]))
    return 0


def _save(job: Job, stack: str | None, place: Path, unfinished: Path) -> dict[str, Any]:
    """Save the checkpoint in a separate process; return its answer. Raises UserError with its refusal."""
    request = {
        "model": job.model,
        "optimization": job.optimization,
        "stack": stack,
        "parameters": {**job.parameters},
        "place": str(place),
        "unfinished": str(unfinished),
    }
    done = subprocess.run(
        [sys.executable, "-m", PROGRAM], input=json.dumps(request), stdout=subprocess.PIPE, text=True, cwd=plan.ROOT
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        killed = f"its process was ended by signal {-done.returncode}, as happens when memory runs out"
        why = killed if done.returncode < 0 else "the lines above say why"
        raise UserError(f"{job.optimization}: could not be applied to {job.model}; {why}")
    answer = json.loads(lines[-1])
    if "refused" in answer:
        raise UserError(answer["refused"])
    return answer
