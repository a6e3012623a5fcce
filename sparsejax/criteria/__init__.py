"""Criteria: scores of parameters, higher = keep.

======================================== ================================================== ======
criterion                                score of θ                                         needs
======================================== ================================================== ======
`magnitude`                              |θ|                                                params
`lamp`                                   θ² over the squares that are not smaller           params
`random`                                 uniform: the baseline                              a key
`synflow`                                its share of the flow through |θ|, without data    inputs
`gradient`                               |g|                                                grads
`taylor`, `snip`                         |θ·g|; the same as a share of the whole            grads
`mean_taylor`                            mean of |θ·g| over batches                         loss
`fisher`                                 ½ θ² · mean of g² over examples                    loss
`obd`                                    ½ θ² · H_ii                                        diag H
`grasp`                                  θ · Hg                                             loss
`output_gradient`                        mean of |∂output/∂θ|                               inputs
======================================== ================================================== ======

Those of params and gradients are functions `(params, grads) -> scores`, which can stand wherever
a `criterion` is asked for; `mean_gradients` makes gradients of many batches. Those of a loss go
through `batches` themselves. `hessian_vector_product`, `hessian_diagonal` and `hutchinson` (its
estimate) are the second derivatives in them.

Before training, `snip`, `grasp` and `synflow` tell from the initial weights; after it, θ and g say
little together (at a minimum the mean gradient is zero): take `magnitude`, or `fisher` and `obd`,
to which data and curvature matter.

Scores are a pytree like the params. Those of half-precision leaves are float32, so that a product
does not underflow. A leaf that is no floating array (integers, functions, PRNG keys), or that has
no gradient where the criterion needs one, gets a 0-d boolean instead of scores, which no filter for
floating leaves selects.
"""

from sparsejax.criteria._curvature import grasp, hessian_diagonal, hutchinson
from sparsejax.criteria._fisher import fisher
from sparsejax.criteria._gradients import mean_gradients, mean_taylor
from sparsejax.criteria._hessian import hessian_vector_product
from sparsejax.criteria._lamp import lamp
from sparsejax.criteria._leafwise import gradient, magnitude, obd, random, snip, taylor
from sparsejax.criteria._output_gradient import output_gradient
from sparsejax.criteria._synflow import synflow

__all__ = [
    "fisher",
    "gradient",
    "grasp",
    "hessian_diagonal",
    "hessian_vector_product",
    "hutchinson",
    "lamp",
    "magnitude",
    "mean_gradients",
    "mean_taylor",
    "obd",
    "output_gradient",
    "random",
    "snip",
    "synflow",
    "taylor",
]
