"""`make gpu`: on a machine with a CUDA GPU, one command that tests every kernel, measures it, and measures training.

    python3 benchmarks/gpu.py       # offline, from a checkout, nothing installed but torch, triton and pytest

Under ten minutes: what does not fit into a part's share is skipped, and said so. Results go to benchmarks/results/.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = {"tests": 180, "kernels": 240, "train_step": 150}
# The file's own options name plugins that need not be here; its markers stay.
PYTEST = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "-m", "gpu"]
PROCESSES = 8  # a GPU has room for that many small tests, and compiling wants cores


def environment() -> dict[str, str]:
    """The checkout comes first among what can be imported; one thread a process."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def groups() -> dict[str, list[str]]:
    """The tests by kernel: an illegal access ends its process, and must not take another kernel's tests along."""
    done = subprocess.run([*PYTEST, "--collect-only", "tests/test_gpu.py"], cwd=ROOT, text=True, env=environment(),
                          stdout=subprocess.PIPE)
    found = defaultdict(list)
    for line in done.stdout.splitlines():
        if "::" in line:
            kernel = re.search(r"\[(\w+)@", line)
            found[kernel[1] if kernel else "others"].append(line.strip())
    return found


def test(results: Path, deadline: float) -> list[str]:
    """Runs all groups, several at once; what each printed goes to one file. Returns what failed."""
    def one(group: tuple[str, list[str]]) -> tuple[str, str, int | None]:
        try:
            done = subprocess.run([*PYTEST, *group[1]], cwd=ROOT, text=True, env=environment(), stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired as error:
            text = error.stdout or b""
            return group[0], text.decode() if isinstance(text, bytes) else text, None
        return group[0], done.stdout, done.returncode

    found = groups()
    if not found:
        return ["tests: none were found"]
    failed, report = [], []
    with ThreadPoolExecutor(PROCESSES) as pool:
        for name, text, status in pool.map(one, found.items()):
            last = text.strip().splitlines()[-1] if text.strip() else "said nothing"
            line = f"tests of {name}: " + ("stopped: no time left" if status is None else last)
            print(line, flush=True)
            report.append(f"== {line}\n{text}")
            failed += [line] * (status != 0)
            (results / "gpu-tests.txt").write_text("\n".join(report), encoding="utf-8")
    return failed


def main() -> int:
    """The three parts, each whatever became of the others."""
    import torch

    if not torch.cuda.is_available():
        print("make gpu needs a CUDA GPU, and torch finds none here", file=sys.stderr)
        return 1
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    began = time.monotonic()
    failed = test(results, began + SECONDS["tests"])
    for part in ("kernels", "train_step"):
        status = subprocess.run([sys.executable, f"benchmarks/{part}.py", "--device", "cuda", "--seconds",
                                 str(SECONDS[part])], cwd=ROOT, env=environment()).returncode
        failed += [f"{part}: see its list above"] * (status != 0)
    wrote = ", ".join(str(p.relative_to(ROOT)) for p in (
        results / "gpu-tests.txt", *sorted(results.glob("kernels-*")), *sorted(results.glob("train_step-*"))))
    verdict = "failed: " + "; ".join(failed) if failed else "all well"
    print(f"{time.monotonic() - began:.0f} s; in {wrote}; {verdict}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
