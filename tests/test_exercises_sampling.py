"""The checks of `notebooks/07_sampling_kv_cache` take its own solutions, and reject what a learner may well write."""

import torch
from exercise_checks import exercise_tests, printed_solutions

from nanomai.exercises import sampling as checks

SOLVED = printed_solutions("07_sampling_kv_cache", torch=torch)


def penalize_by_division(logits, seen, penalty):
    new = logits.clone()
    new[seen] /= penalty
    return new


def penalize_each_time(logits, seen, penalty):
    new = logits.clone()
    for token in seen:
        new[token] = new[token] / penalty if new[token] > 0 else new[token] * penalty
    return new


def penalize_in_place(logits, seen, penalty):
    logits[seen] = torch.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


def penalize_everything(logits, seen, penalty):
    return torch.where(logits > 0, logits / penalty, logits * penalty)


def penalize_by_subtraction(logits, seen, penalty):
    new = logits.clone()
    new[seen] -= penalty - 1
    return new


def min_p_with_an_absolute_limit(p, share):
    kept = torch.where(p >= min(share, p.max()), p, 0.0)
    return kept / kept.sum()


def min_p_that_forgets_the_sum(p, share):
    return torch.where(p >= share * p.max(), p, 0.0)


def min_p_without_the_equal(p, share):
    kept = torch.where(p > share * p.max(), p, 0.0)
    return kept / kept.sum()


def min_p_by_another_softmax(p, share):
    return p.masked_fill(p < share * p.max(), -torch.inf).softmax(-1)


def pad_right(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts])
    causal = torch.ones(width, width).tril().bool()
    return ids, torch.arange(width).expand_as(ids), causal.expand(len(ids), -1, -1)


def pad_left_with_shared_positions(prompts):
    ids, _, mask = SOLVED.pad_left(prompts)
    return ids, torch.arange(ids.shape[1]).expand_as(ids), mask


def pad_left_with_visible_pads(prompts):
    ids, positions, _ = SOLVED.pad_left(prompts)
    return ids, positions, positions[:, :, None] >= positions[:, None, :]


def pad_left_with_blind_pads(prompts):
    ids, positions, mask = SOLVED.pad_left(prompts)
    return ids, positions, mask & (positions >= 0)[:, :, None]


def pad_left_without_the_past(prompts):
    ids, positions, _ = SOLVED.pad_left(prompts)
    return ids, positions, (positions >= 0)[:, None, :] | (positions < 0)[:, :, None]


WRONG = {
    "penalize": [(penalize_by_division, "never raise"), (penalize_each_time, "once for each token"),
                 (penalize_in_place, "work on a clone"), (penalize_everything, "was not seen"),
                 (penalize_by_subtraction, "seen [0], penalty 2.0")],
    "min_p": [(min_p_with_an_absolute_limit, "must stay"), (min_p_that_forgets_the_sum, "not to one"),
              (min_p_without_the_equal, "must stay"), (min_p_by_another_softmax, "keep its proportions")],
    "pad_left": [(pad_right, "at the right end"), (pad_left_with_shared_positions, "has position 0"),
                 (pad_left_with_visible_pads, "sees a pad"), (pad_left_with_blind_pads, "softmax gives NaN"),
                 (pad_left_without_the_past, "sees the future")],
}

TestExercises = exercise_tests(checks, SOLVED, WRONG)
