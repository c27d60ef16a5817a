"""The typed configuration: its keys, and how files and overrides become one."""

from lit_eemllm.config.keys import Config
from lit_eemllm.config.load import config_hash, current_key, flat, is_key, load_config, nearest_key, to_yaml

__all__ = ["Config", "config_hash", "current_key", "flat", "is_key", "load_config", "nearest_key", "to_yaml"]
