"""refkl: keep a policy tied to its reference model.

reference = refkl.build_reference(policy)                  # the policy as it is now, in the cheapest exact form
pair = refkl.score_pair(policy, reference, batch)          # log-probabilities of both, in nats
output = refkl.KLPenalty(refkl.KLConfig(coef=0.1))(pair.policy, pair.reference, batch.completion_mask)
(loss + output.loss).backward()
"""

from refkl import kl
from refkl.checks import Finding, check_reference
from refkl.config import KLConfig, ReferenceConfig, ScoringConfig, SyncConfig
from refkl.freeze import freeze, frozen_parameters, trainable_parameters
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
