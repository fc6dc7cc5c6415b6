"""``curve.png``: accuracy and ε against epochs."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from flashnorm_compile.training.baseline import BaselineResult
from flashnorm_compile.training.config import TrainConfig, delta_text
from flashnorm_compile.training.loop import EpochRecord

_TEST, _TRAIN, _BASELINE, _EPSILON = "#1f5fa8", "#8fb8de", "#444444", "#b3541e"


def draw(
    path: Path, config: TrainConfig, epochs: list[EpochRecord], baseline: BaselineResult | None
) -> None:
    """Draw the curves of a run.

    Args:
        path: the PNG to write.
        config: the run's settings.
        epochs: the run's epochs so far.
        baseline: the reference, or None.
    """
    figure = Figure(figsize=(7.2, 5.4), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    _draw_accuracy(upper, epochs, baseline)
    _draw_epsilon(lower, config, epochs)
    for axes in (upper, lower):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
    upper.set_title("Private training on handwritten digits", loc="left", fontsize=12, pad=12)
    lower.set_xlabel("Epoch")
    lower.set_xlim(0, max(1, len(epochs)))
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels((upper, lower))
    figure.savefig(path)


def _draw_accuracy(axes: Axes, epochs: list[EpochRecord], baseline: BaselineResult | None) -> None:
    numbers = [record.epoch for record in epochs]
    train = [record.train_accuracy for record in epochs]
    test = [record.test_accuracy for record in epochs]
    if baseline is not None:
        axes.axhline(
            baseline.test_accuracy,
            color=_BASELINE,
            linestyle=(0, (5, 3)),
            linewidth=1.3,
            label=f"not private, test: {baseline.test_accuracy:.1%}",
        )
    if epochs:
        axes.plot(numbers, test, color=_TEST, linewidth=2.2, label=f"private, test: {test[-1]:.1%}")
        axes.plot(
            numbers, train, color=_TRAIN, linewidth=1.4, label=f"private, training: {train[-1]:.1%}"
        )
        axes.legend(loc="lower right", frameon=False)
    axes.set_ylim(min([0.6, *(value - 0.05 for value in test)]), 1.0)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_ylabel("Accuracy")


def _draw_epsilon(axes: Axes, config: TrainConfig, epochs: list[EpochRecord]) -> None:
    numbers = [0, *(record.epoch for record in epochs)]
    spent = [0.0, *(record.epsilon for record in epochs)]
    axes.plot(numbers, spent, color=_EPSILON, linewidth=2.2)
    if epochs:
        axes.annotate(
            f"ε = {spent[-1]:.2f}",
            (numbers[-1], spent[-1]),
            xytext=(-4, -24),
            textcoords="offset points",
            ha="right",
            color=_EPSILON,
        )
    top = max([spent[-1], config.epsilon or 0.0])
    if config.epsilon is not None:
        axes.axhline(config.epsilon, color=_EPSILON, linestyle=(0, (1, 2)), linewidth=1.3)
        axes.annotate(
            f"target ε = {config.epsilon:g}",
            (0, config.epsilon),
            xytext=(6, -13),
            textcoords="offset points",
            color=_EPSILON,
        )
    axes.set_ylim(0, 1.1 * top if top else 1.0)
    axes.set_ylabel(f"ε at δ = {delta_text(config.delta)}")
