"""Differentially private training as a torch.compile backend."""

from flashnorm_compile.errors import PrivacyError
from flashnorm_compile.options import Options

__all__ = ["Options", "PrivacyError"]
