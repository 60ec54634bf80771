"""A sharded reference on two processes: saved in parts, loaded again, and loaded from what one process saved.

accelerate launch --config_file launch/accelerate/BACKEND.yaml tests/scripts/saved_parts.py BACKEND FOLDER

BACKEND: zero3; launched as multi, fsdp2. FOLDER has the model that the policy starts from, and in whole/ a reference
that a clone saved. Leaves parts/, the reference in parts, and scores.pt, what it gives.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from contract_run import Run
from support.models import batch

from refkl.scoring import score_tokens


def main() -> None:
    backend, folder = sys.argv[1], Path(sys.argv[2])
    PartialState(cpu=True)
    accelerator = Accelerator()
    assert accelerator.num_processes == 2, accelerator.num_processes
    if backend == "zero3":
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 3
    case = Run(backend, backend, "full", "after", folder).make_case(accelerator)
    reference, tokens = case.reference, batch()
    reference.load(folder / "whole")
    whole = json.loads((folder / "whole" / "reference.json").read_text())
    assert reference.fingerprint() == whole["fingerprint"]
    assert len(list(reference._mover.averages.weights())) == 2 * len(whole["weights"])

    case.step(-score_tokens(case.policy, tokens).logp.sum() / 100)
    reference.update(case.policy, alpha=0.5, bias=0.25)
    scores, fingerprint = reference.score(tokens).logp, reference.fingerprint()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # also in the place of one
            reference.save(folder / "parts")
    assert not caught, [str(w.message) for w in caught]
    kept = [local.clone() for _, local, _ in reference._mover.averages.weights()]
    reference.update(case.policy, alpha=1.0)
    assert reference.fingerprint() != fingerprint
    reference.load(folder / "parts")
    assert reference.fingerprint() == fingerprint and torch.equal(reference.score(tokens).logp, scores)
    assert all(torch.equal(a, b) for a, (_, b, _) in zip(kept, reference._mover.averages.weights(), strict=True))

    if dist.get_rank() == 0:  # both see the file, and both must refuse it
        shard = next((folder / "parts").glob("shard-00002-*"))
        shard.rename(folder / "hidden")
    dist.barrier()
    try:
        reference.load(folder / "parts")
    except ValueError as error:
        assert "shard-00002" in str(error) and "is missing" in str(error), error
    else:
        raise AssertionError("loaded a reference without one of its files")
    assert reference.fingerprint() == fingerprint
    if dist.get_rank() == 0:
        (folder / "hidden").rename(shard)
        torch.save({"fingerprint": fingerprint, "logp": scores}, folder / "scores.pt")
    accelerator.print("saved and loaded")
    accelerator.end_training()


if __name__ == "__main__":
    main()
