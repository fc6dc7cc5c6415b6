"""What ``torch.compile(..., backend="flashnorm")`` loads."""

from __future__ import annotations

from flashnorm_compile._torch import dynamo_is_disabled, skip_logging_for
from flashnorm_compile.backend import flashnorm
from flashnorm_compile.errors import PrivacyError

__all__ = ["flashnorm"]

if dynamo_is_disabled():
    # torch.compile would hand the function back as it is, and no code of ours would run again.
    raise PrivacyError(
        "Dynamo is switched off (TORCHDYNAMO_DISABLE=1 or torch._dynamo.config.disable), so "
        'torch.compile(..., backend="flashnorm") would run without privacy. Switch it on.'
    )

skip_logging_for(flashnorm)
