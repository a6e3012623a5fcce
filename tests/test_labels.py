"""Labels against a brute force: sets of atoms, index by index."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.dependency._labels import Labels


def test_equal_labels_have_one_root():
    labels = Labels()
    a, b, c = labels.fresh(3), labels.fresh(3), labels.fresh(3)
    labels.unify(a, b)
    labels.unify(c[::-1], b)
    assert (labels.find(a) == labels.find(b)).all()
    assert (labels.find(c) == labels.find(a)[::-1]).all()
    assert len(set(labels.find(a).tolist())) == 3


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=40))
def test_unions_at_once_equal_unions_one_by_one(pairs):
    labels = Labels()
    own = labels.fresh(20)
    if pairs:
        labels.unify(*(own[list(side)] for side in zip(*pairs, strict=True)))
    classes = {i: {i} for i in range(20)}
    for i, j in pairs:
        joined = classes[i] | classes[j]
        for k in joined:
            classes[k] = joined
    roots = labels.find(own)
    for i in range(20):
        assert {j for j in range(20) if roots[j] == roots[i]} == classes[i]


def test_parts_stand_for_both():
    labels = Labels()
    rows, columns = labels.fresh(2), labels.fresh(3)
    merged = labels.paired(np.repeat(rows, 3), np.tile(columns, 2))
    plain = labels.fresh(6)
    labels.unify(plain, merged)
    labels.resolve()
    atoms = [set(row) - {-1} for row in labels.atoms(plain).tolist()]
    assert atoms == [{r, c} for r in rows.tolist() for c in columns.tolist()]


def test_two_splits_of_one_axis_meet():
    """12 as 2 x 6 and as 4 x 3: what is left is sound, if coarser than either."""
    labels = Labels()
    axis = labels.fresh(12)
    for sizes in ((2, 6), (4, 3)):
        rows, columns = (labels.fresh(n) for n in sizes)
        labels.unify(axis, labels.paired(np.repeat(rows, sizes[1]), np.tile(columns, sizes[0])))
    labels.resolve()
    atoms = [frozenset(row) - {-1} for row in labels.atoms(axis).tolist()]
    for atom in frozenset().union(*atoms):
        gone = np.array([atom in row for row in atoms])
        for sizes in ((2, 6), (4, 3)):
            table = gone.reshape(sizes)  # what goes are whole rows and whole columns
            assert (table == (table.all(1)[:, None] | table.all(0)[None])).all()


def test_deep_parts():
    labels = Labels()
    sides = [labels.fresh(2) for _ in range(4)]
    merged = sides[-1]
    for side in reversed(sides[:-1]):
        n = len(merged)
        merged = labels.paired(np.repeat(side, n), np.tile(merged, 2))
    labels.resolve()
    assert {len(set(row) - {-1}) for row in labels.atoms(merged).tolist()} == {4}


def test_an_axis_that_is_its_own_part_goes_alone():
    """Interleaved pairs that are stacked again and multiplied with what they came from."""
    labels = Labels()
    pairs, two = labels.fresh(3), labels.fresh(2)
    merged = labels.paired(np.repeat(pairs, 2), np.tile(two, 3))
    labels.unify(np.repeat(pairs, 2), merged)
    resolved = labels.resolve()
    assert (labels.atoms(merged)[:, 0] == np.repeat(labels.find(pairs), 2)).all()
    assert resolved.marked("locked", labels.find(two)).all()
    assert not resolved.marked("locked", labels.find(pairs)).any()


def test_circles_are_locked():
    labels = Labels()
    a, b, x, y = (labels.fresh(1) for _ in range(4))
    labels.unify(a, labels.paired(b, x))
    labels.unify(b, labels.paired(a, y))
    resolved = labels.resolve()
    for label in (a, b, x, y):
        assert resolved.marked("locked", labels.atoms(label)[:, 0]).all()


def test_marks_go_down_to_parts_and_along_equals():
    labels = Labels()
    rows, columns = labels.fresh(2), labels.fresh(2)
    merged = labels.paired(np.repeat(rows, 2), np.tile(columns, 2))
    other = labels.fresh(4)
    labels.mark("locked", other[:1], "first")
    labels.mark("locked", other[:1], "second")
    labels.unify(merged, other)
    resolved = labels.resolve()
    assert resolved.why("locked", int(rows[0])) == "first"
    assert resolved.why("locked", int(columns[0])) == "first"
    assert resolved.why("locked", int(rows[1])) is None
    assert resolved.why("inexact", int(rows[0])) is None


@pytest.mark.parametrize("seed", range(20))
def test_random_algebra_is_sound(seed):
    """Whatever was unified is removed together, once some unlocked atoms are removed."""
    rng = np.random.default_rng(seed)
    labels = Labels()
    pool = [labels.fresh(int(n)) for n in rng.choice([4, 6, 12], 6)]
    equal, parts = [], []
    for _ in range(12):
        a, b = (pool[i] for i in rng.choice(len(pool), 2))
        if len(a) == len(b) and rng.random() < 0.5:
            labels.unify(a, b)
            equal.append((a, b))
        elif len(a) * len(b) <= 150:
            first, second = np.repeat(a, len(b)), np.tile(b, len(a))
            merged = labels.paired(first, second)
            parts.append((merged, first, second))
            pool.append(merged)
    resolved = labels.resolve()

    def atoms(x):
        return labels.atoms(x)

    everything = np.unique(np.concatenate([atoms(x).ravel() for x in pool]))
    everything = everything[everything >= 0]
    free = everything[~resolved.marked("locked", everything)]
    gone = free[rng.random(len(free)) < 0.3]

    def removed(x):
        return np.isin(atoms(x), gone).any(1)

    for a, b in equal:
        assert (removed(a) == removed(b)).all()
    for merged, first, second in parts:
        assert (removed(merged) == (removed(first) | removed(second))).all()
