"""Errors a user can cause and cure.

Every class is a ``ValueError`` so that callers who catch that family see all of them; the message names what is wrong
(file, row, key) and what to do. Broken invariants of our own are asserts and never appear here.
"""


class OpenRILError(ValueError):
    """Base of all errors the user can act on. The command line prints the message alone and exits with code 2."""


class RecipeError(OpenRILError):
    """A recipe that cannot be read, holds an unknown key, or contradicts itself."""


class DataError(OpenRILError):
    """A question file, row or image that cannot be used."""


class CacheError(OpenRILError):
    """A response cache that is missing, damaged, or made for other questions."""


class EndpointError(OpenRILError):
    """A server (teacher or judge) that cannot be reached or answers with something unusable."""


class ModelError(OpenRILError):
    """A checkpoint that cannot be loaded, frozen or adapted as asked."""


class JudgeError(OpenRILError):
    """Too many verdicts could not be had; the run stops so that it can be continued once the judge works."""


class StateError(OpenRILError):
    """A run folder or checkpoint that does not fit the recipe it is continued with."""
