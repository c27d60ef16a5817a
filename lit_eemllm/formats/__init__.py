"""Models in and out: transformers' LLaVA family, folders of ours, other mechanisms, merged adapters."""
