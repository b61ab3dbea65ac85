"""What accelerators can do, by their makers' figures: the numbers that a plan divides by.

Rates are dense, without sparsity, and of links in one direction. The makers' own documents were not at hand; numbers
were found on public pages that quote them: glennklockwood.com/garden/processors (A100, B200, Maia 100),
acecloud.ai/blog/nvidia-b200-vs-h200-h100-a100 (H100 and H200, but for their peak), gpu.blog/gpus and, for half of its
peak with sparsity, codesota.com/hardware/mi300x (MI300X), waredb.com/processor (RTX 4090). What is marked [recalled]
was not looked up. Prices are assumptions: of the order of what an hour cost on demand in 2025; put your own in their
place (`--price`).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from nanomai.config import ConfigError


@dataclass(frozen=True)
class Device:
    """One accelerator, and its part of the machine that it sits in."""

    name: str
    peak: float
    """FLOP/s of dense bfloat16 matrix products."""
    memory: float
    """Bytes, as sold: a GB is 10^9."""
    bandwidth: float
    """Bytes a second between it and its memory."""
    links: float
    """Bytes a second that it can send to its neighbours in the machine."""
    network: float
    """Bytes a second that it can send to other machines."""
    in_machine: int
    """Devices in one machine."""
    watts: float
    """Of the accelerator alone, at full load."""
    price: float
    """US dollars an hour; assumed."""
    reach: float = 1.0
    """Of its peak, what arithmetic reaches, over what it reaches on an H100: fitted where runs were published."""


DEVICES = {
    # DGX A100: eight 200 Gb/s adapters for eight GPUs [recalled]
    "a100-40": Device("A100 SXM 40 GB", 312e12, 40e9, 1.555e12, 300e9, 25e9, 8, 400, 1.3, reach=1.21),
    "a100": Device("A100 SXM 80 GB", 312e12, 80e9, 2.039e12, 300e9, 25e9, 8, 400, 1.6, reach=1.21),
    # the peak [recalled]; DGX H100 and H200: eight 400 Gb/s adapters for eight GPUs [recalled]
    "h100": Device("H100 SXM 80 GB", 989.4e12, 80e9, 3.35e12, 450e9, 50e9, 8, 700, 2.5),
    "h200": Device("H200 SXM 141 GB", 989.4e12, 141e9, 4.8e12, 450e9, 50e9, 8, 700, 3.0),
    # HGX B200: 180 of its 192 GB are for use; network as in the DGX B200 [recalled]
    "b200": Device("B200 180 GB", 2.25e15, 180e9, 8e12, 900e9, 50e9, 8, 1000, 5.0),
    # 896 GB/s of links, there and back; network: 400 Gb/s a GPU, as such machines are usually built [recalled]
    "mi300x": Device("MI300X 192 GB", 1307.4e12, 192e9, 5.3e12, 448e9, 50e9, 8, 750, 2.5),
    # twelve ports of 400 Gb/s, nine of them to the other three of a machine; 700 W by design, 500 as installed
    "maia100": Device("Maia 100 64 GB", 0.8e15, 64e9, 1.8e12, 450e9, 150e9, 4, 500, 2.0),
    # products with float32 sums; PCIe 4.0 x16 between cards [recalled]; four cards and a 10 Gb/s adapter assumed
    "rtx4090": Device("RTX 4090 24 GB", 165.2e12, 24e9, 1.008e12, 32e9, 1.25e9, 4, 450, 0.4),
}


def find_device(name: str) -> Device:
    """The device of that name; `cpu` measures this machine. ConfigError with the nearest name."""
    if name == "cpu":
        return this_machine()
    if name not in DEVICES:
        near = difflib.get_close_matches(name.lower().replace(" ", "").replace("-", ""), [*DEVICES, "cpu"], 1, 0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join([*DEVICES, 'cpu'])}"
        raise ConfigError(f"no gpu {name!r} in the table; {hint}")
    return DEVICES[name]


def this_machine() -> Device:
    """This machine's processor: products and copies measured now, memory as the system says; power is not known."""
    import os
    import time

    import torch

    from nanomai.machine import describe, matmul_peak

    cpu = torch.device("cpu")
    big, other, copies = torch.ones(2**25), torch.ones(2**25), []
    for _ in range(5):
        start = time.perf_counter()
        other.copy_(big)
        copies.append(time.perf_counter() - start)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    bandwidth = 2 * big.nbytes / min(copies)
    return Device(describe(cpu).split(";")[0], matmul_peak(cpu, torch.float32), memory, bandwidth, bandwidth, 1.25e9, 1,
                  watts=0.0, price=0.0)
