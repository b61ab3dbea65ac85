"""A step of the two 500B proposals at their whole depth, on ranks that do not exist: results/simulate.json and .md.

    python benchmarks/simulate.py            one to two minutes for each of 14 stages, on one core

tests/test_simulator.py holds runs of 32 layers to these numbers, and the planner's closed forms to them as well.
"""

import json
from pathlib import Path

from nanomai.config_file import load_config
from nanomai.simulator import simulate

RESULTS = Path(__file__).parent / "results"
NAMES = ("mai-1-dense", "mai-1-moe")
RANKS = (1024, 4096)
TEXT = """\
# A step of the 500B proposals on ranks that do not exist

`python benchmarks/simulate.py` wrote this page: the real model, pipeline, losses, backward and AdamW in the layout of
each YAML (tensor 8 x pipeline 8, `fsdp: auto` for the rest, full recompute), sequences of 8,192 tokens, bfloat16, all
layers. GiB of a rank of the stage that holds the most, when it does. More micro-batches than these hold no more, but
for their tokens: 0.13 MB each. An allocator's fragments, NCCL's buffers and CUDA itself come on top, and are not
measured here.

{table}

*Scattered* are gradients before their sum over ranks: of all micro-batches, in float32. FLOPs count the recomputation,
and of causal attention the half that is not masked. Sent: all collectives of one rank in a step, each with the bytes of
its larger side.
"""


def run(name: str, ranks: int) -> dict:
    """The whole of what was seen, but for the peak of each block."""
    found = simulate(load_config(name), ranks).as_dict()
    found.pop("peaks")
    return found


def page(runs: list[dict]) -> str:
    """The runs as a table."""
    causes = [cause for cause in runs[0]["memory"] if cause != "buffers"]
    rows = [["", *(f"{run['name']}, {run['world_size']:,} ranks" for run in runs)], ["---", *("--:" for _ in runs)]]
    rows += [[cause, *(f"{run['memory'][cause] / 2**30:.2f}" for run in runs)] for cause in causes]
    rows += [["**in all**", *(f"**{run['peak'] / 2**30:.2f}**" for run in runs)],
             ["where", *(f"stage {run['stage']}, {run['place']}" for run in runs)],
             ["other stages", *(", ".join(f"{stage}: {peak / 2**30:.2f}" for stage, peak in run["stages"].items()
                                          if stage != run["stage"]) for run in runs)],
             ["micro-batches", *(str(run["micro_batches"]) for run in runs)],
             ["free of 80 GB", *(f"{run['headroom_of_80GB']:.1%}" for run in runs)],
             ["FLOPs a token", *(f"{run['flops_per_token']:.4g}" for run in runs)]]
    for kind in sorted({kind for run in runs for kind in run["collectives"]}):
        seen = [run["collectives"].get(kind) for run in runs]
        if any(s and s["bytes"] > 2**20 for s in seen):
            rows.append([f"sent, {kind}", *(f"{s['calls']} x, {s['bytes'] / 2**30:.2f}" if s else "" for s in seen)])
    return TEXT.format(table="\n".join(f"| {' | '.join(row)} |" for row in rows))


def main() -> None:
    """Runs all and writes both files."""
    runs = [run(name, ranks) for name in NAMES for ranks in RANKS]
    (RESULTS / "simulate.json").write_text(json.dumps({"runs": runs}, indent=1) + "\n")
    (RESULTS / "simulate.md").write_text(page(runs))


if __name__ == "__main__":
    main()
