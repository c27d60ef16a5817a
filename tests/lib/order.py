"""Modules that take a worker minutes begin first, the longest before the others, so that workers end together."""

LONGEST = [
    f"test_{name}.py"
    for name in ("distributed_runs", "faults", "faults_data", "presets", "installed", "distributed", "sweep_real", "sweep_stopped", "fuzz_results", "documentation", "estimate_measured", "evaluation", "asking", "training", "sources", "fuzz_models")
]  # fmt: skip
