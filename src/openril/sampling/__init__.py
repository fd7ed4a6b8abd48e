"""Engines that sample responses from a model."""
