"""The one error of a file that is not what it should be."""


class InvalidFileError(ValueError):
    """A file that is no checkpoint, or a damaged one, or one that lies, or is larger than allowed.

    The message names the file, the leaf where there is one, what is wrong, and what to do.

    Attributes:
      path: of the file.
      reason: what is wrong with it.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return (
            f"`path` must be a whole file of `save`, or a safetensors file, got {self.path!r}: "
            f"{self.reason}. If it was whole once, restore a copy of it."
        )


class BrokenError(ValueError):
    """What is wrong inside, said by who does not know the file; becomes an `InvalidFileError`."""
