"""The documentation: its code runs, its YAML loads, its tables are what the code says, its names exist.

`bash launch/docs.sh` builds the site and looks at its links; nothing here needs what that takes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from peers.archives import NoIndexError, fetch
from peers.selection import PEERS
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from support.launching import ROOT
from support.models import llama
from support.tables import DOCS, rows, text
from support.train_inputs import model_folder
from torch import nn
from transformers import LlamaConfig
from trl import BEMACallback, DPOConfig, DPOTrainer, GRPOConfig, RLOOConfig, SFTConfig

import refkl
from refkl import KLConfig, ReferenceConfig, ReferenceSync, SyncConfig, kl
from refkl.backend import Backend
from refkl.cli.settings import parse_run
from refkl.messages import size
from refkl.planner import Plan, PlanConfig, make_plans
from refkl.reference import STRATEGIES, BuildRequest, choose

PAGES = sorted(DOCS.rglob("*.md"))
RUN = ["getting-started", "strategies", "moving"]
"""Pages whose Python is run, from top to bottom."""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL)


# code


@pytest.mark.parametrize("page", RUN)
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model_folder(tmp_path / "path" / "to" / "model")
    policy = llama()
    given = {
        "model": policy,
        "policy": policy,
        "reference": refkl.build_reference(policy),
        "optimizer": torch.optim.SGD(policy.parameters(), lr=0.1),
        "ReferenceSync": ReferenceSync,
        "SyncConfig": SyncConfig,
    }
    found, out = blocks(page, "python"), io.StringIO()
    assert found
    with contextlib.redirect_stdout(out):
        for number, block in enumerate(found, start=1):
            exec(compile(block, f"docs/{page}.md, block {number}", "exec"), given)
    if page == "getting-started":
        kls = [step["kl"] for step in given["history"]]  # type: ignore[union-attr]
        assert kls[0] == 0.0 and kls[1] > 0 and kls[2] > 0
        assert given["trainer"].reference.strategy == "clone"  # type: ignore[attr-defined]
        assert given["kl"].loss.item() > 0  # type: ignore[attr-defined]
        assert "ok    policy and reference share no trainable weights" in out.getvalue()
    if page == "strategies":
        assert "clone MemoryReport(device=" in out.getvalue() and "Use 'clone' instead." in out.getvalue()
    if page == "moving":
        assert given["metrics"] == {"sync/updates": 0.0}


@pytest.mark.parametrize("page", ["getting-started", "strategies", "migrating"])
def test_the_yaml_of_a_page_loads(page: str, tmp_path: Path) -> None:
    """A section alone as a part of the smallest file, which is the first one of getting-started."""
    least, found = yaml.safe_load(blocks("getting-started", "yaml")[0]), blocks(page, "yaml")
    assert found
    for number, block in enumerate(found):
        path = tmp_path / f"{number}.yaml"
        values = yaml.safe_load(block)
        path.write_text(yaml.safe_dump({**least, **values}))
        run = parse_run([str(path)])
        resolved = yaml.safe_load(run.resolved)
        for section, given in values.items():
            if isinstance(given, dict):
                assert {name: resolved[section][name] for name in given} == given


@pytest.mark.parametrize("key", ["model", "data", "reward", None])
def test_what_getting_started_says_has_to_be_there(key: str | None, tmp_path: Path) -> None:
    least = yaml.safe_load(blocks("getting-started", "yaml")[0])
    for name in (key, "trainer"):
        least.pop(name, None)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(least))
    if key is None:
        assert parse_run([str(path)]).trainer["output_dir"] == "runs/mine"
        return
    with pytest.raises(ValueError, match=key):
        parse_run([str(path)])


# strategies.md


def trained_lora(init: bool | str = True) -> PeftModel:
    policy = get_peft_model(
        llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=init, task_type="CAUSAL_LM")
    )  # type: ignore[arg-type]
    if init is True:
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                nn.init.constant_(parameter, 0.1)
    return policy  # type: ignore[return-value]


def lower_half_frozen() -> nn.Module:
    policy = llama()
    refkl.freeze(policy, ["model.embed_tokens", "model.layers.0"])
    return policy


POLICIES = {
    "all of it": llama,
    "part of it, the rest is frozen": lower_half_frozen,
    "a fresh adapter": lambda: get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")),
    "an adapter that was trained before": trained_lora,
    "an adapter whose making changed the base (PiSSA, OLoRA, …)": lambda: trained_lora("pissa"),
    "a learned prompt": lambda: get_peft_model(
        llama(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    ),
}


def request(policy: nn.Module, backend: str, **options: Any) -> BuildRequest:
    # What is planned needs no engine; that an adapter is fresh is then taken for granted.
    planned = backend.startswith(("zero", "fsdp")) and not isinstance(policy, PeftModel)
    backend_found = Backend(backend, 1 if backend == "plain" else 2)
    return BuildRequest(policy, ReferenceConfig(**options), backend_found, None, planned=planned)


def test_what_auto_takes() -> None:
    columns = [("plain", "ddp", "zero1", "zero2"), ("zero3",), ("fsdp2",)]
    table = {row[0]: row[1:] for row in rows("strategies", "## What auto takes")}
    assert table.keys() == POLICIES.keys()
    for what, cells in table.items():
        policy = POLICIES[what]()
        for cell, backends in zip(cells, columns, strict=True):
            assert {f"`{choose(request(policy, backend))}`" for backend in backends} == {cell}, (what, backends)


def test_which_option_goes_with_which_strategy(tmp_path: Path) -> None:
    model_folder(tmp_path / "model")
    homes = {
        "adapter": (POLICIES["a fresh adapter"](), "plain"),
        "swap": (lower_half_frozen(), "plain"),
        "clone": (llama(), "plain"),
        "shared_trunk": (lower_half_frozen(), "plain"),
        "zero3": (llama(), "zero3"),
        "fsdp2": (llama(), "fsdp2"),
    }
    options: list[dict[str, dict[str, Any]]] = [
        {"yes": {"dtype": "bfloat16"}},
        {"`cpu`": {"device": "cpu"}, "any": {"device": "cuda:1"}},
        {"yes": {"offload": True}},
        {"yes": {"quantize": "int8"}},
        {"yes": {"cache": str(tmp_path / "scores")}},
        {"yes": {"source": "base"}},
        {"yes": {"source": str(tmp_path / "model")}},
    ]
    table = {row[0].strip("`"): row[1:] for row in rows("strategies", "## Which option goes with which strategy")}
    assert table.keys() == homes.keys() == STRATEGIES.keys()
    for strategy, cells in table.items():
        policy, backend = homes[strategy]
        for cell, offered in zip(cells, options, strict=True):
            able = [
                name
                for name, option in offered.items()
                if STRATEGIES[strategy].supports(request(policy, backend, **option)) is None
            ]
            assert cell == (able[-1] if able else "\N{EN DASH}"), (strategy, offered)


def plan(what: str) -> Plan:
    trains, _, backend = what.partition(", ")
    half = ["model.embed_tokens", *(f"model.layers.{layer}" for layer in range(16))]
    model = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    options: dict[str, Any] = {"freeze": half} if trains == "the upper half" else {}
    method: Any = "lora" if trains.startswith("LoRA") else "full"
    name = backend.lower().replace("-", "")
    return make_plans(PlanConfig(model=model, method=method, backend=name, world_size=8, seq_len=2048, **options))[0]


def test_what_each_costs() -> None:
    def bytes_of(count: int) -> str:
        return size(count) if count else "0"

    what, planned = "", {}
    for where, reference, *cells in rows("strategies", "## What each costs"):
        what = where or what
        if what not in planned:
            planned[what] = plan(what)
        names = re.findall(r"`([^`]*)`", reference)
        option = names[1].replace(": ", "=") if len(names) > 1 else ""
        option = f"{option}=true" if option == "offload" else option
        found = next(r for r in planned[what].rows if (r.strategy, r.option) == (names[0], option))
        cost = found.cost
        flops = f"{cost.host_flops / 1e12:.1f} on the CPU" if cost.host_flops else f"{cost.flops / 1e12:.1f}"
        expected = [*map(bytes_of, (cost.device, cost.host, cost.scoring, cost.moved)), flops]
        assert cells == expected, (what, reference)
        assert ("(auto)" in reference) == found.auto, (what, reference)
    assert len(planned) == 6


# migrating.md


def configurations() -> list[str]:
    calls = re.findall(r"`((?:KL|Reference|Sync)Config\([^`]*\))`", text("migrating"))
    assert len(calls) > 25
    return sorted(set(calls))


@pytest.mark.filterwarnings("ignore:kl.estimator")
@pytest.mark.parametrize("call", configurations())
def test_each_configuration_can_be_made(call: str) -> None:
    known = {"KLConfig": KLConfig, "ReferenceConfig": ReferenceConfig, "SyncConfig": SyncConfig, "beta": 0.04}
    assert isinstance(eval(call, known), (KLConfig, ReferenceConfig, SyncConfig))


def names_of(cell: str) -> list[str]:
    return re.findall(r"`([\w.+-]+)`", cell)


def test_trl_s_names_exist() -> None:
    grpo, dpo, rloo, sft = (
        {f.name for f in fields(config)} for config in (GRPOConfig, DPOConfig, RLOOConfig, SFTConfig)
    )
    for section, known in (
        ("### GRPOConfig", grpo),
        ("### RLOOConfig and RLOOTrainer", rloo | {"args", "PeftModel"}),
        ("### DPOConfig and DPOTrainer", dpo | {"ref_model", "PeftModel"}),
        ("### SFTConfig", sft),
    ):
        for row in rows("migrating", section):
            assert set(names_of(row[0])) <= known, row[0]
    assert (
        RLOOConfig("out", use_cpu=True, bf16=False).beta == 0.05
        and "ref_model" in DPOTrainer.__init__.__code__.co_varnames
    )
    bema = next(row for row in rows("migrating", "### Others of TRL's") if row[0].startswith("`BEMA"))
    names = bema[0].strip("`").removeprefix("BEMACallback(").removesuffix(")").split(", ")
    assert set(names) <= set(BEMACallback.__init__.__code__.co_varnames)
    defaults = BEMACallback()
    config = eval(bema[1].strip("`"), {"SyncConfig": SyncConfig})
    settled = config.settled()
    ours = (config.every, settled.ema_power, settled.bias_power, settled.lag, config.warmup)
    assert ours == tuple(getattr(defaults, name) for name in names)


def test_trl_s_defaults_are_as_the_page_says() -> None:
    config = GRPOConfig("out", use_cpu=True, bf16=False)
    assert (config.beta, config.use_bias_correction_kl) == (0.0, True)
    assert (config.ref_model_sync_steps, config.ref_model_mixup_alpha) == (512, 0.6)


def test_trl_s_loss_types_are_aggregated_as_the_page_says() -> None:
    from refkl.trl.grpo import TRL_AGGREGATION

    seen = set()
    for types, aggregation in rows("migrating", "`loss_type` and the KL's aggregation:"):
        for name in names_of(types):
            seen.add(name)
            assert TRL_AGGREGATION.get(name, "token-mean") == names_of(aggregation)[0]
    # TRL's help lists them all, one bold name each.
    help_text = next(f for f in fields(GRPOConfig) if f.name == "loss_type").metadata["help"]
    assert seen == {"dapo", "cispo", "vespo", "bnpo", "grpo", "sapo", "luspo", "dr_grpo"}
    assert all(f"'{name}'" in help_text for name in seen)


def test_trl_s_corrected_k3_is_the_reverse_kl_gradient_sample_by_sample() -> None:
    """w · k3, w = p/s differentiated too: TRL's formula with use_bias_correction_kl; without it, k3's own gradient."""
    g = torch.Generator().manual_seed(0)
    logp, ref_logp, old_logp = (-4 * torch.rand(50, generator=g, dtype=torch.float64) for _ in range(3))

    def slope(value: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(value.sum(), leaf)[0]

    leaf = logp.clone().requires_grad_()
    k3 = (ref_logp - leaf).exp() - (ref_logp - leaf) - 1
    corrected, plain = slope(k3 * (leaf - old_logp).exp()), slope((ref_logp - leaf).exp() - (ref_logp - leaf) - 1)
    ours = slope(kl.estimate(leaf, ref_logp, "k3", gradient="reverse_kl", old_logp=old_logp))
    torch.testing.assert_close(ours, corrected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(slope(kl.estimate(leaf, ref_logp, "k3", gradient="autograd")), plain)
    assert (corrected - plain).abs().max() > 0.1


@pytest.fixture(scope="module")
def archives() -> dict[str, Path]:
    try:
        return {name: fetch(peer) for name, peer in PEERS.items()}
    except NoIndexError as error:
        if os.environ.get("REFKL_NEED_PEERS"):
            raise
        pytest.skip(f"the peers' sources were not looked at: {error}")


@pytest.mark.peers
def test_openrlhf_s_options_exist(archives: dict[str, Path]) -> None:
    with zipfile.ZipFile(archives["openrlhf"]) as wheel:
        source = {
            name.rpartition("/")[2]: wheel.read(name).decode()
            for name in wheel.namelist()
            if "openrlhf/cli/train" in name
        }
    section = text("migrating").partition("\n## OpenRLHF\n")[2].partition("\n## verl\n")[0]
    ppo, dpo = section.split("For DPO")
    for part, file in ((ppo, "train_ppo_ray.py"), (dpo, "train_dpo.py")):
        # Those in brackets are of earlier versions.
        present = re.findall(r"`(--[\w.]+)`", re.sub(r"\(`--[^)]*\)", "", part))
        assert len(present) >= 3
        for option in present:
            assert f'"{option}"' in source[file], option
    for default in ('"--algo.kl.init_coef", type=float, default=0.01', '"--algo.kl.target", type=float, default=None'):
        assert default in source["train_ppo_ray.py"]


@pytest.mark.peers
def test_verl_s_options_exist(archives: dict[str, Path]) -> None:
    peer = PEERS["verl"]
    with tarfile.open(archives["verl"]) as sdist:
        top = peer.folder.partition("/")[0]
        files = (
            sdist.extractfile(f"{top}/verl/trainer/{name}")
            for name in ("config/_generated_ppo_trainer.yaml", "ppo/core_algos.py")
        )
        config, source = (file.read().decode() for file in files if file is not None)
    values = yaml.safe_load(config)
    present = [name for row in rows("migrating", "## verl") for name in names_of(row[0])]
    assert len(present) > 12
    for name in present:
        found: Any = values
        for part in name.split("."):
            assert part in found, name
            found = found[part]
    for row in rows("migrating", "The names of an estimator:"):
        for name in names_of(row[0]):
            assert f'"{name.removesuffix("+")}"' in source, name


# names, links, includes


def api_names() -> list[str]:
    return [
        name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def test_every_public_name_is_on_a_page() -> None:
    """Those of refkl.trl are listed by the page itself."""
    listed = api_names()
    assert len(listed) == len(set(listed)) and "refkl.trl" in listed
    public = {f"refkl.{name}" for name in refkl.__all__ if name != "kl"} | {f"refkl.kl.{name}" for name in kl.__all__}
    # A function beside a module of its name is found inside that.
    missing = {name for name in public if name not in listed and f"{name}.{name.rpartition('.')[2]}" not in listed}
    assert not missing, "add them to docs/api/"


def test_links_of_the_readme_are_files() -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    local = [target for target in targets if "://" not in target]
    assert len(local) > 15 and not [target for target in local if not (ROOT / target).exists()]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_site(path: str) -> bool:
    return (DOCS / path).is_file()


def test_the_overview_is_the_readme_with_links_of_the_site(hooks: ModuleType) -> None:
    page = hooks.included(text("index"), on_site)
    assert page.startswith("# refkl\n") and "](docs/" not in page
    assert "![Reward and KL over steps, with and without the KL penalty](images/leash.png)" in page
    assert "[docs/moving.md](moving.md)" in page
    assert "[quickstart.yaml](files.md#configsquickstartyaml)" in page
    assert "[examples/own_loop.py](files.md#examplesown_looppy)" in page
    assert " `tests/reference/test_wrong_references.py`" in page.replace("\n", " ")  # no page: its name alone


def test_shipped_files_are_all_there_as_they_are(hooks: ModuleType) -> None:
    page = hooks.included(text("files"), on_site)
    for path in (*(ROOT / "configs").glob("*.yaml"), *(ROOT / "examples").glob("*.py")):
        assert f"## {path.relative_to(ROOT)}\n" in page and path.read_text().rstrip() in page
    page = hooks.included(text("getting-started"), on_site)
    assert "```python\ndef train(\n" in page and "\n    return history\n```" in page and "def sample(" not in page


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("<!-- include configs/none.yaml -->", "no such file"),
        ("<!-- include examples/own_loop.py::none -->", "no function or class called 'none'"),
    ],
)
def test_what_is_not_there_cannot_be_included(hooks: ModuleType, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hooks.included(line, on_site)


@pytest.mark.parametrize(
    ("tag", "found"),
    [
        ('<script src="https://example.org/x.js"></script>', True),
        ("<img alt=x src=//example.org/x.png>", True),
        ('<link rel="stylesheet" href="https://example.org/x.css">', True),
        ('<link href="https://example.org/x.css" rel="preconnect">', True),
        ('<link rel="canonical" href="https://example.org/">', False),
        ('<a href="https://example.org/">x</a>', False),
        ('<script src="assets/x.js"></script><link rel="stylesheet" href="assets/x.css">', False),
    ],
)
def test_what_a_page_may_load(hooks: ModuleType, tag: str, found: bool) -> None:
    assert (hooks.loaded(f"<html>{tag}</html>") is not None) == found


def test_nothing_of_the_theme_is_fetched_when_the_site_is_built() -> None:
    class Loader(yaml.SafeLoader):
        """mkdocs' tags are not needed here."""

    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    assert config["theme"]["font"] is False and "site_url" not in config
    assert not {"social", "privacy"} & {
        name if isinstance(name, str) else next(iter(name)) for name in config["plugins"]
    }
    pages = {str(page.relative_to(DOCS)) for page in PAGES}
    assert set(_nav(config["nav"])) == pages


def _nav(entries: Any) -> Iterator[str]:
    if isinstance(entries, str):
        yield entries
    else:
        for entry in entries if isinstance(entries, list) else entries.values():
            yield from _nav(entry)
