"""Which TRL the plugin works with, and which settings of its trainers: what does not fit is refused by name."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from accelerate.utils import ParallelismConfig
from peft import LoraConfig
from support.models import llama
from support.trl_runs import dpo, grpo, kto, logged, rloo
from transformers import BitsAndBytesConfig, LlamaForCausalLM, Trainer

from refkl import KLConfig
from refkl.hf import KLTrainer
from refkl.hf.compat import METHODS, check_transformers
from refkl.trl import TESTED, KLDPOTrainer, KLGRPOTrainer, KLKTOTrainer, KLRLOOTrainer, KLSFTTrainer, compat
from refkl.trl.compat import check_trl

ALL = [(grpo, KLGRPOTrainer), (rloo, KLRLOOTrainer), (dpo, KLDPOTrainer), (kto, KLKTOTrainer)]


@pytest.mark.parametrize("other", ["1.15.9", TESTED[1] + ".0", "2.0.0"])
def test_another_version_is_refused(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_trl()
    monkeypatch.setattr("refkl.trl.compat.version", lambda name: other)
    with pytest.raises(ImportError, match=rf"tested with trl >=1\.16,<1\.17 and found {other}"):
        check_trl()


def test_the_range_is_the_one_that_is_installed_with_refkl() -> None:
    (requirement,) = [r for r in metadata.requires("refkl") or [] if r.startswith("trl")]
    assert requirement in (f"trl>={TESTED[0]},<{TESTED[1]}", f"trl<{TESTED[1]},>={TESTED[0]}")


def test_a_changed_signature_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(self: Any, model: Any, batch: Any) -> None: ...

    monkeypatch.setattr(trl.GRPOTrainer, "_compute_loss", moved)
    with pytest.raises(ImportError, match=r"GRPOTrainer\._compute_loss takes model, batch where it took model, inputs"):
        check_trl()


def test_a_method_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(trl.RLOOTrainer, "_generate_and_score_completions")
    with pytest.raises(ImportError, match="RLOOTrainer has no _generate_and_score_completions"):
        check_trl()


def test_an_old_trl_that_lacks_what_is_imported_is_named_too(tmp_path: Path) -> None:
    code = (
        "import importlib.metadata as m, trl.trainer.utils as u\n"
        "del u.FusedCausalLMOutput\n"
        "known = m.version\n"
        "m.version = lambda name: '1.9.1' if name == 'trl' else known(name)\n"
        "try:\n    import refkl.trl\nexcept ImportError as error:\n    print(error)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "tested with trl >=1.16,<1.17 and found 1.9.1" in output.stdout


def test_what_the_trainers_are_to_use_is_looked_for_in_their_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules["refkl.trl.compat"]._USED, "KTOTrainer", ("self.ref_model", "self._no_such_thing"))
    with pytest.raises(ImportError, match=r"KTOTrainer no longer uses self\._no_such_thing"):
        check_trl()


def test_a_changed_trainer_of_transformers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_transformers()

    def moved(self: Any, model: Any, batch: Any) -> None: ...

    monkeypatch.setattr(Trainer, "compute_loss", moved)
    monkeypatch.delattr(Trainer, "_save_checkpoint")
    with pytest.raises(ImportError, match=r"Trainer\.compute_loss takes model, batch where .*no _save_checkpoint"):
        check_transformers()


def test_a_wrapper_of_another_package_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """It passes what it gets to the method that was there."""

    def train(self: Any, *args: Any, **kwargs: Any) -> None: ...

    def compute_loss(self: Any, model: Any, inputs: Any, **kwargs: Any) -> None: ...

    monkeypatch.setattr(Trainer, "train", train)
    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)
    check_transformers()


@pytest.mark.parametrize("trainer", [*(cls for _, cls in ALL), KLSFTTrainer, KLTrainer])
def test_every_method_of_transformers_that_is_overridden_is_checked(trainer: type) -> None:
    ours = [vars(cls) for cls in trainer.__mro__ if cls.__module__.startswith("refkl.")]
    known = {name for name, value in vars(Trainer).items() if callable(value)} - {"__init__"}
    assert {name for own in ours for name in own if name in known} <= METHODS.keys()


def test_only_one_file_imports_from_inside_trl() -> None:
    package = Path(compat.__file__).parents[1]
    users = {
        str(p.relative_to(package)) for p in package.rglob("*.py") if re.search(r"\btrl\.trainer\b", p.read_text())
    }
    assert users == {"trl/compat.py"}


def test_the_message_comes_when_the_plugin_is_imported(tmp_path: Path) -> None:
    """A package that patches TRL, imported before."""
    code = (
        "import trl\n"
        "trl.DPOTrainer._compute_loss = lambda self, model: None\n"
        "try:\n    import refkl.trl\nexcept ImportError as error:\n    print(error)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "DPOTrainer._compute_loss takes model where it took model, inputs, return_outputs" in output.stdout


@pytest.mark.parametrize("make, cls", ALL)
def test_settings_that_would_score_the_two_apart_are_refused(make: Any, cls: type, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_liger_kernel replaces the policy's layers"):
        make(cls, llama(), tmp_path, {"use_liger_kernel": True})
    trainer = make(cls, llama(), tmp_path)
    for size, kind in (("tp_size", "tensor"), ("cp_size", "context"), ("sp_size", "sequence")):
        trainer.accelerator.state.parallelism_config = ParallelismConfig(**{size: 2})
        try:
            with pytest.raises(ValueError, match=rf"does not support {kind} parallelism .*{size} is 2"):
                trainer._check_settings()  # as when it is made, which needs the ranks
        finally:
            trainer.accelerator.state.parallelism_config = None


@pytest.mark.slow
@pytest.mark.parametrize("make, cls", ALL)
def test_a_compiled_policy_trains_as_another(make: Any, cls: type, tmp_path: Path) -> None:
    runs = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch.manual_seed(0)
        trainer = make(cls, llama(), tmp_path, {"max_steps": 2, "optim": "sgd", "learning_rate": 0.1, **options})
        trainer.train()
        runs.append((logged(trainer, "loss"), logged(trainer, "kl/sequence"), logged(trainer, "grad_norm")))
    for plain, compiled in zip(*runs, strict=True):
        assert compiled == pytest.approx(plain, rel=1e-4, abs=1e-6)
    assert abs(runs[0][1][1]) > 1e-4


@pytest.mark.parametrize("make, cls", ALL)
def test_a_quantised_policy_is_its_own_base(make: Any, cls: type, tmp_path: Path) -> None:
    """QLoRA: the reference is the quantised base, with nothing copied; the KL starts at 0 and follows the adapter."""
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "model")
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    policy = LlamaForCausalLM.from_pretrained(tmp_path / "model", quantization_config=four)
    kl = {"kl": KLConfig(coef=0.1)} if make in (grpo, rloo) else {}
    trainer = make(
        cls, policy, tmp_path, {"max_steps": 2}, peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]), **kl
    )
    assert trainer.reference.strategy == "adapter" and trainer.reference.memory().total == 0
    trainer.train()
    first, second = logged(trainer, "kl/sequence")
    assert first == 0.0 and abs(second) > 1e-4
