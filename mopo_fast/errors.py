"""The one error that a user's mistake raises."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it, what it was and what to do."""
