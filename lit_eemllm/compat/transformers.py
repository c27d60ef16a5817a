"""What we use of transformers that its versions name differently."""

from __future__ import annotations

from dataclasses import fields

from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
"""The key/value cache, as an argument of models and as a key of their outputs: ``past_key_values`` before 5.24."""
