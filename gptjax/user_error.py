"""The error of all user errors."""


class UserError(Exception):
    """A user error: one line that names the culprit and the fix. Commands print it and exit with code 2."""
