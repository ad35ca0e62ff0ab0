"""When does alignment pay, and how much? The study behind docs/evidence.md."""
