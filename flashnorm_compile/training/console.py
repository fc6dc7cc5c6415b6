"""What a run shows in the terminal: a progress bar and tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from flashnorm_compile.training.baseline import BaselineResult
from flashnorm_compile.training.config import PrivacyPlan, TrainConfig, delta_text
from flashnorm_compile.training.loop import EpochRecord, PrivateRun, StepRecord


@dataclass
class RunProgress:
    """Shows a run's steps as they happen."""

    progress: Progress
    task: TaskID
    facts: dict[str, str] = field(default_factory=dict)

    def on_step(self, record: StepRecord) -> None:
        """Show a step."""
        if record.loss is not None and record.clip_fraction is not None:
            self._show(loss=f"{record.loss:.3f}", clipped=f"{record.clip_fraction:.0%}")
        self.progress.advance(self.task)

    def on_epoch(self, record: EpochRecord) -> None:
        """Show an epoch's ε and accuracy."""
        self._show(ε=f"{record.epsilon:.2f}", test=f"{record.test_accuracy:.1%}")

    def _show(self, **facts: str) -> None:
        self.facts |= facts
        text = "  ".join(f"{name} {value}" for name, value in self.facts.items())
        self.progress.update(self.task, facts=text)


@contextmanager
def progress_bar(console: Console, title: str, total: int, done: int = 0) -> Iterator[RunProgress]:
    """Show a progress bar of ``total`` steps or epochs."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[facts]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=total, completed=done, facts="")
        yield RunProgress(progress, task)


def describe_plan(config: TrainConfig, plan: PrivacyPlan, num_samples: int) -> str:
    """Return one paragraph about the releases to come."""
    text = (
        f"{plan.steps} private steps of about {config.batch_size} of {num_samples} samples "
        f"(sampling rate {plan.sampling_rate:.3f}), gradients clipped to {config.max_grad_norm:g}, "
        f"noise multiplier {plan.noise_multiplier:.3f}: "
        f"ε = {plan.epsilon:.2f} at δ = {delta_text(config.delta)}."
    )
    if config.seed is not None:
        text += (
            f"\n[yellow]--seed {config.seed} makes the noise repeatable, so whoever knows the seed "
            "can remove it. Leave --seed out for a model that is to be private.[/yellow]"
        )
    return text


def results_table(run: PrivateRun, baseline: BaselineResult | None) -> Table:
    """Return the accuracies side by side, with the cost of privacy in the last row."""
    train, test = run.evaluate()
    table = Table(title="Handwritten digits", title_justify="left", title_style="bold")
    table.add_column("Training")
    table.add_column("Train accuracy", justify="right")
    table.add_column("Test accuracy", justify="right")
    table.add_column(f"ε at δ = {delta_text(run.config.delta)}", justify="right")
    table.add_row("private", f"{train:.1%}", f"{test:.1%}", f"{run.epsilon:.2f}", style="bold")
    if baseline is not None:
        table.add_row(
            "not private",
            f"{baseline.train_accuracy:.1%}",
            f"{baseline.test_accuracy:.1%}",
            "∞",
            end_section=True,
        )
        table.add_row(
            "cost of privacy",
            _points(train - baseline.train_accuracy),
            _points(test - baseline.test_accuracy),
            "",
        )
    return table


def _points(difference: float) -> str:
    return f"{100 * difference:+.1f} points"
