"""The one error that a user's mistake raises, how to print it, and how to tell that memory ran out."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it, what it was and what to do."""


def is_out_of_resources(error: BaseException) -> bool:
    """Tell whether the system refused memory or a thread; each library has an error of its own for that."""
    text = str(error).lower()
    refusals = ("allocate memory", "out of memory", "start new thread", "resource temporarily unavailable")
    return isinstance(error, MemoryError) or any(refusal in text for refusal in refusals)


def printable(text: str) -> str:
    """Spell out what a terminal would obey or hide, such as escape sequences; newlines stay."""
    return "".join(
        letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text
    )
