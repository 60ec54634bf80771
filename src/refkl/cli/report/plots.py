"""The plots of a report: reward against KL, and each measurement of a run over its steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bokeh.models import BasicTicker, ColumnDataSource, DataRange1d, HoverTool, Range1d
from bokeh.plotting import figure

from refkl.cli.report.runs import Run, finite, flat, running_mean, thinned

POINTS = 1000
"""Largest number of points of a line; a longer run is thinned."""
MARKS = 200
"""Largest number of marks for updates of the reference."""
# Okabe and Ito's colours, which are distinct for all kinds of colour vision, without the palest and with a grey; and
# lighter ones for a dark background.
COLOURS = (
    ("#0072B2", "#4AA3DF"),
    ("#D55E00", "#F07F3C"),
    ("#009E73", "#2FBF93"),
    ("#CC79A7", "#DE9CC2"),
    ("#E69F00", "#F0B429"),
    ("#6B7280", "#A8B0B9"),
)
_MARKERS = ("circle", "square", "triangle", "diamond", "inverted_triangle", "hex")
_DASHES = ("solid", "dashed", "dotted", "dotdash")
_FEW = 12
"""Number of updates of a reference beyond which they are short ticks: lines would hide the rest."""


@dataclass(frozen=True)
class Plot:
    """One plot, with the text above and below it."""

    name: str
    title: str
    unit: str
    figure: figure
    lines: list[tuple[str, str]]
    """The name and the dash of each measurement, if several share the plot."""


@dataclass(frozen=True)
class _Panel:
    name: str
    title: str
    unit: str
    keys: tuple[str, ...]
    smooth: bool = True
    always: bool = True
    """True if the plot is drawn even if all numbers are 0."""


_REWARDS = (("reward", "Mean reward"), ("rewards/margins", "Reward margin, chosen over rejected"))
_PANELS = (
    *(_Panel(key, title, "", (key,)) for key, title in _REWARDS),
    _Panel("kl", "KL to the reference", "nats per token", ("kl", "kl/first")),
    _Panel("coef", "KL coefficient", "", ("kl/coef",), smooth=False),
    _Panel("sequence", "KL of a sequence", "nats per sequence", ("kl/sequence",)),
    _Panel("estimates", "Estimates of one KL", "nats per token", ("kl/k1", "kl/k2", "kl/k3", "kl/exact"), smooth=False),
    _Panel("tail", "Largest log-ratios of a token", "nats", ("kl/max", "kl/p99"), smooth=False),
    _Panel("shares", "Tokens at a limit", "share", ("kl/saturated", "kl/clipped"), smooth=False, always=False),
)


def plots(runs: Sequence[Run]) -> list[Plot]:
    """Return the plots for which the runs logged something, the frontier first."""
    both = [(key, title) for key, title in _REWARDS if any(run.has(key) and run.has("kl") for run in runs)]
    found = [frontier(runs, key, title) for key, title in both]
    steps = DataRange1d(range_padding=0.03)  # shared: zooming into some steps affects all plots
    for panel in _PANELS:
        panel = _with_target(panel, runs)
        keys = [key for key in panel.keys if any(run.has(key) for run in runs)]
        if any(panel.always or any(run.series(key)[1]) for key in keys for run in runs):
            found.append(_over_steps(runs, panel, keys, steps))
    return found


def at_zero(runs: Sequence[Run]) -> list[str]:
    """List the measurements that are left out because they were always 0."""
    keys = [key for panel in _PANELS if not panel.always for key in panel.keys]
    return [k for k in keys if any(run.has(k) for run in runs) and not any(any(run.series(k)[1]) for run in runs)]


def frontier(runs: Sequence[Run], key: str, title: str) -> Plot:
    """Plot reward (or DPO's margin) against KL: one point per logged step, and its running mean from a ring to a
    dot."""
    what = "Margin" if key == "rewards/margins" else "Reward"
    plot = _figure("KL to the reference, nats per token", title.lower(), DataRange1d(range_padding=0.06))
    points: list[Any] = []
    for number, run in enumerate(runs):
        at = dict(zip(*run.series("kl"), strict=True))
        rows = [(step, at[step], value) for step, value in zip(*run.series(key), strict=True) if step in at]
        if not rows:
            continue
        steps, kl, reward = (list(column) for column in zip(*rows, strict=True))
        kept = sorted({*thinned(kl, POINTS // 2), *thinned(reward, POINTS // 2)})
        means = running_mean(kl), running_mean(reward)
        source = ColumnDataSource(
            {
                "step": [steps[i] for i in kept],
                "kl": [kl[i] for i in kept],
                "reward": [reward[i] for i in kept],
                "mean_kl": [_short(means[0][i]) for i in kept],
                "mean_reward": [_short(means[1][i]) for i in kept],
                "alpha": [round(0.2 + 0.5 * i / max(1, len(rows) - 1), 3) for i in kept],
            },
            name=f"frontier {key} {run.name}",
        )
        style = _style(number, run)
        marker = _MARKERS[number % len(_MARKERS)]
        options: dict[str, Any] = {"source": source, "marker": marker, "size": 7, "fill_alpha": "alpha"}
        points.append(plot.scatter("kl", "reward", line_alpha=0, **options, **style))
        plot.line("mean_kl", "mean_reward", source=source, line_width=2.5, **style)
        for place, fill, size in ((0, None, 11), (-1, style["color"], 14)):
            end = ColumnDataSource({name: [source.data[name][place]] for name in ("mean_kl", "mean_reward")})
            ring = {**style, "fill_color": fill, "size": size, "marker": marker, "line_width": 2.5}
            plot.scatter("mean_kl", "mean_reward", source=end, **ring)
    tips = [("run", "$name"), ("step", "@step"), ("KL", "@kl{0.0000}"), (what.lower(), "@reward{0.0000}")]
    plot.add_tools(HoverTool(renderers=points, tooltips=tips))
    return Plot(f"frontier-{key.replace('/', '-')}", f"{what} against KL", "", plot, [])


def _over_steps(runs: Sequence[Run], panel: _Panel, keys: list[str], steps: DataRange1d) -> Plot:
    plot = _figure("optimizer step", panel.unit, steps)
    values = [value for key in keys for run in runs for value in run.series(key)[1]]
    if not panel.smooth and min(values) >= 0:  # else a constant coefficient would have a meaningless scale
        plot.y_range = Range1d(start=0, end=1.1 * max(values) or 1)
    drawn: list[tuple[str, Any]] = []
    for number, run in enumerate(runs):
        _marks(plot, number, run)
        for key, dash in zip(keys, _DASHES, strict=False):
            at, values = run.series(key)
            if not at:
                continue
            kept = thinned(values, POINTS)
            data = {"step": [at[i] for i in kept], "value": [values[i] for i in kept]}
            smooth = panel.smooth and key == keys[0] and len(at) > 5
            if smooth:
                mean = running_mean(values)
                data["mean"] = [_short(mean[i]) for i in kept]
            source = ColumnDataSource(data, name=f"{key} {run.name}")
            options: dict[str, Any] = {"source": source, "line_dash": dash, **_style(number, run)}
            width, alpha = (1, 0.35) if smooth else (2, 1)
            line = plot.line("step", "value", line_width=width, line_alpha=alpha, **options)
            if len(at) == 1:
                plot.scatter("step", "value", source=source, size=6, **_style(number, run))
            if smooth:
                plot.line("step", "mean", line_width=2.5, **options)
            drawn.append((key, line))
    if isinstance(plot.y_range, DataRange1d):
        plot.y_range.renderers = [line for _, line in drawn]  # without the marks, which have their own scale
    for key in keys:
        tips = [("run", "$name"), ("step", "@step"), (key, "@value{0.[0000]}")]
        lines = [line for one, line in drawn if one == key]
        plot.add_tools(HoverTool(renderers=lines, tooltips=tips, mode="vline", visible=key == keys[0]))
    named = list(zip(keys, _DASHES, strict=False)) if len(keys) > 1 else []
    return Plot(panel.name.replace("/", "-"), panel.title, panel.unit, plot, named)


def _marks(plot: figure, number: int, run: Run) -> None:
    """Mark the reference's updates: a line up the plot, or a tick if there are many; a reset is always a line."""
    if not run.updates:
        return
    kept = run.updates
    if len(kept) > MARKS:
        places = {i * (len(kept) - 1) // (MARKS - 1) for i in range(MARKS)}
        kept = [update for i, update in enumerate(kept) if i in places or "kl" in update]
    few = len(run.updates) <= _FEW
    data = {
        "step": [update["step"] for update in kept],
        "bottom": [0] * len(kept),
        "top": [1 if few or "kl" in update else 0.05 for update in kept],
        "alpha": [finite(update.get("alpha")) for update in kept],
    }
    plot.extra_y_ranges.setdefault("marks", Range1d(start=0, end=1))
    source = ColumnDataSource(data, name=f"moves {run.name}")
    style = _style(number, run)
    ends: dict[str, Any] = {"x0": "step", "x1": "step", "y0": "bottom", "y1": "top", "y_range_name": "marks"}
    marks = plot.segment(source=source, line_width=1.5, line_dash=[2, 3], line_alpha=0.7, **ends, **style)
    tips = [("run", "$name"), ("reference moved at step", "@step"), ("alpha", "@alpha")]
    plot.add_tools(HoverTool(renderers=[marks], tooltips=tips, visible=False))


def _figure(x: str, y: str, x_range: DataRange1d) -> figure:
    plot = figure(
        x_range=x_range,
        x_axis_label=x,
        y_axis_label=y or None,
        height=300,
        min_width=200,
        sizing_mode="stretch_width",
        tools="pan,box_zoom,wheel_zoom,reset,save",
        active_drag=None,  # so that a finger scrolls the page
        active_scroll=None,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
    )
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    for axis in plot.axis:
        axis.axis_label_text_font = axis.major_label_text_font = "system-ui, sans-serif"
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = axis.major_label_text_font_size = "12px"
        axis.axis_line_color = axis.major_tick_line_color = axis.minor_tick_line_color = None
        axis.ticker = BasicTicker(desired_num_ticks=5)
    plot.grid.grid_line_alpha = 0.6
    return plot


def _style(number: int, run: Run) -> dict[str, Any]:
    """Return the style of every part of a run; the page hides those with its tag."""
    return {"color": COLOURS[number % len(COLOURS)][0], "name": run.name, "tags": [number]}


def _with_target(panel: _Panel, runs: Sequence[Run]) -> _Panel:
    """Add a controller's target to the plot of its KL: per sequence, unless the unit is set to "token"."""
    units = {dict(flat(run.settings)).get("kl.unit") or "sequence" for run in runs if run.has("kl/target")}
    wanted = {"kl": "token", "sequence": "sequence"}.get(panel.name)
    if wanted not in units:
        return panel
    return _Panel(panel.name, panel.title, panel.unit, (*panel.keys, "kl/target"), panel.smooth, panel.always)


def _short(number: float) -> float:
    return float(f"{number:.6g}")
