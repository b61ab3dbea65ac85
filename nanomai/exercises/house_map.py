"""Checks of the exercises in notebooks/00_map."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

from nanomai.config import ModelConfig
from nanomai.show import exercise

# Odd sizes, so that no two dimensions can be taken for one another.
SHAPES = {
    "a plain one": ModelConfig(n_layers=3, d_model=10, n_heads=5, n_kv_heads=5, head_dim=2, d_ff=7, vocab_size=11),
    "with fewer key-value heads": ModelConfig(n_layers=1, d_model=12, n_heads=6, n_kv_heads=2, head_dim=2, d_ff=5,
                                              vocab_size=13),
    "whose heads together are wider than d_model": ModelConfig(n_layers=2, d_model=6, n_heads=4, n_kv_heads=4,
                                                               head_dim=8, d_ff=9, vocab_size=17),
    "with untied embeddings": ModelConfig(n_layers=2, d_model=8, n_heads=2, n_kv_heads=1, head_dim=4, d_ff=15,
                                          vocab_size=19, tied_embeddings=False),
}


@exercise
def check_count(count: Callable[[SimpleNamespace], int]) -> None:
    """`count(c)` gives the parameters of a model with the dimensions in `c`, which knows nothing else."""
    for name, config in SHAPES.items():
        answer = count(SimpleNamespace(**vars(config)))
        assert answer == config.n_parameters, (
            f"a model {name} has {config.n_parameters} parameters, and your formula gives {answer}: {config}")


@exercise
def check_widen(widen: Callable[[ModelConfig, int], ModelConfig]) -> None:
    """`widen(config, budget)` gives the config with the largest d_ff that keeps within `budget` parameters."""
    for name, config in SHAPES.items():
        per_unit = 3 * config.d_model * config.n_layers
        for more in (0, 1, per_unit - 1, per_unit, 40 * per_unit + 5, -1, -2 * per_unit):
            budget = config.n_parameters + more
            answer = widen(config, budget)
            assert isinstance(answer, ModelConfig), f"return a ModelConfig, not {type(answer).__name__}"
            changed = {field.name for field in dataclasses.fields(config)
                       if getattr(answer, field.name) != getattr(config, field.name)}
            assert changed <= {"d_ff"}, f"only d_ff may change, but so did {', '.join(sorted(changed - {'d_ff'}))}"
            assert answer.n_parameters <= budget, (
                f"{answer.n_parameters} parameters are more than the budget of {budget} (a model {name})")
            wider = dataclasses.replace(answer, d_ff=answer.d_ff + 1).n_parameters
            assert wider > budget, (
                f"d_ff {answer.d_ff} is not the widest: {answer.d_ff + 1} gives {wider} parameters, and the budget is "
                f"{budget} (a model {name})")
