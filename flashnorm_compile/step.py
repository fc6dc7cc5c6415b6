"""``dp_step``: a decorated training function whose gradients are private."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, overload

import torch

from flashnorm_compile import _torch
from flashnorm_compile.backend import compile_graph
from flashnorm_compile.discarding import discard_reachable
from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.graph_pass import inductor_settings
from flashnorm_compile.in_dims import expect_batches
from flashnorm_compile.kernels.noise import add_noise
from flashnorm_compile.optimizers import guard_optimizers, running
from flashnorm_compile.options import Options
from flashnorm_compile.passes.pipeline import Report
from flashnorm_compile.passes.plan import Plan
from flashnorm_compile.released import came_from_us, mark_private, releases_in
from flashnorm_compile.roots import reaches_leaves, refuse_raw_backward
from flashnorm_compile.state import StepState

P = ParamSpec("P")
R = TypeVar("R")


class Accountant(Protocol):
    """What a step needs of an accountant (see ``flashnorm_compile.accounting``)."""

    def record(self, *, noise_multiplier: float, sampling_rate: float) -> None:
        """Record one release; called before its noise is drawn."""


@overload
def dp_step(function: Callable[P, R], /, **options: Any) -> PrivateStep[P, R]: ...
@overload
def dp_step(**options: Any) -> Callable[[Callable[P, R]], PrivateStep[P, R]]: ...


def dp_step(
    function: Callable[P, R] | None = None,
    /,
    *,
    accountant: Accountant | None = None,
    sampling_rate: float | None = None,
    mode: str | None = None,
    dynamic: bool | None = None,
    **options: Any,
) -> Any:
    """Compile a training function so that ``backward()`` leaves private gradients.

    The function holds at least the forward and the loss; it may run ``backward()`` and the
    optimizer, or leave them to the caller. The model stays what it is: no hooks, no wrapping.

    Args:
        function: the training function.
        accountant: records each release before its noise is drawn.
        sampling_rate: probability with which a sample is in a batch; needed with ``accountant``.
        mode: a mode of Inductor, as for ``torch.compile``.
        dynamic: as for ``torch.compile``, but that code serves batches of any size unless it is
            False; then it is made anew for every size.
        options: see ``flashnorm_compile.Options``: ``max_grad_norm``, ``noise_multiplier``,
            ``expected_batch_size``, ``loss_reduction``, ``in_dims``, ``strategy``,
            ``memory_budget``, ``seed``, ``lowering``. A ``seed`` reproduces the noise of a
            program that is run again; steps made with one seed in one process draw different
            noise, except inside ``flashnorm_compile.noise_streams.repeat_noise``.

    Returns:
        The compiled step, or a decorator when called without a function.

    Raises:
        PrivacyError: an option is unknown, missing or not valid.
    """
    if function is None:
        return functools.partial(
            dp_step,
            accountant=accountant,
            sampling_rate=sampling_rate,
            mode=mode,
            dynamic=dynamic,
            **options,
        )
    return PrivateStep(
        function,
        Options.from_mapping(options),
        accountant=accountant,
        sampling_rate=sampling_rate,
        mode=mode,
        dynamic=dynamic,
    )


class PrivateStep(Generic[P, R]):
    """A training function compiled to private gradients; call it like the function."""

    def __init__(
        self,
        function: Callable[P, R],
        options: Options,
        *,
        accountant: Accountant | None = None,
        sampling_rate: float | None = None,
        mode: str | None = None,
        dynamic: bool | None = None,
    ) -> None:
        if accountant is not None and sampling_rate is None:
            raise PrivacyError(
                "dp_step needs sampling_rate with an accountant: the probability with which a "
                "sample is in a batch (expected batch size / number of samples)."
            )
        inductor_settings(mode)
        functools.update_wrapper(self, function)
        self.__name__: str = getattr(function, "__name__", type(function).__name__)
        self._function = function
        self.options = options
        self.accountant = accountant
        self.sampling_rate = sampling_rate
        self._state = StepState(options, before_release=self._record)

        def flashnorm(gm: torch.fx.GraphModule, inputs: Any) -> Any:
            return compile_graph(gm, inputs, self._state, mode)

        with _torch.strict_dynamo():
            self._compiled = torch.compile(function, backend=flashnorm, dynamic=dynamic)
        guard_optimizers()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the step.

        Raises:
            PrivacyError: the step cannot be made private, or ran without the compiler.
        """
        state = self._state
        graphs = state.graphs_run
        if not graphs and self.options.in_dims is None:
            expect_batches((args, kwargs))
        if not state.accumulating:
            state.observations.clear()
        try:
            with (
                _torch.strict_dynamo(),
                _torch.before_backward(lambda roots: refuse_raw_backward(roots, state)),
                running(state),
            ):
                result = self._compiled(*args, **kwargs)
        except _torch.RecompileLimitError as error:
            raise PrivacyError(
                f"{self.__name__} was recompiled too often; the next run would not be compiled, "
                "and its gradients not private. Run with TORCH_LOGS=recompiles to see what "
                "changes from call to call, or raise torch._dynamo.config.recompile_limit."
            ) from error
        ran = state.graphs_run > graphs
        if not ran and (torch.is_grad_enabled() or reaches_leaves(result)):
            discard_reachable(self._function, (args, kwargs, list(state.parameters)))
            raise PrivacyError(
                f"{self.__name__} ran without a private graph: Dynamo was switched off "
                "(TORCHDYNAMO_DISABLE, torch.compiler.disable), skipped the function, or the "
                "function computes no loss from its arguments. Gradients were discarded. Make the "
                "function compile, and return the loss or run backward() inside it."
            )
        self._refuse_other_gradients()
        return result

    @property
    def max_grad_norm(self) -> float:
        """C. May be changed between steps; the next step uses it, without recompiling."""
        return self._state.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        self._refuse_while_accumulating("max_grad_norm")
        if not (math.isfinite(value) and value > 0):
            raise PrivacyError(f"max_grad_norm={value!r} is not valid; it is a positive number.")
        self._state.max_grad_norm = float(value)

    @property
    def noise_multiplier(self) -> float:
        """σ. May be changed between steps; the next step uses it, without recompiling."""
        return self._state.noise_multiplier

    @noise_multiplier.setter
    def noise_multiplier(self, value: float) -> None:
        self._refuse_while_accumulating("noise_multiplier")
        if not (math.isfinite(value) and value >= 0):
            raise PrivacyError(f"noise_multiplier={value!r} is not valid; it is 0 or positive.")
        self._state.noise_multiplier = float(value)

    @property
    def per_sample_norms(self) -> torch.Tensor:
        """n_i, float32 [B]: gradient norms of the last step's samples. Not private."""
        return torch.cat([each.norms for each in self._observations()])

    @property
    def clipping_factors(self) -> torch.Tensor:
        """c_i, float32 [B], of the last step's samples; 0 for non-finite ones. Not private."""
        return torch.cat([each.clipping_factors for each in self._observations()])

    @property
    def nonfinite_samples(self) -> int:
        """How many of the last step's samples had no finite gradient and were left out."""
        return int((~torch.isfinite(self.per_sample_norms)).sum())

    @property
    def plan(self) -> Plan:
        """What was decided for every parameter; prints as a table.

        Of the graph that was compiled last, for batches of two samples or more where there is
        one: with one sample or none there is nothing to decide.
        """
        reports = self._reports()
        decided = [report for report in reports if any(row.sites for row in report.plan.rows)]
        return (decided or reports)[-1].plan

    @property
    def graphs(self) -> tuple[str, ...]:
        """The rewritten joint graphs, as readable code, in the order they were compiled."""
        return tuple(report.joint for report in self._reports())

    @contextlib.contextmanager
    def accumulate(self) -> Iterator[None]:
        """Add up microbatches of one logical batch; noise is added once, on leaving.

        ``.grad`` stays empty inside, so that no sum without noise can be used; leaving by an
        exception discards the sum. ``expected_batch_size`` is the logical batch's.

        Example:
            >>> with step.accumulate():
            ...     for x, y in microbatches:
            ...         step(model, x, y)
            >>> optimizer.step()
        """
        state = self._state
        self._refuse_while_accumulating("accumulate()")
        state.observations.clear()
        state.sums.clear()
        state.accumulating = True
        state.blocks += 1
        try:
            yield
            state.accumulating = False
            self._release_sums()
        finally:
            state.accumulating = False
            state.sums.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue the noise stream."""
        state = self._state
        return {
            "seed": state.noise.seed,
            "releases": state.noise.releases,
            "max_grad_norm": state.max_grad_norm,
            "noise_multiplier": state.noise_multiplier,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the noise stream of a saved run.

        To go back to older weights within a process, leave the state of the step as it is. In
        another process, releases that came after the save are drawn again with the same noise:
        resume the sampler with it, so that they meet the same batches, or leave the step new.

        Raises:
            PrivacyError: the state is not a step's, or this process has drawn noise of the stream
                since it was saved: the noise would be drawn again.
        """
        self._refuse_while_accumulating("the state")
        expected = self.state_dict().keys()
        if state_dict.keys() != expected:
            raise PrivacyError(
                f"The state holds {sorted(state_dict)}, but a step's state holds "
                f"{sorted(expected)}."
            )
        self._state.noise.resume(int(state_dict["seed"]), int(state_dict["releases"]))
        self.max_grad_norm = state_dict["max_grad_norm"]
        self.noise_multiplier = state_dict["noise_multiplier"]

    def _record(self, noise_multiplier: float) -> None:
        if self.accountant is not None and self.sampling_rate is not None:
            self.accountant.record(
                noise_multiplier=noise_multiplier, sampling_rate=self.sampling_rate
            )

    def _release_sums(self) -> None:
        """Add noise to the accumulated sums and put them into ``.grad``."""
        state = self._state
        if not state.parameters:
            raise PrivacyError(
                "accumulate() ended without a single microbatch, before any step had run, so the "
                "parameters are not known. Run the step with an empty batch inside it."
            )
        parameters = [
            (stream, parameter, name)
            for stream, (parameter, name) in enumerate(state.parameters.items())
            if parameter.requires_grad
        ]
        state.accept_zeroed()
        for _, parameter, name in parameters:
            if parameter.grad is not None and not came_from_us(parameter):
                raise PrivacyError(
                    f"{name}.grad already holds a gradient that is not private. Call "
                    "optimizer.zero_grad() before accumulate()."
                )
        settings = state.settings
        self._record(settings.noise_multiplier)
        key = state.next_key(torch.device("cpu"))
        scalars = state.scalars(settings, torch.device("cpu"))
        devices = {parameter.device for _, parameter, _ in parameters}
        inputs = {device: (key.to(device), scalars.to(device)) for device in devices}
        for stream, parameter, _ in parameters:
            total = state.sums.pop(parameter, None)
            if total is None:
                total = torch.zeros_like(parameter, dtype=torch.float32)
            noisy = add_noise(total, *inputs[parameter.device], stream, parameter.dtype)
            releases = 1 if parameter.grad is None else 1 + releases_in(parameter)
            parameter.grad = noisy if parameter.grad is None else parameter.grad + noisy
            mark_private(parameter, releases)

    def _refuse_other_gradients(self) -> None:
        """Refuse what reached ``.grad`` behind the compiler's back."""
        others = [
            name
            for parameter, name in self._state.parameters.items()
            if parameter.grad is not None and not came_from_us(parameter)
        ]
        if others:
            for parameter in self._state.parameters:
                parameter.grad = None
            raise PrivacyError(
                f"{others[0]} has a gradient that did not come out of a private backward, or was "
                "changed since. All gradients were discarded. Every backward() belongs into the "
                "compiled function."
            )

    def _refuse_while_accumulating(self, what: str) -> None:
        if self._state.accumulating:
            raise PrivacyError(f"{what} cannot change inside accumulate(): finish it first.")

    def _observations(self) -> list[Any]:
        self._state.check_seed()
        if not self._state.observations:
            raise PrivacyError("No backward of this step has run yet.")
        return self._state.observations

    def _reports(self) -> list[Report]:
        if not self._state.reports:
            raise PrivacyError("Nothing was compiled yet: call the step with a sample or more.")
        return self._state.reports
