"""From what a rank holds, sends and computes to days and dollars."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace

from nanomai.config import Config, ConfigError, factors
from nanomai.parallel import limits
from nanomai.planner import counts
from nanomai.planner.devices import Device, find_device


@dataclass(frozen=True)
class Assumptions:
    """What closed forms cannot know."""

    products: float = 0.58
    """Of the peak, what matrix products reach; this and the next four are fitted on published runs."""
    attention: float = 0.21
    """Of the peak, what attention reaches, counted causally."""
    traffic: float = 0.30
    """Of the memory's bandwidth, what norms, gates, residuals and the optimizer reach."""
    links: float = 0.95
    """Of the links inside a machine."""
    network: float = 0.27
    """Of the network between machines."""
    waiting: float = 0.01
    """Of a step, what each doubling of the number of machines adds in waiting for the slowest."""
    imbalance: float = 1.1
    """Tokens of the rank with the busiest experts, over the mean."""
    headroom: float = 0.10
    """Of the memory, what is left to the allocator, the driver and the buffers of collectives."""
    goodput: float = 0.90
    """Of the days paid for, the share spent in steps that count; the rest is failures, restarts and evaluations."""
    server: float = 1.5
    """Watts of the whole machine over those of its accelerators."""
    building: float = 1.2
    """Watts of the building over those of its machines (PUE)."""
    carbon: float = 0.4
    """Kilograms of CO2 for a kWh."""


@dataclass(frozen=True)
class Plan:
    """A run on paper. Bytes, seconds and FLOPs are of one device unless their name says otherwise."""

    name: str
    gpu: str
    gpus: int
    layout: dict[str, int | str | bool]
    batch: dict[str, int]
    parameters: dict[str, float]
    flops: dict[str, float]
    memory: dict[str, float]
    fits: bool
    communication: dict[str, float]
    time: dict[str, float]
    speed: dict[str, float]
    run: dict[str, float]
    assumptions: dict[str, float]


OVERLAPPED = ("fsdp", "fsdp of experts", "replicas", "pipeline")
"""Traffic that runs beside arithmetic; that of the other axes is waited for, layer by layer."""


def plan(config: Config, gpus: int = 1, gpu: str | Device = "h100", assumptions: Assumptions | None = None) -> Plan:
    """What `config` takes on `gpus` devices of a kind, laid out as `config.parallel` says; ConfigError if it cannot."""
    device, a = gpu if isinstance(gpu, Device) else find_device(gpu), assumptions or Assumptions()
    if gpus < 1:
        raise ConfigError(f"gpus {gpus} must be at least 1")
    sizes = factors(config.parallel, gpus)
    ranks = sizes["replicas"] * sizes["fsdp"]
    limits.check(config.model, config.parallel, sizes)
    check_batches(config, ranks)
    micro, length = config.micro_batch(ranks), config.sequence_length
    steps = [(n, tokens, math.ceil(tokens / length / ranks / micro)) for n, tokens in config.batches]
    times = [step_time(config, sizes, device, a, micro, count) for _, _, count in steps]
    main = max(range(len(steps)), key=lambda i: steps[i][0] * steps[i][1])  # where most of the tokens are read
    memory = _memory(config, sizes, device, a, micro, max(count for _, _, count in steps))
    traffic, held = _traffic(config, sizes, micro, steps[main][2])
    model, flops = config.model, _flops(config, sizes)
    seconds, tokens = times[main]["step"], steps[main][1]
    computed = flops["blocks"] + flops["head"] + flops["attention"]
    return Plan(
        name=config.name, gpu=device.name, gpus=gpus,
        layout=sizes | {name: getattr(config.parallel, name)
                        for name in ("stages_per_rank", "recompute", "keep_gathered", "context_by")},
        batch={"tokens": tokens, "sequence_length": length, "micro_batch": micro, "micro_batches": steps[main][2]},
        parameters={"total": model.n_parameters, "active": model.n_active_parameters, "held": held},
        flops={"per_token": flops["wanted"], "computed_per_token": computed, "per_step": flops["wanted"] * tokens},
        memory=memory, fits=memory["headroom"] >= a.headroom * device.memory, communication=traffic, time=times[main],
        speed={"tokens_per_second": tokens / seconds, "tokens_per_second_per_gpu": tokens / seconds / gpus,
               "mfu": flops["wanted"] * tokens / seconds / gpus / device.peak},
        run=_run(gpus, device, a, flops["wanted"], [(n, t, time["step"]) for (n, t, _), time in
                                                    zip(steps, times, strict=True)]),
        assumptions=asdict(a) | {f"device_{f.name}": getattr(device, f.name) for f in fields(device)}
        | ({"train.float8": "not counted"} if config.train.float8 else {}))


def check_batches(config: Config, ranks: int) -> None:
    """ConfigError unless every batch of the run can be cut for so many ranks, and for a pipeline."""
    for samples in (tokens // config.sequence_length for _, tokens in config.batches):
        if samples % ranks:
            best = max(n for n in range(1, min(samples, ranks) + 1) if samples % n == 0)
            raise ConfigError(f"a batch of {samples} sequences cannot be shared by {ranks} ranks (replicas x fsdp); "
                              f"the nearest number below is {best}: give more to another axis, or change "
                              "train.batch_tokens", "parallel.fsdp")
        train = replace(config.train, micro_batch=config.micro_batch(ranks))
        limits.check_batch(replace(config, train=train), samples // ranks)


def _stages(config: Config, sizes: dict[str, int]) -> set[int]:
    """The first has the embeddings and most in flight, the last the head; of others the first with as many layers."""
    p, v = sizes["pipeline"], config.parallel.stages_per_rank
    return {0, p - 1, *{counts.blocks_of(config.model, p, s, v): s for s in reversed(range(1, p - 1))}.values()}


def _memory(config: Config, sizes: dict[str, int], device: Device, a: Assumptions, micro: int, count: int) -> dict:
    parts = max((counts.memory_of(config, sizes, micro, count, stage) for stage in _stages(config, sizes)),
                key=lambda p: sum(p.values()))
    peak = sum(parts.values())
    return parts | {"peak": peak, "headroom": device.memory - peak, "device": device.memory}


def _traffic(config: Config, sizes: dict[str, int], micro: int, count: int) -> tuple[dict[str, float], float]:
    """Of the stage that sends most; and the parameters that a rank of the first one holds."""
    each = [counts.traffic_of(config, sizes, micro, count, stage) for stage in _stages(config, sizes)]
    return max(each, key=lambda t: sum(t.values())), counts.held_by(config, sizes, 0).share


def _flops(config: Config, s: dict[str, int]) -> dict[str, float]:
    p = config.parallel
    return counts.flops_of(config.model, config.sequence_length, p.recompute, s["context"] * (p.context_by == "keys"))


def _rates(s: dict[str, int], device: Device, a: Assumptions, by: str) -> dict[str, float]:
    """Bytes a second that one rank sends along each axis.

    A ring over several machines enters each of them once, so its neighbours there share their ways to the network. In
    an all-to-all every rank sends to every other, and nothing passes through.
    """
    strides = {"tensor": 1, "expert": s["tensor"], "context": s["tensor"] * s["expert"], "fsdp": s["tensor"],
               "fsdp of experts": s["tensor"] * s["expert"]}
    ranks = s | {"fsdp": s["fsdp"] * s["context"], "fsdp of experts": s["fsdp"] * s["context"] // s["expert"]}
    links, network = device.links * a.links, device.network * a.network
    rates = dict.fromkeys(("replicas", "pipeline"), network)
    if math.prod(s.values()) // s["expert"] <= device.in_machine:
        return dict.fromkeys((*rates, *strides), links)
    for axis, stride in strides.items():
        neighbours = max(1, min(ranks[axis], device.in_machine // stride))
        shared = 1 if axis == "expert" or (axis, by) == ("context", "heads") else neighbours
        rates[axis] = links if ranks[axis] <= neighbours else min(links, network * shared)
    return rates


def step_time(config: Config, s: dict[str, int], device: Device, a: Assumptions, micro: int,
              count: int) -> dict[str, float]:
    """Seconds of one optimizer step by part, on the slowest stage."""
    return max((_stage_time(config, s, device, a, micro, count, stage) for stage in _stages(config, s)),
               key=lambda time: time["step"])


def _stage_time(config: Config, s: dict[str, int], device: Device, a: Assumptions, micro: int, count: int,
                stage: int) -> dict[str, float]:
    model, length = config.model, config.sequence_length
    flops = _flops(config, s)
    layers = sum(counts.blocks_of(model, s["pipeline"], stage, config.parallel.stages_per_rank)) / model.n_layers
    is_last = stage == s["pipeline"] - 1
    tokens = micro * count * length / s["context"] / s["tensor"]
    uneven = 1 + (a.imbalance - 1) * counts.routed_share(model)
    products = (flops["blocks"] * layers * uneven + flops["head"] * is_last) * tokens
    swept, at_head = counts.swept_bytes(model, config.parallel.recompute)
    traffic = counts.traffic_of(config, s, micro, count, stage)
    rates = _rates(s, device, a, config.parallel.context_by)
    sending = {axis: sent / rates[axis] for axis, sent in traffic.items()}
    sending["expert"] *= a.imbalance
    peak = device.peak * device.reach
    time = {"products": products / peak / a.products,
            "attention": flops["attention"] * layers * tokens / peak / a.attention,
            "traffic": (swept * layers + at_head * is_last) * tokens / device.bandwidth / a.traffic,
            **{axis: seconds for axis, seconds in sending.items() if axis not in OVERLAPPED}}
    busy = sum(time.values())
    beside = sum(sending[axis] for axis in OVERLAPPED)
    time["bubble"] = busy * (s["pipeline"] - 1) / config.parallel.stages_per_rank / count
    time["exposed"] = max(0.0, beside - busy)
    held = counts.held_by(config, s, stage).share
    time["optimizer"] = 28 * held / device.bandwidth / a.traffic  # reads weight, gradient, two moments; writes three
    machines = max(1.0, math.prod(s.values()) / s["expert"] / device.in_machine)
    time["waiting"] = sum(time.values()) * a.waiting * math.log2(machines)
    return time | {"step": sum(time.values()), "hidden": beside - time["exposed"]}


def _run(gpus: int, device: Device, a: Assumptions, flops: float, steps: list[tuple[int, int, float]]) -> dict:
    """The whole run: steps of (how many, tokens, seconds)."""
    tokens = sum(n * t for n, t, _ in steps)
    hours = sum(n * seconds for n, _, seconds in steps) / 3600 / a.goodput
    kwh = gpus * hours * device.watts * a.server * a.building / 1000
    return {"tokens": tokens, "flops": flops * tokens, "days": hours / 24, "gpu_hours": gpus * hours,
            "dollars": gpus * hours * device.price, "kwh": kwh, "co2_kg": kwh * a.carbon}
