"""Tests of docs/modifications.md: each patch applies, does what its page says, trains and samples.

tests/modifications/NAME.patch is a modification, NAME.py its check. The check runs in a process of
its own, on a copy of the repository that has the patch.
"""
import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import backbone
import fid
import running
import sample
import train
from test_style import NAMES

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "tests" / "modifications"
PAGE = ROOT / "docs" / "modifications.md"
MODIFICATIONS = ["flow", "film", "cifar", "random_lambda"]
HELPERS = ["quick_train.py", "running.py"]
each = pytest.mark.parametrize("name", MODIFICATIONS)


def git_apply(folder, name, *flags):
    """Run git apply on the copy of the repository in `folder` -> what it says, "" if it did."""
    # git may otherwise find a repository above, and then changes nothing without a word
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    command = ["git", "apply", *flags, PATCHES / f"{name}.patch"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def texts(folder):
    """{file: text} of the product's files in `folder`."""
    return {f"{name}.py": (folder / f"{name}.py").read_text() for name in NAMES}


def copy_files(folder):
    """Copy the product's files, and what the checks need of the tests, to `folder`."""
    (folder / "tests").mkdir(parents=True)
    for name in NAMES:
        shutil.copy(ROOT / f"{name}.py", folder)
    for name in HELPERS:
        shutil.copy(ROOT / "tests" / name, folder / "tests")


@pytest.fixture
def patched(tmp_path, name):
    """A copy with the patch of this name."""
    copy = tmp_path / "copy"
    copy_files(copy)
    error = git_apply(copy, name)
    assert not error, (f"tests/modifications/{name}.patch no longer applies. If this repository "
                       "has it already, take it back. Else make the change again by hand, and the "
                       f"patch with git diff:\n{error}")
    return copy


def places(text):
    """{place: code} of a file: its functions and methods, and its other statements."""
    found = {}

    def note(body, owner):
        for number, node in enumerate(body):
            if isinstance(node, ast.ClassDef):
                note(node.body, f"{owner}{node.name}.")
            elif isinstance(node, ast.FunctionDef):
                found[f"{owner}{node.name}"] = ast.unparse(node)
            elif isinstance(node, ast.ImportFrom):
                found[f"{owner}import {node.module}"] = ast.unparse(node)
            elif isinstance(node, ast.Assign):
                found[f"{owner}{ast.unparse(node.targets)}"] = ast.unparse(node)

    note(ast.parse(text).body, "")
    return found


def changed_places(before, after):
    """The places of a file that are changed or new. A new class is one place."""
    old = places(before)
    new = places(after)
    changed = {place for place in old | new if old.get(place) != new.get(place)}
    classes = {node.name for node in ast.parse(before).body if isinstance(node, ast.ClassDef)}
    whole = {place.split(".")[0] if place.split(".")[0] not in classes else place
             for place in changed}
    return whole


@pytest.fixture(scope="module")
def checks(runs, tmp_path_factory):
    """The checks of all modifications, all started at once: {name: (process, its folder)}."""
    started = {}
    for name in MODIFICATIONS:
        place = tmp_path_factory.mktemp(name)
        copy = place / "copy"
        copy_files(copy)
        # a patch that does not apply is told by `patched`
        git_apply(copy, name)
        environment = running.ENVIRONMENT | {"PYTHONPATH": f"{copy}:{copy / 'tests'}"}
        command = [sys.executable, PATCHES / f"{name}.py", runs, place / "run"]
        process = subprocess.Popen(command, env=environment, cwd=place, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        started[name] = (process, place)
    return started


@each
def test_a_modification_does_what_its_page_says(patched, checks, name):
    """The check tests/modifications/NAME.py passes. Its last line says what went wrong."""
    process, place = checks[name]
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert (place / "run" / "some.npz").is_file()


@each
def test_a_modification_can_be_taken_back(patched, name):
    """git apply -R leaves the files as they were."""
    assert texts(patched) != texts(ROOT)
    assert not git_apply(patched, name, "-R")
    assert texts(patched) == texts(ROOT)


@each
def test_the_page_states_the_lines_and_places_of_a_modification(patched, name):
    """The row of the page's table has the numbers of the patch."""
    lines = (PATCHES / f"{name}.patch").read_text().splitlines()
    added = sum(line.startswith("+") and not line.startswith("+++") for line in lines)
    removed = sum(line.startswith("-") and not line.startswith("---") for line in lines)
    before = texts(ROOT)
    after = texts(patched)
    files = [file for file in before if before[file] != after[file]]
    changed = set()
    for file in files:
        changed |= changed_places(before[file], after[file])
    row = f"| {', '.join(f'`{file}`' for file in files)} | {added} | {removed} | {len(changed)} |"
    rows = [line for line in PAGE.read_text().splitlines() if f"`{name}`" in line and "|" in line]
    assert len(rows) == 1 and rows[0].endswith(row), f"{name}: {row}, which are {sorted(changed)}"
    # what is promised of all modifications, and of these
    assert len(files) == 1
    assert len(changed) <= 7
    assert added <= {"cifar": 25, "random_lambda": 1}.get(name, 40)


@each
def test_a_modified_file_is_as_readable_as_the_others(patched, name):
    for file, text in texts(patched).items():
        for number, line in enumerate(text.splitlines(), 1):
            assert len(line) <= 100, f"{file}:{number} has {len(line)} columns"


@each
def test_the_page_says_how_to_apply_and_take_back(name):
    text = PAGE.read_text()
    assert f"\ngit apply tests/modifications/{name}.patch\n" in text
    assert f"\ngit apply -R tests/modifications/{name}.patch\n" in text


def commands(page):
    """The commands of train.py, sample.py and fid.py in the bash blocks and `code` of a page."""
    text = page.read_text()
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += [code.replace("\n", " ") for code in re.findall(r"(?<!`)`(?!`)([^`]+)`", text)]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        for start in ("python", "torchrun"):
            if words[:1] == [start] and len(words) > 1 and words[1] in PROGRAMS:
                found.append((words[1], words[2:]))
    return found


PROGRAMS = {"train.py": train, "sample.py": sample, "fid.py": fid}


@pytest.mark.parametrize("page", [ROOT / "README.md", PAGE], ids=lambda page: page.name)
def test_the_commands_of_a_page_exist(page, monkeypatch, capsys):
    """Every flag of every command is one of the program's."""
    monkeypatch.setattr(backbone, "GUIDANCES", (*backbone.GUIDANCES, "film"))
    found = commands(page)
    assert len(found) >= 4
    for program, words in found:
        try:
            PROGRAMS[program].parse(words)
        except SystemExit as error:
            if error.code != 0:
                raise AssertionError(f"{page.name}: {program} {words}: {error} "
                                     f"{capsys.readouterr().err}") from None
