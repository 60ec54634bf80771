"""Allowed values of configuration fields, and the check of a value."""

from __future__ import annotations

import re
from typing import Any, Literal, get_args, get_origin, get_type_hints

from refkl.messages import unknown

BackendName = Literal["plain", "ddp", "zero1", "zero2", "zero3", "fsdp1", "fsdp2"]
DtypeName = Literal["float32", "bfloat16", "float16"]
Quantization = Literal["int8", "int4", "nf4"]
ResumedReference = Literal["recorded", "initial"]
OnCheckpointError = Literal["stop", "continue"]
Prefix = Literal["auto", "off"]


def choices(hint: Any) -> list[Any]:
    """Return the values that a Literal type lists, by itself or in a union; nothing for other types."""
    return [x for h in (hint, *get_args(hint)) if get_origin(h) is Literal for x in get_args(h)]


def check_offered(section: str, config: Any) -> None:
    """Raise ValueError if the value of a field is not one that its Literal type lists."""
    for name, hint in get_type_hints(type(config)).items():
        options, value = choices(hint), getattr(config, name)
        if value is None and type(None) in get_args(hint):
            continue
        if options and value not in options:
            raise unknown(f"{section}.{name}", str(value), options)


_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def is_import_path(text: str) -> bool:
    """Return True for text of the form "package.module:function"."""
    return _IMPORT_PATH.fullmatch(text) is not None
