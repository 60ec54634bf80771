"""Keys of rows in the cache: a hash of everything on which a row's scores depend."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from refkl.backend import base_model, mixed_precision, own_class, unwrap
from refkl.backend.adapters import switches
from refkl.reference.cached.score_files import KEY_BYTES
from refkl.reference.cached.structure import structure
from refkl.types import TokenBatch

_NO_PART = {
    "_name_or_path", "transformers_version", "architectures", "dtype", "use_cache", "bos_token_id", "eos_token_id",
    "pad_token_id",
}  # fmt: skip
"""Fields of a model's configuration that do not affect its scores, or (dtype) that the fingerprint covers."""


def row_keys(batch: TokenBatch, temperature: float, entropy: bool) -> list[bytes | None]:
    """Return a key for each row, made from its real tokens only; None for a row without scored tokens.

    Raises:
        ValueError: model_inputs has other values than single values and [B, T] tensors: they belong to no row.
    """
    shared = [struct.pack("<d?", temperature, entropy)]
    per_token = [("", batch.input_ids), ("completion_mask", batch.completion_mask)]
    if batch.position_ids is not None:
        per_token.append(("position_ids", batch.position_ids))
    for name, value in sorted(batch.model_inputs.items()):
        if isinstance(value, Tensor) and value.shape == batch.input_ids.shape:
            per_token.append((name, value))
        elif value is None or isinstance(value, bool | int | float | str):
            shared.append(f"{name}={value!r}".encode())
        else:
            what = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
            raise ValueError(
                f"reference.cache keeps scores row by row, but model_inputs[{name!r}] of {what} cannot be split into "
                "rows. Build the reference without cache."
            )
    start = hashlib.blake2b(_framed(shared), digest_size=KEY_BYTES)
    real, scored = batch.attention_mask.bool().cpu(), batch.completion_mask.any(1).tolist()
    columns = [(f"{name} {_plain(t).dtype}".encode(), _plain(t).cpu()) for name, t in per_token]
    keys: list[bytes | None] = []
    for row in range(len(batch)):
        key = start.copy()
        for label, values in columns:
            key.update(_framed([label, values[row][real[row]].contiguous().view(torch.uint8).numpy().tobytes()]))
        keys.append(key.digest() if scored[row] else None)
    return keys


def _plain(tensor: Tensor) -> Tensor:
    """Cast integers to one width: the width of ids does not change their meaning."""
    return tensor if tensor.is_floating_point() else tensor.long()


def _framed(parts: list[bytes]) -> bytes:
    """Return one byte string that is different for different parts."""
    return b"".join(struct.pack("<q", len(part)) + part for part in parts)


def describe(model: nn.Module) -> dict[str, Any]:
    """Return JSON data on which the scores of a model that is about to run depend, besides its weights."""
    base, inner = base_model(model), unwrap(model)
    found: dict[str, Any] = {"model": own_class(base).__name__, "transformers": transformers.__version__}
    found["modules"] = structure(base)
    if isinstance(base, PreTrainedModel):
        found["config"] = {k: v for k, v in base.config.to_dict().items() if k not in _NO_PART}
        found["attention"] = base.config._attn_implementation
    else:
        found["config"] = repr(base)
    if casts := mixed_precision(model):
        found["mixed_precision"] = casts
    if on := {name: state for name, state in switches(inner).items() if state.startswith("on")}:
        found["adapters"] = on
        layers = {n: m for n, m in inner.named_modules() if n in on and isinstance(m, LoraLayer)}
        found["scaling"] = {
            name: {a: layer.scaling.get(a) for a in layer.active_adapters} for name, layer in layers.items()
        }
        if isinstance(inner, PeftModel):
            configs = {name: inner.peft_config[name].to_dict() for name in inner.active_adapters}
            for config in configs.values():
                config.pop("base_model_name_or_path", None)
                config.pop("inference_mode", None)
            found["peft"] = configs
    plain: dict[str, Any] = json.loads(json.dumps(found, default=_as_json, sort_keys=True))
    return plain


def _as_json(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)
