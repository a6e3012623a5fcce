"""Walking and re-evaluating jaxprs: what `dependency`, `shrinking` and `sparse_ops` share."""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

# Frames inside these say nothing about whose code an equation is.
_LIBRARIES = ("jax", "flax", "haiku", "equinox", "optax", "einops", "jaxtyping", "contextlib.py")


# Names of calls in the supported releases; `body` is what they call.
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "call"})
REMAT = frozenset({"remat2", "checkpoint", "remat"})
CUSTOM_JVP = frozenset({"custom_jvp_call"})
CUSTOM_VJP = frozenset({"custom_vjp_call", "custom_vjp_call_jaxpr"})


def literal(atom: Any) -> bool:
    """Whether an equation's operand is written into it."""
    return isinstance(atom, core.Literal)


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """A jaxpr and the values of its constants, whether closed over or not."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, ())


def body(eqn: Any) -> Any:
    """The jaxpr that an equation calls."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if name in eqn.params:
            return eqn.params[name]
    raise ValueError(f"{eqn.primitive.name} calls no jaxpr.")


def scan_parts(eqn: Any, items: Sequence[Any]) -> list[list[Any]]:
    """The constants, the carry and the rows of a scan; from jax 0.11 on they are in a tree."""
    if "ft_in" in eqn.params:
        return [list(part) for part in eqn.params["ft_in"].update(items).unpack()]
    return parted(items, eqn.params["num_consts"], eqn.params["num_carry"])


def parted(items: Sequence[Any], *counts: int) -> list[list[Any]]:
    """A sequence in pieces of these lengths, and the rest."""
    pieces, start = [], 0
    for count in counts:
        pieces.append(list(items[start : start + count]))
        start += count
    return [*pieces, list(items[start:])]


def live(jaxpr: Any) -> list[tuple[int, Any]]:
    """The equations that an output or an effect needs, numbered by their place."""
    needed = {atom for atom in jaxpr.outvars if not literal(atom)}
    found = []
    for place, eqn in reversed(list(enumerate(jaxpr.eqns))):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            needed.update(atom for atom in eqn.invars if not literal(atom))
            found.append((place, eqn))
    return found[::-1]


def bind(eqn: Any, values: Sequence[Any], **changed: Any) -> list[Any]:
    """Evaluates an equation on other values, perhaps with some of its parameters changed."""
    params = eqn.primitive.get_bind_params(dict(eqn.params, **changed))
    # jax 0.10.2 returns the functions among the parameters, other releases beside them.
    functions, params = params if isinstance(params, tuple) else ((), params)
    with contextlib.ExitStack() as stack:
        if hasattr(eqn, "ctx"):
            stack.enter_context(eqn.ctx.manager)
        answer = eqn.primitive.bind(*functions, *values, **params)
    return list(answer) if eqn.primitive.multiple_results else [answer]


def function_of(eqn: Any) -> Callable[..., list[Any]]:
    """One equation as a function of its operands."""
    return lambda *values: bind(eqn, values)


def line(eqn: Any) -> str:
    """The line of the user's code that asked for an equation, or an empty string."""
    traceback = eqn.source_info.traceback
    frames = traceback.frames if traceback is not None else []
    outside = [f for f in frames if os.path.isabs(f.file_name)]
    own = next((f for f in outside if not _is_library(f.file_name)), None)
    # The whole call was a library's: the innermost frame that is not JAX's.
    frame = own or next((f for f in outside if "jax" not in f.file_name.split(os.sep)), None)
    if frame is None:
        return ""
    return f"{os.path.basename(frame.file_name)}:{frame.line_num} ({frame.function_name})"


def _is_library(file_name: str) -> bool:
    parts = file_name.split(os.sep)
    return any(name in parts for name in _LIBRARIES) or file_name.startswith(_HERE)


_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


def abstract(aval: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an operand, as arguments of `jax.make_jaxpr`."""
    return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
