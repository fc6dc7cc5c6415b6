"""The weighted gradient: the sum over samples of weighted products, weights exact."""

from .op import weighted_gradient, weighted_gradients

__all__ = ["weighted_gradient", "weighted_gradients"]
