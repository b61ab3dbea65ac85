"""Compiles every kernel for every target, without a GPU, and writes down what it became.

    python tools/aot.py
    python tools/aot.py scan sm_90 "flash_dq 8B bf16" BLOCK_Q=64,128 BLOCK_K=32,64 num_warps=4,8 num_stages=2,3

The first renews the snapshot of the installed Triton, in tests/aot_snapshots/. A line whose fingerprint still holds is
kept as it is; delete the file to have all compiled. The second helps to find tiles: the cases whose names begin so,
compiled with each combination, and of each combination the worst numbers.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # a checkout without installation

import aot_cases  # noqa: E402

from triton_kernels.aot import SHARED_LIMIT, TARGETS, compile_kernel  # noqa: E402


def in_parallel(function: Callable, tasks: list) -> Iterator:
    """(task, result), in order. Launches cannot be sent to a process, so tasks name them."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield from zip(tasks, pool.map(function, tasks), strict=True)


def compile_line(name: str) -> tuple[dict, list[str]]:
    """(line of the snapshot, the limits that are broken)"""
    target = name.split()[0]
    return aot_cases.line(target, aot_cases.launches(target)[name])


def renew() -> int:
    """Writes the snapshot; 1 if a binary breaks a limit."""
    old, lines, broken = aot_cases.read_snapshot(), {}, []
    for target in TARGETS:
        for name, launch in aot_cases.launches(target).items():
            same = old.get(name, {}).get("fingerprint") == aot_cases.fingerprint(target, launch)
            lines[name] = old[name] if same else None
    todo = [name for name, line in lines.items() if line is None]
    for name, (line, faults) in in_parallel(compile_line, todo):
        lines[name] = line
        broken += [f"{name}: {fault}" for fault in faults]
        print(name, *(f"{k} {v}" for k, v in line.items() if k != "fingerprint"), sep="  ", flush=True)
        aot_cases.write_snapshot(lines)  # an interrupted run goes on from here
    aot_cases.write_snapshot(lines)  # what is gone goes, even where nothing is new
    print(f"{len(todo)} of {len(lines)} binaries compiled; {aot_cases.snapshot_file().relative_to(ROOT)} is written")
    print(*broken, sep="\n")
    return bool(broken)


def compile_choice(task: tuple[str, str, dict[str, int]]) -> str:
    """The worst numbers of the cases with these constants."""
    target, case, choice = task
    launches = [launch for name, launch in aot_cases.launches(target).items() if name.startswith(f"{target} {case}")]
    try:
        binaries = [compile_kernel(kernel, target, *args, **meta | choice) for kernel, args, meta in launches]
    except Exception as error:  # a tile that the compiler refuses is a result of the scan
        return type(error).__name__
    registers, spilled, shared = (max(getattr(b, n) for b in binaries) for n in ("registers", "spilled", "shared"))
    return f"{registers:9} {spilled:8} {shared:8}" + ("  too much" if shared > SHARED_LIMIT[target] else "")


def scan(target: str, case: str, *choices: str) -> int:
    """Prints a line for each combination of the choices."""
    names, values = zip(*(choice.split("=") for choice in choices), strict=True)
    combinations = itertools.product(*([int(v) for v in value.split(",")] for value in values))
    print(*names, "registers  spilled   shared")
    for (*_, choice), numbers in in_parallel(
            compile_choice, [(target, case, dict(zip(names, c, strict=True))) for c in combinations]):
        print(*(f"{value:{len(name)}}" for name, value in choice.items()), numbers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(scan(*sys.argv[2:]) if sys.argv[1:2] == ["scan"] else renew())
