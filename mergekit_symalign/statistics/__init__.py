"""Files of what a model's tensors read and how its loss depends on them: Gram matrices and Fisher information."""
