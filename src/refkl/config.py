"""Configuration of a reference, its KL penalty, its sync, and of a whole run.

Defaults are the recipe to start from. Nonsense is refused when an object is made, so that it cannot reach a run.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, field, replace
from inspect import Parameter, signature
from math import isclose
from pathlib import PurePath
from typing import Any, Literal, get_args, get_origin, get_type_hints

from refkl.kl import CONTROLLERS, Controller
from refkl.kl.aggregation import check_aggregation
from refkl.kl.rewards import check_rewards
from refkl.messages import unknown

Method = Literal["grpo", "rloo", "dpo", "kto", "sft"]
REWARDED = ("grpo", "rloo")
"""The methods that maximise a reward."""
BackendName = Literal["plain", "ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2"]
DtypeName = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["int8", "int4", "nf4"]
ResumedReference = Literal["recorded", "initial"]
OnCheckpointError = Literal["stop", "continue"]
Prefix = Literal["auto", "off"]


def choices(hint: Any) -> list[Any]:
    """What a Literal type lists, alone or in a union; nothing for other types."""
    return [x for h in (hint, *get_args(hint)) if get_origin(h) is Literal for x in get_args(h)]


def _offered(section: str, config: Any) -> None:
    """Raise ValueError for a field whose value is not among those that its Literal type lists."""
    for name, hint in get_type_hints(type(config)).items():
        options, value = choices(hint), getattr(config, name)
        if options and value is not None and value not in options:
            raise unknown(f"{section}.{name}", str(value), options)


@dataclass(kw_only=True)
class ReferenceConfig:
    """Which model is the reference, and how it is held."""

    strategy: str = "auto"
    """"auto" or a name in STRATEGIES ("adapter", "swap", "clone", "shared_trunk", "zero3", "fsdp2"). Auto: a PEFT
    policy with a fresh adapter takes "adapter"; any other of which part trains "swap"; else ZeRO-3 takes "zero3", FSDP2
    "fsdp2" and all else "clone"."""
    source: str = "policy"
    """"policy": the policy as it stands when the reference is built; where a prompt is learned (prompt, prefix and
    p-tuning) the bare base, since a new prompt changes the policy at once. "base": the bare base of a PEFT policy,
    without its adapter, be that trained or not. "pretrained": the weights that the policy was loaded from, also where
    it has been changed since. Anything else is a model folder to take weights from."""
    dtype: DtypeName | None = None
    """Kind of number the reference is held in; None follows the policy. A lower one puts a floor under the KL."""
    device: str | None = None
    """Where "clone" is held, as in "cuda:1"; for "swap", "cpu" is host memory. None follows the policy; but of "swap",
    what is more than a tenth of a GPU's memory is held by the host."""
    offload: bool = False
    """The reference's weights wait in host memory, and it runs on the device all the same: "clone" streams through it
    layer by layer, "zero3" and "fsdp2" part by part, "swap" exchanges one tensor at a time, as with device "cpu". A
    score moves all of them, so score whole rollout batches."""
    cache: str | None = None
    """A folder: log-probabilities that were scored once are kept there and not scored again, whatever the strategy, in
    this run or a later one. For preference data and repeated prompts; exact divergences are refused then."""
    quantize: Quantization | None = None
    """For "clone": its linear layers, but for the output head, in 8 bits ("int8", torchao) or 4 ("int4", torchao;
    "nf4", bitsandbytes). Puts a floor under the KL, which is measured before the first score: Reference.kl_floor."""
    max_tokens: int | None = None
    """Tokens that are scored at once; of more, rows are scored in parts, long ones with long ones. None for as many as
    the memory that is free allows; but where weights are sharded, for all of them, which moves the weights once. GRPO
    and RLOO then score a whole rollout in such parts, and otherwise in the micro-batches of its losses."""
    averages: Literal["device", "host"] = "device"
    """For a reference in 16 bits, or in fewer, that moves with alpha < 1: where the fp32 averages that it is written
    from are kept. Sharded as the reference is."""
    max_kl_floor: float = 0.05
    """For `quantize`: nats per token, the mean; a reference that rounding moved further than this is refused."""

    def __post_init__(self) -> None:
        _offered("reference", self)
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"reference.max_tokens must be at least 1, got {self.max_tokens}.")
        if not self.max_kl_floor > 0:
            raise ValueError(f"reference.max_kl_floor must be positive, got {self.max_kl_floor}.")
        if self.quantize is None and self.max_kl_floor != type(self).max_kl_floor:
            raise ValueError(
                "reference.max_kl_floor limits what quantising does, and reference.quantize is not set. Leave it out."
            )
        if not self.strategy:
            raise ValueError("reference.strategy is empty: use 'auto' or the name of a strategy.")
        if not self.source:
            raise ValueError("reference.source is empty: use 'policy', 'base', 'pretrained' or a model folder.")
        if self.cache == "":
            raise ValueError("reference.cache is empty: name a folder, or leave it out.")


@dataclass(kw_only=True)
class KLConfig:
    """Which KL is added, and how much of it.

    A field that the others leave without a use is refused when it is set, and so is one that is missing.
    """

    coef: float = 0.05
    """What the KL is multiplied by; under a controller, what it starts from. 0 measures it and penalises nothing."""
    estimator: Literal["k1", "k2", "k3", "abs", "exact"] | None = None
    """The value; see refkl.kl.estimate. None: "k3" in the loss, "k1" in the reward, where it alone is unbiased, and
    "exact" on text that no policy sampled (supervised fine-tuning). "exact": the divergence over the whole vocabulary,
    which the caller passes; for the loss."""
    gradient: Literal["reverse_kl", "autograd", "none"] = "reverse_kl"
    """"reverse_kl" is the gradient of KL(policy ‖ reference), for every estimator. "autograd" differentiates the
    estimator as it stands (k3 as in TRL's GRPO; k1 then has a gradient of mean zero). Both are for the loss: a reward
    is never differentiated, which "none" says too."""
    aggregation: Literal[
        "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
    ] = "token-mean"
    """In the loss, from tokens to one number; see refkl.kl.aggregate."""
    length: int | None = None
    """For aggregation "seq-mean-token-sum-norm", in tokens: the constant that each sequence's sum is divided by, such
    as the longest completion that is allowed."""
    placement: Literal["loss", "reward"] = "loss"
    """Where the penalty goes: added to the loss, or -coef · KL added to the reward of each token."""
    reward: Literal["return_to_go", "token", "sequence"] | None = None
    """For placement "reward", what a token is credited with: "return_to_go" (the default there), its KL and that of
    the tokens after it; "token", its own alone, for trainers that make returns of their own; "sequence", the sum, at
    the last token. See refkl.kl.place_rewards for which is unbiased."""
    gamma: float | None = None
    """For reward "return_to_go": the discount from one token to the next. None is 1, the exact gradient."""
    controller: Literal["fixed", "linear", "cosine", "adaptive", "dual"] = "fixed"
    """How coef changes over a run, once per optimizer step. "fixed": it stays. "linear", "cosine": to `end_coef` over
    `steps`. "adaptive": steers the KL to `target` within `horizon` (Ziegler et al., arXiv:1909.08593). "dual": keeps
    the KL within the budget `target`."""
    end_coef: float | None = None
    """For "linear" and "cosine": the last coefficient."""
    steps: int | None = None
    """For "linear" and "cosine": optimizer steps from `coef` to `end_coef`."""
    target: float | None = None
    """For "adaptive" and "dual": the KL to hold, in nats per `unit`."""
    unit: Literal["token", "sequence"] | None = None
    """For "adaptive" and "dual": what the target is per. None is "sequence": the mean of the KL summed over each."""
    horizon: float | None = None
    """For "adaptive": over how many sequences (tokens, if that is the unit) the coefficient changes by its most."""
    learning_rate: float | None = None
    """For "dual": the most that log coef changes in a step. None is 0.1."""
    min_coef: float | None = None
    """For "dual": the coefficient goes no lower. None is 1e-6."""
    max_coef: float | None = None
    """For "dual": the coefficient goes no higher. None is 100."""
    ratio: Literal["token", "prefix"] = "token"
    """In the loss, where another policy sampled the tokens (old_logp): each token's own ratio, or the product of the
    ratios up to it, which alone is unbiased for the sequence and has a variance that grows with its length."""
    max_log_ratio: float | None = None
    """Clamp the log-ratio to ± this in the estimate's value; the reverse-KL gradient is never clamped."""
    reference_weights: list[float] | None = None
    """For several references: the weight of each in their geometric mixture; they sum to 1. None weighs all alike."""
    exact_every: int | None = None
    """Optimizer steps between two measurements of the exact KL beside an estimate, logged as kl/exact: over the whole
    vocabulary, on one micro-batch of that step, with dropout off. Each costs a forward of policy and reference more."""

    def __post_init__(self) -> None:
        _offered("kl", self)
        self._chosen = self.estimator is not None
        controller = self.make_controller()
        if self.placement == "reward":
            self._check_reward()
        else:
            self._check_loss(penalises=controller.coef > 0 or self.controller != "fixed")
        if self.max_log_ratio is not None and not self.max_log_ratio > 0:
            raise ValueError(f"kl.max_log_ratio must be positive, got {self.max_log_ratio}.")
        if self.max_log_ratio is not None and self.estimator == "exact":
            raise ValueError(
                "kl.max_log_ratio has no use with estimator 'exact', which is of no log-ratio. Leave it out."
            )
        if self.reference_weights is not None:
            _check_weights(self.reference_weights)
        if self.exact_every is not None:
            self._check_exact_every(self.exact_every)

    def _check_exact_every(self, every: int) -> None:
        if every < 1:
            raise ValueError(f"kl.exact_every counts optimizer steps and must be at least 1, got {every}.")
        if self.estimator == "exact":
            raise ValueError(
                "kl.exact_every has no use with estimator 'exact', whose value is the exact KL at each step. Leave it "
                "out."
            )

    def on_given_text(self) -> KLConfig:
        """The same, for tokens that no policy sampled: "exact", if no estimator was asked for.

        Raises:
            ValueError: another one was.
        """
        settled = self if self._chosen else replace(self, estimator="exact")
        if settled.estimator != "exact":
            raise ValueError(
                f"kl.estimator {settled.estimator!r} estimates the KL from tokens that the policy sampled. Here the "
                "tokens are given, and of these it is no estimate of KL(policy ‖ reference). Use 'exact', or leave "
                "kl.estimator out."
            )
        return settled

    def make_controller(self) -> Controller:
        """The controller that these fields describe, at its start.

        Raises:
            ValueError: a field that the controller lacks or has no use for, or one that makes no sense.
        """
        takes = dict(signature(CONTROLLERS[self.controller]).parameters)
        given = {name: getattr(self, name) for name in _controller_fields() if getattr(self, name) is not None}
        for name in given:
            if name not in takes:
                users = [repr(c) for c, cls in CONTROLLERS.items() if name in signature(cls).parameters]
                raise ValueError(
                    f"kl.{name} has no use with controller {self.controller!r}: it is for {' and '.join(users)}. Set "
                    f"kl.controller, or leave kl.{name} out."
                )
        for name, parameter in takes.items():
            if parameter.default is Parameter.empty and name not in ("coef", *given):
                raise ValueError(f"kl.controller {self.controller!r} needs kl.{name}, which is not set.")
        return CONTROLLERS[self.controller](self.coef, **given)

    def _check_loss(self, penalises: bool) -> None:
        self.estimator = self.estimator or "k3"
        for name in ("reward", "gamma"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"kl.{name} has no use with placement 'loss'. Set kl.placement 'reward', or leave it out."
                )
        check_aggregation(self.aggregation, self.length)
        if self.estimator == "exact" and self.gradient != "reverse_kl":
            raise ValueError(
                f"kl.gradient {self.gradient!r} has no use with estimator 'exact': the divergence that is passed has a "
                "gradient of its own. Leave kl.gradient out."
            )
        if self.estimator == "exact" and self.ratio != "token":
            raise ValueError("kl.ratio has no use with estimator 'exact', which is not made of samples. Leave it out.")
        if not penalises:
            return
        if self.gradient == "none":
            raise ValueError(
                "kl.gradient 'none' penalises nothing in the loss. Use 'reverse_kl', or placement 'reward', or coef 0 "
                "to measure the KL alone."
            )
        if self.gradient == "autograd" and self.estimator == "k1":
            raise ValueError(
                "kl.estimator 'k1' with gradient 'autograd' penalises nothing: the gradient of k1 has mean zero. "
                "Use gradient 'reverse_kl', or estimator 'k2' or 'k3'."
            )

    def _check_reward(self) -> None:
        self.estimator = self.estimator or "k1"
        self.reward = self.reward or "return_to_go"
        if self.estimator == "exact":
            raise ValueError(
                "kl.estimator 'exact' does not go into the reward: a token's exact divergence is the same whichever "
                "token is sampled, so as a reward it teaches that token nothing. Use 'k1', or placement 'loss'."
            )
        if self.ratio != "token":
            raise ValueError(
                "kl.ratio has no use with placement 'reward': the trainer's own ratio weighs a reward. Leave it out."
            )
        if self.estimator != "k1" and self.coef > 0:
            warnings.warn(
                f"kl.estimator {self.estimator!r} in the reward is biased: it is not the gradient of KL(policy ‖ "
                "reference), and training can end with tokens given up altogether (docs/estimators.md). 'k1' is right "
                "there.",
                stacklevel=4,
            )
        if self.gradient == "autograd":
            raise ValueError(
                "kl.gradient 'autograd' has no use with placement 'reward', which is never differentiated."
            )
        if self.aggregation != "token-mean" or self.length is not None:
            raise ValueError(
                "kl.aggregation and kl.length have no use with placement 'reward': rewards stay per token, and the "
                "trainer's loss sums them up. Leave them out."
            )
        if self.gamma is not None:
            if self.reward != "return_to_go":
                raise ValueError(f"kl.gamma has no use with reward {self.reward!r}. Leave it out.")
            check_rewards(self.reward, self.gamma)


def _unsettled() -> KLConfig:
    """A KLConfig whose open fields are still None: as a default for the command line it is merged with what is given
    there, and an estimator that was settled for the loss would be taken for one that was asked for."""
    config = KLConfig()
    config.estimator = None
    return config


def _controller_fields() -> list[str]:
    """The settings of any controller, but for coef."""
    return sorted({name for cls in CONTROLLERS.values() for name in signature(cls).parameters} - {"coef"})


def _check_weights(weights: list[float]) -> None:
    """Raise ValueError unless these are weights of a mixture."""
    if not weights or not all(0.0 <= w <= 1.0 for w in weights) or not isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"kl.reference_weights must not be negative and must sum to 1, got {weights} with sum {sum(weights):g}."
        )


@dataclass(kw_only=True)
class ScoringConfig:
    """How a batch goes through policy and reference."""

    prefix: Prefix = "auto"
    """"auto": a prompt that several rows of a batch share is run once, and padding is not, for policy and reference
    alike, where scores and gradients are the same and it costs less. GRPO's and RLOO's micro-batches of one optimizer
    step are put together so that completions of one prompt meet. "off": batches are run as they are."""

    def __post_init__(self) -> None:
        _offered("scoring", self)


@dataclass(kw_only=True)
class SyncConfig:
    """When the reference moves, and how far.

    A field that the others leave without a use is refused when it is set.
    """

    every: int | None = 512
    """Optimizer steps between two syncs (not micro-batches), 1 for a moving average; None: only when `max_kl` says."""
    average: Literal["ema", "bema"] = "ema"
    """"ema": theta_ref <- (1 - alpha) theta_ref + alpha theta, with one `alpha`. "bema": a moving average whose alpha
    decays, and which is corrected for its lag (Block and Zhang, arXiv:2508.00180); holds two copies in fp32 more."""
    alpha: float | None = None
    """For "ema". 1 copies the policy (TR-DPO hard); None is 0.6, every 512 steps the soft variant's recommendation
    (Gorbatovski et al., arXiv:2404.09656)."""
    ema_power: float | None = None
    """For "bema": alpha at step t is (lag + t) to the power of minus this. None is 0.5."""
    bias_power: float | None = None
    """For "bema": the correction at step t, theta - theta_first, is weighed by (lag + t) to the power of minus this.
    None is 0.2."""
    lag: float | None = None
    """For "bema": how many steps old it begins. None is 10."""
    lora: Literal["factors", "product"] = "factors"
    """What of a LoRA policy's layers is averaged with alpha < 1: "factors", A and B each by itself, or "product", the
    change of weight B · A that they make, exactly; the reference's rank then grows with each sync."""
    lora_rank: int | None = None
    """For lora "product": the rank that the reference is cut back to at each sync, as the best approximation. None
    keeps the average exact, and its rank no higher than the smaller side of a layer's weight."""
    warmup: int = 0
    """Optimizer steps before any of it; `every` and "bema" count from there."""
    max_kl: float | None = None
    """Nats per token: when the KL to the reference passes this, the reference becomes a copy of the policy, whatever
    `every` says (ProRL's reset, arXiv:2505.24864)."""
    reset_optimizer: bool = False
    """At such a reset, also the optimizer's state: its moments are set to 0, as at the start."""
    first_kl_every: int | None = None
    """Optimizer steps between two measurements of the KL to the reference as it was first, on the tokens of that step:
    an anchor that moves hides how far it has gone. Costs a copy of what moves (none for a fresh adapter)."""

    def __post_init__(self) -> None:
        _offered("sync", self)
        if self.lora_rank is not None and self.lora != "product":
            raise ValueError(
                f"sync.lora_rank has no use with lora {self.lora!r}, which leaves the rank as it is. Set sync.lora "
                "'product', or leave it out."
            )
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"sync.lora_rank must be at least 1, got {self.lora_rank}.")
        if self.lora == "product" and self.average == "bema":
            raise ValueError(
                "sync.lora 'product' has no use with sync.average 'bema', which is corrected tensor by tensor. Leave "
                "it out."
            )
        for name in ("every", "first_kl_every"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"sync.{name} counts optimizer steps and must be at least 1, got {value}.")
        if self.every is None and self.max_kl is None:
            raise ValueError("sync.every is None and sync.max_kl is not set: the reference would never move.")
        if self.warmup < 0:
            raise ValueError(f"sync.warmup counts optimizer steps and cannot be negative, got {self.warmup}.")
        if self.max_kl is not None and not self.max_kl > 0.0:
            raise ValueError(f"sync.max_kl is in nats per token and must be positive, got {self.max_kl}.")
        if self.reset_optimizer and self.max_kl is None:
            raise ValueError("sync.reset_optimizer is for the reset at sync.max_kl, which is not set. Leave it out.")
        self._settle_average()

    def _settle_average(self) -> None:
        bema = {"ema_power": 0.5, "bias_power": 0.2, "lag": 10.0}
        own, others = ({"alpha": 0.6}, bema) if self.average == "ema" else (bema, {"alpha": 0.6})
        if self.every is None:
            own, others = {}, {**own, **others}
            if self.average != "ema":
                raise ValueError("sync.average 'bema' moves the reference every so many steps: set sync.every.")
        for name in others:
            if getattr(self, name) is not None:
                why = "without sync.every" if self.every is None else f"with sync.average {self.average!r}"
                raise ValueError(f"sync.{name} has no use {why}. Leave it out.")
        for name, default in own.items():
            if getattr(self, name) is None:
                setattr(self, name, default)
        if self.alpha is not None and not 0.0 < self.alpha <= 1.0:
            raise ValueError(f"sync.alpha must be in (0, 1], got {self.alpha}: at 0 the reference would never move.")
        if self.average == "bema":
            assert self.lag is not None and self.ema_power is not None and self.bias_power is not None
            if not (self.lag >= 0.0 and self.ema_power >= 0.0 and self.bias_power >= 0.0):
                raise ValueError(
                    f"sync.lag, .ema_power and .bias_power cannot be negative, got {self.lag}, {self.ema_power} and "
                    f"{self.bias_power}."
                )


@dataclass(kw_only=True)
class ModelConfig:
    """The policy to start from."""

    path: str
    """A model folder (or hub name), or "package.module:function" for a function that returns one."""
    dtype: DtypeName = "float32"
    """Kind of number the weights are loaded in. Mixed precision is the trainer's (`trainer.bf16`)."""
    freeze: list[str] = field(default_factory=list)
    """Module paths that do not train, such as "model.embed_tokens" or "model.layers.0"; see refkl.freeze."""
    init_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of transformers' from_pretrained, such as attn_implementation."""


@dataclass(kw_only=True)
class DataConfig:
    """Prompts for GRPO (column "prompt"), preferences for DPO ("prompt", "chosen", "rejected"), or texts for SFT
    ("prompt" and "completion", of which the completion is learnt; or "text", or "messages")."""

    source: str
    """A .jsonl, .json, .csv or .parquet file, a folder written by datasets.save_to_disk, "package.module:function" for
    a function that returns a datasets.Dataset, or "reasoning_gym:TASK" for the questions of a task of that package."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments for the function; for a task `size`, `seed`, `instructions`, `chat` and the task's own settings."""
    limit: int | None = None
    """Take this many rows at most."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"data.limit must be at least 1, got {self.limit}.")
        if self.kwargs and not is_import_path(self.source):
            raise ValueError(f"data.kwargs are arguments for a function, but data.source is {self.source!r}.")


@dataclass(kw_only=True)
class RewardConfig:
    """What GRPO maximises: one of `function`, `model` and `task`.

    A field that is for another one of the three is refused when it is set.
    """

    function: str | None = None
    """"package.module:function": called as TRL calls a reward function, with `prompts`, `completions` and the data's
    columns as keyword arguments; returns one number per completion, or None for one that it does not apply to."""
    model: str | None = None
    """A folder (or hub name) with a sequence-classification model and its tokenizer, or "package.module:function" for a
    function that returns one. It scores prompt and completion together. Every process holds it whole."""
    task: str | None = None
    """A reasoning-gym task, such as "leg_counting", whose own check scores the completion, 1 for a right answer. For
    data from data.source "reasoning_gym:leg_counting"; rows of another task are left to their own reward."""
    weight: float = 1.0
    """Share of this reward in the sum."""
    name: str | None = None
    """What it is called in the logs, as in rewards/NAME/mean. None takes the function's, the folder's or the task's."""
    label: int | str | None = None
    """For `model`: which of its labels is the reward, by name or number. A reward model has one: none is needed."""
    probability: bool | None = None
    """For `model` with `label`: true takes the label's probability, not its logit."""
    dtype: DtypeName | None = None
    """For `model`: kind of number its weights are held in; None is what they were saved in."""
    batch_size: int | None = None
    """For `model`: texts in one forward. None is 8."""
    max_length: int | None = None
    """For `model`: tokens of prompt and completion; a longer text loses its beginning. None is what the model takes."""
    answer: Literal["tagged", "whole"] | None = None
    """For `task`: where the completion has its answer. "tagged" (the default): between the last <answer> and </answer>,
    without which it is a wrong one. "whole": the completion is the answer."""

    def __post_init__(self) -> None:
        _offered("reward", self)
        kinds = ("function", "model", "task")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            found = f"it has {' and '.join(given)}" if given else "it has none of them"
            raise ValueError(f"An entry of `reward` is a function, a model or a task, and {found}. Give one.")
        for kind, names in _REWARD_OPTIONS.items():
            for name in names:
                if kind != given[0] and getattr(self, name) is not None:
                    raise ValueError(f"reward.{name} has no use with reward.{given[0]}: it is for reward.{kind}.")
        if self.function is not None and not is_import_path(self.function):
            raise ValueError(f"reward.function must read 'package.module:function', got {self.function!r}.")
        if self.probability and self.label is None:
            raise ValueError("reward.probability is that of a label: set reward.label to its name or number.")
        for name in ("batch_size", "max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"reward.{name} must be at least 1, got {value}.")
        if self.task is not None:
            self.answer = self.answer or "tagged"
        self._settle_name(getattr(self, given[0]))

    def _settle_name(self, source: str) -> None:
        self.name = self.name or (source.split(":")[1] if is_import_path(source) else PurePath(source).name)
        if not re.fullmatch(r"\w[\w.+-]*", self.name):
            raise ValueError(
                f"A reward would be called {self.name!r} in the logs (rewards/NAME/mean). Set reward.name to a word of "
                "letters, digits and .+-_ for it."
            )


_REWARD_OPTIONS: dict[str, tuple[str, ...]] = {
    "model": ("label", "probability", "dtype", "batch_size", "max_length"),
    "task": ("answer",),
}
"""Fields of RewardConfig that are for one kind of reward."""


@dataclass(kw_only=True)
class SamplesConfig:
    """Texts generated at fixed prompts before, during and after training, to see what the numbers mean."""

    prompts: int = 8
    """How many prompts, from the start of the data; 0 for none."""
    every: int = 0
    """Optimizer steps between two rounds; 0 for one round at the middle of the run."""
    max_new_tokens: int | None = None
    """Length of a sample; None takes the trainer's max_completion_length, or 32."""
    temperature: float = 0.7
    """Of these samples alone (training samples at the trainer's); 0 takes the likeliest token each time."""

    def __post_init__(self) -> None:
        if self.prompts < 0 or self.every < 0:
            raise ValueError(f"samples.prompts and samples.every cannot be negative: {self.prompts}, {self.every}.")
        if self.temperature < 0:
            raise ValueError(f"samples.temperature cannot be negative, got {self.temperature}.")


@dataclass(kw_only=True)
class LaunchConfig:
    """What the run expects of its launcher. A launch that gives something else is refused before it trains."""

    backend: BackendName | None = None
    """The backend that must be found, or None for any."""
    processes: int | None = None
    """The number of processes that must be found, or None for any."""


@dataclass(kw_only=True)
class CheckpointConfig:
    """What happens when a checkpoint cannot be written. How often one is, and how many are kept, are `trainer`'s
    save_strategy, save_steps and save_total_limit."""

    on_error: OnCheckpointError = "stop"
    """When a disk is full or fails: "stop" ends the run with an error, "continue" goes on without that checkpoint. What
    there is of it is deleted, and the last whole one stays. "continue" is for one process and for DDP."""

    def __post_init__(self) -> None:
        _offered("checkpoint", self)


@dataclass(kw_only=True)
class ResumeConfig:
    """Where a run goes on that was stopped or killed; on the command line, `--resume` and `--resume PATH`."""

    checkpoint: str | None = None
    """"newest": the newest whole checkpoint of the run folder; or a checkpoint's folder. None starts anew."""
    reference: ResumedReference = "recorded"
    """"recorded": the reference that the checkpoint was trained against, or none. "initial": the one that the
    configuration gives, whatever the checkpoint says."""

    def __post_init__(self) -> None:
        _offered("resume", self)
        if self.checkpoint == "":
            raise ValueError("resume.checkpoint is empty: use 'newest', name a checkpoint's folder, or leave it out.")


_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_import_path(text: str) -> bool:
    """True for "package.module:function"."""
    return _IMPORT_PATH.fullmatch(text) is not None


@dataclass(kw_only=True)
class RunConfig:
    """One run of `refkl train`: a YAML file, any key of which can be overridden on the command line."""

    method: Method = "grpo"
    """"grpo" or "rloo" (a reward), "dpo" (preference pairs), "kto" (completions that are wanted or not) or "sft" (texts
    to learn). It says which of TRL's configurations `trainer` is."""
    model: ModelConfig
    """The policy."""
    data: DataConfig
    """What it is trained on."""
    peft: dict[str, Any] | None = None
    """A PEFT configuration: `peft_type` (LORA, IA3, …) and that type's own fields. None trains the model itself."""
    reward: list[RewardConfig] = field(default_factory=list)
    """For GRPO and RLOO: one or more rewards, summed with their weights and logged apart: functions, reward models,
    verifiable tasks. --reward.help lists what an entry takes."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """How the reference is held."""
    kl: KLConfig = field(default_factory=_unsettled)
    """The penalty."""
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    """What is run once for several rows."""
    sync: SyncConfig | None = None
    """When the reference moves; None never."""
    samples: SamplesConfig = field(default_factory=SamplesConfig)
    """Texts to look at."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """What the launcher must have given."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """What happens when a checkpoint cannot be written."""
    resume: ResumeConfig = field(default_factory=ResumeConfig)
    """Where the run goes on."""
    trainer: Any = None
    """TRL's configuration (GRPOConfig, RLOOConfig, DPOConfig, KTOConfig, SFTConfig), with all of its fields;
    `trainer.output_dir` is the run folder."""

    def __post_init__(self) -> None:
        self.kl = self.kl.on_given_text() if self.method == "sft" else replace(self.kl)
        if self.method in REWARDED and not self.reward:
            raise ValueError(f"method {self.method!r} maximises a reward, and `reward` lists none.")
        if self.method not in REWARDED and self.reward:
            raise ValueError(f"method {self.method!r} takes no reward; leave `reward` out.")
        names = [reward.name for reward in self.reward]
        if twice := sorted({str(name) for name in names if names.count(name) > 1}):
            raise ValueError(
                f"Two entries of `reward` are called {' and '.join(map(repr, twice))}, and the logs tell rewards apart "
                "by name alone. Set reward.name."
            )
        if self.peft is not None and "peft_type" not in self.peft:
            raise ValueError("peft needs peft_type, such as LORA, beside that type's fields.")
