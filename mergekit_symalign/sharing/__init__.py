"""Alignments and statistics of other people: brought from the Hugging Face Hub, and published there with a card."""
