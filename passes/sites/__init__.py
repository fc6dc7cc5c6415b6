"""Gradient sites, one file per kind."""
