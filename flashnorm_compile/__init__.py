"""Differentially private training as a torch.compile backend."""

from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.options import Options
from flashnorm_compile.step import PrivateStep, dp_step

__all__ = ["Options", "PrivacyError", "PrivateStep", "dp_step"]
