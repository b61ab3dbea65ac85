"""The tiles of flash_attention.py on each architecture, found without a GPU and not yet timed by one.

Each is the first of a scan by aot.py (bfloat16, 1,024 tokens) that no mask makes spill, neither on Triton 3.6 nor on
3.9, and that fits the shared memory (99 KB for sm_80, to serve sm_86, sm_89 and sm_120 too). In order: the held tile of
128, 64, 32 rows, as all else is read once for each; loads that run ahead, in 3 or 2 stages; the tile that walks; 16
rows a warp before other warps; 3 stages before 2. gfx942: of a short list.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_kernels.engine import architecture

# (BLOCK_Q, BLOCK_K, warps, stages) of flash_forward at K <= 64 and K = 128, of flash_dq, of flash_dkdv
TILES = {
    "sm_80": ((128, 64, 8, 3), (128, 32, 8, 3), (128, 32, 8, 3), (64, 64, 8, 2), (32, 128, 8, 3), (32, 64, 8, 3)),
    "sm_90": ((128, 128, 8, 3), (128, 64, 8, 3), (128, 128, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3), (32, 128, 8, 3)),
    "sm_100": ((128, 32, 4, 2), (128, 64, 8, 3), (128, 128, 8, 3), (128, 32, 8, 3), (64, 128, 8, 3), (64, 128, 8, 2)),
    "gfx942": ((128, 64, 4, 1), (128, 64, 4, 1), (64, 64, 4, 1), (64, 32, 4, 1), (32, 128, 4, 1), (32, 128, 4, 1)),
    "cpu": ((64, 64, 4, 1),) * 6,
}


def constants(kernel: int, q: Tensor, k: Tensor, window: int | None, reach: Tensor | None, arch: str | None) -> dict:
    """What kernel 0 (forward), 1 (dq) or 2 (dk and dv) is compiled with on `arch`: tile, kinds of masks, warps, stages.

    q (B, H, T, K), k (B, G, S, K); reach is None without documents; arch None asks where q lies.
    """
    block_q, block_k, warps, stages = TILES[arch or architecture(q)][2 * kernel + (q.shape[-1] > 64)]
    if q.dtype == torch.float32:  # products without tensor cores, out of registers
        size = min(block_q, block_k, 32 if q.shape[-1] <= 64 else 16)
        block_q, block_k, warps, stages = size, size, 8, 1
    return {"GROUP": q.shape[1] // k.shape[1], "PARTS": 1 if reach is not None else 2 if window is None else 3,
            "K": q.shape[-1], "BLOCK_Q": block_q, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}
