"""KL maths on plain tensors, without a model, a configuration or a process group.

The directions are defined here. d = log p_policy - log p_reference. `reverse_kl` is KL(policy ‖ reference) =
E_policy[d]; `forward_kl` is KL(reference ‖ policy) = E_reference[-d].
"""

from refkl.kl.aggregation import AGGREGATIONS, aggregate, aggregation_count
from refkl.kl.controllers import CONTROLLERS, AdaptiveKL, Controller, CosineKL, DualKL, FixedKL, LinearKL
from refkl.kl.divergences import DIVERGENCES, divergence
from refkl.kl.estimators import ESTIMATORS, GRADIENTS, estimate, saturated
from refkl.kl.histogram import Histogram
from refkl.kl.job import TileScores, TokenLoss
from refkl.kl.linear import LinearPair, LinearScores, linear_divergence, linear_logp, linear_pair
from refkl.kl.logprobs import token_logp
from refkl.kl.rewards import REWARDS, place_rewards

__all__ = [
    "AGGREGATIONS",
    "CONTROLLERS",
    "DIVERGENCES",
    "ESTIMATORS",
    "GRADIENTS",
    "REWARDS",
    "AdaptiveKL",
    "Controller",
    "CosineKL",
    "DualKL",
    "FixedKL",
    "Histogram",
    "LinearKL",
    "LinearPair",
    "LinearScores",
    "TileScores",
    "TokenLoss",
    "aggregate",
    "aggregation_count",
    "divergence",
    "estimate",
    "linear_divergence",
    "linear_logp",
    "linear_pair",
    "place_rewards",
    "saturated",
    "token_logp",
]
