"""Tables of networks: nonzeros, compression, FLOPs, bytes, accuracy, latency.

`row` measures a network (its zeros, its operations, the bytes of its file) and takes what you have
measured; a `Report` of rows is the table: `print` it, or ask it for `markdown`, `json`, `csv` or
`rich`. Seeds are rows of one name, which `Report.pooled` turns into mean ± standard deviation.

    dense = reports.row("dense", params, apply_fn=apply, inputs=x[:1], accuracy=0.984)
    small = reports.row("pruned", pruned, masks, apply_fn=apply, inputs=x[:1], file=path)
    print(reports.Report([dense, small]))

`layers` is the table of one network, leaf by leaf, `history` that of a pruning procedure, round by
round; `flops` counts operations, `latency` and `latencies` measure time.
"""

from sparsejax.reports._flops import Cost, Flops, flops
from sparsejax.reports._latency import latencies, latency
from sparsejax.reports._measuring import history, layers, row
from sparsejax.reports._report import Report
from sparsejax.reports._row import Row

__all__ = [
    "Cost",
    "Flops",
    "Report",
    "Row",
    "flops",
    "history",
    "latencies",
    "latency",
    "layers",
    "row",
]
