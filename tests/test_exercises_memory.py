"""The checks of `notebooks/12_memory_and_checkpointing` take its own solutions, and reject what a learner may well
write instead."""

import math

from exercise_checks import exercise_tests, printed_solutions

from nanomai.config_file import load_config
from nanomai.exercises import memory as checks
from nanomai.exercises.memory import ALONE
from nanomai.planner import counts

SOLVED = printed_solutions("12_memory_and_checkpointing", math=math, counts=counts, alone=ALONE)


def segments_by_the_root_of_the_depth(n_layers, kept):
    return round(math.sqrt(n_layers))


def segments_by_the_root_rounded(n_layers, kept):
    return max(1, round(math.sqrt(n_layers * kept)))


def segments_with_even_parts_only(n_layers, kept):
    return min((k for k in range(1, n_layers + 1) if n_layers % k == 0), key=lambda k: k + kept * n_layers / k)


def segments_of_fractions_of_layers(n_layers, kept):
    return min(range(1, n_layers + 1), key=lambda k: k + kept * n_layers / k)


def segments_one_for_each_layer(n_layers, kept):
    return n_layers


def segments_as_a_float(n_layers, kept):
    return math.sqrt(n_layers * kept)


def batch(model, recompute, memory, states=16, again=True, layers=True, rounding=int, floor=0):
    kept = counts.kept_bytes(model, False, ALONE, recompute)
    token = kept * (model.n_layers if layers else 1)
    token += again * (counts.kept_bytes(model, False, ALONE, "none") - kept)
    return max(floor, rounding((memory - states * model.n_parameters) / (token * model.context_length)))


def batch_beside_the_weights_alone(*case):
    return batch(*case, states=4)


def batch_that_makes_nothing_again(*case):
    return batch(*case, again=False)


def batch_of_one_layer(*case):
    return batch(*case, layers=False)


def batch_rounded_up(*case):
    return batch(*case, rounding=math.ceil)


def batch_below_zero(*case):
    return batch(*case, rounding=math.floor, floor=-math.inf)


def saved(shapes, moments=2, scale=4, least=4096, blocks=math.ceil, after=1):
    sizes = [math.prod(shape) for shape in shapes]
    return sum(moments * ((4 - after) * n - scale * blocks(n / 256)) for n in sizes if n >= least)


def saved_of_one_moment(shapes):
    return saved(shapes, moments=1)


def saved_without_scales(shapes):
    return saved(shapes, scale=0)


def saved_of_small_tensors_too(shapes):
    return saved(shapes, least=0)


def saved_without_the_last_block(shapes):
    return saved(shapes, blocks=math.floor)


def saved_all_that_was_there(shapes):
    return saved(shapes, after=0)


def saved_with_all_tensors_in_a_row(shapes):
    return saved([(sum(math.prod(shape) for shape in shapes),)])


WRONG = {
    "best_segments": [(segments_by_the_root_of_the_depth, "120 layers"),
                      (segments_by_the_root_rounded, "segments hold"),
                      (segments_with_even_parts_only, "7 layers"),
                      (segments_of_fractions_of_layers, "segments hold"),
                      (segments_one_for_each_layer, "16 layers"),
                      (segments_as_a_float, "whole number")],
    "largest_batch": [(batch_beside_the_weights_alone, "sequences need"),
                      (batch_that_makes_nothing_again, "recompute selective"),
                      (batch_of_one_layer, "sequences need"),
                      (batch_rounded_up, "sequences need"),
                      (batch_below_zero, "a count from 0 on")],
    "bytes_saved": [(saved_of_one_moment, "24,448 bytes saved"),
                    (saved_without_scales, "24,448 bytes saved"),
                    (saved_of_small_tensors_too, "[(4095,)]"),
                    (saved_without_the_last_block, "[(100, 100)]"),
                    (saved_all_that_was_there, "24,448 bytes saved"),
                    (saved_with_all_tensors_in_a_row, "[(64, 64), (64,), (1000, 7)]")],
}

TestExercises = exercise_tests(checks, SOLVED, WRONG)


def test_numbers_in_the_prose():
    gpt2, big = (load_config(name).model for name in ("gpt2-124m", "mai-1-dense"))
    fit = [SOLVED.largest_batch(gpt2, what, 80e9) for what in ("none", "selective", "full")]
    assert fit == [242, 358, 1769]
    kept = counts.kept_bytes(big, False, ALONE, "none") / counts.kept_bytes(big, False, ALONE, "full")
    assert round(kept, 1) == 22.5 and SOLVED.best_segments(120, 22.5) == 60
