"""What alignment files are made of: their text, their numbers, and whether they fit a model."""
