"""`SparseMatrix`: what it keeps, what it is made of and into, and how trees see it."""

import copy
import dataclasses
import pickle

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from hypothesis import strategies as st

from sparsejax import granularities, masking, sparse_ops

SparseMatrix = sparse_ops.SparseMatrix
pytestmark = pytest.mark.usefixtures("quickly")
W = np.arange(12, dtype=np.float32).reshape(3, 4)


def random(shape, density, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape).astype(np.float32)
    return np.asarray(w, dtype), rng.random(shape) < density


@hypothesis.settings(max_examples=20)
@hypothesis.given(
    st.one_of(
        st.tuples(st.integers(0, 40), st.integers(0, 40)),
        st.tuples(*[st.integers(0, 4)] * 3, st.integers(0, 20)),
    ),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.sampled_from([np.float32, jnp.bfloat16]),
    st.sampled_from([1, 8, 64]),
)
def test_from_dense_and_back(shape, density, dtype, batch):
    w, mask = random(shape, density, dtype)
    matrix = SparseMatrix.from_dense(w, mask, batch=batch)
    np.testing.assert_array_equal(matrix.to_dense(), np.where(mask, w, 0))
    np.testing.assert_array_equal(matrix.mask(), mask)
    assert (matrix.nnz, matrix.shape, matrix.dtype) == (mask.sum(), shape, dtype)
    assert matrix.density == (mask.mean() if mask.size else 0)


@pytest.mark.parametrize("shape", [(5, 24), (5, 20), (3, 5), (2, 2, 3, 19), (0, 8), (3, 0)])
def test_blocks_and_back(shape):
    w, mask = random(shape, 0.4)
    mask = np.repeat(mask[..., ::8], 8, -1)[..., : shape[-1]]
    matrix = SparseMatrix.from_dense(w, mask, block=8)
    np.testing.assert_array_equal(matrix.to_dense(), np.where(mask, w, 0))
    np.testing.assert_array_equal(matrix.mask(), mask)
    assert matrix.nnz == mask.sum()


def test_blocks_of_a_granularity():
    w, _ = random((16, 32), 1)
    kept = masking.topk({"w": np.abs(w)}, 0.75, granularity=granularities.Block((1, 8)))["w"]
    matrix = SparseMatrix.from_dense(w, kept, block=8)
    assert matrix.nnz == 16 * 32 // 4
    np.testing.assert_array_equal(matrix.to_dense(), np.where(kept, w, 0))


def test_blocks_without_a_mask_keep_the_zeros_inside():
    matrix = SparseMatrix.from_dense(np.eye(8, dtype=np.float32), block=8)
    assert matrix.nnz == 64


def test_from_dense_keeps_what_is_not_zero():
    assert SparseMatrix.from_dense(W).nnz == 11


def test_a_mask_broadcasts():
    matrix = SparseMatrix.from_dense(W, np.array([[True, False, False, True]]))
    np.testing.assert_array_equal(matrix.to_dense(), W * [1, 0, 0, 1])


def test_to_bcoo_bcsr_and_scipy():
    w, mask = random((30, 17), 0.2)
    matrix = SparseMatrix.from_dense(w, mask)
    want = np.where(mask, w, 0)
    np.testing.assert_array_equal(matrix.to_bcoo().todense(), want)
    np.testing.assert_array_equal(matrix.to_bcsr().todense(), want)
    np.testing.assert_array_equal(matrix.to_scipy().toarray(), want)
    assert matrix.to_scipy().nnz == matrix.to_bcoo().nse == mask.sum()
    x = np.ones((2, 30), np.float32)
    np.testing.assert_allclose(jnp.asarray(x) @ matrix.to_bcoo(), x @ want, atol=1e-5)


def test_to_bcoo_of_a_kernel():
    w, mask = random((3, 3, 4, 5), 0.3)
    matrix = SparseMatrix.from_dense(w, mask)
    np.testing.assert_array_equal(matrix.to_bcoo().todense(), np.where(mask, w, 0))


@pytest.mark.parametrize("form", ["csr", "csc", "coo"])
def test_from_scipy(form):
    theirs = scipy.sparse.random_array((20, 13), density=0.3, format=form, rng=0)
    matrix = SparseMatrix.from_scipy(theirs)
    np.testing.assert_array_equal(matrix.to_dense(), theirs.toarray().astype(np.float32))
    assert matrix.nnz == theirs.nnz


def test_from_scipy_adds_duplicates_and_keeps_zeros():
    theirs = scipy.sparse.coo_array(([1.0, 2.0, 0.0], ([0, 0, 1], [1, 1, 0])), shape=(2, 2))
    matrix = SparseMatrix.from_scipy(theirs)
    np.testing.assert_array_equal(matrix.to_dense(), [[0, 3], [0, 0]])
    assert matrix.nnz == 2


def test_from_scipy_keeps_zeros_in_blocks_too():
    theirs = scipy.sparse.coo_array(([0.0], ([3], [9])), shape=(16, 16))
    assert SparseMatrix.from_scipy(theirs, block=8).nnz == 8


def test_values_are_the_only_leaf():
    matrix = SparseMatrix.from_dense(W)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path({"w": matrix})]
    assert paths == ["['w'].values"]
    doubled = jax.tree.map(lambda v: 2 * v, matrix)
    np.testing.assert_array_equal(doubled.to_dense(), 2 * W)


def test_equal_structures_are_the_same_tree():
    one, other = SparseMatrix.from_dense(W), SparseMatrix.from_dense(2 * W)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    assert hash(one.structure) == hash(other.structure)
    assert one.structure != SparseMatrix.from_dense(W, W > 5).structure
    assert one.structure != SparseMatrix.from_dense(W.reshape(1, 1, 3, 4)).structure
    assert one.structure != "structure"


def test_equal_structures_share_a_program():
    traces = []

    @jax.jit
    def total(w):
        traces.append(1)
        return w.to_dense().sum()

    for scale in (1, 2):
        total(SparseMatrix.from_dense(scale * W))
    assert len(traces) == 1


def test_from_dense_of_traced_values():
    mask = W > 4
    dense = jax.jit(lambda w: SparseMatrix.from_dense(w, mask).to_dense())(W)
    np.testing.assert_array_equal(dense, np.where(mask, W, 0))


def test_an_optimizer_moves_the_values_alone():
    matrix = SparseMatrix.from_dense(W, W > 4)
    tx = optax.adamw(0.1, weight_decay=0.1)
    grads = jax.tree.map(jnp.ones_like, matrix)
    updates, state = tx.update(grads, tx.init(matrix), matrix)
    moved = optax.apply_updates(matrix, updates)
    assert moved.structure is matrix.structure
    assert optax.tree.get(state, "mu").structure is matrix.structure
    np.testing.assert_array_equal(np.asarray(moved.to_dense()) != 0, W > 4)


def test_copies_and_pickles():
    matrix = SparseMatrix.from_dense(W, W > 4)
    for other in (copy.deepcopy(matrix), pickle.loads(pickle.dumps(matrix))):
        assert other.structure == matrix.structure
        np.testing.assert_array_equal(other.to_dense(), matrix.to_dense())


def test_indices_cannot_be_written():
    structure = SparseMatrix.from_dense(W).structure
    with pytest.raises(ValueError, match="read-only"):
        structure.packed.offs[0] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        structure.shape = (1, 1)


def test_a_corrupt_pickle_is_refused():
    matrix = SparseMatrix.from_dense(W)
    packed = matrix.structure.packed
    broken = dataclasses.replace(packed, offs=np.full_like(packed.offs, 99))
    with pytest.raises(ValueError, match="offs"):
        dataclasses.replace(matrix.structure, packed=broken)


def test_repr():
    matrix = SparseMatrix.from_dense(W.reshape(1, 1, 3, 4), W > 4)
    assert repr(matrix) == "SparseMatrix(float32[1,1,3,4], 7 kept, density 0.583)"


T = TypeError, ValueError
REFUSED = [
    (lambda: SparseMatrix.from_dense("w"), T[0], "`w` must be an array of float32 or bfloat16"),
    (lambda: SparseMatrix.from_dense(W.astype(int)), T[0], r"got int64\[3,4\]; cast it"),
    (lambda: SparseMatrix.from_dense(W.astype(np.float16)), T[0], r"float16\[3,4\]"),
    (lambda: SparseMatrix.from_dense(W[0]), T[1], r"\(inputs, outputs\) or .*float32\[4\]"),
    (lambda: SparseMatrix.from_dense(W, W), T[0], "`mask` must be a boolean array"),
    (lambda: SparseMatrix.from_dense(W, W[:2] > 0), T[1], r"must broadcast.*bool\[2,4\]"),
    (lambda: SparseMatrix.from_dense(W, W > 4, block=8), T[1], r"removes \(1, 0\)"),
    (lambda: SparseMatrix.from_dense(W, block=4), T[1], "`block` must be 8"),
    (lambda: SparseMatrix.from_dense(W, block="8"), T[0], "`block` must be one integer"),
    (lambda: SparseMatrix.from_dense(W, batch=0), T[1], "`batch` must be >= 1, got 0"),
    (lambda: jax.jit(SparseMatrix.from_dense)(W), T[0], "`w` is traced"),
    (lambda: jax.jit(lambda m: SparseMatrix.from_dense(W, m))(W > 1), T[0], "`mask` is traced"),
    (lambda: SparseMatrix.from_dense(SparseMatrix.from_dense(W)), T[0], "sparse already"),
    (
        lambda: SparseMatrix.from_scipy(scipy.sparse.coo_array(W * 1j)),
        T[1],
        "must have two axes and real numbers",
    ),
    (lambda: SparseMatrix.from_scipy(W), T[0], "`matrix` must be a SciPy sparse array"),
    (lambda: SparseMatrix.from_dense(W[None, None]).to_scipy(), T[1], "is for matrices"),
    (lambda: jax.jit(lambda w: w.to_scipy())(SparseMatrix.from_dense(W)), T[0], "traced"),
    (
        lambda: jax.tree.map(lambda v: v[1:], SparseMatrix.from_dense(W)).to_dense(),
        T[1],
        r"`w.values` must have shape \(11,\).*got float32\[10\]",
    ),
]


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
