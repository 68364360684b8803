"""What a user gets by installing: light imports, types, one version, documented names."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tdhook_like

ROOT = Path(__file__).parents[1]
PACKAGE = Path(inspect.getfile(tdhook_like)).parent
# The rooms that may ask for more than the core's dependencies.
EXTRAS = ("rl", "viz", "demo")

needs_checkout = pytest.mark.skipif(
    not (ROOT / ".git").exists(), reason="speaks of a git checkout, which this is not"
)


def files_of_the_checkout() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def core_sources() -> Iterator[Path]:
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] not in EXTRAS:
            yield path


def imported_by(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def test_importing_the_package_is_silent_and_loads_no_extra() -> None:
    code = "import json, sys, tdhook_like; print(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-W", "error", "-c", code]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in json.loads(shown.stdout)}
    assert "tdhook_like" in loaded
    assert loaded.isdisjoint({"torchrl", "gymnasium", "matplotlib", "transformers"})
    assert shown.stderr == ""


def test_the_core_names_nothing_but_torch_and_tensordict_in_its_imports() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "tensordict", "tdhook_like"}
    foreign = {
        path.name: names for path in core_sources() if (names := imported_by(path) - allowed)
    }
    # `python -m tdhook_like demo` may reach into the rooms, but names them as its own package. The bar
    # that is drawn on request is imported on request.
    assert foreign == {"progress.py": {"tqdm"}}


def test_the_package_says_that_it_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_the_version_is_the_same_wherever_it_is_written() -> None:
    (project,) = re.findall(
        r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    (citation,) = re.findall(
        r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert tdhook_like.__version__ == project == citation


def test_every_public_name_exists_and_explains_itself() -> None:
    assert len(set(tdhook_like.__all__)) == len(tdhook_like.__all__)
    for name in tdhook_like.__all__:
        value = getattr(tdhook_like, name)
        if callable(value):
            assert (inspect.getdoc(value) or "").strip(), f"{name} has no docstring"


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.relative_to(PACKAGE).as_posix()
)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_the_console_script_leads_to_a_function() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="tdhook_like")
    assert callable(script.load())


def test_the_pinned_versions_lie_in_the_ranges_that_users_get() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert pins == sorted(pins, key=str.lower)
    pinned = {canonicalize_name(name): version for name, version in (p.split("==") for p in pins)}
    for line in importlib.metadata.requires("tdhook_like") or []:
        wanted = Requirement(line)
        if (name := canonicalize_name(wanted.name)) != "tdhook-like":
            assert name in pinned, f"{name} is not pinned"
            assert wanted.specifier.contains(pinned[name]), f"{line} against {pinned[name]}"


@needs_checkout
def test_no_file_of_the_package_is_left_out_of_the_wheel() -> None:
    # The build leaves out what git ignores.
    files = [p for p in PACKAGE.rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    command = ["git", "check-ignore", *map(str, files)]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ignored.stdout == ""


@needs_checkout
def test_no_file_names_a_folder_or_a_registry_of_the_machine_it_was_written_on() -> None:
    folder = re.compile(r"(?<![\w.])/(?:home|root|work|Users|opt|mnt)/\w")
    registry = re.compile(r"(?:--(?:extra-)?index-url|--find-links|pythonhosted\.|npm\.\w)")
    found = []
    for path in files_of_the_checkout():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        text = text.replace(registry.pattern, "")
        found += [
            f"{path.relative_to(ROOT)}:{number}"
            for number, line in enumerate(text.splitlines(), 1)
            if folder.search(line) or registry.search(line)
        ]
    assert found == []


@needs_checkout
def test_the_verification_script_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
