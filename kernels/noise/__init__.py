"""Gaussian noise from a counter-based generator."""
