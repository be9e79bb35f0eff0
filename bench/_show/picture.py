"""What all pictures share: the check before the work, an empty figure, its legend, its file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from qmoe_lite.errors import OutputError, SettingError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES_BELOW = 24  # that fit under a panel


def check_picture(file: Path) -> None:
    """Raise SettingError unless matplotlib is there and the file's name ends in .png."""
    if file.suffix != ".png":
        raise SettingError(f"the picture's name is {file.name}; expected one that ends in .png.")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise SettingError("a picture needs matplotlib. Run: pip install 'qmoe-lite[plot]'") from error


def new_figure(width: float, height: float) -> Figure:
    """Make an empty picture, sizes in inches of 120 pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # by itself: pyplot would keep global state
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def legend_beside(axes: Axes) -> None:
    """Put the legend to the right of a panel."""
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def save_figure(figure: Figure, file: Path) -> None:
    """Write a picture as PNG; raise OutputError where the file cannot be written."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    try:
        file.write_bytes(picture.getvalue())
    except OSError as error:
        raise OutputError(f"{file} cannot be written: {error.strerror}. Name another file.") from error
