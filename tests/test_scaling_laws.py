"""The measured scaling laws: what is committed belongs to the models as they are, the fit is right, the script runs."""

import json
import statistics
import sys

import pytest

from benchmarks import scaling_laws

COMMITTED = json.loads((scaling_laws.RESULTS / "scaling_laws.json").read_text(encoding="utf-8"))


def test_the_results_are_of_these_models_and_recipes():
    for row in (*COMMITTED["runs"], *COMMITTED["held_out"]):
        assert row.items() >= scaling_laws.described(row["width"], row["steps"]).items()
        assert len(row["loss"]) == len(COMMITTED["seeds"]) >= 3
    widths = {budget: [row["width"] for row in COMMITTED["runs"] if row["budget"] == budget]
              for budget in scaling_laws.WIDTHS}
    assert widths == scaling_laws.WIDTHS
    assert COMMITTED["recipe"] == json.loads(json.dumps(scaling_laws.asdict(scaling_laws.MUON)))


def test_equal_compute():
    """Steps times FLOPs a step is the budget, to within half a step."""
    for row in COMMITTED["runs"]:
        step = row["flops_per_token"] * COMMITTED["batch_tokens"]
        assert abs(row["steps"] * step - row["budget"]) <= step / 2


def test_the_law_and_the_prediction_are_of_these_runs():
    law = scaling_laws.fit(COMMITTED["runs"], [statistics.mean(row["loss"]) for row in COMMITTED["runs"]])
    assert law == pytest.approx(COMMITTED["fit"], rel=1e-3, abs=1e-3)
    assert {far["width"] for far in COMMITTED["held_out"]} == set(scaling_laws.HELD_OUT)
    for far in COMMITTED["held_out"]:
        assert far["predicted"] == pytest.approx(scaling_laws.predict(law, far["parameters"], far["tokens"]), rel=1e-4)
        assert far["flops_per_token"] * far["tokens"] > 3.5 * max(scaling_laws.WIDTHS)
        assert all(abs(loss / far["predicted"] - 1) < 0.05 for loss in far["loss"])
    assert far["predicted"] < min(min(row["loss"]) for row in COMMITTED["runs"]), "beyond all that was fitted"
    assert far["tokens"] > max(row["tokens"] for row in COMMITTED["runs"])


def test_the_fit_finds_what_was_planted():
    for planted in ({"E": 1.82, "A": 482.0, "B": 2085.0, "a": 0.348, "b": 0.366},
                    {"E": 0.93, "A": 115.0, "B": 27.0, "a": 0.63, "b": 0.28}):
        runs = [{"parameters": n, "tokens": c / 6 / n} for c in scaling_laws.WIDTHS for n in (3e3, 1e4, 3e4, 1e5)]
        found = scaling_laws.fit(runs, [scaling_laws.predict(planted, r["parameters"], r["tokens"]) for r in runs])
        assert {key: found[key] for key in planted} == pytest.approx(planted, rel=0.01)


def test_the_script_runs(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    for i in range(40):  # enough documents that some are held out
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} plums and {i + 1} pears make {2 * i + 1} fruits. " * 20)
    monkeypatch.setattr(scaling_laws, "WIDTHS", {6e7: [8, 16], 1.2e8: [8, 16], 2.4e8: [8, 16]})
    monkeypatch.setattr(scaling_laws, "HELD_OUT", {24: 1500})
    monkeypatch.setattr(scaling_laws, "RATES", ((16, 6e7, (0.01, 0.02)),))
    monkeypatch.setattr(scaling_laws, "EVALUATED", 4)
    command = ["scaling_laws.py", "--corpus", str(tmp_path / "text"), "--data", str(tmp_path / "data"), "--out",
               str(tmp_path), "--seeds", "0", "3"]
    monkeypatch.setattr(sys, "argv", command)
    scaling_laws.main()
    result = json.loads((tmp_path / "scaling_laws.json").read_text(encoding="utf-8"))
    assert [len(row["loss"]) for row in result["runs"]] == [2] * 6 and len(result["held_out"][0]["loss"]) == 2
    assert result["rates"].keys() == {"16"} and result["rates"]["16"].keys() == {"0.01", "0.02"}
    monkeypatch.setattr(sys, "argv", [*command, "--only", "rates"])
    scaling_laws.main()
    assert json.loads((tmp_path / "scaling_laws.json").read_text(encoding="utf-8")) == result, "the same, run again"
