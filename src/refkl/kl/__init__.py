"""KL maths on plain tensors: no model, no configuration, no process group.

Directions, written once. d = log p_policy - log p_reference. `reverse_kl` is KL(policy ‖ reference) = E_policy[d];
`forward_kl` is KL(reference ‖ policy) = E_reference[-d].
"""

from refkl.kl.aggregation import AGGREGATIONS, aggregate, aggregation_count
from refkl.kl.controllers import FixedKL
from refkl.kl.divergences import DIVERGENCES, divergence
from refkl.kl.estimators import ESTIMATORS, GRADIENTS, estimate, saturated
from refkl.kl.logprobs import token_logp

__all__ = [
    "AGGREGATIONS",
    "DIVERGENCES",
    "ESTIMATORS",
    "GRADIENTS",
    "FixedKL",
    "aggregate",
    "aggregation_count",
    "divergence",
    "estimate",
    "saturated",
    "token_logp",
]
