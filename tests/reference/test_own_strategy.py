"""The strategies of docs/own-strategy.md, made from what the page shows, pass the contract suite."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from support.contract import CHECKS, Case, plain_copy
from support.launching import ROOT
from support.models import batch, byte_tokenizer, gpt2, llama, qwen2
from torch import Tensor, nn
from trl import DPOConfig

import refkl
from refkl import KLConfig, ReferenceConfig, SyncConfig, TokenBatch, build_reference, score_pair, score_tokens
from refkl.backend import weights_of
from refkl.checkpoint import RECORD, REFERENCE
from refkl.reference.weights.fingerprint import combined, digests
from refkl.trl import KLDPOTrainer

PAGE = (ROOT / "docs/own-strategy.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(autouse=True)
def strategies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry with the page's two strategies in it, for a test."""
    monkeypatch.setattr("refkl.reference.registry.STRATEGIES", dict(refkl.STRATEGIES))
    for number, block in enumerate(BLOCKS):
        page = ModuleType(f"own_strategy_{number}")
        monkeypatch.setitem(sys.modules, page.__name__, page)  # where a dataclass looks for its own module
        exec(compile(block, "docs/own-strategy.md", "exec"), vars(page))


@contextmanager
def serving(model: nn.Module) -> Iterator[str]:
    """The URL of a server that scores with this model."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"weights": combined(digests(weights_of(model))), "class": type(model).__name__})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            temperature = body.pop("temperature")
            tokens = {name: torch.tensor(value) for name, value in body.items()}
            with torch.no_grad():
                scores = score_tokens(model, TokenBatch(**tokens), temperature=temperature)
            self.answer({"logp": scores.logp.tolist()})

        def answer(self, value: dict[str, Any]) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(value).encode())

        def log_message(self, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def served(url: str, **more: Any) -> ReferenceConfig:
    return ReferenceConfig(strategy="served", options={"url": url}, **more)


def _case(policy: nn.Module, config: ReferenceConfig, plain: nn.Module, folder: Path, **more: Any) -> Case:
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)

    def step(loss: Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Case(policy, build_reference(policy, config), plain, step, moves=False, folder=folder, **more)


def test_the_examples_are_short() -> None:
    lengths = [len([line for line in block.splitlines() if line.strip()]) for block in BLOCKS]
    assert len(lengths) == 2 and lengths[0] <= 60 and lengths[1] <= 25


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_served_reference_fulfils_the_contract(
    make: Callable[..., nn.Module], check: Callable[[Case], None], tmp_path: Path
) -> None:
    policy = make()
    plain = plain_copy(policy)
    with serving(plain) as url:
        check(_case(policy, served(url), plain, tmp_path, only_logp=True))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[6:])
@pytest.mark.parametrize("make", [llama, qwen2])
def test_a_teacher_fulfils_the_contract(
    make: Callable[..., nn.Module], check: Callable[[Case], None], tmp_path: Path
) -> None:
    policy = make()
    policy.save_pretrained(tmp_path / "teacher")
    config = ReferenceConfig(strategy="teacher", options={"folder": str(tmp_path / "teacher")})
    check(_case(policy, config, plain_copy(policy), tmp_path))


def test_different_servers_are_different_references() -> None:
    policy = llama()
    with serving(policy) as own, serving(llama()) as other, serving(plain_copy(policy)) as same:
        prints = [build_reference(policy, served(url)).fingerprint() for url in (own, other, same)]
    assert prints[0] == prints[2] != prints[1]


def test_another_model_behind_the_same_address_is_found() -> None:
    policy, model = llama(), llama()
    with serving(model) as url:
        reference = build_reference(policy, served(url))
        reference.verify()
        with torch.no_grad():
            model.lm_head.weight.add_(0.1)
        with pytest.raises(ValueError, match=r"changed without an update or load: .*'served'"):
            reference.verify()
        with pytest.raises(ValueError, match="changed"):
            reference.verify()  # it is not approved of by having been found


def test_the_cache_asks_a_server_once(tmp_path: Path) -> None:
    policy, model = llama(), llama()
    with serving(model) as url:
        reference = build_reference(policy, served(url, cache=str(tmp_path)))
        right = reference.score(batch()).logp
        assert reference.strategy == "served" and reference.cache is not None
        assert torch.equal(reference.score(batch()).logp, right)
        assert (reference.cache.stats.hits, reference.cache.stats.misses) == (3, 3)
        with torch.no_grad():
            model.lm_head.weight.add_(0.1)
        again = build_reference(policy, served(url, cache=str(tmp_path)))
        assert not torch.equal(again.score(batch()).logp, right)


def test_what_it_does_not_offer_is_refused_before_the_run() -> None:
    policy = llama()
    with serving(llama()) as url:
        reference = build_reference(policy, served(url))
        with pytest.raises(ValueError, match="'served' gives log-probabilities only"):
            score_pair(policy, reference, batch(), divergence="reverse_kl")
        with pytest.raises(ValueError, match=r"'served'.* cannot move"):
            refkl.ReferenceSync(reference, SyncConfig()).check(policy)
        for field, value in {"dtype": "bfloat16", "offload": True, "source": "pretrained"}.items():
            with pytest.raises(ValueError, match=f"'served' cannot work here: it takes no reference.{field}"):
                build_reference(policy, served(url, **{field: value}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ulr": "http://x"}, r"reference\.options\.ulr is not an option of strategy 'served'. Did you mean 'url'"),
        ({}, r"'served' needs reference\.options\.url"),
        ({"url": "x"}, "'served' cannot work here: 'x' is no URL"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_reference(llama(), ReferenceConfig(strategy="served", options=options))


def test_options_are_for_a_strategy_that_has_them() -> None:
    with pytest.raises(ValueError, match=r"reference\.options\.url is not an option of strategy 'clone'\. It has none"):
        build_reference(llama(), ReferenceConfig(strategy="clone", options={"url": "x"}))
    with pytest.raises(ValueError, match=r"'auto'\. Set reference\.strategy"):
        build_reference(llama(), ReferenceConfig(options={"url": "x"}))


def test_auto_does_not_take_a_stranger() -> None:
    assert build_reference(llama()).strategy == "clone"


def test_a_class_is_registered_under_its_own_name() -> None:
    class Mine(refkl.reference.CloneReference):
        strategy = "mine"

    with pytest.raises(ValueError, match=r"registered as 'other', but its attribute `strategy` is 'mine'"):
        refkl.register_strategy("other", Mine)


def test_a_reference_without_an_identity_is_refused() -> None:
    @dataclass
    class Options:
        pass

    served_class = refkl.reference.registry.STRATEGIES["served"]

    class Nameless(served_class):  # type: ignore[misc, valid-type]
        strategy = "nameless"

        def identity(self) -> dict[str, Any]:
            return {}

    refkl.register_strategy("nameless", Nameless)
    config = ReferenceConfig(strategy="nameless", options={"url": "http://127.0.0.1:1"})
    with pytest.raises(ValueError, match=r"'nameless' does not say which model it is: its identity\(\) is empty"):
        build_reference(llama(), config)


def test_a_trainer_runs_beside_a_server_and_its_checkpoint_records_it(tmp_path: Path) -> None:
    policy = llama()
    pairs = {"prompt": ["hello", "hi there"] * 4, "chosen": [" good", "yes!"] * 4, "rejected": ["bad one", " no"] * 4}
    with serving(plain_copy(policy)) as url:
        options: dict[str, Any] = {"report_to": [], "bf16": False, "use_cpu": True, "logging_steps": 1}
        options |= {"disable_tqdm": True, "max_steps": 2, "save_steps": 1, "learning_rate": 1e-2}
        trainer = KLDPOTrainer(
            policy,
            args=DPOConfig(str(tmp_path / "run"), per_device_train_batch_size=4, **options),
            processing_class=byte_tokenizer(),
            train_dataset=Dataset.from_dict(pairs),
            kl=KLConfig(coef=0.1),
            reference=served(url),
        )
        trainer.train()
    kls = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert kls[0] == pytest.approx(0.0, abs=1e-6) and kls[1] > 1e-6
    for step in (1, 2):
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        record = json.loads((checkpoint / RECORD).read_text())
        assert record["strategy"] == "served" and record["fingerprint"] == trainer.reference.recorded_fingerprint
        assert not record["saved"] and not (checkpoint / REFERENCE).exists()
