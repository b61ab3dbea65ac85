"""Which layout is best, and how large a model can be."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from nanomai.config import Config, ConfigError, ModelConfig, ParallelConfig, TrainConfig
from nanomai.planner.devices import Device, find_device
from nanomai.planner.plan import Assumptions, Plan, plan

STAGES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 16)


def layouts(config: Config, gpus: int, device: Device, recomputes: tuple[str, ...] = ("none", "selective", "full"),
            micros: tuple[int, ...] = (1, 2, 4), keeps: tuple[bool, ...] = (False, True)) -> Iterator[Config]:
    """The configuration under every layout worth a look; what cannot be shared is refused by `plan`."""
    model, in_machine = config.model, device.in_machine
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    tensor = [n for n in divisors if n <= in_machine and model.n_kv_heads % n == 0]
    context = [n for n in divisors if n == 1 or (n <= 16 and config.sequence_length // n >= 4096)]
    expert = [n for n in divisors if (model.moe.n_experts or 1) % n == 0]
    stages = [n for n in STAGES if gpus % n == 0 and n <= model.n_layers]
    share = min(tokens for _, tokens in config.batches) // config.sequence_length
    for t, c, e, p in itertools.product(tensor, context, expert, stages):
        ranks = gpus // (t * c * p)
        if gpus % (t * c * p) or ranks % e or share % ranks:
            continue
        for replicas in {1, max(1, ranks // 64)}:
            if ranks % replicas or ranks // replicas % e:
                continue
            for recompute, micro, kept in itertools.product(recomputes, micros, keeps):
                if micro * ranks <= share and not (kept and p > 1):
                    yield replace(config, parallel=ParallelConfig(replicas, "auto", t, c, e, p, kept, recompute),
                                  train=replace(config.train, micro_batch=micro))


def search(config: Config, gpus: int, gpu: str | Device = "h100",
           assumptions: Assumptions | None = None) -> tuple[list[Plan], dict[str, int]]:
    """The plans that fit, fastest first, and of the others how many failed for what."""
    device = gpu if isinstance(gpu, Device) else find_device(gpu)
    fitting, failed = [], Counter()
    for candidate in layouts(config, gpus, device):
        try:
            found = plan(candidate, gpus, device, assumptions)
        except ConfigError as error:
            failed[str(error).split(";")[0]] += 1
            continue
        if found.fits:
            fitting.append(found)
        else:
            memory = found.memory
            part = max((name for name in memory if name not in ("peak", "headroom", "device")), key=memory.get)
            failed[f"too little memory, most of it {part}"] += 1
    return sorted(fitting, key=lambda found: found.run["days"]), dict(failed.most_common())


def largest(gpus: int, gpu: str | Device = "h100", configs: Iterable[Config] = (),
            assumptions: Assumptions | None = None) -> tuple[Plan | None, Plan]:
    """Of `configs` the largest that can be trained there, and the largest of a plain shape: `plain(layers)`."""
    device = gpu if isinstance(gpu, Device) else find_device(gpu)

    def fits(config: Config) -> Plan | None:
        """One sequence at a time and full recomputation: what takes least."""
        for candidate in layouts(config, gpus, device, recomputes=("full",), micros=(1,), keeps=(False,)):
            with contextlib.suppress(ConfigError):
                if (found := plan(candidate, gpus, device, assumptions)).fits:
                    return found
        return None

    named = sorted(configs, key=lambda config: config.model.n_parameters, reverse=True)
    good, bad = 0, 1
    while fits(plain(bad, gpus)):
        good, bad = bad, 2 * bad
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(plain(middle, gpus)) else (good, middle)
    if not good:
        raise ConfigError(f"{gpus} x {device.name} hold not even one layer of the plain shape")
    return next(filter(None, map(fits, named)), None), fits(plain(good, gpus))


def plain(layers: int, gpus: int) -> Config:
    """A Llama-like model, 128 times as wide as deep, of 4,096 tokens, in batches of 4 sequences a GPU."""
    d = 128 * layers
    model = ModelConfig(n_layers=layers, d_model=d, n_heads=layers, n_kv_heads=math.gcd(layers, 8), head_dim=128,
                        d_ff=128 * math.ceil(8 * d / 3 / 128), vocab_size=32_768, context_length=4096,
                        tied_embeddings=False)
    return Config(f"plain shape of {layers} layers", model, train=TrainConfig(batch_tokens=gpus * 4 * 4096))
