"""Which dimension of every value is the sample: the static check that samples do not mix."""

from flashnorm_compile.passes.batch_axis import (
    attention,
    constants,
    contractions,
    convolution,
    indexing,
    linalg,
    losses,
    norms,
    pointwise,
    reductions,
    scatters,
    shape_ops,
    spatial,
    strides,
    view_gradients,
    views,
)
from flashnorm_compile.passes.batch_axis.analysis import Analysis, analyze
from flashnorm_compile.passes.batch_axis.values import Batched, Constant, Mixed, Value

__all__ = [
    "Analysis",
    "Batched",
    "Constant",
    "Mixed",
    "Value",
    "analyze",
]

# Importing a rule file registers its rules.
RULES = (
    attention,
    constants,
    contractions,
    convolution,
    indexing,
    linalg,
    losses,
    norms,
    pointwise,
    reductions,
    scatters,
    shape_ops,
    spatial,
    strides,
    view_gradients,
    views,
)
