"""Kernels, one folder per operation: reference, kernel, custom op."""
