"""The training room: warm start, the loop, and its exact state."""
