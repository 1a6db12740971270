"""The error for a user's mistake, and helpers to classify and print errors."""

from collections.abc import Iterator


class InputError(ValueError):
    """Raised when something that the user gave cannot be used.

    The message is one sentence that names the thing, the value it had, and a remedy.
    """


def is_out_of_resources(error: BaseException) -> bool:
    """Tell whether the system refused memory or a thread, for which each library has an error of its own."""
    refusals = ("allocate memory", "out of memory", "start new thread", "resource temporarily unavailable")
    return any(
        isinstance(one, MemoryError) or any(refusal in str(one).lower() for refusal in refusals)
        for one in _with_causes(error)
    )


def is_interrupt(error: BaseException) -> bool:
    """Tell whether the error is an interrupt, or an ImportError that an extension module made from one."""
    return any(isinstance(one, KeyboardInterrupt) for one in _with_causes(error))


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def printable(text: str) -> str:
    """Spell out characters that a terminal obeys or hides, such as escape sequences; keep newlines."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text
    )
