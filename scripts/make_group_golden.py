"""Makes `tests/golden/group_lasso.json`: group lasso by celer; its kin, MCP and SCAD by skglm.

    python3.11 -m venv /tmp/groupv
    /tmp/groupv/bin/pip install celer==0.7.4 skglm==0.5 scikit-learn==1.9.1
    /tmp/groupv/bin/python scripts/make_group_golden.py

Two real data sets of scikit-learn, columns and target standardized (mean 0, variance 1, divided by
n), so that no intercept is needed: `diabetes`, and `wine`, whose last column, proline, is predicted
from the other twelve. The file holds what cannot be had from the data: groups, strengths,
coefficients, objectives. Every solution with groups is checked here against its optimality
conditions, and the group lasso against skglm as well. Those of MCP and SCAD are local minima.
"""

import argparse
import json
import math
import warnings
from pathlib import Path
from typing import Any

import celer
import numpy as np
import skglm
import sklearn
from scipy.optimize import brentq
from skglm.datafits import Quadratic, QuadraticGroup
from skglm.penalties import SCAD, MCPenalty, WeightedL1GroupL2
from skglm.solvers import AndersonCD, GroupBCD
from sklearn.datasets import load_diabetes, load_wine

TARGET = Path(__file__).resolve().parents[1] / "tests" / "golden" / "group_lasso.json"
FRACTIONS = (0.05, 0.2, 0.6)
# Groups are not contiguous in wine: labels must be read, not counted off.
GROUPS = {
    "diabetes": [[0], [1, 2], [3, 4, 5], [6, 7, 8, 9]],
    "wine": [[0, 11], [1, 2, 3, 4], [5], [6, 7, 8], [9, 10]],
}
# The share of the strength that is L1 in the sparse group lasso.
L1_RATIO = 0.3
GAMMA, A = 3.0, 3.7
CONVENTIONS = {
    "data": "columns and target standardized: minus the mean, over the standard deviation (ddof 0)",
    "group_lasso": "1/(2n) |y - Xw|^2 + strength * sum_g sqrt(size of g) |w_g|_2",
    "sparse_group_lasso": (
        "1/(2n) |y - Xw|^2 + strength * (l1_ratio * |w|_1"
        " + (1 - l1_ratio) * sum_g sqrt(size of g) |w_g|_2)"
    ),
    "mcp": "1/(2n) |y - Xw|^2 + sum p(w), p' from strength at 0 linearly to 0 at gamma * strength",
    "scad": "likewise, p' = strength up to strength, then linearly to 0 at a * strength",
    "strength_max": "the least strength at which w = 0",
    "groups": "column numbers of each group",
}


def standardized(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(0)) / x.std(0)


def problem(name: str) -> tuple[np.ndarray, np.ndarray]:
    if name == "diabetes":
        X, y = load_diabetes(return_X_y=True)
    else:
        X, y = np.split(load_wine().data, [12], axis=1)
        y = y[:, 0]
    return standardized(X), standardized(y)


def soft(x: np.ndarray, t: float) -> np.ndarray:
    return np.sign(x) * np.maximum(np.abs(x) - t, 0)


def strength_max(X: np.ndarray, y: np.ndarray, groups: list[list[int]], ratio: float) -> float:
    """The root of |soft(X'y/n, ratio * s)_g| = (1 - ratio) * s * sqrt(|g|), the largest of all."""
    slopes = np.abs(X.T @ y) / len(y)

    def excess(s: float, g: list[int]) -> float:
        return float(
            np.linalg.norm(soft(slopes[g], ratio * s)) - (1 - ratio) * s * math.sqrt(len(g))
        )

    top = 2 * slopes.max() / max(1 - ratio, 0.1)
    return max(brentq(excess, 0, top, (g,), xtol=1e-16, rtol=1e-15) for g in groups)


def objective(
    X: np.ndarray, y: np.ndarray, w: np.ndarray, groups: list[list[int]], s: float, ratio: float
) -> float:
    norms = sum(math.sqrt(len(g)) * np.linalg.norm(w[g]) for g in groups)
    loss = np.square(y - X @ w).sum() / (2 * len(y))
    return float(loss + s * (ratio * np.abs(w).sum() + (1 - ratio) * norms))


def violation(
    X: np.ndarray, y: np.ndarray, w: np.ndarray, groups: list[list[int]], s: float, ratio: float
) -> float:
    """The norm of the least subgradient, which is 0 at the solution."""
    grad, least = X.T @ (X @ w - y) / len(y), np.zeros_like(w)
    for g in groups:
        kink, norm = (1 - ratio) * s * math.sqrt(len(g)), np.linalg.norm(w[g])
        at_zero = soft(grad[g], ratio * s)
        if norm == 0:
            size = np.linalg.norm(at_zero)
            least[g] = at_zero * max(1 - kink / max(size, 1e-300), 0)
        else:
            pulled = grad[g] + ratio * s * np.sign(w[g])
            least[g] = np.where(w[g] == 0, at_zero, pulled + kink * w[g] / norm)
    return float(np.linalg.norm(least))


def group_lasso(X: np.ndarray, y: np.ndarray, groups: list[list[int]], s: float) -> np.ndarray:
    weights = np.sqrt([len(g) for g in groups])
    model = celer.GroupLasso(
        groups=groups, alpha=s, weights=weights, fit_intercept=False, tol=1e-15, max_iter=1000
    )
    return model.fit(np.asfortranarray(X), y).coef_


def sparse_group_lasso(
    X: np.ndarray, y: np.ndarray, groups: list[list[int]], s: float, ratio: float
) -> np.ndarray:
    pointers = np.cumsum([0, *map(len, groups)]).astype(np.int32)
    columns = np.concatenate(groups).astype(np.int32)
    penalty = WeightedL1GroupL2(
        s,
        (1 - ratio) * np.sqrt([len(g) for g in groups]),
        np.full(X.shape[1], ratio),
        pointers,
        columns,
    )
    solver = GroupBCD(max_iter=1000, tol=1e-13, ws_strategy="fixpoint", fit_intercept=False)
    model = skglm.GeneralizedLinearEstimator(QuadraticGroup(pointers, columns), penalty, solver)
    return model.fit(np.asfortranarray(X), y).coef_


def nonconvex(X: np.ndarray, y: np.ndarray, kind: Any, shape: float) -> list[dict[str, Any]]:
    """A local minimum for each fraction of the strength at which w = 0."""
    top, found = float(np.abs(X.T @ y).max() / len(y)), []
    for fraction in FRACTIONS:
        solver = AndersonCD(max_iter=1000, tol=1e-13, fit_intercept=False)
        penalty = kind(fraction * top, shape)
        model = skglm.GeneralizedLinearEstimator(Quadratic(), penalty, solver)
        w = model.fit(np.asfortranarray(X), y).coef_ + 0.0  # no -0
        found.append({"fraction": fraction, "strength": fraction * top, "coefficients": w.tolist()})
    return found


def entry(w: np.ndarray, fraction: float, s: float, *rest: Any) -> dict[str, Any]:
    X, y, groups, ratio = rest
    off = violation(X, y, w, groups, s, ratio)
    if off > 1e-9:
        raise ValueError(f"Not solved: the least subgradient has norm {off}.")
    return {
        "fraction": fraction,
        "strength": s,
        "coefficients": (w + 0.0).tolist(),  # no -0
        "objective": objective(X, y, w, groups, s, ratio),
        "violation": off,
    }


def solutions(name: str) -> dict[str, Any]:
    X, y = problem(name)
    groups = GROUPS[name]
    top, sparse_top = (strength_max(X, y, groups, r) for r in (0.0, L1_RATIO))
    plain, sparse = [], []
    for fraction in FRACTIONS:
        s = fraction * top
        w = group_lasso(X, y, groups, s)
        other = sparse_group_lasso(X, y, groups, s, 0.0)
        if np.abs(w - other).max() > 1e-8:
            raise ValueError(f"celer and skglm differ: {w}, {other}.")
        plain.append(entry(w, fraction, s, X, y, groups, 0.0))
        s = fraction * sparse_top
        w = sparse_group_lasso(X, y, groups, s, L1_RATIO)
        sparse.append(entry(w, fraction, s, X, y, groups, L1_RATIO))
    return {
        "groups": groups,
        "group_lasso": {"strength_max": top, "solutions": plain},
        "sparse_group_lasso": {
            "l1_ratio": L1_RATIO,
            "strength_max": sparse_top,
            "solutions": sparse,
        },
        "mcp": {"gamma": GAMMA, "solutions": nonconvex(X, y, MCPenalty, GAMMA)},
        "scad": {"a": A, "solutions": nonconvex(X, y, SCAD, A)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", type=Path, default=TARGET, help="default: %(default)s")
    target = parser.parse_args().target
    warnings.simplefilter("ignore")  # Tolerances below what float64 can show.
    content = {
        "made_by": {
            "script": "scripts/make_group_golden.py",
            "celer": celer.__version__,
            "skglm": skglm.__version__,
            "scikit-learn": sklearn.__version__,
        },
        "conventions": CONVENTIONS,
        "problems": {name: solutions(name) for name in GROUPS},
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=1) + "\n")
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
