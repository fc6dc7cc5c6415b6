"""AOTAutograd and Inductor."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._functorch import config as functorch_config
from torch._inductor.custom_graph_pass import CustomGraphPass


def decompositions() -> Mapping[Any, Callable[..., Any]]:
    """Return Inductor's decompositions: the operations a joint graph is made of."""
    # Some decompositions look up the lowerings without importing them.
    import torch._inductor.lowering  # noqa: F401
    from torch._inductor.decomposition import select_decomp_table

    return select_decomp_table()


@contextlib.contextmanager
def symbolic_tracing(fake_mode: Any) -> Iterator[None]:
    """Trace on values of a fake mode, of symbolic sizes.

    With the Python versions of operations, since some of C++ ask for concrete sizes; and without
    the cache of fake results: to make an entry costs more than the few that are found again save.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses.fake_tensor import disable_fake_tensor_cache

    with fake_mode, disable_fake_tensor_cache(fake_mode), enable_python_dispatcher():
        yield


def another_fake(value: torch.Tensor) -> torch.Tensor:
    """Return a fake tensor like another one, as an object of its own."""
    from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

    assert isinstance(value, FakeTensor)
    device = value.fake_device
    with in_kernel_invocation_manager(value.fake_mode):
        return FakeTensor(value.fake_mode, value, device)


def inductor_modes() -> dict[str, dict[str, Any]]:
    """Return the modes of ``torch.compile``, each with its settings of Inductor."""
    import torch._inductor

    return dict(torch._inductor.list_mode_options())


def inductor_setting(name: str) -> Any:
    """Return a setting of Inductor, such as "triton.cudagraphs"."""
    from torch._inductor import config

    return config.get_config_copy()[name]


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
    with _without_autograd_cache(), _layouts_for_any_batch_size():
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


@contextlib.contextmanager
def _layouts_for_any_batch_size() -> Iterator[None]:
    """Let Inductor lay images out for convolutions (channels last) where B is a symbol.

    It does not where any size is, since what it does with rows and columns of unknown length was
    slow (pytorch issue 102670). No stride depends on the number of samples, the first dim.
    """
    from torch._inductor import graph

    has_free_symbols = graph.has_free_symbols

    def has_others(value: Any) -> bool:
        if isinstance(value, torch.Tensor) and value.ndim:
            return any(map(has_free_symbols, value.shape[1:]))
        return has_free_symbols(value)

    with mock.patch.object(graph, "has_free_symbols", has_others):
        yield


def autograd_cache_is_on() -> bool:
    """Return whether AOTAutograd's cache is used here: the environment can force it."""
    return bool(functorch_config.enable_autograd_cache)
