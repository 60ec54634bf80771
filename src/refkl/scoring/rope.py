"""Rotary position encodings (RoPE) whose scale depends on the longest row of a batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from refkl.backend import submodules

_BY_LENGTH = ("dynamic", "longrope")
_LONGEST = "max_seq_len_cached"


def rope_settings(config: Any) -> list[dict[str, Any]]:
    """Return the RoPE settings of all layers; they may be told apart by the layer's kind."""
    settings = getattr(config, "rope_parameters", None) or {}
    return [settings, *(x for x in settings.values() if isinstance(x, dict))]


def scaled_from(config: Any) -> int | None:
    """Return the length from which on the scale depends on the longest row of a batch; None if it never does."""
    text = config.get_text_config()
    by_length = [s for s in rope_settings(text) if s.get("rope_type") in _BY_LENGTH]
    lengths = [int(s.get("original_max_position_embeddings") or text.max_position_embeddings) for s in by_length]
    return min(lengths, default=None)


def forget_longest(base: nn.Module) -> None:
    """Let the scale of "dynamic" RoPE depend on the next batch only.

    transformers keeps the scale of the longest row that the model has ever seen, until a row is shorter than the
    original length. Two models with the same weights would differ if one of them has also generated text.
    """
    config: Any = getattr(base, "config", None)
    if config is None or scaled_from(config) is None:
        return
    for module in submodules(base):
        original: int | None = getattr(module, "original_max_seq_len", None)
        if original is None:
            continue
        for name in [name for name in vars(module) if name.endswith(_LONGEST)]:
            if int(getattr(module, name)) > original:
                prefix = name.removesuffix(_LONGEST)
                first: Tensor = getattr(module, f"{prefix}original_inv_freq")
                present: Tensor = getattr(module, f"{prefix}inv_freq")
                setattr(module, name, original)
                setattr(module, f"{prefix}inv_freq", first.to(present.device))
