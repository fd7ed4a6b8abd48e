"""Errors that a user can cause and fix.

Every class is a ``ValueError``, so that ``except ValueError`` catches all of them. The message names what is wrong
(file, row or key) and what to do. Broken invariants of this package are asserts and have no class here.
"""


class OpenRILError(ValueError):
    """Base class of all errors that the user can fix. The command line prints the message and exits with code 2."""


class RecipeError(OpenRILError):
    """A recipe cannot be read, holds an unknown key, or contradicts itself."""


class DataError(OpenRILError):
    """A question file, a row or an image cannot be used."""


class PromptTooLongError(DataError):
    """A prompt is longer than data.max_prompt_length. Every stage leaves its question out and lists it."""

    def __init__(self, message: str, tokens: int) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.question_id = ""


class CacheError(OpenRILError):
    """A response cache is missing, damaged, or was made for other questions."""


class EndpointError(OpenRILError):
    """A server of a teacher or judge cannot be reached, or its answers cannot be used."""


class ModelError(OpenRILError):
    """A checkpoint cannot be loaded, frozen or adapted as the recipe says."""


class JudgeError(OpenRILError):
    """Too many verdicts are missing. The run stops, and the same command continues it once the judge works."""


class StateError(OpenRILError):
    """A run folder or checkpoint does not fit the recipe that it is continued with."""
