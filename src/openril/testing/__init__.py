"""Tiny models of the real architectures, for tests, demos and trying a recipe before renting machines."""
