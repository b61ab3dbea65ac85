"""Every kernel against eager PyTorch, torch.compile and the best library call, at the shapes of three models.

    python benchmarks/kernels.py                              # all of it, on a GPU, in about four minutes
    python benchmarks/kernels.py --only swiglu attention@124M # cases whose name begins so
    python benchmarks/kernels.py --device cpu --tiny          # each case once, interpreted: is the script right?

Milliseconds are medians (20th to 80th percentile) between events on the GPU's stream, from a cold L2: 256 MB are
written in between. `forward`, `backward` and `both` are timed each on its own. GB/s and TFLOP/s count the work that
nobody can avoid (kernel_cases.py), so all columns of a line count alike, and % is of the copy or the bfloat16 product
that the same process measured first. Peak MiB is what the call allocates beyond its inputs.

A process of its own does the measuring; if a case kills it, the next takes up the rest. Results are written after
each case, to benchmarks/results/kernels-<gpu>.json and .md; with --only, to kernels-<gpu>-partial.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout needs no installation

import torch

from benchmarks import kernel_cases, kernel_report
from benchmarks.machines import Cpu, machine_of, slug

COLUMNS = "eager", "compiled", "ours"  # and the names of a case's libraries
PASSES = "forward", "backward", "both"
CEILINGS = "ceilings"  # the name of what is measured first
SECONDS = 0.12  # of repetitions for each figure
WARMERS = 4  # processes that compile beforehand


def cases_of(arguments: argparse.Namespace) -> dict[str, kernel_cases.Case]:
    """The cases that are asked for, by name."""
    cases = kernel_cases.tiny() if arguments.tiny else kernel_cases.measured()
    chosen = tuple(arguments.only or [""])
    return {case.name: case for case in cases if case.name.startswith(chosen)}


def unknown(arguments: argparse.Namespace) -> str:
    """What of --only is the beginning of no name, and the names; empty if all is well."""
    names = list(cases_of(argparse.Namespace(tiny=arguments.tiny, only=None)))
    wrong = [begin for begin in arguments.only or [] if not any(name.startswith(begin) for name in names)]
    return f"no case begins with {', '.join(wrong)}; there are: {'; '.join(names)}" if wrong else ""


# --- Measuring, in a process of its own -------------------------------------------------------------------------------


def functions(case: kernel_cases.Case, column: str, device: torch.device):
    """What a column runs."""
    torch._dynamo.reset()  # or a second shape would be compiled as one of any size
    backend = "inductor" if device.type == "cuda" else "aot_eager"  # a C++ compiler takes minutes over all cases
    plain = {"eager": case.eager, "compiled": torch.compile(case.eager, backend=backend), "ours": case.ours}
    return (plain | case.libraries)[column]


def passes(case: kernel_cases.Case, function, inputs: tuple):
    """(forward, backward): backward takes what forward gave, and is None where there is none."""
    leaves = [x for x in inputs if x.requires_grad]

    def forward():
        outputs = function(*inputs)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    if case.work[1] is None:
        return forward, None
    entering = [torch.randn_like(y) for y in forward()]
    return forward, lambda outputs: torch.autograd.grad(outputs, leaves, entering)


def milliseconds(machine: Cpu, forward, backward, once: bool) -> dict[str, list[float]]:
    """Samples of each pass."""
    for _ in range(1 if once else 3):
        machine.synchronize()
        start = time.perf_counter()
        outputs = forward()
        if backward:
            backward(outputs)
        machine.synchronize()
    repetitions = 1 if once else min(50, max(7, int(SECONDS / (time.perf_counter() - start))))
    marks = {name: [] for name in (PASSES if backward else PASSES[:1])}
    for _ in range(repetitions):
        for name, pairs in marks.items():
            outputs = forward() if name == "backward" else None
            machine.forget()
            start = machine.mark()
            outputs = outputs or forward()
            if name != "forward":
                backward(outputs)
            pairs.append((start, machine.mark()))
            del outputs
    machine.synchronize()
    return {name: [machine.milliseconds(*pair) for pair in pairs] for name, pairs in marks.items()}


def peaks(machine: Cpu, forward, backward) -> dict[str, int | None]:
    """Bytes beyond the inputs, after forward and after both; backward's own peak has forward's results in it."""
    machine.start_peak()
    outputs = forward()
    after = {"forward": machine.peak_bytes()}
    if backward:
        backward(outputs)
        after["backward"] = after["both"] = machine.peak_bytes()
    return after


def measure(machine: Cpu, case: kernel_cases.Case, column: str, inputs: tuple, once: bool) -> list[dict]:
    """A row for each pass of one column."""
    forward, backward = passes(case, functions(case, column, machine.device), inputs)
    samples = milliseconds(machine, forward, backward, once)
    memory = peaks(machine, forward, backward)
    work = dict(zip(PASSES, (case.work[0], case.work[1] or 0, sum(w or 0 for w in case.work)), strict=True))
    rows = []
    for name, times in samples.items():
        low, median, high = (quantile(times, q) for q in (0.2, 0.5, 0.8))
        rows.append({"kernel": case.kernel, "shape": case.shape, "column": column, "pass": name, "ms": median,
                     "p20": low, "p80": high, "rate": work[name] / (1e-3 * median), "unit": case.unit,
                     "peak_mib": None if memory[name] is None else memory[name] / 2**20})
    return rows


def quantile(samples: list[float], q: float) -> float:
    """By the nearest sample."""
    return sorted(samples)[round(q * (len(samples) - 1))]


def run_case(machine: Cpu, case: kernel_cases.Case, once: bool) -> list[dict]:
    """All columns; what fails becomes a row with its error."""
    torch.manual_seed(0)
    rows, inputs = [], None
    for column in (*COLUMNS, *case.libraries):
        try:
            if inputs is None:
                with torch.device(machine.device):
                    inputs = case.make(torch.bfloat16)
            rows += measure(machine, case, column, inputs, once)
        except Exception as error:
            message = (str(error).strip() or "no message").splitlines()[0]
            rows.append({"kernel": case.kernel, "shape": case.shape, "column": column, "pass": "both",
                         "error": f"{type(error).__name__}: {message}"[:300]})
            del error
        machine.synchronize()  # an illegal access shows here at the latest, and ends this process
    return rows


def work(arguments: argparse.Namespace) -> None:
    """The worker: names on stdin, an answer to each on stdout."""
    machine, cases = machine_of(arguments.device), cases_of(arguments)
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever prints must not print between answers
    for line in sys.stdin:
        name = line.strip()
        if name == CEILINGS:
            answer = {"bytes": machine.copy_ceiling(), "operations": machine.matmul_ceiling()} | {
                "facts": machine.facts()}
        else:
            answer = run_case(machine, cases.pop(name), arguments.once)  # and what the case keeps is freed
        print(json.dumps(answer), file=answers, flush=True)


# --- The parent: it never touches the GPU -----------------------------------------------------------------------------


class Worker:
    """A process that measures; dead after an error that poisons its GPU context, or when time is up."""

    def __init__(self, arguments: argparse.Namespace, deadline: float, once: bool = False):
        command = [sys.executable, __file__, "--worker", "--device", arguments.device]
        command += ["--tiny"] * arguments.tiny + ["--once"] * (once or arguments.tiny)
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.timer = threading.Timer(max(0.0, deadline - time.monotonic()), self.process.kill)
        self.timer.daemon = True  # it must not keep a parent that failed
        self.timer.start()

    def ask(self, name: str):
        """The answer; None if the process died over it."""
        try:
            print(name, file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        return json.loads(line) if line.endswith("\n") else None

    def close(self) -> None:
        """Ends it, whatever it does."""
        self.timer.cancel()
        self.process.kill()
        self.process.communicate()


def warm_up(arguments: argparse.Namespace, names: list[str], deadline: float) -> None:
    """Fills the compilers' caches: every case once, several processes side by side; what fails, fails later."""
    def one(kernel: str) -> None:
        if time.monotonic() < deadline:
            worker = Worker(arguments, deadline, once=True)
            for name in names:
                if name.split("@")[0] == kernel and worker.ask(name) is None:
                    break
            worker.close()

    with ThreadPoolExecutor(WARMERS) as pool:
        list(pool.map(one, dict.fromkeys(name.split("@")[0] for name in names)))


def error_rows(name: str, message: str) -> list[dict]:
    """The rows of a case that gave none."""
    kernel, shape = name.split("@")
    return [{"kernel": kernel, "shape": shape, "column": "all", "pass": "both", "error": message}]


def measure_all(arguments: argparse.Namespace, names: list[str], write) -> None:
    """Case after case; `write(ceilings, rows)` after each."""
    began = time.monotonic()
    deadline = began + arguments.seconds
    if arguments.device == "cuda" and not arguments.cold:
        warm_up(arguments, names, began + 0.4 * arguments.seconds)
    worker, rows = Worker(arguments, deadline), []
    ceilings = worker.ask(CEILINGS)
    for name in names:
        if time.monotonic() < deadline and ceilings:
            answer = worker.ask(name)
            if answer is None:
                over = time.monotonic() >= deadline
                answer = error_rows(name, "skipped: no time left" if over else "its process died")
                worker.close()
                worker = Worker(arguments, deadline)
        else:
            answer = error_rows(name, "skipped: no time left" if ceilings else "the ceilings could not be measured")
        rows += answer
        write(ceilings or {"bytes": 0, "operations": 0, "facts": {"name": arguments.device}}, rows)
    worker.close()


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--only", nargs="+", help="cases whose name begins with one of these")
    parser.add_argument("--tiny", action="store_true", help="small shapes, each case once")
    parser.add_argument("--seconds", type=float, default=240, help="what is left after them is skipped")
    parser.add_argument("--cold", action="store_true", help="do not fill the compilers' caches first")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if problem := unknown(arguments):
        parser.error(problem)
    return arguments


def main() -> int:
    """The parent or, with --worker, the worker. 1 if anything of ours failed."""
    arguments = parse()
    if arguments.worker:
        work(arguments)
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA GPU here; --device cpu --tiny shows that the script works", file=sys.stderr)
        return 1
    last = {}

    def write(ceilings: dict, rows: list[dict]) -> None:
        name = slug(ceilings["facts"]["name"]) + "-tiny" * arguments.tiny + "-partial" * bool(arguments.only)
        last.update(ceilings=ceilings, rows=rows, path=arguments.out / f"kernels-{name}.md")
        kernel_report.write(last["path"], ceilings, rows)
        print(f"  {rows[-1]['kernel']} {rows[-1]['shape']}", file=sys.stderr, flush=True)

    arguments.out.mkdir(parents=True, exist_ok=True)
    measure_all(arguments, list(cases_of(arguments)), write)
    failed = kernel_report.failures(last["rows"])
    print(last["path"].read_text(encoding="utf-8"))
    print(f"wrote {last['path']} and .json; {len(failed)} failed" + "".join(f"\n  {line}" for line in failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
