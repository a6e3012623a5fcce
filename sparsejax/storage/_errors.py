"""The one error of a file that is not what it should be."""


class InvalidFileError(ValueError):
    """A file that is no checkpoint, or a damaged one, or one that lies, or is larger than allowed.

    The message names the file, the leaf where there is one, what is wrong, and what to do.
    """


class BrokenError(ValueError):
    """What is wrong inside, said by who does not know the file; becomes an `InvalidFileError`."""
