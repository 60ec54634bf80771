"""Configuration of a reference, its KL penalty, its sync, and of a whole run.

Defaults are the recipe to start from. Nonsense is refused when an object is made, so that it cannot reach a run.
"""

from refkl.config.kl import KLConfig
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
from refkl.config.reward import RewardConfig
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
from refkl.config.sync import SyncConfig

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
    "SyncConfig",
    "choices",
    "is_import_path",
]
