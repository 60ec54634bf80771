"""Configuration of a reference, its KL penalty, its sync, and of a whole run.

The defaults are a recipe to start from. An object with invalid settings raises ValueError when it is made, so that they
cannot reach a run.

Objects are frozen and keep the given values, so `dataclasses.replace` and a round trip through `asdict` give the same
as a new object. `settled()` returns the values that open fields stand for.
"""

from refkl.config.kl import KLConfig, SettledKL
from refkl.config.options import (
    BackendName,
    DtypeName,
    OnCheckpointError,
    Prefix,
    Quantization,
    ResumedReference,
    choices,
    is_import_path,
)
from refkl.config.reference import ReferenceConfig, ScoringConfig
from refkl.config.reward import RewardConfig, SettledReward
from refkl.config.run import (
    REWARDED,
    CheckpointConfig,
    DataConfig,
    LaunchConfig,
    Method,
    ModelConfig,
    ResumeConfig,
    RunConfig,
    SamplesConfig,
)
from refkl.config.sync import SettledSync, SyncConfig

__all__ = [
    "REWARDED",
    "BackendName",
    "CheckpointConfig",
    "DataConfig",
    "DtypeName",
    "KLConfig",
    "LaunchConfig",
    "Method",
    "ModelConfig",
    "OnCheckpointError",
    "Prefix",
    "Quantization",
    "ReferenceConfig",
    "ResumeConfig",
    "ResumedReference",
    "RewardConfig",
    "RunConfig",
    "SamplesConfig",
    "ScoringConfig",
    "SettledKL",
    "SettledReward",
    "SettledSync",
    "SyncConfig",
    "choices",
    "is_import_path",
]
