"""Ranks that do not exist against closed forms, PyTorch's own tracker, a real job of two, and the full golden runs."""

import contextlib
import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

import nanomai
from nanomai import cli, ops, simulator, stand_ins
from nanomai.architecture import MLAConfig, MoEConfig
from nanomai.config import Config, ConfigError, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from nanomai.config_file import load_config
from nanomai.model import Transformer
from nanomai.optim import build_optimizers
from nanomai.parallel import expert
from nanomai.parallel.apply import parallelize
from nanomai.parallel.launch import launch, process_group
from nanomai.parallel.layout import lay_out
from nanomai.planner import counts, plan
from nanomai.simulator import Observer, simulate

T = 1024
MODEL = ModelConfig(n_layers=4, d_model=256, n_heads=8, n_kv_heads=2, head_dim=32, d_ff=512, vocab_size=1024,
                    context_length=T, tied_embeddings=False)
EXPERTS = dataclasses.replace(MODEL, moe=MoEConfig(n_experts=16, experts_per_token=2, d_expert=128, router="sigmoid"))
MODELS = {"dense": MODEL, "experts": EXPERTS}


def config(model: str = "dense", optimizer: str = "adamw", train: TrainConfig | None = None, **parallel) -> Config:
    return Config(model=MODELS[model], train=train or TrainConfig(batch_tokens=T), optim=OptimConfig(name=optimizer),
                  parallel=ParallelConfig(**parallel))


# --- Closed forms


@pytest.mark.parametrize("world_size", [8, 64])
@pytest.mark.parametrize("model", MODELS)
def test_what_every_rank_holds(model, world_size):
    """Even shares of all but the routers, whose 16 rows are not enough for 64; the optimizer counts for each tensor."""
    tensors = dict(meta(model).named_parameters())
    routers = [p.numel() for name, p in tensors.items() if "router" in name]
    n = (MODELS[model].n_parameters - sum(routers)) // world_size + sum(routers) // min(world_size, 16)
    assert simulate(config(model), world_size).state == {
        "parameters": 4 * n, "gradients": 4 * n, "optimizer": 8 * n + 4 * len(tensors)}


def meta(model: str) -> Transformer:
    with torch.device("meta"):
        return Transformer(MODELS[model])


@pytest.mark.parametrize("n", [1, 3], ids=["one micro-batch", "three"])
@pytest.mark.parametrize("keep_gathered", [False, True])
def test_what_fsdp_sends(keep_gathered, n):
    """Blocks are gathered twice, or once where they are kept, and the rest once, in two bytes; gradients go in four.

    Each micro-batch does so, but where they are kept the gradients of all are sent together.
    """
    rest = 2 * MODEL.vocab_size * MODEL.d_model + MODEL.d_model
    times, sums = (n, 1) if keep_gathered else (2 * n, n)
    sent = simulate(config(keep_gathered=keep_gathered), 8, micro_batches=n).collectives
    assert sent["fsdp: all-gather"] == {"calls": times * 4 + n,
                                        "bytes": 2 * (times * (MODEL.n_parameters - rest) + n * rest)}
    assert sent["fsdp: reduce-scatter"] == {"calls": sums * (4 + 1), "bytes": sums * 4 * MODEL.n_parameters}


def test_gradients_between_copies_are_summed_once():
    sent = simulate(config(replicas=2), 8, micro_batches=3).collectives["replicas: all-reduce"]
    assert sent == {"calls": 4 + 1, "bytes": 4 * MODEL.n_parameters // 4}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("world_size", [1, 8])
def test_flops(model, world_size):
    """6 for each weight of a matrix and token; with recompute 8 in the blocks, but for what no backward asks for."""
    c = MODELS[model]
    head, layers = c.vocab_size * c.d_model, c.n_layers
    norms = (2 * layers + 1) * c.d_model
    blocks = c.n_active_parameters - 2 * head - norms
    attention = c.flops_per_token() - 6 * (blocks + norms - c.d_model + head)  # which counts the norms of blocks
    plain, again = (simulate(config(model, recompute=what), world_size) for what in ("none", "full"))
    assert plain.flops["products"] == T * 6 * (blocks + head)
    # the MLP's last product is not computed again: the backward needs its inputs alone. That of experts is weighted
    unasked = 2 * layers * c.d_ff * c.d_model if model == "dense" else 0
    assert again.flops["products"] == T * (8 * blocks - unasked + 6 * head)
    # a forward is a third of what the closed form gives attention; the backward makes the scores once more
    assert plain.flops["attention"] == T * attention * 3.5 / 3 and again.flops["attention"] == T * attention * 4.5 / 3
    assert plain.flops_per_token * T * world_size == sum(plain.flops.values()) * world_size


@pytest.mark.parametrize("by", ["keys", "heads"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_flops_of_ranks_that_share_sequences(ranks, by):
    """Their part of all, and of attention what the mask shows and no more."""
    alone, shared = simulate(config(), 8), simulate(config(context=ranks, context_by=by), 8)
    assert {kind: ranks * n for kind, n in shared.flops.items()} == alone.flops
    assert shared.flops_per_token == alone.flops_per_token


def test_flops_of_ranks_that_share_latents():
    """By keys each makes those of all out of the latents, and scores up to the ends of two pieces; by heads its own."""
    latents = MLAConfig(kv_rank=64, rope_dim=16, v_dim=24)
    model = dataclasses.replace(MODEL, n_kv_heads=MODEL.n_heads, mla=latents)
    keys, heads = (simulate(dataclasses.replace(config(context=4, context_by=by), model=model), 8).flops
                   for by in ("keys", "heads"))
    made = 3 * T * 6 * 64 * 8 * (32 - 16 + 24)  # for the other three quarters of the positions
    piece = T // 8
    assert keys["products"] - heads["products"] == 4 * (made // 4)
    each = 4 * 2 * (4 * 32 + 3 * 24)  # in four layers, forward and backward
    assert keys["attention"] == each * 8 * (2 * 4 + 1 / 2) * piece**2  # the first of the first rank's two is a square
    assert heads["attention"] == each * 2 * T * T // 2  # of two heads, what the mask shows


# --- Others that count


@pytest.mark.parametrize("model, parallel", [
    ("dense", {"recompute": "full"}), ("dense", {"tensor": 2}), ("experts", {"replicas": 2, "recompute": "selective"})])
def test_the_peak_is_what_pytorchs_tracker_says(model, parallel, monkeypatch):
    trackers, optimizers = [], []

    class Both(Observer):
        """PyTorch's tracker above ours, for the length of the step."""

        def follow(self, model):
            super().follow(model)
            trackers.append(FSDPMemTracker(model, *optimizers).__enter__())

        def seen(self):
            trackers[-1].__exit__(None, None, None)
            return super().seen()

    def build(*settings):
        optimizers[:] = build_optimizers(*settings)
        return optimizers

    monkeypatch.setattr(simulator, "Observer", Both)
    monkeypatch.setattr(simulator, "build_optimizers", build)
    found = simulate(config(model, **parallel), 8)
    (theirs,) = trackers[0].get_tracker_snapshot("peak").values()
    assert found.peak == theirs["Total"]


# --- A pipeline

DEEP = dataclasses.replace(MODEL, n_layers=8)


def staged(**parallel) -> Config:
    return Config(model=DEEP, train=TrainConfig(batch_tokens=T), parallel=ParallelConfig(**parallel))


@pytest.mark.parametrize("v, edges", [(1, {0: 1, 1: 2, 3: 1}), (2, {0: 3, 1: 4, 3: 3})])
def test_a_pipeline(v, edges):
    """A rank of each of four gathers and sums once, and sends every micro-batch on, and its gradient back."""
    whole = simulate(staged(pipeline=1), 8)
    for stage, n_edges in edges.items():
        found = simulate(staged(pipeline=4, stages_per_rank=v), 8, micro_batches=4, stage=stage)
        held = found.state["parameters"] * 2 / 4  # in numbers, of the two ranks that share the stage
        row = T * DEEP.d_model * 2
        assert found.collectives["fsdp: all-gather"]["bytes"] == 2 * held
        assert found.collectives["fsdp: reduce-scatter"]["bytes"] == 4 * held
        assert found.collectives["pipeline: send"] == {"calls": 4 * n_edges, "bytes": 4 * n_edges * row}
        assert found.collectives["pipeline: receive"] == found.collectives["pipeline: send"]
        assert found.flops["attention"] == whole.flops["attention"]  # of four micro-batches, a fourth
    together = simulate(staged(pipeline=4, stages_per_rank=v), 8)
    assert together.flops_per_token == whole.flops_per_token and found.flops_per_token is None
    assert together.stages.keys() == edges.keys() and together.peak == together.stages[together.stage]


@pytest.mark.parametrize("v, enough", [(1, 3), (2, 4)])
def test_what_more_micro_batches_hold(v, enough):
    """Neither their activations, nor what is received: two of 8 bytes for each token, and interleaved what was sent."""
    config = staged(pipeline=2, stages_per_rank=v, recompute="full")
    few, many = simulate(config, 4), simulate(config, 4, micro_batches=8)
    assert few.micro_batches == enough and few.peak > simulate(config, 4, micro_batches=2).peak
    sent = (2 * v - 1) * T * DEEP.d_model * 2 if v > 1 else 0
    for s in (0, 1):
        assert many.stages[s] - few.stages[s] == pytest.approx((8 - enough) * (2 * 8 * T + sent), abs=64)


# --- A job of two


SHORT = TrainConfig(batch_tokens=64, sequence_length=64, dtype="float32")
LAYOUTS = {"fsdp": config(train=SHORT, recompute="full"), "tensor": config(train=SHORT, tensor=2),
           "context": config(train=SHORT, context=2), "expert": config("experts", train=SHORT, expert=2),
           "muon": config("experts", "muon", SHORT), "pipeline": config(train=SHORT, pipeline=2),
           "interleaved": config(train=SHORT, pipeline=2, stages_per_rank=2, recompute="full")}


def really(rank, folder):
    """One step of each layout, in a real job; three times, as gloo may let go of a message late on a busy machine."""
    with process_group() as mesh, stand_ins.messages(), stand_ins.kernels_of_a_gpu():
        for name, config in LAYOUTS.items():
            layout, seen = lay_out(config.parallel, mesh), []
            for _ in range(3):
                with torch.device("meta"):
                    model = Transformer(config.model)
                parallelize(model, layout, config.parallel)
                with Observer(None, layout, len(model.blocks)) as observer:
                    seen.append(simulator._step(config, layout, model, observer, simulator._enough(config)))
            torch.save(seen, folder / f"{name}-{rank}.pt")
            simulator._clear_sharding_prop_cache()  # the next grid may be as large, and has groups of its own


def test_two_real_ranks_do_the_same(tmp_path):
    launch(really, 2, tmp_path)
    stages = [(name, stage) for name, config in LAYOUTS.items() for stage in range(config.parallel.pipeline)]
    for name, stage in stages:
        found = simulate(LAYOUTS[name], 2, stage=stage)
        times = torch.load(tmp_path / f"{name}-{stage}.pt", weights_only=False)
        real = times[0]
        calls = {axis: seen["calls"] for axis, seen in found.collectives.items()}
        assert calls == {axis: seen["calls"] for axis, seen in real["collectives"].items()}, name
        assert found.state == real["state"], name
        if name != "expert":  # a real router is never even
            assert found.collectives == real["collectives"] and found.flops == real["flops"], name
            peak = min(max(sum(causes.values()) for causes in seen["places"].values()) for seen in times)
            apart = 64 if found.layout["pipeline"] > 1 else 0  # where losses are kept
            assert found.peak - apart <= peak <= found.peak, name



# --- Continued from two depths


GOLDEN = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "simulate.json").read_text())


golden = pytest.mark.parametrize("run", GOLDEN["runs"], ids=lambda run: f"{run['name']}-{run['world_size']}")


@golden
def test_few_layers_tell_of_all(run):
    """The whole depth was simulated once, and is kept; here come 32 layers, four and two in a stage. It must fit."""
    found = simulate(load_config(run["name"]), run["world_size"], layers=32, stage=run["stage"])
    assert found.layers_simulated == [16, 32] and found.headroom() > 0.1
    assert (found.place, found.state, found.flops) == (run["place"], run["state"], run["flops"])
    assert found.memory == pytest.approx(run["memory"], rel=0, abs=64)  # a few scalars
    for name, sent in run["collectives"].items():
        if name != "all: all-reduce":  # the loads of experts, of all layers wherever they are
            assert found.collectives[name] == sent, name


@golden
def test_the_plan_agrees(run):
    """Its closed forms, to 3 %, with what was counted: memory and messages of each stage, FLOPs of all."""
    config, sizes = load_config(run["name"]), run["layout"]
    found, n = plan(config, run["world_size"]), run["micro_batches"]
    assert found.memory["peak"] == pytest.approx(run["peak"], rel=0.03) and found.fits
    assert found.flops["computed_per_token"] == pytest.approx(run["flops_per_token"], rel=0.03)
    for stage, peak in run["stages"].items():
        assert sum(counts.memory_of(config, sizes, 1, n, int(stage)).values()) == pytest.approx(peak, rel=0.03), stage
    sent = Counter()
    for name, seen in run["collectives"].items():
        axis, kind = name.split(": ")
        others = (sizes[axis] - 1) / sizes[axis] if axis in ("fsdp", "tensor") else kind == "send"
        sent[axis] += seen["bytes"] * others
    traffic = counts.traffic_of(config, sizes, 1, n, run["stage"])
    traffic["fsdp"] += traffic["fsdp of experts"]  # the same ranks, without an expert axis
    for axis in ("fsdp", "tensor", "pipeline"):
        assert traffic[axis] == pytest.approx(sent[axis], rel=0.03), axis


PLANNED = {
    "one": {}, "three": {"n": 3}, "kept": {"n": 2, "keep_gathered": True}, "replicas": {"n": 2, "replicas": 4},
    "selective": {"n": 2, "tensor": 8, "recompute": "selective"}, "keys": {"context": 4},
    "heads": {"context": 4, "context_by": "heads"},
    "keys of 128k": {"name": "phi-3-medium-128k", "context": 8}, "latents": {"name": "deepseek-v2-lite", "n": 2},
    "pipeline": {"n": 3, "pipeline": 2}, "interleaved": {"n": 4, "pipeline": 2, "stages_per_rank": 2},
    "experts": {"name": "mixtral-8x7b", "n": 2}, "experts elsewhere": {"name": "mai-1-moe", "expert": 16, "tensor": 8},
    "experts elsewhere, selective": {"name": "mai-1-moe", "expert": 16, "tensor": 8, "recompute": "selective"},
}


@pytest.mark.parametrize("settings", PLANNED.values(), ids=PLANNED)
def test_the_plan_agrees_in_other_layouts(settings):
    settings = {"name": "llama-3-8b", "n": 1} | settings
    name, n = settings.pop("name"), settings.pop("n")
    parallel = ParallelConfig(**{"recompute": "full"} | settings)
    config = dataclasses.replace(load_config(name), parallel=parallel)
    ranks = 64 * 16 // parallel.tensor // parallel.context // parallel.pipeline  # that read different data
    train = dataclasses.replace(config.train, batch_tokens=n * ranks * config.sequence_length, micro_batch=1)
    config = dataclasses.replace(config, train=train)
    layers = 8 * parallel.stages_per_rank
    counted, planned = simulate(config, 64 * 16, layers=layers, micro_batches=n), plan(config, 64 * 16)
    assert planned.memory["peak"] == pytest.approx(counted.peak, rel=0.03)
    assert planned.flops["computed_per_token"] == pytest.approx(counted.flops_per_token, rel=0.03)
    sent = sum(seen["bytes"] for name, seen in counted.collectives.items() if name.startswith("context: "))
    assert planned.communication["context"] == pytest.approx(sent * (1 - 1 / parallel.context), rel=0.03)


def test_between_micro_batches_gradients_are_shares_again():
    """What a second one adds is this rank's share, or, where blocks stay gathered, all gradients in float32."""
    for keep_gathered, held in ((False, MODEL.n_parameters / 64), (True, MODEL.n_parameters)):
        once, twice, thrice = (simulate(config(recompute="full", keep_gathered=keep_gathered), 64, micro_batches=n)
                               for n in (1, 2, 3))
        assert 0.4 * held < (twice.peak - once.peak) / 4 <= held and thrice.peak == twice.peak
        assert thrice.tokens == 3 * once.tokens and thrice.flops["attention"] == 3 * once.flops["attention"]


def test_imbalance_is_felt():
    even, busy = (simulate(config("experts", expert=8), 8, imbalance=n) for n in (1, 3))
    assert busy.peak > even.peak and busy.flops["attention"] == even.flops["attention"]
    products = 6 * 3 * 256 * 128 * T * 2 * 4  # of all experts: three matrices, two pairs a token, four layers
    assert busy.flops["products"] - even.flops["products"] == 2 * products


# --- At the terminal, and in a process that goes on


def test_nothing_is_left_behind():
    before = torch.UntypedStorage.resize_, expert.traffic, ops.EXPLICIT_SCORES_LIMIT
    for parallel in ({"tensor": 2}, {"tensor": 2, "replicas": 2}, {"tensor": 3}):  # the last cannot be
        with contextlib.suppress(ConfigError):
            found = nanomai.simulate(config(**parallel), world_size=8)
            assert found.collectives["tensor: all-reduce"]["calls"] == 2 * 4 + 1  # a norm each
        assert before == (torch.UntypedStorage.resize_, expert.traffic, ops.EXPLICIT_SCORES_LIMIT)
        assert not dist.is_initialized() and torch.ones(2).sum().item() == 2


def test_the_command(capsys):
    assert cli.main(["simulate", "nano", "--world-size", "2", "--parallel.replicas", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layout"]["replicas"] == 2 and sum(found["memory"].values()) == found["peak"]
    assert cli.main(["simulate", "nano", "--world-size", "2"]) == 0
    text = capsys.readouterr().out
    assert "nano, 4 layers (4 simulated) on 2 ranks: fsdp 2\n" in text and " of 80 GB" in text


@pytest.mark.parametrize("arguments, line", [
    (["--world-size", "6", "--parallel.tensor", "4"],
     "parallel tensor 4 divides no 6 ranks; the nearest that works is tensor 3"),
    (["--world-size", "0"], "world_size 0 must be at least 1"),
    (["--layers", "4"], "layers 4 must be 8 at least; the model has 4"),
    (["--imbalance", "2"], "imbalance is between the ranks of an expert axis; set parallel.expert"),
    (["--stage", "1"], "stage 1 is none of parallel.pipeline 1; the last is 0"),
    (["--parallel.pipeline", "2", "--world-size", "2"],
     "parallel pipeline needs model.tied_embeddings false: the embedding is in the first stage, and the head in the "
     "last"),
    (["--parallel.pipeline", "2", "--world-size", "2", "--micro-batches", "1"],
     "micro_batches 1 must be 2 or more, as 2 ranks of a pipeline need"),
    (["--parallel.pipeline", "2", "--world-size", "2", "--layers", "3"],
     "layers 3 must be 8 at least, and a multiple of 4: half of it must fill the stages evenly; the model has 4"),
    (["--world", "2"], "Unrecognized options: --world, 2"),
])
def test_what_cannot_be_is_one_line(arguments, line, capsys):
    assert cli.main(["simulate", "nano", *arguments]) == 1
    assert capsys.readouterr().err == f"nanomai: {line}\n"
