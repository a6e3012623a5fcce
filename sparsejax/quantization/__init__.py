"""Weights in few bits, the pruned ones still exactly zero.

================= ======================================== =======================================
function          a kept weight becomes                    for
================= ======================================== =======================================
`quantize`        an integer times a scale (`qwix.QArray`) int8 and int4, also to compute with them
`fake_quantize`   the same as a float, in the loss         training that knows of the rounding
`share`           one of 2**bits values (`Shared`)         the smallest file
================= ======================================== =======================================

All take params of any framework and give a tree like them, in which quantized leaves are pytrees
of a few arrays; `dequantize` makes params of it again. Pruned entries have the code 0, which is
zero and nothing else, so masks need not be stored: `masks` reads them off. `storage` saves and
loads such trees as any other, bit for bit, with the codes in about as few bits as their entropy; to
load one, `like` is `quantize(params, ...)` or `share(params, ...)` of any params of those shapes.

After training `quantize` loses next to nothing at 8 bits. At 4, train on with `fake_quantize`
inside the loss, or `share` and train the codebooks (`partition`); `measure` says what was lost.

Integers are qwix's (`pip install 'sparsejax[quantization]'`): Google's JAX library for it, released
every few months, with int8 and int4 matrix products and convolutions that take its arrays; of its
predecessor AQT the last release, 0.9.0, is of August 2025, and it quantizes operations, not params.
qwix's own `quantize_model` and `QtProvider` know Flax only and act on operations; here we use its
arrays, which know no framework. Codebooks it has none.
"""

from sparsejax.quantization._coded import Shared
from sparsejax.quantization._measuring import Change, measure
from sparsejax.quantization._sharing import share
from sparsejax.quantization._trees import combine, dequantize, masks, partition
from sparsejax.quantization._uniform import fake_quantize, quantize

__all__ = [
    "Change",
    "Shared",
    "combine",
    "dequantize",
    "fake_quantize",
    "masks",
    "measure",
    "partition",
    "quantize",
    "share",
]
