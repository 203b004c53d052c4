"""The architectures that the view is known to know, by name: a list that can be read without torch."""

# The model types that tests hold, by transformers' names; others of the same structure work too.
SUPPORTED = (
    "gemma2", "gemma3_text", "glm4_moe_lite", "granite", "llama", "mistral", "mixtral", "olmoe", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "qwen3_vl",
)  # fmt: skip
