"""The ``torch.compile`` backend: Dynamo's graph in, a private callable out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from flashnorm_compile import _torch
from flashnorm_compile.aliases import checked_each_call
from flashnorm_compile.empty_batch import EmptyBatchGraph
from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.graph_pass import GraphPass, replays_graphs
from flashnorm_compile.kept import refuse_changes, refuse_kept_samples
from flashnorm_compile.optimizers import guard_optimizers
from flashnorm_compile.options import Options
from flashnorm_compile.passes.pipeline import Request
from flashnorm_compile.passes.state_writes import StateWrites
from flashnorm_compile.roles import (
    Role,
    Roles,
    arguments_with_samples,
    assign_roles,
    may_hold_samples,
    user_name,
)
from flashnorm_compile.runtime import PrivateGraph, StepState

# torch.compile hands the same options object to the backend for every graph of a function; their
# state goes with it, and keeps it alive (an id is unique only as long as its object lives).
# The copy tells whether the caller has changed it since.
_states: dict[int, tuple[Mapping[str, Any], Mapping[str, Any], StepState]] = {}


def flashnorm(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Compile one graph of a function; the backend named ``"flashnorm"``.

    Args:
        gm: Dynamo's graph.
        inputs: its example inputs.
        options: see ``flashnorm_compile.options.Options``; ``mode`` may be among them.
        mode: a mode of Inductor ("max-autotune", "reduce-overhead").

    Returns:
        A callable with the graph's signature. A step that cannot be made private gives a callable
        that raises ``PrivacyError``: an exception here could be turned into an eager run.
    """
    given = {} if options is None else options
    if id(given) not in _states:
        try:
            validated = Options.from_mapping({k: v for k, v in given.items() if k != "mode"})
        except PrivacyError as error:
            return refusal(error)
        _states[id(given)] = (given, copy.deepcopy(given), StepState(validated))
    _, fixed, state = _states[id(given)]
    return _with_options(fixed, given, compile_graph(gm, inputs, state, fixed.get("mode", mode)))


def _with_options(
    fixed: Mapping[str, Any], given: Mapping[str, Any], compiled: Callable[..., Any]
) -> Callable[..., Any]:
    """Refuse to run when the caller has changed the mapping that the options were read from."""

    def run(*args: Any) -> Any:
        if given != fixed:
            raise PrivacyError(
                f"The options given to torch.compile were changed afterwards: it was compiled "
                f"with {fixed}, they are {given} now. Pass a new dict for other options."
            )
        return compiled(*args)

    return run


def refuse_module(module: torch.nn.Module) -> None:
    """Refuse a module that ``module.compile()`` would leave to run without the compiler."""
    kind = type(module).__name__
    raise PrivacyError(
        f"torch {torch.__version__} does not compile {kind}.forward, which is its own, in "
        f"{kind}.compile(): the module would run without privacy. Use torch.compile(module, "
        'backend="flashnorm", ...), or call compile() on a module of your own that holds it.'
    )


def refusal(error: PrivacyError) -> Callable[..., Any]:
    """Return a callable that raises the error, every time."""

    def refuse(*_args: Any) -> Any:
        raise PrivacyError(str(error)) from error

    return refuse


def compile_graph(
    gm: fx.GraphModule, inputs: Sequence[Any], state: StepState, mode: str | None
) -> Callable[..., Any]:
    """Compile a graph: private if it computes gradients, as it is otherwise."""
    _torch.require_strict_dynamo()
    guard_optimizers()
    try:
        frame = _torch.current_frame(gm)
        if not torch.is_grad_enabled():
            _refuse_hidden_training(gm)
        if not _is_training(gm):
            refuse_changes(gm, frame, state.options.in_dims)
            return _compile_without_gradients(gm, inputs, frame, state, mode)
        _refuse_splits(frame)
        try:
            _refuse_uncompiled_caller(frame)
            roles = assign_roles(gm.graph, frame, state.options.in_dims)
        except PrivacyError as error:
            raise _with_break(error) from error
        _make_batch_symbolic(gm, roles, frame, state.options.in_dims)
        refuse_kept_samples(gm, roles)
        compiled = _compile_training(gm, inputs, roles, state, mode)
        return checked_each_call(*roles.positions(), compiled)
    except PrivacyError as error:
        return refusal(error)


def _compile_without_gradients(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    frame: _torch.Frame,
    state: StepState,
    mode: str | None,
) -> Callable[..., Any]:
    """Compile what comes before or after the gradients of a step, or an evaluation of a model."""
    _refuse_hidden_autograd(gm)
    decorated = state.before_release is not None
    check = None
    # An optimizer sees gradients, not samples; evaluating a compiled model is as without us.
    if not _torch.in_optimizer():
        _refuse_functional_autograd(gm)
    if (decorated or torch.is_grad_enabled()) and not _torch.in_optimizer():
        check = _watch_writes(gm, frame, state.options.in_dims)
    joint_pass = GraphPass(state, check)
    compiled = joint_pass.compile(gm, inputs, mode)
    return compiled if joint_pass.error is None else refusal(joint_pass.error)


def _refuse_functional_autograd(gm: fx.GraphModule) -> None:
    for node in gm.graph.nodes:
        if node.target is _torch.functional_grad:
            raise PrivacyError(
                "The step differentiates with torch.func outside of its loss, so gradients would "
                f"leave it as they are ({_torch.source_location(node)}). Call backward() on the "
                "loss, and read .grad."
            )


def _watch_writes(gm: fx.GraphModule, frame: _torch.Frame, in_dims: Any) -> StateWrites:
    samples, state, names = set(), set(), {}
    for index, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        source = _torch.input_source(node)
        if may_hold_samples(node, frame, in_dims):
            samples.add(index)
        if source is not None:
            names[index] = user_name(source)
        if index not in samples or (source is not None and source.in_module):
            state.add(index)
    return StateWrites(samples, state, names)


def _make_batch_symbolic(
    gm: fx.GraphModule, roles: Roles, frame: _torch.Frame, in_dims: Any
) -> None:
    """Trace with a batch size that is a symbol, told apart from every other size.

    As a number it could be any constant of the user's, and whether gradients depend on it could
    not be seen. A batch of one sample or none has a graph of its own.
    """
    if isinstance(roles.batch_size, int) and roles.batch_size < 2:
        return
    placeholders = gm.graph.find_nodes(op="placeholder")
    marked = [
        _torch.mark_symbolic(placeholders[each.index], each.batch_dim)
        for each in roles.inputs
        if each.batch_dim is not None
    ]
    # Arguments that the graph does not use may still be asked how many samples there are.
    marked += [
        _torch.mark_size(tensor, dim % tensor.ndim)
        for _, tensor, dim in arguments_with_samples(frame, in_dims, arrays=False)
        if -tensor.ndim <= dim < tensor.ndim and tensor.shape[dim] > 1
    ]
    if any(marked):
        _torch.trace_again("the batch size is a symbol")


def _size_to_fix(roles: Roles, state: StepState) -> torch.SymInt | None:
    """Return the batch size if code is to be made for this number alone (``dynamic=False``).

    What is proved and rewritten holds for all sizes, and so does the code unless that is asked
    for: Poisson sampling gives batches of many sizes.
    """
    size = roles.batch_size
    if isinstance(size, int) or state.options.lowering == "eager":
        return None
    return size if _torch.requested_dynamic() is False else None


def _compile_training(
    gm: fx.GraphModule, inputs: Sequence[Any], roles: Roles, state: StepState, mode: str | None
) -> Callable[..., Any]:
    count = len(roles.inputs)
    parameters = {
        each.index: each.name
        for each in roles.inputs
        if each.role is Role.PARAMETER and each.requires_grad
    }
    first = roles.batch_input
    assert first.batch_dim is not None
    if isinstance(roles.batch_size, int) and roles.batch_size == 0:
        empty = EmptyBatchGraph(gm.forward, list(parameters))
        return PrivateGraph(empty, state, first.index, first.batch_dim, list(parameters.items()))
    request = Request(
        parameters=parameters,
        batch_dims={
            each.index: each.batch_dim for each in roles.inputs if each.batch_dim is not None
        },
        names={each.index: each.name for each in roles.inputs},
        batch_size=roles.batch_size,
        probe=count,
        key=count + 1,
        scalars=count + 2,
        loss_reduction=state.options.loss_reduction,
        strategy=state.options.strategy,
        kernels=state.options.kernels,
        graphs=replays_graphs(mode),
        memory_budget=state.options.memory_budget,
        loss_outside=state.options.loss_outside,
    )
    extended, extra = _append_state(gm, roles)
    joint_pass = GraphPass(state, request, _size_to_fix(roles, state))
    compiled = joint_pass.compile(extended, [*inputs, *extra], mode)
    if joint_pass.error is not None:
        return refusal(joint_pass.error)
    if not joint_pass.ran:
        raise PrivacyError(
            "The step was compiled without its private rewrite, as if served from a cache. "
            "Switch AOTAutograd's cache off: TORCHINDUCTOR_AUTOGRAD_CACHE=0."
        )
    return PrivateGraph(compiled, state, first.index, first.batch_dim, list(parameters.items()))


def _is_training(gm: fx.GraphModule) -> bool:
    return torch.is_grad_enabled() and bool(_differentiable_outputs(gm))


def _differentiable_outputs(gm: fx.GraphModule) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(gm.graph.output_node().args, found.append)
    return [
        node
        for node in found
        if node.op != "placeholder"
        and isinstance(value := node.meta.get("example_value"), torch.Tensor)
        and value.requires_grad
    ]


def _refuse_hidden_training(gm: fx.GraphModule) -> None:
    """Refuse what is differentiable although gradients are off where the graph ends."""
    for node in _differentiable_outputs(gm):
        if not node.meta["example_value"].is_leaf:
            raise PrivacyError(
                "The step computes with gradients inside (torch.enable_grad) and is called "
                "without (torch.no_grad), so what it returns would have gradients that are not "
                f"private ({_torch.source_location(node)}). Call it with gradients enabled."
            )


def _refuse_hidden_autograd(gm: fx.GraphModule) -> None:
    """Refuse graphs in which Dynamo itself differentiates: no backward of ours would run."""
    for node in gm.graph.nodes:
        if node.target in (torch.autograd.grad, torch.autograd.backward):
            raise PrivacyError(
                "Dynamo traced autograd into the graph, so gradients would leave it as they are "
                f"({_torch.source_location(node)}). Set torch._dynamo.config.trace_autograd_ops "
                "to False."
            )


def _with_break(error: PrivacyError) -> PrivacyError:
    """Add the graph break that may have cut the user's function into such frames."""
    broke = _torch.last_unexpected_break()
    if broke is None or broke.location in str(error):
        return error
    return PrivacyError(
        f"{error} This may come from a graph break at {broke.location}: {broke.summary}"
    )


def _refuse_splits(frame: _torch.Frame) -> None:
    end = frame.end
    if end is not None and not end.is_backward:
        raise PrivacyError(
            f"The forward of {frame.name} is split by a graph break at {end.location}: "
            f"{end.summary} What follows the break would get gradients that are not private. "
            "Remove the break, or move that line after backward()."
        )
    for broke in frame.earlier_breaks:
        if not (broke.is_backward or broke.is_optimizer):
            raise PrivacyError(
                f"A graph break before the forward of {frame.name}, at {broke.location}, hides "
                f"what happened to the batch there: {broke.summary} Remove the break, or do that "
                "work outside the compiled function."
            )
    if _torch.active_ddp_module() is not None:
        raise PrivacyError(
            "DistributedDataParallel averages gradients before they are clipped, and splits the "
            "graph. Compile the module inside DistributedDataParallel's place: pass the bare "
            "module to the step."
        )


def _refuse_uncompiled_caller(frame: _torch.Frame) -> None:
    caller = _torch.uncompiled_caller()
    if caller is not None:
        raise PrivacyError(
            f"{frame.name} is called by {caller}, which Dynamo leaves to run without the "
            "compiler: what is done with the samples and the loss there is not seen. Dynamo does "
            "so where a graph break, such as backward(), stands in a loop, a with or a try block. "
            "Compile what is inside it instead."
        )


def _append_state(gm: fx.GraphModule, roles: Roles) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """Copy Dynamo's graph with three more inputs (probe, key, scalars) and one more output."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    placeholders = gm.graph.find_nodes(op="placeholder")
    first = placeholders[roles.batch_input.index]
    device = first.meta["example_value"].device
    fake_mode = _torch.detect_fake_mode([first.meta["example_value"]])
    assert fake_mode is not None
    with fake_mode:
        probe = torch.empty(roles.batch_size, device=device, requires_grad=True)
        key = torch.zeros(2, dtype=torch.int64, device=device)
        scalars = torch.zeros(3, dtype=torch.float32, device=device)
    extra = {"flashnorm_probe": probe, "flashnorm_key": key, "flashnorm_scalars": scalars}
    for node in gm.graph.nodes:
        if node.op == "output":
            continue
        copy = graph.node_copy(node, mapping.__getitem__)
        if hasattr(node, "_dynamo_source"):
            copy._dynamo_source = node._dynamo_source
        mapping[node] = copy
        if node is placeholders[-1]:
            added = []
            for name, value in extra.items():
                placeholder = graph.placeholder(name)
                placeholder.meta["example_value"] = value
                added.append(placeholder)
    marker = graph.call_method("sum", (added[0],))
    outputs: Any = fx.map_arg(gm.graph.output_node().args[0], mapping.__getitem__)
    output = graph.output((*outputs, marker))
    output.meta = dict(gm.graph.output_node().meta)
    extended = fx.GraphModule(gm, graph)
    extended.meta = dict(gm.meta)
    return extended, list(extra.values())
