"""Per-sample gradients of convolution weights, their norms and weighted sums, without patches."""

from .op import convolution_norm, convolution_samples, convolution_weighted

__all__ = ["convolution_norm", "convolution_samples", "convolution_weighted"]
