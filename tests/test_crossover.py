"""Expected speed-ups: what the table says, what is measured, and what is remembered of it."""

import json
import os
import re
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import sparse_ops
from sparsejax.sparse_ops import _crossover, _measurement, _memory
from sparsejax.sparse_ops._convolution import Window

LAYER = sparse_ops.Product((4, 128), (128, 64), density=0.1)
SAME = Window((1, 1), ((1, 1), (1, 1)), (1, 1))
KERNEL = sparse_ops.Product((2, 8, 8, 32), (3, 3, 32, 32), density=0.1, window=SAME)
compiled = pytest.mark.skipif(sparse_ops.backend() == "jax", reason="there is no compiled kernel")


@pytest.fixture
def avx2(monkeypatch):
    """Whatever there is, the kernel is one of AVX2."""
    monkeypatch.setattr(_crossover._kernel, "backend", lambda: "avx2")


@pytest.fixture
def figures(monkeypatch):
    """Products that were measured, each of which comes out as 3.5."""
    asked = []

    def speed_up(product):
        asked.append(product)
        return 3.5

    monkeypatch.setattr(_measurement, "speed_up", speed_up)
    return asked


def test_product_counts_rows_and_operations():
    assert (LAYER.kind, LAYER.rows, LAYER.flops) == ("matmul", 4, 2 * 4 * 128 * 64)
    assert (KERNEL.kind, KERNEL.rows) == ("conv", 2 * 8 * 8)
    window = Window((2, 3), ((0, 0), (1, 2)), (3, 1))
    strided = sparse_ops.Product((2, 11, 13, 4), (3, 2, 4, 5), window=window)
    w = sparse_ops.SparseMatrix.from_dense(np.ones(strided.w, np.float32))
    y = jax.eval_shape(lambda x: sparse_ops.conv(x, w, **window._asdict()), jnp.zeros(strided.x))
    assert strided.rows == y.size / 5
    assert sparse_ops.Product((2, 3, 3, 4), (5, 5, 4, 5), window=strided.window).rows == 0


@pytest.mark.usefixtures("avx2")
@pytest.mark.parametrize("rows", [1, 5, 8, 64, 100, 256, 4000])
def test_shipped_falls_with_density_and_small_weights(rows):
    large = [
        sparse_ops.shipped(sparse_ops.Product((rows, 4096), (4096, 4096), density))
        for density in (0.0, 0.01, 0.03, 0.1, 0.3, 0.5, 1.0)
    ]
    assert large == sorted(large, reverse=True)
    assert large[3] > 3
    assert large[-1] < 1.05
    small = sparse_ops.shipped(sparse_ops.Product((rows, 128), (128, 128), 0.1))
    assert 0 < small < large[3]


@pytest.mark.usefixtures("avx2")
def test_shipped_is_near_its_table():
    for density, figures in zip(_crossover._DENSITIES, _crossover._TABLES["avx2"], strict=True):
        for rows, figure in zip(_crossover._ROWS, figures, strict=True):
            product = sparse_ops.Product((rows, 4096), (4096, 4096), density)
            assert sparse_ops.shipped(product) == pytest.approx(figure, rel=0.1)


def test_shipped_knows_every_backend(monkeypatch):
    for backend in ("avx512", "avx2", "plain"):
        monkeypatch.setattr(_crossover._kernel, "backend", lambda backend=backend: backend)
        assert sparse_ops.shipped(LAYER) > 0
        assert sparse_ops.shipped(KERNEL) > 0


@pytest.mark.parametrize("make", ["shipped", "measured"])
def test_nothing_gains_without_a_kernel_or_a_cpu(monkeypatch, tmp_path, figures, make):
    crossover = sparse_ops.shipped if make == "shipped" else sparse_ops.measured(tmp_path / "c")
    monkeypatch.setenv("SPARSEJAX_BACKEND", "jax")
    assert crossover(LAYER) == 0
    assert "'jax'" in _crossover.never_here()
    monkeypatch.setattr(_crossover._kernel, "backend", lambda: "avx2")
    assert _crossover.never_here() == ""
    assert crossover(sparse_ops.Product((1, 20), (20, 20), 0.01)) == 0
    assert crossover(sparse_ops.Product((0, 128), (128, 64), 0.1)) == 0
    monkeypatch.setattr(_crossover.jax, "default_backend", lambda: "gpu")
    assert crossover(LAYER) == 0
    assert "not on gpu" in _crossover.never_here()
    assert not figures


@compiled
@pytest.mark.parametrize("product", [LAYER, KERNEL], ids=["matmul", "conv"])
def test_measured_times_the_product(tmp_path, product):
    figure = sparse_ops.measured(tmp_path / "c.json")(product)
    assert 0.01 < figure < 100


@compiled
@pytest.mark.parametrize(
    "change",
    [{"dtype": "bfloat16"}, {"block": 8}, {"transposed": True}, {"density": 0.0}],
    ids=lambda change: next(iter(change)),
)
def test_measured_products_are_of_every_kind(monkeypatch, change):
    """What is timed has these sizes; the timing itself is left out."""
    monkeypatch.setattr(_measurement, "_MOST", 1)
    product = sparse_ops.Product(**(LAYER.__dict__ | change))
    assert _measurement.speed_up(product) > 0


def test_dense_and_sparse_programs_agree(monkeypatch):
    """They are given the same weights, so that they compute the same."""
    answers = []
    monkeypatch.setattr(
        _measurement,
        "_taking_turns",
        lambda programs: (
            answers.extend(p() for p in programs)
            or [
                [2.0],
                [1.0],
            ]
        ),
    )
    products = [LAYER, sparse_ops.Product((4, 64), (64, 80), 0.3, transposed=True, block=8)]
    for product in products:
        assert _measurement.speed_up(product) == 2
        dense, sparse = answers[-2:]
        assert len(dense) == len(sparse) > 1
        for one, other in zip(dense, sparse, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("avx2")
def test_measured_remembers(tmp_path, figures):
    file = tmp_path / "folder" / "c.json"
    crossover = sparse_ops.measured(file)
    assert crossover(LAYER) == crossover(LAYER) == 3.5
    assert len(figures) == 1
    assert sparse_ops.measured(str(file))(LAYER) == 3.5
    assert len(figures) == 1
    assert [p.name for p in file.parent.iterdir()] == ["c.json"]
    sparse_ops.measured(file)(KERNEL)
    assert len(figures) == 2
    assert len(next(iter(json.loads(file.read_text())["speed_ups"].values()))) == 2


@pytest.mark.usefixtures("avx2")
def test_measured_remembers_of_each_machine_its_own(monkeypatch, tmp_path, figures):
    file = tmp_path / "c.json"
    sparse_ops.measured(file)(LAYER)
    monkeypatch.setenv("SPARSEJAX_NUM_THREADS", "1")
    sparse_ops.measured(file)(LAYER)
    monkeypatch.setattr(_memory, "processor", lambda: "another one")
    sparse_ops.measured(file)(LAYER)
    assert len(figures) == 3
    assert len(json.loads(file.read_text())["speed_ups"]) == 3


@pytest.mark.usefixtures("avx2")
def test_the_file_is_in_the_users_cache(monkeypatch, tmp_path, figures):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sparse_ops.measured()(LAYER)
    assert (tmp_path / "cache" / "sparsejax" / "crossover.json").exists()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    sparse_ops.measured()(LAYER)
    assert (tmp_path / "home" / ".cache" / "sparsejax" / "crossover.json").exists()
    assert len(figures) == 2


DAMAGED = {
    "no JSON": "{",
    "no text": b"\xff\xfe\x00",
    "a list": "[]",
    "another format": '{"format": 99, "speed_ups": {}}',
    "no figures": '{"format": 1}',
    "words": '{"format": 1, "speed_ups": {"a": {"b": "fast"}}}',
    "negative": '{"format": 1, "speed_ups": {"a": {"b": -1}}}',
    "not finite": '{"format": 1, "speed_ups": {"a": {"b": NaN}}}',
    "no table": '{"format": 1, "speed_ups": {"a": 3}}',
}


@pytest.mark.usefixtures("avx2")
@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_named_and_made_anew(tmp_path, figures, content):
    file = tmp_path / "c.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match=re.escape(repr(str(file))) + ", is damaged .* made anew"):
        assert sparse_ops.measured(file)(LAYER) == 3.5
    assert sparse_ops.measured(file)(LAYER) == 3.5
    assert len(figures) == 1


@pytest.mark.usefixtures("avx2")
def test_a_folder_that_cannot_be_written_does_no_harm(tmp_path, figures):
    (tmp_path / "file").write_text("")
    crossover = sparse_ops.measured(tmp_path / "file" / "c.json")
    assert crossover(LAYER) == crossover(LAYER) == 3.5
    assert len(figures) == 1
    if os.getuid():  # root may write anywhere
        tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
        assert sparse_ops.measured(tmp_path / "c.json")(LAYER) == 3.5


def test_measured_takes_fewer_rows_where_more_change_nothing():
    def rows(first, *w):
        return _measurement.representative(sparse_ops.Product((first, w[0]), w, 0.1)).x[0]

    assert rows(1, 4096, 4096) == 1
    assert rows(64, 4096, 4096) == 64
    assert rows(10**6, 4096, 4096) == 256
    assert rows(10**6, 64, 64) == pytest.approx(244141)
    assert _measurement.representative(KERNEL) == KERNEL
    rounded = _measurement.representative(sparse_ops.Product((1, 64), (64, 64), 0.12345))
    assert rounded.density == 0.12


@pytest.mark.usefixtures("as_users_have_it")
def test_cache_must_be_a_path():
    with pytest.raises(TypeError, match="`cache` must be the path of a file, or None, got 3; for"):
        sparse_ops.measured(3)


@compiled
def test_measured_times_programs_even_while_something_is_traced(tmp_path, monkeypatch):
    taken = []
    speed_up = _crossover._measurement.speed_up

    def watched(product):
        taken.append(jnp.ones(()) + 1)
        return speed_up(product)

    monkeypatch.setattr(_crossover._measurement, "speed_up", watched)
    crossover = sparse_ops.measured(tmp_path / "crossover.json")
    jaxpr = jax.make_jaxpr(lambda x: x * (crossover(LAYER) > 0))(1.0)
    assert not isinstance(taken[0], jax.core.Tracer)
    assert len(jaxpr.eqns) == 1
