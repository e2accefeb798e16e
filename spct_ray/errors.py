"""Every exception that the package raises on purpose. Each says what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable


class SpctError(Exception):
    """Base of all errors meant to be read by a person."""


class ConfigError(SpctError, ValueError):
    """A configuration value or key that cannot be used. A ValueError, so that pydantic says in which field it arose."""


class DataError(SpctError):
    """Input data that cannot be used; the message names file and line."""


class EngineError(SpctError):
    """An inference engine died or could not do its work."""


class RequestError(SpctError):
    """One request that no engine can serve (too long, too many responses); not a fault of the engine."""


class TooLongError(RequestError):
    """A request that is longer than a limit; the message has both numbers."""


class ParityError(SpctError):
    """Trainer and engine disagree about log-probabilities: the engine does not hold the trainer's weights."""


class StepError(SpctError):
    """A step of the job graph failed; the message names step, cause, log file and the command to retry."""


def suggestion(word: str, known: Iterable[str]) -> str:
    """What to say of a word that is not among the known ones: the nearest, or all of them."""
    words = list(known)
    close = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(words)}"
