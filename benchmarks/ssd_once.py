"""One forward and backward of the scan at 8 x 4096, for a profiler (ncu)."""

from __future__ import annotations

import sys

import torch

sys.path.insert(0, "src")

from kernels_on_gpu.measuring import documents, normal, ssd_inputs
from longspan.ops.triton import ssd as launched

shape = (8, 4096)
given = launched.Inputs(*ssd_inputs(*shape, 24, 64, 128), None, documents(*shape, 700.0), None, None)
dy = normal(*shape, 24, 64)
into, ddt = launched.Gradients.like(given), torch.empty_like(given.dt)
for _ in range(2):
    y, _, kept = launched.run_forward(given)
    launched.run_backward(given, kept, dy, None, into, ddt)
torch.cuda.synchronize()
print("done", float(y.float().norm()))
