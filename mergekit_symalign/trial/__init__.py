"""Small random models of a transformers class, and whether a family's table describes them. No MergeKit."""
