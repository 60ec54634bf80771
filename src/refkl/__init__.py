"""refkl: keep a policy tied to its reference model.

reference = refkl.build_reference(policy)                  # the policy as it is now, in the cheapest exact form
pair = refkl.score_pair(policy, reference, batch)          # log-probabilities of both, in nats
output = refkl.KLPenalty(refkl.KLConfig(coef=0.1))(pair.policy, pair.reference, batch.completion_mask)
(loss + output.loss).backward()
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refkl import kl
    from refkl.checks import Finding, check_reference
    from refkl.config import KLConfig, ReferenceConfig, ScoringConfig, SyncConfig
    from refkl.freezing import freeze, frozen_parameters, trainable_parameters
    from refkl.penalty import KLPenalty, global_normalizer
    from refkl.reference import (
        STRATEGIES,
        BuildRequest,
        HeldReference,
        Reference,
        build_reference,
        register_strategy,
        score_pair,
    )
    from refkl.scoring import score_tokens
    from refkl.sync import ReferenceSync, SyncReferenceCallback
    from refkl.types import KLFloor, KLOutput, MemoryReport, PairScores, TokenBatch, TokenScores

__version__ = "0.1.0"

__all__ = [
    "STRATEGIES",
    "BuildRequest",
    "Finding",
    "HeldReference",
    "KLConfig",
    "KLFloor",
    "KLOutput",
    "KLPenalty",
    "MemoryReport",
    "PairScores",
    "Reference",
    "ReferenceConfig",
    "ReferenceSync",
    "ScoringConfig",
    "SyncConfig",
    "SyncReferenceCallback",
    "TokenBatch",
    "TokenScores",
    "build_reference",
    "check_reference",
    "freeze",
    "frozen_parameters",
    "global_normalizer",
    "kl",
    "register_strategy",
    "score_pair",
    "score_tokens",
    "trainable_parameters",
]

_MODULES = {
    "checks": ("Finding", "check_reference"),
    "config": ("KLConfig", "ReferenceConfig", "ScoringConfig", "SyncConfig"),
    "freezing": ("freeze", "frozen_parameters", "trainable_parameters"),
    "penalty": ("KLPenalty", "global_normalizer"),
    "reference": (
        "STRATEGIES",
        "BuildRequest",
        "HeldReference",
        "Reference",
        "build_reference",
        "register_strategy",
        "score_pair",
    ),
    "scoring": ("score_tokens",),
    "sync": ("ReferenceSync", "SyncReferenceCallback"),
    "types": ("KLFloor", "KLOutput", "MemoryReport", "PairScores", "TokenBatch", "TokenScores"),
}
"""Each is imported when one of its names is first used, so that `import refkl` and the command start at once."""


def __getattr__(name: str) -> Any:
    if (module := next((module for module, names in _MODULES.items() if name in names), None)) is not None:
        globals()[name] = value = getattr(importlib.import_module(f"refkl.{module}"), name)
        return value
    if name.startswith("_") or importlib.util.find_spec(f"refkl.{name}") is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"refkl.{name}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
