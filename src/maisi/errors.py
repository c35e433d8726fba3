"""The one exception for faults of the input. Knows nothing of where it is shown."""


class MaisiError(Exception):
    """Something the user gave cannot be used.

    The message is one sentence (or two short ones) that says what is wrong and how to mend it. The command line
    prints it and exits with code 2; Python and HTTP callers get it as it is.
    """
