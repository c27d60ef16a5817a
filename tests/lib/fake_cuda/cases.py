"""Names of what is tried on the fake device, for parametrised tests: without importing what takes seconds."""

MECHANISMS = (
    "llava", "ee_mllm", "ee_mllm_f", "naavit", "shortv", "saisa", "vica", "flamingo",
    "fastv", "hidrop", "visionzip", "skip_vision", "bidirectional", "visual_experts", "p_mod", "deepstack", "casa",
    "unrotated", "shared", "window", "some", "apart", "dropping", "sliding", "chunks",
)  # fmt: skip
"""Presets that differ in what they compute, and what no preset does; `steps.OTHERS` says what these are."""
BACKENDS = ("reference", "sdpa", "cudnn", "flash", "flash-attn", "xformers", "flex")
EXACT = ("reference", "sdpa", "xformers", "flex")  # compute in float32 too
TUNINGS = ("frozen", "lora", "full")
KINDS = ("float32", "bfloat16", "exact")
