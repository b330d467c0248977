"""How figures look: matplotlib's SVG in colours that follow the reader's light or dark mode.

A figure is drawn in the light palette; `svg` then puts a CSS variable in the place of each of its colours,
and the values of both modes into the file. That also works in a file shown by `<img>`; it must be opaque.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape

import matplotlib
from matplotlib.figure import Figure

# Light and dark value of each role. Lines have at least 4.5:1 against both backgrounds and are told apart by
# colour-blind readers (after Okabe and Ito). Each light value is used once: `svg` finds it by that.
COLORS = {
    "paper": ("#fefefe", "#14181f"),
    "text": ("#1c2430", "#e8ecf1"),
    "muted": ("#55606e", "#a3adba"),
    "grid": ("#e2e6eb", "#2c333d"),
    "blue": ("#0072b2", "#56b4e9"),
    "orange": ("#b84a00", "#ff9e5e"),
    "green": ("#007a58", "#3ccb9f"),
    "purple": ("#a8457f", "#e79ac6"),
    "brown": ("#8a6100", "#e6b84a"),
    "gray": ("#555e6a", "#b8c0cc"),
    # An ordered set, such as layers: away from the background with the number.
    "ramp0": ("#3f93c9", "#3a86bd"),
    "ramp1": ("#2f7fb8", "#56a3d6"),
    "ramp2": ("#1b6199", "#82bfe6"),
    "ramp3": ("#0f4578", "#b0d8f2"),
    "ramp4": ("#082b54", "#dff0fb"),
}
_LIGHT = {name: light for name, (light, _dark) in COLORS.items()}
PAPER, TEXT, MUTED, GRID = (_LIGHT[name] for name in ("paper", "text", "muted", "grid"))
BLUE, ORANGE, GRAY = (_LIGHT[name] for name in ("blue", "orange", "gray"))
SERIES = tuple(_LIGHT[name] for name in ("blue", "orange", "green", "purple", "brown", "gray"))
RAMP = tuple(_LIGHT[f"ramp{i}"] for i in range(5))
MARKERS = ("o", "D", "s", "^")

_SETTINGS = {
    # Text stays text: it can be searched, and takes a font that the reader has.
    "svg.fonttype": "none",
    # Ids of clip paths come from the content alone, so that equal figures are equal files.
    "svg.hashsalt": "megatron_dyt",
    "figure.facecolor": PAPER,
    "axes.facecolor": PAPER,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": TEXT,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 1,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "ytick.left": False,
    "font.size": 10,
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,  # A dollar in a run's name is a dollar.
    "text.color": TEXT,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "figure.constrained_layout.use": True,
}
_FONTS = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif"


@contextmanager
def applied() -> Iterator[None]:
    """Figures that are made in this block have the theme."""
    with matplotlib.rc_context(_SETTINGS):
        yield


def variables() -> str:
    """CSS that gives every colour's variable its value in the reader's mode."""
    light, dark = ("".join(f"--{name}:{values[mode]};" for name, values in COLORS.items()) for mode in (0, 1))
    return f":root{{color-scheme:light dark;{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}"


def png(figure: Figure) -> bytes:
    """The figure as a PNG file in the light palette."""
    buffer = io.BytesIO()
    with applied():
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure, title: str, description: str) -> str:
    """The figure as an SVG file; `description` says for those who cannot see it what it shows."""
    buffer = io.BytesIO()
    with applied():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().decode()
    for name, (light, _dark) in COLORS.items():
        text = text.replace(light, f"var(--{name})")
    text = text.replace("'DejaVu Sans', sans-serif", _FONTS)
    head = f"<title>{escape(title)}</title><desc>{escape(description)}</desc><style>{variables()}</style>"
    return re.sub(r"(<svg [^>]*)>", lambda match: f'{match[1]} role="img">{head}', text, count=1)
