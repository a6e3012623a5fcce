"""The `sparsejax` command: inspect, prune, pack, unpack and compare checkpoints.

Inside, imports point downward: `_parser` (the command line) over a file for each command
(`_inspect`, `_prune`, `_convert`, `_diff`) over `_histogram`, `_facts` (what is to say of a leaf),
`_pruning` (masks from options), `_choosing` (which leaves) over `_writing` over `_reading` over
`_names` and `_console` (what people see). What takes long to import is imported by the function
that needs it.
"""

import sys
from collections.abc import Sequence

from sparsejax.cli import _console, _parser

__all__ = ["main"]

# The library's own errors, ValueError and TypeError, name the argument, the leaf and the fix.
_EXPECTED = (
    _console.CommandError,
    ImportError,
    MemoryError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)
_TROUBLE, _INTERRUPTED, _BROKEN_PIPE = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: the words after `sparsejax`; None: those of this process.

    Returns:
      The exit status: 0; 1 where `diff` finds differences; 2 after an error, of which one line on
      standard error tells; 130 when interrupted; 141 where nobody reads standard output any more.

    Example:
      >>> from sparsejax import cli
      >>> cli.main(["--version"])
      sparsejax ...
      0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    program = "sparsejax"
    try:
        _console.prepare(own_process=argv is None)
        arguments = _parser.parse(words)
        if arguments is None:
            return 0
        program = f"sparsejax {arguments.command}"
        return int(arguments.run(arguments))
    except BrokenPipeError:
        _console.error(program, "nobody reads standard output any more (broken pipe)")
        return _BROKEN_PIPE
    except KeyboardInterrupt:
        _console.error(program, "interrupted; no file is half-written")
        return _INTERRUPTED
    except _EXPECTED as error:
        _console.error(getattr(error, "program", program), _console.words(error))
        return _TROUBLE
