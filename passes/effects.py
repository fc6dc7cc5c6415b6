"""Side effects: a check of weights may run, anything that sees samples may not."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from flashnorm_compile._torch import called_in, effect_of, source_location
from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.passes.batch_axis import Constant, Value

# Raise an error or do nothing, and return nothing. Other effects may also bring in values that
# the graph does not explain: what a queue returns may be what a sample left there.
_CHECKS = {torch.ops.aten._linalg_check_errors.default}
_ASSERTS = (
    "aten._assert_async",
    "aten._assert_scalar",
    "aten._assert_tensor_metadata",
    "aten._local_scalar_dense",
    "aten.item",
)
# Bounds of indices that torch checks, as the kernels of lookups do without an op of their own.
_CHECKED_INSIDE = {torch.nn.functional.one_hot}


def refuse_effects(graph: fx.Graph, values: Mapping[fx.Node, Value]) -> None:
    """Refuse side effects other than checks of values that depend on no sample.

    Raises:
        PrivacyError: there is one. An error raised for one sample shows, without noise, that the
            sample is in the batch.
    """
    for node in graph.nodes:
        _refuse_check_of_samples(node, values)
        effect = effect_of(node)
        if effect is None:
            continue
        where = f"({effect}, at {source_location(node)})"
        if effect not in _CHECKS:
            raise PrivacyError(
                f"The step has a side effect that is not understood {where}. Do it outside the "
                "compiled function."
            )
        if not isinstance(values[node], Constant):
            raise PrivacyError(
                "The step has a side effect that depends on samples: it raises an error for some "
                f"of them {where}, which would show data without noise. Use the function's "
                "variant without checks, such as torch.linalg.inv_ex or torch.linalg.solve_ex."
            )


def _refuse_check_of_samples(node: fx.Node, values: Mapping[fx.Node, Value]) -> None:
    """Refuse asserts on samples, and numbers read from them, on which Python may assert."""
    if str(node.target).rpartition(".")[0] not in _ASSERTS:
        return
    if called_in(node) in _CHECKED_INSIDE:
        return
    if any(not isinstance(values[arg], Constant) for arg in node.all_input_nodes):
        raise PrivacyError(
            f"The step has a side effect that depends on samples: {node.target}, at "
            f"{source_location(node)}. An error for one sample would show, without noise, that it "
            "is in the batch. Check the data before the step."
        )
