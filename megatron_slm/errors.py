"""What a user can mend."""


class UserError(Exception):
    """A sentence for the person who runs the command: the setting, its value, and the remedy.

    Commands print it without a traceback and end with exit status 2. Anything else that
    is raised is a defect of this package and keeps its traceback.
    """


class AgreedError(UserError):
    """A user's error that every rank raises: rank 0 alone says it."""
