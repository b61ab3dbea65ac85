"""What the processes of `notebooks/14_tensor_pipeline_expert_context` run: a spawned one sees no cell."""

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from nanomai.config import ModelConfig, ParallelConfig
from nanomai.model import Transformer, init_weights
from nanomai.parallel import expert
from nanomai.parallel.apply import allocate, parallelize, share
from nanomai.parallel.launch import process_group
from nanomai.parallel.layout import lay_out
from nanomai.parallel.mesh import Mesh
from nanomai.parallel.pipeline import stages_of


class Collectives(TorchDispatchMode):
    """Counts the collectives that run inside of it, forward and backward, by name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.name().removeprefix("_c10d_functional::").split(".")[0]
        self.counts[name] += op.namespace == "_c10d_functional" and not name.startswith(("_", "wait"))
        return op(*args, **(kwargs or {}))


def compute(rank: int, folder: str, jobs: dict[str, tuple[ModelConfig, ParallelConfig]], rows: list) -> None:
    """One forward and backward of `rows` (B, T + 1) under each job's layout; writes what this rank found."""
    # how a cut gradient is put together again for the comparison is no part of the lesson
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    with process_group() as mesh:
        for name, (config, parallel) in jobs.items():
            found = loss_and_gradients(mesh, config, parallel, torch.tensor(rows))
            torch.save(found, Path(folder) / f"{name}-{rank}.pt")


def loss_and_gradients(mesh: Mesh, config: ModelConfig, parallel: ParallelConfig, rows: Tensor) -> dict:
    """The sum of the losses; every gradient, whole; and a protocol of what happened on this rank.

    Pipelines take a row at a time. `order` has the forwards and backwards of the stages here, `coming` the tokens for
    the experts here of each layer, by the rank that they come from, `ids` what the embedding was given, and
    `collectives` how many there were of each kind.
    """
    layout = lay_out(parallel, mesh)
    with torch.device("meta"):
        model = Transformer(config)
    allocate(parallelize(model, layout, parallel), torch.device("cpu"))
    init_weights(model, share=share)
    rows = rows.chunk(layout.data_size)[layout.data_rank]
    ids, targets, coming, read = rows[:, :-1], rows[:, 1:], [], []
    order = _watch_stages(model)
    if model.embed is not None:
        model.embed.register_forward_pre_hook(lambda embed, inputs: read.append(inputs[0]))
    with Collectives() as collectives, mock.patch.object(expert, "traffic", _watched(expert.traffic, coming)):
        if parallel.pipeline > 1:
            loss = model.pipeline.forward_backward(ids, targets, torch.zeros_like(ids), 1)
        else:
            loss = model(ids, targets, reduction="sum")
            loss.backward()
    gradients = {name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                 for name, p in model.named_parameters()}
    return {"loss": layout.sum(loss.detach()), "gradients": gradients, "order": order, "coming": coming,
            "ids": torch.cat(read) if read else None, "collectives": dict(+collectives.counts)}


def _watch_stages(model: torch.nn.Module) -> list[tuple[str, int]]:
    """("F" or "B", which of this rank's stages), as they come: when its first block is entered, and left backwards."""
    order = []
    for number, stage in enumerate(stages_of(model)):
        def enter(block, inputs, number=number):
            x, *_ = inputs
            order.append(("F", number))
            x.register_hook(lambda gradient: order.append(("B", number)))

        next(iter(stage.blocks.values())).register_forward_pre_hook(enter)
    return order


def _watched(traffic: Callable, coming: list) -> Callable:
    def watched(counts, group):
        found = traffic(counts, group)
        coming.append(found[0].tolist())
        return found

    return watched
