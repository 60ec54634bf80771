"""An update on two processes: no weight is sent, and what comes out is what a model that is not sharded would have.

accelerate launch --config_file launch/accelerate/BACKEND.yaml [FLAGS] tests/scripts/sync_ranks.py BACKEND FOLDER

BACKEND: zero3; launched as multi, fsdp2. FOLDER has the model that the policy starts from.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import is_deepspeed_available
from contract_run import Run
from support.contract import Case
from support.models import batch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from refkl import Reference, ReferenceSync, SyncConfig, score_tokens
from refkl.backend import named_weights, unwrap, weights_of


class Traffic(TorchDispatchMode):
    """Every collective of this process while it is open: torch's own, and DeepSpeed's, which has a shortcut on CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            self.calls.append(str(func))
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Traffic:
        if is_deepspeed_available():
            from deepspeed.comm import comm

            self._comm, self._backend = comm, comm.cdb
            if comm.cdb is not None:
                comm.cdb = _Watched(comm.cdb, self.calls)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if is_deepspeed_available():
            self._comm.cdb = self._backend


class _Watched:
    """DeepSpeed's backend, noting what is called of it that sends."""

    def __init__(self, backend: Any, calls: list[str]) -> None:
        self.__dict__.update(backend=backend, calls=calls)

    def __getattr__(self, name: str) -> Any:
        if any(word in name for word in ("reduce", "gather", "broadcast", "scatter", "all_to_all", "send", "barrier")):
            self.calls.append(name)
        return getattr(self.backend, name)


class Half(Run):
    def make_policy(self) -> nn.Module:
        return super().make_policy().bfloat16()


def whole(reference: Reference) -> dict[str, Tensor]:
    return {n: layout.join(local).clone() for n, local, layout in reference.weights() if reference.owns(n)}


def check_update(case: Case, alpha: float, *, bias: float | None = None) -> None:
    tokens = batch()
    with Traffic() as scoring:
        for _ in range(3):  # a forward may leave shards gathered
            case.reference.score(tokens)
    assert scoring.calls, "a score gathers; the counter must see it"
    first = whole(case.reference)
    case.train()
    theirs = {n: layout.join(local).clone() for n, local, layout in weights_of(unwrap(case.policy))}
    with Traffic() as traffic:
        case.reference.update(case.policy, alpha, bias=bias)
    # One number: where the first NaN of any rank is.
    assert len(traffic.calls) == 1 and "allreduce" in traffic.calls[0], traffic.calls
    found = whole(case.reference)
    assert found and set(found) <= set(theirs)
    right = {}
    for name, tensor in found.items():
        old, new = first.get(name, theirs[name]), theirs[name]
        if name not in first and "lora_B" in name:
            old = torch.zeros_like(old)  # an adapter that was off
        mixed = new if alpha == 1.0 else torch.lerp(old, new, alpha)
        if bias is not None:
            mixed = (new - old) * bias + mixed
        right[name] = mixed.to(tensor.dtype)
        assert torch.equal(tensor, right[name]), name
    assert any(not torch.equal(tensor, first[n]) for n, tensor in found.items() if n in first) or not first
    with torch.no_grad():
        for name, tensor in named_weights(case.plain):
            if name in right:
                tensor.copy_(right[name])
    for _ in range(3):
        torch.testing.assert_close(case.reference.score(tokens).logp, case.expected(tokens), rtol=0, atol=2e-6)


def check_average_is_sharded(case: Case) -> None:
    """In bf16: fp32 beside it, each rank its own part; and small steps arrive."""
    parts = {n: local.numel() for n, local, _ in case.reference.weights()}
    first = whole(case.reference)
    case.train()
    theirs = {n: layout.join(local).float() for n, local, layout in weights_of(unwrap(case.policy))}
    with Traffic() as traffic:
        for _ in range(100):
            case.reference.update(case.policy, 0.002)
    assert len(traffic.calls) == 100 and all("allreduce" in call for call in traffic.calls)
    assert {n: t.numel() for n, t in case.reference._mover.averages.mean.items()} == parts
    left = sum(float((theirs[n] - t.float()).norm() ** 2) for n, t in whole(case.reference).items()) ** 0.5
    gap = sum(float((theirs[n] - t.float()).norm() ** 2) for n, t in first.items()) ** 0.5
    assert abs(left / gap / 0.998**100 - 1) < 0.01, left / gap


def check_nan_of_one_rank(case: Case, alpha: float) -> None:
    """It is in one rank's part only, and every rank refuses, by the same name."""
    case.train()
    before = case.reference.fingerprint()
    name, local = [(n, local) for n, local, layout in weights_of(unwrap(case.policy)) if layout.sharded][-1]
    kept = local.clone()
    if PartialState().process_index:
        local.view(-1)[0] = torch.nan
    try:
        case.reference.update(case.policy, alpha)
        raise AssertionError("NaN was taken over")
    except ValueError as error:
        assert f"{name} holds NaN" in str(error), error
    assert case.reference.fingerprint() == before
    local.copy_(kept)
    case.reference.update(case.policy, alpha)


def check_nan_kl_of_one_rank(case: Case) -> None:
    sync = ReferenceSync(case.reference, SyncConfig(every=None, max_kl=5.0))
    try:
        sync.step(case.policy, kl=float("nan") if PartialState().process_index else 9.0)
        raise AssertionError("a KL of NaN was taken")
    except ValueError as error:
        assert "KL of the step is nan" in str(error), error
    assert not sync.updates


def check_schedule(case: Case) -> None:
    """The KL to the first reference, and a reset that one rank's KL asks for."""
    config = SyncConfig(every=2, alpha=0.5, first_kl_every=1, max_kl=5.0)
    sync = ReferenceSync(case.reference, config)
    rank = PartialState().process_index
    for kl in (0.1, 0.1, 9.0 if rank else 0.1):
        case.train()
        metrics = sync.step(case.policy, kl=kl, batch=batch())
        assert metrics["kl/first"] > 0
    assert [(u["step"], u["alpha"]) for u in sync.updates] == [(2, 0.5), (3, 1.0)]
    with torch.no_grad():
        assert torch.equal(case.reference.score(batch()).logp, score_tokens(case.policy, batch()).logp)


def main() -> None:
    backend, folder = sys.argv[1:]
    PartialState(cpu=not torch.accelerator.is_available())
    accelerator = Accelerator()
    assert accelerator.num_processes == 2
    if backend == "zero3":
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 3

    def case(strategy: str, policy: str, kind: type[Run] = Run) -> Case:
        accelerator.free_memory()  # it takes one engine at a time
        return kind(backend, strategy, policy, "after", Path(folder)).make_case(accelerator)

    for alpha, bias in ((0.3, None), (1.0, None), (0.3, 0.5)):
        check_update(case(backend, "full"), alpha, bias=bias)
        check_update(case("swap", "lora"), alpha, bias=bias)
    check_update(case("adapter", "fresh"), 0.3)
    accelerator.print("passed updates", flush=True)
    for alpha in (0.3, 1.0):
        check_nan_of_one_rank(case(backend, "full"), alpha)
        check_nan_of_one_rank(case("swap", "lora"), alpha)
    check_nan_kl_of_one_rank(case(backend, "full"))
    accelerator.print("passed NaN", flush=True)
    check_schedule(case(backend, "full"))
    accelerator.print("passed the schedule", flush=True)
    if backend == "fsdp2":
        check_average_is_sharded(case(backend, "full", Half))
        accelerator.print("passed averages", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
