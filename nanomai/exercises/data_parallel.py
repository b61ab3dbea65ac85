"""What the ranks of `notebooks/13_data_parallel_to_fsdp` run, and the checks of its exercises."""

from __future__ import annotations

from pathlib import Path

import torch

from nanomai.config import ModelConfig, OptimConfig, ParallelConfig
from nanomai.model import Transformer, init_weights
from nanomai.observer import Observer
from nanomai.ops import IGNORE
from nanomai.optim import build_optimizers, set_learning_rate
from nanomai.parallel.apply import allocate, clip_gradients, parallelize, share
from nanomai.parallel.launch import process_group
from nanomai.parallel.layout import lay_out
from nanomai.show import exercise


def train_sharded(rank: int, config: ModelConfig, optim: OptimConfig, seed: int, folder: Path) -> None:
    """A step for each batch in `folder`, as the trainer makes them; leaves there what this rank holds.

    For `launch`, or alone: then one process is all ranks that there are.
    """
    with process_group() as mesh:
        layout = lay_out(ParallelConfig(), mesh)
        with torch.device("meta"):
            model = Transformer(config)
        allocate(parallelize(model, layout), torch.device("cpu"))
        init_weights(model, seed, share)
        (adamw,) = build_optimizers(model, optim)
        set_learning_rate([adamw], optim.lr)
        found = {"norms": []}
        for ids, targets in torch.load(folder / "batches.pt"):
            mine = [x.chunk(layout.data_size)[layout.data_rank] for x in (ids, targets)]
            with Observer(None, layout, config.n_layers) as seen:
                model(*mine, reduction="sum").backward()
            found["norms"].append(clip_gradients(model, optim.grad_clip, (targets != IGNORE).sum().item()).item())
            found["gradients"] = {name: share(p.grad)[0].clone() for name, p in model.named_parameters()}
            adamw.step()
            adamw.zero_grad()
        found["weights"] = {name: share(p)[0].clone() for name, p in model.named_parameters()}
        found["collectives"] = {name: dict(counts) for name, counts in seen.collectives.items()}
    torch.save(found, folder / f"rank-{rank}.pt")


@exercise
def check_ring_program(answer):
    """`answer(rank, ranks, vector)`: a generator that yields what it sends, is sent what arrives, returns the sum."""
    generator = torch.Generator().manual_seed(0)
    for ranks, n in [(1, 5), (2, 6), (3, 7), (4, 12), (5, 23), (8, 8)]:
        vectors = [torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(ranks)]
        results, sent, calls = _run_in_a_ring([answer(r, ranks, v.clone()) for r, v in enumerate(vectors)])
        true, case = torch.stack(vectors).sum(0), f"{ranks} ranks, {n} numbers"
        for r, result in enumerate(results):
            assert result is not None, f"{case}: rank {r} returns nothing; return the sum"
            assert result.shape == true.shape, f"{case}: rank {r} has shape {tuple(result.shape)}, not ({n},)"
            wrong = int(((result - true).abs() > 1e-9).sum())
            assert not wrong, f"{case}: rank {r} has {wrong} wrong numbers"
        assert calls == 2 * (ranks - 1), f"{case}: {calls} steps, not {2 * (ranks - 1)}"
        most = 2 * (ranks - 1) * -(-n // ranks)  # the chunks may differ by one number
        assert max(sent) <= most, f"{case}: a rank sends {max(sent)} numbers; {most} are enough"


def _run_in_a_ring(programs: list) -> tuple[list, list[int], int]:
    """All programs in step: what each returns, how many numbers it sent, and the steps."""
    results, sent, calls = [None] * len(programs), [0] * len(programs), 0
    arriving = [None] * len(programs)
    while True:
        leaving = []
        for r, program in enumerate(programs):
            try:
                leaving.append(program.send(arriving[r]).clone())  # what is sent must not change afterwards
                sent[r] += leaving[-1].numel()
            except StopIteration as end:
                results[r] = end.value
        if not leaving:
            return results, sent, calls
        assert len(leaving) == len(programs), "some ranks end while others still send: all must take as many steps"
        assert calls < 4 * len(programs), f"{calls} steps and no end"
        arriving, calls = leaving[-1:] + leaving[:-1], calls + 1


@exercise
def check_global_mean(answer):
    """`answer(gradients, counts)`: from every rank's gradient of its own mean, that of the mean over all tokens."""
    generator = torch.Generator().manual_seed(0)
    for counts in [(4, 4), (3, 1), (7, 2, 5), (1, 0, 9, 2), (0, 6)]:
        weight = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
        sums = []
        for n in counts:
            x, y = (torch.randn(9, width, generator=generator, dtype=torch.float64) for width in (5, 3))
            error = (x @ weight.T - y).square().sum(1)  # of each of 9 tokens, of which n are valid
            sums.append((error * (torch.arange(9) < n)).sum())
        means = [torch.autograd.grad(s / n if n else s * torch.nan, weight, retain_graph=True)[0]
                 for s, n in zip(sums, counts, strict=True)]
        (true,) = torch.autograd.grad(sum(sums) / sum(counts), weight)
        got = answer([g.clone() for g in means], list(counts))
        case = f"ranks with {counts} valid tokens"
        assert torch.is_tensor(got) and got.shape == true.shape, f"{case}: return one gradient, of shape (3, 5)"
        assert torch.isfinite(got).all(), f"{case}: the gradient is not finite; what is the mean over no tokens?"
        off, ratio = ((got - true).norm() / true.norm()).item(), (got.norm() / true.norm()).item()
        assert off < 1e-9, f"{case}: off by {off:.2g} of its length ({ratio:.2f} times as long)"


@exercise
def check_bytes_sent(answer):
    """`answer(stage, ranks, block, n_blocks, root)`: bytes that a rank sends in a step of one micro-batch."""
    for ranks, block, n_blocks, root in [(2, 10, 3, 4), (4, 12, 2, 8), (8, 800, 5, 160), (1, 7, 2, 3),
                                         (64, 6400, 9, 640)]:
        whole, others = n_blocks * block + root, (ranks - 1) / ranks
        # gradients are float32, weights travel as bfloat16; a vector of n bytes costs others * n for each half
        true = {0: 2 * 4 * whole, 1: (4 + 2) * whole, 2: (4 + 2) * whole,
                3: 4 * whole + 2 * (2 * n_blocks * block + root)}
        for stage, sent in true.items():
            got = answer(stage, ranks, block, n_blocks, root)
            case = f"stage {stage}, {ranks} ranks, {n_blocks} blocks of {block} and a root of {root}"
            assert abs(got - others * sent) < 1e-6 * (1 + sent), f"{case}: {others * sent:,.1f} bytes, not {got:,.1f}"
