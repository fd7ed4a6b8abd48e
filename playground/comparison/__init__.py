"""Compare the recipes of recipes/methods on one response cache, and find out where the discriminator pays.

``python -m playground.comparison`` runs it, docs/study_protocol.md says what is compared and how, and docs/study.md shows
what was found.
"""
