"""Models: loading, prompts, freezing, adapters, and the pass over groups."""
