"""What models do on prompts: calibration tokens, layers run one at a time, cross-covariances. No MergeKit."""
