"""The reports' pictures, drawn from plain results (their structure is described in report.py).

PNG files for a folder, and SVG text for a page: there colours are the page's CSS variables, so that a dark page has
light lines, and words are text in the page's font.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from unlearn.files import replacing

# Okabe and Ito's palette, told apart with any colour vision; wine red in place of their yellow, faint on white.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255")
MARKERS = "osD^vPph<>"  # ten, so that colours used again come with another marker
REFERENCE_MODELS = {"full": ("X", "full (original)"), "gold": ("*", "gold (retrained)")}
P_VALUE_FLOOR = 1e-20  # below this, how far from the retrained model is no longer information worth the space
SIGNIFICANCE = 0.05
SIZE_PIXELS, DPI = (1200, 800), 100
# Log-likelihoods below this many nats per token, e.g. of gradient ascent, would flatten every other curve.
LINEAR_DOWN_TO = -10.0
MARKERS_PER_CURVE = 15
POINTS_PER_CURVE = 400  # on a page: more would not be told apart, and a long run would make megabytes
LOG_RANGE = 100.0  # positive values that span more are drawn on a logarithmic axis


@dataclass(frozen=True)
class Style:
    color: str
    marker: str


@dataclass(frozen=True)
class Look:
    """size in inches; label and tick: font sizes; scale: of markers and lines; the rest: colours."""

    size: tuple[float, float]
    label: float
    tick: float
    scale: float
    ink: str
    grid: str
    paper: str
    shade: str


PNG = Look((SIZE_PIXELS[0] / DPI, SIZE_PIXELS[1] / DPI), 15, 13, 1.0, "black", "0.88", "white", "0.93")
# colours of no other meaning, which svg_text() turns into the page's
PAGE = Look((7.4, 3.4), 10, 9.5, 0.7, "#010203", "#e1e2e3", "#fefdfc", "#e8f1ec")
SMALL = replace(PAGE, size=(4.2, 2.4))  # one of many pictures beside each other
_PAGE_COLORS = {
    PAGE.ink: "currentColor",
    PAGE.grid: "var(--line)",
    PAGE.paper: "var(--paper)",
    PAGE.shade: "var(--band)",
}
_PAGE_COLORS |= {color.lower(): f"var(--run{i})" for i, color in enumerate(COLORS)}


def plot_plane(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Forget quality (p-value, log axis) over model utility: one path per method, a large marker where it ends.

    P-values below P_VALUE_FLOOR are drawn at the floor; where there are any, the axis and a line below the picture say
    so. The models "full" and "gold" are single points. Points without a finite utility and p-value cannot be drawn; the
    line below counts them. The utility axis is metrics["likelihood_utility"] where a model has one (trajectories hold
    that), else "model_utility"; results["utility_axis"] names it.
    """
    figure, axes, notes, missing = _plane(results, PNG)
    _finish(figure, axes, path, legend=axes.get_legend_handles_labels(), notes=notes, missing=missing)


def plane_svg(results: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The same picture for a page, its legend beside it; and the notes that belong below it."""
    figure, axes, notes, missing = _plane(results, PAGE)
    legend = figure.legend(
        *axes.get_legend_handles_labels(), loc="outside right upper", fontsize=PAGE.tick, frameon=False,
        labelcolor=PAGE.ink,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)  # a name from a file: no formula begins at its dollar sign
    return svg_text(figure), _with_missing(notes, missing)


def _plane(results: Mapping[str, Any], look: Look) -> tuple[Figure, Axes, list[str], list[str]]:
    """(figure, axes, notes, what could not be drawn)."""
    utility_axis = results.get("utility_axis") or "Model utility"
    figure, axes = _new_figure(
        utility_axis,
        "Forget quality: p-value against the retrained model" if look is PNG else "Forget quality (p)",
        look,
    )
    missing: list[str] = []
    drawn: list[tuple[float, float]] = []
    for model, style in styled(results, look):
        points = _plane_points(model)
        finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        if len(finite) < len(points):
            missing.append(f"{model['name']} ({len(points) - len(finite)} of {len(points)})")
        if finite:
            drawn += finite
            _draw_plane_path(axes, model, finite, style, look)

    lowest = min([p_value for _, p_value in drawn], default=1.0)
    _p_value_axis(axes, lowest, look)
    if drawn:
        left, right = min(x for x, _ in drawn), max(x for x, _ in drawn)
        margin = max(0.03, 0.06 * (right - left))
        axes.set_xlim(left - margin, right + margin)
    notes = [f"Shaded: p > {SIGNIFICANCE}, not told apart from the retrained model"]
    if lowest < P_VALUE_FLOOR:
        notes.append(f"P-values below {P_VALUE_FLOOR:.0e} are drawn at {P_VALUE_FLOOR:.0e}")
    return figure, axes, notes, missing


def _p_value_axis(axes: Axes, lowest: float, look: Look) -> None:
    """A log axis from 1 down to `lowest`, at least to 1e-4 and at most to the floor, with the accepted band shaded."""
    bottom = max(min(lowest, 1e-4), P_VALUE_FLOOR)
    exponents = range(0, math.floor(math.log10(bottom)) - 1, -4 if bottom < 1e-8 else -1)
    labels = [f"1e{exponent}" if exponent else "1" for exponent in exponents]
    if lowest < P_VALUE_FLOOR:
        labels[-1] = f"≤ {labels[-1]}"
    # Room at both ends, a share of the height, so that no marker is cut off.
    axes.set_yscale("log")
    axes.set_ylim(bottom ** (1 + 0.04), bottom**-0.06)
    axes.set_yticks([10.0**exponent for exponent in exponents], labels)
    axes.minorticks_off()
    axes.axhspan(SIGNIFICANCE, axes.get_ylim()[1], color=look.shade, zorder=0)


def plot_logprobs(results: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Log-likelihood per token over optimizer steps: one colour per method, forget solid, retain dashed.

    Below LINEAR_DOWN_TO nats the axis turns logarithmic if a curve goes there; a line below the picture says so.
    Values that are not finite leave a gap in their curve, and that line counts them. "full" and "gold" are horizontal
    lines where their metrics hold forget_logprob_per_token.
    """
    figure, axes = _new_figure("Optimizer step", "Log-likelihood per answer token [nats]", PNG)
    handles: list[Line2D] = []
    missing: list[str] = []
    drawn = [0.0]
    for model, style in styled(results, PNG):
        name = model["name"]
        if name in REFERENCE_MODELS:
            level = as_float(model.get("metrics", {}).get("forget_logprob_per_token"))
            if math.isfinite(level):
                drawn.append(level)
                line = axes.axhline(level, color="0.25", linewidth=1.5, zorder=1, label=f"{name}, forget")
                line.set_linestyle(":" if name == "gold" else "-.")
                handles.append(line)
        elif trajectory := model.get("trajectory"):
            for part, linestyle in (("forget", "-"), ("retain", "--")):
                finite = _draw_curve(axes, trajectory, f"{part}_logprob_per_token", linestyle, style)
                drawn += finite
                if len(finite) < len(trajectory):
                    missing.append(f"{name} {part} ({len(trajectory) - len(finite)} of {len(trajectory)})")
            handles.append(Line2D([], [], color=style.color, marker=style.marker, linewidth=2, label=name))

    notes = []
    if min(drawn) < LINEAR_DOWN_TO:
        _logarithmic_below(axes, LINEAR_DOWN_TO, min(drawn))
        notes.append(f"The vertical axis is logarithmic below {LINEAR_DOWN_TO:.0f}")
    handles.append(Line2D([], [], color="0.25", linestyle="-", linewidth=2, label="solid: forget"))
    handles.append(Line2D([], [], color="0.25", linestyle="--", linewidth=2, label="dashed: retain"))
    _finish(figure, axes, path, legend=(handles, [str(h.get_label()) for h in handles]), notes=notes, missing=missing)


def curve_svg(runs: Sequence[tuple[Style, Sequence[Mapping[str, Any]]]], field: str) -> str | None:
    """One field of each run's steps over the steps, for a page; None where no run has a finite value of it.

    Gradients span decades, log-likelihoods fall without end: such axes are logarithmic.
    """
    figure, axes = _new_figure("", "", SMALL)
    figure.set_layout_engine(None)  # without axis titles the margins are known, and layout is what takes the time
    figure.subplots_adjust(left=0.16, right=0.98, bottom=0.12, top=0.96)
    drawn: list[float] = []
    for style, steps in runs:
        drawn += _draw_curve(axes, thinned(steps, field), field, "-", style, SMALL)
    if not drawn:
        return None
    if min(drawn) < LINEAR_DOWN_TO and max(drawn) <= 0:
        _logarithmic_below(axes, LINEAR_DOWN_TO, min(drawn))
    elif min(drawn) > 0 and max(drawn) > LOG_RANGE * min(drawn):
        axes.set_yscale("log")
        axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    return svg_text(figure)


def thinned(steps: Sequence[Mapping[str, Any]], field: str) -> list[dict[str, float]]:
    """The field over steps as means over as many steps each as leave POINTS_PER_CURVE points."""
    width = math.ceil(len(steps) / POINTS_PER_CURVE) or 1
    points = []
    for first in range(0, len(steps), width):
        part = [(as_float(step["step"]), as_float(step.get(field))) for step in steps[first : first + width]]
        points.append({"step": sum(at for at, _ in part) / len(part), field: sum(y for _, y in part) / len(part)})
    return points


def svg_text(figure: Figure) -> str:
    """The figure as an <svg> element for an HTML page: no width of its own, colours as CSS variables, words as text."""
    # a fixed salt: the same figure gives the same bytes, and equal ids in one page name equal things
    with io.StringIO() as file, matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "unlearn"}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-zA-Z]+\d*_\d+"', "", text)  # figure_1, axes_1: in every picture again
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    for color, variable in _PAGE_COLORS.items():
        text = text.replace(color, variable)
    return text


def _draw_curve(
    axes: Axes, trajectory: Sequence[Mapping[str, Any]], field: str, linestyle: str, style: Style, look: Look = PNG
) -> list[float]:
    """Draw one quantity over steps; returns its finite values."""
    steps = [as_float(point.get("step")) for point in trajectory]
    values = [as_float(point.get(field)) for point in trajectory]
    # An infinite value would stretch the axis to infinity; NaN leaves the gap that is meant.
    gapped = [v if math.isfinite(v) else math.nan for v in values]
    every = math.ceil(len(steps) / MARKERS_PER_CURVE)
    axes.plot(
        steps, gapped, linestyle, color=style.color, marker=style.marker, markersize=6 * look.scale, markevery=every,
        linewidth=2 * look.scale,
    )  # fmt: skip
    return [v for v in values if math.isfinite(v)]


def _logarithmic_below(axes: Axes, threshold: float, lowest: float) -> None:
    """Linear from 0 down to `threshold` (negative), logarithmic from there to `lowest`."""
    axes.set_ylim(1.3 * lowest, 0.5)
    axes.set_yscale("symlog", linthresh=-threshold, linscale=2.0)
    exponents = range(1, int(math.log10(-1.3 * lowest)) + 1)
    multiples = (1, 3) if len(exponents) <= 4 else (1,)
    every = math.ceil(len(exponents) / 8)
    steep = [-(10.0**exponent) * multiple for exponent in exponents[::every] for multiple in multiples]
    # `or 0.0`: the first of these is -0.0, and would be labelled so.
    ticks = [*(threshold * i / 5 or 0.0 for i in range(5)), *(t for t in steep if 1.3 * lowest <= t <= threshold)]
    axes.set_yticks(ticks, [f"{t:,.0f}" if t > -1e6 else f"{t:.0e}" for t in ticks])
    axes.minorticks_off()
    axes.axhline(threshold, color="0.6", linewidth=0.8, zorder=0)


def as_float(value: Any) -> float:
    """The number as float; NaN for None. Accepts the strings "nan", "inf", "-inf", as results.json holds them."""
    return math.nan if value is None else float(value)


def reference_of(model: Mapping[str, Any]) -> str | None:
    """Which of REFERENCE_MODELS a model is: what its "reference" says, else its name."""
    name = model.get("reference", model["name"])
    return name if name in REFERENCE_MODELS else None


def styled(results: Mapping[str, Any], look: Look) -> list[tuple[Mapping[str, Any], Style]]:
    """Every model with its colour and marker: the same in all pictures; the two reference models are black."""
    found, num_methods = [], 0
    for model in results["models"]:
        if (reference := reference_of(model)) is not None:
            style = Style(look.ink, REFERENCE_MODELS[reference][0])
        else:
            style = Style(COLORS[num_methods % len(COLORS)], MARKERS[num_methods % len(MARKERS)])
            num_methods += 1
        found.append((model, style))
    return found


def _plane_points(model: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(utility, p-value) along the trajectory, then of the metrics where they say something else; NaN where missing."""
    metrics = model.get("metrics", {})
    points = []
    if reference_of(model) is None:
        points = [
            (as_float(p.get("utility")), as_float(p.get("forget_quality"))) for p in model.get("trajectory") or []
        ]
    utility = metrics.get("likelihood_utility", metrics.get("model_utility"))
    final = (as_float(utility), as_float(metrics.get("forget_quality")))
    has_final = utility is not None and metrics.get("forget_quality") is not None
    if has_final and (not points or final != points[-1]):
        points.append(final)
    return points


def _draw_plane_path(
    axes: Axes, model: Mapping[str, Any], points: Sequence[tuple[float, float]], style: Style, look: Look
) -> None:
    xs = [x for x, _ in points]
    ys = [max(y, P_VALUE_FLOOR) for _, y in points]
    label = REFERENCE_MODELS[model["name"]][1] if model["name"] in REFERENCE_MODELS else model["name"]
    if len(points) > 1:
        axes.plot(xs, ys, "-", color=style.color, linewidth=1.6, alpha=0.75, marker=".", markersize=7, zorder=2)
    axes.plot(
        xs[-1:], ys[-1:], linestyle="none", marker=style.marker, color=style.color, label=label,
        markersize=(19 if style.marker == "*" else 13) * look.scale, markeredgecolor=look.paper,
        markeredgewidth=1.2 * look.scale, zorder=3, clip_on=False,
    )  # fmt: skip


def _new_figure(xlabel: str, ylabel: str, look: Look) -> tuple[Figure, Axes]:
    # Figure alone, not pyplot: no global state, no display, and savefig draws with Agg.
    figure = Figure(figsize=look.size, dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel, fontsize=look.label, color=look.ink)
    axes.set_ylabel(ylabel, fontsize=look.label, color=look.ink)
    axes.tick_params(labelsize=look.tick, color=look.ink, labelcolor=look.ink)
    axes.grid(color=look.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(look.ink)
    return figure, axes


def _with_missing(notes: Sequence[str], missing: Sequence[str]) -> list[str]:
    return [*notes, *([f"Not finite, so not drawn: {', '.join(missing)}"] if missing else [])]


def _finish(
    figure: Figure, axes: Axes, path: str | os.PathLike[str], *, legend: tuple[Sequence[Any], Sequence[str]],
    notes: Sequence[str], missing: Sequence[str],
) -> None:  # fmt: skip
    """Legend above the axes, where it can cover no data; notes below them; and the file."""
    handles, labels = legend
    if handles:
        # About 120 characters fit beside each other, a handle being worth 8.
        columns = min(5, len(handles), max(1, 120 // (max(map(len, labels)) + 8)))
        figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=13, frameon=False)
    if notes := _with_missing(notes, missing):
        figure.supxlabel(". ".join(notes) + ".", fontsize=11, color="0.35", wrap=True)
    with replacing(path) as temporary:
        # No version string in the file: the same results give the same bytes.
        figure.savefig(temporary, format="png", metadata={"Software": None})
