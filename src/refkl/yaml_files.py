"""YAML in which nothing is lost silently: a key that is given twice is an error, and so is expansion without limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

_LARGEST = 100_000
"""Limit of the values in a file, counted with each alias as a copy."""
_DEEPEST = 100
"""Limit of the brackets that are open at once. PyYAML takes seconds for some thousands of them."""


class YamlRefused(ValueError):
    """Error for YAML that is valid, but that refkl does not accept; the message begins with "line N: "."""


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        ValueError: it is not valid YAML, or a key stands twice in one section, or it is nested or expanded without
            limit. The message names the file.
    """
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from None
    except YamlRefused as error:
        raise ValueError(f"{path}, {error}") from None


def parse_yaml(text: str) -> Any:
    """Parse YAML as `yaml.safe_load` does.

    Raises:
        YamlRefused: see `read_yaml`.
        yaml.YAMLError: it is not valid YAML.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check(loader, node)
        return loader.construct_document(node)
    except RecursionError:
        raise loader.too_deep() from None
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    def too_deep(self) -> YamlRefused:
        return YamlRefused(f"line {self.line + 1}: values are nested too deeply. Write it with fewer levels.")

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level >= _DEEPEST:
            raise self.too_deep()
        super().fetch_flow_collection_start(TokenClass)


def _check(loader: yaml.SafeLoader, root: yaml.Node) -> None:
    """Raise YamlRefused for a key that is given twice, an alias inside what it names, or too many values."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def size(node: yaml.Node) -> int:
        if id(node) in open_nodes:
            raise YamlRefused(f"{_line(node)}: an alias stands inside the value that it names. Write the value out.")
        if id(node) not in sizes:
            open_nodes.add(id(node))
            if isinstance(node, yaml.MappingNode):
                _check_keys(loader, node)
                parts = [part for pair in node.value for part in pair]
            else:
                parts = node.value if isinstance(node, yaml.SequenceNode) else []
            sizes[id(node)] = 1 + sum(map(size, parts))
            open_nodes.discard(id(node))
        if sizes[id(node)] > _LARGEST:
            raise YamlRefused(
                f"{_line(node)}: with its aliases written out, this section has more than {_LARGEST:,} values. Write "
                "out the values that are meant."
            )
        return sizes[id(node)]

    size(root)


def _check_keys(loader: yaml.SafeLoader, section: yaml.MappingNode) -> None:
    first: dict[Any, yaml.Node] = {}
    for key, _ in section.value:
        if not isinstance(key, yaml.ScalarNode):
            continue  # the loader refuses it
        value = key.value if key.tag == "tag:yaml.org,2002:merge" else loader.construct_object(key)
        if (before := first.setdefault(value, key)) is not key:
            raise YamlRefused(
                f"{_line(key)}: the key {key.value!r} is given twice in one section, first in {_line(before)}. The "
                "first value would be ignored: leave one of them out."
            )


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"
