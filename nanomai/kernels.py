"""Which implementation an operation uses: PyTorch's, or the Triton kernel beside it.

"torch" is written in PyTorch's operations, which torch.compile fuses; "triton" is the kernel in `triton_kernels/`,
compiled for a GPU and interpreted, slowly, on a CPU; "auto" is torch but for the kernels in AUTO on a GPU.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

KERNELS = ("rms_norm", "rotary", "attention", "masked_attention", "swiglu", "linear_cross_entropy",
           "grouped_gemm")

AUTO = ("masked_attention",)
"""What `auto` takes on a GPU: a kernel enters for a win over torch.compile in benchmarks/results/, or for memory. None
has been measured there yet, so this one stands for memory alone: a mask as a matrix takes B T T bytes, and with it the
library leaves its fastest kernels. linear_cross_entropy waits for a measurement: PyTorch's is chunked as well.
"""

OURS = Path(__file__).resolve().parents[1] / "triton_kernels" / "__init__.py"


def find_foreign() -> str | None:
    """Where `import triton_kernels` would find something else: another project's package has the same name."""
    found = importlib.util.find_spec("triton_kernels")
    if found is None or (found.origin is not None and Path(found.origin).resolve() == OURS):
        return None
    return str(found.origin or list(found.submodule_search_locations))


FOREIGN = find_foreign()
HAS_TRITON = all(importlib.util.find_spec(name) is not None for name in ("triton", "triton_kernels"))


def uses_triton(name: str, on_gpu: bool, impl: str) -> bool:
    """Whether `impl` means the kernel `name`; ImportError where it was asked for and cannot be had."""
    if impl == "auto":
        return name in AUTO and on_gpu and HAS_TRITON and FOREIGN is None
    if impl not in ("torch", "triton"):
        raise ValueError(f"{name}: impl {impl!r} is not one of auto, torch, triton")
    if impl == "triton":
        require()
    return impl == "triton"


def require() -> None:
    """ImportError, with what to do, unless `triton_kernels` is ours and Triton is there to run it."""
    if FOREIGN is not None:
        raise ImportError(f"triton_kernels is another project's package, {FOREIGN}: uninstall it, or put "
                          f"{OURS.parents[1]} before it on sys.path")
    if not HAS_TRITON:
        raise ImportError("the kernels need Triton (Linux only): pip install 'triton>=3.6,<4', or choose torch")


def parse(setting: str) -> frozenset[str] | None:
    """What `train.kernels` names: `torch` no kernel, `triton` all, a list with commas those; `auto` is None."""
    whole = {"auto": None, "torch": frozenset(), "triton": frozenset(KERNELS)}
    if setting.strip() in whole:
        return whole[setting.strip()]
    names = frozenset(name.strip() for name in setting.split(","))
    if unknown := sorted(names - set(KERNELS)):
        raise ValueError(f"kernels {unknown[0]!r}: give auto, torch or triton alone, or a list of {', '.join(KERNELS)}")
    return names
