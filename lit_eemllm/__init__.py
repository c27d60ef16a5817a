"""lit_eemllm: train multimodal LLMs in which the treatment of visual tokens is an experiment variable."""

import logging

from lit_eemllm.doors import open_doors

__version__ = "0.1.0"

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it, and it tells which faster kernels it lacks
open_doors()
