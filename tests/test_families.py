"""The measured ladder from GPT-2 to MAI-1: what is committed belongs to the rungs as they are, and the script runs."""

import json
import sys

import pytest

from benchmarks import families

COMMITTED = json.loads((families.RESULTS / "families.json").read_text(encoding="utf-8"))


def test_the_results_are_of_these_rungs_and_this_recipe():
    rungs = families.rungs()
    assert [row["name"] for row in COMMITTED["rungs"]] == [name for name, *_ in rungs]
    for row, (name, family, changes, config) in zip(COMMITTED["rungs"], rungs, strict=True):
        assert row["family"] == family and row["changes"] == json.loads(json.dumps(changes)), name
        assert row["parameters"] == config.n_parameters and row["active"] == config.n_active_parameters, name
        assert row["flops"] == config.flops_per_token() and row["kv_bytes"] == config.kv_cache_bytes_per_token(), name
        assert row["steps"] == families.steps_of(config, COMMITTED["training_flops"]), name
    assert {len(row["bits_per_byte"]) for row in COMMITTED["rungs"]} == {len(COMMITTED["seeds"])}
    assert COMMITTED["size"] == families.SIZE and COMMITTED["batch_tokens"] == families.BATCH
    assert COMMITTED["recipe"] == json.loads(json.dumps(families.asdict(families.RECIPE)))


def test_the_table_is_of_these_results():
    assert (families.RESULTS / "families.md").read_text(encoding="utf-8") == families.table(COMMITTED)


def test_equal_compute():
    """Steps times FLOPs a step is the budget, to within half a step."""
    for row in COMMITTED["rungs"]:
        step = row["flops"] * COMMITTED["batch_tokens"]
        assert abs(row["steps"] * step - COMMITTED["training_flops"]) <= step / 2


def test_the_script_runs(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    for i in range(40):  # enough documents that some are held out
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} plums and {i + 1} pears make {2 * i + 1} fruits. " * 20)
    monkeypatch.setattr(families, "LADDER", families.LADDER[:2])
    monkeypatch.setattr(families, "EVALUATED", 2000)
    monkeypatch.setitem(families.SIZE, "vocab_size", 270)
    here = ["--corpus", str(tmp_path / "text"), "--data", str(tmp_path / "data"), "--out", str(tmp_path)]
    for arguments in (["--seeds", "0", "3"], ["--rates"]):
        monkeypatch.setattr(sys, "argv", ["families.py", *here, "--flops", "1.2e10", *arguments])
        families.main()
    result = json.loads((tmp_path / "families.json").read_text(encoding="utf-8"))
    first, second = result["rungs"]
    assert first["steps"] == second["steps"] == 2
    assert len(first["bits_per_byte"]) == 2 and first["bits_per_byte"] != second["bits_per_byte"]
    assert len(result["rates"]["GPT-2"]) == len(result["rates"]["parallel block"]) == 5
    text = (tmp_path / "families.md").read_text(encoding="utf-8")
    assert "| parallel block | phi-1.5 |" in text and "| rate | GPT-2 | parallel block |" in text


def test_separated_means_one_sign_and_more_than_the_spread():
    row = {"family": "x", "parameters": 1, "flops": 1, "kv_bytes": 1, "steps": 1}
    scores = {"first": [2.0, 2.0], "lower": [1.9, 1.85], "wide": [1.89, 1.7], "mixed": [1.8, 1.8], "equal": [1.8, 1.8]}
    result = {"training_flops": 1e9, "batch_tokens": 1, "machine": "none", "seeds": [0, 1],
              "rungs": [row | {"name": name, "bits_per_byte": found} for name, found in scores.items()]}
    signs = [line.split("|")[-2].strip() for line in families.table(result).splitlines() if "| x |" in line]
    assert signs == ["", "yes", "no", "no", "no"]


@pytest.mark.parametrize("name", [name for name, *_ in families.LADDER[1:]])
def test_each_rung_changes_something(name):
    configs = {rung: config for rung, *_, config in families.rungs()}
    names = list(configs)
    assert configs[name] != configs[names[names.index(name) - 1]]
