"""Which head of the model belongs to which of the anchor, and how it is turned and scaled."""
