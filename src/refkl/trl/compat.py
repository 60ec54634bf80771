"""TRL internals that refkl uses. They are listed here and checked once, when refkl.trl is imported.

The plugin overrides methods that TRL does not promise to keep. If TRL changes them, the check gives one message instead
of an AttributeError at step 40.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from packaging.version import Version
from peft import PeftModel
from torch import nn

from refkl.hf.compat import changed_methods

TESTED = ("1.16", "1.17")
"""The first tested version, and the first later one that is not. docs/versions.md lists the tests of each version."""

_SCORING = (
    "model",
    "input_ids",
    "attention_mask",
    "logits_to_keep",
    "batch_size",
    "compute_entropy",
    "compute_aux_loss",
)
_METHODS: dict[str, dict[str, tuple[str, ...]]] = {
    name: {
        "_get_per_token_logps_and_entropies": _SCORING,
        "_generate_and_score_completions": ("inputs",),
        "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
        "_compute_loss": ("model", "inputs"),
    }
    for name in ("GRPOTrainer", "RLOOTrainer")
}
_METHODS |= {
    name: {
        "_compute_loss": ("model", "inputs", "return_outputs"),
        "_precompute_ref_logps": ("dataset", "name", "batch_size"),
        "compute_ref_log_probs": ("model", "inputs"),
    }
    for name in ("DPOTrainer", "KTOTrainer")
}
_METHODS |= {"SFTTrainer": {"compute_loss": ("model", "inputs", "return_outputs", "num_items_in_batch")}}
"""The first parameters of each method, after self."""

_SAMPLING = (
    "self.vllm_generation.sync_weights()",
    "_buffered_inputs",
    "self.ref_model",
    "self.beta",
    'model.add_adapter("ref"',
    "args = {config}(f",
    "self.temperature",
    '"advantages"',
    '"completion_mask"',
)
_PAIRS = (
    "self.ref_model",
    "fused_lm_head=True",
    "create_model_from_path",
    "if self.precompute_ref_logps:",
    "self._precompute_ref_logps(",
    'model.add_adapter("ref"',
)
_USED: dict[str, tuple[str, ...]] = {
    "GRPOTrainer": (*_SAMPLING, '"old_per_token_logps"', '"num_items_in_batch"', "_entropy_bonus_enabled"),
    "RLOOTrainer": (*_SAMPLING, '"old_logps"', "self.epsilon_low", "old_per_token_logps - ref_per_token_logps"),
    "DPOTrainer": (*_PAIRS, "self.use_weighting"),
    "KTOTrainer": (*_PAIRS, "KL_completion_mask"),
    "SFTTrainer": ("fused_lm_head=True", "outputs.label_mask", "self.padding_free", 'self.args.loss_type == "nll"'),
}
"""Text that each trainer's source must contain."""

_ANSWERS = ("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs", "label_mask", "aux_loss")


def check_trl() -> None:
    """Raise ImportError if refkl.trl does not work with the installed trl."""
    installed = version("trl")
    if not Version(TESTED[0]) <= Version(installed) < Version(TESTED[1]):
        raise ImportError(
            f"refkl.trl was tested with trl >={TESTED[0]},<{TESTED[1]} and found {installed}, whose trainers may "
            f"differ where refkl overrides them. Install 'trl>={TESTED[0]},<{TESTED[1]}', or use refkl without its TRL "
            "plugin."
        )
    if changed := _changes():
        raise ImportError(
            f"This trl, {installed}, is not as released, or a package has changed it: {'; '.join(changed)}. refkl.trl "
            f"needs these unchanged. Install 'trl>={TESTED[0]},<{TESTED[1]}' again, or use refkl without its TRL "
            "plugin."
        )


def _changes() -> list[str]:
    """List the differences from the TRL that refkl relies on."""
    import trl
    from trl.trainer import utils

    found = []
    for name, methods in _METHODS.items():
        if (trainer := getattr(trl, name, None)) is None:
            found.append(f"there is no {name}")
            continue
        found += changed_methods(trainer, methods)
        source = inspect.getsource(inspect.getmodule(trainer) or trainer)
        texts = [used.replace("{config}", name.replace("Trainer", "Config")) for used in _USED[name]]
        found += [f"{name} no longer uses {used}" for used in texts if used not in source]
    if (answer := getattr(utils, "FusedCausalLMOutput", None)) is None:
        return [*found, "trl.trainer.utils has no FusedCausalLMOutput"]
    fields = {field.name for field in dataclasses.fields(answer)}
    return found + [f"FusedCausalLMOutput has no {name}" for name in _ANSWERS if name not in fields]


def answer(**fields: Any) -> Any:
    """Return what TRL's patched models return for `fused_lm_head=True`: log-probabilities and statistics, by name."""
    from trl.trainer.utils import FusedCausalLMOutput

    return FusedCausalLMOutput(**fields)


def default_config(kind: type, model: Any) -> Any:
    """Return the configuration of class `kind` that a trainer of TRL makes if it is given none."""
    from trl.trainer.utils import get_config_model_id

    name = model if isinstance(model, str) else get_config_model_id(model.config)
    return kind(f"{name.split('/')[-1]}-{kind.__name__.removesuffix('Config')}")


@contextmanager
def no_adapter_of_trl(model: Any) -> Iterator[None]:
    """Run TRL's __init__ without the copy of a PeftModel's adapter that it adds there, called "ref".

    For PiSSA or OLoRA, adding it would rewrite the base once more, and change the policy. Here no adapter is made, and
    TRL's copying finds the policy's own.
    """
    if not isinstance(model, PeftModel):
        yield
        return
    own = nn.Module.get_parameter
    vars(model)["add_adapter"] = lambda name, config: None
    vars(model)["get_parameter"] = lambda name: own(model, name.replace(".ref.", ".default."))
    try:
        yield
    finally:
        del vars(model)["add_adapter"], vars(model)["get_parameter"]


@contextmanager
def no_reference_of_trl(trainer: type, model: Any) -> Iterator[None]:
    """Keep TRL's __init__ from making a reference while open. TRL has no option for that.

    For a full policy, TRL loads the model's folder a second time; here that call returns None. For a PeftModel, see
    `no_adapter_of_trl`.
    """
    module = sys.modules[trainer.__module__]
    create: Any = vars(module)["create_model_from_path"]
    policy_to_load = isinstance(model, str)

    def policy_only(*args: Any, **kwargs: Any) -> Any:
        nonlocal policy_to_load
        if policy_to_load:
            policy_to_load = False
            return create(*args, **kwargs)
        return None

    vars(module)["create_model_from_path"] = policy_only
    try:
        with no_adapter_of_trl(model):
            yield
    finally:
        vars(module)["create_model_from_path"] = create
