"""The one error of the data package."""


class DataError(Exception):
    """Data that cannot be used as it is.

    The message is a sentence for the person at the keyboard: which file, which line, what was
    expected there, and where there is one, the way out.
    """
