"""KLConfig, SyncConfig, ReferenceConfig: nonsense is refused when it is written down."""

import math

import pytest
import torch

from refkl import KLConfig, KLPenalty, ReferenceConfig, SyncConfig
from refkl.kl import FixedKL


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        *((KLConfig, {"coef": c}, r"coefficient must be finite and not negative.*rewards drift") for c in (-0.1, -1)),
        *((KLConfig, {"coef": c}, r"coefficient must be finite") for c in (math.inf, math.nan)),
        *((KLConfig, {"max_log_ratio": m}, r"kl.max_log_ratio must be positive") for m in (0.0, -5.0, math.nan)),
        (KLConfig, {"estimator": "k1", "gradient": "autograd"}, r"penalises nothing.*mean zero.*'reverse_kl'"),
        *((SyncConfig, {"every": n}, r"sync.every counts optimizer steps.*at least 1") for n in (0, -1)),
        *((SyncConfig, {"alpha": a}, r"sync.alpha must be in \(0, 1\]") for a in (0.0, -0.1, 1.01, math.nan)),
        (ReferenceConfig, {"strategy": ""}, r"reference.strategy is empty"),
        (ReferenceConfig, {"source": ""}, r"reference.source is empty"),
    ],
)
def test_refusals(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (KLConfig, {"placement": "reward"}),
        (KLConfig, {"gradient": "none"}),
        (KLConfig, {"gradient": "reverse-kl"}),
        (KLConfig, {"estimator": "k4"}),
        (KLConfig, {"aggregation": "mean"}),
        (ReferenceConfig, {"dtype": "int8"}),
    ],
)
def test_a_value_that_is_not_offered_is_refused(config, options):
    with pytest.raises(ValueError):
        config(**options)


def test_at_the_edge_of_what_is_allowed():
    assert KLConfig(coef=0.0, estimator="k1", gradient="autograd").coef == 0.0  # measured, not penalised
    assert SyncConfig(every=1, alpha=1.0).alpha == 1.0


def test_defaults_penalise_with_the_true_gradient():
    config = KLConfig()
    assert config.coef > 0 and config.gradient == "reverse_kl" and config.max_log_ratio is None
    assert KLPenalty().coef == config.coef


def test_fixed_coefficient_takes_no_notice_of_the_kl():
    controller = FixedKL(0.2)
    controller.update(100.0, 64)
    assert controller.coef == 0.2
    other = FixedKL(torch.tensor(0.5).item())
    other.load_state_dict(controller.state_dict())
    assert other.coef == 0.2
