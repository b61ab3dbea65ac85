"""The checks of `notebooks/09_moe` take its own solutions, and reject what a learner may well write instead."""

import math

import torch
import torch.nn.functional as F
from exercise_checks import exercise_tests, printed_solutions

from nanomai.exercises import moe as checks

SOLVED = printed_solutions("09_moe", torch=torch, F=F, math=math)


def places(experts, n_experts):
    chosen = F.one_hot(experts.flatten(), n_experts)
    return (chosen.cumsum(0) * chosen).sum(1)


def drops_with_a_capacity_rounded_down(experts, n_experts, factor):
    dropped = (places(experts, n_experts) > int(factor * experts.numel() / n_experts)).view_as(experts)
    return dropped.sum().item(), dropped.all(1).sum().item()


def drops_with_slots_for_tokens_not_pairs(experts, n_experts, factor):
    dropped = (places(experts, n_experts) > math.ceil(factor * len(experts) / n_experts)).view_as(experts)
    return dropped.sum().item(), dropped.all(1).sum().item()


def drops_that_count_tokens_that_lose_any(experts, n_experts, factor):
    dropped = (places(experts, n_experts) > math.ceil(factor * experts.numel() / n_experts)).view_as(experts)
    return dropped.sum().item(), dropped.any(1).sum().item()


def drops_that_serve_all_first_choices_first(experts, n_experts, factor):
    capacity = math.ceil(factor * experts.numel() / n_experts)
    dropped = (places(experts.T, n_experts) > capacity).view_as(experts.T)
    return dropped.sum().item(), dropped.all(0).sum().item()


def drops_off_by_one(experts, n_experts, factor):
    dropped = (places(experts, n_experts) >= math.ceil(factor * experts.numel() / n_experts)).view_as(experts)
    return dropped.sum().item(), dropped.all(1).sum().item()


def shares(experts, n_experts):
    return experts.flatten().bincount(minlength=n_experts) / experts.numel()


def gradient_of_the_scores_only(logits, experts):
    n, e = logits.shape
    return e / n * shares(experts, e).expand(n, e)


def gradient_of_a_sum_over_tokens(logits, experts):
    e, p = logits.shape[1], logits.softmax(-1)
    f = shares(experts, e)
    return e * p * (f - (p * f).sum(-1, keepdim=True))


def gradient_without_the_number_of_experts(logits, experts):
    return gradient_of_a_sum_over_tokens(logits, experts) / logits.numel()


def gradient_with_counts_for_shares(logits, experts):
    return gradient_of_a_sum_over_tokens(logits, experts) / len(logits) * experts.numel()


def gradient_towards_the_even_load(logits, experts):
    n, e = logits.shape
    return e / n * logits.softmax(-1) * (shares(experts, e) - 1 / e)


def gradient_through_the_softmax_of_means(logits, experts):
    n, e = logits.shape
    p, f = logits.softmax(-1).mean(0, keepdim=True), shares(experts, e)
    return (e / n * p * (f - (p * f).sum())).expand(n, e)


def counts(config, router=True, shared=True, dense=True, gate=True, tied=True, norms=True):
    d, moe, found = config.d_model, config.moe, []
    matrix = (3 if config.gated or not gate else 2) * d
    tables = 1 if config.tied_embeddings and tied else 2
    for met in (moe.n_experts, moe.experts_per_token):
        n = tables * config.vocab_size * d + d * norms
        for layer in range(config.n_layers):
            n += config.attention_parameters + 2 * d * norms
            if dense and layer < moe.n_dense_layers:
                n += matrix * config.d_ff
                continue
            routers = {True: moe.n_experts, False: 0, "met": met}[router]
            n += d * routers + (met + moe.n_shared_experts * shared) * matrix * moe.d_expert
        found.append(n)
    return tuple(found)


def counts_without_the_router(config):
    return counts(config, router=False)


def counts_with_a_router_for_the_chosen_only(config):
    return counts(config, router="met")


def counts_without_shared_experts(config):
    return counts(config, shared=False)


def counts_with_experts_in_every_layer(config):
    return counts(config, dense=False)


def counts_with_a_gate_everywhere(config):
    return counts(config, gate=False)


def counts_with_two_tables_always(config):
    return counts(config, tied=False)


def counts_without_norms(config):
    return counts(config, norms=False)


WRONG = {
    "count_drops": [(drops_with_a_capacity_rounded_down, "5 slots each"),
                    (drops_with_slots_for_tokens_not_pairs, "pairs are dropped"),
                    (drops_that_count_tokens_that_lose_any, "tokens lose all experts"),
                    (drops_that_serve_all_first_choices_first, "tokens lose all experts"),
                    (drops_off_by_one, "pairs are dropped")],
    "balance_gradient": [(gradient_of_the_scores_only, "sum to zero"),
                         (gradient_of_a_sum_over_tokens, "6.00 times as long"),
                         (gradient_without_the_number_of_experts, "0.25 times as long"),
                         (gradient_with_counts_for_shares, "12.00 times as long"),
                         (gradient_towards_the_even_load, "sum to zero"),
                         (gradient_through_the_softmax_of_means, "6 tokens, 4 experts, k = 2: off by")],
    "total_and_active": [(counts_without_the_router, "six experts, two for a token"),
                         (counts_with_a_router_for_the_chosen_only, "are active"),
                         (counts_without_shared_experts, "two shared experts"),
                         (counts_with_experts_in_every_layer, "a dense first layer"),
                         (counts_with_a_gate_everywhere, "GELU, which has no gate"),
                         (counts_with_two_tables_always, "six experts, two for a token"),
                         (counts_without_norms, "six experts, two for a token")],
}

TestExercises = exercise_tests(checks, SOLVED, WRONG)
