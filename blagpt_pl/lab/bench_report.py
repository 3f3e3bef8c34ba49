"""What a benchmark found: rows of numbers, as a Markdown table, as JSON and as a picture."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FIRST, OTHERS = "#333333", "#d95f02", ("#1b6ca8", "#2a9d6f", "#8c6bb1", "#888888", "#b8860b", "#c2185b")
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "blagpt",  # the same numbers give the same file
    "font.family": "sans-serif",
    "font.size": 9.0,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Column:
    """A column of the table: the key of a row, its title, and how a value is written (a format, or a function)."""

    key: str
    title: str
    form: str | Callable[[Any], str] = ""

    def cell(self, row: dict) -> str:
        """The text of a row's cell; `-` where it has no such number."""
        value = row.get(self.key)
        if value is None:
            return "-"
        return self.form(value) if callable(self.form) else format(value, self.form)


@dataclass
class Report:
    """What a benchmark found.

    Attributes:
        what: one line: what was measured, at which sizes.
        columns: of the table.
        rows: every number, also those of no column.
        notes: lines below the table.
        draw: draws the rows on an empty figure.
    """

    what: str
    columns: Sequence[Column]
    rows: list[dict[str, Any]]
    notes: Sequence[str] = ()
    draw: "Callable[[Figure], None] | None" = None
    header: dict[str, str] = field(default_factory=dict)

    def table(self) -> str:
        """The rows as a Markdown table: words to the left, numbers to the right."""
        words = [any(isinstance(row.get(c.key), str) for row in self.rows) for c in self.columns]
        cells = [[c.title for c in self.columns], *([c.cell(row) for c in self.columns] for row in self.rows)]
        wide = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
        rule = ["-" * n if word else "-" * (n - 1) + ":" for word, n in zip(words, wide, strict=True)]
        lines = [
            [cell.ljust(n) if word else cell.rjust(n) for cell, word, n in zip(line, words, wide, strict=True)]
            for line in cells
        ]
        return "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))

    def picture(self, path: Path) -> None:
        """Draw it into an SVG file."""
        import matplotlib
        from matplotlib.figure import Figure

        colours = matplotlib.cycler(color=[FIRST, *OTHERS])
        with matplotlib.rc_context({**STYLE, "axes.prop_cycle": colours}):
            figure = Figure(layout="constrained")
            self.draw(figure)
            figure.savefig(path, format="svg", metadata={"Date": None})
        path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def bars(
    figure: "Figure", rows: Sequence[dict], label: str, panels: Sequence[tuple[str, str]], title: str = ""
) -> None:
    """One panel of horizontal bars for each number, the first row on top; a row without the number has none.

    Args:
        figure: an empty one.
        rows: of the report.
        label: key of a row's name.
        panels: key and title of each number.
        title: above all panels.
    """
    figure.set_size_inches(3.4 + 2.6 * len(panels), 0.9 + 0.28 * len(rows))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    names = [str(row[label]) for row in rows]
    places = range(len(rows))
    for ax, (key, name) in zip(axes, panels, strict=True):
        values = [row.get(key) or 0.0 for row in rows]
        colours = [FIRST if i == 0 else OTHERS[0] for i in places]
        drawn = ax.barh(places, values, color=colours, height=0.68)
        ax.bar_label(drawn, [short(v) if v else "-" for v in values], padding=3, fontsize=8)
        ax.set_title(name, fontsize=9)
        ax.set_yticks(places, names)
        ax.margins(x=0.22)
        ax.tick_params(axis="y", length=0)
        ax.xaxis.set_visible(False)
        ax.spines["bottom"].set_visible(False)
    axes[0].invert_yaxis()
    if title:
        figure.suptitle(title, fontsize=10)


def lines(
    figure: "Figure",
    rows: Sequence[dict],
    x: tuple[str, str],
    panels: Sequence[tuple[str, str]],
    series: str,
    title: str = "",
    log: bool = True,
) -> None:
    """One panel of lines for each number, against x; both axes logarithmic unless said otherwise.

    Args:
        figure: an empty one.
        rows: of the report.
        x: key and title of what they are drawn against.
        panels: key and title of each number.
        series: key of the name of the line that a row belongs to.
        title: above all panels.
        log: whether the axes are logarithmic, base 2 for x.
    """
    figure.set_size_inches(0.6 + 3.6 * len(panels), 3.1)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (key, name) in zip(axes, panels, strict=True):
        for of in dict.fromkeys(row[series] for row in rows):
            points = sorted((row[x[0]], row[key]) for row in rows if row[series] == of and row.get(key) is not None)
            if points:
                ax.plot(*zip(*points, strict=True), marker="o", markersize=4, label=str(of))
        if log:
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            ax.xaxis.set_major_formatter(lambda value, _: short(value))
            ax.yaxis.set_major_formatter(lambda value, _: short(value))
            ax.yaxis.set_minor_formatter(lambda value, _: "")
        ax.set_xlabel(x[1])
        ax.set_title(name, fontsize=9)
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
    axes[0].legend(frameon=False, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)


def short(value: float) -> str:
    """A number as a label: three digits that matter, k and M for thousands and millions."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= unit:
            per = 1e3 if name == "k" else unit
            return f"{value / per:.3g}{name}" if abs(value) / per < 1e3 else f"{value / per:,.0f}{name}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
