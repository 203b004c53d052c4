"""Statements that compare an optimized model with the yardsticks, from planted numbers."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.errors import UserError
from lib.measure.metrics import measurement, settings
from lib.measure.quality import answer_comparison, evaluate
from lib.models.structure.anatomy import anatomy
from lib.optimizations.common import rival_arms
from lib.optimizations.common.compression import weight_only
from lib.optimizations.common.evidence.claims import ThirdArm

KERNEL = "weight-only, round to nearest; no kernel for 6 matrices, restored for each product"


def _rate(workload: str, ratio: float, floor: float = 0.01):
    name = f"{workload}_tokens_per_second"
    rate = measurement.informative(name, workload, 100.0, 100 * ratio, "by hand", ratio=ratio)
    return rate.model_copy(update={"ci": (0.98 * ratio, 1.02 * ratio), "noise_floor": floor})


def _arm(name: str, weights: float, nats: float | None, *rates, purpose: str = "weight-only") -> ThirdArm:
    size = measurement.counted("weights_bytes", "load", 100.0, 100 * weights, "by hand")
    if nats is None:
        return ThirdArm(name, purpose, [size, *rates])
    read = measurement.informative("kl_divergence_nats", "prefill", 0.0, nats, "by hand")
    return ThirdArm(name, purpose, [read.model_copy(update={"ci": (0.9 * nats, 1.1 * nats)}), size, *rates])


def test_a_smaller_and_closer_yardstick_is_named():
    cut = _arm("activation", 0.738, 0.00116)
    yardsticks = [_arm("int8", 0.343, 7.4e-5), _arm("int4, groups of 128", 0.244, 0.011)]
    assert rival_arms.beside(cut, [*yardsticks, _arm("cut at int8's bytes", 0.34, 9.0)]) == (
        "int8 is smaller than the optimized model (0.343× of the weights against 0.738×) and nearer to the baseline "
        "(KL 7.4e-05 against 0.00116). int4, groups of 128 is smaller than the optimized model (0.244× of the weights "
        "against 0.738×) but further from the baseline (KL 0.011 against 0.00116)."
    )


@pytest.mark.parametrize(
    ("weights", "nats", "says"),
    [
        (0.8, 0.0001, "larger than the optimized model (0.8× of the weights against 0.5×) but nearer to"),
        (0.8, 0.1, "larger than the optimized model (0.8× of the weights against 0.5×) and further from"),
        (0.4, 0.0105, "and not told apart in its distance from the baseline"),
    ],
)
def test_no_yardstick_is_called_closer_than_intervals_allow(weights, nats, says):
    assert says in rival_arms.beside(_arm("cut", 0.5, 0.01), [_arm("int8", weights, nats)])


def test_closeness_is_unknown_without_text():
    assert "not known" in rival_arms.beside(None, [_arm("int8", 0.3, None)])
    assert "not known" in rival_arms.beside(_arm("cut", 0.5, None), [_arm("int8", 0.3, None)])


def test_speed_is_compared_with_a_yardstick():
    own = [_rate("prefill", 1.14), _rate("decode", 1.05)]
    int8 = _arm("int8", 0.34, 7e-5, _rate("prefill", 0.94), _rate("decode", 1.047))
    untimed = _arm("int4, groups of 128", 0.24, 0.01)
    assert rival_arms.raced(own, [int8, untimed]) == (
        "Compared with int8 the optimized model is faster in prefill (1.14× against 0.94×), and not told apart in "
        "decode (1.05× against 1.05×)."
    )
    noisy = _arm("int8", 0.34, 7e-5, _rate("prefill", 0.94, floor=0.12))
    assert "not told apart in prefill" in rival_arms.raced(own, [noisy])
    assert "slower in prefill" in rival_arms.raced([_rate("prefill", 0.5)], [int8])
    busy = _rate("decode", 1.0, floor=0.12).model_copy(update={"reason": "the noise floor of 12 % is above 10 %"})
    assert "not told apart in prefill" in rival_arms.raced([own[0], busy], [int8]), "nothing timed there is judged"
    assert rival_arms.raced([], [int8]) == ""
    slowed = rival_arms.raced(own, [int8._replace(purpose=f"{KERNEL}; up to 32 tokens")])
    assert "Compared with int8 (no kernel for 6 matrices, restored for each product) the" in slowed, "a slowed rival"
    both = rival_arms.raced([_rate("prefill", 1.5), _rate("decode", 1.5)], [int8])
    assert "faster in prefill (1.5× against 0.94×) and decode (1.5× against 1.05×)." in both


def test_a_speed_caveat_is_shown_in_its_row():
    table = rival_arms.table([_arm("int8", 0.39, 3e-4, _rate("prefill", 0.8), purpose=KERNEL)])
    assert table["what it is"].tolist() == [KERNEL]


@pytest.mark.parametrize("effort", ["preview", "quick"])
@pytest.mark.parametrize("windows", [None, 6])
def test_windows_keep_their_documents_and_text_name(tiny, effort, windows):
    model = tiny("qwen3-4b-instruct-2507")
    ids_NT = torch.randint(8, 90, (8, 160), generator=torch.Generator().manual_seed(0))
    text = replace(evaluate.read(model, ids_NT), source_N=np.array([0, 0, 0, 1, 1, 2, 2, 2]), name="mine.txt")
    reference = rival_arms.reference(model, text, settings.read(effort), windows)
    count = rival_arms.PREVIEW_WINDOWS if effort == "preview" else windows or 8
    assert reference.name == "mine.txt" and reference.source_N.tolist() == text.source_N[:count].tolist()
    assert len(reference.ids_NT) == len(reference.loss_N) == len(reference.hidden_NTH) == count
    assert rival_arms.reference(model, replace(text, source_N=None), settings.read(effort), windows).source_N is None


def test_windows_of_few_documents_make_a_wider_interval(tiny, monkeypatch):
    """Planted divergences differ more between documents than within one."""
    model = tiny("qwen3-4b-instruct-2507")
    ids_NT = torch.randint(8, 90, (8, 32), generator=torch.Generator().manual_seed(0))
    kl_N = np.array([0.10, 0.11, 0.10, 0.12, 0.30, 0.31, 0.29, 0.30])
    monkeypatch.setattr(answer_comparison.evaluate, "divergence", lambda *_: (kl_N, 1 - kl_N))
    widths = []
    for documents in ([0, 0, 0, 0, 1, 1, 1, 1], range(8)):
        text = replace(evaluate.read(model, ids_NT), source_N=np.array(documents))
        reference = rival_arms.reference(model, text, settings.read("quick"), 8)
        arm = rival_arms.judged(model, reference, "cut", "test", model)
        low, high = next(m.ci for m in arm.measurements if m.metric == "kl_divergence_nats")
        widths.append(high - low)
    assert widths[0] > widths[1]


def test_group_sizes_that_a_width_does_not_allow_are_reported(tiny, batch, monkeypatch):
    """As with SmolLM2's width of 576, where "groups of 128" are groups of 64."""
    monkeypatch.setattr(rival_arms.speed, "compare", lambda *_, **__: SimpleNamespace(measurements=[]))
    model = tiny("qwen3-4b-instruct-2507")  # widths of 32 (q, k, v, gate, up) and 64 (o, down), 4 blocks
    said = "128 does not divide the width of 28 matrices: groups of 64 in 8, 32 in 20"
    int8, int4 = rival_arms.yardsticks(model, None, torch.zeros(1, 8, dtype=torch.long), settings.read("quick"))
    assert said in int4.purpose and said not in int8.purpose
    read = evaluate.read(model, torch.randint(8, 90, (4, 16), generator=torch.Generator().manual_seed(0)))
    (by_gptq,) = rival_arms.by_gptq(model, read, [batch])
    assert said in by_gptq.purpose and len(rival_arms.at_yardsticks([int8, int4, by_gptq])) == 3
    for block in anatomy(model).blocks:
        for layer in (module for module in block.module.modules() if isinstance(module, torch.nn.Linear)):
            layer.weight = torch.nn.Parameter(torch.zeros(len(layer.weight), 256), requires_grad=False)
    assert weight_only.other_groups(model) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_yardstick_reports_judged_arithmetic_that_differs_from_decoding(tiny, monkeypatch, dtype):
    """This affects int8 only: int4 multiplies in bfloat16 for any number of tokens."""
    monkeypatch.setattr(rival_arms.speed, "compare", lambda *_, **__: SimpleNamespace(measurements=[]))
    model = tiny("qwen3-4b-instruct-2507").to(dtype)
    int8, int4 = rival_arms.yardsticks(model, None, torch.zeros(1, 8, dtype=torch.long), settings.read("quick"))
    said = "up to 32 tokens are multiplied in bfloat16, the judged text by restored matrices"
    assert (said in int8.purpose) is (dtype == torch.float32) and said not in int4.purpose


@pytest.mark.parametrize("missing", [8, 4])
def test_a_yardstick_that_cannot_be_built_is_named_with_its_reason(tiny, batch, monkeypatch, missing):
    """Previously it was dropped silently: a reader could not tell whether it had been tried."""
    make = weight_only.weight_only

    def refusing(model, bits, *rest):
        if bits == missing:
            raise UserError("block 0, w: width 33 is odd; expected pairs")
        return make(model, bits, *rest)

    monkeypatch.setattr(rival_arms.weight_only, "weight_only", refusing)
    timed, nothing = [], SimpleNamespace(measurements=[])
    monkeypatch.setattr(rival_arms.speed, "compare", lambda *_, **__: timed.append(1) or nothing)
    model = tiny("qwen3-4b-instruct-2507")
    read = evaluate.read(model, torch.randint(8, 90, (4, 16), generator=torch.Generator().manual_seed(0)))
    preview, prompt = settings.read("preview"), torch.zeros(1, 8, dtype=torch.long)
    arms = rival_arms.yardsticks(model, read, prompt, preview) + rival_arms.by_gptq(model, read, [batch])
    assert [arm.name for arm in arms] == [*weight_only.NAMES.values(), weight_only.BY_GPTQ]
    gone = [arm for arm in arms if not arm.measurements]
    assert [arm.name for arm in gone] == {8: ["int8"], 4: ["int4, groups of 128", "int4, GPTQ"]}[missing]
    assert all(arm.purpose.endswith("; left out: block 0, w: width 33 is odd; expected pairs") for arm in gone)
    assert len(timed) == 1, "the first that there is is timed at effort preview"
    shown = rival_arms.table(rival_arms.at_yardsticks(arms)).set_index("arm")
    assert len(shown) == 3 and shown.loc[gone[0].name, "what it is"] == gone[0].purpose
    assert shown.loc[gone[0].name].drop("what it is").isna().all()
    assert gone[0].name not in rival_arms.beside(next(arm for arm in arms if arm.measurements), arms)
