"""EE-MLLM-F (2408.11795v3, its abstract): a trained LLaVA whose visual tokens stop querying, without training.

Our reading: the paper's layers and window were not found. Here the first half of the layers is LLaVA's and the rest EE-MLLM's, since
late layers do least between visual tokens (calibrate finds layers on your own model), and a visual token sees itself alone, or
``visual_window`` tokens of its image before it.
"""

from .base import Mechanism, register_mechanism

register_mechanism("ee_mllm_f", Mechanism(dense_layers=tuple(range(16))))
