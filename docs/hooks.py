"""Run by mkdocs while it builds the site: pages take in other files of the repository, and load nothing.

A line `<!-- include PATH -->` in a page becomes what is in PATH, from the repository's root. A Markdown file comes in
with its links as they are on the site; any other as code, under a heading with its name where PATH is a pattern; of a
Python file `PATH::name` takes one function or class. A page that would load anything from the network ends the build.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = "files.md"
"""The page with the files that README.md links to and that are no pages."""
_INCLUDE = re.compile(r"^<!-- include (?P<path>[^\s:]+)(?:::(?P<name>\w+))? -->$", re.MULTILINE)
_LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".sh": "bash"}
_LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video)\b[^>]*\bsrc=["']?(?:https?:)?//[^"'\s>]+"""
    r"""|<link\b(?![^>]*\brel=["']?(?:canonical|prev|next|edit)\b)[^>]*\bhref=["']?(?:https?:)?//[^"'\s>]+""",
    re.IGNORECASE,
)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in what the page includes."""
    return included(markdown, lambda target: files.get_file_from_path(target) is not None)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Refuse what a reader's browser would load from elsewhere."""
    if (found := loaded(output)) is not None:
        from mkdocs.exceptions import PluginError

        raise PluginError(f"{page.file.src_uri} loads something from the network: {found}")
    return output


def loaded(output: str) -> str | None:
    """The first tag of a page that makes a browser load something from elsewhere; None if none does."""
    found = _LOADED.search(output)
    return None if found is None else found[0]


def included(markdown: str, on_site: Callable[[str], bool]) -> str:
    """The text with what it includes; `on_site` tells whether a file of docs/ is part of the site.

    Raises:
        ValueError: there is no such file, or no such function or class in it.
    """

    def replacement(match: re.Match[str]) -> str:
        paths = sorted(ROOT.glob(match["path"]))
        if not paths:
            raise ValueError(f"{match[0]}: there is no such file in the repository.")
        if "*" not in match["path"]:
            return _content(paths[0], match["name"], on_site)
        return "\n\n".join(f"## {path.relative_to(ROOT)}\n\n{_content(path, None, on_site)}" for path in paths)

    return _INCLUDE.sub(replacement, markdown)


def _content(path: Path, name: str | None, on_site: Callable[[str], bool]) -> str:
    text = path.read_text(encoding="utf-8").rstrip("\n")
    if path.suffix == ".md":
        return _LINK.sub(lambda link: _on_site(link, on_site), text)
    if name is not None:
        text = _definition(text, name)
    return f"```{_LANGUAGES.get(path.suffix, 'text')}\n{text}\n```"


def _on_site(link: re.Match[str], on_site: Callable[[str], bool]) -> str:
    """A link of a file in the repository's root, as it has to be in a page of docs/; without one its text alone."""
    target, text = link["target"], link["text"]
    if "://" in target or target.startswith("#"):
        return link[0]
    path, _, anchor = target.partition("#")
    if path.startswith("docs/") and on_site(path.removeprefix("docs/")):
        place = path.removeprefix("docs/") + (f"#{anchor}" if anchor else "")
    elif (ROOT / path).suffix in (".yaml", ".py") and shipped(path):
        place = f"{SHIPPED}#{anchor_of(path)}"
    else:
        return text if text.startswith("`") else f"`{text}`"
    return f"{link['image']}[{text}]({place})"


def anchor_of(heading: str) -> str:
    """What the site calls a heading."""
    return re.sub(r"[^\w\s-]", "", heading).strip().lower().replace(" ", "-")


def shipped(path: str) -> bool:
    """Whether the page of shipped files has this one."""
    page = (ROOT / "docs" / SHIPPED).read_text(encoding="utf-8")
    return any((ROOT / path) in ROOT.glob(match["path"]) for match in _INCLUDE.finditer(page))


def _definition(text: str, name: str) -> str:
    """The lines of a function or class, decorators included."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    raise ValueError(f"There is no function or class called {name!r}.")
