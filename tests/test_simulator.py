"""Ranks that do not exist against closed forms, PyTorch's own tracker, a real job of two, and the full golden runs."""

import contextlib
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

import nanomai
from nanomai import cli, ops, simulator
from nanomai.architecture import MoEConfig
from nanomai.config import Config, ConfigError, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from nanomai.config_file import load_config
from nanomai.model import Transformer
from nanomai.optim import build_optimizers
from nanomai.parallel import expert
from nanomai.parallel.apply import parallelize
from nanomai.parallel.launch import launch, process_group
from nanomai.parallel.layout import lay_out
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


SHORT = TrainConfig(batch_tokens=64, sequence_length=64, dtype="float32")
LAYOUTS = {"fsdp": config(train=SHORT, recompute="full"), "tensor": config(train=SHORT, tensor=2),
           "context": config(train=SHORT, context=2), "expert": config("experts", train=SHORT, expert=2),
           "muon": config("experts", "muon", SHORT)}


def really(rank, folder):
    """One step of each layout, in a real job."""
    ops.EXPLICIT_SCORES_LIMIT = 0
    with process_group() as mesh:
        for name, config in LAYOUTS.items():
            layout = lay_out(config.parallel, mesh)
            with torch.device("meta"):
                model = Transformer(config.model)
            parallelize(model, layout, config.parallel)
            with Observer(None, layout, config.model.n_layers) as observer:
                seen = simulator._step(config, layout, model, observer)
            if rank == 0:
                torch.save(seen, folder / f"{name}.pt")


def test_two_real_ranks_do_the_same(tmp_path):
    launch(really, 2, tmp_path)
    for name, config in LAYOUTS.items():
        real, found = torch.load(tmp_path / f"{name}.pt", weights_only=False), simulate(config, 2)
        calls = {axis: seen["calls"] for axis, seen in found.collectives.items()}
        assert calls == {axis: seen["calls"] for axis, seen in real["collectives"].items()}, name
        assert found.state == real["state"], name
        if name != "expert":  # a real router is never even
            assert found.collectives == real["collectives"] and found.flops == real["flops"], name
            assert found.peak == max(sum(causes.values()) for causes in real["places"].values()), name


# --- Continued from two depths


GOLDEN = json.loads((Path(__file__).parents[1] / "benchmarks" / "results" / "simulate.json").read_text())


@pytest.mark.parametrize("run", GOLDEN["runs"], ids=lambda run: f"{run['name']}-{run['world_size']}")
def test_few_layers_tell_of_all(run):
    """The whole depth was simulated once, and is kept; here come 8 layers. It must fit."""
    expected = run | {"layers_simulated": [4, 8]}
    found = simulate(load_config(run["name"], **expected.pop("settings")), run["world_size"], layers=8).as_dict()
    assert {name: found[name] for name in expected} == expected
    assert found["headroom_of_80GB"] > 0.1


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
            assert found.collectives["tensor: all-reduce"]["calls"] == 2 * 4 + 1 + 1  # a norm each, and clipping
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
    (["--parallel.pipeline", "2", "--world-size", "2"],
     "simulate has no pipeline stages yet; set parallel.pipeline 1"),
    (["--world", "2"], "Unrecognized options: --world, 2"),
])
def test_what_cannot_be_is_one_line(arguments, line, capsys):
    assert cli.main(["simulate", "nano", *arguments]) == 1
    assert capsys.readouterr().err == f"nanomai: {line}\n"
