"""Linear assignment: exact, from short lists of good pairs, with prices of an auction."""
