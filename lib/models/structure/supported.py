"""The architectures for which `lib.models.structure.anatomy` is tested, by name: a list that needs no torch."""

# Model types by their transformers names; others of the same structure work too.
SUPPORTED = (
    "gemma2", "gemma3_text", "glm4_moe_lite", "granite", "llama", "mistral", "mixtral", "olmoe", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "qwen3_vl",
)  # fmt: skip
