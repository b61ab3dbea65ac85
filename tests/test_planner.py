"""The planner: counts that agree with the model's own closed forms, with what autograd keeps, and with each other."""

import dataclasses
import json
import math
import operator
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nanomai
from nanomai.cli import main
from nanomai.config import Config, ModelConfig, ParallelConfig, TrainConfig, factors
from nanomai.config_file import CONFIG_FOLDER, load_config, replace
from nanomai.model import build_model
from nanomai.parts import MLAConfig, MoEConfig
from nanomai.planner import DEVICES, Assumptions, counts, find_device, largest, plan, search
from nanomai.planner.pages import short

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import planner as published

ALONE = dict.fromkeys(("pipeline", "replicas", "fsdp", "context", "expert", "tensor"), 1)
BILLIONS = load_config("llama-3-8b", **{"train.micro_batch": 1, "train.batch_tokens": 2**20,
                                        "parallel.recompute": "full"})
EXPERTS = MoEConfig(n_experts=8, experts_per_token=2, d_expert=192, n_shared_experts=1, n_dense_layers=1)
NAMES = sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))
FAMILIES = {"swiglu": {}, "gelu": {"activation": "gelu"}, "relu2": {"activation": "relu2"},
            "gegelu": {"activation": "gegelu"}, "one norm": {"parallel_block": True}, "experts": {"moe": EXPERTS},
            "biases": {"biases": ("qkv", "out", "mlp")},
            "latents": {"mla": MLAConfig(kv_rank=96, q_rank=80, rope_dim=32, v_dim=64), "n_kv_heads": 4}}


def small(**settings) -> ModelConfig:
    base = {"n_layers": 3, "d_model": 256, "n_heads": 4, "n_kv_heads": 2, "head_dim": 64, "d_ff": 640,
            "vocab_size": 97, "context_length": 1024, "norm": "layernorm", "tied_embeddings": False}
    return ModelConfig(**base | settings)


# --- Counts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_one_rank_has_every_parameter(name):
    model = load_config(name).model
    plain, mixed = counts.blocks_of(model, 1, 0)
    blocks = counts.block_part(model, False) * plain + (counts.block_part(model, True) * mixed if mixed
                                                        else counts.Part())
    assert (blocks + counts.root_part(model, 1, 0, 1)).all == model.n_parameters
    found = plan(dataclasses.replace(load_config(name), parallel=ParallelConfig()))
    assert found.parameters["held"] == found.parameters["total"] == model.n_parameters
    assert found.flops["per_token"] == model.flops_per_token(load_config(name).sequence_length)


@pytest.mark.parametrize("name", ["llama-3-8b", "mai-1-dense", "deepseek-v3", "mixtral-8x7b"])
@pytest.mark.parametrize("ranks, stages_per_rank", [(1, 1), (2, 1), (5, 1), (8, 2), (16, 1)])
def test_stages_share_out_the_layers(name, ranks, stages_per_rank):
    model = load_config(name).model
    parts = [counts.blocks_of(model, ranks, rank, stages_per_rank) for rank in range(ranks)]
    assert sum(map(sum, parts)) == model.n_layers
    assert sum(mixed for _, mixed in parts) == sum(map(model.has_experts, range(model.n_layers)))
    assert max(map(sum, parts)) - min(map(sum, parts)) <= stages_per_rank


@pytest.mark.parametrize("settings", FAMILIES.values(), ids=FAMILIES)
def test_activations_are_what_autograd_keeps(settings):
    """The difference that one more layer makes, without the weights, to 2 %."""
    kept = []
    for layers in (2, 3):
        model = build_model(small(**settings | {"n_layers": layers}))
        model.compute_dtype, seen = torch.bfloat16, {}
        weights = {shape for p in model.parameters() for shape in (p.shape, p.mT.shape if p.ndim > 1 else p.shape)}

        def keep(x, seen=seen, weights=weights):
            if x.shape not in weights:
                seen[x.untyped_storage().data_ptr()] = x  # which keeps the address from being used again
            return x

        ids = torch.arange(1000).view(1, 1000) % 97  # shorter ones leave the flash kernel on a CPU
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(ids, ids)
        kept.append(sum(x.untyped_storage().nbytes() for x in seen.values()))
    config = small(**settings)
    predicted = counts.kept_bytes(config, config.has_experts(2), ALONE, "none")
    latents = 4 * 2 * 176 * bool(config.mla.kv_rank)  # the latents' RMSNorm keeps its result too, but on a CPU alone
    assert predicted + latents / 2 == pytest.approx((kept[1] - kept[0]) / 1000, rel=0.02)


def test_recomputing_keeps_less():
    for name in ("llama-3-8b", "deepseek-v3", "mai-1-moe", "gpt2-124m"):
        model = load_config(name).model
        kept = [counts.kept_bytes(model, model.moe.n_experts > 0, ALONE, what)
                for what in ("none", "selective", "full")]
        assert kept == sorted(kept, reverse=True) and kept[2] == 2 * model.d_model


def test_flops_of_recomputing():
    model, length = BILLIONS.model, 8192
    none, full = (counts.flops_of(model, length, what) for what in ("none", "full"))
    assert none["blocks"] + none["head"] + 3 / 3.5 * none["attention"] == model.flops_per_token(length)
    a_forward_less_the_last_product = 2 * (model.layer_parameters(True) - model.n_layers * model.d_model * model.d_ff)
    assert full["blocks"] - none["blocks"] == a_forward_less_the_last_product
    assert full["attention"] / none["attention"] == pytest.approx(4.5 / 3.5)


def test_flops_of_sharing_keys():
    """Nothing more, but where a mask is a matrix half a piece's end, and of latents the keys of all ranks."""
    assert counts.flops_of(BILLIONS.model, 8192, "full", 4) == counts.flops_of(BILLIONS.model, 8192, "full")
    model = load_config("deepseek-v3-128k").model
    alone, shared = (counts.flops_of(model, 131_072, "none", ranks) for ranks in (0, 16))
    assert shared["attention"] / alone["attention"] == pytest.approx(33 / 32) and shared["head"] == alone["head"]
    assert shared["blocks"] - alone["blocks"] == 6 * 61 * 15 * 512 * 128 * (128 + 128)


# --- Memory -----------------------------------------------------------------------------------------------------------


def memory(gpus: int, config: Config = BILLIONS, **parallel) -> dict[str, float]:
    changed = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, **parallel))
    return plan(changed, gpus).memory


def test_memory_by_small_arithmetic():
    """Llama 3 8B on 64 ranks, one sequence of 8,192 each: what anyone can multiply."""
    found, n, d, v = memory(64), 8_030_261_248, 4096, 128_256
    one = plan(replace(BILLIONS, **{"train.batch_tokens": 2**19}), 64).memory
    assert one["weights"] == 4 * n / 64 and one["optimizer"] == 8 * n / 64
    assert one["activations"] == 32 * 8192 * d * 2
    block = (n - 2 * v * d - d) / 32
    assert one["gathered"] == pytest.approx(2 * (2 * v * d + d) + 2 * block)
    assert one["logits"] == 4 * v * d + 6 * v * d + 8 * 8192 * d
    assert found["gradients"] == 4 * n / 64 # of the first of two micro-batches
    assert memory(64, keep_gathered=True)["gradients"] == 4 * n
    assert one["peak"] == sum(value for part, value in one.items() if part not in ("peak", "headroom", "device"))
    assert one["headroom"] == 80e9 - one["peak"]


def test_more_ranks_hold_less_each():
    peaks = [memory(gpus)["peak"] for gpus in (8, 16, 32, 64)]
    assert peaks == sorted(peaks, reverse=True)
    for axis in ("tensor", "context"):
        states = [memory(64, **{axis: n})["activations"] for n in (1, 2, 4, 8)]
        assert states == sorted(states, reverse=True) and states[0] > states[-1]
    assert memory(64, tensor=8)["weights"] == pytest.approx(memory(64)["weights"], rel=1e-3)  # but for the norms
    assert memory(64, keep_gathered=True)["gathered"] > memory(64)["gathered"]
    recomputed = [memory(64, recompute=what)["peak"] for what in ("none", "selective", "full")]
    assert recomputed == sorted(recomputed, reverse=True)


def test_ranks_that_share_heads_keep_fewer_keys():
    keys, heads = (memory(64, context=4, context_by=by, recompute="none")["activations"] for by in ("keys", "heads"))
    assert keys - heads == 32 * 8192 / 4 * 2 * (2 * 8 * 128) * 3  # a rank has 8 heads of keys, or two
    more = (memory(64, context=16, context_by=by, recompute="none")["activations"] for by in ("keys", "heads"))
    assert -operator.sub(*more) == -32 * 8192 / 16 * 2 * (2 * 8 * 128) * (16 - 2)  # one, with another rank


def test_experts_are_shared_by_both_their_axes():
    config = load_config("mixtral-8x7b", **{"train.micro_batch": 1, "parallel.recompute": "full",
                                            "train.batch_tokens": 64 * 32768, "train.sequence_length": 32768})
    alone, shared = memory(64, config), memory(64, config, expert=8)
    assert alone["weights"] == shared["weights"] == 4 * config.model.n_parameters / 64
    assert shared["peak"] < alone["peak"]  # fewer are gathered


def test_muon_keeps_one_number_where_adamw_keeps_two():
    adamw, muon = (memory(64, replace(BILLIONS, **{"optim.name": name}))["optimizer"] for name in ("adamw", "muon"))
    blocks = BILLIONS.model.layer_parameters(False)
    assert adamw - muon == pytest.approx(4 * blocks / 64)


# --- Traffic and time -------------------------------------------------------------------------------------------------


def traffic(gpus: int, **parallel) -> dict[str, float]:
    config = dataclasses.replace(BILLIONS, parallel=dataclasses.replace(BILLIONS.parallel, **parallel))
    sizes = factors(config.parallel, gpus)
    return counts.traffic_of(config, sizes, 1, 2, 0)


def test_traffic_by_small_arithmetic():
    n, root, row = 8_030_261_248, 2 * 128_256 * 4096 + 4096, 8192 * 4096 * 2
    sent = traffic(64)
    blocks_twice, root_once, gradients = 2 * 2 * (n - root), 2 * root, 4 * n
    assert sent["fsdp"] == pytest.approx(63 / 64 * 2 * (blocks_twice + root_once + gradients))
    assert {axis for axis, size in sent.items() if size} == {"fsdp"}
    assert traffic(64, tensor=8)["tensor"] == pytest.approx(7 / 8 * 2 * row * (32 * 11 + 2))
    keys = 8192 * 2 * 8 * 128 * 2  # of a layer, as bfloat16
    assert traffic(64, context=4)["context"] == pytest.approx(3 / 4 * 2 * keys * 32 * 3)
    assert traffic(64, replicas=4)["replicas"] == pytest.approx(2 * 3 / 4 * 4 * n / 16)
    assert traffic(64, keep_gathered=True)["fsdp"] < sent["fsdp"]


def test_an_all_to_all_over_machines_shares_no_way():
    """16 ranks are two machines. Eight neighbours in a ring share their ways out; in an all-to-all each has its own."""
    config = replace(BILLIONS, **{"train.batch_tokens": 2**19})
    h100, waited = find_device("h100"), {}
    for by in ("keys", "heads"):
        found = plan(replace(config, **{"parallel.context": 16, "parallel.context_by": by}), 64)
        waited[by] = found.communication["context"] / found.time["context"]
    assert waited["heads"] == pytest.approx(0.27 * h100.network)
    assert waited["keys"] == pytest.approx(min(0.95 * h100.links, 8 * 0.27 * h100.network))


def test_time_adds_up_and_units_are_seconds():
    found = plan(replace(BILLIONS, **{"parallel.tensor": 2}), 64)
    time, speed, run = found.time, found.speed, found.run
    assert time["step"] == pytest.approx(sum(s for part, s in time.items() if part not in ("step", "hidden")))
    computed = found.flops["computed_per_token"] * 2**20 / 64
    arithmetic = time["products"] * 989.4e12 * 0.58 + time["attention"] * 989.4e12 * 0.21
    assert arithmetic == pytest.approx(computed, rel=1e-3)
    assert speed["mfu"] == pytest.approx(found.flops["per_step"] / time["step"] / 64 / 989.4e12)
    assert run["gpu_hours"] == pytest.approx(run["tokens"] / speed["tokens_per_second"] * 64 / 3600 / 0.9)
    assert run["dollars"] == pytest.approx(run["gpu_hours"] * 2.5)
    assert run["days"] * 24 * 64 == pytest.approx(run["gpu_hours"])
    assert run["kwh"] == pytest.approx(run["gpu_hours"] * 0.7 * 1.5 * 1.2)
    assert run["co2_kg"] == pytest.approx(0.4 * run["kwh"])


def test_a_pipeline_waits_less_with_more_stages_or_micro_batches():
    def bubble(tokens: int, stages_per_rank: int) -> float:
        config = replace(BILLIONS, **{"train.batch_tokens": tokens, "parallel.pipeline": 4,
                                      "parallel.stages_per_rank": stages_per_rank})
        time = plan(config, 8).time
        return time["bubble"] / sum(time[part] for part in ("products", "attention", "traffic"))

    assert bubble(2**20, 1) == pytest.approx(3 / 64)
    assert bubble(2**21, 1) == pytest.approx(3 / 128) and bubble(2**20, 2) == pytest.approx(3 / 128)


def test_batches_that_grow_are_summed_over_the_run():
    config = replace(BILLIONS, **{"train.batch_tokens": {0: 2**19, 10: 2**20}, "train.steps": 30})
    apart = [replace(BILLIONS, **{"train.batch_tokens": 2**k, "train.steps": n}) for k, n in ((19, 10), (20, 20))]
    whole, parts = plan(config, 64).run, [plan(c, 64).run for c in apart]
    for name in whole:
        assert whole[name] == pytest.approx(sum(part[name] for part in parts)), name


# --- Whole plans ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_can_be_planned_and_told(name, capsys):
    sizes = math.prod(getattr(load_config(name).parallel, axis) for axis in ("tensor", "pipeline", "context"))
    assert main(["plan", name, "--gpus", str(sizes), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {field.name for field in dataclasses.fields(nanomai.Plan)}
    numbers = [n for part in found.values() if isinstance(part, dict) for n in part.values() if not isinstance(n, str)]
    assert all(math.isfinite(n) for n in numbers) and found["time"]["step"] > 0 and found["run"]["dollars"] > 0
    assert {field.name for field in dataclasses.fields(Assumptions)} < found["assumptions"].keys()
    assert main(["plan", name, "--gpus", str(sizes)]) == 0
    page = capsys.readouterr().out
    assert all(f"  {name} " in page for name in found["assumptions"] if name != "device_name")


@pytest.mark.parametrize("name", ["mai-1-dense", "mai-1-moe"])
@pytest.mark.parametrize("gpus", [1024, 4096])
def test_500b_fits_with_a_tenth_to_spare(name, gpus):
    found = plan(load_config(name), gpus)
    assert found.fits and found.memory["headroom"] >= 8e9 and 0.15 < found.speed["mfu"] < 0.5


@pytest.mark.parametrize("command, said", [
    ("plan nano --gpu h10", "no gpu 'h10' in the table; did you mean 'h100'?"),
    ("plan nano --gpu abacus", "there are a100-40, a100, h100"),
    ("plan nano --gpus 0", "gpus 0 must be at least 1"),
    ("plan nano --gpus -4", "gpus -4 must be at least 1"),
    ("plan nano --price -1", "price -1.0 must not be negative"),
    ("plan nano --gpus 3", "a batch of 16 sequences cannot be shared by 3 ranks"),
    ("plan nano --gpus 4 --parallel.tensor 8", "parallel tensor 8 divides no 4 ranks"),
    ("plan llama-3-8b --gpus 16 --parallel.tensor 16", "parallel tensor 16 cannot share n_kv_heads 8"),
    ("plan llama-3-8b --gpus 8 --parallel.expert 8", "parallel expert 8 needs a model with experts"),
    ("plan gpt2-124m --gpus 4 --parallel.pipeline 4", "parallel pipeline needs model.tied_embeddings false"),
    ("plan nano --parallel.tensr 2", "did you mean --parallel.tensor?"),
    ("plan nano --largest", "leave out 'nano'")])
def test_mistakes_are_one_line(command, said, capsys):
    assert main(command.split()) == 1
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1


def test_search_finds_layouts_that_plan_agrees_with():
    fitting, failed = search(BILLIONS, 8)
    assert fitting and failed and all(found.fits for found in fitting)
    days = [found.run["days"] for found in fitting]
    assert days == sorted(days)
    sizes = {name: n for name, n in fitting[0].layout.items() if name in ParallelConfig.__dataclass_fields__}
    again = dataclasses.replace(BILLIONS, parallel=ParallelConfig(**sizes), train=dataclasses.replace(
        BILLIONS.train, micro_batch=fitting[0].batch["micro_batch"]))
    assert plan(again, 8) == fitting[0]
    assert {found.layout["context_by"] for found in fitting if found.layout["context"] > 1} == {"keys", "heads"}


def test_search_says_how_sequences_are_shared(capsys):
    assert main("plan llama-3.1-405b --gpus 16384 --search".split()) == 0
    page = capsys.readouterr().out
    assert "x context 16 by keys x" in page and "x context 16 by heads x" in page


def test_search_leaves_out_what_cuts_no_sequence():
    """8,192 tokens make no 6 pieces."""
    found, _ = search(BILLIONS, 6)
    assert {plan.layout["context"] for plan in found} == {1, 2}


def test_the_largest_model_grows_with_the_machine(capsys):
    configs = [load_config(name) for name in ("nano", "gpt2-large", "llama-2-7b", "llama-2-70b")]
    found = [largest(gpus, gpu, configs) for gpus, gpu in ((1, "rtx4090"), (1, "h100"), (8, "a100"), (64, "h200"))]
    for which in (0, 1):
        sizes = [pair[which].parameters["total"] for pair in found]
        assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
        assert all(pair[which].fits for pair in found)
    assert main("plan --largest --gpu rtx4090".split()) == 0
    assert "of scale_configs/" in capsys.readouterr().out


def test_this_machine_is_measured():
    device = find_device("cpu")
    assert device.peak > 1e8 and device.bandwidth > 1e8 and device.memory > 2**28
    assert plan(load_config("nano"), gpu=device).fits


def test_a_price_of_ones_own(capsys):
    dollars = []
    for price in ("1", "3"):
        assert main(f"plan gpt2-124m --gpus 8 --price {price} --json".split()) == 0
        dollars.append(json.loads(capsys.readouterr().out)["run"]["dollars"])
    assert dollars[1] == pytest.approx(3 * dollars[0])


@pytest.mark.parametrize("number, text", [(7, "7"), (12_288, "12.3 K"), (2.5e6, "2.5 M"), (1.5e13, "15 T")])
def test_numbers_in_three_digits(number, text):
    assert short(number) == text


# --- Published runs ---------------------------------------------------------------------------------------------------


def test_published_speeds_are_predicted_within_15_percent():
    """Mean error of the fitted runs, of the same left out, and of those held out; the table is this code's."""
    committed = json.loads((published.RESULTS / "planner.json").read_text())
    constants = published.in_the_code()
    for name, rows in (("fitted", published.FITTED), ("held_out", published.HELD_OUT)):
        now = published.table(rows, constants)
        assert [row["error"] for row in committed[name]] == [row["error"] for row in now]
        assert statistics.fmean(abs(row["error"]) for row in now) <= 0.15
    assert statistics.fmean(abs(row["left_out"]) for row in committed["fitted"]) <= 0.15
    assert constants == pytest.approx(committed["fit"], rel=0.02)
    assert (published.RESULTS / "planner.md").read_text() == published.page(committed)


def test_devices_are_plausible():
    for name, device in DEVICES.items():
        assert 1e13 < device.peak < 1e16 and 1e10 < device.memory < 1e12 and device.bandwidth > device.links, name
        assert device.network <= device.links and device.watts > 100 and device.price > 0, name


def test_a_plan_is_made_within_a_second():
    import time
    start = time.perf_counter()
    plan(load_config("mai-1-moe"), 4096)
    assert time.perf_counter() - start < 1


def test_batches_share_their_micro_batch_rule():
    config = Config(train=TrainConfig(batch_tokens={0: 8192, 5: 16384}, sequence_length=256, steps=8))
    assert config.batches == [(5, 8192), (3, 16384)]
    assert config.micro_batch(2) == 16 and dataclasses.replace(
        config, train=dataclasses.replace(config.train, micro_batch=3)).micro_batch(2) == 3


def test_planning_needs_no_torch():
    """Whose import alone would take longer than a plan."""
    code = "import sys; from nanomai.planner import plan; from nanomai.config_file import load_config; "
    code += "plan(load_config('mai-1-dense'), 1024); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
