"""The same problems from what models compute on prompts, as covariances."""
