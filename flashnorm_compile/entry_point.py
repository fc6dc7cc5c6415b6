"""What ``torch.compile(..., backend="flashnorm")`` loads."""

from __future__ import annotations

from flashnorm_compile import _torch
from flashnorm_compile.backend import flashnorm, refuse_module
from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.roots import refuse_raw_backward

__all__ = ["flashnorm"]

if _torch.dynamo_is_disabled():
    # torch.compile would hand the function back as it is, and no code of ours would run again.
    raise PrivacyError(
        "Dynamo is switched off (TORCHDYNAMO_DISABLE=1 or torch._dynamo.config.disable), so "
        'torch.compile(..., backend="flashnorm") would run without privacy. Switch it on.'
    )

_torch.before_module_compile(refuse_module, flashnorm)
if (module := _torch.left_out_module()) is not None:
    refuse_module(module)
_torch.skip_logging_for(flashnorm)
_torch.before_backward_in(flashnorm, refuse_raw_backward)
