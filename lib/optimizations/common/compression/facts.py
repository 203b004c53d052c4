"""What a notebook is about to change, as rows of a table. Knows no optimization."""

from lib.models.loading import Loaded
from lib.models.structure.anatomy import anatomy


def about(loaded: Loaded, **more: object) -> dict[str, object]:
    """Return the model, its scale and its number of blocks, then `more`: underscores of its names are spaces."""
    known = {"model": f"{loaded.parameters.name}, {loaded.scale}", "blocks": len(anatomy(loaded.model).blocks)}
    return known | {name.replace("_", " "): value for name, value in more.items()}
