"""MergeKit tasks, thin: load, solve, apply; and the planning that puts them into a merge."""
