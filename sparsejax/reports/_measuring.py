"""Rows from networks."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sparsejax import _files, _leaves, _tree, filters, masking, quantization, storage
from sparsejax._typing import Filter, Masks, Params
from sparsejax.reports._flops import Flops, flops
from sparsejax.reports._report import Report
from sparsejax.reports._row import FIELDS, Cell, Row


def row(
    name: str,
    params: Params,
    masks: Masks | None = None,
    *,
    apply_fn: Callable[..., Any] | None = None,
    inputs: Any = None,
    file: str | os.PathLike[str] | None = None,
    dense: Row | None = None,
    prunable: Filter = filters.weights,
    accuracy: Cell = None,
    error: Cell = None,
    latency: Cell = None,
    **more: Cell,
) -> Row:
    """Measures a network: its zeros, operations and bytes, beside what you have measured.

    Args:
      name: what stands in front of the row.
      params: a pytree of arrays. A tree of `quantization` counts as the params that it stands for,
        which `apply_fn` is given, too.
      masks: masks for `params`; what they keep counts as nonzero, whatever its value. `None`: the
        zeros of `params` are counted.
      apply_fn: `(params, *inputs) -> outputs`, whose operations are counted as in `flops`.
      inputs: what it is called with, or shapes and dtypes: an array, or a tuple of inputs; one
        example for the operations of one.
      file: where the network is stored, a file or a folder, whose bytes are counted.
      dense: the row of the dense network that this one was made of, where its shapes are others
        (channels were removed): its `size`, `dense_flops` and `dense_bytes` are what sparsity and
        factors refer to. By default those of `params`.
      prunable: which leaves are counted in `sparsity`, `nonzeros` and `size`; by default weights,
        as in the literature. `filters.floating` counts biases, too.
      accuracy: a fraction, or several, one a seed.
      error: likewise.
      latency: seconds of a call, from `latency`.
      **more: columns of your own: numbers, several numbers, or texts.

    Returns:
      A `Row`.

    Raises:
      TypeError: if an argument is of the wrong kind, or a leaf is traced.
      ValueError: if masks do not fit, `prunable` selects nothing, `apply_fn` comes without
        `inputs`, a fraction is none, or the network is larger than `dense`.
      OSError: if `file` cannot be found.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from sparsejax import masking, reports
      >>> def mlp(params, x):
      ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> params = {"in": jnp.arange(32.0).reshape(8, 4), "out": jnp.ones((4, 2))}
      >>> masks = masking.topk(params, 0.75)
      >>> x = jnp.ones((1, 8))
      >>> print(reports.Report([
      ...     reports.row("dense", params, apply_fn=mlp, inputs=x, accuracy=0.984, seed=0),
      ...     reports.row("pruned", params, masks, apply_fn=mlp, inputs=x, accuracy=0.981),
      ... ]))
              sparsity, %  nonzeros  compression  FLOPs  accuracy, %  seed
      dense          2.50        39        1.03x     78        98.40     0
      pruned        75.00        10        4.00x     20        98.10     –
    """
    if dense is not None and not isinstance(dense, Row):
        raise TypeError(f"`dense` must be a reports.Row, got {_leaves.brief(dense)}.")
    params = _known(params)
    filters.selected(prunable, params)
    count = masking.sparsity(params, masks, prunable=prunable).prunable
    costs = _flops(apply_fn, params, inputs, masks)
    whole = dense or Row(
        name,
        size=count.size,
        dense_flops=None if costs is None else costs.dense,
        dense_bytes=_bytes_of(params),
    )
    return Row(
        name,
        sparsity=_sparsity(count.nonzeros, whole.size),
        nonzeros=count.nonzeros,
        size=whole.size,
        flops=None if costs is None else costs.effective,
        dense_flops=whole.dense_flops,
        bytes=None if file is None else _bytes_at(file),
        dense_bytes=whole.dense_bytes,
        accuracy=accuracy,
        error=error,
        latency=latency,
        more=more,
    )


def layers(
    params: Params,
    masks: Masks | None = None,
    *,
    apply_fn: Callable[..., Any] | None = None,
    inputs: Any = None,
    file: str | os.PathLike[str] | None = None,
) -> Report:
    """A row for every leaf of numbers, and one for all of them.

    Args:
      params: a pytree of arrays, or a tree of `quantization`, which counts as the params that it
        stands for; leaves that are not floating are left out.
      masks: masks for `params`; `None`: the zeros of `params` are counted.
      apply_fn: `(params, *inputs) -> outputs`, whose operations are counted as in `flops`; those
        without a weight (attention) are in the total alone.
      inputs: what it is called with: an array, or a tuple of inputs.
      file: a file of `storage.save`, or another safetensors file, of these params or of what was
        made of them (a leaf's bytes are those of all that is stored at its path); what else the
        file has is in the total alone.

    Returns:
      A `Report` with the shape, entries, nonzeros and density of each leaf, its dense bytes, and
      its FLOPs and stored bytes where they are asked for.

    Raises:
      TypeError, ValueError: as in `row`; `storage.InvalidFileError` if `file` is damaged.

    Example:
      >>> import jax.numpy as jnp
      >>> from sparsejax import reports
      >>> print(reports.layers({"b": jnp.ones(4), "w": jnp.eye(4)}))
             shape  size  nonzeros  density, %  dense bytes
      b          4     4         4      100.00           16
      w        4x4    16         4       25.00           64
      total      –    20         8       40.00           80
    """
    params = _known(params)
    flat = _tree.flatten(params)
    counts = masking.sparsity(params, masks, prunable=lambda path, leaf: False)
    costs = _flops(apply_fn, params, inputs, masks)
    stored = None if file is None else _stored(file)
    rows = []
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if not _leaves.is_inexact(leaf):
            continue
        count = counts.leaves[path]
        cost = None if costs is None else costs.leaves.get(path)
        shape = _leaves.shape_of(leaf) or ()
        rows.append(
            Row(
                path,
                sparsity=_sparsity(count.nonzeros, count.size),
                nonzeros=count.nonzeros,
                size=count.size,
                flops=None if cost is None else cost.effective,
                dense_flops=None if cost is None else cost.dense,
                bytes=None if stored is None else _under(path, stored),
                dense_bytes=_bytes_of(leaf),
                more={"shape": "x".join(map(str, shape)) or "()"},
            )
        )
    total = Row(
        "total",
        sparsity=_sparsity(counts.total.nonzeros, counts.total.size),
        nonzeros=counts.total.nonzeros,
        size=counts.total.size,
        flops=None if costs is None else costs.effective,
        dense_flops=None if costs is None else costs.dense,
        bytes=None if file is None else _bytes_at(file),
        dense_bytes=sum(r.dense_bytes for r in rows),
    )
    asked = ("flops",) * (costs is not None), ("bytes",) * (file is not None)
    columns = ("size", "nonzeros", "density", *asked[0], "dense_bytes", *asked[1])
    return Report([*rows, total], ("shape",) * bool(rows) + columns)


def history(records: Iterable[Any]) -> Report:
    """A row for every round of a pruning procedure.

    Args:
      records: the `history` of what a procedure of `sparsejax.pruning` returned: each has `number`,
        `sparsity`, `nonzeros`, `size`, `metrics` (a dict) and `seconds`.

    Returns:
      A `Report`; metrics are columns by their names.

    Raises:
      TypeError: if a record lacks one of these.

    Example:
      >>> from sparsejax import pruning, reports
      >>> record = pruning.Record(
      ...     number=1, sparsity=0.9, nonzeros=10, size=100, metrics={"error": 0.02}, seconds=1.5)
      >>> print(reports.history([record]))
               sparsity, %  nonzeros  compression  error, %  seconds
      round 1        90.00        10        10.0x      2.00      1.5
    """
    return Report([_of_record(record) for record in records])


def _of_record(record: Any) -> Row:
    for attribute in ("number", "sparsity", "nonzeros", "size", "metrics", "seconds"):
        if not hasattr(record, attribute):
            raise TypeError(
                f"`records` must be those of a procedure of sparsejax.pruning, got "
                f"{_leaves.brief(record)} without {attribute!r}."
            )
    metrics = dict(record.metrics)
    fields = {name: metrics.pop(name) for name in FIELDS if name in metrics}
    fields |= {name: getattr(record, name) for name in ("sparsity", "nonzeros", "size")}
    return Row(f"round {record.number}", **fields, more=metrics | {"seconds": record.seconds})


def _flops(apply_fn: Any, params: Params, inputs: Any, masks: Masks | None) -> Flops | None:
    """The operations of a function, where there is one."""
    if apply_fn is None and inputs is None:
        return None
    if inputs is None:
        raise ValueError("`inputs` must be given with `apply_fn`: an example to count its FLOPs.")
    if apply_fn is None:
        raise ValueError("`apply_fn` must be given with `inputs`: the function that is called.")
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    return flops(apply_fn, params, *given, masks=masks)


def _known(params: Params) -> Params:
    """The params, dequantized; refuses leaves that have no entries to count."""
    flat = _tree.flatten(params)
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        if _leaves.is_traced(leaf):
            raise TypeError(
                "`params` must hold arrays whose entries are known, got "
                f"{_leaves.describe(leaf)} at {path!r} without; measure outside of jit."
            )
    return quantization.dequantize(params)


def _sparsity(nonzeros: int, size: Cell) -> float | None:
    if not isinstance(size, int):
        return None
    if nonzeros > size:
        raise ValueError(
            f"`dense` must be the network that this one was made of, got {size:,} entries, fewer "
            f"than the {nonzeros:,} that are not zero here."
        )
    return (size - nonzeros) / max(size, 1)


def _bytes_of(tree: Any) -> int:
    """Of all arrays, dense."""
    return sum(_nbytes(leaf) for leaf in jax.tree.leaves(tree) if _leaves.is_number(leaf))


def _nbytes(leaf: Any) -> int:
    return int(np.size(leaf)) * np.dtype(_leaves.dtype_of(leaf)).itemsize


def _bytes_at(file: str | os.PathLike[str]) -> int:
    """Of a file, or of all files in a folder."""
    path = _files.known_path("file", file)
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size


def _stored(file: str | os.PathLike[str]) -> dict[str, int]:
    path: Path = _files.known_path("file", file)
    return {leaf.name: leaf.bytes for leaf in storage.contents(path).leaves}


def _under(path: str, stored: dict[str, int]) -> int | None:
    found = [n for name, n in stored.items() if name == path or name.startswith(f"{path}.")]
    return sum(found) if found else None
