"""Five hundred random architectures: none wrong, none crashing, every lock with a reason."""

import jax
import numpy as np
import pytest
from random_networks import random_network
from test_replay import assert_close

from sparsejax import dependency, shrinking

# As users have it: checking annotations takes half as long again.
pytestmark = [pytest.mark.usefixtures("quickly", "as_users_have_it"), pytest.mark.long]


@pytest.mark.parametrize("seed", range(500))
def test_shrunk_equals_masked(seed):
    network = random_network(seed)
    groups = dependency.trace(network.apply, network.variables, *network.inputs)
    assert not groups.unknown
    assert all(lock.why for lock in groups.locked)
    rng = np.random.default_rng(seed)
    scores = {name: rng.normal(size=group.size) for name, group in groups.items()}
    plan = shrinking.plan(groups, scores, sparsity=0.5)
    small = shrinking.shrink(network.variables, plan)
    masked = shrinking.expand(small, plan)

    @jax.jit
    def both(small, masked):
        replayed = shrinking.replay(network.apply, plan)(small, *network.inputs)
        return replayed, network.apply(masked, *network.inputs)

    assert_close(*both(small, masked))
    _check_cover(groups)


def _check_cover(groups):
    """Every index of every axis longer than one is of some unit, or locked with a reason."""
    covered = {
        (leaf.path, d): np.zeros(n, bool)
        for leaf in groups.leaves
        for d, n in enumerate(leaf.shape)
    }
    for group in groups.values():
        for member in group.members:
            covered[member.path, member.axis][member.indices] = True
    for lock in groups.locked:
        assert not covered[lock.path, lock.axis][lock.indices].any()
        covered[lock.path, lock.axis][lock.indices] = True
    assert all(flags.all() for flags in covered.values() if len(flags) > 1)
