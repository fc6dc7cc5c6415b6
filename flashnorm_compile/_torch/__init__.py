"""Every use of torch's private API, in one place: a torch upgrade is this package's work."""

from __future__ import annotations

from torch._functorch._aot_autograd import descriptors
from torch._functorch.eager_transforms import _autograd_grad as functional_grad
from torch._guards import detect_fake_mode
from torch._inductor.custom_graph_pass import CustomGraphPass

from flashnorm_compile._torch.backward import (
    before_backward,
    before_backward_in,
    queue_backward_callback,
)
from flashnorm_compile._torch.compilers import (
    another_fake,
    autograd_cache_is_on,
    compile_with_inductor,
    compile_without_codegen,
    decompositions,
    inductor_modes,
    inductor_setting,
    symbolic_tracing,
)
from flashnorm_compile._torch.frames import (
    Frame,
    GraphBreak,
    active_ddp_module,
    current_frame,
    in_optimizer,
    last_unexpected_break,
    uncompiled_caller,
)
from flashnorm_compile._torch.graphs import (
    called_in,
    effect_of,
    fix_size,
    hint,
    is_in_place,
    number_expr,
    shape_exprs,
    size_expr,
    source_location,
)
from flashnorm_compile._torch.inputs import (
    InputSource,
    example_argument,
    input_source,
    mark_size,
    mark_symbolic,
    stored_tensors,
    trace_again,
)
from flashnorm_compile._torch.kept import KeptTensor, changed_inputs, kept_tensors
from flashnorm_compile._torch.settings import (
    RecompileLimitError,
    before_module_compile,
    dynamo_is_disabled,
    left_out_module,
    requested_dynamic,
    require_strict_dynamo,
    skip_logging_for,
    strict_dynamo,
)

__all__ = [
    "CustomGraphPass",
    "Frame",
    "GraphBreak",
    "InputSource",
    "KeptTensor",
    "RecompileLimitError",
    "active_ddp_module",
    "another_fake",
    "autograd_cache_is_on",
    "before_backward",
    "before_backward_in",
    "before_module_compile",
    "called_in",
    "changed_inputs",
    "compile_with_inductor",
    "compile_without_codegen",
    "current_frame",
    "decompositions",
    "descriptors",
    "detect_fake_mode",
    "dynamo_is_disabled",
    "effect_of",
    "example_argument",
    "fix_size",
    "functional_grad",
    "hint",
    "in_optimizer",
    "inductor_modes",
    "inductor_setting",
    "input_source",
    "is_in_place",
    "kept_tensors",
    "last_unexpected_break",
    "left_out_module",
    "mark_size",
    "mark_symbolic",
    "number_expr",
    "queue_backward_callback",
    "requested_dynamic",
    "require_strict_dynamo",
    "shape_exprs",
    "size_expr",
    "skip_logging_for",
    "source_location",
    "stored_tensors",
    "strict_dynamo",
    "symbolic_tracing",
    "trace_again",
    "uncompiled_caller",
]
