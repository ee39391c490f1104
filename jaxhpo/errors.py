"""The one kind of error that a user is meant to read: a single line that says what, where and what would be right."""


class JaxhpoError(Exception):
    """A mistake or a failure outside the program; the command line prints its text and exits with 2."""
