"""Comparing merges: made one after another, measured on the same documents, told apart if that is more than noise."""
