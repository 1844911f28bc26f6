"""The picture of a search: cost over what is lost."""

from __future__ import annotations

from typing import Any

from sparsedsl.figures import axes_of

__all__ = ["draw"]


def draw(report: Any) -> Any:
    """A figure of a ``SearchReport``.

    The expected frontier as a line, true runs as points, the chosen one marked, and the bound where KL is bounded.
    """
    figure, (axis,), _ = axes_of(None, 1, (7.0, 4.5))
    native = report.native_cost or 1.0
    share, expected = zip(*((100 * cost / native, loss) for cost, loss in report.frontier), strict=True)
    axis.step(share, expected, where="pre", color="#999999", linewidth=1, label="expected: single layers added up")
    for holds, colour, words in ((True, "tab:blue", "run, within the bound"), (False, "tab:red", "run, beyond it")):
        some = [one for one in report.tried if one.holds == holds]
        if some:
            axis.errorbar(
                [100 * one.cost / native for one in some],
                [one.measured.kl for one in some],
                yerr=[one.measured.kl_error for one in some],
                fmt="o",
                markersize=4,
                elinewidth=0.8,
                color=colour,
                label=words,
            )
    axis.plot(
        [100 * report.cost / native], [report.kl], "o", markersize=11, fillstyle="none", color="black", label="chosen", zorder=3
    )
    if type(report.bound).__name__ == "Kl":
        axis.axhline(report.bound.limit, color="black", linewidth=0.8, linestyle=":", label="bound")
    axis.set_xlabel(f"{report.cost_name} of the searched layers, % of native, {report.length:,} tokens", fontsize=9)
    axis.set_ylabel("KL to the model itself, nats a token", fontsize=9)
    axis.set_title(f"{report.model}\n{report.bound}", fontsize=9)
    axis.grid(color="#eeeeee")
    axis.legend(fontsize=8, frameon=False)
    return figure
