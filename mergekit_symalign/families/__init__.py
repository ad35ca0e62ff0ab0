"""Architecture knowledge as data: what every axis of every tensor belongs to. No MergeKit."""
