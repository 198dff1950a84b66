"""The environment variables: conversion, errors, and that the README lists all of them as they are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from helpers.calls import raises

import epcomm
from epcomm import env
from epcomm.errors import InputError

PACKAGE = Path(epcomm.__file__).parent
README = Path(__file__).resolve().parents[2] / "README.md"
TRUE = ("1", "true", "TRUE", "yes", "on", "On")
FALSE = ("0", "false", "no", "OFF", "")

BOOLEANS = [name for name, variable in env.VARIABLES.items() if variable.type is bool]
NUMBERS = [name for name, variable in env.VARIABLES.items() if variable.type in (int, float)]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in (*env.VARIABLES, *env.LAUNCHER_SIZE_VARIABLES):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("variable", env.VARIABLES.values(), ids=lambda variable: variable.name)
def test_every_variable_is_complete(variable):
    assert re.fullmatch(r"EPCOMM_[A-Z0-9_]+", variable.name)
    assert type(variable.default) is variable.type
    assert variable.meaning
    assert env.get(variable.name) == variable.default


@pytest.mark.parametrize("name", BOOLEANS)
def test_truth(name, monkeypatch):
    for text in (*TRUE, *FALSE):
        monkeypatch.setenv(name, text)
        assert env.get(name) is (text in TRUE)
    for text in ("2", "-1", "y", "none", " 1"):
        monkeypatch.setenv(name, text)
        with raises(InputError, f"^{name}: got '{text}'; wanted 0 or 1; correct the environment variable$"):
            env.get(name)


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(name, monkeypatch):
    kind = env.VARIABLES[name].type
    monkeypatch.setenv(name, "12")
    assert env.get(name) == 12
    assert type(env.get(name)) is kind
    for text in ("", "many", "1,5", "0x10"):
        monkeypatch.setenv(name, text)
        with raises(InputError, f"^{name}: got '{text}'; wanted a value of type {kind.__name__}; correct"):
            env.get(name)


def test_values_are_read_when_they_are_used(monkeypatch):
    monkeypatch.setenv("EPCOMM_TIMEOUT_S", "2.5")
    assert env.get("EPCOMM_TIMEOUT_S") == 2.5
    monkeypatch.delenv("EPCOMM_TIMEOUT_S")
    assert env.get("EPCOMM_TIMEOUT_S") == 100.0


def test_unknown_names_are_mistakes_of_ours():
    with pytest.raises(KeyError):
        env.get("EPCOMM_TIMEOUT")


@pytest.mark.parametrize("name", env.LAUNCHER_SIZE_VARIABLES)
def test_launcher_size(name, monkeypatch):
    assert env.launcher_size() == 1
    monkeypatch.setenv(name, "12")
    assert env.launcher_size() == 12
    monkeypatch.setenv(name, "unknown")
    assert env.launcher_size() == 1


def test_launcher_size_is_that_of_the_largest_claim(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "1")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert env.launcher_size() == 4


def test_environment_of_children(monkeypatch):
    monkeypatch.setenv("SOMETHING", "else")
    assert env.lookup("SOMETHING") == "else"
    assert env.lookup("SOMETHING_MISSING") is None
    child = env.child_environment({"SOMETHING": "new", "MORE": "1"})
    assert (child["SOMETHING"], child["MORE"], env.lookup("SOMETHING")) == ("new", "1", "else")


def readers_of_the_environment(folder: Path) -> list[str]:
    """Files below `folder` that look at os.environ by themselves."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        if names & {"environ", "environb", "getenv", "putenv"}:
            found.append(path.relative_to(folder).as_posix())
    return found


def test_only_one_file_reads_the_environment(tmp_path):
    (tmp_path / "a.py").write_text("import os\nos.getenv('HOME')\n")
    assert readers_of_the_environment(tmp_path) == ["a.py"]
    assert readers_of_the_environment(PACKAGE) == ["env.py"]


def test_what_the_user_has_set_for_a_library_stays(monkeypatch):
    monkeypatch.setenv("NVSHMEM_A", "")  # so that it is put back
    monkeypatch.delenv("NVSHMEM_A")
    monkeypatch.setenv("NVSHMEM_B", "the user's")
    env.provide({"NVSHMEM_A": "1", "NVSHMEM_B": "2"})
    assert [env.lookup(name) for name in ("NVSHMEM_A", "NVSHMEM_B")] == ["1", "the user's"]


def variables_mentioned(folder: Path) -> set[str]:
    """Names of variables in the sources below `folder`, in code, docstrings and comments."""
    text = "".join(path.read_text() for path in folder.rglob("*.py"))
    return set(re.findall(r"\bEPCOMM_[A-Z][A-Z0-9_]*[A-Z0-9]\b", text))


def test_no_variable_is_mentioned_that_does_not_exist():
    assert variables_mentioned(PACKAGE) == set(env.VARIABLES)


def readme_rows(text: str) -> dict[str, tuple[str, str]]:
    """(default, meaning) by name, from table rows ``| `EPCOMM_X` | default | meaning |``."""
    rows = re.findall(r"^\|\s*`(EPCOMM_\w+)`\s*\|([^|]*)\|([^|]*)\|\s*$", text, re.MULTILINE)
    return {name: (default.strip().strip("`"), meaning.strip()) for name, default, meaning in rows}


def test_the_readme_lists_every_variable_with_its_default():
    rows = readme_rows(README.read_text())
    assert set(rows) == set(env.VARIABLES)
    for name, (default, meaning) in rows.items():
        variable = env.VARIABLES[name]
        assert meaning, name
        if variable.default == "":
            assert default in ("", "-", "–", "unset", "(unset)", "none"), name
        elif variable.type is bool:
            assert default in (TRUE if variable.default else FALSE), name
        else:
            assert variable.type(default) == variable.default, name
