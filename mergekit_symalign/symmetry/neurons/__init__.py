"""Which neuron, and which expert, of the model belongs to which of the anchor."""
