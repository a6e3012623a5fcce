"""A fit at many strengths: one after the other, or all at once."""

from collections.abc import Iterable, Sequence
from functools import partial
from os import PathLike
from pathlib import Path as FilePath
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import _checks, _form, _progress, _run_folder, filters
from sparsejax._form import Form
from sparsejax._typing import Filter, Params, Scalar
from sparsejax.paths import _batches, _fits, _strengths
from sparsejax.paths._fits import Fit, Score
from sparsejax.paths._results import Path


def strength_path(
    fit: Fit,
    strengths: Sequence[Scalar] | np.ndarray | jax.Array,
    params: Params,
    data: Any = None,
    *,
    score: Score | None = None,
    begin: Literal["previous", "start"] = "previous",
    key: jax.Array | None = None,
    prunable: Filter = filters.weights,
    folder: str | PathLike[str] | None = None,
    progress: bool | str = True,
) -> Path:
    """Fits at one strength after the other, each beginning where the last one ended.

    Neighbours on a path are alike, so that a fit that begins at its neighbour is soon done. The
    order is the caller's: descending λ for a penalty, since zeros fill in one by one; ascending
    sparsities prune a network iteratively.

    Args:
      fit: `(strength, params, data, key) -> params`, pure; the strength is a Python float, so that
        it need not be traceable. It is not compiled here: a fit that should be is jitted.
      strengths: finite numbers >= 0 in any order, larger = sparser.
      params: a pytree of arrays to start from. It goes through fits as JAX has it (float64 is
        float32 where x64 is off); leaves that are no arrays, such as functions, stay as they are
        here, whatever a fit returns there.
      data: what fits and the score are given: a pytree, or anything where there is no folder.
      score: `(params, data) -> loss`, for `Path.loss`.
      begin: `"previous"`: fit i begins at the result of fit i - 1; `"start"`: at `params`.
      key: fit i gets `fold_in(key, i)`, so that what it draws depends on the key and i alone.
        `None`: fits get `None`, and cannot draw.
      prunable: which leaves count for the sparsity.
      folder: a folder in which each finished fit is written at once; called again after a kill with
        the same arguments, the run goes on from there, bit for bit. A run with other arguments is
        refused; the functions cannot be compared, so that another `fit` needs another folder. It
        may be deleted afterwards.
      progress: shows a bar, on standard error; a text stands before it. False shows nothing.

    Returns:
      A `Path`.

    Raises:
      TypeError, ValueError: if an argument is of the wrong kind or out of range; if a fit's params
        are not like those it started from, with the leaf's path; if `folder` is another run's (with
        what differs) or damaged (with the file).

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import sparsejax as sj
      >>> from sparsejax import paths
      >>> def loss(params, target):
      ...     return 0.5 * jnp.sum((params["w"] - target) ** 2)
      >>> fit = paths.minimizer(
      ...     loss, lambda s: sj.penalized(optax.sgd(0.5), sj.penalties.l1(s)), steps=200
      ... )
      >>> start, target = {"w": jnp.zeros((1, 2))}, jnp.array([[2.0, 0.5]])
      >>> path = paths.strength_path(fit, [2, 1, 0.25], start, target, score=loss, progress=False)
      >>> path.params["w"].round(4)
      array([[[0.  , 0.  ]],
             [[1.  , 0.  ]],
             [[1.75, 0.25]]], dtype=float32)
      >>> path.sparsity, path.loss.round(4)
      (array([1. , 0.5, 0. ]), array([2.125 , 0.625 , 0.0625]))
    """
    _checks.choice("begin", begin, ("previous", "start"))
    grid, form = _checked(fit, strengths, params, score, key, prunable)
    run = _opened(folder, "strength_path", {"begin": begin}, grid, form, data, key)
    fits: list[list[np.ndarray]] = []
    zeros = []
    with _progress.bar(progress, "fits", len(grid)) as advance:
        for i, strength in enumerate(grid.tolist()):
            warm = fits[-1] if fits and begin == "previous" else form.arrays

            def fitted(strength: float = strength, i: int = i, warm: Any = warm) -> Any:
                return _host(
                    form.taken(fit(strength, form.placed(warm), data, _form.folded(key, i)))
                )

            fits.append(_run_folder.once(run, f"fit-{i:04}", form.arrays, fitted))
            zeros.append(_fits.sparsity(form.filled(fits[-1]), prunable))
            advance(_fit_done(strength, zeros[-1]))
    return _assembled(grid, form, fits, zeros, data, score)


def batched_path(
    fit: Fit,
    strengths: Sequence[Scalar] | np.ndarray | jax.Array,
    params: Params,
    data: Any = None,
    *,
    score: Score | None = None,
    key: jax.Array | None = None,
    prunable: Filter = filters.weights,
    devices: Sequence[jax.Device] | None = None,
    folder: str | PathLike[str] | None = None,
    progress: bool | str = True,
) -> Path:
    """Fits at all strengths at once, by `vmap`, each beginning at `params`.

    `strength_path` with `begin="start"`, up to rounding. Small models, and those on accelerators,
    gain; but every fit takes as many steps as the slowest, none has a neighbour to begin at, and
    the params and the optimizer's state of all are in memory together.

    Args:
      fit: `(strength, params, data, key) -> params`, pure, and traceable: the strength is a 0-d
        array, all of them at once under `vmap`.
      strengths: finite numbers >= 0 in any order, larger = sparser.
      params: a pytree of arrays to start from, as in `strength_path`.
      data: what fits and the score are given, all fits the same.
      score: `(params, data) -> loss`, for `Path.loss`; called on one fit after the other.
      key: fit i gets `fold_in(key, i)`. `None`: fits get `None`, and cannot draw.
      prunable: which leaves count for the sparsity.
      devices: share the strengths out over these, as equally as may be; each device loops on its
        own until the slowest of its fits is done. The answer is the same up to rounding. `None`:
        where the arrays are.
      folder: as in `strength_path`, but all fits finish, and are written, together.
      progress: shows a bar, on standard error; a text stands before it. False shows nothing.

    Returns:
      A `Path`.

    Raises:
      TypeError, ValueError: as in `strength_path`, and if `devices` are none.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import sparsejax as sj
      >>> from sparsejax import paths
      >>> def loss(params, target):
      ...     return 0.5 * jnp.sum((params["w"] - target) ** 2)
      >>> fit = paths.minimizer(
      ...     loss, lambda s: sj.penalized(optax.sgd(0.5), sj.penalties.l1(s)), steps=200
      ... )
      >>> start, target = {"w": jnp.zeros((1, 2))}, jnp.array([[2.0, 0.5]])
      >>> path = paths.batched_path(fit, [2, 1], start, target, progress=False)
      >>> path.params["w"].round(4)
      array([[[0., 0.]],
             [[1., 0.]]], dtype=float32)
    """
    grid, form = _checked(fit, strengths, params, score, key, prunable)
    _batches.check_devices(devices)
    run = _opened(folder, "batched_path", {}, grid, form, data, key)

    def fitted() -> list[np.ndarray]:
        traced = jnp.asarray(grid, float)
        keys = (
            None
            if key is None
            else jax.vmap(partial(jax.random.fold_in, key))(np.arange(len(grid)))
        )
        if devices is None:
            return _host(_batches.fit_all(fit, form, traced, keys, form.arrays, data))
        return _host(_batches.fit_spread(fit, form, traced, keys, data, devices))

    stacked = [np.empty((len(grid), *x.shape), x.dtype) for x in form.arrays]
    with _progress.bar(progress, "fits", len(grid)) as advance:
        columns = _run_folder.once(run, "fits", stacked, fitted)
        fits = [[x[i] for x in columns] for i in range(len(grid))]
        zeros = [_fits.sparsity(form.filled(arrays), prunable) for arrays in fits]
        for strength, sparsity in zip(grid.tolist(), zeros, strict=True):
            advance(_fit_done(strength, sparsity))
    return _assembled(grid, form, fits, zeros, data, score)


def _checked(
    fit: Any, strengths: Any, params: Any, score: Any, key: Any, prunable: Any
) -> tuple[np.ndarray, Form]:
    _checks.function("fit", fit, "(strength, params, data, key) -> params", "paths.minimizer(...)")
    if score is not None:
        _checks.function("score", score, "(params, data) -> loss", "the loss without its penalty")
    grid = _strengths.checked(strengths)
    if key is not None:
        _checks.key("key", key)
    filters.selected(prunable, params)  # or every sparsity would be that of nothing
    return grid, _form.form_of(params)


def _opened(
    folder: Any,
    function: str,
    how: dict[str, Any],
    grid: np.ndarray,
    form: Form,
    data: Any,
    key: Any,
) -> FilePath | None:
    if folder is None:
        return None
    arguments = {
        "folder": f"a run of {function}",
        "strengths": grid.tolist(),
        **how,
        "key": _run_folder.key_fingerprint(key),
        "params": _form.fingerprint(form),
        "data": _run_folder.fingerprint("data", data),
    }
    return _run_folder.open_run(folder, arguments)


def _fit_done(strength: float, sparsity: float) -> str:
    return f"strength {strength:.4g}, sparsity {sparsity:.3f}"


def _assembled(
    grid: np.ndarray,
    form: Form,
    fits: list[list[np.ndarray]],
    zeros: list[float],
    data: Any,
    score: Score | None,
) -> Path:
    losses = [
        np.nan if score is None else _fits.loss(score, form.placed(arrays), data) for arrays in fits
    ]
    return Path(
        strengths=grid,
        params=form.filled([np.stack(column) for column in zip(*fits, strict=True)]),
        sparsity=np.array(zeros),
        loss=np.array(losses),
    )


def _host(arrays: Iterable[Any]) -> list[np.ndarray]:
    return [np.array(x) for x in arrays]
