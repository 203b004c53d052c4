"""The command `list tasks`: the tasks for models, their number of items, data and licences. Runs nothing."""

from lib.models.tasks import benchmarks, corpus, registry
from lib.models.tasks.benchmarks import BENCHMARKS

OWN = {
    "topic": ("F1", "Python's documentation, frozen", "PSF-2.0"),
    "code_origin": ("F1", "Python's library, frozen", "PSF-2.0"),
    "digits": ("F1", "scikit-learn's digits", "CC BY 4.0"),
    "retrieval": ("exact match", "drawn by a seed, in frozen text", "PSF-2.0"),
}
CORPUS = {"topic": "docs", "code_origin": "code"}
DIGITS = 1797
COLUMNS = ("task", "items", "score", "what is asked", "data", "licence", "here")


def rows() -> list[tuple[str, ...]]:
    """Return a row for each task, in the order of COLUMNS."""
    about = {**registry.CLASSIFY, **registry.GENERATE}
    own: list[tuple[str, ...]] = [
        (name, _items(name), score, about[name], data, licence, "yes") for name, (score, data, licence) in OWN.items()
    ]
    public: list[tuple[str, ...]] = [
        (
            name,
            f"{benchmark.items:,}",
            benchmark.metric.replace("_norm", " per character"),
            benchmark.about,
            benchmark.data,
            benchmark.licence,
            "yes" if benchmarks.present(name) else "fetched by the first run",
        )
        for name, benchmark in BENCHMARKS.items()
    ]
    return own + public


def _items(name: str) -> str:
    """Return how many items one of our own tasks has, over all splits; retrieval is generated in `any` number."""
    if name not in CORPUS:
        return f"{DIGITS:,}" if name == "digits" else "any"
    return f"{sum(len(corpus.labelled(CORPUS[name], split)) for split in corpus.SPLITS):,}"


def show() -> int:
    """Print the tasks as a table, and other tasks that may be named; return the exit code."""
    table = [COLUMNS, *rows()]
    widths = [max(len(row[column]) for row in table) for column in range(len(COLUMNS))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print()
    print(f"Also {registry.HARNESS}NAME, a task or group of lm-evaluation-harness, or {registry.HARNESS}FILE.yaml.")
    print("Other tasks than a model's own: -p tasks=arc_easy,hellaswag. Perplexity on your own file: -p text=PATH.")
    packages = ", ".join(sorted({BENCHMARKS[name].reference.text.split("/")[0] for name in BENCHMARKS}))
    print(f"The public tasks come as files of {packages}.")
    return 0
