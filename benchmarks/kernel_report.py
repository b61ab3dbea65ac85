"""The results of kernels.py as a table, and the bars that they are held against."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

PLAIN = "eager", "compiled", "ours"
UNIT = {"bytes": ("GB/s", 1e9), "operations": ("TFLOP/s", 1e12)}
LLAMA = "Llama-3-8B"


class Results:
    """The rows, found by what they are of."""

    def __init__(self, ceilings: dict, rows: list[dict]):
        self.ceilings = ceilings
        self.rows = {(r["kernel"], r["shape"], r["column"], r["pass"]): r for r in rows if "error" not in r}
        self.lines = list(dict.fromkeys(key[:2] + key[3:] for key in self.rows))

    def get(self, kernel: str, shape: str, column: str, which: str) -> dict | None:
        """One row; `library` is the fastest of the libraries."""
        if column != "library":
            return self.rows.get((kernel, shape, column, which))
        found = [r for key, r in self.rows.items() if key[:2] + key[3:] == (kernel, shape, which)
                 and key[2] not in PLAIN]
        return min(found, key=lambda r: r["ms"], default=None)

    def share(self, row: dict) -> float:
        """Of the ceiling that was measured in the same run."""
        return row["rate"] / self.ceilings[row["unit"]]

    def ratio(self, kernel: str, shape: str, which: str, column: str, what: str = "ms") -> float | None:
        """How many times the column's figure is ours."""
        ours, other = self.get(kernel, shape, "ours", which), self.get(kernel, shape, column, which)
        return other[what] / ours[what] if ours and other and ours[what] and other[what] else None


def failures(rows: list[dict]) -> list[str]:
    """What failed; a library that cannot do a case is no failure of this run."""
    return [f"{r['kernel']} {r['shape']} {r['column']}: {r['error']}" for r in rows
            if "error" in r and r["column"] in (*PLAIN, "all")]


# --- Bars -------------------------------------------------------------------------------------------------------------


def bars(results: Results) -> Iterator[tuple[str, float | None, float]]:
    """(what, measured, wanted): measured must reach wanted; None was not measured."""
    ratio = results.ratio
    yield ("linear_cross_entropy 124M both: eager's peak memory / ours",
           ratio("linear_cross_entropy", "124M", "both", "eager", "peak_mib"), 4.0)
    yield ("linear_cross_entropy 124M both: compiled eager's time / ours",
           ratio("linear_cross_entropy", "124M", "both", "compiled"), 1 / 1.1)
    for kernel in ("add_rms_norm", "swiglu", "qk_norm_rope", "cross_entropy", "adamw"):
        for which in ("forward", "backward") if kernel != "adamw" else ("forward",):
            row = results.get(kernel, LLAMA, "ours", which)
            yield f"{kernel} {LLAMA} {which}: share of the copy ceiling", row and results.share(row), 0.85
    for shape in ("124M", "1.5B", LLAMA):
        yield (f"attention {shape} forward: cuDNN's time / ours", ratio("attention", shape, "forward", "cuDNN"), 0.6)
    for shape in dict.fromkeys(s for k, s, _ in results.lines if k == "grouped_swiglu"):
        for which in ("forward", "both"):
            yield (f"grouped_swiglu {shape} {which}: F.grouped_mm's time / ours",
                   ratio("grouped_swiglu", shape, which, "F.grouped_mm"), 1.0)
    for shape in dict.fromkeys(s for k, s, _ in results.lines if k == "int4_linear"):
        if shape.split()[0] in ("M1", "M4", "M8"):
            yield (f"int4_linear {shape}: bfloat16 linear's time / ours",
                   ratio("int4_linear", shape, "forward", "bfloat16 linear"), 2.5)


def bars_table(results: Results) -> str:
    """Each bar with what was measured, met or missed by how much."""
    lines = ["| bar | wanted | measured | |", "|---|---|---|---|"]
    for what, measured, wanted in bars(results):
        if measured is None:
            lines.append(f"| {what} | {wanted:.2f} | | not measured |")
        else:
            verdict = "met" if measured >= wanted else f"missed by {1 - measured / wanted:.0%}"
            lines.append(f"| {what} | {wanted:.2f} | {measured:.2f} | {verdict} |")
    return "\n".join(lines)


# --- Tables -----------------------------------------------------------------------------------------------------------


def figure(x: float) -> str:
    """Three digits that count."""
    return f"{x:.3f}" if x < 1 else f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:,.0f}"


def cell(results: Results, row: dict | None, name: bool = False) -> str:
    """ms (p20 to p80), rate, share."""
    if row is None:
        return ""
    unit, scale = UNIT[row["unit"]]
    return (f"{row['column'] + ': ' if name else ''}{figure(row['ms'])} ({figure(row['p20'])} to {figure(row['p80'])})"
            f", {figure(row['rate'] / scale)} {unit}, {results.share(row):.0%}")


def table(results: Results) -> str:
    """A line for each kernel, shape and pass."""
    lines = ["| kernel | shape | pass | eager ms | torch.compile ms | best library ms | ours ms | compile / ours | "
             "library / ours | peak MiB: eager, compile, library, ours |", "|---" * 10 + "|"]
    for kernel, shape, which in results.lines:
        rows = {c: results.get(kernel, shape, c, which) for c in ("eager", "compiled", "library", "ours")}
        cells = [cell(results, row, column == "library") for column, row in rows.items()]
        ratios = [results.ratio(kernel, shape, which, c) for c in ("compiled", "library")]
        memory = [f"{r['peak_mib']:,.0f}" if r and r["peak_mib"] is not None else "–" for r in rows.values()]
        shares = ["" if r is None else f"{r:.2f}" for r in ratios]
        lines.append("| " + " | ".join([kernel, shape, which, *cells, *shares, ", ".join(memory)]) + " |")
    return "\n".join(lines)


def write(path: Path, ceilings: dict, rows: list[dict]) -> None:
    """The JSON, which holds everything, then the Markdown beside it."""
    path.with_suffix(".json").write_text(json.dumps({**ceilings, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    results = Results(ceilings, rows)
    facts = "; ".join(f"{name} {value}" for name, value in ceilings["facts"].items())
    limits = f"copy {ceilings['bytes'] / 1e9:,.0f} GB/s, bfloat16 product {ceilings['operations'] / 1e12:,.1f} TFLOP/s"
    errors = "".join(f"- {r['kernel']} {r['shape']} {r['column']}: {r['error']}\n" for r in rows if "error" in r)
    path.write_text(f"# Kernels\n\n{facts}\n\nCeilings in this run: {limits}\n\n## Bars\n\n{bars_table(results)}\n\n"
                    f"## All figures\n\n{table(results)}\n" + (f"\n## Errors\n\n{errors}" if errors else ""),
                    encoding="utf-8")
