"""docs/evidence.md, its figures and README's paragraph, from the results files alone."""
