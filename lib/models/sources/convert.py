"""Converts a GGUF file into a checkpoint folder: `python -m lib.models.sources.convert FILE FOLDER`.

Transformers reads and dequantizes the tensors; they are stored in bfloat16, whose rounding (2⁻⁹) is far below the step
of a quantized file. Adds what transformers leaves out: splits of text before byte-pair encoding that it does not know,
other steps of tokenization in llama.cpp, scaled rotations, and the generation configuration. Prints one line and exits
with 2 if a file cannot be converted.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from lib.errors import UserError
from lib.models.sources import gguf_left_out, store

# Values of `tokenizer.ggml.pre`, by how llama.cpp splits text before byte-pair encoding (its src/llama-vocab.cpp).
AS_GPT2 = {"gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "mpt", "olmo", "jais", "trillion"}
DIGITS_ALONE = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
# For these, llama.cpp keeps a piece that is a token whole, and by default begins a text with a token.
WHOLE_PIECES = {
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano", "tekken",
}  # fmt: skip
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DEFAULT_SPLITS = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", r"[0-9][0-9][0-9]")
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")
TRIED = 'In 2026, 1234567 people  said: "don\'t!"\n\n\tdef f(x):\n        return x_1 + 3.14159  # ok? Ünïcödé 日本'


def convert(file: Path, folder: Path) -> None:
    """Write the checkpoint folder of a GGUF file. Raises UserError if it cannot be read or would be read wrongly."""
    reader = _reader(file)
    header = _header(reader)
    gguf_left_out.require_whole(header)
    numbers = sum(int(tensor.n_elements) for tensor in reader.tensors)
    store.require_room(torch.bfloat16.itemsize * numbers, "its conversion")
    tokenizer = _tokenizer(file, header)
    options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.bfloat16, "output_loading_info": True}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    except (ValueError, KeyError, RuntimeError, ImportError, NotImplementedError) as error:
        raise UserError(
            f'architecture "{header("general.architecture")}" cannot be read ({" ".join(str(error).split())[:160]}); '
            "give the model's own checkpoint folder"
        ) from None
    model, report = loaded
    del loaded
    gguf_left_out.require_all_read(model, report["missing_keys"], reader.tensors)
    config = model.config
    gguf_left_out.state(config, header, reader.tensors)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise UserError(f"its tokenizer knows {len(tokenizer)} tokens, its embeddings have {rows} rows")
    for name in ("bos", "eos", "pad"):
        if (identity := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            setattr(config, f"{name}_token_id", identity)
    ordinary: Any = type(model)(config).to(torch.bfloat16)  # the loaded model was quantized and refuses to be saved
    ordinary.load_state_dict(model.state_dict())
    del model
    ordinary.generation_config = _generation(tokenizer, header)
    ordinary.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if AutoTokenizer.from_pretrained(folder)(TRIED).input_ids != tokenizer(TRIED).input_ids:
        raise UserError("its tokenizer gives other tokens after it was saved")


def _reader(file: Path) -> Any:
    """Return a GGUFReader of a file, with its `fields` and `tensors`."""
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError('the package gguf is not installed; pip install "gguf>=0.17"') from None
    try:
        return GGUFReader(file)
    except (ValueError, IndexError, OSError, KeyError, TypeError) as error:
        raise UserError(f"truncated or damaged ({' '.join(str(error).split())[:120]}); copy it again") from None


def _header(reader: Any) -> Callable[[str], Any]:
    """Return a function from a key of the file's header to its value, or None."""
    fields = reader.fields
    if "general.architecture" not in fields:
        raise UserError("its header names no architecture")
    return lambda key: fields[key].contents() if key in fields else None


def _tokenizer(file: Path, header: Callable[[str], Any]) -> Any:
    """Return the file's tokenizer, which splits text as the model was trained."""
    if header("tokenizer.ggml.tokens") is None:
        raise UserError("holds no tokenizer; give the model's own checkpoint folder")
    try:
        read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except (ValueError, KeyError, ImportError, OSError) as error:
        raise UserError(
            f'architecture "{header("general.architecture")}": its tokenizer cannot be read '
            f"({' '.join(str(error).split())[:160]}); give the model's own checkpoint folder"
        ) from None
    backend = read.backend_tokenizer
    begins: dict[str, bool] = {}
    if header("tokenizer.ggml.model") == "gpt2":
        if (split := _split(header("tokenizer.ggml.pre"))) is not None:
            backend.pre_tokenizer = split
        if header("tokenizer.ggml.pre") in WHOLE_PIECES:
            backend.model.ignore_merges = True
            begins |= {"add_bos_token": True} if header("tokenizer.ggml.add_bos_token") is None else {}
    prepended = getattr(backend.pre_tokenizer, "prepend_scheme", "never") != "never"
    if prepended and header("tokenizer.ggml.add_space_prefix") is False:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = {name: value for name in SPECIAL if (value := getattr(read, name, None)) is not None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special, **begins)
    tokenizer.chat_template = header("tokenizer.chat_template") or None
    tokenizer.padding_side = "left"
    return tokenizer


def _split(name: str | None) -> Any:
    """Return the pre-tokenizer of byte-level BPE for `tokenizer.ggml.pre`, or None if that of transformers is right.

    Raises UserError for an unknown name, since token ids would silently differ.
    """
    if name in DIGITS_ALONE:
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        return pre_tokenizers.Sequence(parts)
    if name in (None, "", "default"):
        splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in DEFAULT_SPLITS]
        return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if name in AS_GPT2 or name in _known_to_transformers():
        return None
    raise UserError(
        f'its tokenizer splits text as "{name}", which is not known here; give the model\'s own checkpoint folder'
    )


def _known_to_transformers() -> set[str]:
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # an older release: only the splits above are certain
        return set()
    return set(GGUF_PRE_TOKENIZER_SPLITS)


def _generation(tokenizer: Any, header: Callable[[str], Any]) -> GenerationConfig:
    """Return a generation configuration that stops at the file's end-of-text and end-of-turn tokens."""
    ends = [header(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = list(dict.fromkeys(int(end) for end in ends if end is not None))
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=tokenizer.pad_token_id,
    )


def main(arguments: list[str]) -> int:
    """Convert FILE into FOLDER; return 0, or print the reason in one line and return 2."""
    file, folder = map(Path, arguments)
    try:
        with tempfile.TemporaryDirectory() as empty:  # other files next to `file` may belong to another model
            link = Path(empty) / "model.gguf"
            link.symlink_to(file.absolute())
            convert(link, folder)
    except UserError as error:
        print(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
