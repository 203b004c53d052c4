"""The program in a child process of `maintenance`: it answers from a copy of the project, whose code takes the place of
this one's. Is the added part there, in order with all others, and does it run?
"""

import sys
from typing import Any


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Return the parts that apply to a model, their order, what became of the part `stem`, and whether it is listed,
    all by the code of the project at `place`.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] == "lib"]:
        del sys.modules[name]
    sys.path.insert(0, job["place"])
    import lib
    from lib.models import loading
    from lib.models.tasks import tasks
    from lib.optimizations.common.recipe import RecipeStep
    from lib.optimizations.modular_components import attempts
    from lib.optimizations.modular_components import method as composing
    from lib.suite.plan import plan

    assert str(lib.__file__).startswith(job["place"]), "the copy's code is not in use"
    loaded = loading.load(job["model"])
    sample_BT = tasks.text_windows(loaded, "search", 2, 64)
    fitting, _ = composing.applicable(loaded.model)
    steps, _ = composing.orderable([RecipeStep(optimization=stem) for stem in fitting], loaded.model)
    attempt = attempts.attempt(loaded.model, [], [RecipeStep(optimization=job["stem"])], sample_BT)
    answers: dict[str, Any] = {"parts": fitting, "order": [step.optimization for step in steps]}
    answers |= {"state": attempt.state, "reason": attempt.reason}
    return answers | {"listed": job["stem"] in plan.optimizations()}
