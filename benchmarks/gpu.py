"""`make gpu`: on a machine with a CUDA GPU, one command that tests every kernel, measures it, and measures training,
FSDP2, float8 and memory beside what was foretold.

    python3 benchmarks/gpu.py       # offline, from a checkout, nothing installed but torch, triton and pytest

Under ten minutes, or in --seconds: what does not fit into a part's share is skipped, and said so. Results go to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = {"tests": 140, "kernels": 190, "train_step": 120, "scale_gpu": 130}
# The file's own options name plugins that need not be here; its markers stay.
PYTEST = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "-m", "gpu"]
PROCESSES = 8  # a GPU has room for that many small tests, and compiling wants cores
TESTS = 25  # of a group, at most: they share a process, and of attention they compile up to 39 binaries, one by one
ALONE = "others"  # of them, add_rms_norm past 2^31 numbers holds eight tensors of 4 GiB
MEMORY = re.compile("OutOfMemoryError|out of memory|ALLOC_FAILED")


def environment() -> dict[str, str]:
    """The checkout comes first among what can be imported; one thread a process."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def groups() -> dict[str, list[str]]:
    """The tests by kernel, as "swiglu 1": an illegal access ends its process, not those of other kernels' tests."""
    done = subprocess.run([*PYTEST, "--collect-only", "tests/test_gpu.py"], cwd=ROOT, text=True, env=environment(),
                          stdout=subprocess.PIPE)
    found = defaultdict(list)
    for line in done.stdout.splitlines():
        if "::" in line:
            kernel = re.search(r"\[(\w+)@", line)
            found[kernel[1] if kernel else ALONE].append(line.strip())
    return {f"{name} {1 + i // TESTS}": tests[i:i + TESTS]
            for name, tests in found.items() for i in range(0, len(tests), TESTS)}


def run(tests: list[str], deadline: float) -> tuple[str, int | None]:
    """(what they printed, their status) of tests in a process of their own; no status if time was up."""
    try:
        done = subprocess.run([*PYTEST, *tests], cwd=ROOT, text=True, env=environment(), stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired as error:
        text = error.stdout or b""
        return text.decode() if isinstance(text, bytes) else text, None
    return done.stdout, done.returncode


def test(results: Path, deadline: float) -> list[str]:
    """Runs all groups, several at once, and at the end, each alone, those that need the whole memory of the GPU.

    What each printed goes to one file. Returns what failed.
    """
    found, failed, report = groups(), [], []
    if not found:
        return ["tests: none were found"]

    def tell(name: str, text: str, status: int | None) -> None:
        last = text.strip().splitlines()[-1] if text.strip() else "said nothing"
        line = f"tests of {name}: " + ("stopped: no time left" if status is None else last)
        print(line, flush=True)
        report.append(f"== {line}\n{text}")
        failed.extend([line] * (status != 0))
        (results / "gpu-tests.txt").write_text("\n".join(report), encoding="utf-8")

    alone = [name for name in found if name.startswith(ALONE)]
    together = [name for name in found if name not in alone]
    with ThreadPoolExecutor(PROCESSES) as pool:
        answers = pool.map(lambda name: run(found[name], deadline), together)
        for name, (text, status) in zip(together, answers, strict=True):
            if status and MEMORY.search(text):
                alone.append(name)  # beside others it says nothing about the kernel
            else:
                tell(name, text, status)
    for name in alone:
        tell(name, *run(found[name], deadline))
    return failed


def main() -> int:
    """The four parts, each whatever became of the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=sum(SECONDS.values()), help="for all parts together")
    share = parser.parse_args().seconds / sum(SECONDS.values())
    import torch

    if not torch.cuda.is_available():
        print("make gpu needs a CUDA GPU, and torch finds none here", file=sys.stderr)
        return 1
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    began, date = time.monotonic(), time.time() - 1  # files have a coarser clock
    failed = test(results, began + share * SECONDS["tests"])
    for part in ("kernels", "train_step", "scale_gpu"):
        status = subprocess.run([sys.executable, f"benchmarks/{part}.py", "--device", "cuda", "--seconds",
                                 str(share * SECONDS[part])], cwd=ROOT, env=environment()).returncode
        failed += [f"{part}: see its list above"] * (status != 0)
    wrote = ", ".join(str(p.relative_to(ROOT)) for p in sorted(results.iterdir()) if p.stat().st_mtime >= date)
    verdict = "failed: " + "; ".join(failed) if failed else "all well"
    print(f"{time.monotonic() - began:.0f} s; in {wrote}; {verdict}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
