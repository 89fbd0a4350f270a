"""Configuration of a run: every option is declared once, with its type, and checked before slow work begins.

A config file (`configs/gpt2.py`) returns the `ConfigDict` that `config_dict(Config(...))` makes, command-line
overrides edit it, and `resolve` turns it back into the frozen `Config` that all other code reads. So every option is a
field of `model.py`, `optimizer.py` or `sections.py`, and a user error is one line on stderr with exit code 2.
"""

from gptjax.config.arguments import choose, parse_arg
from gptjax.config.checks import check
from gptjax.config.computation import computation
from gptjax.config.edited import check_key, config_dict, overridden, replace, resolve
from gptjax.config.errors import UserError, naming, nearest, positive, require
from gptjax.config.loading import is_saved, load_config, read_config_file, split_argument
from gptjax.config.model import GPTConfig, VisionConfig
from gptjax.config.optimizer import OptimizerConfig
from gptjax.config.saved import changes, config_hash, differences, read_config, to_json, with_absolute_paths
from gptjax.config.sections import (
    BatchConfig,
    ChatConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    DPOConfig,
    EvaluationConfig,
    GRPOConfig,
    LoggingConfig,
    MeshConfig,
    PeftConfig,
    PPOConfig,
    RegularisationConfig,
    RLConfig,
    StabilityConfig,
    TaskConfig,
)

__all__ = [
    "BatchConfig",
    "ChatConfig",
    "CheckpointConfig",
    "Config",
    "DPOConfig",
    "DataConfig",
    "EvaluationConfig",
    "GPTConfig",
    "GRPOConfig",
    "LoggingConfig",
    "MeshConfig",
    "OptimizerConfig",
    "PPOConfig",
    "PeftConfig",
    "RLConfig",
    "RegularisationConfig",
    "StabilityConfig",
    "TaskConfig",
    "UserError",
    "VisionConfig",
    "changes",
    "check",
    "check_key",
    "choose",
    "computation",
    "config_dict",
    "config_hash",
    "differences",
    "is_saved",
    "load_config",
    "naming",
    "nearest",
    "overridden",
    "parse_arg",
    "positive",
    "read_config",
    "read_config_file",
    "replace",
    "require",
    "resolve",
    "split_argument",
    "to_json",
    "with_absolute_paths",
]
