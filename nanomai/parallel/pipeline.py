"""Pipeline parallel: ranks hold stages of blocks, and micro-batches follow one another through them.

A stage sends the stage after it what its blocks make of a micro-batch, (B, T, D), and the one before it the gradient of
what came from there: the least of all that ranks exchange, so stages may lie in different machines. In 1F1B (arXiv
2104.04473) a rank takes in as many micro-batches as there are stages from here to the end, then does one forward and
one backward in turn, so it never holds the activations of more of them. Of m = 4 on p = 2 ranks:

    rank 0   F0  F1  --  B0  F2  B1  F3  B2  --  B3
    rank 1   --  F0  B0  F1  B1  F2  B2  F3  B3  --

The bubble, the time for which a rank waits as a share of the time for which it works, is (p - 1) / m. With v stages on
each rank (interleaved: stage s is on rank s mod p) it is (p - 1) / (v m), and v times as much is sent.

Gradients are sums here as everywhere: of all micro-batches, and over the ranks that share a stage's parameters once, at
the end of the step. Until then a rank keeps its stages' parameters gathered and their gradients whole. What it receives
it keeps for as long as a micro-batch is with it, so in 1F1B memory does not grow with their number. Interleaved, the
library keeps what was sent as well, and that until the end of the step: 2 v tensors (B, T, D) for each micro-batch.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from nanomai.parallel.layout import Layout
from nanomai.parallel.limits import share_layers


def stages_of(model: nn.Module) -> list[nn.Module]:
    """The parts of `model` that run as one on this rank: its stages, or all of it."""
    return model.pipeline.stages if hasattr(model, "pipeline") else [model]


class Pipeline:
    """One rank's stages of a model, and the messages between them and the others'.

    A stage is the model without the parts of other stages, all under their own names. `model` keeps what the stages of
    this rank have, so optimizers, checkpoints and clipping find it there as they would without a pipeline.
    """

    def __init__(self, model: nn.Module, layout: Layout, stages_per_rank: int):
        self.model, self.sizes, self.group = model, layout.sizes, layout.axis("pipeline").get_group()
        self.p, self.rank = self.group.size(), self.group.rank()
        self.n_stages = self.p * stages_per_rank
        shares = share_layers(model.config.n_layers, self.n_stages)
        blocks, model.blocks = model.blocks, nn.ModuleDict()
        self.here = range(self.rank, self.n_stages, self.p)
        self.stages = [self._stage({str(i): blocks[str(i)] for i in shares[s]}, s) for s in self.here]
        model.blocks = nn.ModuleDict({name: block for stage in self.stages for name, block in stage.blocks.items()})
        for part in ("embed", "positions", "norm", "head"):
            setattr(model, part, next(filter(None, (getattr(stage, part) for stage in self.stages)), None))
        self.shape, self.schedule = None, None  # the last micro-batches', and what serves them
        model.pipeline, model.forward = self, self.forward

    def _stage(self, blocks: dict[str, nn.Module], number: int) -> nn.Module:
        stage = copy.deepcopy(self.model)
        stage.blocks = nn.ModuleDict(blocks)
        if number > 0:
            stage.embed = stage.positions = None
        if number < self.n_stages - 1:
            stage.norm = stage.head = None
        stage.register_forward_pre_hook(_arrange, with_kwargs=True)
        return stage

    def forward_backward(self, ids: Tensor, targets: Tensor, documents: Tensor, micro_batch: int) -> Tensor:
        """Adds up the gradients of the rows of a batch (B, T), `micro_batch` rows at a time.

        Returns the sum of the losses, to every rank of the pipeline.
        """
        schedule, losses = self._schedule(len(ids) // micro_batch, micro_batch, ids), []
        for stage in self.stages:
            stage.train()
        schedule.step(*([ids] if 0 in self.here else []), target=targets, losses=losses, return_outputs=False,
                      ids=ids, targets=targets, document_ids=documents)
        loss = sum(losses, torch.zeros((), device=ids.device)).detach()
        dist.all_reduce(loss, group=self.group)  # only the last stage has one
        return loss

    def _schedule(self, n: int, micro_batch: int, batch: Tensor):
        """Made anew when batches change their shape.

        Stages are told what they will receive; the library would otherwise find out by running them on nothing.
        """
        if self.shape == (n, batch.shape):
            return self.schedule
        # costs half a second, which no other run need wait for
        from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B

        from nanomai.parallel.stage import Stage
        like = batch[:micro_batch].to("meta")
        hidden, loss = (like.new_empty(shape, dtype=dtype, requires_grad=True)
                        for shape, dtype in (self._result(s, like, like, False) for s in (0, self.n_stages - 1)))
        stages = [Stage(stage, s, self.n_stages, batch.device, input_args=hidden if s else like,
                        output_args=hidden if s < self.n_stages - 1 else loss, group=self.group)
                  for s, stage in zip(self.here, self.stages, strict=True)]
        options = {"loss_fn": lambda loss, target: loss, "scale_grads": False}
        self.shape, self.schedule = (n, batch.shape), (
            ScheduleInterleaved1F1B(stages, n, **options) if len(stages) > 1 else Schedule1F1B(*stages, n, **options))
        return self.schedule

    @torch.no_grad()
    def forward(self, ids: Tensor, targets: Tensor | None = None, document_ids: Tensor | None = None,
                reduction: str = "mean", cache=None, last_only: bool = False) -> Tensor:
        """What the model would give, to every rank of the pipeline: for evaluation and samples.

        One stage works while the others wait, so this is as slow as one rank alone would be.
        """
        x = None
        for s in range(self.n_stages):
            if s in self.here:
                stage = self.stages[self.here.index(s)]
                stage.training = self.model.training  # what is inside of it belongs to the model as well
                x = stage(ids, targets, document_ids, reduction=reduction, cache=_of_stage(cache, stage),
                          last_only=last_only, hidden=x)
                if isinstance(stage, FSDPModule):
                    stage.reshard()  # embedding and head: blocks are scattered by who called
            else:
                shape, dtype = self._result(s, ids, targets, last_only)
                x = torch.empty(shape, dtype=dtype, device=ids.device)
            dist.broadcast(x, group=self.group, group_src=s % self.p)
        return x

    def _result(self, stage: int, ids: Tensor, targets: Tensor | None, last_only: bool) -> tuple[tuple, torch.dtype]:
        """Shape and dtype of what a stage gives: hidden states, and at last logits or a loss."""
        dtype, (b, t) = self.model.compute_dtype, ids.shape
        if stage == self.n_stages - 1:
            shape = () if targets is not None else (b, 1 if last_only else t, self.model.config.vocab_size)
            return shape, torch.promote_types(dtype, torch.float32)
        if targets is not None:
            t //= self.sizes["context"]
        if not last_only and t % self.sizes["tensor"] == 0:
            t //= self.sizes["tensor"]
        return (b, t, self.model.config.d_model), dtype


def _arrange(stage: nn.Module, inputs: tuple, options: dict) -> tuple[tuple, dict] | None:
    """The library hands on one tensor from stage to stage, and what all stages need by name."""
    if "ids" not in options:
        return None
    arguments = tuple(options[name] for name in ("ids", "targets", "document_ids"))
    return arguments, {"reduction": "sum", "hidden": None if stage.embed is not None else inputs[0]}


def _of_stage(cache, stage: nn.Module):
    """`cache` as a stage sees it: other stages of this rank may be ahead of it by the tokens of this pass."""
    if cache is None:
        return None
    cache = copy.copy(cache)
    cache.layers = [layer if str(i) in stage.blocks else None for i, layer in enumerate(cache.layers)]
    return cache
