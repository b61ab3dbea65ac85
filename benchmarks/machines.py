"""What measuring asks of a machine, on a GPU and on the CPU: every call that needs CUDA is in this file."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import re
import statistics
import subprocess
import time

import torch

from nanomai.machine import describe

CACHE_BYTES = 2**28  # more than any L2: 50 MB on an H100
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"


class Cpu:
    """The interpreter's machine: it shows that the script works; its times say nothing about a GPU."""

    device, matmul_size, copy_bytes = torch.device("cpu"), 256, 2**22

    def forget(self) -> None:
        """Nothing of what comes next may wait in a cache."""

    def mark(self) -> float:
        """A point in time, for `milliseconds`."""
        return time.perf_counter()

    def milliseconds(self, start, end) -> float:
        """Between two marks."""
        return 1e3 * (end - start)

    def synchronize(self) -> None:
        """Waits until all is done."""

    def start_peak(self) -> None:
        """`peak_bytes` counts from here."""

    def peak_bytes(self) -> int | None:
        """The most memory since `start_peak`, beyond what was allocated then."""
        return None

    def matmul_ceiling(self) -> float:
        """Operations a second of a large bfloat16 product."""
        n = self.matmul_size
        a = torch.randn(n, n, device=self.device).bfloat16()
        return 2 * n**3 / (1e-3 * statistics.median(self._times(lambda: a @ a)))

    def copy_ceiling(self) -> float:
        """Bytes a second, read and written, of a large copy."""
        a, b = torch.empty((2, self.copy_bytes), dtype=torch.int8, device=self.device)
        return 2 * self.copy_bytes / (1e-3 * statistics.median(self._times(lambda: b.copy_(a))))

    def _times(self, run) -> list[float]:
        run()
        marks = []
        for _ in range(20):
            self.forget()
            start = self.mark()
            run()
            marks.append((start, self.mark()))
        self.synchronize()
        return [self.milliseconds(*pair) for pair in marks]

    def facts(self) -> dict[str, str]:
        """What a result depends on."""
        return {"machine": describe(self.device), "name": "CPU", "torch": torch.__version__,
                "triton": importlib.metadata.version("triton"), "python": platform.python_version()}


class Gpu(Cpu):
    """One CUDA GPU. Times come from events on the stream, so the host's share is hidden where it keeps ahead."""

    device, matmul_size, copy_bytes = torch.device("cuda"), 8192, 2**31

    def __init__(self):
        self.filler = torch.empty(CACHE_BYTES, dtype=torch.int8, device=self.device)

    def forget(self) -> None:
        for _ in range(4):  # about 0.4 ms of an H100: meanwhile the host launches what is timed
            self.filler.zero_()

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start, end) -> float:
        return start.elapsed_time(end)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def start_peak(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()

    def peak_bytes(self) -> int:
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - self.before

    def facts(self) -> dict[str, str]:
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        memory = f"{torch.cuda.get_device_properties(0).total_memory / 2**30:.1f} GiB"
        return super().facts() | {"name": torch.cuda.get_device_name(), "capability": capability, "memory": memory,
                                  "cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())} | smi()


def smi() -> dict[str, str]:
    """Driver and clocks as nvidia-smi sees them now; nothing where there is none."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        line = subprocess.run(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"], text=True, check=True,
                              capture_output=True, timeout=20).stdout.splitlines()[0]
        return dict(zip(QUERY.split(",")[1:], line.split(", ")[1:], strict=False))
    return {}


def machine_of(device: str) -> Cpu:
    """The machine for `--device`."""
    return Gpu() if device == "cuda" else Cpu()


def slug(name: str) -> str:
    """A name for files."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@contextlib.contextmanager
def no_synchronization(device: str):
    """Inside, an operation that makes the host wait for the GPU is an error."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
