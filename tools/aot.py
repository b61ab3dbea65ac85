"""Compiles every kernel for every target, without a GPU, and writes down what it became.

    python tools/aot.py
    python tools/aot.py scan sm_90 "flash_dq 8B bf16" BLOCK_Q=64,128 BLOCK_K=32,64 num_warps=4,8 num_stages=2,3

The first renews the snapshot of the installed Triton, in tests/aot_snapshots/. A line whose fingerprint still holds is
kept as it is; delete the file to have all compiled. The second helps to find tiles: the cases whose names begin so,
compiled with each combination, and of each combination the worst numbers.
"""

import argparse
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


def compile_line(name: str) -> dict:
    """A line of the snapshot."""
    target = name.split()[0]
    return aot_cases.line(target, aot_cases.launches(target)[name])


def renew() -> int:
    """Writes the snapshot; 1 if a binary breaks a limit, whether it was compiled now or before."""
    old, lines = aot_cases.read_snapshot(), {}
    for target in TARGETS:
        for name, launch in aot_cases.launches(target).items():
            same = old.get(name, {}).get("fingerprint") == aot_cases.fingerprint(target, launch)
            lines[name] = old[name] if same else None
    todo = [name for name, line in lines.items() if line is None]
    for name, line in in_parallel(compile_line, todo):
        lines[name] = line
        print(name, *(f"{k} {v}" for k, v in line.items() if k != "fingerprint"), sep="  ", flush=True)
        aot_cases.write_snapshot(lines)  # an interrupted run goes on from here
    aot_cases.write_snapshot(lines)  # what is gone goes, even where nothing is new
    broken = aot_cases.faults(lines)
    print(f"{len(todo)} of {len(lines)} binaries compiled; {aot_cases.snapshot_file()} is written", *broken, sep="\n")
    return bool(broken)


def launches_of(target: str, case: str) -> list[tuple]:
    """Those of the cases whose names begin so."""
    return [launch for name, launch in aot_cases.launches(target).items() if name.startswith(f"{target} {case}")]


def compile_choice(task: tuple[str, str, dict[str, int]]) -> str:
    """The worst numbers of the cases with these constants."""
    target, case, choice = task
    try:
        binaries = [compile_kernel(kernel, target, *args, **meta | choice)
                    for kernel, args, meta in launches_of(target, case)]
    except Exception as error:  # a tile that the compiler refuses is a result of the scan
        return type(error).__name__
    registers, spilled, shared = (max(getattr(b, n) for b in binaries) for n in ("registers", "spilled", "shared"))
    return f"{registers:9} {spilled:8} {shared:8}" + ("  too much" if shared > SHARED_LIMIT[target] else "")


def constant(text: str) -> tuple[str, list[int]]:
    """NAME=1,2 as (name, values)."""
    name, values = text.split("=")
    return name, [int(value) for value in values.split(",")]


def scan(target: str, case: str, constants: list[tuple[str, list[int]]]) -> int:
    """Prints a line for each combination of the constants; 1 if there is no such case."""
    if not launches_of(target, case):
        print(f"no case of {target} begins with {case!r}; there are:", *aot_cases.launches(target), sep="\n",
              file=sys.stderr)
        return 1
    names, values = zip(*constants, strict=True)
    choices = [dict(zip(names, combination, strict=True)) for combination in itertools.product(*values)]
    print(*names, "registers  spilled   shared")
    for (*_, choice), numbers in in_parallel(compile_choice, [(target, case, choice) for choice in choices]):
        print(*(f"{value:{len(name)}}" for name, value in choice.items()), numbers, flush=True)
    return 0


def main() -> int:
    """`scan`, or without a command the snapshot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command = parser.add_subparsers(dest="command").add_parser("scan", help="compile cases with other constants")
    command.add_argument("target", choices=TARGETS)
    command.add_argument("case", help="how the names of the cases begin, after the target")
    command.add_argument("constants", nargs="+", type=constant, metavar="NAME=VALUE,VALUE")
    arguments = parser.parse_args()
    return scan(arguments.target, arguments.case, arguments.constants) if arguments.command else renew()


if __name__ == "__main__":
    sys.exit(main())
