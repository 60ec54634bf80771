"""Configuration of a reference, its KL penalty, its sync, and of a whole run.

Defaults are the recipe to start from. Nonsense is refused when an object is made, so that it cannot reach a run.

Objects are frozen and hold what they were given: `dataclasses.replace` and `asdict` round trips mean what a new object
would. `settled()` says what a field means that is left open.
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
