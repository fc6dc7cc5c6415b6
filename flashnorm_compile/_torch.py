"""Every use of torch's private API, in one place: a torch upgrade is this file's work."""

from __future__ import annotations

import contextlib
import dis
import functools
import inspect
import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, NoReturn

import sympy
import torch
from torch import fx
from torch._dynamo import config as dynamo_config
from torch._dynamo import trace_rules
from torch._dynamo.exc import FailOnRecompileLimitHit, TensorifyScalarRestartAnalysis
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd import descriptors
from torch._functorch.eager_transforms import _autograd_grad as functional_grad
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._sympy.functions import FloatTrueDiv, FloorDiv, IntTrueDiv, ToFloat

__all__ = ["CustomGraphPass", "descriptors", "detect_fake_mode", "functional_grad"]

# --- sizes


def size_expr(size: int | torch.SymInt) -> sympy.Expr:
    """Return a size as a sympy expression, without adding a guard."""
    if isinstance(size, torch.SymInt):
        return size.node.expr.replace(FloorDiv, _divide)
    return sympy.Integer(size)


def number_expr(value: int | float | torch.SymInt | torch.SymFloat | torch.SymBool) -> sympy.Expr:
    """Return a number computed from sizes as a sympy expression, without adding a guard."""
    if isinstance(value, torch.SymInt):
        return size_expr(value)
    if not isinstance(value, (torch.SymFloat, torch.SymBool)):
        return sympy.sympify(value)
    expr = value.node.expr.replace(ToFloat, lambda size: size)
    return expr.replace(FloatTrueDiv, _quotient).replace(IntTrueDiv, _quotient)


def _quotient(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    return a / b


def _divide(a: sympy.Expr, b: sympy.Expr) -> sympy.Expr:
    """Write a division without a rest as such: a view of h² elements as [h, h²//h]."""
    if not (a.is_polynomial() and b.is_polynomial()):
        return FloorDiv(a, b)
    ratio = sympy.together(sympy.cancel(a / b))
    return sympy.expand(ratio) if sympy.denom(ratio) == 1 else FloorDiv(a, b)


def shape_exprs(shape: Sequence[int | torch.SymInt]) -> tuple[sympy.Expr, ...]:
    """Return a shape as sympy expressions, without adding a guard."""
    return tuple(size_expr(size) for size in shape)


# --- source lines


def source_location(node: fx.Node) -> str:
    """Return the user's source line of a node ("File: f.py:3 in step, code: ..."), or ""."""
    from torch.fx.graph import _parse_stack_trace

    trace = node.meta.get("stack_trace")
    if not trace:
        return ""
    parsed = _parse_stack_trace(trace)
    return "" if parsed is None else f"{parsed.file}:{parsed.lineno}, code: {parsed.code}"


# --- side effects


def effect_of(node: fx.Node) -> Any | None:
    """Return the op that a node runs for its side effect, in order; None for any other node."""
    from torch._higher_order_ops.effects import with_effects

    return node.args[1] if node.target is with_effects else None


# --- Dynamo: where a graph input comes from


@dataclass(frozen=True)
class InputSource:
    """Where Dynamo found a graph input.

    Attributes:
        expression: Dynamo's name for it, such as ``L['batch']['x']``.
        root: the local or global variable it is reached from.
        path: keys, indices and attribute names from the root, as the user writes them: without
            the dicts in which a module keeps its parameters, buffers and submodules.
        module_depth: how much of the path leads to the last ``nn.Module`` on it, or None.
        is_registered: whether it is a parameter or buffer registered in that module.
        is_gradient: whether it is the ``.grad`` of a tensor.
        is_number: whether it is a Python number that Dynamo passes as a tensor.
    """

    expression: str
    root: str | None
    path: tuple[Any, ...]
    module_depth: int | None
    is_registered: bool
    is_gradient: bool
    is_number: bool

    @property
    def in_module(self) -> bool:
        """Whether the path goes through an ``nn.Module``."""
        return self.module_depth is not None


def input_source(placeholder: fx.Node) -> InputSource | None:
    """Describe the source of a placeholder of Dynamo's graph; None when it has none."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None:
        return None
    grapharg = placeholder.meta.get("grapharg")
    as_tensor = bool(grapharg is not None and grapharg.pass_arg_as_tensor)
    return _describe(source, as_tensor)


def _name_of(source: Any) -> str:
    try:
        return str(source.name() if callable(source.name) else source.name)
    except NotImplementedError:  # the cell of a variable that an inner function assigns
        return ""


_REGISTRIES = ("_parameters", "_buffers", "_modules")


def _describe(source: Any, as_tensor: bool) -> InputSource:
    chain: list[Any] = []
    link = source
    while link is not None:
        chain.insert(0, link)
        link = getattr(link, "base", None)
    kinds = [type(link).__name__ for link in chain]
    path: list[Any] = []
    module_depth = None
    for kind, link in zip(kinds[1:], chain[1:], strict=True):
        keys = (
            getattr(link, each) for each in ("index", "member", "idx_key") if hasattr(link, each)
        )
        path += [key for key in keys if key not in _REGISTRIES]
        if "Module" in kind or "ParamBuffer" in kind:
            module_depth = len(path)
    # A module's registry, and one key into it.
    registered = kinds[-2:-1] == ["UnspecializedParamBufferSource"] and "GetItem" in kinds[-1]
    # An array is an input as a tensor too, under a source that converts it.
    is_array = kinds[-1] == "NumpyTensorSource"
    named = chain[-2] if is_array else source
    return InputSource(
        expression=_name_of(named),
        root=getattr(chain[0], "local_name", None) or getattr(chain[0], "global_name", None),
        path=tuple(path),
        module_depth=module_depth,
        is_registered=registered,
        is_gradient="GradSource" in kinds,
        is_number=as_tensor and "NumpyTensorSource" not in kinds,
    )


def example_argument(placeholder: fx.Node) -> Any:
    """Return the value with which Dynamo was called for a placeholder, or None if it is gone."""
    held = getattr(placeholder.meta.get("grapharg"), "_example", None)
    return held() if callable(held) else held


def stored_tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors that hold a tensor's memory: itself, or what a subclass wraps."""
    if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor):
        return []
    if is_traceable_wrapper_subclass(value):
        inner, _ = value.__tensor_flatten__()
        return [each for name in inner for each in stored_tensors(getattr(value, name))]
    return [value] if value.layout is torch.strided else []


# Before torch 2.13 the only mark without an error for a dim that turns out to be fixed; guards
# look at it, at the new one they do not.
_MARKS = "_dynamo_propagated_dynamic_indices"
_OLD_MARKS = "_dynamo_weak_dynamic_indices"


def mark_symbolic(placeholder: fx.Node, dim: int) -> bool:
    """Ask Dynamo for a symbol of its own for one size of a graph input.

    Returns:
        Whether that is news; if so, tracing must start again.
    """
    value = getattr(placeholder.meta.get("grapharg"), "example", None)
    old = torch.__version__.split(".")[:2] < ["2", "13"]
    name = _OLD_MARKS if old else _MARKS
    marked = getattr(value, name, set())
    if not isinstance(value, torch.Tensor) or dim in marked:
        return False
    setattr(value, name, {*marked, dim})
    return True


def trace_again(reason: str) -> NoReturn:
    """Make Dynamo trace the frame anew, from inside a backend."""
    raise TensorifyScalarRestartAnalysis(restart_reason=reason)


# --- Dynamo: the frame being compiled


@dataclass(frozen=True)
class GraphBreak:
    """A graph break: why, and where in the user's code."""

    reason: str
    location: str
    line: int
    function: str

    @property
    def summary(self) -> str:
        """The first lines of Dynamo's reason, on one line."""
        lines = [line.strip() for line in self.reason.splitlines() if line.strip()]
        return " ".join(lines[:2])

    @property
    def is_backward(self) -> bool:
        """Whether the break is the expected one, at ``backward()``."""
        known = ("Tensor.backward()", "TensorVariable() backward")
        # torch 2.11 goes on into Tensor.backward and stops at the call inside.
        inside = "torch.autograd.backward(" in self.location
        return inside or any(text in self.reason for text in known)

    @property
    def is_optimizer(self) -> bool:
        """Whether the break is inside an optimizer's own methods."""
        return "Optimizer." in self.reason or "/torch/optim/" in self.location.replace("\\", "/")


@dataclass(frozen=True)
class Frame:
    """The Python frame whose graph Dynamo is compiling.

    Attributes:
        name: the user's function.
        arguments: its argument names in order, with the names of ``*args`` and ``**kwargs``.
        positional: its positional argument names, without ``self`` of a module.
        resumed: whether the frame continues the function after a graph break.
        values: the arguments' values, as far as the frame still has them.
        rebound: arguments that the function assigns to.
        earlier_breaks: the breaks before the point where the frame continues.
        end: the break that ends the graph, or None when the function returns.
    """

    name: str
    arguments: tuple[str, ...]
    positional: tuple[str, ...]
    resumed: bool
    values: Mapping[str, Any]
    rebound: frozenset[str]
    earlier_breaks: tuple[GraphBreak, ...]
    end: GraphBreak | None


def current_frame(gm: fx.GraphModule) -> Frame:
    """Describe the frame whose graph Dynamo hands to the backend."""
    from torch._dynamo.resume_execution import ContinueExecutionCache
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._dynamo.utils import graph_break_reasons

    translator = InstructionTranslator.current_tx()
    code: CodeType = translator.f_code
    metadata = ContinueExecutionCache.generated_code_metadata.get(code)
    original = code if metadata is None else metadata.code
    arguments = _argument_names(original)
    positional = arguments[: original.co_argcount]
    if positional and isinstance(translator.f_locals.get(positional[0]), torch.nn.Module):
        # vmap's in_dims count the arguments of a bound forward, not the module itself.
        is_method = original.co_name in ("forward", "__call__")
        positional = positional[1:] if is_method else positional
    earlier: tuple[GraphBreak, ...] = ()
    if metadata is not None:
        line = int(code.co_name.rsplit("_at_", 1)[-1]) if "_at_" in code.co_name else 10**9
        found = (_graph_break(reason) for reason in graph_break_reasons)
        earlier = tuple(
            broke
            for broke in dict.fromkeys(found)
            if broke.location.startswith(f"{original.co_filename}:")
            and broke.function == original.co_name
            and broke.line <= line
        )
    reason = getattr(gm, "compile_subgraph_reason", None)
    return Frame(
        name=original.co_name,
        arguments=arguments,
        positional=positional,
        resumed=metadata is not None,
        values={
            name: translator.f_locals[name] for name in arguments if name in translator.f_locals
        },
        rebound=frozenset(
            instruction.argval
            for instruction in dis.get_instructions(original)
            if instruction.opname in ("STORE_FAST", "STORE_DEREF")
        ),
        earlier_breaks=earlier,
        end=_graph_break(reason) if reason is not None and reason.graph_break else None,
    )


def in_optimizer() -> bool:
    """Return whether the frame being compiled is torch's own code of an optimizer."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    code: CodeType = InstructionTranslator.current_tx().f_code
    return os.path.dirname(code.co_filename) == os.path.dirname(torch.optim.__file__)


def uncompiled_caller() -> str | None:
    """Describe the caller of the frame being compiled that itself runs uncompiled, if any.

    Where Dynamo leaves a function alone (a loop or ``try`` around a graph break), it compiles the
    functions that this one calls, each by itself.
    """
    from torch._dynamo.convert_frame import output_codes

    machinery = inspect.getfile(torch._dynamo.convert_frame)
    callers: list[tuple[CodeType, int]] = []
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "compile_wrapper":
        callers.append((frame.f_code, frame.f_lineno))
        if frame.f_code.co_filename == machinery:
            callers.clear()
        frame = frame.f_back
    for code, line in callers:
        if code not in output_codes and not code.co_filename.endswith(_PASSING_ON):
            return f"{code.co_name} ({code.co_filename}:{line})"
    return None


# What stands between the call of a compiled function and its frame: it only passes arguments on.
_PASSING_ON = tuple(
    os.path.join("torch", *parts)
    for parts in (
        ("nn", "modules", "module.py"),
        ("utils", "_contextlib.py"),
        ("_dynamo", "external_utils.py"),
        ("_dynamo", "eval_frame.py"),
    )
)


def last_unexpected_break() -> GraphBreak | None:
    """Return Dynamo's last graph break that is neither at backward() nor in an optimizer."""
    from torch._dynamo.utils import graph_break_reasons

    for reason in reversed(graph_break_reasons):
        broke = _graph_break(reason)
        if not (broke.is_backward or broke.is_optimizer):
            return broke
    return None


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that a frame puts into an object that was there before it.

    Attributes:
        owner: where that object comes from.
        key: the attribute or key it is put under, as code (".last", "['z']"), or "".
        node: the tensor in the graph, or None if the frame only passes it on.
    """

    owner: InputSource
    key: str
    node: fx.Node | None


def kept_tensors(gm: fx.GraphModule) -> list[KeptTensor]:
    """Return the tensors that the frame puts into objects that outlive it."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    effects: Any = InstructionTranslator.current_tx().output.side_effects
    nodes = {node.name: node for node in gm.graph.nodes}
    found = []
    for variable in effects.id_to_variable.values():
        is_new = type(variable.mutation_type).__name__.endswith("New")
        if is_new or variable.source is None or not effects.is_modified(variable):
            continue
        owner = _describe(variable.source, as_tensor=False)
        for key, value in _contents(variable, effects):
            for node, source in _tensors_in(value, effects):
                if source is not None and _comes_from(source, variable.source):
                    continue
                if node is None or node.name in nodes:
                    kept = None if node is None else nodes[node.name]
                    found.append(KeptTensor(owner, key, kept))
    return found


def _contents(variable: Any, effects: Any) -> Iterator[tuple[str, Any]]:
    for name, value in effects.store_attr_mutations.get(variable, {}).items():
        # A cell holds what a variable of an enclosing function refers to.
        yield ("" if name == "cell_contents" else f".{name}"), value
    items = getattr(variable, "items", None)
    if not isinstance(items, dict):
        yield "", variable
        return
    name = _name_of(variable.source)
    for key, value in items.items():
        text = ""
        if key.vt.is_python_constant():
            constant = key.vt.as_python_constant()
            text = f".{constant}" if name.endswith(_REGISTRIES) else f"[{constant!r}]"
        yield text, value
        yield text, key.vt  # an item of a set is its key


def _tensors_in(value: Any, effects: Any) -> list[tuple[fx.Node | None, Any]]:
    """Return the tensors inside one of Dynamo's values: (graph node, source)."""
    from torch._dynamo.variables.base import VariableTracker
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    found: list[tuple[fx.Node | None, Any]] = []
    seen: dict[int, Any] = {}

    def look(variable: Any) -> None:
        if not _is_read(variable):
            # Looking into it would make it a graph input.
            if _holds_samples(variable.original_value(), variable.original_source()):
                found.append((None, variable.original_source()))
            return
        node = getattr(getattr(variable, "proxy", None), "node", None)
        if isinstance(node, fx.Node):
            example = node.meta.get("example_value")
            source = getattr(node, "_dynamo_source", None)
            # A number that the graph computes from data has a symbol without a size behind it.
            if isinstance(example, torch.Tensor) or free_unbacked_symbols(example):
                found.append((node, source if node.op == "placeholder" else None))
        for each in effects.store_attr_mutations.get(variable, {}).values():
            VariableTracker.visit(look, each, seen)

    VariableTracker.visit(look, value, seen)
    return found


def _holds_samples(value: Any, source: Any) -> bool:
    """Whether a value that the frame passes on unread may hold samples."""
    if source is not None and _describe(source, as_tensor=False).in_module:
        return False
    if isinstance(value, torch.Tensor):
        return not value.requires_grad
    if isinstance(value, Mapping):
        return any(_holds_samples(each, None) for each in value.values())
    return isinstance(value, (list, tuple)) and any(_holds_samples(each, None) for each in value)


def _comes_from(source: Any, owner: Any) -> bool:
    link = source
    while link is not None:
        if link == owner:
            return True
        link = getattr(link, "base", None)
    return False


def changed_inputs(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the placeholders whose tensors a graph changes in place."""
    from torch._functorch._aot_autograd import collect_metadata_analysis as analysis

    placeholders = gm.graph.find_nodes(op="placeholder")
    examples = [node.meta["example_value"] for node in placeholders]
    modes = [each.fake_mode for each in examples if isinstance(each, FakeTensor)]
    if not modes:
        return []
    collect = analysis.run_functionalized_fw_and_collect_metadata(
        gm.forward,
        flat_args_descs=[descriptors.PlainAOTInput(index) for index in range(len(examples))],
        keep_input_mutations=True,
    )
    # The examples are Dynamo's; the tracing context already has a fake mode for the compiler.
    with tracing(None), modes[0]:
        info = collect(*examples).input_info
    return [
        node
        for node, each in zip(placeholders, info, strict=True)
        if each.mutates_data or each.mutates_metadata or each.mutates_storage_metadata
    ]


def _is_read(variable: Any) -> bool:
    """Whether Dynamo has read a value; looking into one it has not makes it a graph input."""
    return not hasattr(type(variable), "is_realized") or variable.is_realized()


def _argument_names(code: CodeType) -> tuple[str, ...]:
    count = code.co_argcount + code.co_kwonlyargcount
    count += bool(code.co_flags & 0x04) + bool(code.co_flags & 0x08)
    return code.co_varnames[:count]


def _graph_break(reason: Any) -> GraphBreak:
    # user_stack[0] is the frame that Dynamo compiles; the last entry is the line that broke it.
    stack = reason.user_stack
    if not stack:
        return GraphBreak(reason.reason, "", 0, "")
    outer, inner = stack[0], stack[-1]
    return GraphBreak(
        reason=reason.reason,
        location=f"{inner.filename}:{inner.lineno}, code: {inner.line}",
        line=outer.lineno or 0,
        function=outer.name,
    )


def active_ddp_module() -> Any | None:
    """Return the DistributedDataParallel module whose forward runs, if any."""
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel._get_active_ddp_module()


# --- Dynamo: configuration

_LOGGING_METHODS = ("debug", "info", "warning", "warning_once", "error", "critical", "log")


@contextlib.contextmanager
def strict_dynamo() -> Iterator[None]:
    """Make Dynamo fail where it would run a frame without the compiler, and skip logger calls."""
    # The switch is per process: the limit must not turn a private step into an eager one.
    with dynamo_config.patch(
        suppress_errors=False,
        fail_on_recompile_limit_hit=True,
        ignore_logging_functions=_ignored_logging_functions(),
    ):
        yield


def skip_logging_for(backend: Callable[..., Any]) -> None:
    """Skip logger calls in what ``torch.compile`` traces for ``backend``, and nowhere else."""
    # Dynamo asks a backend nothing before it has traced; it only tells that a compilation starts.
    from torch._dynamo.callback import callback_handler

    compilation = contextlib.ExitStack()

    # A backward is compiled while Dynamo looks at new frames: it must not look at these.
    @torch.compiler.disable
    def start(*_: Any) -> None:
        if _traces_for(backend):
            compilation.enter_context(
                dynamo_config.patch(ignore_logging_functions=_ignored_logging_functions())
            )

    @torch.compiler.disable
    def end(*_: Any) -> None:
        compilation.close()

    callback_handler.register_start_callback(start)
    callback_handler.register_end_callback(end)


def _traces_for(backend: Callable[..., Any]) -> bool:
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "_compile" and "compiler_fn" in frame.f_locals:
            return getattr(frame.f_locals["compiler_fn"], "compiler_fn", None) is backend
        frame = frame.f_back
    return False


@functools.cache
def before_module_compile(check: Callable[[torch.nn.Module], None], backend: Any) -> None:
    """Call ``check`` for modules that ``Module.compile`` would leave to run as they are."""
    compile_module = torch.nn.Module.compile

    @functools.wraps(compile_module)
    def checked(self: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("backend") in (backend, "flashnorm") and _is_left_out(self):
            check(self)
        compile_module(self, *args, **kwargs)

    torch.nn.Module.compile = checked  # type: ignore[method-assign]


def left_out_module() -> torch.nn.Module | None:
    """Return the module whose ``compile`` runs now, if it would leave the module as it is."""
    frame = inspect.currentframe()
    while frame is not None:
        module = frame.f_locals.get("self")
        if frame.f_code.co_name == "compile" and isinstance(module, torch.nn.Module):
            return module if _is_left_out(module) else None
        frame = frame.f_back
    return None


def _is_left_out(module: torch.nn.Module) -> bool:
    # Before torch 2.15, Dynamo skips a frame of torch's own, such as nn.Sequential's forward.
    mended = hasattr(torch._dynamo.OptimizedModule, "_should_wrap_module_call_impl")
    return not mended and bool(trace_rules.check(module.forward))


def _ignored_logging_functions() -> set[Any]:
    return set(dynamo_config.ignore_logging_functions) | _logging_functions()


def _logging_functions() -> set[Any]:
    classes: set[type] = {logging.Logger, logging.RootLogger, logging.getLoggerClass()}
    found = {
        method
        for cls in classes
        for name in _LOGGING_METHODS
        if callable(method := getattr(cls, name, None))
    }
    found |= {getattr(logging, name) for name in _LOGGING_METHODS if hasattr(logging, name)}
    # torch 2.11 writes this setting into its compilation log as sorted JSON, which functions are
    # not; from 2.13 on it leaves the setting out.
    old = torch.__version__.split(".")[:2] < ["2", "13"]
    return {_NamedFunction(function) for function in found} if old else found


class _NamedFunction(str):
    """A function's name that a set finds by the function."""

    function: Callable[..., Any]

    def __new__(cls, function: Callable[..., Any]) -> _NamedFunction:
        name = super().__new__(cls, getattr(function, "__qualname__", repr(function)))
        name.function = function
        return name

    def __hash__(self) -> int:
        return hash(self.function)

    def __eq__(self, other: object) -> bool:
        return other is self.function or (
            isinstance(other, _NamedFunction) and other.function is self.function
        )


RecompileLimitError = FailOnRecompileLimitHit


def require_strict_dynamo() -> None:
    """Make later frames of this process fail rather than fall back to eager in silence."""
    dynamo_config.suppress_errors = False
    dynamo_config.fail_on_recompile_limit_hit = True


def dynamo_is_disabled() -> bool:
    """Return whether Dynamo runs every function as it is."""
    return os.environ.get("TORCHDYNAMO_DISABLE", "") == "1" or bool(dynamo_config.disable)


# --- AOTAutograd and Inductor


def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """Return Inductor's decompositions: the operations a joint graph is made of."""
    # Some decompositions look up the lowerings without importing them.
    import torch._inductor.lowering  # noqa: F401
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


def symbolic_tracing() -> contextlib.AbstractContextManager[None]:
    """Trace with the Python versions of operations: some of C++ ask for concrete sizes."""
    from torch._dispatch.python import enable_python_dispatcher

    return enable_python_dispatcher()


def inductor_modes() -> dict[str, dict[str, Any]]:
    """Return the modes of ``torch.compile``, each with its settings of Inductor."""
    import torch._inductor

    return dict(torch._inductor.list_mode_options())


def compile_with_inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    joint_pass: CustomGraphPass,
    settings: Mapping[str, Any],
) -> Callable[..., Any]:
    """Compile with Inductor; ``joint_pass`` sees the joint graph before it is partitioned."""
    from torch._inductor.compile_fx import compile_fx

    # AOTAutograd's cache would skip the pass in a second process. Inductor's own cache is keyed
    # by the rewritten graphs, so it stays on.
    with _without_autograd_cache():
        compiled: Any = compile_fx(
            gm,
            list(inputs),
            config_patches={**settings, "joint_custom_pre_pass": joint_pass},
        )
    return compiled


def compile_without_codegen(
    gm: fx.GraphModule, inputs: Sequence[Any], joint_pass: CustomGraphPass
) -> Callable[..., Any]:
    """Run the same rewritten graphs as they are, node by node."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    def partition(joint: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        joint_pass(joint.graph)
        joint.recompile()
        return min_cut_rematerialization_partition(joint, *args, **kwargs)

    def run_as_is(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        from torch._functorch.aot_autograd import make_boxed_func

        return make_boxed_func(graph_module.forward)

    def run_without_gradients(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        joint_pass(graph_module.graph)
        graph_module.recompile()
        return run_as_is(graph_module, example_inputs)

    compiler = aot_autograd(
        fw_compiler=run_as_is,
        inference_compiler=run_without_gradients,
        partition_fn=partition,
        decompositions=dict(decompositions()),
        keep_inference_input_mutations=True,
    )
    with _without_autograd_cache():
        return compiler(gm, list(inputs))


def _without_autograd_cache() -> Any:
    return functorch_config.patch(enable_autograd_cache=False, enable_remote_autograd_cache=False)


def autograd_cache_is_on() -> bool:
    """Return whether AOTAutograd's cache is used here: the environment can force it."""
    return bool(functorch_config.enable_autograd_cache)


@contextlib.contextmanager
def before_backward(check: Callable[[Sequence[torch.Tensor]], None]) -> Iterator[None]:
    """Call ``check`` with the tensors that each backward pass of this thread starts from."""
    run_backward = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
    thread = threading.get_ident()

    @torch.compiler.disable
    def checked(roots: Sequence[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        # The compiler differentiates what it traces; nothing is computed then.
        if threading.get_ident() == thread and TracingContext.try_get() is None:
            check(roots)
        return run_backward(roots, *args, **kwargs)

    torch.autograd._engine_run_backward = checked  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.autograd._engine_run_backward = run_backward  # type: ignore[attr-defined]


def queue_backward_callback(callback: Callable[[], None]) -> None:
    """Run a callback at the end of the backward pass that is under way."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)
