"""A clone whose linear layers are held in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from refkl.backend import Weight, Whole, base_model, canonical_name, linear_layers, matrix_shape, unwrap, weights_of
from refkl.backend.adapters import rank_dims
from refkl.reference.quantized.kl_floor import QuantizationKLMeter
from refkl.reference.quantized.layers import FORMATS, SMALLEST_GROUP, QuantizedLinear, group_size
from refkl.reference.request import BuildRequest
from refkl.reference.strategies.whole_copy import SharingCopy
from refkl.reference.weights.pairing import Pair, paired_weights
from refkl.reference.weights.record import Record
from refkl.types import KLFloor, MemoryReport, TokenBatch


class QuantizedClone(SharingCopy):
    """A clone with quantised linear layers, and the KL floor that this causes.

    Args:
        loaded: the model that was quantised, if it is not the policy.
    """

    def __init__(
        self,
        request: BuildRequest,
        reason: str,
        source: str,
        model: nn.Module,
        shared: set[str],
        loaded: nn.Module | None,
    ) -> None:
        super().__init__(request, reason, source, model, shared)
        self._meter = QuantizationKLMeter(request.config, unwrap(request.policy), loaded)

    def begin(self, calibration: TokenBatch | Iterable[TokenBatch] | None) -> None:
        """Measure the floor on these batches now, or on the first one that is scored."""
        if calibration is None:
            self._meter.watch()
        else:
            self._measure([calibration] if isinstance(calibration, TokenBatch) else calibration)

    def _move(self, weights: dict[str, Tensor], first: Tensor) -> bool:
        changed = super()._move(weights, first)
        if self.config.dtype is None:
            for module in self.model.modules():
                if isinstance(module, QuantizedLinear):
                    module.dtype = first.dtype
        return changed

    def weights(self) -> Iterator[Weight]:
        layers = {f"{name}." for name in self._packed()}
        for weight in weights_of(self.model):
            layer, _, part = weight.name.rpartition(".")
            if f"{layer}." in layers and part != "bias":
                yield weight._replace(name=f"{layer}.weight.{part}")
            else:
                yield weight

    def _packed(self) -> dict[str, QuantizedLinear]:
        return {canonical_name(n): m for n, m in self.model.named_modules() if isinstance(m, QuantizedLinear)}

    def pairs(self, policy: nn.Module) -> list[Pair]:
        packed = self._packed()
        own = [
            weight
            for weight in weights_of(self.model)
            if weight.name.endswith(".bias") or weight.name.rpartition(".")[0] not in packed
        ]
        # A quantised weight is represented by its bytes, which are never read as its values.
        own += [Weight(f"{n}.weight", m.get_buffer("qdata"), Whole(m.numbers_shape)) for n, m in packed.items()]
        pairs = paired_weights(own, weights_of(unwrap(policy)), rank_dims(self.lora_layers()))
        layers = {f"{name}.weight": layer for name, layer in packed.items()}
        return [pair._replace(packed=layers.get(pair.own.name)) for pair in pairs if self.owns(pair.own.name)]

    @property
    def kl_floor(self) -> KLFloor | None:
        return self._meter.floor

    def recall_floor(self, found: dict[str, Any]) -> None:
        self._meter.recall(found)

    def before_scoring(self, batch: TokenBatch) -> None:
        if not self._meter.done:
            self._measure([batch])

    def _measure(self, batches: Iterable[TokenBatch]) -> None:
        says = self._accelerator is None or self._accelerator.is_main_process
        with self.activated() as model, self.autocast():
            self._meter.measure(model, batches, says=says)

    def check_saved(self, record: Record) -> None:
        if record.kl_floor is not None:
            self._meter.check(KLFloor(**record.kl_floor))

    def after_load(self, record: Record) -> None:
        if record.kl_floor is not None:
            self._meter.recall(record.kl_floor)

    def average_shapes(self) -> dict[str, torch.Size]:
        return super().average_shapes() | {
            f"{n}.weight": torch.Size(m.numbers_shape) for n, m in self._packed().items()
        }

    def provenance(self) -> dict[str, Any]:
        return {**super().provenance(), "quantize": self.config.quantize, "kl_floor": self._meter.record()}

    def drop_weights(self) -> bool:
        self._meter.loaded = None
        return super().drop_weights()

    def memory_of_weights(self) -> MemoryReport:
        """Return the bytes that the reference holds and the policy does not. They include a model that was loaded to be
        quantised, until the floor is measured."""
        loaded = [] if self._meter.loaded is None else [self._meter.loaded]
        return self._bytes_beside_policy(self.model, *loaded)


def why_not_quantized(request: BuildRequest) -> str | None:
    """Return None if the requested source can be held quantised as asked for, else a sentence that says why not."""
    config, policy = request.config, unwrap(request.policy)
    assert config.quantize is not None
    if config.source == "policy" and isinstance(policy, PeftModel):
        return (
            "the policy is a PEFT model, whose base the reference shares with it: a quantised copy would only add "
            "memory. Leave reference.quantize out, or set reference.source to the model to compare with."
        )
    package = FORMATS[config.quantize].package
    if not request.planned and find_spec(package) is None:
        return (
            f"reference.quantize {config.quantize!r} needs {package}, which is not installed: pip install "
            "'refkl[quantize]'."
        )
    if config.cache is not None and request.backend.processes > 1 and request.calibration is None:
        return (
            "the KL floor of a quantised reference is measured by all processes together, but with reference.cache "
            "some may have nothing to score. Build the reference with refkl.build_reference(..., calibration=batch), "
            "and pass it to the trainer."
        )
    layers = dict(linear_layers(policy))
    if config.source == "policy" and config.dtype is None and config.device is None:
        layers = {name: layer for name, layer in layers.items() if layer.weight.requires_grad}
    if not layers:
        return (
            f"{type(base_model(policy)).__name__} has no linear layer to quantise besides its output head: none that "
            "trains and is not quantised already. Leave reference.quantize out."
        )
    for name, layer in layers.items():
        if config.quantize == "int4" and group_size(width := matrix_shape(layer)[1]) < SMALLEST_GROUP:
            return (
                f"reference.quantize 'int4' rounds weights in groups of at least {SMALLEST_GROUP}, but the {width} "
                f"inputs of {name} are not a multiple of that. Use 'int8' or 'nf4'."
            )
    return None
