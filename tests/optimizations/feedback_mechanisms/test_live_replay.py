"""Two real profiles taking turns: what the guard reads is real, and so are the consequences."""

from types import SimpleNamespace

import pytest
import torch

from lib.measure.serving.protocol import Limits
from lib.measure.serving.traffic import Lengths
from lib.optimizations.feedback_mechanisms import live_replay, rivals, shadow
from lib.optimizations.feedback_mechanisms.method import FAST, FULL

TEXT_T = torch.randint(8, 96, (400,), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("strength", [0.0, 4.0])
def test_a_broken_profile_is_rolled_back_in_a_real_replay(tiny, strength):
    """Previously its answers were read again, but their losses were discarded, and it kept answering."""
    full = tiny("qwen3-4b-instruct-2507")
    fast = shadow.broken(full, strength) if strength else full
    trace = live_replay.trace(80.0, 1.2, Lengths(12, 6), seed=1)
    setup = SimpleNamespace(shadow_share=1.0, bound=0.1, limits=Limits(8))
    policies = {"fast": rivals.Static(8, always=FAST), "full": rivals.Static(8)}
    runs = live_replay.serve_stolen(
        [full, fast], trace, policies, setup, lambda one: TEXT_T[one.id : one.id + one.prompt_tokens]
    )
    run = runs["fast"]
    assert set(runs["full"].profile_of.values()) == {FULL} and not runs["full"].rollbacks
    assert all(each.replayed.output.keys() == each.profile_of.keys() for each in runs.values())
    aside = [step for step in run.served.steps if step.kind == "aside"]
    assert aside and all(step.seconds > 0 for step in aside)
    assert (run.rollbacks > 0) is (strength > 0)
    assert (FULL in run.profile_of.values()) is (strength > 0) and FAST in run.profile_of.values()
