"""lit_eemllm: train multimodal LLMs in which the treatment of visual tokens is an experiment variable."""

__version__ = "0.1.0"
