"""The checks of `notebooks/13_data_parallel_to_fsdp` take its own solutions, and reject what a learner may well write
instead."""

import torch
from exercise_checks import exercise_tests, printed_solutions

from nanomai.exercises import data_parallel as checks

SOLVED = printed_solutions("13_data_parallel_to_fsdp", torch=torch)


def ring_of(own=1, theirs=2, adds=True, split=torch.Tensor.tensor_split, steps=lambda ranks: 2 * (ranks - 1)):
    """The printed program with one thing changed."""
    def program(rank, ranks, vector):
        chunks = list(split(vector, ranks))
        for step in range(steps(ranks)):
            received = yield chunks[(rank - own - step) % ranks]
            there = (rank - theirs - step) % ranks
            chunks[there] = received + chunks[there] if adds is None or adds == (step < ranks - 1) else received
        return torch.cat(chunks)

    return program


def ring_that_goes_round_with_whole_vectors(rank, ranks, vector):
    total = travelling = vector
    for _ in range(ranks - 1):
        travelling = yield travelling
        total = total + travelling
    return total


def ring_that_sends_whole_vectors_in_as_many_steps(rank, ranks, vector):
    total = travelling = vector
    for step in range(2 * (ranks - 1)):
        travelling = yield travelling
        if step < ranks - 1:
            total = total + travelling
    return total


def ring_that_only_adds(rank, ranks, vector):
    return (yield from ring_of(adds=None)(rank, ranks, vector))


def ring_without_the_second_half(rank, ranks, vector):
    return (yield from ring_of(steps=lambda ranks: ranks - 1)(rank, ranks, vector))


def ring_that_adds_to_what_it_sends(rank, ranks, vector):
    return (yield from ring_of(theirs=1)(rank, ranks, vector))


def ring_that_returns_nothing(rank, ranks, vector):
    yield from ring_of()(rank, ranks, vector)


def ring_that_ends_early_on_rank_0(rank, ranks, vector):
    return (yield from ring_of(steps=lambda ranks: 2 * (ranks - 1) - (rank == 0) * (ranks > 1))(rank, ranks, vector))


def mean_of_means(gradients, counts):
    return sum(gradients) / len(counts)


def mean_of_means_that_are_there(gradients, counts):
    found = [g for g, n in zip(gradients, counts, strict=True) if n]
    return sum(found) / len(found)


def sum_of_means(gradients, counts):
    return sum(g for g, n in zip(gradients, counts, strict=True) if n)


def sum_of_sums(gradients, counts):
    return sum(g * n for g, n in zip(gradients, counts, strict=True) if n)


def mean_with_zero_times_nan(gradients, counts):
    return sum(g * n for g, n in zip(gradients, counts, strict=True)) / sum(counts)


def sums_divided_by_the_ranks(gradients, counts):
    return sum_of_sums(gradients, counts) / len(counts)


def sent(stage, ranks, block, n_blocks, root, weight=2, again=2, all_root=1, halves=2, share=None):
    blocks = n_blocks * block
    share = (ranks - 1) / ranks if share is None else share
    if stage == 0:
        return halves * 4 * (blocks + root) * share
    passes = again if stage == 3 else 1
    return (4 * (blocks + root) + weight * (passes * blocks + (passes if all_root == 2 else 1) * root)) * share


def bytes_that_gather_once(*case):
    return sent(*case, again=1)


def bytes_that_gather_the_root_twice(*case):
    return sent(*case, all_root=2)


def bytes_of_float32_weights(*case):
    return sent(*case, weight=4)


def bytes_of_half_an_all_reduce(*case):
    return sent(*case, halves=1)


def bytes_of_whole_vectors(*case):
    return sent(*case, share=1)


WRONG = {
    "ring_program": [(ring_that_goes_round_with_whole_vectors, "1 steps, not 2"),
                     (ring_that_sends_whole_vectors_in_as_many_steps, "are enough"),
                     (ring_that_only_adds, "wrong numbers"),
                     (ring_without_the_second_half, "wrong numbers"),
                     (ring_that_adds_to_what_it_sends, "wrong numbers"),
                     (ring_that_returns_nothing, "return the sum"),
                     (ring_that_ends_early_on_rank_0, "all must take as many steps")],
    "global_mean": [(mean_of_means, "ranks with (3, 1) valid tokens"),
                    (mean_of_means_that_are_there, "ranks with (3, 1) valid tokens"),
                    (sum_of_means, "2.00 times as long"),
                    (sum_of_sums, "8.00 times as long"),
                    (mean_with_zero_times_nan, "not finite"),
                    (sums_divided_by_the_ranks, "4.00 times as long")],
    "bytes_sent": [(bytes_that_gather_once, "stage 3"),
                   (bytes_that_gather_the_root_twice, "stage 3"),
                   (bytes_of_float32_weights, "stage 1"),
                   (bytes_of_half_an_all_reduce, "stage 0"),
                   (bytes_of_whole_vectors, "stage 0, 2 ranks")],
}

TestExercises = exercise_tests(checks, SOLVED, WRONG)
