"""The checks of `notebooks/05b_families` take its own solutions, and reject what a learner may well write instead."""

import torch
from exercise_checks import exercise_tests, printed_solutions

from nanomai.exercises import families as checks

SOLVED = printed_solutions("05b_families", torch=torch)


def bytes_for_every_query_head(config, length):
    kept = min(length, config.sliding_window or length)
    return kept * config.n_layers * 4 * config.n_heads * config.head_dim


def bytes_of_all_tokens_without_the_window(config, length):
    return length * config.kv_cache_bytes_per_token()


def bytes_of_latents_as_if_they_were_heads(config, length):
    kept = min(length, config.sliding_window or length)
    return kept * config.n_layers * 4 * config.n_kv_heads * config.head_dim


def bytes_of_keys_alone(config, length):
    return SOLVED.cache_bytes(config, length) // 2


def width_rounded_down(d_ff, multiple):
    return 2 * d_ff // 3 // multiple * multiple


def width_as_a_float(d_ff, multiple):
    return float(SOLVED.swiglu_width(d_ff, multiple))


def width_one_step_too_far(d_ff, multiple):
    return (2 * d_ff // 3 // multiple + 1) * multiple


def width_that_forgets_the_multiple(d_ff, multiple):
    return -(-2 * d_ff // 3)


def thirds_of_the_rows(fused, config):
    return fused.chunk(3)


def keys_and_values_exchanged(fused, config):
    q, k, v = SOLVED.split_qkv(fused, config)
    return q, v, k


def heads_interleaved(fused, config):
    q, k, v = SOLVED.split_qkv(fused, config)
    return q.unflatten(0, (-1, config.head_dim)).transpose(0, 1).flatten(0, 1), k, v


WRONG = {
    "cache_bytes": [(bytes_for_every_query_head, "grouped queries, 5 tokens"),
                    (bytes_of_all_tokens_without_the_window, "a window of 9, 40 tokens"),
                    (bytes_of_latents_as_if_they_were_heads, "latent attention, 5 tokens"),
                    (bytes_of_keys_alone, "a cache for every head, 5 tokens")],
    "swiglu_width": [(width_rounded_down, "too narrow"),
                     (width_as_a_float, "a whole number"),
                     (width_one_step_too_far, "wider than it need be"),
                     (width_that_forgets_the_multiple, "not a multiple of 8")],
    "split_qkv": [(thirds_of_the_rows, "6 heads, 2 key-value heads of 4: queries have shape"),
                  (keys_and_values_exchanged, "another order"),
                  (heads_interleaved, "another order")],
}

TestExercises = exercise_tests(checks, SOLVED, WRONG)
