"""Charts as inline SVG whose colours are the page's, so that one drawing serves light and dark."""

import html
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from maxstack.train.report.records import smoothed, thinned

# Stand-ins that matplotlib draws with; the page's stylesheet gives each variable a light and a dark colour.
VARIABLES = {
    "text": "#010101", "muted": "#020202", "grid": "#030303", "mark": "#040404",
    "series-1": "#050505", "series-2": "#060606", "series-3": "#070707", "series-4": "#080808",
}  # fmt: skip
SERIES = ("series-1", "series-2", "series-3", "series-4")
MARKERS = ("o", "s", "^", "D")


class Curve(NamedTuple):
    """Points of a chart; `points` draws each with a marker, otherwise a noisy line is drawn with its mean."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    points: bool = False


class Chart(NamedTuple):
    """A chart of something over steps."""

    name: str
    title: str
    unit: str
    summary: str
    """What a reader who cannot see it should know."""
    curves: Sequence[Curve]
    marks: Sequence[int] = ()
    """Steps at which the run went on after an interruption."""
    logarithmic: bool = False
    from_zero: bool = False
    smooth: bool = True


def draw(chart: Chart, *, width: float, height: float, variant: str = "") -> str:
    """The chart as an `<svg>` element of width × height inches; `variant` keeps the ids of two drawings apart."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings = {
        "svg.fonttype": "none",
        "svg.hashsalt": chart.name + variant,
        "path.simplify": True,
        "font.size": 9,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.patch.set_alpha(0)
        _fill(figure.add_subplot(), chart)
        out = io.StringIO()
        FigureCanvasSVG(figure).print_svg(
            out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
        )
    return _embeddable(out.getvalue(), f"{chart.name}{variant}-", chart.summary)


def _fill(axes, chart: Chart) -> None:
    axes.patch.set_alpha(0)
    axes.grid(axis="y", color=VARIABLES["grid"], linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(VARIABLES["grid"])
    axes.tick_params(colors=VARIABLES["muted"], length=0, labelsize=8.5)
    axes.set_xlabel("step", color=VARIABLES["muted"])
    axes.set_ylabel(chart.unit, color=VARIABLES["muted"])
    axes.yaxis.set_major_formatter(_tick)
    _draw_curves(axes, chart)
    for index, step in enumerate(chart.marks):
        label = "interrupted and resumed" if index == 0 else None
        axes.axvline(step - 0.5, color=VARIABLES["mark"], linewidth=1.2, linestyle=(0, (3, 2)), label=label)
    if chart.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_tick)
    elif chart.from_zero:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    if len(chart.curves) > 1:
        axes.legend(frameon=False, labelcolor=VARIABLES["text"], fontsize=8.5, loc="best")


def _tick(value: float, _: int | None = None) -> str:
    """A tick's label: 20,000 and 0.0004, but 1e-05."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _draw_curves(axes, chart: Chart) -> None:
    for index, curve in enumerate(chart.curves):
        colour = VARIABLES[SERIES[index % len(SERIES)]]
        if curve.points:
            marker = MARKERS[index % len(MARKERS)]
            axes.plot(
                curve.steps,
                curve.values,
                color=colour,
                marker=marker,
                markersize=4.5,
                linewidth=1.4,
                label=curve.label,
            )
            continue
        steps, values = thinned(curve.steps, curve.values)
        if not chart.smooth or len(values) < 30:
            axes.plot(steps, values, color=colour, linewidth=1.7, label=curve.label)
            continue
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(
            steps, smoothed(values, max(3, len(values) // 60)), color=colour, linewidth=1.8, label=curve.label
        )


def _embeddable(svg: str, prefix: str, summary: str) -> str:
    """A stand-alone SVG document as an element of a page: page colours, unique ids, a name for screen readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    for name, stand_in in VARIABLES.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    # Without a size of its own it takes the width of its column.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(summary)}"', 1)
