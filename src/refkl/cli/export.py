"""`refkl export`: a run's trained policy as a plain model folder."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel

from refkl.compare.load import model_section
from refkl.files import folder_written_whole
from refkl.loading import load_causal_lm

TOLERANCE = 1e-5
"""Largest difference between logits before and after, relative to the largest logit."""


def export_command(arguments: list[str]) -> int:
    """Parse and run `refkl export RUN [--merge] [--output DIR]`."""
    parser = argparse.ArgumentParser(prog="refkl export", description=export.__doc__, allow_abbrev=False)
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--merge", action="store_true", help="merge an adapter into its base")
    parser.add_argument("--output", type=Path, help="the folder to write; RUN/export by default")
    options = parser.parse_args(arguments)
    output = options.output or options.run / "export"
    difference = export(options.run, output, merge=options.merge)
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    exact = "" if difference is None else f"; its logits differ from the policy's by {difference:.1e} of the largest"
    console.print(f"exported to {output}{exact}")
    return 0


def export(run: Path, output: Path, *, merge: bool = False) -> float | None:
    """Write a run's trained policy as a model folder that transformers loads anywhere.

    Args:
        run: a run folder.
        output: the folder to make; must not exist.
        merge: merge the adapter into its base, in fp32. Without it, an adapter is exported as an adapter.

    Returns:
        The largest difference between the logits of the trained policy and of the exported model when loaded again,
        relative to the largest logit; None for an adapter that is copied unchanged.

    Raises:
        ValueError: no trained policy there, or not all of its weights; an output that exists; logits that differ by
            more than TOLERANCE.
    """
    trained = run / "model"
    if not (trained / "config.json").is_file() and not (trained / "adapter_config.json").is_file():
        raise ValueError(f"{run} holds no trained policy ({trained}): has the run ended?")
    if output.exists():
        raise ValueError(f"{output} already exists. Remove it or choose another --output.")
    adapter = (trained / "adapter_config.json").is_file()
    if adapter and not merge:
        with folder_written_whole(output) as temporary:
            shutil.copytree(trained, temporary)
        return None
    with folder_written_whole(output) as temporary:
        return _write_plain(run, trained, temporary)


def _write_plain(run: Path, trained: Path, temporary: Path) -> float:
    """Write the trained policy as a plain model, and return the difference of its logits."""
    model = _load(run, trained)
    before = _probe(model)
    plain: PreTrainedModel = model.merge_and_unload() if isinstance(model, PeftModel) else model
    plain.save_pretrained(temporary)
    AutoTokenizer.from_pretrained(trained).save_pretrained(temporary)
    after = _probe(load_causal_lm(str(temporary), "The exported model cannot be loaded again", dtype=plain.dtype))
    difference = ((before - after).abs().max() / before.abs().max()).item()
    if not difference <= TOLERANCE:
        raise ValueError(
            f"Merged, the policy's logits differ by {difference:.1e} of the largest, more than {TOLERANCE:.0e}: this "
            "adapter does not merge exactly. Export it without --merge."
        )
    return difference


def _load(run: Path, trained: Path) -> PreTrainedModel | PeftModel:
    config = model_section(run / "config.yaml")
    dtype = getattr(torch, config["dtype"])
    if not (trained / "adapter_config.json").is_file():
        return load_causal_lm(str(trained), f"The trained policy {trained} cannot be loaded", dtype=dtype).eval()
    base_folder = PeftConfig.from_pretrained(str(trained)).base_model_name_or_path
    # In 16 bits, the sum of base and adapter would be rounded, which gives another model.
    what = f"The adapter's base model {base_folder!r} cannot be loaded"
    base = load_causal_lm(str(base_folder), what, dtype=torch.float32, **config["init_kwargs"])
    return PeftModel.from_pretrained(base, str(trained)).eval()


@torch.no_grad()
def _probe(model: torch.nn.Module) -> torch.Tensor:
    """Return logits on tokens spread over the vocabulary."""
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    ids = torch.linspace(0, vocabulary - 1, 32).long()[None]
    return model.eval()(input_ids=ids).logits.double()
