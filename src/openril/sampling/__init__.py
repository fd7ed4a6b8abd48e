"""Sampling engines: responses drawn from a model."""
