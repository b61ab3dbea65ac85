"""Checks of `notebooks/14_tensor_pipeline_expert_context`."""

import torch
import torch.nn.functional as F

from nanomai.show import exercise

WIDTH, RANKS = 12, 2


@exercise
def check_collectives(answer):
    """`answer(layers)`: what happens before each layer, and at the end: "", "all-reduce" or "all-gather"."""
    for layers in (["column", "gelu", "row"], ["row"], ["column"], ["norm", "column", "gelu", "row", "norm"],
                   ["column", "norm"], ["column", "column", "row"], ["row", "gelu", "row"],
                   ["row", "column", "gelu"], ["gelu", "norm", "gelu"], ["column", "row", "row", "column", "norm"]):
        plan = answer(list(layers))
        assert isinstance(plan, list) and len(plan) == len(layers) + 1, \
            f"{layers}: return a list of {len(layers) + 1} words: one before each layer, one at the end"
        assert set(plan) <= {"", "all-reduce", "all-gather"}, f"{layers}: {plan} has other words than the three"
        on_ranks, alone = _run(layers, plan, RANKS), _run(layers, [""] * len(plan), 1)
        off = max((y - alone[0]).abs().max().item() if y.shape == alone[0].shape else float("inf") for y in on_ranks)
        assert off < 1e-9, f"{layers} with {plan}: the ranks end with " + (
            f"numbers that are off by {off:.2g}" if off < float("inf") else "slices")
        fewest = _fewest(layers)
        assert len([word for word in plan if word]) == fewest, \
            f"{layers}: right, but {fewest} collectives are enough, and {plan} has more"


def _run(layers: list[str], plan: list[str], n: int) -> list[torch.Tensor]:
    """What each of n ranks has in the end; on one rank there is nothing to cut."""
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(5, WIDTH, generator=generator, dtype=torch.float64)] * n
    for i, (word, layer) in enumerate(zip(plan, [*layers, None], strict=True)):
        if word and n > 1:
            xs = [sum(xs) if word == "all-reduce" else torch.cat(xs, -1)] * n
        weight = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64)
        if layer in ("column", "row"):
            cut = weight.chunk(n, 0 if layer == "column" else 1)
            if layer == "row" and xs[0].shape[-1] == WIDTH:
                xs = [x.chunk(n, -1)[r] for r, x in enumerate(xs)]  # a rank takes its slice: that costs nothing
            assert xs[0].shape[-1] == cut[0].shape[-1], \
                f"{layers} with {plan}: layer {i} ({layer}) needs {cut[0].shape[-1]} of {WIDTH} channels, and a " \
                f"rank has {xs[0].shape[-1]}"
            xs = [x @ w.T for x, w in zip(xs, cut, strict=True)]
        elif layer is not None:
            xs = [F.gelu(x) if layer == "gelu" else F.layer_norm(x, x.shape[-1:]) for x in xs]
    return xs


def _fewest(layers: list[str]) -> int:
    """Collectives that are needed."""
    state, n = "whole", 0
    for layer in [*layers, None]:
        if state == "summand" or (state == "slice" and layer not in ("row", "gelu")):
            state, n = "whole", n + 1
        state = {"column": "slice", "row": "summand"}.get(layer, state)
    return n


@exercise
def check_micro_batches(answer):
    """`answer(p, v, n)`: the fewest micro-batches, a multiple of p, with which ranks wait at most 1 / n of the time."""
    for p, v, n in [(4, 1, 5), (4, 1, 10), (8, 1, 10), (8, 2, 10), (8, 4, 10), (3, 2, 4), (2, 1, 2), (16, 2, 3),
                    (1, 1, 5), (6, 3, 20)]:
        m = p
        while n * (p - 1) > v * m + p - 1:
            m += p
        got, case = answer(p, v, n), f"p = {p}, v = {v}, at most 1 / {n}"
        assert got == int(got) and got > 0 and got % p == 0, f"{case}: {got} is no positive multiple of {p}"
        waits = (p - 1) / (v * got + p - 1)
        assert got >= m, f"{case}: with {got} micro-batches ranks wait {waits:.3f} of the time"
        assert got == m, f"{case}: {got} are more than are needed"


@exercise
def check_choose_mesh(answer):
    """`answer(gpus, sequences, n_layers, n_kv_heads)`: (pipeline, data, tensor), or None."""
    for case in [(8, 64, 12, 8), (1024, 512, 120, 8), (4096, 512, 120, 8), (10_240, 512, 120, 8), (512, 96, 24, 2),
                 (10_240, 2048, 120, 8), (96, 24, 12, 4), (64, 12, 32, 6), (48, 2, 8, 16), (32, 48, 30, 5),
                 (128, 72, 16, 4), (24, 8, 9, 12)]:
        want, got = _mesh(*case), answer(*case)
        words = "{:,} GPUs, {} sequences, {} layers, {} key-value heads".format(*case)
        if got is None:
            assert want is None, f"{words}: there is a mesh that obeys all rules"
            continue
        assert isinstance(got, tuple) and len(got) == 3, "return three numbers, pipeline, data and tensor, or None"
        fault = next((why for why, wrong in _faults(got, *case) if wrong), None)
        assert fault is None, f"{words}: in {got} {fault}"
        assert got[2] == want[2], f"{words}: {got} is possible, but tensor {want[2]} is too, and waits for less"
        assert got == want, f"{words}: {got} is possible, but {want} has the shorter pipeline"


def _mesh(gpus: int, sequences: int, n_layers: int, n_kv_heads: int) -> tuple[int, int, int] | None:
    for tensor in range(1, 9):
        for pipeline in range(1, n_layers + 1):
            mesh = (pipeline, gpus // (pipeline * tensor), tensor)
            if mesh[1] and not any(wrong for _, wrong in _faults(mesh, gpus, sequences, n_layers, n_kv_heads)):
                return mesh
    return None


def _faults(mesh: tuple, gpus: int, sequences: int, n_layers: int, n_kv_heads: int) -> list[tuple[str, bool]]:
    pipeline, data, tensor = mesh
    return [(f"the product is not {gpus:,}", pipeline * data * tensor != gpus),
            ("tensor does not divide the 8 GPUs of a machine", 8 % tensor != 0),
            ("tensor does not divide the key-value heads", n_kv_heads % tensor != 0),
            ("pipeline does not divide the layers", n_layers % pipeline != 0),
            ("data does not divide the sequences", sequences % data != 0),
            ("the pipeline waits more than a tenth of the time", 9 * (pipeline - 1) > sequences // data)]
