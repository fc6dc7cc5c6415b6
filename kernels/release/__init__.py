"""The release: weighted sum over samples, noise and scale, in one pass over each gradient."""

from .op import release

__all__ = ["release"]
