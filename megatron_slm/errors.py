"""The one exception that a user can mend."""


class UserError(Exception):
    """A sentence for the person who runs the command: the setting, its value, and the remedy.

    Commands print it without a traceback and end with exit status 2. Anything else that
    is raised is a defect of this package and keeps its traceback.
    """
