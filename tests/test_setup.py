"""The ways in agree: Makefile, pyproject.toml and environment.yml install the same thing, and `make help` shows all."""

import importlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())
CONDA_PIP = next(item["pip"] for item in CONDA["dependencies"] if isinstance(item, dict))


def found(pattern: str) -> str:
    match = re.search(pattern, MAKEFILE, re.MULTILINE)
    assert match, f"the Makefile has no {pattern!r}"
    return match[1]


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """As a person would call it, whatever the make that may run these tests was told."""
    told = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON", "TORCH"}
    env = {name: value for name, value in os.environ.items() if name not in told} | environment
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, env=env)


def test_torch_is_pinned_once_and_inside_the_range():
    pin = Requirement(found(r"^TORCH\s*\?= (.*)$"))
    allowed = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "torch")
    exact = re.fullmatch(r"==([\d.]+)", str(pin.specifier))
    assert pin.name == "torch" and exact and exact[1] in allowed.specifier
    assert [item for item in CONDA_PIP if item.startswith("torch")] == [str(pin)]


def test_both_install_the_same_extras():
    assert found(r"-e '(.*)'$") in [item.removeprefix("-e ") for item in CONDA_PIP]
    named = re.findall(r"\[(.*)\]", found(r"-e '(.*)'$"))
    assert named == ["dev"] and "dev" in PROJECT["optional-dependencies"]


def test_all_ask_for_the_same_python():
    least = found(r"sys.version_info < \((\d+, \d+)\)").replace(", ", ".")
    conda = next(Requirement(item) for item in CONDA["dependencies"] if item.startswith("python"))
    assert PROJECT["requires-python"] == f">={least}"
    assert Version(least) in conda.specifier
    assert not any(Version(f"3.{minor}") in conda.specifier for minor in range(int(least.split(".")[1])))


def test_every_dependency_is_present_in_a_version_that_is_asked_for():
    for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate():
            version = importlib.metadata.version(requirement.name)
            assert SpecifierSet(str(requirement.specifier)).contains(version), f"{text}, but {version} is installed"


def test_the_console_script_exists():
    module, function = PROJECT["scripts"]["nanomai"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_configurations_are_installed_beside_the_package():
    setuptools = PYPROJECT["tool"]["setuptools"]
    assert "scale_configs" in setuptools["packages"]["find"]["include"]
    assert setuptools["package-data"]["scale_configs"] == ["*.yaml"]


def test_make_help_shows_every_target():
    shown = dict(re.findall(r"^make ([\w-]+) +(\S.*)$", make("help").stdout, re.MULTILINE))
    assert list(shown) == found(r"^\.PHONY: (.*)$").split()
    assert make().stdout == make("help").stdout


def test_every_target_that_needs_the_packages_sets_up_first():
    for target in set(found(r"^\.PHONY: (.*)$").split()) - {"help", "clean", "gpu"}:
        assert found(rf"^{target}: (\S*)") == "$(READY)", target


def test_the_harness_reads_models_with_the_transformers_that_is_tested():
    wanted = re.findall(r"'(.*?)'", found(r"^\$\(HARNESS\): WANTED = (.*)$"))
    assert {r.name for r in map(Requirement, wanted)} == {"lm-eval", "transformers"}
    assert wanted[1] in PROJECT["optional-dependencies"]["dev"]


def test_a_run_that_is_missing_is_said_before_lm_eval_is_installed(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / ".ready").touch()
    done = make("-C", str(tmp_path), "eval-harness", "RUN=runs/none")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0 and not (tmp_path / ".venv-eval").exists()
    assert lines == ["no run in runs/none: `make train` makes runs/nano; for another, make eval-harness RUN=runs/micro"]


def test_a_python_that_is_too_old_or_absent_is_one_clear_line(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    done = make("-C", str(tmp_path), "lint", "PYTHON=no-such-python")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert done.returncode != 0 and not (tmp_path / ".venv").exists()
    assert lines == ["nanomai needs Python 3.11 or later with venv and ensurepip; "
                     "name one: make PYTHON=/path/to/python3"]


def test_the_first_python_that_runs_is_taken(tmp_path):
    """A name in PATH may be a shim with nothing behind it, or too old."""
    for name, body in {"python3.12": "exit 127", "python3.11": "exit 1", "python3.13": "echo \"ran $*\""}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    plan = make("--dry-run", "--always-make", "lint", PATH=path).stdout
    assert "python3.13 -m venv --clear .venv" in plan


def test_ci_runs_make_test():
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    assert ci.read_text().splitlines()[-2:] == ["make test", "make kernels"]


def test_the_licence_is_mit():
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License") and "the nanomai authors" in text and PROJECT["license"] == "MIT"
