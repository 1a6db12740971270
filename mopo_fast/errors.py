"""The one error that a user's mistake raises, how to print it, and how to tell what else has happened."""

from collections.abc import Iterator


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it, what it was and what to do."""


def is_out_of_resources(error: BaseException) -> bool:
    """Tell whether the system refused memory or a thread; each library has an error of its own for that."""
    refusals = ("allocate memory", "out of memory", "start new thread", "resource temporarily unavailable")
    return any(
        isinstance(one, MemoryError) or any(refusal in str(one).lower() for refusal in refusals)
        for one in _with_causes(error)
    )


def is_interrupt(error: BaseException) -> bool:
    """Tell whether the error is an interrupt, or the ImportError that extension modules make of one."""
    return any(isinstance(one, KeyboardInterrupt) for one in _with_causes(error))


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def printable(text: str) -> str:
    """Spell out what a terminal would obey or hide, such as escape sequences; newlines stay."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text
    )
