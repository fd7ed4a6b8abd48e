"""Recipes: the schema, its loading and its cross-checks. Imports no torch."""
