"""Builds an untrained proxy model from its parameter file: configuration, weights, tokenizer, image processor."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lib.errors import UserError
from lib.models import parameters
from lib.models.checkpoints import io
from lib.models.proxies import tokenizer
from lib.models.proxies.config import TrainingConfig, fault, present_keys
from lib.models.structure.anatomy import anatomy
from lib.models.tasks import tasks

EMBEDDING_STD = 0.5


@dataclass
class ProxyModel:
    """A proxy model with tokenizer, image processor and parameter file, as training and tasks need them."""

    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    image_processor: Any | None
    parameters: parameters.ModelParameters
    device: str = "cpu"
    scale: str = "proxy"


def untrained_proxy(name: str) -> ProxyModel:
    """Return an untrained proxy model. Raises UserError for an unknown model or an unknown key of `proxy.training`."""
    description = parameters.read(name)
    config, training = description.config("proxy"), training_config(name)
    text = config.get("text_config", config)
    vocabulary = tokenizer.train(text["vocab_size"])
    endings = {key: vocabulary.convert_tokens_to_ids("<|endoftext|>") for key in ("eos_token_id", "pad_token_id")}
    if "text_config" in config:
        config = config | {"text_config": text | endings}
    else:
        config = config | endings | {"bos_token_id": None}
    model = scale_initial_weights(io.build(config, description.architecture, seed=training.seed))
    image_processor = make_image_processor(config["vision_config"]) if "vision_config" in config else None
    return ProxyModel(model, vocabulary, image_processor, description)


def training_config(name: str) -> TrainingConfig:
    """Return the training settings of model `name`. Raises UserError for a key of `proxy.training`, or of its second
    phase, that is unknown, missing or of a wrong type.
    """
    section = parameters.read(name).training()
    if reason := fault(section):
        raise UserError(f"parameters/{name}.yaml: {reason}")
    return TrainingConfig(**present_keys(section))


def scale_initial_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Scale the embeddings of a new model, in place, to the size of its blocks' later contributions; return the model.

    With the usual standard deviation of 0.02, the embeddings drown in the first block's output, and later heads cannot
    recover them for copying. If the head is tied to the embeddings, the last norm compensates for their size.
    """
    view = anatomy(model)
    with torch.no_grad():
        view.embeddings.weight.mul_(EMBEDDING_STD / view.embeddings.weight.std())
        if view.head.weight is view.embeddings.weight:
            view.final_norm.get_parameter("weight").fill_(0.075 / EMBEDDING_STD)
        for block in view.blocks:
            part = block.feed_forward
            outputs = [block.attention.output.weight, part.down.weight if part.down is not None else None]
            for weight in [*outputs, part.experts.down if part.experts is not None else None]:
                if weight is not None:
                    weight.mul_(0.3)
    return model


def make_image_processor(vision: dict[str, Any]) -> Qwen2VLImageProcessorPil:
    """Return the image processor for a vision tower: it keeps the size of pictures and scales values to [-1, 1]."""
    return Qwen2VLImageProcessorPil(
        patch_size=vision["patch_size"],
        merge_size=vision["spatial_merge_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        size={"shortest_edge": tasks.PICTURE**2, "longest_edge": tasks.PICTURE**2},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
