"""The command line: ``flashnorm train`` and ``flashnorm info``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import typer
    from rich.console import Console
    from rich.table import Table

    from flashnorm_compile.training import command, config, metrics
except ImportError as error:  # pragma: no cover
    raise SystemExit(
        f"flashnorm: {error}. The command line needs more packages than the library: "
        'pip install "flashnorm-compile[cli]"'
    ) from error

import torch

from flashnorm_compile.errors import PrivacyError

BACKEND = "flashnorm"
USAGE_ERROR = 2

app = typer.Typer(
    help="Differentially private training as a torch.compile backend.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_DEFAULTS = config.TrainConfig()
_PRIVACY, _TRAINING, _RUN = "Privacy", "Training", "Run"


@app.command()
def train(
    ctx: typer.Context,
    epsilon: Annotated[
        float,
        typer.Option(help="ε to stay within; sets the noise.", rich_help_panel=_PRIVACY),
    ] = config.DEFAULT_EPSILON,
    noise_multiplier: Annotated[
        float | None,
        typer.Option(help="σ, instead of --epsilon.", rich_help_panel=_PRIVACY),
    ] = None,
    delta: Annotated[
        float, typer.Option(help="δ at which ε is stated.", rich_help_panel=_PRIVACY)
    ] = _DEFAULTS.delta,
    max_grad_norm: Annotated[
        float,
        typer.Option(help="Norm to which each gradient is clipped.", rich_help_panel=_PRIVACY),
    ] = _DEFAULTS.max_grad_norm,
    batch_size: Annotated[
        int, typer.Option(help="Expected batch size.", rich_help_panel=_TRAINING)
    ] = _DEFAULTS.batch_size,
    epochs: Annotated[
        int, typer.Option(help="Expected passes over the data.", rich_help_panel=_TRAINING)
    ] = _DEFAULTS.epochs,
    learning_rate: Annotated[
        float,
        typer.Option(
            "--lr",
            help="Step size.",
            show_default=", ".join(
                f"{rate} for {name}" for name, rate in config.DEFAULT_LEARNING_RATES.items()
            ),
            rich_help_panel=_TRAINING,
        ),
    ] = _DEFAULTS.learning_rate,
    optimizer: Annotated[
        config.OptimizerName, typer.Option(rich_help_panel=_TRAINING)
    ] = _DEFAULTS.optimizer,
    baseline: Annotated[
        bool,
        typer.Option(help="Train the same model without privacy too.", rich_help_panel=_TRAINING),
    ] = True,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(rich_help_panel=_RUN)] = "auto",
    lowering: Annotated[
        config.Lowering,
        typer.Option(help="Generate code, or run graphs as they are.", rich_help_panel=_RUN),
    ] = _DEFAULTS.lowering,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Makes a run repeatable, and its noise predictable.",
            show_default="from the operating system",
            rich_help_panel=_RUN,
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Checkpoint of a run to continue.", rich_help_panel=_RUN),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where the files go.",
            show_default=f"{command.DEFAULT_OUTPUT}, or the checkpoint's folder",
            rich_help_panel=_RUN,
        ),
    ] = None,
) -> None:
    """Train a classifier of handwritten digits privately, and without privacy to compare.

    Writes curve.png, metrics.json, model.pt (the private weights) and checkpoint.pt.
    """
    # Optimizers profile their step; Dynamo warns that it leaves the profiling out.
    logging.getLogger("torch._dynamo.variables").setLevel(logging.ERROR)
    names = set(_DEFAULTS.to_dict())
    settings = {name: value for name, value in _given(ctx).items() if name in names}
    request = command.Request(settings, device, output_dir, resume, baseline)
    try:
        status = command.execute(request, Console())
    except config.ConfigError as error:
        raise _failure(str(error), USAGE_ERROR) from error
    except PrivacyError as error:
        raise _failure(str(error), 1) from error
    raise typer.Exit(status)


@app.command()
def info() -> None:
    """Show versions, devices, and whether torch.compile finds the backend."""
    table = Table(show_header=False, box=None)
    for name, version in metrics.versions().items():
        table.add_row(name, version)
    table.add_row("CPU threads", str(torch.get_num_threads()))
    for name, description in _cuda_devices().items():
        table.add_row(name, description)
    registered = BACKEND in torch.compiler.list_backends()
    table.add_row(f'backend "{BACKEND}"', "registered" if registered else "not registered")
    Console().print(table)
    if not registered:
        raise _failure(
            f'torch.compile does not find the backend "{BACKEND}": install the package, '
            "do not only put its folder on the path",
            1,
        )


def main() -> None:
    """Run the command line."""
    app()


def _given(ctx: typer.Context) -> dict[str, Any]:
    """Return the options that the user gave, without defaults."""
    given = {}
    for name, value in ctx.params.items():
        source = ctx.get_parameter_source(name)
        if source is not None and source.name != "DEFAULT":
            given[name] = value
    return given


def _cuda_devices() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"CUDA": "no device"}
    found = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        found[f"cuda:{index}"] = f"{properties.name}, {memory:.0f} GiB"
    return found


def _failure(message: str, status: int) -> typer.Exit:
    Console(stderr=True).print(f"[red]Error:[/red] {message}", soft_wrap=True, highlight=False)
    return typer.Exit(status)


if __name__ == "__main__":
    main()
