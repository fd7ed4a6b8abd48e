"""The training room: warm start, pre-training, the loop, and its exact state."""
