"""A step of the two 500B proposals at their whole depth, on ranks that do not exist: results/simulate.json and .md.

    python benchmarks/simulate.py            about half a minute for each of four runs, on one core

tests/test_simulator.py holds runs of 8 layers to these numbers.
"""

import json
from pathlib import Path

from nanomai.config_file import load_config
from nanomai.simulator import simulate

RESULTS = Path(__file__).parent / "results"
FULL = {"parallel.recompute": "full", "parallel.pipeline": 1}  # the simulator has no stages yet
LAYOUTS = {"mai-1-dense": {"parallel.tensor": 8} | FULL,
           "mai-1-moe": {"parallel.expert": 64, "parallel.tensor": 1} | FULL}
RANKS = (1024, 4096)
TEXT = """\
# A step of the 500B proposals on ranks that do not exist

`python benchmarks/simulate.py` wrote this page: the real model, losses, backward and AdamW with `fsdp: auto`, full
recompute, one sequence of 8,192 tokens a rank (of each eight under tensor 8), bfloat16, all layers. GiB of rank 0 when
it holds the most. An allocator's fragments, NCCL's buffers and CUDA itself come on top, and are not measured here.

{table}

FLOPs count the recomputation, and of causal attention the half that is not masked. Sent: all collectives of rank 0 in a
step, each with the bytes of its larger side.
"""


def run(name: str, ranks: int) -> dict:
    """The whole of what was seen, but for the peak of each block."""
    found = simulate(load_config(name, **LAYOUTS[name]), ranks).as_dict()
    found.pop("peaks")
    return {"settings": LAYOUTS[name]} | found


def page(runs: list[dict]) -> str:
    """The runs as a table."""
    causes = [cause for cause in runs[0]["memory"] if cause != "buffers"]
    rows = [["", *(f"{run['name']}, {run['world_size']:,} ranks" for run in runs)], ["---", *("--:" for _ in runs)]]
    rows += [[cause, *(f"{run['memory'][cause] / 2**30:.2f}" for run in runs)] for cause in causes]
    rows += [["**in all**", *(f"**{run['peak'] / 2**30:.2f}**" for run in runs)],
             ["where", *(run["place"] for run in runs)],
             ["free of 80 GB", *(f"{run['headroom_of_80GB']:.1%}" for run in runs)],
             ["FLOPs a token", *(f"{run['flops_per_token']:.4g}" for run in runs)]]
    for kind in sorted({kind for run in runs for kind in run["collectives"]}):
        seen = [run["collectives"].get(kind) for run in runs]
        if any(s and s["bytes"] > 2**20 for s in seen):
            rows.append([f"sent, {kind}", *(f"{s['calls']} x, {s['bytes'] / 2**30:.2f}" if s else "" for s in seen)])
    return TEXT.format(table="\n".join(f"| {' | '.join(row)} |" for row in rows))


def main() -> None:
    """Runs all and writes both files."""
    runs = [run(name, ranks) for name in LAYOUTS for ranks in RANKS]
    (RESULTS / "simulate.json").write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    (RESULTS / "simulate.md").write_text(page(runs))


if __name__ == "__main__":
    main()
