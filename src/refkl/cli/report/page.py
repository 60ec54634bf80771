"""`report.html`: the whole report in one file, which loads no other file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bokeh.document import Document
from bokeh.resources import Resources
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from refkl.cli.report.facts import config_differences, overview, provenance, warnings
from refkl.cli.report.plots import COLOURS, MARKS, POINTS, Plot, at_zero, plots
from refkl.cli.report.runs import Run, read_runs
from refkl.cli.report.texts import LEVELS, texts
from refkl.files import file_written_whole

_HERE = Path(__file__).parent


def write_page(run: str | Path, *others: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of a run, with other runs beside it for comparison, to `RUN/report.html`.

    Raises:
        ValueError: no run folder, or a damaged one.
    """
    runs = read_runs([Path(run), *map(Path, others)])
    path = Path(output) if output is not None else runs[0].path / "report.html"
    text = page(runs)
    with file_written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def page(runs: Sequence[Run]) -> str:
    """Return the page as text."""
    drawn = plots(runs)
    bokeh = _inline(Resources(mode="inline", components=["bokeh"], log_level="error").js_raw[0])
    own = _inline((_HERE / "page.js").read_text(encoding="utf-8"))
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {}  # keep the order: Bokeh reads definitions before their use
    environment.trim_blocks = environment.lstrip_blocks = True
    return environment.get_template("page.html").render(
        policy=_policy(bokeh, own),
        style=Markup((_HERE / "page.css").read_text(encoding="utf-8")),
        bokeh=bokeh,
        script=own,
        runs=[{"number": i, "name": run.name} for i, run in enumerate(runs)],
        colours=COLOURS,
        overview=overview(runs),
        warnings=warnings(runs),
        plots=drawn,
        documents=_documents(drawn),
        caption=_caption(runs) if drawn else "",
        texts=texts(runs),
        levels=range(1, LEVELS + 1),
        provenance=provenance(runs),
        differences=config_differences(runs),
        configs=[(i, run.name, run.config) for i, run in enumerate(runs) if run.config],
    )


def _caption(runs: Sequence[Run]) -> str:
    """Return the caption. It explains how to read the plots, and what they leave out."""
    said = ["Against KL, a run goes from its ring to its large dot."]
    if any(len(run.steps) > 5 for run in runs):
        said.insert(0, "Pale: the logged values. Strong: the mean of a logged step and the four before it.")
    if any(run.updates for run in runs):
        said.append("Dotted vertical lines, or ticks if there are many: the reference moved.")
    if any("kl" in update for run in runs for update in run.updates):
        said.append("A line among ticks: the reference was reset to the policy.")
    if zero := at_zero(runs):
        said.append(f"Not drawn, because it was always 0: {', '.join(zero)}.")
    if any(len(run.steps) > POINTS for run in runs):
        said.append(
            f"Long lines are thinned to at most {POINTS} points: the first, the last and the extremes between them. "
            "The means are over all points."
        )
    if any(len(run.updates) > MARKS for run in runs):
        said.append(f"About {MARKS} of a reference's moves are marked.")
    return " ".join(said)


def _policy(*scripts: str) -> str:
    """Return a Content-Security-Policy under which nothing is loaded and only these scripts run."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )


def _inline(script: str) -> Markup:
    """Return a script for use between tags; it must not contain the closing tag."""
    if "</script" in script.lower() or "<!--" in script:
        raise ValueError("A script of the page holds a tag, and cannot be written into it.")
    return Markup(script)


def _documents(drawn: Sequence[Plot]) -> dict[str, Any]:
    """Return Bokeh's documents, and the elements that they are drawn into."""
    if not drawn:
        return {"documents": {}, "items": [], "colours": len(COLOURS)}
    document = Document()
    for plot in drawn:
        document.add_root(plot.figure)
    roots = {plot.figure.id: f"plot-{plot.name}" for plot in drawn}
    items = [{"docid": "plots", "roots": roots, "root_ids": list(roots)}]
    return {"documents": {"plots": document.to_json(deferred=False)}, "items": items, "colours": len(COLOURS)}
