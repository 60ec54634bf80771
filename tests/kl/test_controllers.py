"""kl controllers: hand-computed coefficients, a budget that is held in a small simulation, states exact in JSON."""

import json
import math

import pytest

from refkl.kl import CONTROLLERS, AdaptiveKL, CosineKL, DualKL, FixedKL, LinearKL

MAKE = {
    "fixed": lambda **options: FixedKL(**{"coef": 0.2, **options}),
    "linear": lambda **options: LinearKL(**{"coef": 0.2, "end_coef": 0.05, "steps": 7, **options}),
    "cosine": lambda **options: CosineKL(**{"coef": 0.2, "end_coef": 0.05, "steps": 7, **options}),
    "adaptive": lambda **options: AdaptiveKL(**{"coef": 0.2, "target": 6.0, "horizon": 1000, **options}),
    "dual": lambda **options: DualKL(**{"coef": 0.2, "target": 6.0, **options}),
}
KLS = [5.0, 7.5, 0.1, 100.0, -0.5, 6.0, 13.0, 5.9]


def path(controller, kls=KLS, n=64):
    """The coefficient of each step, the first one before any update."""
    coefs = [controller.coef]
    for kl in kls:
        controller.update(kl, n)
        coefs.append(controller.coef)
    return coefs


def test_every_controller_is_tested_here():
    assert set(CONTROLLERS) == set(MAKE)
    assert all(type(MAKE[name]()) is cls and cls.name == name for name, cls in CONTROLLERS.items())


# what the coefficient becomes


def test_fixed_takes_no_notice():
    assert path(FixedKL(0.2), [100.0, 0.0, math.nan]) == [0.2] * 4
    assert FixedKL(0.0).coef == 0.0


def test_linear_by_hand():
    controller = LinearKL(0.5, 0.1, 4)
    assert path(controller, [0.0] * 6) == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1], rel=1e-15)
    assert controller.coef == 0.1  # exactly, and it stays
    assert path(LinearKL(0.0, 1.0, 2), [1.0, 1.0, math.nan], n=0) == [0.0, 0.5, 1.0, 1.0]


def test_cosine_by_hand():
    half = 0.5 * (1 - math.sqrt(0.5))
    expected = [0.5, 0.5 - 0.4 * half, 0.3, 0.1 + 0.4 * half, 0.1, 0.1]
    assert path(CosineKL(0.5, 0.1, 4), [0.0] * 5) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize(
    ("kl", "n", "factor"),
    [
        (6.6, 64, 1 + 0.1 * 64 / 1000),  # 10 % over the target
        (5.4, 64, 1 - 0.1 * 64 / 1000),
        (600.0, 64, 1 + 0.2 * 64 / 1000),  # clipped
        (0.0, 64, 1 - 0.2 * 64 / 1000),
        (-3.0, 64, 1 - 0.2 * 64 / 1000),  # k1 of a small batch can be negative
        (6.0, 64, 1.0),
        (600.0, 0, 1.0),
        (0.0, 4999, 1 - 0.2 * 4.999),  # as far as one step may go
    ],
)
def test_adaptive_is_the_formula_of_ziegler_et_al(kl, n, factor):
    controller = AdaptiveKL(0.2, 6.0, 1000)
    controller.update(kl, n)
    assert controller.coef == pytest.approx(0.2 * factor, rel=1e-12) and controller.coef > 0
    assert controller.unit == "sequence"


@pytest.mark.parametrize(
    ("kl", "n", "factor"),
    [
        (9.0, 64, math.exp(0.3 * 0.5)),
        (3.0, 64, math.exp(-0.3 * 0.5)),
        (9.0, 1, math.exp(0.3 * 0.5)),  # whatever the batch size
        (1e9, 64, math.exp(0.3)),
        (-1e9, 64, math.exp(-0.3)),
        (6.0, 64, 1.0),
        (9.0, 0, 1.0),
    ],
)
def test_dual_steps_in_log_space(kl, n, factor):
    controller = DualKL(0.2, 6.0, learning_rate=0.3)
    controller.update(kl, n)
    assert controller.coef == pytest.approx(0.2 * factor, rel=1e-12)


def test_dual_stays_within_its_bounds():
    assert path(DualKL(0.2, 6.0, 1.0, min_coef=0.1, max_coef=0.4), [99.0] * 3)[-2:] == [0.4, 0.4]
    assert path(DualKL(0.2, 6.0, 1.0, min_coef=0.1, max_coef=0.4), [0.0] * 3)[-2:] == [0.1, 0.1]


# a budget that is held


REWARDS = [0.0, 0.1, 0.3, 0.2, 0.9, 1.0]
REFERENCE = [0.55, 0.2, 0.12, 0.08, 0.03, 0.02]


def normalised(logits):
    top = max(logits)
    log_z = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - log_z for x in logits]


def divergence(log_p):
    return sum(math.exp(x) * (x - math.log(q)) for x, q in zip(log_p, REFERENCE, strict=True))


def optimum(coef):
    """What maximises E[reward] - coef · KL(policy ‖ reference) over six arms: p ∝ q · exp(reward / coef)."""
    return normalised([math.log(q) + r / coef for q, r in zip(REFERENCE, REWARDS, strict=True)])


def coefficient_for(target):
    """The coefficient whose optimum has this KL, by bisection."""
    low, high = 1e-3, 1e3
    for _ in range(200):
        coef = math.sqrt(low * high)
        low, high = (coef, high) if divergence(optimum(coef)) > target else (low, coef)
    return coef


def train(controller, steps, n=1):
    """[(KL, coefficient)] of a bandit policy by mirror ascent: each step it goes a tenth of the way to the optimum."""
    log_p, history = normalised([math.log(q) for q in REFERENCE]), []
    for _ in range(steps):
        best = optimum(controller.coef)
        log_p = normalised([0.9 * x + 0.1 * y for x, y in zip(log_p, best, strict=True)])
        controller.update(divergence(log_p), n)
        history.append((divergence(log_p), controller.coef))
    return history


@pytest.mark.parametrize("start", [1e-3, 0.05, 20.0])
@pytest.mark.parametrize("target", [0.1, 0.5, 1.5])
def test_dual_holds_its_budget_from_both_sides(start, target):
    """Whether it starts too loose or too tight, it ends at the one coefficient whose optimum has that KL."""
    history = train(DualKL(start, target, learning_rate=0.05), 3000)
    right = coefficient_for(target)
    assert (history[0][1] < right) == (start < 1.0)
    assert history[-1][0] == pytest.approx(target, rel=1e-8) and history[-300][0] == pytest.approx(target, rel=1e-6)
    assert history[-1][1] == pytest.approx(right, rel=1e-8)


def test_dual_rests_at_its_lower_bound_where_the_budget_is_never_reached():
    history = train(DualKL(1.0, 50.0, learning_rate=0.2, min_coef=0.3), 300)
    assert history[-1] == (pytest.approx(divergence(optimum(0.3)), rel=1e-8), 0.3)


@pytest.mark.parametrize("start", [1e-2, 5.0])
def test_adaptive_reaches_its_target_from_both_sides(start):
    history = train(AdaptiveKL(start, 0.5, horizon=10), 5000)
    assert history[-1] == (pytest.approx(0.5, rel=1e-8), pytest.approx(coefficient_for(0.5), rel=1e-8))


# states


@pytest.mark.parametrize("name", MAKE)
def test_a_restored_controller_goes_on_exactly(name):
    whole = path(MAKE[name]())
    first = MAKE[name]()
    path(first, KLS[:3])
    second = MAKE[name]()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert path(second, KLS[3:]) == whole[3:]
    assert len(set(whole)) == 1 if name == "fixed" else len(set(whole)) > 4


@pytest.mark.parametrize("name", MAKE)
def test_only_a_state_of_its_own_kind_is_loaded(name):
    for other in MAKE:
        controller = MAKE[name]()
        if other != name:
            with pytest.raises(ValueError, match=f"of the KL controller '{other}' and cannot be loaded by '{name}'"):
                controller.load_state_dict(MAKE[other](coef=0.5).state_dict())
            assert controller.coef == 0.2
    with pytest.raises(ValueError, match="of the KL controller None"):
        MAKE[name]().load_state_dict({"coef": 0.3})


# refusals


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("coef", [-0.1, math.nan, math.inf])
def test_a_coefficient_that_makes_no_sense_is_refused(name, coef):
    with pytest.raises(ValueError, match=r"coefficient must be finite and not negative.*rewards drift"):
        MAKE[name](coef=coef)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        *(
            (name, {"coef": 0.0}, rf"The {name} controller multiplies .* never leave 0\.0.*fixed controller")
            for name in ("adaptive", "dual")
        ),
        *((n, {"target": t}, "target must be positive") for n in ("adaptive", "dual") for t in (0.0, -1.0, math.nan)),
        *((n, {"unit": "tokens"}, "Unknown unit 'tokens'.*Did you mean 'token'") for n in ("adaptive", "dual")),
        *(("adaptive", {"horizon": h}, "horizon must be positive") for h in (0, -5, math.inf)),
        *(("dual", {"learning_rate": x}, "learning_rate must be positive") for x in (0.0, -0.1, math.nan)),
        *(("dual", {"min_coef": x}, "min_coef must be positive") for x in (0.0, -0.1)),
        ("dual", {"max_coef": math.inf}, "max_coef must be positive and finite"),
        ("dual", {"min_coef": 0.3}, r"coefficient 0\.2 is not within its bounds, min_coef 0\.3"),
        ("dual", {"max_coef": 0.1}, r"coefficient 0\.2 is not within its bounds"),
        *(
            (n, {"steps": s}, "steps count optimizer steps")
            for n in ("linear", "cosine")
            for s in (0, -3, 1.5, math.nan)
        ),
        *((n, {"end_coef": -0.1}, "end_coef must be finite and not negative") for n in ("linear", "cosine")),
    ],
)
def test_settings_that_make_no_sense_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        MAKE[name](**options)


@pytest.mark.parametrize("name", ["adaptive", "dual"])
@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_a_kl_that_is_not_finite_is_refused_and_changes_nothing(name, kl):
    controller = MAKE[name]()
    with pytest.raises(ValueError, match=f"The {name} controller was given a KL of {kl}"):
        controller.update(kl, 64)
    assert controller.coef == 0.2


def test_a_step_too_large_for_the_horizon_is_refused():
    controller = AdaptiveKL(0.2, 6.0, 1000)
    for n in (5000, 80000):
        with pytest.raises(ValueError, match=rf"n = {n} sequences is too much for a horizon of 1000.*{20 * n} would"):
            controller.update(0.0, n)
    with pytest.raises(ValueError, match="n counts sequences and cannot be negative"):
        controller.update(0.0, -1)
    assert controller.coef == 0.2


@pytest.mark.parametrize("cls", [AdaptiveKL, DualKL])
def test_a_state_of_another_unit_is_refused(cls):
    options = {"horizon": 100} if cls is AdaptiveKL else {}
    state = cls(0.1, target=1.0, unit="token", **options).state_dict()
    with pytest.raises(ValueError, match=r"per token, and this .* target is per sequence"):
        cls(0.1, target=1.0, unit="sequence", **options).load_state_dict(state)


def test_a_restored_coefficient_is_kept_within_bounds_that_are_narrower_now():
    state = DualKL(50.0, target=1.0).state_dict()
    narrow = DualKL(0.5, target=1.0, max_coef=1.0)
    narrow.load_state_dict(state)
    assert narrow.coef == 1.0
