"""The averages: their tensors, how these are updated, and how they get into the model."""
