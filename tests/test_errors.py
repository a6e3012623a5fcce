"""Every bad call says which argument is wrong, what was got, where, and what is right.

One row a call: `(the call, the type of the error, a pattern of its message)`. The arrays of the
rows are NumPy's, which stay concrete inside a jitted function.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import sparsejax as sj
from sparsejax import (
    allocation,
    criteria,
    datasets,
    filters,
    granularities,
    masking,
    models,
    penalties,
    selection,
    transforms,
)

pytestmark = pytest.mark.usefixtures("as_users_have_it")

W = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
B = np.ones(2, np.float32)
PARAMS = {"net": {"b": B, "w": W}}
GRADS = {"net": {"b": -B, "w": -W}}
MASKS = {"net": {"b": np.array(True), "w": W > 1}}
NAN = {"net": {"b": B, "w": np.array([[np.nan, 1.0]], np.float32)}}
X = np.ones((3, 2), np.float32)
IMAGES = np.ones((2, 12, 12, 1), np.float32)
NO_FOLDER = "/no/such/folder"

L1 = penalties.l1(0.1)
SGD = optax.sgd(0.1)
CNN = models.CNN((12, 12, 1), rngs=nnx.Rngs(0))
APPLY, CNN_PARAMS = models.functional(CNN)


def net(**leaves):
    """`PARAMS` with other leaves."""
    return {"net": PARAMS["net"] | leaves}


def abstract(f, *shape):
    """Calls a function of an array that is too large to exist."""
    return jax.eval_shape(f, jax.ShapeDtypeStruct(shape, np.float32))


def linear(params, x):
    return x @ params["net"]["w"]


def update(transform, updates=GRADS, params=PARAMS):
    return transform.update(updates, transform.init(PARAMS), params)


class WithStatistics(nnx.Module):
    def __init__(self):
        self.norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))


WITH_STATISTICS = WithStatistics()

FILTERS = {
    "by_path of nothing": (
        lambda: filters.by_path(),
        ValueError,
        r'`patterns` must name at least one pattern, for example "conv',
    ),
    "by_path of a list": (
        lambda: filters.by_path(["conv*", "head*"]),
        TypeError,
        r"`patterns` must be strings such as .*, got \['conv\*', 'head\*'\]",
    ),
    "all_of a pattern": (
        lambda: filters.all_of(filters.weights, "conv*"),
        TypeError,
        r"`filters` must be a function \(path, leaf\) -> bool, got 'conv\*'; for example",
    ),
    "any_of an answer": (
        lambda: filters.any_of(True),
        TypeError,
        r"`filters` must be a function .*, got True",
    ),
    "not_ of None": (
        lambda: filters.not_(None),
        TypeError,
        r"`filters` must be a function .*, got None",
    ),
    "prunable is a tree, as optax's masks are": (
        lambda: filters.selected({"net": {"b": False, "w": True}}, PARAMS),
        TypeError,
        r"`prunable` must be a function \(path, leaf\) -> bool, got \{'net'.*sparsejax\.filters",
    ),
    "prunable answers with a number": (
        lambda: filters.selected(lambda path, leaf: 1, PARAMS),
        TypeError,
        r"`prunable` must answer True or False, got 1 at 'net\.b'",
    ),
    "prunable selects integers": (
        lambda: filters.selected(filters.by_path("*"), net(n=np.arange(3))),
        TypeError,
        r"`prunable` must select floating arrays only, got int64\[3\] at 'net\.n'; combine it",
    ),
    "prunable selects a function": (
        lambda: filters.selected(filters.by_path("*"), {"act": jnp.tanh}),
        TypeError,
        r"`prunable` must select floating arrays only, got \w+ at 'act'",
    ),
    "prunable selects nothing": (
        lambda: filters.selected(filters.by_path("conv*"), PARAMS),
        ValueError,
        r"`prunable` must select at least one leaf, got none of 2 \('net\.b' float32\[2\], ",
    ),
    "vectors alone": (
        lambda: masking.topk({"b": B}, 0.5),
        ValueError,
        r"`prunable` must select .*'b' float32\[2\].* for vectors pass prunable=filters\.floating",
    ),
}

CRITERIA = {
    "gradient of another structure": (
        lambda: criteria.gradient(PARAMS, {"net": {"w": W}}),
        ValueError,
        r"`grads` must have the structure of `params`: `params` has a leaf at 'net\.b', where "
        r"`grads` has none; build",
    ),
    "gradient of another shape": (
        lambda: criteria.gradient(PARAMS, net(w=W[:1])),
        ValueError,
        r"`grads` must have the shapes of `params`: at 'net\.w' it is float32\[1,2\], `params` is",
    ),
    "taylor with a leaf too many": (
        lambda: criteria.taylor(PARAMS, net(v=W)),
        ValueError,
        r"`grads` must have .*: `grads` has a leaf at 'net\.v', where `params` has none",
    ),
    "random with a seed": (
        lambda: criteria.random(0),
        TypeError,
        r"`key` must be a PRNG key such as jax\.random\.key\(0\), got 0",
    ),
    "random with several keys": (
        lambda: criteria.random(np.zeros((3, 2), np.uint32)),
        TypeError,
        r"`key` must be a PRNG key .*, got array\(\[\[0, 0\]",
    ),
    "random with a raw key of another length": (
        lambda: criteria.random(np.zeros(7, np.uint32))(PARAMS),
        TypeError,
        r"`key` must be a PRNG key",
    ),
    "output_gradient with swapped arguments": (
        lambda: criteria.output_gradient(PARAMS, linear, X),
        TypeError,
        r"`apply_fn` must be a function \(params, inputs\) -> outputs, got \{'net'",
    ),
    "output_gradient of no inputs": (
        lambda: criteria.output_gradient(linear, PARAMS, {}),
        ValueError,
        r"`inputs` must hold at least one array, got an empty tree",
    ),
    "output_gradient of no examples": (
        lambda: criteria.output_gradient(linear, PARAMS, X[:0]),
        ValueError,
        r"`inputs` must hold at least one example, got 0",
    ),
    "output_gradient of a scalar input": (
        lambda: criteria.output_gradient(linear, PARAMS, {"x": np.float32(1)}),
        ValueError,
        r"`inputs` must be arrays with a leading axis of examples, got float32\[\] at 'x'; .*None",
    ),
    "output_gradient of inputs of different lengths": (
        lambda: criteria.output_gradient(linear, PARAMS, {"x": X, "y": X[:2]}),
        ValueError,
        r"`inputs` must share their leading axis of examples, got \{'x': 3, 'y': 2\}",
    ),
    "output_gradient of two outputs": (
        lambda: criteria.output_gradient(lambda p, x: (x, x), PARAMS, X),
        TypeError,
        r"`apply_fn` must return one array of real floating numbers, got tuple; wrap it",
    ),
    "output_gradient of integers": (
        lambda: criteria.output_gradient(lambda p, x: linear(p, x).argmax(-1), PARAMS, X),
        TypeError,
        r"`apply_fn` must return one array of real floating numbers, got int32\[3\]",
    ),
    "output_gradient of a loss": (
        lambda: criteria.output_gradient(lambda p, x: linear(p, x).mean(), PARAMS, X),
        ValueError,
        r"`apply_fn` must return outputs with a leading axis of 3 examples, got float32\[\]",
    ),
    "output_gradient of no outputs": (
        lambda: criteria.output_gradient(lambda p, x: x[:, :0], PARAMS, X),
        ValueError,
        r"`apply_fn` must return at least one output, got float32\[3,0\]",
    ),
    "output_gradient in chunks of 0": (
        lambda: criteria.output_gradient(linear, PARAMS, X, chunk_size=0),
        ValueError,
        r"`chunk_size` must be at least 1, got 0",
    ),
    "output_gradient in chunks of a half": (
        lambda: criteria.output_gradient(linear, PARAMS, X, chunk_size=0.5),
        TypeError,
        r"`chunk_size` must be an integer.*, got 0\.5",
    ),
}

SELECTION = {
    "keep_largest of integers": (
        lambda: selection.keep_largest([np.arange(3)], 1),
        TypeError,
        r"`scores` must be .*floating.*int",
    ),
    "keep_largest of more than there are": (
        lambda: selection.keep_largest([B], 3),
        ValueError,
        r"`keep` must be .*2.*, got 3",
    ),
    "keep_largest of less than none": (
        lambda: selection.keep_largest([B], -1),
        ValueError,
        r"`keep` must be .*, got -1",
    ),
    "keep_largest of a fraction": (
        lambda: selection.keep_largest([B], 0.5),
        TypeError,
        r"`keep` must be .*integer.*, got 0\.5",
    ),
    "removed_count of a percentage": (
        lambda: selection.removed_count(90, 10),
        ValueError,
        r"`sparsity` must be in \[0, 1\) \(a fraction, not a percentage\), got 90",
    ),
    "removed_count of too many": (
        lambda: selection.removed_count(0.5, 2**48),
        ValueError,
        r"`scores` must have fewer than 2\*\*48 entries in all, got 281474976710656",
    ),
    "rest_count of a fraction": (
        lambda: selection.rest_count(0.5, 10),
        TypeError,
        r"`count` must be one integer, got 0\.5",
    ),
    "rest_count of a boolean": (
        lambda: selection.rest_count(True, 10),
        TypeError,
        r"`count` must be one integer, got True",
    ),
    "rest_count of more than there are": (
        lambda: selection.rest_count(11, 10),
        ValueError,
        r"`count` must be from 0 to 10, the number of what may be pruned, got 11\.",
    ),
    "rest_count of too many": (
        lambda: selection.rest_count(1, 2**48),
        ValueError,
        r"`scores` must have fewer than 2\*\*48 entries in all, got 281474976710656",
    ),
    "keep_largest of too many rows": (
        lambda: abstract(lambda s: selection.keep_largest([s], 1), 2**31, 1),
        ValueError,
        r"`scores` must have fewer than 2\*\*31 rows, .*got float32\[2147483648,1\]; split it, or",
    ),
    "keep_largest of a too long vector": (
        lambda: abstract(lambda s: selection.keep_largest([s], 1), 2**31),
        ValueError,
        r"`scores` must have .* fewer entries in each row .*got float32\[2147483648\]",
    ),
    "keep_largest_each of one count for two": (
        lambda: selection.keep_largest_each([B, W], [1]),
        ValueError,
        r"`keep` must have one count for each of 2 arrays, got",
    ),
    "keep_largest_each of more than there are": (
        lambda: selection.keep_largest_each([W, B], [3, 3]),
        ValueError,
        r"`keep` must be from 0 to 2, the number of scores, got 3",
    ),
    "keep_largest_each of fractions": (
        lambda: selection.keep_largest_each([B], [0.5]),
        TypeError,
        r"`keep` must be one integer, got 0\.5",
    ),
    "keep_largest_each of integers": (
        lambda: selection.keep_largest_each([np.arange(3)], [1]),
        TypeError,
        r"`scores` must be real floating arrays, got int64\[3\]; astype",
    ),
    "keep_largest_along of integers": (
        lambda: selection.keep_largest_along(np.arange(3), 1),
        TypeError,
        r"`scores` must be real floating arrays, got int64\[3\]; astype",
    ),
    "keep_largest_along no axis": (
        lambda: selection.keep_largest_along(W, 1, None),
        TypeError,
        r"`axis` must be an integer or several, got None",
    ),
    "keep_largest_along a boolean": (
        lambda: selection.keep_largest_along(W, 1, (0, True)),
        TypeError,
        r"`axis` must be an integer or several, got \(0, True\)",
    ),
    "keep_largest_along an axis too far": (
        lambda: selection.keep_largest_along(W, 1, 2),
        ValueError,
        r"`axis` must name axes from -2 to 1, each once, got 2",
    ),
    "keep_largest_along an axis twice": (
        lambda: selection.keep_largest_along(W, 1, (1, -1)),
        ValueError,
        r"`axis` must name axes from -2 to 1, each once, got \(1, -1\)",
    ),
    "keep_largest_along of fractions": (
        lambda: selection.keep_largest_along(W, B / 2),
        TypeError,
        r"`keep` must be integers, got array\(\[0\.5, 0\.5\]",
    ),
    "keep_largest_along of more than there are": (
        lambda: selection.keep_largest_along(W, np.array([1, 3])),
        ValueError,
        r"`keep` must be from 0 to 2, the number of scores along `axis`, got array\(\[1, 3\]",
    ),
    "keep_largest_along of counts of another shape": (
        lambda: selection.keep_largest_along(W, np.array([1, 1, 1])),
        ValueError,
        r"`keep` must broadcast to \(2,\), the other axes of `scores`, got shape \(3,\)",
    ),
    "keep_largest_along of too many entries": (
        lambda: abstract(lambda s: selection.keep_largest_along(s, 1, (0, 1)), 50_000, 50_000),
        ValueError,
        r"`scores` must have fewer than 2\*\*31 entries along `axis`, got 2500000000",
    ),
    "kth_largest of integers": (
        lambda: selection.kth_largest([np.arange(3)], 1),
        TypeError,
        r"`scores` must be real floating arrays, got int64\[3\]; astype",
    ),
    "kth_largest of a fraction": (
        lambda: selection.kth_largest([B], 0.5),
        TypeError,
        r"`k` must be one integer, got 0\.5",
    ),
    "kth_largest of the zeroth": (
        lambda: selection.kth_largest([B], 0),
        ValueError,
        r"`k` must be from 1 to 2, the number of scores, got 0",
    ),
    "kth_largest of nothing": (
        lambda: selection.kth_largest([B[:0]], 1),
        ValueError,
        r"`k` must be from 1 to 0, the number of scores, got 1",
    ),
}

TOPK = {
    "topk of nothing": (
        lambda: masking.topk(PARAMS),
        ValueError,
        r"`sparsity` must be given \(topk\(scores, 0\.9\)\), or how many to prune .*count=1000",
    ),
    "topk of both": (
        lambda: masking.topk(PARAMS, 0.5, count=3),
        ValueError,
        r"`sparsity` .*`count`.*0\.5.* 3",
    ),
    "topk of text": (
        lambda: masking.topk(PARAMS, "0.5"),
        TypeError,
        r"`sparsity` must be one real number, got '0\.5'",
    ),
    "topk of complex scores": (
        lambda: masking.topk({"w": W + 1j}, 0.5, prunable=filters.by_path("w")),
        TypeError,
        r"`scores` must be real floating arrays, got complex64\[2,2\] at 'w'; take jnp\.abs",
    ),
    "topk of a count that is a fraction": (
        lambda: masking.topk(PARAMS, count=0.5),
        TypeError,
        r"`count` must be one integer, got 0\.5",
    ),
    "topk of several counts": (
        lambda: masking.topk(PARAMS, count=np.array([1, 2])),
        TypeError,
        r"`count` must be one integer, got array\(\[1, 2\]",
    ),
    "topk of a count below zero": (
        lambda: masking.topk(PARAMS, count=-1),
        ValueError,
        r"`count` must be from 0 to 4, the number of what may be pruned, got -1\.",
    ),
    "topk of a count of more than there are": (
        lambda: masking.topk(PARAMS, count=5),
        ValueError,
        r"`count` must be from 0 to 4, .*, got 5\.",
    ),
    "topk of a count of more channels than there are": (
        lambda: masking.topk(PARAMS, count=3, granularity=granularities.Channel()),
        ValueError,
        r"`count` must be from 0 to 2, .*, got 3\.",
    ),
    "topk of a count of more than a leaf has": (
        lambda: masking.topk(net(v=X), count=5, scope="per_leaf"),
        ValueError,
        r"`count` must be from 0 to 4, .*, got 5 at 'net\.w'\.",
    ),
    "topk with a granularity that was not made": (
        lambda: masking.topk(PARAMS, 0.5, granularity=granularities.Channel),
        TypeError,
        r"`granularity` must be a value of sparsejax\.granularities such as NM\(2, 4\), got <class",
    ),
    "topk with a granularity of text": (
        lambda: masking.topk(PARAMS, 0.5, granularity="channel"),
        TypeError,
        r"`granularity` must be a value of .*, got 'channel'",
    ),
    "topk of channels along a missing axis": (
        lambda: masking.topk(PARAMS, 0.5, granularity=granularities.Channel(2)),
        ValueError,
        r"`axis` must be an axis of the leaf, got 2 for float32\[2,2\] at 'net\.w'; choose",
    ),
    "topk of channels along an axis that a layer lacks": (
        lambda: masking.topk(
            PARAMS, 0.5, granularity=granularities.Channel(1), stacked=filters.weights
        ),
        ValueError,
        r"`axis` must be an axis of the leaf, got 1 for float32\[2\] at 'net\.w'; choose",
    ),
    "topk with a pool that does not pool": (
        lambda: masking.topk(
            PARAMS, 0.5, granularity=granularities.Channel(pool=lambda s, axis: s)
        ),
        ValueError,
        r"`pool` must return one floating score for each unit, of shape \(2,\)",
    ),
    "topk with a pool that makes NaN": (
        lambda: masking.topk(
            {"w": np.array([[np.inf, 1.0], [-np.inf, 1.0]])},
            0.5,
            granularity=granularities.Channel(),
        ),
        ValueError,
        r"`scores` must not be NaN: 1 of 2 units are, at 'w'",
    ),
    "topk by N:M with a sparsity": (
        lambda: masking.topk(PARAMS, 0.5, granularity=granularities.NM(1, 2)),
        ValueError,
        r"`sparsity` must be left out with `granularity` = NM\(n=1, m=2, axis=-2\), .*got 0\.5",
    ),
    "topk by N:M with a count": (
        lambda: masking.topk(PARAMS, count=2, granularity=granularities.NM(1, 2)),
        ValueError,
        r"`count` must be left out with `granularity` = NM.*, got 2",
    ),
    "topk by N:M with a scope": (
        lambda: masking.topk(PARAMS, scope="per_leaf", granularity=granularities.NM(1, 2)),
        ValueError,
        r"`scope` must be left out with `granularity` = NM.*, got 'per_leaf'",
    ),
    "topk by N:M with an allocation": (
        lambda: masking.topk(
            PARAMS, allocation=allocation.uniform, granularity=granularities.NM(1, 2)
        ),
        ValueError,
        r"`allocation` must be left out with `granularity` = NM.*, got <function uniform",
    ),
    "topk by N:M along a missing axis": (
        lambda: masking.topk(PARAMS, granularity=granularities.NM(1, 2, axis=2)),
        ValueError,
        r"`axis` must be an axis of the leaf, got 2 for float32\[2,2\] at 'net\.w'; choose",
    ),
    "topk with an allocation by name": (
        lambda: masking.topk(PARAMS, 0.5, allocation="erk"),
        TypeError,
        r"`allocation` must be a function \(layers, keep\) -> counts, got 'erk'; for example alloc",
    ),
    "topk with an allocation in the global scope": (
        lambda: masking.topk(PARAMS, 0.5, allocation=allocation.uniform, scope="global"),
        ValueError,
        r'`scope` must be "per_leaf" \(or left out\) with an `allocation`, .*got "global"',
    ),
    "topk with an allocation of a traced sparsity": (
        lambda: jax.jit(lambda s: masking.topk(PARAMS, s, allocation=allocation.uniform))(0.5),
        ValueError,
        r"`allocation` needs a `sparsity` or `count` that is known before tracing, .*static",
    ),
    "topk with an allocation of a traced count": (
        lambda: jax.jit(lambda k: masking.topk(PARAMS, count=k, allocation=allocation.uniform))(1),
        ValueError,
        r"`allocation` needs a `sparsity` or `count` that is known before tracing, .*static",
    ),
    "topk with an allocation that does not add up": (
        lambda: masking.topk(PARAMS, 0.5, allocation=lambda layers, keep: [keep - 1]),
        ValueError,
        r"`allocation` must keep 2 units in all, got 1",
    ),
    "topk with an allocation that cannot be met": (
        lambda: masking.topk(
            PARAMS, 0.5, allocation=allocation.override(allocation.uniform, {"*.w": 1.0})
        ),
        ValueError,
        r"`densities` must not keep more than `keep` units, 2, got 4",
    ),
    "topk with a list of stacked paths": (
        lambda: masking.topk(PARAMS, 0.5, stacked=["net.w"]),
        TypeError,
        r"`stacked` must be a function \(path, leaf\) -> bool, got \['net\.w'\]; .*by_path",
    ),
    "topk with an answer about stacked leaves that is none": (
        lambda: masking.topk(PARAMS, 0.5, stacked=lambda path, leaf: None),
        TypeError,
        r"`stacked` must answer True or False, got None at 'net\.w'",
    ),
    "topk of a stacked vector": (
        lambda: masking.topk(PARAMS, 0.5, prunable=filters.floating, stacked=filters.floating),
        ValueError,
        r"`stacked` must select leaves whose first axis .*got float32\[2\] at 'net\.b', which",
    ),
    "topk of too many rows": (
        lambda: abstract(lambda s: masking.topk(s, 0.5), 2**31, 1),
        ValueError,
        r"`scores` must have .*got float32\[2147483648,1\] at '\.'; split it",
    ),
    "topk of too long rows": (
        lambda: abstract(lambda s: masking.topk(s, 0.5, scope="per_leaf"), 2, 2**16, 2**15),
        ValueError,
        r"`scores` must have .*got float32\[2,65536,32768\] at '\.'; split",
    ),
    "topk of too many entries": (
        lambda: abstract(lambda s: masking.topk(s, 0.5), 2**24, 2**24),
        ValueError,
        r"`scores` must have fewer than 2\*\*48 entries in all, got 281474976710656",
    ),
    "topk of too large layers": (
        lambda: jax.eval_shape(
            lambda tree: masking.topk(tree, 0.1, scope="per_leaf", stacked=filters.by_path("s")),
            {
                "s": jax.ShapeDtypeStruct((2, 50_000, 50_000), np.float32),
                "w": jax.ShapeDtypeStruct((2, 2), np.float32),
            },
        ),
        ValueError,
        r"`scores` must have fewer .*(2500000000|float32\[2,50000,50000\])",
    ),
}

MASKING = {
    "threshold of text": (
        lambda: masking.threshold(PARAMS, "0.5"),
        TypeError,
        r"`t` must be one real number, got '0\.5'",
    ),
    "threshold of several numbers": (
        lambda: masking.threshold(PARAMS, B),
        TypeError,
        r"`t` must be one real number, got float32\[2\]",
    ),
    "threshold of a boolean": (
        lambda: masking.threshold(PARAMS, True),
        TypeError,
        r"`t` must be one real number, got a boolean: True",
    ),
    "threshold of a complex number": (
        lambda: masking.threshold(PARAMS, 1j),
        TypeError,
        r"`t` must be one real number, got complex64\[\]",
    ),
    "threshold of NaN": (
        lambda: masking.threshold(PARAMS, np.nan),
        ValueError,
        r"`t` must be a number, got nan",
    ),
    "threshold of NaN scores": (
        lambda: masking.threshold(NAN, 0.5),
        ValueError,
        r"`scores` must not be NaN: 1 of 2 entries are, at 'net\.w'\. Look for",
    ),
    "threshold of complex scores": (
        lambda: masking.threshold({"w": W + 1j}, 0.5, prunable=filters.by_path("w")),
        TypeError,
        r"`scores` must be real floating arrays, got complex64\[2,2\] at 'w'; take jnp\.abs",
    ),
    "topk of a percentage": (
        lambda: masking.topk(PARAMS, 90),
        ValueError,
        r"`sparsity` must be in \[0, 1\) \(a fraction, not a percentage\), got 90",
    ),
    "topk of one": (
        lambda: masking.topk(PARAMS, 1.0),
        ValueError,
        r"`sparsity` must be in \[0, 1\).*, got 1\.0",
    ),
    "topk of less than zero": (
        lambda: masking.topk(PARAMS, -0.1),
        ValueError,
        r"`sparsity` must be in \[0, 1\).*, got -0\.1",
    ),
    "topk of NaN": (
        lambda: masking.topk(PARAMS, np.nan),
        ValueError,
        r"`sparsity` must be a number, got nan",
    ),
    "topk of NaN scores": (
        lambda: masking.topk(NAN, 0.5),
        ValueError,
        r"`scores` must not be NaN: 1 of 2 entries are, at 'net\.w'",
    ),
    "topk in an unknown scope": (
        lambda: masking.topk(PARAMS, 0.5, scope="layer"),
        ValueError,
        r'`scope` must be "global" or "per_leaf", got \'layer\'',
    ),
    "apply_masks of numbers": (
        lambda: masking.apply_masks(PARAMS, net(w=np.ones((2, 2)))),
        TypeError,
        r"`masks` must be boolean arrays \(True = kept\), got float32\[2\] at 'net\.b'; turn",
    ),
    "apply_masks without one": (
        lambda: masking.apply_masks(PARAMS, {"net": {"b": None, "w": W > 1}}),
        TypeError,
        r"`masks` must be boolean arrays \(True = kept\), got NoneType at 'net\.b'",
    ),
    "apply_masks of another shape": (
        lambda: masking.apply_masks(PARAMS, {"net": {"b": np.array(True), "w": W[:, :0] > 1}}),
        ValueError,
        r"`masks` must broadcast against their parameters: at 'net\.w' the mask is bool\[2,0\], "
        r"the parameter float32\[2,2\]; give it",
    ),
    "apply_masks of another rank": (
        lambda: masking.apply_masks(PARAMS, {"net": {"b": np.array(True), "w": B > 1}}),
        ValueError,
        r"`masks` must broadcast .* at 'net\.w' the mask is bool\[2\], the parameter ",
    ),
    "apply_masks of another structure": (
        lambda: masking.apply_masks(PARAMS, {"net": {"w": W > 1}}),
        ValueError,
        r"`masks` must have the structure of `params`: `params` has a leaf at 'net\.b', where",
    ),
    "apply_masks that prune a function": (
        lambda: masking.apply_masks({"act": jnp.tanh}, {"act": np.array(False)}),
        TypeError,
        r"`masks` must .* at 'act'",
    ),
    "sparsity with no filter": (
        lambda: masking.sparsity(PARAMS, prunable="w"),
        TypeError,
        r"`prunable` must be a function \(path, leaf\) -> bool, got 'w'",
    ),
    "sparsity with a filter that answers None": (
        lambda: masking.sparsity(PARAMS, prunable=lambda path, leaf: None),
        TypeError,
        r"`prunable` must answer True or False, got None at 'net\.b'",
    ),
    "sparsity with swapped arguments": (
        lambda: masking.sparsity(MASKS, PARAMS),
        TypeError,
        r"`masks` must be boolean arrays .*, got float32\[2\] at 'net\.b'",
    ),
    "prune_tree below zero": (
        lambda: sj.prune_tree(PARAMS, GRADS, -0.1),
        ValueError,
        r"`threshold` must be >= 0, got -0\.1\. .* for signed scores use masking\.threshold",
    ),
    "prune_tree at NaN": (
        lambda: sj.prune_tree(PARAMS, GRADS, np.float32(np.nan)),
        ValueError,
        r"`threshold` must be a number, got nan",
    ),
    "prune_tree with swapped arguments": (
        lambda: sj.prune_tree(PARAMS, 0.1, GRADS),
        TypeError,
        r"`threshold` must be one real number, got \{'net'",
    ),
    "prune_tree by a schedule": (
        lambda: sj.prune_tree(PARAMS, GRADS, optax.constant_schedule(0.1)),
        TypeError,
        r"`threshold` must be one real number, got <function",
    ),
    "prune_tree without gradients": (
        lambda: sj.prune_tree(PARAMS, None, 0.1),
        ValueError,
        r"`criterion` gave no score for the prunable leaf 'net\.w': its gradient is None.*"
        r"\(criterion=criteria\.magnitude",
    ),
    "prune_tree with other gradients": (
        lambda: sj.prune_tree(PARAMS, {"net": {"b": B}}, 0.1),
        ValueError,
        r"`grads` must have the structure of `params`: `params` has a leaf at 'net\.w', where",
    ),
    "prune_tree with gradients of another shape": (
        lambda: sj.prune_tree(PARAMS, net(b=X), 0.1, criterion=criteria.magnitude),
        ValueError,
        r"`grads` must have the shapes of `params`: at 'net\.b' it is float32\[3,2\], `params` is",
    ),
    "prune_tree with NaN gradients": (
        lambda: sj.prune_tree(NAN, NAN, 0.1),
        ValueError,
        r"`scores` must not be NaN: 1 of 2 entries are, at 'net\.w'",
    ),
    "prune_tree by scores": (
        lambda: sj.prune_tree(PARAMS, GRADS, 0.1, criterion=GRADS),
        TypeError,
        r"`criterion` must be a function \(params, grads\) -> scores, got \{'net'.*magnitude",
    ),
    "prune_tree by a criterion of another structure": (
        lambda: sj.prune_tree(PARAMS, GRADS, 0.1, criterion=lambda p, g: 1.0),
        ValueError,
        r"`scores` must have the structure of `params`: `params` has a leaf at 'net\.b'",
    ),
    "prune_tree by a criterion of another shape": (
        lambda: sj.prune_tree(PARAMS, GRADS, 0.1, criterion=lambda p, g: net(w=B)),
        ValueError,
        r"`scores` must have the shapes of `params`: at 'net\.w' it is float32\[2\], `params` is",
    ),
    "prune_tree by ranks": (
        lambda: sj.prune_tree(PARAMS, GRADS, 1, criterion=lambda p, g: net(w=W.astype(np.int32))),
        TypeError,
        r"`scores` must be real floating arrays, got int32\[2,2\] at 'net\.w'; .*astype",
    ),
    "prune_masks of no weights": (
        lambda: sj.prune_masks({"b": B}, {"b": B}, 0.1),
        ValueError,
        r"`prunable` must select at least one leaf, got none of 1 \('b' float32\[2\]\)",
    ),
}

PENALTIES = {
    "l1 below zero": (
        lambda: penalties.l1(-1),
        ValueError,
        r"`strength` must be >= 0, got -1",
    ),
    "l1 of infinity": (
        lambda: penalties.l1(np.inf),
        ValueError,
        r"`strength` must be finite, got inf",
    ),
    "l1 of NaN": (
        lambda: penalties.l1(np.nan),
        ValueError,
        r"`strength` must be a number, got nan",
    ),
    "l2 of text": (
        lambda: penalties.l2("0.1"),
        TypeError,
        r"`strength` must be a number or a schedule \(step -> number\), got '0\.1'",
    ),
    "l2 of several numbers": (
        lambda: penalties.l2(B).value({"net": {"w": W}}),
        ValueError,
        r"`l2_strength` must have the structure of `params`: `params` has a leaf at 'net\.w'",
    ),
    "elastic_net below zero": (
        lambda: penalties.elastic_net(0.1, -0.2),
        ValueError,
        r"`l2_strength` must be >= 0, got -0\.2",
    ),
    "group_lasso with a number for a weight": (
        lambda: penalties.group_lasso(0.1, weight=2.0),
        TypeError,
        r"`weight` must be a function \(size of a group\) -> number, got 2\.0; .* math\.sqrt",
    ),
    "l1 over a tree of flags": (
        lambda: penalties.l1(0.1, prunable=MASKS),
        TypeError,
        r"`prunable` must be a function \(path, leaf\) -> bool, got \{'net'",
    ),
    "value of a schedule": (
        lambda: penalties.l1(optax.constant_schedule(0.1)).value(PARAMS),
        TypeError,
        r"`l1_strength` is a schedule, .*: use penalty\.at\(step\) first",
    ),
    "value of vectors": (
        lambda: L1.value({"b": B}),
        ValueError,
        r"`prunable` must select at least one leaf, got none of 1",
    ),
    "subgradient of another shape": (
        lambda: L1.subgradient(net(w=W[:1]), PARAMS),
        ValueError,
        r"`grads` must have the shapes of `params`: at 'net\.w' it is float32\[1,2\], `params` is",
    ),
    "subgradient of another structure": (
        lambda: L1.subgradient({"net": {"w": W}}, PARAMS),
        ValueError,
        r"`grads` must have the structure of `params`: `params` has a leaf at 'net\.b', where",
    ),
}

TRANSFORMS = {
    "l1_prox below zero": (
        lambda: sj.l1_prox(-0.1),
        ValueError,
        r"`strength` must be >= 0, got -0\.1",
    ),
    "l1_prox of a learning rate of zero": (
        lambda: sj.l1_prox(0.1, 0.0),
        ValueError,
        r"`learning_rate` must be > 0, got 0\.0",
    ),
    "l2_prox of a learning rate that is text": (
        lambda: sj.l2_prox(0.1, "0.1"),
        TypeError,
        r"`learning_rate` must be a number or a schedule \(step -> number\), got '0\.1'",
    ),
    "elastic_net_prox of an infinite learning rate": (
        lambda: sj.elastic_net_prox(0.1, 0.1, np.inf),
        ValueError,
        r"`learning_rate` must be finite, got inf",
    ),
    "penalized with a penalty that has no slope": (
        lambda: sj.penalized(SGD, penalties.l0(0.1)),
        TypeError,
        r"`penalty` must have a slope at zero for `penalized`, got L0.*; use proximal\(",
    ),
    "prox of a number": (
        lambda: transforms.prox(0.1),
        TypeError,
        r"`penalty` must be a penalty such as penalties\.l1\(1e-4\), got 0\.1",
    ),
    "l1_prox without params": (
        lambda: update(sj.l1_prox(0.1), params=None),
        ValueError,
        r"`prox` needs the current parameters: call update\(grads, state, params\)",
    ),
    "l1_prox with other gradients": (
        lambda: update(sj.l1_prox(0.1), {"net": {"w": W}}),
        ValueError,
        r"`(grads|updates)` must have the structure of `params`: `params` has a leaf at 'net\.b'",
    ),
    "l1_prox with gradients of another shape": (
        lambda: update(sj.l1_prox(0.1), net(w=W[:1])),
        ValueError,
        r"`(grads|updates)` must have the shapes of `params`: at 'net\.w' it is float32\[1,2\]",
    ),
    "l1_prox by a schedule below zero": (
        lambda: update(sj.l1_prox(lambda step: -1.0)),
        ValueError,
        r"strength` must be >= 0, got -1\.0",
    ),
    "l1_prox by a schedule of nothing": (
        lambda: update(sj.l1_prox(lambda step: None)),
        TypeError,
        r"strength` must be a number or a schedule .*, got None",
    ),
    "l1_prox with a learning rate by a schedule of nothing": (
        lambda: update(sj.l1_prox(0.1, lambda step: None)),
        TypeError,
        r"`learning_rate` must be .*, got None",
    ),
    "proximal with a learning rate by a schedule below zero": (
        lambda: update(sj.proximal(SGD, L1, lambda step: -1.0)),
        ValueError,
        r"`learning_rate` must be .*, got -1\.0",
    ),
    "proximal with a learning rate by a schedule of several": (
        lambda: update(sj.proximal(SGD, L1, lambda step: B)),
        TypeError,
        r"`learning_rate` must be one real number, got float32\[2\]",
    ),
    "proximal without a learning rate": (
        lambda: sj.proximal(SGD, L1, None),
        TypeError,
        r"`learning_rate` must be a number or a schedule .*, got None",
    ),
    "proximal without params": (
        lambda: update(sj.proximal(SGD, L1, 0.1), params=None),
        ValueError,
        r"`proximal` needs the current parameters: call update\(grads, state, params\)",
    ),
    "proximal with other gradients": (
        lambda: update(sj.proximal(optax.adam(0.1), L1, 0.1), {"net": {"w": W}}),
        ValueError,
        r"`(grads|updates)` must have the structure of `params`: `params` has a leaf at 'net\.b'",
    ),
    "proximal with gradients of another shape": (
        lambda: update(sj.proximal(optax.adam(0.1), L1, 0.1), net(w=X)),
        ValueError,
        r"`(grads|updates)` must have the shapes of `params`: at 'net\.w' it is float32\[3,2\]",
    ),
    "penalized by an optimizer that was not called": (
        lambda: sj.penalized(optax.adam, L1),
        TypeError,
        r"`optimizer` must be an optax\.GradientTransformation .*got <function adam.*call it first",
    ),
    "penalized with swapped arguments": (
        lambda: sj.penalized(L1, SGD),
        TypeError,
        r"`optimizer` must be an optax\.GradientTransformation such as .*, got ElasticNet",
    ),
    "penalized by a function": (
        lambda: sj.penalized(SGD, penalties.l1),
        TypeError,
        r"`penalty` must be a penalty such as penalties\.l1\(1e-4\), got <function l1",
    ),
    "penalized by a class": (
        lambda: sj.penalized(SGD, penalties.ElasticNet),
        TypeError,
        r"`penalty` must be a penalty such as penalties\.l1\(1e-4\), got <class",
    ),
    "penalized without params": (
        lambda: update(sj.penalized(SGD, L1), params=None),
        ValueError,
        r"`penalized` needs the current parameters: call update\(grads, state, params\)",
    ),
    "penalized with other gradients": (
        lambda: update(sj.penalized(SGD, L1), {"net": {"w": W}}),
        ValueError,
        r"`(grads|updates)` must have the structure of `params`: `params` has a leaf at 'net\.b'",
    ),
    "keep_masks of no optimizer": (
        lambda: sj.keep_masks(MASKS, SGD),
        TypeError,
        r"`optimizer` must be an optax\.GradientTransformation such as .*, got \{'net'",
    ),
    "keep_masks of numbers": (
        lambda: sj.keep_masks(SGD, PARAMS),
        TypeError,
        r"`masks` must be boolean arrays .*, got float32\[2\] at 'net\.b'; turn",
    ),
    "keep_masks of another structure": (
        lambda: sj.keep_masks(SGD, {"net": {"w": W > 1}}).init(PARAMS),
        ValueError,
        r"`masks` must have the structure of `params`: `params` has a leaf at 'net\.b', where",
    ),
    "keep_masks of another shape": (
        lambda: sj.keep_masks(SGD, {"net": {"b": B > 1, "w": X > 1}}).init(PARAMS),
        ValueError,
        r"`masks` must broadcast .* at 'net\.w' the mask is bool\[3,2\], the parameter ",
    ),
    "keep_masks of a pruned infinity": (
        lambda: sj.keep_masks(SGD, MASKS).init(net(w=W * np.float32(np.inf))),
        ValueError,
        r"`params` must be finite where the masks prune, got .* at 'net\.w', .*apply_masks",
    ),
    "keep_masks with the inner state": (
        lambda: sj.keep_masks(SGD, MASKS).update(PARAMS, SGD.init(PARAMS), PARAMS),
        TypeError,
        r"`keep_masks` needs its own state, a KeepMasksState, got \(EmptyState.*; pass what",
    ),
    "prune_tree with a criterion that was not made": (
        lambda: sj.prune_tree(PARAMS, PARAMS, 0.1, criterion=criteria.random),
        TypeError,
        r"`criterion` must be a function .*, got criteria\.random, .* call it first",
    ),
    "prune_tree of nothing": (
        lambda: sj.prune_tree(None, None, 0.1),
        ValueError,
        r"`params` must be a pytree of arrays, got None",
    ),
    "penalty of complex weights": (
        lambda: penalties.l1(1.0, prunable=filters.by_path("*")).value({"w": W * 1j}),
        TypeError,
        r"`prunable` must select real leaves for a penalty, got complex64\[2,2\] at 'w'; leave",
    ),
    "prox with a negative step": (
        lambda: penalties.l1(1.0).prox(PARAMS, -1.0),
        ValueError,
        r"`step_size` must be >= 0, got -1\.0",
    ),
    "functional of a class": (
        lambda: models.functional(models.CNN),
        TypeError,
        r"`model` must be an NNX module such as CNN\(rngs=nnx\.Rngs\(0\)\), got <class",
    ),
    "CNN of one number": (
        lambda: models.CNN(28, rngs=nnx.Rngs(0)),
        ValueError,
        r"`input_shape` must be \(height, width, channels\), .*, got \(28,\); gray",
    ),
    "keep_masks that prune integers": (
        lambda: sj.keep_masks(SGD, {"step": np.zeros((), bool)}).init({"step": np.arange(3)}),
        TypeError,
        r"`masks` must keep what is not floating, got one that prunes int.*\[3\] at 'step', .*True",
    ),
    "keep_masks without params": (
        lambda: update(sj.keep_masks(SGD, MASKS), params=None),
        ValueError,
        r"`keep_masks` needs the current parameters: call update\(grads, state, params\)",
    ),
    "keep_masks with other gradients": (
        lambda: update(sj.keep_masks(SGD, MASKS), {"net": {"w": W}}),
        ValueError,
        r"`(grads|updates)` must have the structure of `params`: `params` has a leaf at 'net\.b'",
    ),
    "keep_masks with gradients of another shape": (
        lambda: update(sj.keep_masks(SGD, MASKS), net(w=X)),
        ValueError,
        r"`(grads|updates)` must have the shapes of `params`: at 'net\.w' it is float32\[3,2\]",
    ),
}

MODELS_AND_DATASETS = {
    "CNN of too small images": (
        lambda: models.CNN((8, 8, 1), rngs=nnx.Rngs(0)),
        ValueError,
        r"`input_shape` must be at least 10x10, got 8x8: .*; pad or enlarge",
    ),
    "CNN of images without channels": (
        lambda: models.CNN((28, 28), rngs=nnx.Rngs(0)),
        ValueError,
        r"`input_shape` must be \(height, width, channels\), .*, got \(28, 28\); gray images",
    ),
    "LeNet300100 of no classes": (
        lambda: models.LeNet300100(num_classes=0, rngs=nnx.Rngs(0)),
        ValueError,
        r"`num_classes` must be a positive integer, got 0",
    ),
    "apply to images of another size": (
        lambda: APPLY(CNN_PARAMS, IMAGES[:, :10]),
        ValueError,
        r"`x` must have shape \(batch, 12, 12, 1\), .*, got \(2, 10, 12, 1\); add a missing axis",
    ),
    "apply to raw pixels": (
        lambda: APPLY(CNN_PARAMS, IMAGES.astype(np.uint8)),
        TypeError,
        r"`x` must be floating point, got uint8; scale pixels first",
    ),
    "apply other params": (
        lambda: APPLY({"conv1": {"kernel": W}}, IMAGES),
        ValueError,
        r"`params` must have its leaves where the model has its own; missing: .*'conv1\.bias'",
    ),
    "functional of statistics": (
        lambda: models.functional(WITH_STATISTICS),
        ValueError,
        r"`model` must hold no arrays but nnx\.Param, got BatchStat at 'norm\.mean'.*nnx\.split",
    ),
    "mnist of a missing folder": (
        lambda: datasets.mnist(NO_FOLDER),
        NotADirectoryError,
        r"`data_dir` must be a folder with the IDX files of mnist, got '/no/such/folder', which is",
    ),
    "fashion_mnist of a number": (
        lambda: datasets.fashion_mnist(3),
        TypeError,
        r"`data_dir` must be the path of a folder or None, got 3",
    ),
}

ROWS = (
    FILTERS | CRITERIA | SELECTION | TOPK | MASKING | PENALTIES | TRANSFORMS | MODELS_AND_DATASETS
)

# Here the scores are computed, and what a jitted function computes cannot be looked at.
EAGER_ONLY = {"prune_tree with NaN gradients", "topk with a pool that makes NaN"}


def each(rows):
    return pytest.mark.parametrize(("call", "error", "pattern"), rows.values(), ids=rows.keys())


@each(ROWS)
def test_bad_call_says_what_is_wrong_and_what_is_right(call, error, pattern):
    with pytest.raises(error, match=f"(?s){pattern}") as info:
        call()
    assert info.type is error
    assert re.match(r"`\w+` (must|needs|gave|is a)\b", str(info.value))


@each({name: row for name, row in ROWS.items() if name not in EAGER_ONLY})
def test_bad_call_is_refused_inside_a_jitted_function_too(call, error, pattern):
    def traced():
        call()
        return jnp.zeros(())

    with pytest.raises(error, match=f"(?s){pattern}"):
        jax.jit(traced)()


def test_bad_calls_are_at_least_forty():
    assert len(ROWS) >= 40


def test_message_does_not_print_whole_trees():
    many = {str(i): np.ones((30, 30), np.float32) for i in range(30)}
    with pytest.raises(TypeError) as info:
        sj.keep_masks(many, SGD)
    assert len(str(info.value)) < 300
