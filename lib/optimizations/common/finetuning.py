"""How long a changed model is distilled by default. Knows nothing of what was changed."""

from lib.measure.metrics.settings import Effort
from lib.models.loading import Loaded

PREVIEW_SHARE = 1 / 3  # of the steps, at effort preview


def steps_of(loaded: Loaded, finetune_steps: int, on_proxy: int, effort: Effort) -> int:
    """Return the steps of distillation of a run; by default (`finetune_steps` is -1) `on_proxy` on a proxy
    model, a third of them at effort preview.

    Models of real size are not trained unless it is asked for: thirty steps of a 135 M model take minutes on a core.
    Random weights have nothing to be taught.
    """
    if loaded.random_weights:
        return 0
    if finetune_steps >= 0 or loaded.scale != "proxy":
        return max(finetune_steps, 0)
    return round(PREVIEW_SHARE * on_proxy) if effort.preview else on_proxy
