"""Norms and inner products of gradients from Gram matrices that are never written."""

from .op import ghost_norm, ghost_norms, ghost_product

__all__ = ["ghost_norm", "ghost_norms", "ghost_product"]
