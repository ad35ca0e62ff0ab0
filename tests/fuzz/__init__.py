"""Files that were changed at random: each ends in a refusal by name, or does no harm. ``python -m fuzz`` runs all."""
