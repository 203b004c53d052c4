"""The proxy models' tokenizer: byte-level BPE trained on the frozen training text, with one token for every label."""

from collections.abc import Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lib.models.tasks import corpus

# In this order they get the ids 0 to 6, to which the proxy models' configurations refer.
SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHARACTERS = 3_000_000  # of each corpus; more text does not change the frequent merges


def train(size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of exactly `size` entries trained on both corpora: special tokens, bytes, merges, labels."""
    names = {name for part in corpus.CORPORA for name in corpus.classes(part)} | set("0123456789")
    labels = sorted(f" {name}" for name in names)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(labels),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(), trainer)
    tokenizer.add_tokens([AddedToken(label, normalized=False) for label in labels])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL[1:]),
        clean_up_tokenization_spaces=False,
    )


def _sample() -> Iterator[str]:
    for part in corpus.CORPORA:
        remaining = CHARACTERS
        for document in corpus.documents(part):
            text = "\n\n".join(document.pieces)
            yield text
            remaining -= len(text)
            if remaining <= 0:
                break
