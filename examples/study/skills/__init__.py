"""Parts 7 and 8: models with different skills merged with and without data, SmolLM2 and encoders."""
