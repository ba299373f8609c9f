"""Measurements of this machine: `ijepa bench step|masks|attention|evaluation|index|order`.

Whatever is compared takes turns within one process, so that whatever else the machine does falls on all of it; time
is the process's CPU time where the work is the CPU's, and ratios are medians over turns. Figures are meant to be read
as ratios: seconds of a shared machine say little.
"""

from ijepa.bench.attention import bench_attention
from ijepa.bench.evaluation import bench_evaluation
from ijepa.bench.index import bench_index
from ijepa.bench.masks import bench_masks
from ijepa.bench.order import bench_order
from ijepa.bench.step import bench_step

__all__ = ["bench_attention", "bench_evaluation", "bench_index", "bench_masks", "bench_order", "bench_step"]
