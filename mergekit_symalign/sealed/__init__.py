"""What files that people share have in common: text that is not believed before it was checked, and digests."""
