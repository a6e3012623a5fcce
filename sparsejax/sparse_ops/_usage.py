"""Where a function uses its weights: in products that can be replaced, or otherwise, and why."""

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from sparsejax import _jaxpr
from sparsejax.sparse_ops import _forms
from sparsejax.sparse_ops._product import Product

_PRODUCTS = ("dot_general", "conv_general_dilated")
_LOOPS = ("scan", "while", "cond")


@dataclasses.dataclass(frozen=True)
class View:
    """A weight alone, perhaps in another shape or precision.

    Attributes:
      leaf: the weight's number.
      shape: its own shape.
      moves: from that to the shape here.
    """

    leaf: int
    shape: tuple[int, ...]
    moves: _forms.Moves = ()

    def then(self, moves: _forms.Moves) -> _forms.Moves:
        """All moves, if some more follow."""
        return _forms.tidy((*self.moves, *moves), self.shape)


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a weight: a product that can be replaced, or why it cannot.

    Attributes:
      product: its sizes; `None` where it cannot be replaced.
      moves: what makes the weight (inputs, outputs) or HWIO.
      why: why it cannot.
    """

    product: Product | None = None
    moves: _forms.Moves = ()
    why: str = ""

    def kept(self, mask: Any) -> Any:
        """The weight's mask as the product has it."""
        return _forms.moved(mask, self.moves)


Views: TypeAlias = list[View | None]


def move_of(eqn: Any) -> _forms.Moves | None:
    """What an equation does to the shape of its operand, if it does nothing else but round."""
    name, params = eqn.primitive.name, eqn.params
    if not eqn.invars or not eqn.outvars:
        return None
    before, after = eqn.invars[0].aval, eqn.outvars[0].aval
    if name == "transpose":
        return (("transpose", tuple(params["permutation"])),)
    if name in ("copy", "copy_p"):
        return ()
    if name == "convert_element_type":
        floats = {str(before.dtype), str(after.dtype)} <= {"float32", "bfloat16"}
        return () if floats and params.get("sharding") is None else None
    if name == "broadcast_in_dim" and before.size != after.size:
        return None
    if name not in ("broadcast_in_dim", "reshape", "squeeze", "expand_dims"):
        return None
    ordered = name == "reshape" and params["dimensions"] is not None
    if len(eqn.invars) != 1 or params.get("sharding") is not None or ordered:
        return None
    return (("reshape", tuple(after.shape)),)


def uses(jaxpr: Any, weights: Mapping[int, int]) -> dict[int, list[Use]]:
    """All uses of some arguments of an open jaxpr.

    Args:
      jaxpr: what is read.
      weights: by the place of an argument, the number of the weight that it is.

    Returns:
      By the number of a weight, its uses, in the order of the equations.
    """
    walk = _Walk()
    views: Views = [
        View(weights[place], atom.aval.shape) if place in weights else None
        for place, atom in enumerate(jaxpr.invars)
    ]
    walk.end(walk.run(jaxpr, views), "it is an output of the function")
    return walk.found


class _Walk:
    """A walk over a jaxpr and all that it calls."""

    def __init__(self) -> None:
        self.found: dict[int, list[Use]] = defaultdict(list)

    def run(self, jaxpr: Any, views: Views, line: str = "") -> Views:
        """The views that it returns; `line` is where it is called."""
        env = dict(zip(jaxpr.invars, views, strict=True))

        def read(atom: Any) -> View | None:
            return None if _jaxpr.literal(atom) else env.get(atom)

        for _, eqn in _jaxpr.live(jaxpr):
            operands = [read(atom) for atom in eqn.invars]
            if any(view is not None for view in operands):
                answers = self._step(eqn, operands, _jaxpr.line(eqn) or line)
                env.update(zip(eqn.outvars, answers, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def end(self, views: Sequence[View | None], why: str) -> None:
        for view in views:
            if view is not None:
                self.found[view.leaf].append(Use(why=why))

    def _step(self, eqn: Any, views: Views, line: str) -> Views:
        nothing: Views = [None] * len(eqn.outvars)
        name, at = eqn.primitive.name, line and f", {line}"
        moves = move_of(eqn)
        if moves is not None:
            (view,) = views
            assert view is not None
            return [dataclasses.replace(view, moves=view.then(moves))]
        if name in _PRODUCTS:
            self._product(eqn, views, at)
            return nothing
        if name in _jaxpr.CALLS:
            return self.run(_jaxpr.opened(_jaxpr.body(eqn))[0], views, line)
        if name in _jaxpr.REMAT | _jaxpr.CUSTOM_JVP | _jaxpr.CUSTOM_VJP:
            outs = self.run(_jaxpr.opened(_jaxpr.body(eqn))[0], views, line)
            self.end(outs, f"`{name}` returns it{at}")
            return nothing
        inside = "is used inside" if name in _LOOPS else "is read by"
        self.end(views, f"it {inside} `{name}`{at}")
        return nothing

    def _product(self, eqn: Any, views: Views, at: str) -> None:
        if all(view is not None for view in views):
            self.end(views, f"it is multiplied by another pruned weight{at}")
            return
        side = 0 if views[1] is None else 1
        view = views[side]
        assert view is not None
        form = _forms.form_of(eqn, side)
        if isinstance(form, str):
            self.end([view], f"it is in {form}{at}")
            return
        moves = view.then(form.w)
        turned = form.product.kind == "matmul" and any(kind == "transpose" for kind, _ in moves)
        product = dataclasses.replace(form.product, transposed=turned)
        self.found[view.leaf].append(Use(product, moves))
