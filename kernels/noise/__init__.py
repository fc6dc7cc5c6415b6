"""Gaussian noise from a counter-based generator, and the privatising epilogue that adds it."""

from .op import add_noise
from .reference import normal, philox_4x32

__all__ = ["add_noise", "normal", "philox_4x32"]
