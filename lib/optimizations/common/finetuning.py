"""How long a changed model is distilled by default, and a sentence on the result."""

from lib.measure.metrics.settings import Effort
from lib.models.calibration.distillation import Lessons
from lib.models.loading import Loaded

PREVIEW_SHARE = 1 / 6  # of the steps, at effort preview
TIMES_THE_CALIBRATION, AT_PREVIEW = 4, 2  # sequences of text to distil on


def steps_of(loaded: Loaded, finetune_steps: int, on_proxy: int, effort: Effort) -> int:
    """Return the number of distillation steps of a run. The default (`finetune_steps` is -1) is `on_proxy` steps on a
    proxy model, and a sixth of them at effort preview.

    Models of real size are not trained by default: thirty steps of a 135 M model take minutes on one core. Random
    weights are never trained.
    """
    if loaded.random_weights:
        return 0
    if finetune_steps >= 0 or loaded.scale != "proxy":
        return max(finetune_steps, 0)
    return round(PREVIEW_SHARE * on_proxy) if effort.preview else on_proxy


def sequences(effort: Effort) -> int:
    """Return the number of text sequences to distil on: a multiple of the effort's calibration sequences."""
    return (AT_PREVIEW if effort.preview else TIMES_THE_CALIBRATION) * effort.calibration_sequences


def read(lessons: Lessons) -> str:
    """Return one sentence on the effect of training, measured on text set aside from it; empty without training."""
    if not lessons.losses:
        return ""
    steps, (first, *later) = len(lessons.losses), lessons.held_out.values()
    unit = "nats per token on text set aside"
    if not lessons.kept:
        nearest = f"{min(later):.3g} {unit} at best, {first:.3g} before"
        return f"{steps} steps of training did not lower the divergence ({nearest}); none was kept."
    best = lessons.held_out[lessons.kept]
    kept = "the last was kept" if lessons.kept == steps else f"the state after {lessons.kept} was kept"
    return f"{steps} steps of training lowered the divergence from {first:.3g} to {best:.3g} {unit}; {kept}."
