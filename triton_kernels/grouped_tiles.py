"""How grouped_gemm.py is cut: the sizes of the tiles on each architecture, and which tile a program has.

The sizes were found without a GPU and have not been timed by one. Each is the first of a scan by aot.py (bfloat16,
D 2048, F 1024) that neither spills nor passes the shared memory (99 KB for sm_80, to serve sm_86, sm_89 and sm_120 too)
in any use of the kernel, on Triton 3.9 and 3.6: a weight read along its rows or its columns, two products in one sum,
gate and up kept or not. In order: the larger tile; 64, then 32 numbers of depth; 4, 3, 2 stages (gfx942: 2, 1; up to 6
where the number of a row must arrive before the row, since every second stage then waits for numbers); 8 warps, then 4.
On sm_90 a SwiGLU tile of 128 x 128 spills 8 bytes where there are few experts (8 on Triton 3.6, 1 on both); 256 x 64
moves as many bytes for the same work, and spills nowhere. float32, and widths that 16 does not divide, take one small
tile. Compiled were D 2048, F 1024 and D 2050, F 1030 with 64 experts, and in bfloat16 D 4096, F 14336 with 1, 8 and 64:
grouped_swiglu_forward at D 2050 on sm_100 spills 8 bytes with Triton 3.6, nothing else spills.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.engine import architecture

# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages) for each of KERNELS
KERNELS = "product", "swiglu", "dw", "gathered dw"
TILES = {
    "sm_80": ((128, 256, 32, 8, 4), (128, 64, 64, 8, 4), (128, 256, 64, 8, 3), (128, 256, 32, 8, 6)),
    "sm_90": ((128, 256, 64, 8, 4), (256, 64, 64, 8, 4), (128, 256, 64, 8, 4), (128, 256, 64, 8, 6)),
    "sm_100": ((128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (128, 256, 64, 8, 4), (128, 256, 64, 8, 6)),
    "gfx942": ((128, 256, 64, 8, 2), (128, 128, 64, 8, 2), (128, 256, 64, 8, 2), (128, 256, 64, 8, 2)),
    "cpu": ((64, 64, 64, 4, 1),) * 4,
}
GROUP = 8  # tiles of rows that share what L2 holds of the weight


def constants(kernel: str, x: Tensor, width: int, arch: str | None) -> dict[str, int]:
    """What one of KERNELS is compiled with on `arch`, for rows like x and others of `width`; None asks where x lies."""
    m, n, k, warps, stages = TILES[arch or architecture(x)][KERNELS.index(kernel)]
    if x.dtype == torch.float32 or x.shape[1] % 16 or width % 16:  # no tensor cores; no wide loads: many registers
        m, n, k, warps, stages = min(m, 64), min(n, 32), min(k, 32), 4, 1
    return {"GROUP": GROUP, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "num_warps": warps, "num_stages": stages}


@triton.jit
def tile_of(number, rows, columns, GROUP: tl.constexpr):
    """(row, column) of a tile, GROUP rows at a time, each column from top to bottom: neighbours share what L2 holds."""
    band = number // (GROUP * columns) * GROUP
    height = tl.minimum(rows - band, GROUP)
    number %= GROUP * columns
    return band + number % height, number // height


@triton.jit
def rows_of(ends_ptr, tile, N, E, PARTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a tile; expert E stands for nobody. Past the last, end is 0."""
    part = tl.arange(0, PARTS)
    begin = tl.load(ends_ptr + part - 1, mask=(part > 0) & (part <= E), other=0)
    begin = tl.where(part > E, N, begin)
    end = tl.load(ends_ptr + part, mask=part < E, other=N)
    tiles = tl.cdiv(end - begin, BLOCK_M)
    past = tl.cumsum(tiles, 0)
    expert = tl.sum((past <= tile).to(tl.int32), 0)  # the parts that lie wholly before it
    mine = part == expert
    first = tl.sum(tl.where(mine, begin + (tile - past + tiles) * BLOCK_M, 0), 0)
    return expert.to(tl.int64), first.to(tl.int64), tl.sum(tl.where(mine, end, 0), 0)
