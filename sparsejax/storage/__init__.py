"""Checkpoints in which zeros take no room: safetensors files, written whole or not at all.

`save` stores every leaf in the least of three ways (dense, bitmask, gaps), `load` gives it back bit
for bit, masks too; `contents` lists a file without reading it. Files are ordinary safetensors
files: any of its readers lists them, and reads the leaves that are dense; where every byte counts,
`save(..., header="packed")` gives that up. Codes of few bits: `sparsejax.quantization`. Orbax
checkpoints of sharded arrays: `sparsejax.storage.orbax`.
"""

from sparsejax.storage._errors import InvalidFileError
from sparsejax.storage._loading import Checkpoint, Contents, Leaf, contents, load
from sparsejax.storage._saving import save

__all__ = ["Checkpoint", "Contents", "InvalidFileError", "Leaf", "contents", "load", "save"]
