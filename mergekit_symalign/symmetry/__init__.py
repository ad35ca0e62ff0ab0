"""The mathematics of parameter space symmetries: torch and scipy only, no MergeKit."""
