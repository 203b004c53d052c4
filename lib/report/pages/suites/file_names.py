"""The names of the files that each suite writes into a result folder."""

FILES = {
    "comprehensive": (
        "comprehensive_optimization_benchmark_results.json",
        "comprehensive_optimization_benchmark_report.md",
    ),
    "enhanced": (
        "enhanced_optimization_impact_benchmark_results.json",
        "enhanced_optimization_impact_benchmark_report.md",
    ),
    "coverage": ("optimization_coverage_report.md",),
    "all": ("master_benchmark_results_all_optimizations.json", "benchmark_execution_report_all_optimizations.txt"),
    "complete": ("complete_benchmark_suite_results.json",),
}
PARTS = ("comprehensive", "enhanced", "coverage", "all")  # parts of the complete suite, besides its own file


def files(kind: str) -> tuple[str, ...]:
    """Return the names of the files that the suite `kind` writes; the complete suite writes all of them."""
    if kind == "complete":
        return tuple(name for part in (*PARTS, "complete") for name in FILES[part])
    return FILES[kind]
