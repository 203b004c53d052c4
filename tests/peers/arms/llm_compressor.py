"""llm-compressor's one-shot pruning, on the same calibration text: `method=sparsegpt` or `method=wanda`.

Uses its defaults except for what the setting fixes: every linear layer of the decoder, `sparsity` of each,
unstructured.
"""

import probe
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers import pruning
from transformers import PreTrainedTokenizerFast

METHODS = {"sparsegpt": "SparseGPTModifier", "wanda": "WandaPruningModifier"}

setting, options = probe.read()
probe.use_threads(setting["threads"])
model = probe.load(setting)
dense = probe.sample_perplexity(model, setting["windows"])
rows = setting["calibration"]
text = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
recipe = getattr(pruning, METHODS[options["method"]])(
    sparsity=setting["sparsity"], mask_structure="0:0", targets=[r"re:model.layers.\d*$"], ignore=["re:.*lm_head"]
)
tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{setting['folder']}/tokenizer.json")  # required but unused
watch = probe.Stopwatch()
oneshot(
    model=model,
    processor=tokenizer,
    dataset=text,
    recipe=recipe,
    num_calibration_samples=len(rows),
    max_seq_length=len(rows[0]),
    shuffle_calibration_samples=False,
)
values = watch.read() | {"peak_mb": probe.peak_megabytes()}
values |= {"zeros": probe.zeros(model), "perplexity": probe.perplexity(model, setting["windows"])}
probe.write(
    values, ["llmcompressor", "torch", "transformers"], f"dense in its environment {dense:.3f} on a short sample"
)
