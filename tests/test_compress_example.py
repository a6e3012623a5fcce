"""`examples/compress.py` on a few hundred digits: one run, looked at from several sides."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import datasets, quantization, reports, storage

EXAMPLE = Path(__file__).parent.parent / "examples" / "compress.py"

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("quickly")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, quickly):
    spec = importlib.util.spec_from_file_location("compress_example", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    digits, out = datasets.mnist_subset(), tmp_path_factory.mktemp("out")
    few = {"train_images": 640, "train_labels": 640, "test_images": 100, "test_labels": 100}
    digits = digits._replace(**{f: getattr(digits, f)[:n] for f, n in few.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example.datasets, "mnist", lambda data_dir: digits)
        # What `sparsify` measures has tests of its own.
        patch.setattr(example.sparse_ops, "sparsify", lambda apply, params, *_: (apply, params))
        patch.setattr(example, "SERVED", 4)
        patch.setattr(sys, "argv", ["compress.py", "--epochs", "2", "--out", str(out)])
        example.main(example.arguments())
    report = reports.Report.from_json((out / "compress.json").read_text())
    return out, {row.name: row for row in report.rows}


def test_every_stage_is_a_row(finished):
    out, rows = finished
    assert list(rows) == [
        *("dense", "pruned", "shrunk", "distilled", "int8", "4 bits", "read back"),
    ]
    assert all(row.latency > 0 and 0 <= row.accuracy <= 1 for row in rows.values())
    assert (out / "compress.png").stat().st_size > 10_000


def test_sizes_fall(finished):
    _, rows = finished
    assert rows["pruned"].nonzeros == round(0.05 * rows["dense"].nonzeros)
    assert rows["shrunk"].nonzeros < rows["pruned"].nonzeros
    sizes = [rows[name].bytes for name in ("dense", "pruned", "distilled", "int8", "4 bits")]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 40 * sizes[-1]


def test_zeros_stay_and_the_file_is_what_was_written(finished):
    """The masks of the stored network are those of the distilled one."""
    out, rows = finished
    learned = storage.load(out / "compress-distilled.safetensors").params
    halved = jax.tree.map(lambda w: jnp.asarray(w, jnp.bfloat16 if w.ndim == 1 else None), learned)
    like = quantization.share(halved, bits=4)
    read = quantization.dequantize(
        storage.load(out / "compress-4-bits.safetensors", like=like).params
    )
    for a, b in zip(jax.tree.leaves(learned), jax.tree.leaves(read), strict=True):
        if a.ndim > 1:
            assert np.array_equal(a == 0, b == 0)
    assert rows["read back"].accuracy == rows["4 bits"].accuracy
    assert rows["read back"].nonzeros == rows["distilled"].nonzeros
