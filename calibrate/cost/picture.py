"""Planned and measured speeds of a profile as a PNG, by matplotlib."""

from __future__ import annotations

import io
from importlib.util import find_spec

from quantspec.calibrate.cost.explain import caption, rows
from quantspec.calibrate.page import BLUE, GRAY, INK
from quantspec.engine.costs import Profile


def why_not() -> str | None:
    """Why no PNG can be drawn here."""
    return None if find_spec("matplotlib") else "a PNG needs matplotlib (pip install 'quantspec[plots]')"


def png(profile: Profile) -> bytes:
    """The bars of the page, and v(n); matplotlib must be there (``why_not``)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = rows(profile)
    drawn = [row for row in found if row.measured is not None][::-1]
    picture = Figure(figsize=(11.0, 2.2 + 0.42 * len(drawn)), layout="constrained")
    bars, curves = picture.subplots(1, 2, width_ratios=(3, 2))
    places = range(len(drawn))
    speeds = [row.measured or 0.0 for row in drawn]
    around = [
        [max(speed - (row.low or 0.0), 0.0) for speed, row in zip(speeds, drawn, strict=True)],
        [max((row.high or 0.0) - speed, 0.0) for speed, row in zip(speeds, drawn, strict=True)],
    ]
    bars.barh([at + 0.2 for at in places], [row.predicted or 0.0 for row in drawn], 0.36, color=GRAY, label="planned")
    bars.barh([at - 0.2 for at in places], speeds, 0.36, xerr=around, color=BLUE, ecolor=INK, label="measured")
    names = [f"{row.drafter} (chosen)" if row.chosen else row.drafter for row in drawn]
    bars.set_yticks(places, names)
    bars.set_title("Tokens per second", fontsize=11, loc="left")
    bars.legend(frameon=False)
    for context in profile.target.contexts:
        widths = profile.target.widths
        curves.plot(widths, [profile.target.relative(width, context) for width in widths], label=f"{context} tokens")
    curves.set_xscale("log", base=2)
    curves.set_yscale("log", base=2)
    for axis in (curves.xaxis, curves.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    curves.set_xlabel("rows n")
    curves.set_title("v(n) by context", fontsize=11, loc="left")
    curves.legend(frameon=False)
    for axis in (bars, curves):
        axis.tick_params(length=0)
        for spine in ("top", "right"):
            axis.spines[spine].set_visible(False)
    picture.supxlabel(caption(profile, found), fontsize=7, color="#555555", wrap=True)
    out = io.BytesIO()
    FigureCanvasAgg(picture).print_png(out)
    return out.getvalue()
