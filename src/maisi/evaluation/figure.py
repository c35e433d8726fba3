"""Pictures of numbers, drawn without a display. Knows no measure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZE_INCHES = (8.0, 5.0)
DOTS_PER_INCH = 120


def save_figure(path: Path, draw: Callable[[Any], None], size_inches: tuple[float, float] = SIZE_INCHES) -> None:
    """Let `draw` fill an empty matplotlib figure and write it as PNG; no global state is touched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=size_inches, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure)
    for text in figure.findobj(Text):  # names and commands of users are no formulas, whatever signs they hold
        text.set_parse_math(False)
    figure.savefig(path, dpi=DOTS_PER_INCH, format="png")
