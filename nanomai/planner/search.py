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


def layouts(config: Config, gpus: int, device: Device, recomputes: tuple[str, ...] = ("none", "selective", "full"),
            micros: tuple[int, ...] = (1, 2, 4), keeps: tuple[bool, ...] = (False, True)) -> Iterator[Config]:
    """The configuration under every layout worth a look; what cannot be shared is left to `plan` to refuse."""
    model, length = config.model, config.sequence_length
    divisors = [n for n in range(1, gpus + 1) if gpus % n == 0]
    tensor = [n for n in divisors if n <= device.in_machine and model.n_kv_heads % n == 0]
    context = [(1, "keys"), *((n, by) for n in divisors if 1 < n <= 16 and length // n >= 2048 and not length % (2 * n)
                              for by in ("keys", "heads"))]
    expert = [n for n in divisors if (model.moe.n_experts or 1) % n == 0]
    pipeline = [(1, 1), *((n, v) for n in divisors if 1 < n <= 16 for v in (1, 2) if n * v <= model.n_layers)]
    common = math.gcd(*(tokens // length for _, tokens in config.batches))
    for t, (c, by), e, (p, v) in itertools.product(tensor, context, expert, pipeline):
        ranks = gpus // (t * c * p)
        if gpus % (t * c * p) or common % ranks or ranks % e or length % (t * c):
            continue
        for replicas in sorted({1, max(1, ranks // 64)}):
            if ranks // replicas % e:
                continue
            for recompute, micro, kept in itertools.product(recomputes, micros, keeps):
                if not (kept and p > 1) and micro * ranks <= common:
                    parallel = ParallelConfig(replicas=replicas, tensor=t, context=c, context_by=by, expert=e,
                                              pipeline=p, stages_per_rank=v, keep_gathered=kept, recompute=recompute)
                    yield replace(config, parallel=parallel, train=replace(config.train, micro_batch=micro))


def search(config: Config, gpus: int, gpu: str | Device = "h100",
           assumptions: Assumptions | None = None) -> tuple[list[Plan], dict[str, int]]:
    """The plans that fit, fastest first, and of the others how many failed for what: a field, with an example."""
    device = gpu if isinstance(gpu, Device) else find_device(gpu)
    fitting, failed, examples = [], Counter(), {}
    for candidate in layouts(config, gpus, device):
        try:
            found = plan(candidate, gpus, device, assumptions)
        except ConfigError as error:
            examples.setdefault(error.field, str(error).split(";")[0])
            failed[f"{error.field}: {examples[error.field]}"] += 1
            continue
        if found.fits:
            fitting.append(found)
        else:
            part = max((name for name in found.memory if name not in ("peak", "headroom", "device")),
                       key=found.memory.get)
            failed[f"too little memory: the largest part is {part}"] += 1
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
