"""How long a changed model is distilled by default. Knows nothing of what was changed."""

from lib.models.loading import Loaded


def steps_of(loaded: Loaded, finetune_steps: int, on_proxy: int) -> int:
    """Return the steps of distillation of a run; by default (`finetune_steps` is -1) `on_proxy` on a proxy model.

    Models of real size are not trained unless it is asked for: thirty steps of a 135 M model take minutes on a core.
    Random weights have nothing to be taught.
    """
    if loaded.random_weights:
        return 0
    return finetune_steps if finetune_steps >= 0 else on_proxy if loaded.scale == "proxy" else 0
