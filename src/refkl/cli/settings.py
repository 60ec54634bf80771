"""Parsing of a YAML file and the command line into a RunConfig."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, get_loader, set_loader, set_parsing_settings
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from trl import DPOConfig, GRPOConfig, KTOConfig, RLOOConfig, SFTConfig

from refkl.backend import given_once, watch_compile_locks
from refkl.cli.inputs import import_module
from refkl.config import RunConfig, choices
from refkl.messages import nearest, unknown
from refkl.yaml_files import YamlRefused, parse_yaml, read_yaml

TRAINER_CONFIGS: dict[str, type] = {
    "grpo": GRPOConfig,
    "rloo": RLOOConfig,
    "dpo": DPOConfig,
    "kto": KTOConfig,
    "sft": SFTConfig,
}


_REFUSALS = (OSError, TypeError, LookupError, AttributeError, AssertionError, RuntimeError, ArithmeticError)
"""Errors, besides ValueError and ImportError, that TRL's configurations raise for a value that they cannot use."""


@dataclass(frozen=True)
class ParsedRun:
    """A parsed run that has not started: making TRL's configuration would already occupy devices and processes."""

    config: RunConfig
    """The checked configuration; its `trainer` is still None."""
    trainer: dict[str, Any]
    """Arguments for TRL's configuration."""
    resolved: str
    """YAML of all settings, including defaults."""
    path: Path
    """The configuration file."""

    def trainer_config(self) -> Any:
        """Make TRL's configuration object.

        Raises:
            ValueError: TRL refuses a value or the combination, or DeepSpeed is configured twice with different values.
        """
        watch_compile_locks()  # DeepSpeed compiles an op when the configuration is made
        made = TRAINER_CONFIGS[self.config.method]
        with given_once(self.trainer):
            try:
                return made(**self.trainer)
            except _REFUSALS as error:
                raise ValueError(
                    f"{made.__name__} cannot be made of the section trainer: {type(error).__name__}: {error}. Look for "
                    "this value in the section, and for what the field takes in: refkl train --trainer.help"
                ) from error


def parse_run(arguments: list[str]) -> ParsedRun:
    """Read `CONFIG.yaml [--key value …]`.

    Raises:
        ValueError: a missing file, an unknown key (the nearest known one is named), a value of the wrong kind.
    """
    path, options = _split(_resume_in_full(arguments))
    values = _read(path) if path is not None else {}
    given = {option[2:].split("=")[0].rstrip("+") for option in options if option.startswith("--")}
    method = str(_option(options, "--method") or values.get("method", "grpo"))
    if method not in TRAINER_CONFIGS:
        raise unknown("method", method, TRAINER_CONFIGS)
    parser = _parser(method)
    if given & {"help", "h"} or "-h" in options:
        parser.parse_args(["--help"])
    if sections := [o for o in options if o.startswith("--") and o.endswith(".help")]:
        parser.parse_args(sections[:1])  # help of a section that is a list or optional
    if path is None:
        raise ValueError("refkl train needs a configuration file, as in: refkl train configs/quickstart.yaml")
    given |= set(_flat(values))
    _import(_option(options, "--imports") or values.get("imports"))
    for key in sorted(given):
        hint = _check_key(key, TRAINER_CONFIGS[method])
        value = _option(options, f"--{key}") or _at(values, key)
        if (known := choices(hint)) and isinstance(value, str) and value not in ("null", *map(str, known)):
            raise unknown(key, value, map(str, known))
    try:
        namespace = parser.parse_args(["--config", str(path), *options])
        if "trainer.output_dir" not in given:
            namespace["trainer.output_dir"] = f"runs/{path.stem}"
        if method == "rloo":
            _settle_beta(namespace, given)
        if not torch.accelerator.is_available():
            _settle_cpu(namespace, given)
        _check_values(values, namespace, given, TRAINER_CONFIGS[method])
        resolved = parser.dump(namespace, skip_unset=False)
        built = parser.instantiate(namespace)
    except ArgumentError as error:
        raise ValueError(f"{path}: {error}") from None
    except YamlRefused as error:
        raise ValueError(f"A value on the command line, or a file that one names: {error}") from None
    fields = [f.name for f in dataclasses.fields(RunConfig) if f.name != "trainer"]
    config = RunConfig(**{name: built[name] for name in fields})
    peft_config(config.peft)
    if built.trainer.model_init_kwargs:
        raise ValueError("trainer.model_init_kwargs would be ignored: refkl loads the model. Use model.init_kwargs.")
    return ParsedRun(config, built.trainer.as_dict(), resolved, path)


def _import(names: Any) -> None:
    """Import the modules of `imports`, from the file or the command line. Other values are refused with all others."""
    if isinstance(names, str):
        try:
            names = parse_yaml(names)
        except yaml.YAMLError:
            return  # jsonargparse will say where it is not YAML
    for name in names if isinstance(names, list) else []:
        if isinstance(name, str):
            import_module(name, f"imports names {name!r}")


def peft_config(values: dict[str, Any] | None) -> PeftConfig | None:
    """Return the PEFT configuration that `peft_type` names, made of the other fields.

    Raises:
        ValueError: an unknown type or field.
    """
    if values is None:
        return None
    fields = dict(values)
    name = str(fields.pop("peft_type")).upper()
    known = {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if name not in known:
        raise unknown("peft.peft_type", name, known)
    accepted = {f.name for f in dataclasses.fields(known[name])}
    for field in fields:
        if field not in accepted:
            raise ValueError(f"peft.{field} is not a field of {known[name].__name__}.{nearest(field, accepted)}")
    return known[name](**{"task_type": "CAUSAL_LM", **fields})


def _parser(method: str) -> ArgumentParser:
    # --help shows the docstring under each field of a configuration.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader(_CHECKED_YAML, _checked_yaml, (yaml.YAMLError,))
    parser = ArgumentParser(
        prog="refkl train CONFIG.yaml", exit_on_error=False, allow_abbrev=False, parser_mode=_CHECKED_YAML
    )
    parser.add_argument("--config", action="config", help="The YAML file; also without the option's name.")
    parser.add_class_arguments(RunConfig, skip={"trainer"})
    parser.add_class_arguments(TRAINER_CONFIGS[method], "trainer", fail_untyped=False, instantiate=False)
    return parser


_CHECKED_YAML = "refkl"
"""jsonargparse's name for YAML that `parse_yaml` accepts."""


def _checked_yaml(text: str) -> Any:
    """Load a value as jsonargparse does, and raise YamlRefused where `parse_yaml` does."""
    parse_yaml(text)
    return get_loader("yaml")(text)


def _settle_beta(namespace: Any, given: set[str]) -> None:
    """Set RLOO's own coefficient to 0, which is not its default, since `kl` replaces it."""
    if "trainer.beta" in given and namespace["trainer.beta"]:
        raise ValueError(
            f"trainer.beta {namespace['trainer.beta']} and kl.coef both set the coefficient of the KL. Leave "
            "trainer.beta out: TRL's own penalty is kl.placement 'reward' with kl.reward 'sequence'."
        )
    namespace["trainer.beta"] = 0.0


def _split(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """Split off the configuration file from the other arguments."""
    rest = list(arguments)
    path = None
    if rest and not rest[0].startswith("-"):
        path = rest.pop(0)
    elif "--config" in rest[:-1]:
        at = rest.index("--config")
        path = rest[at + 1]
        del rest[at : at + 2]
    return (None if path is None else Path(path)), rest


def _resume_in_full(arguments: list[str]) -> list[str]:
    """Expand `--resume` and `--resume PATH` to the full option."""
    full: list[str] = []
    for at, argument in enumerate(arguments):
        if argument == "--resume" and (at + 1 == len(arguments) or arguments[at + 1].startswith("-")):
            full += ["--resume.checkpoint", "newest"]
        else:
            full.append(re.sub(r"^--resume(?==|$)", "--resume.checkpoint", argument))
    return full


def _option(options: list[str], name: str) -> str | None:
    for at, option in enumerate(options):
        if option == name and at + 1 < len(options):
            return options[at + 1]
        if option.startswith(f"{name}="):
            return option.split("=", 1)[1]
    return None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        beside = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise ValueError(f"There is no configuration file {path}.{nearest(str(path), beside)}")
    if not isinstance(values := read_yaml(path), dict):
        raise ValueError(f"{path} must hold keys and values (model:, data:, …); it holds a {type(values).__name__}.")
    return values


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every key, including sections."""
    for key, value in values.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")


def _at(values: Any, key: str) -> Any:
    """Return the value under a dotted path; None if there is none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _check_key(key: str, trainer: type) -> Any:
    """Return the type of a key; None in free-form sections (peft, kwargs), which are checked where they are used.

    Raises:
        ValueError: no section has the key.
    """
    cls: type | None = RunConfig
    walked: list[str] = []
    for part in key.split("."):
        if cls is None:
            return None
        hints = typing.get_type_hints(cls) if cls is not trainer else {f.name: Any for f in dataclasses.fields(cls)}
        if part not in hints:
            paths = [".".join((*walked, name)) for name in hints]
            where = f" in {'.'.join(walked)}" if walked else ""
            raise ValueError(
                f"Unknown configuration key {key!r}.{nearest('.'.join((*walked, part)), paths)}"
                + (f" Known{where}: {', '.join(sorted(hints))}." if len(hints) < 20 else "")
            )
        walked.append(part)
        cls = trainer if walked == ["trainer"] else _dataclass_of(hints[part])
    return hints[part]


def _check_values(values: dict[str, Any], namespace: Namespace, given: set[str], trainer: type) -> None:
    """Raise ValueError for what jsonargparse accepts in a field that cannot be it: null, and a list for a section."""
    for key in sorted(given):
        hint = _check_key(key, trainer)
        section = key == "trainer" or _dataclass_of(hint) is not None
        if not section and hint in (None, Any):
            continue
        value, written = namespace.get(key), _at(values, key)
        if value is None and type(None) not in _members(hint):
            raise ValueError(f"{key} is null, and it needs a value. Leave the key out for its default, or set it.")
        # jsonargparse takes an empty list for an empty section; a text names a file.
        wrong = next((v for v in (written, value) if not isinstance(v, dict | Namespace | str | None)), None)
        if section and wrong is not None:
            raise ValueError(
                f"{key} is a section of keys and values, and {wrong!r} was given. Write its keys below it."
            )


def _dataclass_of(hint: Any) -> type | None:
    """Return the dataclass in a type such as SyncConfig | None; None for free-form types."""
    return next((m for m in _members(hint) if dataclasses.is_dataclass(m) and isinstance(m, type)), None)


def _members(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union; another type by itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _settle_cpu(namespace: Any, given: set[str]) -> None:
    """Set the trainer's options for a machine without an accelerator, unless the user has set them.

    Without use_cpu, processes that accelerate starts there train separately. bf16 is several times slower than fp32 on
    a CPU without instructions for it.
    """
    if "trainer.use_cpu" not in given:
        namespace["trainer.use_cpu"] = True
    if not given & {"trainer.bf16", "trainer.fp16"}:
        abilities = torch.cpu.get_capabilities()
        namespace["trainer.bf16"] = bool(abilities.get("amx_bf16") or abilities.get("avx512_bf16"))
