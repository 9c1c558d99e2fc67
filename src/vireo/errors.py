"""The error that a user's mistake ends in."""


class UserError(ValueError):
    """A mistake that the person who started the command can mend.

    The message says what was found, what was expected, where, and what to do next. It is printed without a
    traceback and the process ends with exit code 2; every other exception is a fault and keeps its traceback.
    """
