"""Products and convolutions that skip zeros: really faster, inside `jit`."""

from sparsejax.sparse_ops import _kernel
from sparsejax.sparse_ops._convolution import Window, conv
from sparsejax.sparse_ops._crossover import measured, shipped
from sparsejax.sparse_ops._kernel import backend
from sparsejax.sparse_ops._matrix import SparseMatrix
from sparsejax.sparse_ops._network import FastApply
from sparsejax.sparse_ops._product import Crossover, Product
from sparsejax.sparse_ops._products import matmul, skipped_nonfinite
from sparsejax.sparse_ops._report import Report, Row
from sparsejax.sparse_ops._sparsify import sparsify

_kernel.load()

__all__ = [
    "Crossover",
    "FastApply",
    "Product",
    "Report",
    "Row",
    "SparseMatrix",
    "Window",
    "backend",
    "conv",
    "matmul",
    "measured",
    "shipped",
    "skipped_nonfinite",
    "sparsify",
]
