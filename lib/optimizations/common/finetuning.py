"""How long a changed model is distilled by default. Knows nothing of what was changed."""

from lib.models.loading import Loaded


def steps_of(loaded: Loaded, asked: int, on_proxy: int) -> int:
    """Return the steps of distillation of a run; by default (`asked` is -1) `on_proxy` on a proxy model.

    Models of real size are not trained unless it is asked for: thirty steps of a 135 M model take minutes on a core.
    Random weights have nothing to be taught.
    """
    if loaded.random_weights:
        return 0
    return asked if asked >= 0 else on_proxy if loaded.scale == "proxy" else 0
