"""Alignments and statistics on the Hugging Face Hub: what they are called there, how they come here and get there."""
