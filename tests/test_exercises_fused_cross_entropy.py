"""The checks of `notebooks/11c_fused_cross_entropy` take its own solutions, and reject what a learner may well write
instead."""

import torch
from exercise_checks import exercise_tests, printed_solutions

from nanomai.exercises import fused_cross_entropy as checks

SOLVED = printed_solutions("11c_fused_cross_entropy", torch=torch)


def merged_without_rescaling(maxima, sums, target_logits):
    return maxima.amax(0) + sums.sum(0).log() - target_logits.sum(0)


def merged_without_the_maximum(maxima, sums, target_logits):
    return (sums * maxima.exp()).sum(0).log() - target_logits.sum(0)


def merged_the_wrong_way_round(maxima, sums, target_logits):
    largest = maxima.amax(0)
    return largest + (sums * (largest - maxima).exp()).sum(0).log() - target_logits.sum(0)


def merged_with_the_largest_target(maxima, sums, target_logits):
    largest = maxima.amax(0)  # the target's logit may be negative, and lose to another shard's 0
    return largest + (sums * (maxima - largest).exp()).sum(0).log() - target_logits.amax(0)


def merged_in_pairs_of_logs(maxima, sums, target_logits):
    lse = maxima + sums.log()  # -inf for an empty shard: -inf - -inf is NaN where it comes first or alone
    total = lse[0]
    for part in lse[1:]:
        total = total + (1 + (part - total).exp()).log()  # overflows where the later part is far larger
    return total - target_logits.sum(0)


def merged_to_one_number(maxima, sums, target_logits):
    return SOLVED.merge_shards(maxima, sums, target_logits).sum()


def summed(logits, targets):
    return torch.nn.functional.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")


def softmax_minus_one(logits, targets):
    """softmax - onehot of the rows that count, in float32."""
    d = logits.float().softmax(-1)
    rows = (targets != -100).nonzero()[:, 0]
    d[rows, targets[rows]] -= 1
    return d


def gradient_of_ignored_tokens(logits, targets):
    loss = summed(logits, targets)
    logits.copy_(softmax_minus_one(logits, targets))
    return loss


def gradient_elsewhere(logits, targets):
    loss = summed(logits, targets)
    logits = softmax_minus_one(logits, targets) * (targets != -100)[:, None]
    return loss


def gradient_without_the_maximum(logits, targets):
    loss = summed(logits, targets)
    p = logits.float().exp()
    p /= p.sum(-1, keepdim=True)
    rows = (targets != -100).nonzero()[:, 0]
    p[rows, targets[rows]] -= 1
    p[targets == -100] = 0
    logits.copy_(p)
    return loss


def gradient_rounded_too_early(logits, targets):
    loss = summed(logits, targets)
    logits.copy_(logits.float().softmax(-1))
    rows = (targets != -100).nonzero()[:, 0]
    logits[rows, targets[rows]] -= 1
    logits[targets == -100] = 0
    return loss


def gradient_of_the_mean(logits, targets):
    counted = max(1, (targets != -100).sum().item())
    loss = summed(logits, targets)
    logits.copy_(softmax_minus_one(logits, targets) * (targets != -100)[:, None] / counted)
    return loss / counted


def loss_of_what_was_overwritten(logits, targets):
    logits.copy_(softmax_minus_one(logits, targets) * (targets != -100)[:, None])
    return summed(logits, targets)


def chunk_without_the_gradients(budget, N, V, D, e):
    return max(0, min(N, budget // (e * V)))


def chunk_without_d_hidden(budget, N, V, D, e):
    return max(0, min(N, (budget - 4 * V * D) // (e * V)))


def chunk_beyond_the_tokens(budget, N, V, D, e):
    return max(0, (budget - 4 * V * D - e * N * D) // (e * V))


def chunk_of_one_at_least(budget, N, V, D, e):
    return max(1, min(N, (budget - 4 * V * D - e * N * D) // (e * V)))


def chunk_rounded_up(budget, N, V, D, e):
    return max(0, min(N, -(-(budget - 4 * V * D - e * N * D) // (e * V))))


def chunk_of_float32(budget, N, V, D, e):
    return max(0, min(N, (budget - 4 * V * D - e * N * D) // (4 * V)))


WRONG = {
    "merge_shards": [(merged_without_rescaling, "two shards: off by"),
                     (merged_without_the_maximum, "logits of size 1e4: a loss is not finite"),
                     (merged_the_wrong_way_round, "two shards: off by"),
                     (merged_with_the_largest_target, "off by"),
                     (merged_in_pairs_of_logs, "logits of size 1e4: a loss is not finite"),
                     (merged_to_one_number, "one loss a token, (4,)")],
    "gradient_in_place": [(gradient_of_ignored_tokens, "ignored targets: an ignored token has a gradient"),
                          (gradient_elsewhere, "a small chunk: the logits are still there"),
                          (gradient_without_the_maximum, "logits of size 1e4: a gradient is nan"),
                          (gradient_rounded_too_early, "of probability 0.9985: a gradient is 0 and should be -0.00"),
                          (gradient_of_the_mean, "a small chunk: a gradient is"),
                          (loss_of_what_was_overwritten, "a small chunk: the loss is")],
    "largest_chunk": [(chunk_without_the_gradients, "tokens need"), (chunk_without_d_hidden, "tokens need"),
                      (chunk_beyond_the_tokens, "there are 16,384"), (chunk_of_one_at_least, "1 tokens need"),
                      (chunk_rounded_up, "tokens need"), (chunk_of_float32, "would fit too")],
}

TestExercises = exercise_tests(checks, SOLVED, WRONG)
