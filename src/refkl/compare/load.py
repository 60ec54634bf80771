"""Loading of a checkpoint from disk: a model folder, a PEFT adapter's folder with its base, or a run's folder."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refkl.backend import base_model, learned_prompt, weights_of
from refkl.config import ReferenceConfig
from refkl.loading import find_tokenizer, load_causal_lm, token_maps_differ
from refkl.reference import Reference, build_reference
from refkl.reference.weights.fingerprint import combined, digests
from refkl.yaml_files import read_yaml

_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model to compare, in eval mode; its base has no gradients."""

    path: str
    """The path or name that was asked for."""
    folder: str
    """The source of its weights: the path, the model in a run's folder, or a hub name."""
    base: str | None
    """Base model that an adapter was loaded onto; None for other models."""
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase | None
    """Tokenizer of the checkpoint, or of its base for an adapter without one; None if neither has one."""

    def fingerprint(self) -> str:
        """Return the fingerprint of its weights, as `Reference.fingerprint` does: equal for equal weights."""
        return combined(digests(weights_of(self.model)))

    def record(self) -> dict[str, Any]:
        """Return the model's source and identity."""
        own = {"path": self.path, "folder": self.folder, "base": self.base}
        return {**own, "class": type(base_model(self.model)).__name__, "fingerprint": self.fingerprint()}


def load_checkpoint(path: str, *, dtype: str = "float32", device: str | torch.device = "cpu") -> Checkpoint:
    """Load a causal language model to compare.

    Args:
        path: a model folder, a folder with a PEFT adapter, the folder of a run that has ended, or a hub name.
        dtype: dtype of the weights: "float32", "bfloat16", "float16", "float64".
        device: device of the model.

    Raises:
        ValueError: nothing there that can be loaded; weights that are missing, left over or of another shape.
    """
    if _SHORT.get(dtype, dtype) not in _DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it can be {', '.join(_DTYPES)}.")
    folder, options = _resolve(path)
    number = getattr(torch, _SHORT.get(dtype, dtype))
    base: str | None = None
    model: nn.Module
    if (Path(folder) / "adapter_config.json").is_file():
        base = PeftConfig.from_pretrained(folder).base_model_name_or_path
        if not base:
            raise ValueError(f"{folder} is an adapter, and its adapter_config.json does not name the base model.")
        what = f"{path}: the adapter's base model {base!r} cannot be loaded"
        model = _adapted(load_causal_lm(base, what, dtype=number, **options), folder, path)
    else:
        model = load_causal_lm(folder, f"The model {path!r} cannot be loaded", dtype=number, **options)
        model.requires_grad_(False)
    tokenizer = find_tokenizer(folder)
    if tokenizer is None and base is not None:
        tokenizer = find_tokenizer(base)
    model.to(device).eval()  # type: ignore[arg-type]
    return Checkpoint(path, folder, base, model, tokenizer)


def hold(model: nn.Module) -> Reference:
    """Return a reference made of a model of any class: a copy that shares all frozen weights with it.

    Raises:
        ValueError: a model with a learned prompt.
    """
    if (prompt := learned_prompt(model)) is not None:
        raise ValueError(
            f"The second model learns a prompt ({prompt.kind}), and refkl holds no reference with one. Swap the two "
            "models: on given text, forward_kl then gives what reverse_kl gives now."
        )
    return build_reference(model, ReferenceConfig(strategy="clone"))


def check_vocabularies(first: Checkpoint, second: Checkpoint) -> None:
    """Raise ValueError unless both models have the same logits in the same order."""
    widths = vocabulary(first.model), vocabulary(second.model)
    if widths[0] != widths[1]:
        raise ValueError(
            f"{first.path} has {widths[0]} logits and {second.path} {widths[1]}: a divergence needs two distributions "
            "over the same tokens. Compare models with the same vocabulary."
        )
    if first.tokenizer is None or second.tokenizer is None:
        return
    if (found := token_maps_differ(first.tokenizer, second.tokenizer)) is not None:
        raise ValueError(f"The tokenizers of {first.path} and {second.path} {found} Use the same vocabulary.")


@torch.no_grad()
def vocabulary(model: nn.Module) -> int:
    """Return the number of logits that the model gives."""
    ids: Tensor = torch.zeros(1, 2, dtype=torch.long, device=next(model.parameters()).device)
    return int(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.shape[-1])


def positions(*models: nn.Module) -> int | None:
    """Return the longest sequence, in tokens, that all of these models take; None if none of them has a limit."""
    found = []
    for model in models:
        config = base_model(model).config.get_text_config()  # type: ignore[union-attr, operator]
        # Models without positions (Mamba, RWKV) have no such field.
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None:
            prompt = learned_prompt(model)
            found.append(int(limit) - (0 if prompt is None else prompt.tokens))
    return min(found, default=None)


def _resolve(path: str) -> tuple[str, dict[str, Any]]:
    """Return the folder that holds the weights, and the arguments that a run loaded its model with."""
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"{path} is a file; a model folder, an adapter's folder or a run's folder is needed.")
    if not folder.is_dir() or _holds_model(folder):
        return path, {}
    if not _holds_model(folder / "model"):
        raise ValueError(
            f"{path} holds no model (config.json), no adapter (adapter_config.json), and no trained policy of a run "
            f"({folder / 'model'}). Check the path, and that the run has ended."
        )
    config = folder / "config.yaml"
    return str(folder / "model"), model_section(config)["init_kwargs"] if config.is_file() else {}


def model_section(config: Path) -> dict[str, Any]:
    """Return the section `model` of a run's config.yaml, with `dtype` and `init_kwargs`.

    Raises:
        ValueError: the file is damaged.
    """
    values = read_yaml(config)
    found = values.get("model") if isinstance(values, dict) else None
    if not (
        isinstance(found, dict) and isinstance(found.get("dtype"), str) and isinstance(found.get("init_kwargs"), dict)
    ):
        raise ValueError(f"{config} is damaged: it has no section `model` with dtype and init_kwargs.")
    return found


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()


def _adapted(base: PreTrainedModel, folder: str, path: str) -> PeftModel:
    # Trainable, so that a reference copies the adapter. It would share a frozen one.
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")
            return PeftModel.from_pretrained(base, folder, is_trainable=True)
    except (OSError, SafetensorError, RuntimeError, UserWarning) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ValueError(f"The adapter {path!r} does not fit its base model: {' '.join(lines[:2])}") from None
