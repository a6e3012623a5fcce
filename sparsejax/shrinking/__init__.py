"""Smaller networks: a plan of what goes, carried out, undone, and any function at its sizes."""

from sparsejax.shrinking._choosing import plan
from sparsejax.shrinking._cutting import expand, masks, shrink
from sparsejax.shrinking._plan import Cut, Plan
from sparsejax.shrinking._recalibration import recalibrate
from sparsejax.shrinking._replay import replay
from sparsejax.shrinking._sizes import resize_nnx

__all__ = [
    "Cut",
    "Plan",
    "expand",
    "masks",
    "plan",
    "recalibrate",
    "replay",
    "resize_nnx",
    "shrink",
]
