"""Rows and tables: what is measured, what is shown, what is written and read again."""

import csv
import functools
import io
import itertools
import json
import math
import os
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from sparsejax import filters, masking, pruning, quantization, reports, storage
from sparsejax.reports import _formats
from sparsejax.reports._row import DERIVED, FIELDS

pytestmark = pytest.mark.usefixtures("quickly")

IMAGE = jax.ShapeDtypeStruct((1, 784), jnp.float32)
WEIGHTS, ALL = 266_200, 266_610  # of LeNet-300-100


@functools.cache
def lenet():
    """LeNet-300-100, `apply(params, x)`, and masks that keep 5 % of the weights."""
    rng, widths = np.random.default_rng(0), (784, 300, 100, 10)
    params, masks = {}, {}
    for i, (n, m) in enumerate(itertools.pairwise(widths)):
        kernel = rng.normal(size=(n, m)).astype(np.float32)
        kept = np.zeros(n * m, bool)
        kept[rng.permutation(n * m)[: n * m // 20]] = True
        params[f"dense{i + 1}"] = {"bias": np.ones(m, np.float32), "kernel": kernel}
        masks[f"dense{i + 1}"] = {"bias": np.array(True), "kernel": kept.reshape(n, m)}

    def apply(params, x):
        for layer in params.values():
            x = jnp.maximum(x @ layer["kernel"] + layer["bias"][None], 0)
        return x

    return apply, params, masks


# Rows that are measured.


def test_row_of_a_dense_network():
    apply, params, _ = lenet()
    row = reports.row("dense", params, apply_fn=apply, inputs=IMAGE, accuracy=0.98, epochs=3)
    assert (row.name, row.sparsity, row.nonzeros, row.size) == ("dense", 0.0, WEIGHTS, WEIGHTS)
    assert row.flops == row.dense_flops == 2 * WEIGHTS
    assert (row.bytes, row.dense_bytes) == (None, 4 * ALL)
    assert (row.accuracy, row.error, row.latency, row["epochs"]) == (0.98, None, None, 3)
    assert row.compression == row.flops_factor == row.density == 1
    assert row.bytes_factor is None


def test_row_of_a_pruned_network():
    apply, params, masks = lenet()
    row = reports.row("pruned", params, masks, apply_fn=apply, inputs=IMAGE)
    assert (row.nonzeros, row.sparsity) == (13_310, 0.95)
    assert (row.flops, row.dense_flops) == (2 * 13_310, 2 * WEIGHTS)
    assert row.compression == row.flops_factor == 20
    zeroed = reports.row("pruned", masking.apply_masks(params, masks), apply_fn=apply, inputs=IMAGE)
    assert zeroed == row


def test_row_counts_what_is_prunable():
    _, params, masks = lenet()
    row = reports.row("all", params, masks, prunable=filters.floating)
    assert (row.size, row.nonzeros) == (ALL, ALL - (WEIGHTS - 13_310))


def test_row_refers_to_the_dense_network():
    """Channels that were removed count as zeros."""
    dense = reports.row("dense", {"w": jnp.ones((8, 10)), "b": jnp.ones(10)})
    small = {"w": jnp.ones((4, 10)).at[0].set(0.0), "b": jnp.ones(10)}
    row = reports.row("shrunk", small, dense=dense)
    assert (row.size, row.nonzeros, row.sparsity) == (80, 30, 1 - 30 / 80)
    assert (row.compression, row.dense_bytes) == (80 / 30, 4 * 90)


def test_row_has_the_bytes_of_a_file_or_a_folder(tmp_path):
    _, params, masks = lenet()
    file = tmp_path / "folder" / "params.safetensors"
    file.parent.mkdir()
    storage.save(file, masking.apply_masks(params, masks), masks)
    (file.parent / "more").write_bytes(b"four")
    row = reports.row("stored", params, masks, file=str(file))
    assert row.bytes == os.path.getsize(file)
    assert row.bytes_factor == 4 * ALL / row.bytes > 10
    assert reports.row("folder", params, file=file.parent).bytes == row.bytes + 4


def test_row_takes_several_inputs():
    params = {"w": jnp.eye(4)}
    row = reports.row(
        "two", params, apply_fn=lambda p, x, y: x @ p["w"] @ y, inputs=(jnp.ones(4), jnp.ones(4))
    )
    assert (row.dense_flops, row.flops) == (2 * 16 + 2 * 4, 2 * 4 + 2 * 4)


@pytest.mark.parametrize("bits", [8, 4])
def test_row_of_quantized_weights(bits, tmp_path):
    w = jnp.where(jnp.arange(64).reshape(8, 8) % 4 == 0, jnp.arange(64.0).reshape(8, 8) + 9, 0)
    params = {"b": jnp.ones(8), "w": w}
    quantized = quantization.quantize(params, bits=bits)
    storage.save(tmp_path / "file", quantized)
    measured = functools.partial(
        reports.row, "a", apply_fn=lambda p, x: x @ p["w"], inputs=w[:1], file=tmp_path / "file"
    )
    row = measured(quantized)
    assert row == measured(quantization.dequantize(quantized))
    assert (row.size, row.nonzeros, row.dense_bytes) == (64, 16, 4 * 72)
    assert (row.dense_flops, row.flops) == (2 * 64, 2 * 16)
    leaf = reports.layers(quantized, file=tmp_path / "file").rows[1]
    assert (leaf.name, leaf.nonzeros) == ("w", 16) and 0 < leaf.bytes < row.bytes


def test_row_of_other_trees():
    model = eqx.nn.MLP(3, 2, 8, 1, key=jax.random.key(0))
    assert reports.row("equinox", model).size == 24 + 16
    narrow = {"w": jnp.eye(4, dtype=jnp.bfloat16), "n": jnp.arange(3), "none": None}
    row = reports.row("narrow", narrow)
    assert (row.size, row.nonzeros, row.dense_bytes) == (16, 4, 2 * 16 + 4 * 3)
    empty = reports.row("empty", {"w": jnp.ones((0, 3))})
    assert (empty.size, empty.sparsity) == (0, 0.0) and math.isnan(empty.compression)


# Rows by hand.


def test_cells_are_python_numbers():
    row = reports.Row(
        "seeds",
        nonzeros=np.int64(3),
        error=jnp.bfloat16(0.5),
        accuracy=np.array([0.25, 0.5]),
        latency=[jnp.float32(1.0), 2],
        more={"one": [7], "text": "yes", "flag": True},
    )
    assert (row.nonzeros, row.error, row.accuracy, row.latency) == (3, 0.5, (0.25, 0.5), (1.0, 2))
    assert row.more == {"one": 7, "text": "yes", "flag": True}
    assert [type(x) for x in (row.nonzeros, row.error, *row.latency)] == [int, float, float, int]


def test_factors_are_taken_seed_by_seed():
    row = reports.Row("seeds", size=100, nonzeros=[10, 20], sparsity=[0.9, 0.8], bytes=[1, 2, 3])
    assert row.compression == (10.0, 5.0)
    assert row.density == pytest.approx((0.1, 0.2))
    assert reports.Row("", dense_bytes=[6, 6], bytes=[1, 2, 3]).bytes_factor is None
    assert reports.Row("", size=5, nonzeros=0).compression == math.inf


def test_rows_of_one_name_are_pooled():
    rows = [
        reports.Row("b", nonzeros=3, error=0.25, more={"how": "snip"}),
        reports.Row("a", nonzeros=5),
        reports.Row("b", nonzeros=3, error=0.75, latency=1.0, more={"how": "snip", "epochs": 9}),
        reports.Row("b", nonzeros=3, error=[0.5, 1.0]),
    ]
    first, second = reports.Report(rows).select("error").pooled().rows
    assert first == reports.Row(
        "b",
        nonzeros=3,
        error=(0.25, 0.75, 0.5, 1.0),
        latency=1.0,
        more={"how": "snip", "epochs": 9},
    )
    assert second == rows[1]


def test_pooling_averages_no_seeds():
    rows = [reports.Row("a", error=e, more={"seed": i}) for i, e in enumerate((0.25, 0.75))]
    pooled = reports.Report(rows).select("error", "seed").pooled()
    assert pooled == reports.Report([reports.Row("a", error=(0.25, 0.75))], ["error"])


# What people see.


def shown(column, cell):
    row = (
        reports.Row("", **{column: cell})
        if column in FIELDS
        else reports.Row("", more={column: cell})
    )
    return _formats.shown(row[column], column)


@pytest.mark.parametrize(
    ("column", "cell", "text"),
    [
        ("sparsity", 0.95, "95.00"),
        ("sparsity", 0.0, "0.00"),
        ("sparsity", 1.0, "100.00"),
        ("sparsity", 0.99999, ">99.99"),
        ("sparsity", 0.00001, "<0.01"),
        ("nonzeros", 179_926, "179,926"),
        ("nonzeros", [10, 20], "15 ± 7"),
        ("flops", 5_171_920, "5.17 M"),
        ("flops", 532, "532"),
        ("flops", 0, "0"),
        ("flops", 4_100_000_000, "4.10 G"),
        ("flops", [5_171_920, 5_271_920], "5.22 ± 0.071 M"),
        ("bytes", 1_066_440, "1,066,440"),
        ("accuracy", 0.9831, "98.31"),
        ("accuracy", [0.983, 0.985, 0.984], "98.40 ± 0.10"),
        ("accuracy", math.nan, "nan"),
        ("error", [0.01, math.nan], "nan ± nan"),
        ("latency", 0.00525, "5.25"),
        ("latency", 1.25, "1,250"),
        ("latency", 0.0000021, "0.00210"),
        ("epochs", 1200, "1,200"),
        ("gain", -0.123456, "-0.1235"),
        ("gain", 0.5, "0.5"),
        ("gain", 0.0, "0"),
        ("gain", 1e-9, "1.000e-09"),
        ("gain", 12345.678, "12,346"),
        ("gain", math.inf, "inf"),
        ("gain", [0.1, 0.2], "0.150 ± 0.071"),
        ("gain", [3, 3.0, 3], "3 ± 0"),
        ("how", "SNIP", "SNIP"),
        ("done", True, "yes"),
        ("done", None, "–"),
    ],
)
def test_numbers_are_shown_as_people_read_them(column, cell, text):
    assert shown(column, cell) == text


@pytest.mark.parametrize(("factor", "text"), [(12.04, "12.0x"), (1, "1.00x"), (133.4, "133x")])
def test_factors_are_shown_with_an_x(factor, text):
    row = reports.Row("", size=1000 * factor, nonzeros=1000)
    assert _formats.shown(row.compression, "compression") == text


def test_deviation_is_that_of_numpy():
    values = np.random.default_rng(0).random(5)
    mean, spread = _formats.summary(reports.Row("", accuracy=values).accuracy)
    np.testing.assert_allclose([mean, spread], [values.mean(), values.std(ddof=1)], rtol=1e-12)


REPORT = reports.Report(
    [
        reports.Row("dense", nonzeros=1000, size=1000, error=[0.015, 0.017], latency=0.002),
        reports.Row("a|b\nc", nonzeros=50, size=1000, sparsity=0.95, more={"how": "by [bold]"}),
    ]
)


def test_text_is_aligned():
    assert str(REPORT.select("nonzeros", "compression", "how")).splitlines() == [
        "       nonzeros  compression  how",
        "dense     1,000        1.00x  –",
        "a|b c        50        20.0x  by [bold]",
    ]
    lines = str(reports.Report([REPORT.rows[0]])).splitlines()
    assert lines == [
        "       nonzeros  compression     error, %  latency, ms",
        "dense     1,000        1.00x  1.60 ± 0.14         2.00",
    ]


def test_markdown_is_a_table_whatever_the_names_are():
    assert REPORT.markdown().splitlines() == [
        "| | sparsity, % | nonzeros | compression | error, % | latency, ms | how |",
        "|---|---|---|---|---|---|---|",
        "| dense | – | 1,000 | 1.00x | 1.60 ± 0.14 | 2.00 | – |",
        "| a\\|b c | 95.00 | 50 | 20.0x | – | – | by [bold] |",
    ]


def test_rich_draws_the_same():
    console = Console(file=io.StringIO(), width=120)
    console.print(REPORT)
    console.print(REPORT.rich("a title"))
    text = console.file.getvalue()
    assert text.count("1.60 ± 0.14") == text.count("by [bold]") == 2
    assert text.count("a title") == 1


def test_rich_has_a_word_of_the_title_in_each_line():
    console = Console(file=io.StringIO(), width=60)
    console.print(REPORT.select("nonzeros", "compression", "error", "latency"))
    assert [line.rstrip() for line in console.file.getvalue().splitlines()] == [
        "                                   error,  latency,",
        "       nonzeros  compression            %        ms",
        "───────────────────────────────────────────────────",
        "dense     1,000        1.00x  1.60 ± 0.14      2.00",
        "a|b c        50        20.0x            –         –",
    ]


def test_columns_are_those_that_some_row_has_or_that_are_selected():
    assert REPORT.shown == ("sparsity", "nonzeros", "compression", "error", "latency", "how")
    assert REPORT.select("size", "density").shown == ("size", "density")
    assert REPORT.select("size").select().shown == REPORT.shown
    assert reports.Report().shown == () and str(reports.Report()) == ""


# What is written.


def test_csv_is_in_full_precision():
    rows = list(csv.DictReader(io.StringIO(REPORT.csv())))
    assert list(rows[0]) == [
        "name", "sparsity", "nonzeros", "size", "error", "error_std", "latency", "density",
        "compression", "how",
    ]  # fmt: skip
    assert [row["name"] for row in rows] == ["dense", "a|b\nc"]
    assert float(rows[0]["error"]) == 0.016
    assert float(rows[0]["error_std"]) == np.std([0.015, 0.017], ddof=1)
    assert (rows[1]["error"], rows[1]["how"], rows[1]["compression"]) == ("", "by [bold]", "20.0")
    assert REPORT.select("size").csv().splitlines()[0] == "name,size"


def test_json_has_what_was_measured_and_what_follows():
    content = json.loads(REPORT.json(indent=2))
    assert content["rows"][1] == {
        "name": "a|b\nc", "sparsity": 0.95, "nonzeros": 50, "size": 1000, "density": 1 - 0.95,
        "compression": 20.0, "how": "by [bold]",
    }  # fmt: skip
    assert content["rows"][0]["error"] == [0.015, 0.017]
    assert "\n" not in REPORT.json()


numbers = st.floats(allow_nan=False) | st.integers(-(2**63), 2**63)
cells = numbers | st.lists(numbers, min_size=2, max_size=3) | st.text() | st.booleans() | st.none()
names = st.text().filter(lambda name: name not in ("name", "more", *FIELDS, *DERIVED))
fields = st.fixed_dictionaries(
    {"name": st.text(), "more": st.dictionaries(names, cells, max_size=2)},
    optional={
        "nonzeros": st.integers(0, 2**63),
        "error": st.floats(0, 1) | st.lists(st.floats(0, 1), min_size=1, max_size=3),
        "latency": st.floats(0, allow_nan=False),
    },
)


@given(rows=st.lists(fields, max_size=3))
def test_json_is_read_again(rows):
    report = reports.Report([reports.Row(**row) for row in rows])
    assert reports.Report.from_json(report.json()) == report
    assert len(str(report).splitlines()) <= 1 + len(rows)
    assert len(report.markdown().splitlines()) == 2 + len(rows)
    assert len(list(csv.reader(io.StringIO(report.csv(), newline="")))) == 1 + len(rows)


def test_json_keeps_nan_columns_and_selection():
    report = reports.Report([reports.Row("", error=math.nan, more={"a": [math.inf, 1]})], ["a"])
    again = reports.Report.from_json(report.json())
    assert math.isnan(again.rows[0].error) and again.rows[0]["a"] == (math.inf, 1)
    assert again.shown == ("a",)


# Tables of leaves and of rounds.


def test_layers_have_a_row_each_and_one_for_all(tmp_path):
    apply, params, masks = lenet()
    storage.save(tmp_path / "file", masking.apply_masks(params, masks), masks)
    table = reports.layers(params, masks, apply_fn=apply, inputs=IMAGE, file=tmp_path / "file")
    rows = {row.name: row for row in table.rows}
    assert list(rows) == [f"dense{i}.{leaf}" for i in (1, 2, 3) for leaf in ("bias", "kernel")] + [
        "total"
    ]
    kernel, total = rows["dense1.kernel"], rows["total"]
    kept = int(masks["dense1"]["kernel"].sum())
    assert (kernel.nonzeros, kernel.size, kernel["shape"]) == (kept, 235_200, "784x300")
    assert (kernel.flops, kernel.dense_flops) == (2 * kept, 2 * 235_200)
    assert rows["dense1.bias"].flops is None
    assert kernel.bytes < kernel.dense_bytes / 10
    assert total.bytes == os.path.getsize(tmp_path / "file") > sum(r.bytes for r in table.rows[:-1])
    for field in ("nonzeros", "size", "flops", "dense_flops", "dense_bytes"):
        assert getattr(total, field) == sum(getattr(row, field) or 0 for row in table.rows[:-1])
    assert total.size == ALL
    assert table.shown == (
        "shape", "size", "nonzeros", "density", "flops", "dense_bytes", "bytes",
    )  # fmt: skip


def test_layers_find_the_parts_of_a_leaf_in_a_file(tmp_path):
    parts = {"w": {"codes": np.zeros((4, 4), np.int8), "book": np.ones(3, np.float32)}}
    storage.save(tmp_path / "file", parts)
    stored = {leaf.name: leaf.bytes for leaf in storage.contents(tmp_path / "file").leaves}
    row = reports.layers({"w": jnp.ones((4, 4)), "v": jnp.ones(3)}, file=tmp_path / "file").rows[1]
    assert row.bytes == stored["w.codes"] + stored["w.book"]


def test_layers_of_nothing_and_of_a_bare_array():
    assert [row.name for row in reports.layers({}).rows] == ["total"]
    assert [row["shape"] for row in reports.layers(jnp.float32(1)).rows] == ["()", None]


def test_history_is_a_row_for_every_round():
    record = {"sparsity": 0.5, "nonzeros": 5, "size": 10, "seconds": 2.0}
    first = pruning.Record(number=0, metrics={}, **record)
    second = pruning.Record(number=1, metrics={"error": 0.1, "loss": 2.5}, **record)
    table = reports.history([first, second])
    assert [row.name for row in table.rows] == ["round 0", "round 1"]
    row = table.rows[1]
    assert (row.error, row["loss"], row["seconds"], row.compression) == (0.1, 2.5, 2.0, 2.0)


# Time.


def test_latency_is_the_median_until_outputs_are_ready(monkeypatch):
    """A clock that the function itself moves."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    spent = iter([9.0, *[0.1, 0.2, 0.1, 0.7, 0.1, 0.3]])

    def work(x):
        clock[0] += next(spent)
        return x

    assert reports.latency(work, 1, seconds=0.5) == pytest.approx(0.3)
    assert next(spent, None) is None  # One to compile, then three pairs: time was up.


def test_latencies_take_turns():
    calls = []
    functions = {name: functools.partial(calls.append, name) for name in "ab"}
    times = reports.latencies(functions, seconds=1e-9)
    assert list(times) == ["a", "b"] and all(t >= 0 for t in times.values())
    assert calls[:2] == ["a", "b"] and calls[2::2] == calls[3::2]  # Compiled; then two and two.
    assert [sorted(calls[i : i + 4]) for i in (2, 6, 10)] == [list("aabb")] * 3


# Errors.

W = np.ones((2, 2), np.float32)
ROW = reports.Row("one", error=0.5)

ERRORS = {
    "a percentage": (
        lambda: reports.Row("", error=1.6),
        ValueError,
        r"`error` must be in \[0, 1\] \(a fraction, not a percentage\), got 1\.6",
    ),
    "a percentage among seeds": (
        lambda: reports.row("", W, accuracy=[0.9, 98.0]),
        ValueError,
        r"`accuracy` must be in \[0, 1\] .*, got 98\.0",
    ),
    "negative bytes": (
        lambda: reports.Row("", bytes=-1),
        ValueError,
        r"`bytes` must be >= 0, got -1",
    ),
    "a text where a number belongs": (
        lambda: reports.Row("", latency="5 ms"),
        TypeError,
        r"`latency` must be a number, got '5 ms'; `more` has room for texts",
    ),
    "a name that is none": (
        lambda: reports.Row(3),
        TypeError,
        r"`name` must be a text, got 3",
    ),
    "a matrix of seeds": (
        lambda: reports.Row("", accuracy=W),
        TypeError,
        r"`accuracy` must hold real numbers, got array\(\[1",
    ),
    "no seeds": (
        lambda: reports.Row("", more={"loss": []}),
        ValueError,
        r"`more\['loss'\]` must have a value for each seed, got none",
    ),
    "a complex number": (
        lambda: reports.Row("", more={"loss": np.complex64(1j)}),
        TypeError,
        r"`more\['loss'\]` must hold real numbers",
    ),
    "a function": (
        lambda: reports.row("", W, latency=print),
        TypeError,
        r"`latency` must be a number, several of them, or None, got <built-in",
    ),
    "a taken name": (
        lambda: reports.row("", W, compression=3.0),
        ValueError,
        r"`more` must have names of its own, got 'compression', which is a column of every row",
    ),
    "more that is no dict": (
        lambda: reports.Row("", more=[("a", 1)]),
        TypeError,
        r"`more` must be a dict by column, got \[\('a', 1\)\]",
    ),
    "traced": (
        lambda: jax.jit(lambda w: reports.row("", {"w": w}).size)(W),
        TypeError,
        r"`params` must hold arrays whose entries are known, got float32\[2,2\] at 'w' without",
    ),
    "shapes": (
        lambda: reports.layers({"w": jax.ShapeDtypeStruct((2, 2), jnp.float32)}),
        TypeError,
        r"`params` must hold arrays whose entries are known, got float32\[2,2\] at 'w' without",
    ),
    "nothing prunable": (
        lambda: reports.row("", {"b": W[0]}),
        ValueError,
        r"`prunable` must select at least one leaf, got none of 1 \('b' float32\[2\]\)",
    ),
    "a function without inputs": (
        lambda: reports.row("", W, apply_fn=lambda w, x: x @ w),
        ValueError,
        r"`inputs` must be given with `apply_fn`: an example",
    ),
    "inputs without a function": (
        lambda: reports.layers(W, inputs=W),
        ValueError,
        r"`apply_fn` must be given with `inputs`: the function",
    ),
    "dense that is a tree": (
        lambda: reports.row("", W, dense={"w": W}),
        TypeError,
        r"`dense` must be a reports\.Row, got \{'w'",
    ),
    "dense that is smaller": (
        lambda: reports.row("", W, dense=reports.row("", W[:1])),
        ValueError,
        r"`dense` must be the network that this one was made of, got 2 entries, fewer than the 4",
    ),
    "a file that is none": (
        lambda: reports.row("", W, file=3),
        TypeError,
        r"`file` must be a path, got 3",
    ),
    "a file that is missing": (
        lambda: reports.row("", W, file="/no/such/file"),
        FileNotFoundError,
        r"/no/such/file",
    ),
    "rows that are none": (
        lambda: reports.Report([{"name": "one"}]),
        TypeError,
        r"`rows` must be reports\.Row, got \{'name': 'one'\}",
    ),
    "a single row": (
        lambda: reports.Report(ROW),
        TypeError,
        r"`rows` must be a list of rows, got Row\(name='one'",
    ),
    "an unknown column": (
        lambda: reports.Report([ROW]).select("erorr"),
        ValueError,
        r"`columns` must be among sparsity, .*, latency, density, .*, got 'erorr'",
    ),
    "a column that is a text": (
        lambda: reports.Report([ROW], "error"),
        TypeError,
        r"`columns` must be a list of names, got 'error'",
    ),
    "texts that differ": (
        lambda: reports.Report(
            [reports.Row("a", more={"how": x}) for x in ("snip", "grasp")]
        ).pooled(),
        ValueError,
        r"rows of one name must have one text in a column, got \['snip', 'grasp'\] in 'how' of 'a'",
    ),
    "no JSON": (
        lambda: reports.Report.from_json("{"),
        ValueError,
        r"`text` must be the JSON of a report: Expecting",
    ),
    "other JSON": (
        lambda: reports.Report.from_json("[1]"),
        ValueError,
        r"`text` must be JSON that Report\.json wrote; its format is another",
    ),
    "a later version": (
        lambda: reports.Report.from_json(REPORT.json().replace('"version": 1', '"version": 2')),
        ValueError,
        r"`text` must have version 1, got 2; read it with the release",
    ),
    "damaged JSON": (
        lambda: reports.Report.from_json(REPORT.json().replace('"name"', '"nome"')),
        ValueError,
        r"`text` must be a whole report, but it is damaged: KeyError\('name'\)",
    ),
    "JSON with a percentage": (
        lambda: reports.Report.from_json(REPORT.json().replace("0.95", "95")),
        ValueError,
        r"`text` must be a whole report, but it is damaged: `sparsity` must be in \[0, 1\]",
    ),
    "records that are none": (
        lambda: reports.history([ROW]),
        TypeError,
        r"`records` must be those of a procedure .*, got Row\(.* without 'number'",
    ),
    "latency of no function": (
        lambda: reports.latency(3),
        TypeError,
        r"`function` must be a function \(\*args\) -> outputs, got 3",
    ),
    "latencies of a list": (
        lambda: reports.latencies([print]),
        TypeError,
        r"`functions` must be a dict of functions by name, got \[",
    ),
    "latencies of no functions": (
        lambda: reports.latencies({"a": 3}),
        TypeError,
        r"`functions\['a'\]` must be a function",
    ),
    "latency of no time": (
        lambda: reports.latency(print, seconds=0),
        ValueError,
        r"`seconds` must be > 0 and finite, got 0",
    ),
}


@pytest.mark.usefixtures("as_users_have_it")
@pytest.mark.parametrize("name", ERRORS)
def test_bad_calls_say_what_is_wrong(name):
    call, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        call()
