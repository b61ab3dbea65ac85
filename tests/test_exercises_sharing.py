"""The checks of `notebooks/14_tensor_pipeline_expert_context` take its own solutions, and reject what a learner may
well write instead."""

from exercise_checks import edited_solution, exercise_tests, printed_solutions

from nanomai.exercises import sharing as checks

NOTEBOOK = "14_tensor_pipeline_expert_context"
SOLVED = printed_solutions(NOTEBOOK)


def edited(name, fault, *edits):
    return edited_solution(NOTEBOOK, name, fault, *edits)


def sums_late(layers):
    """After the last product, as if all between were linear."""
    return [""] * len(layers) + ["all-reduce" if "row" in layers else "all-gather" if "column" in layers else ""]


def sums_after_every_product(layers):
    return ["", *("all-reduce" if layer in ("column", "row") else "" for layer in layers)]


WRONG = {
    "collectives": [
        (edited("collectives", "gathers_summands", ('word = "all-reduce"', 'word = "all-gather"')), "slices"),
        (edited("collectives", "lets_summands_through_gelu", ('state == "summand"', 'state == "summand" and '
                                                              'layer != "gelu"')), "off by"),
        (edited("collectives", "forgets_the_end", ('for layer in [*layers, "end"]', "for layer in layers"),
                ("    return plan", '    return plan + [""]')), "the ranks end with"),
        (edited("collectives", "norm_of_a_slice", ('("row", "gelu")', '("row", "gelu", "norm")')), "off by"),
        (edited("collectives", "joins_slices_always", ('layer not in ("row", "gelu")', "True")), "1 collectives are"),
        (sums_late, "off by"), (sums_after_every_product, "off by")],
    "micro_batches": [
        (edited("micro_batches", "of_the_time_worked", ("(n - 1)", "n")), "more than are needed"),
        (edited("micro_batches", "rounded_down", ("-(-(n - 1) * (p - 1) // (v * p))", "(n - 1) * (p - 1) // (v * p)")),
         "of the time"),
        (edited("micro_batches", "without_stages", ("(v * p)", "p")), "more than are needed"),
        (edited("micro_batches", "none_at_all", ("max(1, rounds)", "rounds")), "no positive multiple"),
        (edited("micro_batches", "any_number", ("// (v * p)", "// v"), ("p * max", "max")),
         "no positive multiple")],
    "choose_mesh": [
        (edited("choose_mesh", "widest_tensor_first", ("(1, 2, 4, 8)", "(8, 4, 2, 1)")), "waits for less"),
        (edited("choose_mesh", "beyond_a_machine", ("(1, 2, 4, 8)", "range(1, gpus + 1)")), "8 GPUs of a machine"),
        (edited("choose_mesh", "forgets_the_bubble", ("9 * (pipeline - 1)", "0")), "more than a tenth"),
        (edited("choose_mesh", "sequences_left_over", ("sequences % data == 0", "sequences >= data")),
         "data does not divide the sequences"),
        (edited("choose_mesh", "deepest_pipeline_first",
                ("range(1, n_layers + 1)", "range(n_layers, 0, -1)")), "shorter pipeline"),
        (edited("choose_mesh", "never_none", ("return None", "return 1, gpus, 1")),
         "data does not divide the sequences")],
}

TestExercises = exercise_tests(checks, SOLVED, WRONG)
