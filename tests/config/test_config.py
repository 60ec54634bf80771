"""KLConfig, SyncConfig, ReferenceConfig: nonsense is refused when it is written down."""

import copy
import dataclasses
import itertools
import math
import pickle

import pytest

from refkl import KLConfig, KLPenalty, ReferenceConfig, SyncConfig
from refkl.config import (
    DataConfig,
    LaunchConfig,
    ModelConfig,
    RewardConfig,
    RunConfig,
    SamplesConfig,
    ScoringConfig,
    SettledKL,
    SettledSync,
)
from refkl.kl import CONTROLLERS

LINEAR = {"controller": "linear", "end_coef": 0.1, "steps": 10}
ADAPTIVE = {"controller": "adaptive", "target": 6.0, "horizon": 10000}
DUAL = {"controller": "dual", "target": 6.0}
REWARD = {"placement": "reward"}
USES = {
    "fixed": set(),
    "linear": {"end_coef", "steps"},
    "cosine": {"end_coef", "steps"},
    "adaptive": {"target", "horizon", "unit"},
    "dual": {"target", "unit", "learning_rate", "min_coef", "max_coef"},
}
VALUES = {
    "end_coef": 0.2, "steps": 5, "target": 2.0, "horizon": 100, "unit": "token", "learning_rate": 0.3, "min_coef": 0.01,
    "max_coef": 0.7,
}  # fmt: skip
OPTIONAL = {"unit", "learning_rate", "min_coef", "max_coef"}


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_each_controller_takes_its_own_fields_and_no_other(controller):
    own = {name: VALUES[name] for name in USES[controller]}
    made = KLConfig(coef=0.1, controller=controller, **own).make_controller()
    assert type(made) is CONTROLLERS[controller] and made.coef == 0.1
    assert {name: getattr(made, name) for name in own} == own
    for name in own.keys() - OPTIONAL:
        missing = {k: v for k, v in own.items() if k != name}
        with pytest.raises(ValueError, match=rf"kl.controller '{controller}' needs kl.{name}, which is not set"):
            KLConfig(controller=controller, **missing)
    for name in VALUES.keys() - own.keys():
        users = " and ".join(repr(c) for c in CONTROLLERS if name in USES[c])
        with pytest.raises(
            ValueError, match=rf"kl.{name} has no use with controller '{controller}': it is for {users}"
        ):
            KLConfig(controller=controller, **own, **{name: VALUES[name]})


def test_controllers_left_to_their_defaults():
    for options in (ADAPTIVE, DUAL):
        assert KLConfig(**options).make_controller().unit == "sequence"
    dual = KLConfig(**DUAL).make_controller()
    assert (dual.learning_rate, dual.min_coef, dual.max_coef) == (0.1, 1e-6, 100.0)


def test_what_is_left_open_is_settled_by_where_the_penalty_goes():
    loss, reward = KLConfig(), KLConfig(placement="reward")
    assert loss.settled() == SettledKL(estimator="k3", reward=None, gamma=1.0)
    assert reward.settled() == SettledKL(estimator="k1", reward="return_to_go", gamma=1.0)
    assert KLPenalty(reward).settled == reward.settled()
    assert KLConfig(placement="reward", estimator="k3", gradient="none").estimator == "k3"  # when it is asked for
    for config in (loss, reward, KLConfig(**DUAL, unit="token")):
        assert KLConfig(**dataclasses.asdict(config)) == config
    run = RunConfig(method="dpo", model=ModelConfig(path="model"), data=DataConfig(source="data.jsonl"))
    assert run.kl == KLConfig()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        *((KLConfig, {"coef": c}, r"coefficient must be finite and not negative.*rewards drift") for c in (-0.1, -1)),
        *((KLConfig, {"coef": c}, r"coefficient must be finite") for c in (math.inf, math.nan)),
        *((KLConfig, {"max_log_ratio": m}, r"kl.max_log_ratio must be positive") for m in (0.0, -5.0, math.nan)),
        (KLConfig, {"estimator": "k1", "gradient": "autograd"}, r"penalises nothing.*mean zero.*'reverse_kl'"),
        (KLConfig, {"estimator": "k1", "gradient": "autograd", "coef": 0.0, **LINEAR}, r"penalises nothing.*mean zero"),
        (KLConfig, {"gradient": "none"}, r"'none' penalises nothing in the loss.*placement 'reward'"),
        # the controllers' own fields
        (KLConfig, {"coef": 0.0, **ADAPTIVE}, r"adaptive controller multiplies its coefficient, .* never leave 0\.0"),
        (KLConfig, {**ADAPTIVE, "target": -1.0}, r"target must be positive"),
        (KLConfig, {**ADAPTIVE, "horizon": 0}, r"horizon must be positive"),
        (KLConfig, {**LINEAR, "steps": 0}, r"steps count optimizer steps"),
        (KLConfig, {**LINEAR, "end_coef": -0.1}, r"end_coef must be finite and not negative"),
        (KLConfig, {**DUAL, "min_coef": 0.1}, r"coefficient 0\.05 is not within its bounds"),
        # a length, and what has no use
        (KLConfig, {"aggregation": "seq-mean-token-sum-norm"}, r"was given none. Set length"),
        (KLConfig, {"length": 512}, r"length 512 has no use with aggregation 'token-mean'"),
        (KLConfig, {"reward": "token"}, r"kl.reward has no use with placement 'loss'. Set kl.placement 'reward'"),
        (KLConfig, {"gamma": 1.0}, r"kl.gamma has no use with placement 'loss'"),
        (KLConfig, {**REWARD, "gamma": 1.5}, r"gamma must be in \(0, 1\]"),
        (KLConfig, {**REWARD, "reward": "token", "gamma": 1.0}, r"kl.gamma has no use with reward 'token'"),
        (KLConfig, {**REWARD, "gradient": "autograd"}, r"'autograd' has no use with placement 'reward'"),
        (KLConfig, {**REWARD, "aggregation": "token-sum"}, r"kl.aggregation and kl.length have no use.*stay per token"),
        (KLConfig, {**REWARD, "length": 9}, r"kl.aggregation and kl.length have no use"),
        (KLConfig, {**REWARD, "estimator": "exact"}, r"'exact' does not go into the reward.*Use 'k1'"),
        (KLConfig, {"estimator": "exact", "max_log_ratio": 5.0}, r"kl.max_log_ratio has no use with estimator 'exact'"),
        (KLConfig, {"estimator": "exact", "gradient": "autograd"}, r"'autograd' has no use with estimator 'exact'"),
        (KLConfig, {"estimator": "exact", "gradient": "none", "coef": 0}, r"'none' has no use with estimator 'exact'"),
        *((SyncConfig, {"every": n}, r"sync.every counts optimizer steps.*at least 1") for n in (0, -1)),
        *((SyncConfig, {"alpha": a}, r"sync.alpha must be in \(0, 1\]") for a in (0.0, -0.1, 1.01, math.nan)),
        (ReferenceConfig, {"strategy": ""}, r"reference.strategy is empty"),
        (ReferenceConfig, {"source": ""}, r"reference.source is empty"),
        *((SamplesConfig, {"max_new_tokens": n}, r"samples.max_new_tokens must be at least 1") for n in (0, -1)),
        *((SamplesConfig, {"temperature": t}, r"samples.temperature must be finite") for t in (math.nan, math.inf, -1)),
        *((LaunchConfig, {"processes": n}, r"launch.processes must be at least 1") for n in (0, -2)),
        *((RewardConfig, {"task": "a", "weight": w}, r"reward.weight must be finite") for w in (math.nan, -math.inf)),
    ],
)
def test_refusals(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (KLConfig, {"placement": "advantage"}),
        (KLConfig, {"controller": "adaptative"}),
        (KLConfig, {"placement": "reward", "reward": "return-to-go"}),
        (KLConfig, {"controller": "dual", "target": 1.0, "unit": "nats"}),
        (KLConfig, {"gradient": "reverse-kl"}),
        (KLConfig, {"estimator": "k4"}),
        (KLConfig, {"aggregation": "mean"}),
        (ReferenceConfig, {"dtype": "int8"}),
        (ReferenceConfig, {"averages": None}),  # null is a value of optional fields only
        (KLConfig, {"placement": None}),
        (LaunchConfig, {"backend": "zero9"}),
        (ModelConfig, {"path": "a", "dtype": "int8"}),
    ],
)
def test_a_value_that_is_not_offered_is_refused(config, options):
    with pytest.raises(ValueError):
        config(**options)


def test_at_the_edge_of_what_is_allowed():
    assert KLConfig(coef=0.0, estimator="k1", gradient="autograd").coef == 0.0  # measured, not penalised
    assert KLConfig(coef=0.0, gradient="none").coef == 0.0
    assert KLConfig(placement="reward", gamma=1.0).gamma == 1.0
    assert SyncConfig(every=1, alpha=1.0).alpha == 1.0


def test_defaults_penalise_with_the_true_gradient():
    config = KLConfig()
    assert config.coef > 0 and config.gradient == "reverse_kl" and config.max_log_ratio is None
    assert KLPenalty().coef == config.coef


@pytest.mark.parametrize("way", ["file", "option", "option with ="])
def test_a_value_that_is_not_offered_is_told_with_those_that_are(way, tmp_path):
    import yaml

    from refkl.cli.settings import parse_run

    section = {"estimator": "k4" if way == "file" else "k3", "coef": 0.1}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": {"path": "x"}, "kl": section, "sync": None}))
    options = {"file": [], "option": ["--kl.estimator", "k4"], "option with =": ["--kl.estimator=k4"]}[way]
    with pytest.raises(ValueError, match=r"^Unknown kl\.estimator 'k4'\. Did you mean 'k[123]'\? Known: .*exact, k1"):
        parse_run([str(tmp_path / "run.yaml"), *options])


@pytest.mark.parametrize(
    "options",
    [
        {"controller": "adaptive", "target": 6.0, "horizon": 10000.0, "unit": "token"},
        {"controller": "cosine", "end_coef": 0.01, "steps": 40},
        {"placement": "reward", "gradient": "none", "reward": "sequence"},
        {"aggregation": "seq-mean-token-sum-norm", "length": 16},
        {"reference_weights": [0.25, 0.75]},
    ],
)
def test_every_field_can_be_given_on_the_command_line_and_survives_being_written(options, tmp_path):
    from support.launching import ROOT

    from refkl.cli.settings import parse_run

    arguments = [x for name, value in options.items() for x in (f"--kl.{name}", str(value))]
    run = parse_run([str(ROOT / "configs/quickstart.yaml"), *arguments])
    assert {name: getattr(run.config.kl, name) for name in options} == options
    (tmp_path / "again.yaml").write_text(run.resolved)
    assert parse_run([str(tmp_path / "again.yaml")]).config.kl == run.config.kl


def test_the_estimator_is_settled_by_the_placement_from_a_file_too(tmp_path):
    """The default of a whole run must not look like an estimator that was asked for."""
    import yaml
    from support.launching import ROOT

    from refkl.cli.settings import parse_run

    values = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    del values["kl"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    for arguments, estimator in (([], "k3"), (["--kl.placement", "reward"], "k1")):
        run = parse_run([str(tmp_path / "run.yaml"), *arguments])
        assert run.config.kl.estimator is None and run.config.kl.settled().estimator == estimator
        (tmp_path / "again.yaml").write_text(run.resolved)
        assert parse_run([str(tmp_path / "again.yaml")]).config.kl == run.config.kl


def test_a_biased_estimator_in_the_reward_is_said_to_be():
    with pytest.warns(UserWarning, match="'k3' in the reward is biased"):
        KLConfig(placement="reward", estimator="k3")


@pytest.mark.parametrize("fields", [{"placement": "reward"}, {"estimator": "exact"}])
def test_a_prefix_ratio_where_there_is_none_is_refused(fields):
    with pytest.raises(ValueError, match=r"kl\.ratio has no use"):
        KLConfig(ratio="prefix", **fields)


# a config holds what it was given


def run(**options):
    return RunConfig(model=ModelConfig(path="model"), data=DataConfig(source="data.jsonl"), **options)


GIVEN = [
    *((KLConfig, options) for options in (
        {}, {"coef": 0.3}, {"estimator": "k2"}, {"estimator": "exact"}, {"gradient": "autograd"}, {"coef": 0.0}, REWARD,
        {**REWARD, "reward": "sequence"}, {**REWARD, "gamma": 0.9}, {**REWARD, "gradient": "none"}, LINEAR, ADAPTIVE,
        DUAL, {**DUAL, "unit": "token", "max_coef": 9.0}, {"aggregation": "seq-mean-token-sum-norm", "length": 5},
        {"reference_weights": [0.25, 0.75]}, {"exact_every": 5}, {"max_log_ratio": 3.0}, {"ratio": "prefix"},
    )),
    *((SyncConfig, options) for options in (
        {}, {"every": 7}, {"alpha": 1.0}, {"average": "bema"}, {"average": "bema", "lag": 3.0, "every": 1},
        {"every": None, "max_kl": 0.1, "reset_optimizer": True}, {"lora": "product", "lora_rank": 4}, {"warmup": 3},
    )),
    *((RewardConfig, options) for options in (
        {"function": "a.b:c"}, {"function": "a.b:c", "name": "mine"}, {"model": "models/judge", "label": 1},
        {"task": "gcd"}, {"task": "gcd", "answer": "whole", "weight": 0.5},
    )),
    *((ReferenceConfig, options) for options in (
        {}, {"strategy": "clone", "quantize": "int8", "max_kl_floor": 0.3}, {"source": "base", "cache": "scores"},
    )),
    (ScoringConfig, {"prefix": "off"}),
    (run, {"method": "dpo"}),
    (run, {"method": "sft", "sync": SyncConfig(average="bema")}),
    (run, {"method": "sft", "kl": KLConfig(estimator="exact")}),
    (run, {"reward": [RewardConfig(task="gcd"), RewardConfig(function="a:b")], "kl": KLConfig(**REWARD)}),
]  # fmt: skip
"""What makes a configuration, and fields that it takes: valid all of them."""


@pytest.mark.parametrize(("make", "options"), GIVEN)
def test_fields_keep_what_was_given_and_cannot_be_set(make, options):
    config = make(**options)
    cls = type(config)
    for field in dataclasses.fields(cls):
        if cls is not RunConfig or field.name not in ("model", "data"):
            default = field.default
            if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            assert getattr(config, field.name) == options.get(field.name, default), field.name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, -3.0)


def rebuilt(cls, values):
    """A configuration from what asdict made of it, its sections too."""
    sections = {"model": ModelConfig, "data": DataConfig, "kl": KLConfig, "sync": SyncConfig}
    sections |= {"reference": ReferenceConfig, "scoring": ScoringConfig}
    if cls is RunConfig:
        for name, section in sections.items():
            values[name] = None if values[name] is None else section(**values[name])
        values["reward"] = [RewardConfig(**reward) for reward in values["reward"]]
        for name in ("samples", "launch", "checkpoint", "resume"):
            del values[name]  # as they are by default here
    return cls(**values)


@pytest.mark.parametrize(("make", "options"), GIVEN)
def test_round_trips_and_copies_are_equal_and_mean_the_same(make, options):
    config = make(**options)
    cls = type(config)
    ways = [dataclasses.replace(config), copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))]
    ways.append(rebuilt(cls, dataclasses.asdict(config)))
    for again in ways:
        assert again == config and type(again) is cls
        if hasattr(config, "settled"):
            assert again.settled() == config.settled()


@pytest.mark.filterwarnings("ignore:kl.estimator")
def test_replacing_fields_gives_what_a_new_config_would():
    """For each two valid sets of fields of a class: from the one, by replace, to the other, or the same refusal."""
    tried = 0
    for (make, before), (other, after) in itertools.permutations(GIVEN, 2):
        if make is not other or make is run:
            continue
        start = make(**before)
        fresh = {field.name: field.default for field in dataclasses.fields(start)}
        changes = {name: after.get(name, fresh[name]) for name in {**before, **after}}
        assert dataclasses.replace(start, **changes) == make(**after)
        if hasattr(start, "settled"):
            assert dataclasses.replace(start, **changes).settled() == make(**after).settled()
        try:
            expected = make(**{**before, **after})
        except ValueError as refusal:
            with pytest.raises(ValueError) as found:
                dataclasses.replace(start, **after)
            assert str(found.value) == str(refusal)
        else:
            assert dataclasses.replace(start, **after) == expected
        tried += 1
    assert tried > 300


def test_a_replaced_field_settles_the_others_anew():
    assert dataclasses.replace(KLConfig(coef=0.05), placement="reward").settled().estimator == "k1"
    loss = dataclasses.replace(KLConfig(**REWARD), placement="loss")
    assert loss == KLConfig() and loss.settled() == SettledKL(estimator="k3", reward=None, gamma=1.0)
    assert dataclasses.replace(KLConfig(coef=0.05), coef=0.1).on_given_text().estimator == "exact"
    assert KLConfig(**dataclasses.asdict(KLConfig())).on_given_text().estimator == "exact"
    bema = dataclasses.replace(SyncConfig(), average="bema")
    assert bema.settled() == SettledSync(alpha=None, ema_power=0.5, bias_power=0.2, lag=10.0)
    ema = dataclasses.replace(bema, average="ema")
    assert ema.settled() == SettledSync(alpha=0.6, ema_power=None, bias_power=None, lag=None)
    resets = dataclasses.replace(SyncConfig(), every=None, max_kl=0.1).settled()
    assert resets == SettledSync(alpha=None, ema_power=None, bias_power=None, lag=None)
    reward = dataclasses.replace(RewardConfig(function="a:b"), function=None, task="gcd")
    assert (reward.settled().name, reward.settled().answer) == ("gcd", "tagged")
    assert run(method="sft").kl == KLConfig() == dataclasses.replace(run(method="sft"), method="dpo").kl
    with pytest.raises(ValueError, match="Here the tokens are given"):
        run(method="sft", kl=KLConfig(estimator="k3"))
