"""The residual stream: one change of coordinates for the whole model (docs/symmetries.md)."""
