"""A decoder family of your own, complete: Arcee, whose layers are Llama's but for a feed-forward network of two matrices.

lit-eemllm fit my_config.yaml --import docs/my_decoder.py model.decoder=arcee-ai/AFM-4.5B
"""

from lit_eemllm.core.families import register_family

register_family("arcee", ffn_matrices=2)
