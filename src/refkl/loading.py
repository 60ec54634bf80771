"""Loading of models from disk, of the class that the folder names, with no weight missing and none left over.

One loader serves references, `refkl compare`, `refkl train` and `refkl export`. It reads the configuration first. It
then compares the names and shapes of the weights with the model's on the meta device, and takes memory only for a
folder that passes. It runs no code from a folder unless the caller's options ask for it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_MAPPING,
)
from transformers.utils import logging

from refkl.backend import loading_whole, own_class

_OF_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_KINDS = {
    "a causal language model": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    "an image-text model": (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING),
}
_PLACING = ("device_map", "max_memory", "offload_folder", "offload_buffers", "tp_plan", "tp_size", "distributed_config")
"""Options of from_pretrained that place the weights."""


def load_causal_lm(folder: str, what: str, *, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """Return the causal language model in a folder, of the class that the folder names.

    Args:
        folder: a model folder or a hub name.
        what: beginning of error messages, such as "model.path 'x' cannot be loaded".
        dtype: dtype of the weights.
        options: further arguments of from_pretrained.

    Raises:
        ValueError: no causal language model there; weights that are missing, left over, or of another shape than the
            configuration says (unless `ignore_mismatched_sizes` is among the options).
    """
    options = {"trust_remote_code": False, **options}
    described = _described(folder, what, options)
    _class_named(folder, what, described, "a causal language model", options)
    model = _loaded(AutoModelForCausalLM, folder, what, _is_quantized(described, options), dtype=dtype, **options)
    # "pretrained" loads the same revision again. transformers up to 5.22 keeps the commit; later versions do not.
    if (revision := options.get("revision")) is not None and _revision(model.config) is None:
        model.config._commit_hash = revision
    return model


def load_beside(policy: PreTrainedModel, folder: str, what: str, *, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model in a folder, of the class that the folder names, to score the policy's tokens.

    Args:
        policy: the model that it is compared with, without wrappers. The loaded model uses the policy's attention
            implementation if its class supports it.
        folder, what, dtype: as for `load_causal_lm`.

    Raises:
        ValueError: as for `load_causal_lm`; or another vocabulary size or token map than the policy's.
    """
    described = _described(folder, what, {})
    loader: Any
    kind: Any = own_class(policy)  # a class of transformers or of a model's own code
    if _names(described, kind):
        # The policy's code is already loaded, whether it is from transformers or not.
        loader, config = kind, kind.config_class.from_pretrained(folder)
    else:
        images = kind in _of(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, policy.config)
        wanted = "an image-text model" if images else "a causal language model"
        config, kind = _class_named(folder, what, described, wanted, {"trust_remote_code": False})
        loader = _KINDS[wanted][0]
    check_vocabulary(config, folder, policy, what)
    options: dict[str, Any] = {"trust_remote_code": False}
    if _has_attention(kind, attention := policy.config._attn_implementation):
        options["attn_implementation"] = attention
    return _loaded(loader, folder, what, _is_quantized(described, {}), dtype=dtype, **options)


def check_vocabulary(config: PreTrainedConfig, folder: str, policy: PreTrainedModel, what: str) -> None:
    """Raise ValueError if a model has another vocabulary size or token map than the policy.

    Args:
        config: the model's configuration.
        folder: where the model was loaded from; token maps are compared if it and the policy's are folders.
        policy: the model that it is compared with, without wrappers.
        what: as for `load_causal_lm`.
    """
    own, theirs = (found.get_text_config().vocab_size for found in (config, policy.config))
    if own != theirs:
        raise ValueError(
            f"{what}: its vocabulary has {own} tokens and the policy's {theirs}. A divergence needs two distributions "
            "over the same tokens. Use a model with the policy's vocabulary. If one of the two only lacks tokens that "
            f"were added to the other, resize it: model.resize_token_embeddings({max(own, theirs)})."
        )
    _check_token_maps(folder, str(policy.config._name_or_path), what)


def load_again(policy: PreTrainedModel, what: str, *, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model that the policy was loaded from: same class, same configuration, same revision.

    Rotary scaling, attention windows and similar settings are part of the function and may differ on disk, so the
    policy's own configuration is used.

    Raises:
        ValueError: nothing there that can be loaded; weights that are missing, left over or of another shape.
    """
    folder, config = str(policy.config._name_or_path), copy.deepcopy(policy.config)
    options: dict[str, Any] = {"config": config, "attn_implementation": policy.config._attn_implementation}
    options["trust_remote_code"] = False
    if not Path(folder).is_dir() and (revision := _revision(policy.config)) is not None:
        options["revision"] = revision
    quantization = vars(config).pop("quantization_config", None)  # only quantised models have it
    if quantization is not None:
        on_disk = _described(folder, what, {k: v for k, v in options.items() if k == "revision"})
        if on_disk.get("quantization_config") is None:  # it was quantised while it was loaded
            options["quantization_config"] = quantization
        else:
            config.quantization_config = on_disk["quantization_config"]
    return _loaded(own_class(policy), folder, what, quantization is not None, dtype=dtype, **options)


def find_tokenizer(folder: str) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer in a folder or of a hub name; None for a folder without one.

    Raises:
        ValueError: it cannot be loaded.
    """
    if Path(folder).is_dir() and not any((Path(folder) / name).is_file() for name in _OF_TOKENIZERS):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"The tokenizer in {folder} cannot be loaded: {str(error).splitlines()[0]}") from None


def token_maps_differ(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> str | None:
    """Return how the token numbers of two tokenizers differ, as the end of a sentence; None if they do not differ.

    A token that only one of them has, at a number that the other does not use, does not count: tokenizer classes add
    special tokens of their own.
    """
    own, other = first.get_vocab(), second.get_vocab()
    names = {number: token for token, number in other.items()}
    differing = sorted(t for t, number in own.items() if other.get(t, number) != number or names.get(number, t) != t)
    if not differing:
        return None
    token = differing[0]
    there = f"number {other[token]}" if token in other else "missing"
    return (
        f"differ in {len(differing)} of {len(own)} tokens: {token!r} is number {own[token]} in the first and {there} "
        "in the second."
    )


def _described(folder: str, what: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return the folder's config.json."""
    path = Path(folder, options.get("subfolder", ""))
    if path.is_dir() and "gguf_file" not in options and not (path / "config.json").is_file():
        adapter = (path / "adapter_config.json").is_file()
        found = ", only an adapter (adapter_config.json): merge it into its base first." if adapter else "."
        raise ValueError(f"{what}: it holds no config.json{found}")
    try:
        described: dict[str, Any] = PreTrainedConfig.get_config_dict(folder, **options)[0]
    except (OSError, ValueError) as error:
        raise ValueError(f"{what}: {str(error).splitlines()[0]}") from None
    return described


def _class_named(
    folder: str, what: str, described: dict[str, Any], wanted: str, options: dict[str, Any]
) -> tuple[PreTrainedConfig, type[PreTrainedModel] | None]:
    """Return the configuration and class of the model that a config.json describes; no class if its code is there.

    Raises:
        ValueError: no model of the wanted kind.
    """
    model_type, named = described.get("model_type"), described.get("architectures") or []
    auto, mapping = _KINDS[wanted]
    own_code = auto.__name__ in described.get("auto_map", {})
    if model_type not in CONFIG_MAPPING and not (own_code and options["trust_remote_code"]):
        why = "needs code from that folder, and refkl runs none without trust_remote_code"
        if not own_code:
            why = f"transformers {transformers.__version__} does not know"
        raise ValueError(f"{what}: its config.json names the model type {model_type!r}, which {why}.")
    of_config = {key: value for key, value in options.items() if key not in ("quantization_config", *_PLACING)}
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, **of_config)
    if own_code and options["trust_remote_code"]:
        return config, None
    kinds = _of(mapping, config)
    # A model with the head of another task would load if its weights fit, and would then compute something else.
    mappings = [MODEL_MAPPING, *(known for _, known in _KINDS.values())]
    known = {kind.__name__ for each in mappings for kind in _of(each, config)}
    other_task = named and not known & set(named) and all(hasattr(transformers, name) for name in named)
    if not kinds or other_task:
        raise ValueError(f"{what}: it holds a {' or '.join(named) or model_type}, and {wanted} is needed.")
    return config, next((kind for kind in kinds if kind.__name__ in named), kinds[0])


def _of(mapping: Any, config: PreTrainedConfig) -> tuple[type[PreTrainedModel], ...]:
    """Return the classes that one of transformers' mappings has for a configuration."""
    found = mapping.get(type(config), ())
    return found if isinstance(found, tuple) else (found,)


def _names(described: dict[str, Any], kind: type[PreTrainedModel]) -> bool:
    """Return True if a config.json describes a model of this class."""
    own, named = kind.config_class, described.get("architectures") or []
    return own is not None and described.get("model_type") == own.model_type and kind.__name__ in named


def _has_attention(kind: type[PreTrainedModel] | None, implementation: str) -> bool:
    if kind is None:
        return False
    return {
        "sdpa": kind._supports_sdpa,
        "flash_attention_2": kind._supports_flash_attn,
        "flex_attention": kind._supports_flex_attn,
    }.get(implementation, True)


def _check_token_maps(folder: str, other: str, what: str) -> None:
    if not (Path(folder).is_dir() and Path(other).is_dir()) or Path(folder).samefile(other):
        return
    first, second = find_tokenizer(folder), find_tokenizer(other)
    if first is not None and second is not None and (found := token_maps_differ(first, second)) is not None:
        raise ValueError(f"{what}: the tokenizers of {folder} and of the policy ({other}) {found}")


def _is_quantized(described: dict[str, Any], options: dict[str, Any]) -> bool:
    return "gguf_file" in options or any(d.get("quantization_config") is not None for d in (described, options))


def _revision(config: PreTrainedConfig) -> str | None:
    # Not a field of the configuration: set by versions of transformers that keep the commit, and by load_causal_lm.
    found: str | None = getattr(config, "_commit_hash", None)
    return found


def _loaded(loader: Any, folder: str, what: str, quantized: bool, **options: Any) -> PreTrainedModel:
    """Return the model, after comparing its weights with those of the folder."""
    checked = {**options, "ignore_mismatched_sizes": True, "output_loading_info": True}
    shapes = not options.get("ignore_mismatched_sizes", False)
    try:
        if quantized:  # its layers are made while their weights are read, so they cannot be compared before
            model, found = loader.from_pretrained(folder, **checked)
            _check_weights(model, found, what, shapes)
            return model
        checked = {key: value for key, value in checked.items() if key not in _PLACING}
        with loading_whole(), _without_bars(folder):
            model, found = loader.from_pretrained(folder, device_map="meta", **checked)
            _check_weights(model, found, what, shapes)
        return loader.from_pretrained(folder, **options)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{what}: {str(error).splitlines()[0]}") from None


def _check_weights(model: PreTrainedModel, found: dict[str, Any], what: str, shapes: bool) -> None:
    """Raise ValueError if weights are missing, left over or, with `shapes`, of another shape."""
    kind = type(model).__name__
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{what}: it lacks {len(missing)} weights that {kind} has, such as {missing[0]}: they would be drawn at "
            "random. Use a complete causal language model."
        )
    if extra := sorted(found["unexpected_keys"]):
        raise ValueError(
            f"{what}: it holds {len(extra)} weights that {kind} does not have, such as {extra[0]}: they would be left "
            "out. Check that config.json belongs to these weights."
        )
    if shapes and (other := sorted(found["mismatched_keys"])):
        name, on_disk, wanted = other[0]
        raise ValueError(
            f"{what}: {len(other)} of its weights have another shape than {kind} needs, such as {name}: "
            f"{list(on_disk)} instead of {list(wanted)}. Check that config.json belongs to these weights."
        )


@contextmanager
def _without_bars(folder: str) -> Iterator[None]:
    """Show no progress bar while names are read from a local folder; a download keeps its bar."""
    if not logging.is_progress_bar_enabled() or not Path(folder).is_dir():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()
