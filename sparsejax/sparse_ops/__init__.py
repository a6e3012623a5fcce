"""Products and convolutions that skip zeros: really faster, inside `jit`."""

from sparsejax.sparse_ops._convolution import conv
from sparsejax.sparse_ops._kernel import backend
from sparsejax.sparse_ops._matrix import SparseMatrix
from sparsejax.sparse_ops._products import matmul, skipped_nonfinite

__all__ = [
    "SparseMatrix",
    "backend",
    "conv",
    "matmul",
    "skipped_nonfinite",
]
