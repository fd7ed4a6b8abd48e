"""Recipes: the schema and its loading. Imports no torch."""
