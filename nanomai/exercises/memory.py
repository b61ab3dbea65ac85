"""Checks of `notebooks/12_memory_and_checkpointing`."""

import math
from dataclasses import replace

from nanomai.config import ModelConfig
from nanomai.planner import counts
from nanomai.show import exercise

ALONE = dict.fromkeys(("pipeline", "replicas", "fsdp", "context", "expert", "tensor"), 1)


@exercise
def check_best_segments(answer):
    """`answer(n_layers, kept)`: into how many segments to cut, where a layer keeps `kept` times a segment's input."""
    for n_layers, kept in [(16, 1), (36, 1), (7, 1), (120, 22.5), (24, 9), (12, 40), (96, 0.05), (1, 3), (10, 2.5)]:
        def peak(k, n_layers=n_layers, kept=kept):
            return k + kept * math.ceil(n_layers / k)  # the inputs of all, and all of the longest

        least = min(range(1, n_layers + 1), key=peak)
        got, case = answer(n_layers, kept), f"{n_layers} layers that keep {kept} inputs each"
        assert isinstance(got, int), f"{case}: return a whole number of segments, not {got!r}"
        assert 1 <= got <= n_layers, f"{case}: {got} segments cannot be made"
        held = f"{got} segments hold {peak(got):g}, {least} hold {peak(least):g}"
        assert peak(got) <= peak(least) + 1e-9, f"{case}: {held}"


@exercise
def check_largest_batch(answer):
    """`answer(model, recompute, memory)`: sequences of the full context that fit beside the states on one device."""
    small = ModelConfig(n_layers=12, d_model=768, n_heads=12, n_kv_heads=4, head_dim=64, d_ff=2048, vocab_size=50304,
                        context_length=1024)
    deep = replace(small, n_layers=40, context_length=4096)
    wide = replace(small, d_model=1536, n_heads=24, d_ff=6000, norm="layernorm", activation="gelu")
    for name, model in (("the small model", small), ("the deep one", deep), ("the wide one", wide)):
        for what in ("none", "selective", "full"):
            kept, all_of_it = (counts.kept_bytes(model, False, ALONE, x) for x in (what, "none"))

            def needs(n, model=model, kept=kept, all_of_it=all_of_it):
                tokens = n * model.context_length
                return 16 * model.n_parameters + tokens * (model.n_layers * kept + all_of_it - kept)

            for memory in (80e9, 8e9, needs(3), needs(3) - 1, 16 * model.n_parameters - 1):
                got, case = answer(model, what, memory), f"{name}, recompute {what}, {memory / 1e9:.3f} GB"
                assert isinstance(got, int) and got >= 0, f"{case}: return a count from 0 on, not {got!r}"
                assert got == 0 or needs(got) <= memory, f"{case}: {got} sequences need {needs(got) / 1e9:.3f} GB"
                assert needs(got + 1) > memory, f"{case}: one more than {got} would fit"


@exercise
def check_bytes_saved(answer):
    """`answer(shapes)`: bytes that moments of 8 bits save, with a float32 scale for each 256 numbers of a tensor."""
    for shapes in [[(256, 16)], [(4096,)], [(4095,)], [(100, 100)], [(64, 64), (64,), (1000, 7)], [(3, 50, 40)],
                   [(50304, 768), (768,), (2048, 768), (768, 2048)]]:
        true = 0
        for shape in shapes:
            n = math.prod(shape)
            true += 8 * n - 2 * (n + 4 * math.ceil(n / 256)) if n >= 4096 else 0
        got = answer(list(shapes))
        assert got == true, f"tensors of shape {shapes}: {true:,} bytes saved, not {got:,}"
