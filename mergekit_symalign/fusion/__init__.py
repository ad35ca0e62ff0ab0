"""Kernels of merges that use data: torch, scipy and POT only."""
