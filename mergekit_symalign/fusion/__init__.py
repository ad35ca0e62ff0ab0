"""Kernels of merges that use data: pure functions of tensors."""
