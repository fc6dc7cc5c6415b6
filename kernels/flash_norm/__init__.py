"""Products of every sample, left_b·right_b, and their squared norms in the same pass."""

from .op import flash_norm, materialize_norm, materialize_norms

__all__ = ["flash_norm", "materialize_norm", "materialize_norms"]
