"""Facts about the model that a notebook is about to change, as rows of a table."""

from lib.models.loading import Loaded
from lib.models.structure.anatomy import anatomy


def about(loaded: Loaded, **more: object) -> dict[str, object]:
    """Return the model, its scale and its number of blocks, then `more`, with underscores in names shown as spaces."""
    known = {"model": f"{loaded.parameters.name}, {loaded.scale}", "blocks": len(anatomy(loaded.model).blocks)}
    return known | {name.replace("_", " "): value for name, value in more.items()}
