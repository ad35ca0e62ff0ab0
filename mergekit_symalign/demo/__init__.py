"""Material of the demo: the anchor model, two trained adapters, seeded data and the measurements."""
