"""The part of a loaded model that tasks, training and measurements need, as a protocol.

`lib.models.loading.Loaded` satisfies it, as does any other object with the same attributes. Knows nothing of how a
model is loaded.
"""

from typing import Any, Protocol

from torch import nn

from lib.models.parameters import ModelParameters


class LoadedModel(Protocol):
    """A model with tokenizer, image processor (None without vision) and parameter file, at `scale` on `device`.

    Tokenizer and image processor come from transformers; their classes differ from model to model.
    """

    model: nn.Module
    tokenizer: Any
    image_processor: Any
    parameters: ModelParameters
    scale: str
    device: str
