"""The memory of a planned run on each rank: the arithmetic of `refkl plan`.

The policy is made on torch's meta device, from its configuration only. The strategies report their costs as for a real
policy. For the training state the planner counts, per trained parameter,

    in 16 bits   2 weights + 2 gradients + 12 optimizer (fp32 copy and AdamW's two moments)
    in fp32      4 weights + 4 gradients +  8 optimizer (AdamW's two moments)

which is 16 bytes either way (Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1). Activations are those of
Korthikanti et al. 2022 (arXiv:2205.05198, section 4), in 16 bits, without attention scores, which fused attention never
stores:

    without gradient checkpointing   34·s·b·h per layer
    with it                          2·s·b·h per layer, and 34·s·b·h for the one that is recomputed

with s tokens per sequence, b sequences and h the hidden size. Logits are not counted: a fused head never stores them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from refkl.backend import Backend
from refkl.config import BackendName, DtypeName, Quantization, ReferenceConfig
from refkl.freezing import freeze, trainable_parameters
from refkl.messages import size, unknown
from refkl.reference import STRATEGIES, BuildRequest, Cost, Shape, Step, choose, why_not_here

if TYPE_CHECKING:
    from refkl.reference.cost import Spread

Tuning = Literal["full", "lora"]

COUNTED_ON = 0.9
"""Share of a device's memory that a plan may fill. The CUDA context, the allocator, gathered layers and gradient
buckets need the rest."""
LARGE = 20e9
"""Models with more parameters than this get partitioned parameters, however much memory there is."""

_GRADIENTS: dict[str, Spread] = {"zero2": "flat", "zero3": "flat", "fsdp1": "flat", "fsdp2": "rows"}
_OPTIMIZER: dict[str, Spread] = {"zero1": "flat", **_GRADIENTS}


@dataclass(kw_only=True)
class PlanConfig:
    """The settings of `refkl plan`."""

    model: PreTrainedConfig
    """The policy's configuration."""
    world_size: int = 1
    """Number of ranks."""
    backend: str | None = None
    """A backend, or None to compare those that can run on this number of ranks."""
    method: Tuning | None = None
    """"full" or "lora"; None compares both."""
    dtype: DtypeName = "bfloat16"
    """Dtype of the weights, both if all of them train and under an adapter."""
    batch_size: int = 1
    """Number of sequences that a rank scores and trains on at once."""
    seq_len: int = 1024
    """Tokens per sequence."""
    memory: int = 80 * 2**30
    """Memory of a device in bytes."""
    gradient_checkpointing: bool = True
    """True if activations are recomputed in the backward pass."""
    lora_rank: int = 16
    """Rank of the adapter, for "lora"."""
    lora_target: list[str] = field(default_factory=lambda: ["all-linear"])
    """Modules that get an adapter, for "lora"."""
    freeze: list[str] = field(default_factory=list)
    """Module paths to freeze, as in refkl.freeze, for "full"."""

    def __post_init__(self) -> None:
        for name in ("world_size", "batch_size", "seq_len", "memory", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{_option(name)} must be at least 1, got {getattr(self, name)}.")
        for name, known in (("backend", BackendName), ("method", Tuning), ("dtype", DtypeName)):
            if getattr(self, name) not in (None, *get_args(known)):
                raise unknown(_option(name), getattr(self, name), get_args(known))
        if self.freeze and self.method == "lora":
            raise ValueError("--freeze is for full fine-tuning: LoRA trains only its adapter. Leave one of them out.")
        if self.backend == "plain" and self.world_size > 1:
            raise ValueError(f"--backend plain is one process, and --world-size is {self.world_size}. Use ddp.")

    @property
    def backends(self) -> list[str]:
        """The backends to compare, those with the least communication first."""
        if self.backend is not None:
            return [self.backend]
        if self.world_size == 1:
            return ["plain"]
        return ["ddp", "zero2", "zero3"]

    @property
    def available(self) -> float:
        """Number of bytes of a device that a plan may fill."""
        return COUNTED_ON * self.memory


@dataclass(frozen=True)
class Term:
    """One line of the arithmetic: bytes on a rank, and the product that gives them."""

    name: str
    bytes: int
    arithmetic: str


@dataclass(frozen=True)
class Row:
    """A strategy with one option."""

    strategy: str
    option: str
    """The option as `reference.KEY=VALUE` would set it; "" for the defaults."""
    cost: Cost
    device: int
    """Total bytes on a device: policy, training state, reference."""
    fits: bool
    auto: bool
    """True if "auto" selects it."""
    rounds: bool
    """True if it stores fewer bits than the policy."""


@dataclass(frozen=True)
class Plan:
    """One method on one backend: the memory of a rank without the reference, and the cost of each strategy."""

    method: Tuning
    backend: Backend
    parameters: int
    trained: int
    terms: tuple[Term, ...]
    """Policy, gradients, optimizer, activations."""
    rows: tuple[Row, ...]
    refused: dict[str, str]
    """Strategies that are not possible, with the reason."""
    reason: str
    """The reason for the choice of "auto"."""

    @property
    def auto(self) -> Row:
        """The row that "auto" selects."""
        return next(row for row in self.rows if row.auto)

    @property
    def best(self) -> Row | None:
        """The row that "auto" selects; if it does not fit, the fastest row that does; None if no row fits.

        A row that rounds the policy's numbers ranks after rows that do not and that compute on the device.
        """
        able = [row for row in self.rows if row.fits]

        def order(row: Row) -> tuple[bool, int, bool, int, int]:
            rounds = row.rounds
            return not row.auto, row.cost.host_flops, rounds, row.cost.moved, row.device

        return min(able, key=order, default=None)


def make_plans(config: PlanConfig) -> list[Plan]:
    """Make a plan for every requested method on every requested backend.

    Raises:
        ValueError: no causal language model has such a configuration, or no strategy can work on that backend.
    """
    methods = [config.method] if config.method else list(get_args(Tuning))
    return [_plan(config, method, backend) for method in methods for backend in config.backends]


def recommend(config: PlanConfig, plans: Sequence[Plan]) -> tuple[Plan | None, str]:
    """Return the recommended plan, or None if none fits, and the reason: one or two sentences with the arithmetic.

    Full fine-tuning comes before LoRA. The backend with the least communication comes first, except that models of over
    20 billion parameters need partitioned parameters.
    """
    order = sorted(plans, key=lambda p: (p.method != "full", _late(p)))
    least = min(plans, key=lambda p: min(row.device for row in p.rows))
    for plan in order:
        if (row := plan.best) is not None:
            return plan, " ".join(filter(None, (_lead(config, plan, plans), _sum(config, plan, row))))
    row = min(least.rows, key=lambda r: r.device)
    return None, (
        f"Nothing fits. The smallest plan is {_words(least, row)}: {_added(least, row)}, and "
        f"{size(config.available)} can be filled. Use more ranks, shorter sequences or a smaller model."
    )


def memory_bytes(text: str) -> int:
    """Parse a size such as "80GiB", "80 GB" or "0.5TiB" to bytes.

    Raises:
        ValueError: the text is not a number with a unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt])(i?)b\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"--memory must be a number with a unit, such as 80GiB, 80GB or 512MiB; got {text!r}.")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** ("kmgt".index(match[2].lower()) + 1))


def read_config(path: str) -> PreTrainedConfig:
    """Read the configuration from a model folder or a config.json.

    Raises:
        ValueError: there is none.
    """
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {path!r} is neither a model folder nor a config.json: {str(error).splitlines()[0]}"
        ) from None


def _plan(config: PlanConfig, method: Tuning, name: str) -> Plan:
    policy, backend = _policy(config, method, name), Backend(name, config.world_size)
    text = config.model.get_text_config()
    try:
        step = Step(config.batch_size, config.seq_len, text.num_hidden_layers, text.hidden_size)
    except AttributeError as error:
        raise ValueError(f"--model: the plan needs the number and width of the layers, and {error}.") from None

    def request(reference: ReferenceConfig) -> BuildRequest:
        return BuildRequest(policy, reference, backend, None, step, planned=True, memory=config.memory)

    default = request(ReferenceConfig())
    auto, terms = choose(default), _terms(config, default.shape)
    own = sum(term.bytes for term in terms)
    rows, refused = [], {}
    for strategy, cls in STRATEGIES.items():
        if (why_not := why_not_here(strategy, default)) is not None:
            refused[strategy] = why_not
        for option, reference in _options(config.dtype):
            if why_not_here(strategy, asked := request(reference)) is None:
                cost = cls.cost(asked)
                device = own + cost.device + cost.scoring
                fits = device <= config.available
                taken = strategy == auto and not option
                rows.append(Row(strategy, option, cost, device, fits, taken, _rounds(config, reference)))
    parameters = default.shape.parameters
    return Plan(
        method,
        backend,
        default.shape.elements(parameters, "whole"),
        default.shape.elements((e for e in parameters if e.trained), "whole"),
        terms,
        tuple(rows),
        refused,
        STRATEGIES[auto].why(default),
    )


def _options(dtype: str) -> Iterator[tuple[str, ReferenceConfig]]:
    """Yield the options of a strategy, one at a time; each strategy says which it supports."""
    yield "", ReferenceConfig()
    yield "device=cpu", ReferenceConfig(device="cpu")
    yield "offload=true", ReferenceConfig(offload=True)
    for other in get_args(DtypeName):
        if other != dtype:
            yield f"dtype={other}", ReferenceConfig(dtype=other)
    for kind in get_args(Quantization):
        yield f"quantize={kind}", ReferenceConfig(quantize=kind)


def _rounds(config: PlanConfig, reference: ReferenceConfig) -> bool:
    held, trained = (getattr(torch, dtype).itemsize for dtype in (reference.dtype or config.dtype, config.dtype))
    return bool(held < trained) or reference.quantize is not None


def _policy(config: PlanConfig, method: Tuning, backend: str) -> nn.Module:
    """Make the policy without memory, with the dtypes that it trains in."""
    dtype = getattr(torch, config.dtype)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings about a model that is never run
        try:
            policy: nn.Module = AutoModelForCausalLM.from_config(config.model, dtype=dtype)
        except (ValueError, ImportError) as error:
            raise ValueError(f"--model is not a causal language model: {str(error).splitlines()[0]}") from None
        if method == "full" and config.freeze:
            freeze(policy, config.freeze)
            if not trainable_parameters(policy):
                raise ValueError("--freeze leaves no parameter to train. Name fewer module paths.")
        if method == "lora":
            target = config.lora_target[0] if config.lora_target == ["all-linear"] else config.lora_target
            lora = LoraConfig(task_type="CAUSAL_LM", r=config.lora_rank, target_modules=target)
            try:
                policy = get_peft_model(policy, lora)
            except ValueError as error:
                raise ValueError(f"{error} Set --lora-target, or --method full to leave LoRA out.") from None
    # PEFT makes adapters in fp32; DeepSpeed casts the whole model.
    return policy.to(dtype) if backend.startswith("zero") else policy


def _terms(config: PlanConfig, shape: Shape) -> tuple[Term, ...]:
    """Return the memory terms of a rank without the reference."""
    name, ranks = shape.backend.name, shape.backend.processes
    trained = [e for e in shape.parameters if e.trained]

    def product(number: int, each: str, spread: Spread) -> str:
        return f"{count(number)} x {each}" + ("" if spread == "whole" or ranks == 1 else f" / {ranks} ranks")

    weights = shape.held(shape.entries)
    elements, size_of = shape.elements(trained, "whole"), trained[0].dtype.itemsize
    gradients, optimizer = (table.get(name, "whole") for table in (_GRADIENTS, _OPTIMIZER))
    per = 12 if size_of < 4 else 8
    what = "fp32 copy and two moments" if per == 12 else "two moments"
    everything = shape.elements(shape.parameters, "whole")
    each = f"{shape.held(shape.parameters, 'whole') / everything:.3g} bytes"
    return (
        Term("policy", weights, product(everything, each, shape.spread)),
        Term("gradients", shape.held(trained, gradients), product(elements, f"{size_of} bytes", gradients)),
        Term(
            "optimizer",
            shape.elements(trained, optimizer) * per,
            product(elements, f"{per} bytes ({what})", optimizer),
        ),
        _activations(config, shape.step),
    )


def _activations(config: PlanConfig, step: Step) -> Term:
    width = getattr(torch, config.dtype).itemsize
    block = step.tokens * step.hidden
    kept, full = width, 17 * width  # bytes per layer, token and hidden unit
    if config.gradient_checkpointing:
        total = (step.layers * kept + full) * block
        sizes = f"({step.layers} layers x {kept} + {full}) bytes"
    else:
        total, sizes = step.layers * full * block, f"{step.layers} layers x {full} bytes"
    return Term("activations", total, f"{step.tokens:,} tokens x {step.hidden:,} wide x {sizes}")


def _late(plan: Plan) -> bool:
    """Return True if other plans come first: large models should be partitioned."""
    return plan.parameters > LARGE and not _partitions(plan)


def _partitions(plan: Plan) -> bool:
    return plan.backend.name in ("zero3", "fsdp1", "fsdp2")


def _lead(config: PlanConfig, plan: Plan, plans: Sequence[Plan]) -> str:
    """Explain why other plans were not chosen."""
    said = []
    if plan.parameters > LARGE and _partitions(plan) and len({p.backend for p in plans}) > 1:
        said.append(f"Over {LARGE / 1e9:.0f} billion parameters, partition them.")
    full = [p for p in plans if p.method == "full"]
    if plan.method == "lora" and full:
        least = min(full, key=lambda p: min(row.device for row in p.rows))
        row = min(least.rows, key=lambda r: r.device)
        said.append(f"Full fine-tuning does not fit: {_words(least, row)} takes {_added(least, row)}.")
    elif plan.method == "full" and plan.best is not None and plan.best.cost.device and not _partitions(plan):
        said.append("There is memory for two copies, the policy and the reference.")
    return " ".join(said)


def _sum(config: PlanConfig, plan: Plan, row: Row) -> str:
    words = _words(plan, row)
    return f"{words[0].upper()}{words[1:]}: {_added(plan, row)}, of {size(config.available)} that can be filled."


def _words(plan: Plan, row: Row) -> str:
    method = "full fine-tuning" if plan.method == "full" else "LoRA"
    option = f" ({row.option})" if row.option else ""
    return f"{method} on {plan.backend} with reference {row.strategy}{option}"


def _added(plan: Plan, row: Row) -> str:
    parts = [f"{size(term.bytes)} {term.name}" for term in plan.terms]
    return " + ".join([*parts, f"{size(row.cost.device + row.cost.scoring)} reference"]) + f" = {size(row.device)}"


def count(number: int) -> str:
    """Format a number of parameters: "8.03 B"."""
    for factor, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.2f} {letter}"
    return str(number)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
