"""The plot of a study: metrics over a setting, one line per value of another; needs matplotlib."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from vtok_ext.data.atomic_output import output_file
from vtok_ext.training.studies.row_result import FinishedRun
from vtok_ext.training.studies.specification import Plot, Study

# Okabe and Ito's colours, which people with colour-blindness can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"


def draw_plot(
    study: Study, plot: Plot, runs: dict[tuple[str, int], FinishedRun], path: Path
) -> None:
    """Returns None after writing a PNG: one panel per metric, dots for seeds, lines for means.

    Args:
        study, plot: what to draw.
        runs: results by row and seed.
        path: file to write.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(plot.metrics), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    names = _line_names(study, plot)
    panels = figure.subplots(1, len(plot.metrics), squeeze=False)[0]
    for panel, metric in zip(panels, plot.metrics, strict=True):
        for i, name in enumerate(names):
            points = _points(study, plot, runs, metric, name)
            style = {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
            xs = sorted(points)
            means = [statistics.fmean(points[x]) for x in xs]
            panel.plot(xs, means, label=str(name), markersize=5, linewidth=1.4, **style)
            for x in xs:
                panel.plot([x] * len(points[x]), points[x], ".", color=style["color"], alpha=0.4)
        values = [s.get(plot.x) for s in (study.settings_of(row) for row in study.rows)]
        powers = all(isinstance(v, int) and v > 0 and math.log2(v).is_integer() for v in values)
        if powers and len(set(values)) > 2:
            panel.set_xscale("log", base=2)
        panel.set_xlabel(plot.x)
        panel.set_title(study.metrics.get(metric, metric), fontsize=10)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    with output_file(path, "study") as partial:
        # No date and version inside: the same results give the same file.
        figure.savefig(partial, dpi=110, metadata={"Software": None})


def _line_names(study: Study, plot: Plot) -> list[Any]:
    found = (study.settings_of(row).get(plot.lines) for row in study.rows)
    return list(dict.fromkeys(name for name in found if name is not None))


def _points(
    study: Study,
    plot: Plot,
    runs: dict[tuple[str, int], FinishedRun],
    metric: str,
    name: Any,
) -> dict[float, list[float]]:
    """Returns x -> values of all seeds, of one line."""
    points: dict[float, list[float]] = {}
    for row in study.rows:
        settings = study.settings_of(row)
        if settings.get(plot.lines) != name or plot.x not in settings:
            continue
        for seed in study.seeds:
            run = runs.get((row, seed))
            if run is not None and metric in run.metric_names():
                points.setdefault(settings[plot.x], []).append(run.mean(metric))
    return points
