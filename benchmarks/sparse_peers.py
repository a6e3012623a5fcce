"""Peers of `sparse_ops.py` whose threads spin after each call: each runs in a process of its own.

`python benchmarks/sparse_peers.py PEER` reads the cells to measure from stdin, as JSON, and writes
their milliseconds to stdout. NumPy multiplies the dense matrix by its BLAS; torch and MKL multiply
CSR matrices. Each gets x and the result in the layout in which it is fastest, for nothing. Copies
of the weights exceed the last-level cache, so that they come from memory.
"""

import functools
import importlib.metadata
import json
import os
import sys
import time
import warnings

# Settings for another processor make OpenBLAS slow; it reads them once.
for _name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"):
    os.environ.pop(_name, None)

import numpy as np  # noqa: E402
import sparse_cases as cases  # noqa: E402
from scipy import sparse  # noqa: E402

PACKAGES = {"NumPy": ("numpy",), "torch CSR": ("torch",), "MKL CSR": ("mkl", "sparse-dot-mkl")}


def versions(peer):
    """Of the packages that a peer needs; raises where one is missing."""
    return {package: importlib.metadata.version(package) for package in PACKAGES[peer]}


def seconds(call, copies, budget):
    """The times of calls, each with the next copy, at least two."""
    call(copies[0])
    times, end = [], time.perf_counter() + budget
    while len(times) < 2 or (time.perf_counter() < end and len(times) < 2000):
        copy = copies[(len(times) + 1) % len(copies)]
        start = time.perf_counter()
        call(copy)
        times.append(time.perf_counter() - start)
    return times


def copied(thing, copy, size):
    """As many as exceed the last-level cache twice."""
    return [thing, *(copy(thing) for _ in range(-(-2 * cases.cache_bytes() // max(1, size))))]


def layouts(x):
    """A vector, or x.T by rows and by columns."""
    return [x[0]] if len(x) == 1 else [np.ascontiguousarray(x.T), x.T]


def dense_numpy(w):
    """By the BLAS that NumPy brings."""
    copies = copied(w, np.copy, w.nbytes)
    return lambda x: [(x.__matmul__, copies)]


def csr_mkl(w):
    """By MKL's `mkl_sparse_s_mm` and `mkl_sparse_s_mv`."""
    if "MKL_RT" not in os.environ:
        files = importlib.metadata.files("mkl") or ()
        os.environ["MKL_RT"] = next(str(f.locate()) for f in files if "mkl_rt" in f.name)
    from sparse_dot_mkl import dot_product_mkl

    csr = sparse.csr_array(w.T)
    copies = copied(csr, sparse.csr_array.copy, 8 * csr.nnz)
    return lambda x: [(lambda m, x=x: dot_product_mkl(m, x), copies) for x in layouts(x)]


def csr_torch(w):
    """By torch's CSR tensors."""
    import torch

    warnings.simplefilter("ignore")  # that they are in beta
    csr = sparse.csr_array(w.T)
    parts = [torch.from_numpy(part) for part in (csr.indptr, csr.indices, csr.data)]
    tensor = torch.sparse_csr_tensor(*parts, csr.shape, check_invariants=False)
    copies = copied(tensor, torch.clone, 8 * csr.nnz)

    def calls(x):
        tensors = [torch.from_numpy(layout) for layout in layouts(x)]
        return [(lambda m, x=x: m @ x, copies) for x in tensors]

    return calls


def fused_multiply_adds():
    """How many a second a large dense product has."""
    w = cases.rows(2048, 2048)
    return 2048**3 / min(seconds(w.__matmul__, [w], 1.0))


PEERS = {"NumPy": dense_numpy, "torch CSR": csr_torch, "MKL CSR": csr_mkl}


def main():
    """One peer, all cells."""
    peer, found = sys.argv[1], {}
    request = json.load(sys.stdin)
    dense = peer == "NumPy"
    prepared = functools.lru_cache(1)(lambda *which: PEERS[peer](cases.matrix(*which)))
    known = {}
    for size, density, batch in request["cells"]:
        key = size, batch, not dense and density  # what is in a dense matrix costs nothing
        if key not in known:
            calls = prepared(size, 50 if dense else density)(cases.rows(size, batch))
            medians = [np.median(seconds(*call, request["seconds"])) for call in calls]
            known[key] = round(1e3 * float(min(medians)), 5)
        found[cases.product_name(size, density, batch)] = known[key]
    if dense:
        found["multiply-adds a second"] = fused_multiply_adds()
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
