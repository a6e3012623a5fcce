"""Settings of the whole test session, doctests included."""

import gc
import os

import hypothesis
import jax
import jaxtyping
import pytest
from quickly import FLAGS

# Half the time to compile; `XLA_FLAGS= make test` compiles all as it is for users.
os.environ.setdefault("XLA_FLAGS", FLAGS)

# Eight devices on one processor, so that sharded inputs are tested everywhere.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same examples on every machine, and no deadline: the first call of a shape compiles.
hypothesis.settings.register_profile("sparsejax", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("sparsejax")

# The files that take longest, in this order; with `--dist loadfile`, none of them starts last.
LONGEST = (
    "test_random_networks",
    "test_replay",
    "test_mnist_example",
    "test_dynamic_contract",
    "test_kernel_safety",
    "test_storage_hostile",
    "test_resume",
    "test_sparse_products",
    "test_keep_masks",
    "test_transforms",
    "test_sparse_training_example",
    "test_sparsify",
    "test_faster_example",
    "test_shrink_example",
    "test_torch_pruning",
    "test_resize_nnx",
    "test_plan",
    "test_penalties",
    "test_solutions",
    "test_pruning",
    "test_lenet_tables",
    "test_compress_example",
    "test_data_driven_criteria",
    "test_sensitivity",
    "test_selection",
    "test_distributed",
    "test_storage",
    "test_recipes",
    "test_storage_orbax",
    "test_cli",
    "test_cli_hostile",
    "test_criteria",
    "test_dynamic_sharded",
    "test_dynamic",
    "test_topk",
)


def pytest_configure(config):
    """Files start in the order of collection; pytest-xdist starts with those of most tests."""
    config.option.loadscopereorder = False
    # What JAX keeps of thousands of programs is alive, and costs a look at every collection.
    gc.set_threshold(100_000, 50, 50)


def pytest_collection_modifyitems(items):
    """The longest files first."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="module")
def quickly():
    """Compiles without optimizations what is not `as_shipped`; for `pytestmark` of a file."""
    quick = os.environ["XLA_FLAGS"] == FLAGS
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def as_users_have_it(monkeypatch):
    """Without the checks of annotations, which would answer first and in their own words."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
