"""The checks of `notebooks/15_planning_a_500b_run` take its own solutions, and reject what a learner may well write
instead."""

from exercise_checks import edited_solution, exercise_tests, printed_solutions

from nanomai.exercises import planning as checks

NOTEBOOK = "15_planning_a_500b_run"
SOLVED = printed_solutions(NOTEBOOK)


def edited(name, fault, *edits):
    return edited_solution(NOTEBOOK, name, fault, *edits)


def all_of_them():
    return 8000, {"tensor": 8, "pipeline": 10, "recompute": "full"}


WRONG = {
    "layout": [
        (all_of_them, "the planner refuses it"),
        (edited("layout", "more_than_there_are", ("7680", "8192"), ('"pipeline": 15', '"pipeline": 16')),
         "only 8,000"),
        (edited("layout", "half_of_them", ("7680", "3840")), "idle"),
        (edited("layout", "without_recomputing", ('"context": 4', '"context": 2'), ('"full"', '"none"')),
         "does not fit"),
        (edited("layout", "too_slow", ('"context": 4', '"context": 2')), "not less than 200"),
        (edited("layout", "an_axis_that_is_none", ('"tensor": 8', '"context": 2, "tensor": 8, "expert": 8')),
         "needs a model with experts")],
    "gpus_for": [
        (edited("gpus_for", "mfu_of_one_machine", ("mfu(n)", "mfu(8)")), "GPUs take"),
        (edited("gpus_for", "without_goodput", (" * goodput", "")), "GPUs take"),
        (edited("gpus_for", "broken_machines", ("n += 8", "n += 1")), "no whole machines"),
        (edited("gpus_for", "one_machine_more", ("n = 8", "n = 16")), "more than are needed"),
        (edited("gpus_for", "hours_of_an_hour", ("86_400", "3_600")), "more than are needed")],
    "carbon_price": [
        (edited("carbon_price", "without_pue", ("price * pue", "price"), ("pue * kg", "kg")), "a kWh of the machines"),
        (edited("carbon_price", "for_a_kilogram", (" / 1000", "")), "a kWh of the machines"),
        (edited("carbon_price", "paid_to_leave", ("max(0.0, dearer / saved)", "dearer / saved")),
         "cheaper one already"),
        (edited("carbon_price", "all_emissions", ("tonnes[0] - tonnes[1]", "tonnes[0]")), "a kWh of the machines")],
}

TestExercises = exercise_tests(checks, SOLVED, WRONG)
