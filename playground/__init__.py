"""A small visual world that draws itself, tiny models trained on it, and the demo that runs every stage on them."""
