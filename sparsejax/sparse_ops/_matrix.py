"""Sparse weights as a pytree whose only leaf is the kept values."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _checks, _leaves
from sparsejax.sparse_ops import _structure

DTYPES = (np.dtype(np.float32), np.dtype(jnp.bfloat16))


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class SparseMatrix:
    """A matrix, or a convolution's kernel, of which only some entries are stored.

    A pytree with one leaf, the kept `values`. Where they stand is `structure`: static, hashable,
    checked when it is made and unchangeable afterwards, so that `jax.grad`, optax and
    `jax.tree.map` see floats and nothing else. Under `jit` the structure is a constant of the
    program, at 2 bytes a value and a little; another structure is another program. On the host it
    takes some 15 bytes a value, and 40 once gradients have been asked for.

    Make one with `from_dense`. In a checkpoint of leaves only `values` are stored: restore them
    into a matrix of the same structure (`dataclasses.replace(w, values=...)`), or pickle it whole.

    Attributes:
      values: the kept entries in the kernel's order, float32 or bfloat16, 1-D. With blocks, those
        of a last block that reaches beyond the outputs are zeros without meaning.
      structure: where they stand.
    """

    values: Any
    structure: _structure.Structure

    @classmethod
    def from_dense(
        cls, w: Any, mask: Any = None, *, block: int | None = None, batch: int = 64
    ) -> "SparseMatrix":
        """Keeps some entries of a dense array.

        Takes a second for 4096 x 4096 at 10 %, four at 50 %: the entries are ordered once, for
        every product to come. N:M sparsity is unstructured here; columns with equal counts are what
        it likes best.

        Args:
          w: (inputs, outputs), or (height, width, inputs, outputs) of a convolution; float32 or
            bfloat16. Under `jit` it may be traced if `mask` is not.
          mask: which entries are kept, booleans that broadcast against `w`; default those that are
            not zero. A kept entry may be zero: fine-tuning moves it.
          block: 8 if the mask keeps or removes 8 consecutive outputs together (as
            `granularities.Block((1, 8))` does, counted from output 0), which is faster;
            default single entries.
          batch: how many rows of x are expected. Any number is right; it tunes the order.

        Returns:
          A `SparseMatrix`.

        Raises:
          TypeError: if `w` is not float32 or bfloat16, or the mask not boolean, or what decides
            about the structure is traced.
          ValueError: if shapes do not fit, or the mask does not keep whole blocks.

        Example:
          >>> import jax.numpy as jnp
          >>> from sparsejax import sparse_ops
          >>> w = sparse_ops.SparseMatrix.from_dense(jnp.array([[1.0, 0.0], [0.0, 2.0]]))
          >>> w
          SparseMatrix(float32[2,2], 2 kept, density 0.5)
          >>> w.to_dense()
          Array([[1., 0.],
                 [0., 2.]], dtype=float32)
        """
        _check_dense(w)
        for name, value in {"block": 1 if block is None else block, "batch": batch}.items():
            _checks.integer(name, value)
        if block not in (None, 1, 8):
            raise ValueError(f"`block` must be 8 (outputs) or None, got {block}.")
        if batch < 1:
            raise ValueError(f"`batch` must be >= 1, got {batch}.")
        kept = _kept(w, mask)
        if block == 8:
            kept = _whole_blocks(kept, mask is not None)
        structure = _structure.build(kept, w.shape, block=int(block or 1), batch=int(batch))
        return cls(values_of(w, structure), structure)

    @classmethod
    def from_scipy(cls, matrix: Any, *, block: int | None = None, batch: int = 64) -> Any:
        """The same matrix from SciPy's sparse arrays; what they store stays, zeros included.

        Args:
          matrix: a SciPy sparse array (inputs, outputs); duplicates are added up.
          block: as in `from_dense`.
          batch: as in `from_dense`.

        Returns:
          A `SparseMatrix` of float32.

        Example:
          >>> import scipy.sparse
          >>> from sparsejax import sparse_ops
          >>> sparse_ops.SparseMatrix.from_scipy(scipy.sparse.eye_array(3))
          SparseMatrix(float32[3,3], 3 kept, density 0.333)
        """
        import scipy.sparse

        if not scipy.sparse.issparse(matrix):
            raise TypeError(f"`matrix` must be a SciPy sparse array, got {_leaves.brief(matrix)}.")
        if matrix.ndim != 2 or matrix.dtype.kind not in "fiub":
            raise ValueError(
                f"`matrix` must have two axes and real numbers, got {_leaves.describe(matrix)}."
            )
        coo = scipy.sparse.coo_array(matrix, copy=True)
        coo.sum_duplicates()
        dense, mask = np.zeros(coo.shape, np.float32), np.zeros(coo.shape, bool)
        dense[coo.row, coo.col], mask[coo.row, coo.col] = coo.data, True
        if block == 8:
            mask = _whole_blocks(mask, strict=False)
        return cls.from_dense(dense, mask, block=block, batch=batch)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        return self.structure.shape

    @property
    def ndim(self) -> int:
        """2 for a matrix, 4 for a convolution's kernel."""
        return len(self.shape)

    @property
    def dtype(self) -> Any:
        """The values' dtype."""
        return self.values.dtype

    @property
    def nnz(self) -> int:
        """How many entries are kept, those that happen to be zero included."""
        return int(self.structure.real.sum())

    @property
    def density(self) -> float:
        """The fraction of entries that are kept; 0 of an empty array."""
        return self.nnz / max(1, int(np.prod(self.shape, dtype=np.int64)))

    def to_dense(self) -> jax.Array:
        """The dense array, zero where nothing is kept; works under `jit`."""
        return dense(self.structure, check_values(self))

    def mask(self) -> np.ndarray:
        """Which entries are kept, a boolean array of the dense shape."""
        kept = np.zeros(int(np.prod(self.shape, dtype=np.int64)), bool)
        kept[self.structure.flat[self.structure.real]] = True
        return kept.reshape(self.shape)

    def to_bcoo(self) -> Any:
        """A `jax.experimental.sparse.BCOO`, sorted; of a kernel with its four axes.

        JAX's own sparse arrays are no longer developed, and on CPU slower than dense ones at
        any density above a few per cent.
        """
        from jax.experimental import sparse

        values, place = self._sorted()
        indices = np.stack(np.unravel_index(place, self.shape), -1).astype(np.int32)
        return sparse.BCOO(
            (values, jnp.asarray(indices)),
            shape=self.shape,
            indices_sorted=True,
            unique_indices=True,
        )

    def to_bcsr(self) -> Any:
        """A `jax.experimental.sparse.BCSR`; of a matrix only."""
        from jax.experimental import sparse

        self._check_matrix("to_bcsr")
        return sparse.BCSR.from_bcoo(self.to_bcoo())

    def to_scipy(self) -> Any:
        """A `scipy.sparse.csr_array` in float32 (SciPy has no bfloat16); of a matrix only."""
        import scipy.sparse

        self._check_matrix("to_scipy")
        if _leaves.is_traced(self.values):
            raise TypeError("`to_scipy` needs values, got traced ones; call it outside of jit.")
        values, place = self._sorted()
        rows, cols = np.divmod(place, max(1, self.shape[1]))
        data = np.asarray(values, np.float32)
        return scipy.sparse.csr_array((data, (rows, cols)), shape=self.shape)

    def tree_flatten_with_keys(self) -> Any:
        """The values, and the structure as what is static."""
        return ((jax.tree_util.GetAttrKey("values"), self.values),), self.structure

    def tree_flatten(self) -> Any:
        """The same without the name: what every call of a jitted function asks for."""
        return (self.values,), self.structure

    @classmethod
    def tree_unflatten(cls, structure: _structure.Structure, children: Any) -> "SparseMatrix":
        """The inverse; whatever a tree map puts in the values' place."""
        (values,) = children
        return cls(values, structure)

    __array_ufunc__ = None  # NumPy leaves x @ w to what follows

    def __rmatmul__(self, x: Any) -> Any:
        raise TypeError("x @ w is not defined for a SparseMatrix; call sparse_ops.matmul(x, w).")

    def _sorted(self) -> tuple[jax.Array, np.ndarray]:
        order = self.structure.by_place
        return check_values(self)[order], self.structure.flat[order]

    def _check_matrix(self, method: str) -> None:
        if self.ndim != 2:
            raise ValueError(f"`{method}` is for matrices, this has shape {self.shape}.")

    def __repr__(self) -> str:
        size = f"{_leaves.dtype_of(self.values)}[{','.join(map(str, self.shape))}]"
        return f"SparseMatrix({size}, {self.nnz} kept, density {self.density:.3g})"


def values_of(w: Any, structure: _structure.Structure) -> jax.Array:
    """The kept entries of a dense array in the kernel's order; zeros as fillers."""
    flat = jnp.asarray(w).reshape(-1)
    return flat.at[structure.flat].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def dense(structure: _structure.Structure, values: jax.Array) -> jax.Array:
    """The dense array, zero where nothing is kept."""
    entries = jnp.zeros(int(np.prod(structure.shape, dtype=np.int64)), values.dtype)
    entries = entries.at[structure.flat].set(values, mode="drop", wrap_negative_indices=False)
    return entries.reshape(structure.shape)


def check_values(w: SparseMatrix) -> Any:
    """The values; refuses what a tree map or a checkpoint made unfit."""
    size, dtype = w.structure.size, _leaves.dtype_of(w.values)
    if _leaves.shape_of(w.values) != (size,):
        raise ValueError(
            f"`w.values` must have shape ({size},) for {w.structure}, got "
            f"{_leaves.describe(w.values)}; make the matrix anew with SparseMatrix.from_dense."
        )
    if dtype not in DTYPES:
        raise TypeError(f"`w.values` must be float32 or bfloat16, got {dtype}; cast them.")
    return w.values


def check_sparse(w: Any) -> None:
    """Refuses what is no `SparseMatrix`."""
    if not isinstance(w, SparseMatrix):
        raise TypeError(
            f"`w` must be a SparseMatrix, got {_leaves.brief(w)}; "
            "make one with SparseMatrix.from_dense."
        )


def _check_dense(w: Any) -> None:
    if isinstance(w, SparseMatrix):
        raise TypeError(f"`w` must be a dense array, got {w!r}; it is sparse already.")
    shape, dtype = _leaves.shape_of(w), _leaves.dtype_of(w)
    if shape is None or dtype not in DTYPES:
        got = _leaves.brief(w) if shape is None else _leaves.describe(w)
        raise TypeError(f"`w` must be an array of float32 or bfloat16, got {got}; cast it.")
    if len(shape) not in (2, 4):
        raise ValueError(
            "`w` must have shape (inputs, outputs) or (height, width, inputs, outputs), got "
            f"{_leaves.describe(w)}; reshape it, as (inputs, -1)."
        )


def _kept(w: Any, mask: Any) -> np.ndarray:
    if mask is None:
        if _leaves.is_traced(w):
            raise TypeError(
                "`w` is traced, so which entries are zero cannot be seen: pass a concrete `mask`, "
                "or call from_dense outside of jit."
            )
        return np.asarray(w) != 0
    if _leaves.is_traced(mask):
        raise TypeError("`mask` is traced, but decides about shapes: call from_dense outside jit.")
    if _leaves.dtype_of(mask) != np.dtype(bool):
        raise TypeError(
            f"`mask` must be a boolean array (True = kept), got {_leaves.describe(mask)}; turn "
            "numbers into booleans with `mask != 0`."
        )
    try:
        return np.broadcast_to(np.asarray(mask), w.shape)
    except ValueError:
        raise ValueError(
            f"`mask` must broadcast against `w`, got {_leaves.describe(mask)} for "
            f"{_leaves.describe(w)}."
        ) from None


def _whole_blocks(kept: np.ndarray, strict: bool) -> np.ndarray:
    """Blocks of which anything is kept as a whole; refuses a mask that splits one."""
    starts = np.arange(0, kept.shape[-1], 8)
    if kept.size == 0:
        return kept
    some = np.logical_or.reduceat(kept, starts, axis=-1)
    whole = np.repeat(some, 8, axis=-1)[..., : kept.shape[-1]]
    if strict and not np.array_equal(whole, kept):
        where = tuple(map(int, np.argwhere(whole != kept)[0]))
        raise ValueError(
            "`mask` must keep or remove 8 consecutive outputs together where block=8, but it "
            f"removes {where} and keeps others of its block; make it with "
            "granularities.Block((1, 8)), or leave out `block`."
        )
    return whole
