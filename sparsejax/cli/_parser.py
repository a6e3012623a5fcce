"""The command line: its options, and their help with examples."""

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from sparsejax.cli import _console
from sparsejax.storage import _source

_FILES = (
    "Files may be safetensors (of any framework), npz, orbax directories, and those that "
    "`sparsejax pack` writes."
)

_EXAMPLES = {
    None: """
examples:
  sparsejax inspect model.safetensors
  sparsejax prune model.safetensors -o pruned.safetensors --sparsity 0.9
  sparsejax pack pruned.safetensors -o packed.safetensors
  sparsejax unpack packed.safetensors -o again.safetensors
  sparsejax diff pruned.safetensors again.safetensors
""",
    "inspect": """
examples:
  sparsejax inspect model.safetensors
  sparsejax inspect model.npz --histogram
  sparsejax inspect checkpoints/1000 --json | jq '.leaves[] | select(.sparsity > 0.5).name'
""",
    "prune": """
examples:
  sparsejax prune model.safetensors -o pruned.safetensors --sparsity 0.9
  sparsejax prune model.npz -o pruned.npz --sparsity 0.9 --allocation erk --exclude 'head.*'
  sparsejax prune model.safetensors -o pruned.safetensors --nm 2:4 --include '*.mlp.*.weight'
  sparsejax prune model.safetensors -o pruned.safetensors --sparsity 0.5 --block 1x8
""",
    "pack": """
examples:
  sparsejax pack pruned.safetensors -o packed.safetensors
  sparsejax pack checkpoints/1000 -o packed.safetensors
""",
    "unpack": """
examples:
  sparsejax unpack packed.safetensors -o model.safetensors
  sparsejax unpack packed.safetensors -o model.npz
  sparsejax unpack packed.safetensors -o checkpoint --format orbax
""",
    "diff": """
examples:
  sparsejax diff before.safetensors after.safetensors
  sparsejax diff model.npz checkpoints/1000 --json
  sparsejax diff a.npz b.npz > /dev/null && echo equal
""",
}


class _FinishedError(Exception):
    """The command line asked for a text only, and has it."""


class _Parser(argparse.ArgumentParser):
    """Says errors in one line, and what it prints through `_console`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings
        )

    def error(self, message: str) -> NoReturn:
        raise _console.UsageError(self.prog, f"{message} (see {self.prog} --help)")

    def print_help(self, file: Any = None) -> None:
        _console.emit(self.format_help())

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        raise _FinishedError


class _Version(argparse.Action):
    """Prints the version."""

    def __call__(self, *arguments: Any) -> None:
        from sparsejax import __version__

        _console.emit(f"sparsejax {__version__}\n")
        raise _FinishedError


def parse(words: Sequence[str]) -> argparse.Namespace | None:
    """The arguments, with `run`, the function of the command; None where there is nothing to do.

    Raises:
      UsageError: if the command line is wrong.
    """
    try:
        return _parser().parse_args(words)
    except _FinishedError:
        return None


def _parser() -> _Parser:
    parser = _Parser(
        prog="sparsejax",
        description=f"Inspect, prune, pack, unpack and compare checkpoints.\n\n{_FILES}",
        epilog=_EXAMPLES[None],
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    commands = parser.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_Parser
    )
    _add_inspect(commands)
    _add_prune(commands)
    _add_pack(commands)
    _add_unpack(commands)
    _add_diff(commands)
    return parser


def _add_inspect(commands: Any) -> None:
    parser = _command(
        commands,
        "inspect",
        "what a checkpoint holds",
        "A line for every leaf: shape, dtype, sparsity (the fraction of zeros), bytes in the file, "
        "how it\nis stored, and the structure of its zeros.",
        _inspect,
    )
    parser.add_argument("file", metavar="FILE")
    parser.add_argument(
        "--histogram", action="store_true", help="how |w| of the nonzeros is distributed"
    )
    _add_json(parser)
    _add_limit(parser)


def _add_prune(commands: Any) -> None:
    parser = _command(
        commands,
        "prune",
        "zero the weights of least magnitude",
        "Zeroes the entries (or blocks, or channels) of least magnitude: exactly round(sparsity * "
        "n)\nof n. Floating leaves with at least two axes are pruned, the others left as they are."
        "\nOUT is of FILE's kind unless its suffix or --format says otherwise.",
        _prune,
    )
    parser.add_argument("file", metavar="FILE")
    _add_out(parser, ("packed", "safetensors", "npz", "orbax"))
    amount = parser.add_argument_group("how much")
    amount.add_argument(
        "--sparsity", type=_fraction, metavar="S", help="the fraction to zero, in [0, 1)"
    )
    amount.add_argument(
        "--scope",
        choices=("global", "per-leaf"),
        help="whether all leaves compete (default), or each has this sparsity",
    )
    amount.add_argument(
        "--allocation",
        choices=("uniform", "er", "erk"),
        help="share what is kept out to the leaves: equally, or more to small ones",
    )
    units = parser.add_argument_group("what goes together").add_mutually_exclusive_group()
    units.add_argument(
        "--nm",
        type=_n_of_m,
        metavar="N:M",
        help="keep N of every M entries along the inputs; instead of --sparsity",
    )
    units.add_argument(
        "--block",
        type=_block,
        metavar="RxC",
        help="blocks of R by C of a weight as it is stored, (in, out) or (out, in)",
    )
    units.add_argument(
        "--channel",
        action="store_true",
        help="output channels; mind the last layer, whose channels are the network's outputs",
    )
    leaves = parser.add_argument_group("which leaves")
    for option, what in (("--include", "prune only"), ("--exclude", "do not prune")):
        leaves.add_argument(
            option,
            action="append",
            default=[],
            metavar="GLOB",
            help=f"{what} leaves whose name matches one of these patterns",
        )
    leaves.add_argument(
        "--layout",
        choices=("flax", "torch"),
        help="axes of weights: flax (..., in, out), torch (out, in, ...); guessed by default",
    )
    _add_json(parser)
    _add_limit(parser)


def _add_pack(commands: Any) -> None:
    parser = _command(
        commands,
        "pack",
        "store a sparse checkpoint in few bytes",
        "Writes a file without the zeros, bit for bit equal once read (sparsejax.storage). It is a"
        "\nsafetensors file; leaves that are not sparse are readable by any reader of these.",
        _pack,
    )
    parser.add_argument("file", metavar="FILE")
    _add_out(parser)
    _add_limit(parser)


def _add_unpack(commands: Any) -> None:
    parser = _command(
        commands,
        "unpack",
        "write a checkpoint as others read it",
        "Writes dense arrays: safetensors, npz, or an orbax directory. Names, dtypes, bits and\n"
        "metadata are those that were packed.",
        _unpack,
    )
    parser.add_argument("file", metavar="FILE")
    _add_out(parser, ("safetensors", "npz", "orbax"))
    _add_limit(parser)


def _add_diff(commands: Any) -> None:
    parser = _command(
        commands,
        "diff",
        "compare two checkpoints leaf by leaf",
        "A line for every leaf that differs: how many entries (bit for bit), the largest "
        "difference,\nand how much the zeros overlap (intersection over union). The kinds of file "
        "may differ.\nThe status is 0 where all leaves are equal, 1 where some differ, 2 after an "
        "error.",
        _diff,
    )
    parser.add_argument("first", metavar="A")
    parser.add_argument("second", metavar="B")
    _add_json(parser)
    _add_limit(parser)


def _command(commands: Any, name: str, line: str, description: str, run: Any) -> Any:
    parser = commands.add_parser(
        name, help=line, description=f"{description}\n\n{_FILES}", epilog=_EXAMPLES[name]
    )
    parser.set_defaults(run=run)
    return parser


def _add_out(parser: Any, formats: tuple[str, ...] = ()) -> None:
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="what to write")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")
    if formats:
        parser.add_argument(
            "--format", choices=formats, help="of OUT; by default what its suffix says"
        )


def _add_json(parser: Any) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")


def _add_limit(parser: Any) -> None:
    parser.add_argument(
        "--limit",
        type=_bytes,
        default=_source.LIMIT,
        metavar="BYTES",
        help="refuse what takes this much more memory than the file is long (default 4G)",
    )


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(
            f"must be in [0, 1) (a fraction, not a percentage), got {text}"
        )
    return value


def _n_of_m(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    n, m = map(int, match.groups()) if match else (0, 0)
    if not 1 <= n < m:
        raise argparse.ArgumentTypeError(f"must be N:M with 1 <= N < M, such as 2:4, got {text}")
    return n, m


def _block(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", text)
    rows, columns = map(int, match.groups()) if match else (0, 0)
    if rows < 1 or columns < 1:
        raise argparse.ArgumentTypeError(f"must be two sizes, such as 1x8 or 4x4, got {text}")
    return rows, columns


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9]{1,18})([KMGT]?)", text.upper())
    if not match:
        raise argparse.ArgumentTypeError(f"must be a number of bytes, such as 64G, got {text}")
    return int(match[1]) * 1024 ** " KMGT".index(match[2] or " ")


def _inspect(arguments: argparse.Namespace) -> int:
    from sparsejax.cli import _inspect

    return _inspect.run(arguments)


def _prune(arguments: argparse.Namespace) -> int:
    from sparsejax.cli import _prune

    return _prune.run(arguments)


def _pack(arguments: argparse.Namespace) -> int:
    from sparsejax.cli import _convert

    return _convert.pack(arguments)


def _unpack(arguments: argparse.Namespace) -> int:
    from sparsejax.cli import _convert

    return _convert.unpack(arguments)


def _diff(arguments: argparse.Namespace) -> int:
    from sparsejax.cli import _diff

    return _diff.run(arguments)
