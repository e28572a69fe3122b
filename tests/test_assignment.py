"""The assignment kit: what is handed out holds no solution, and a mistake costs its equation alone.

Most tests put a student's functions into this process and run the equations' tests here, since a
process of its own takes seconds for each equation.
"""
import ast
import importlib
import inspect
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import assignment
import diffusion_head
import mixing
import sample
import sound
import tokenizers
import train

ROOT = Path(__file__).resolve().parent.parent
MODULES = {f"{module.__name__}.py": module
           for module in (diffusion_head, mixing, sample, tokenizers, train)}
ALL = assignment.in_order(assignment.EQUATIONS)
FILES = sorted({Path(file).stem for number in ALL for file, _ in assignment.tests_of(number)})

OURS = "word for word as in this repository: was it handed out?"

# equation, a text that stands once in its function, the mistake
MISTAKES = [
    (3, "label_smoothing=0.1", "label_smoothing=0.0"),
    (3, "u_code < probability[", "u_code >= probability["),
    (4, "math.acos(done) / (math.pi / 2)", "1 - done"),
    (4, "score = score.masked_fill(known, math.inf)", "pass"),
    (5, "(noise - eps).square().mean(-1)", "(noise - eps).square().sum(-1)"),
    (5, "at(c.sqrt_abar, k) * x +", "x +"),
    (6, "(s + 1) / steps", "s / steps"),
    (6, "math.cos(math.pi / 2 * (s", "math.sin(math.pi / 2 * (s"),
    (7, "mean + std * noise", "mean + std.square() * noise"),
    (7, "z > 0, 1.0", "z >= 0, 1.0"),
    (8, "math.ceil(ratio * order", "math.floor(ratio * order"),
    (8, "if not 0 <= ratio <= 1:", "if ratio > 1:"),
    (8, "ndtri(at_low + u * (at_one - at_low))", "u"),
    (9, "torch.where(m[..., None], x_d, x_c)", "torch.where(m[..., None], x_c, x_d)"),
    (9, "(0, d_c - d_d)", "(d_c - d_d, 0)"),
    (9, "check_mask(m, x_c, x_d)", "pass"),
    (10, "m[..., None], 0.0, x_d", "m[..., None], -1.0, x_d"),
    (10, "torch.where(m[..., None], 0.0, x_d)", "x_d.mul_(~m[..., None])"),
    (11, "g_M(mask_discrete(x_d, m), y)", "g_M(x_d, y)"),
    (11, "with torch.no_grad():", "if True:"),
    (11, "torch.where(m[..., None], x_hat, x_d)", "x_hat"),
    (12, "m & (rho >= lam)", "m & (rho > lam)"),
    (12, "m & (rho >= lam)", "rho >= lam"),
    (12, "1 - step / max(steps - 1, 1)", "1 - step / steps"),
]


def source(number):
    """This repository's file of an equation."""
    return (ROOT / assignment.EQUATIONS[number].file).read_text()


def changed(number, old, new):
    """The file of an equation with `new` in place of `old` in the equation's functions."""
    text = source(number)
    for name in assignment.EQUATIONS[number].functions:
        function = assignment.function_in(ast.parse(text), name)
        right = ast.get_source_segment(text, function)
        if old in right:
            return text.replace(right, right.replace(old, new))
    raise AssertionError(f"Eq. ({number}) does not hold {old}")


def hand_in(folder, **files):
    """A submission that holds these files: mixing="text" is mixing.py."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        data = text if isinstance(text, bytes) else text.encode()
        (folder / f"{name}.py").write_bytes(data)
    return folder


def without_body(name, body):
    """mixing.py with another body of this function."""
    text = source(9)
    function = assignment.function_in(ast.parse(text), name)
    lines = text.split("\n")
    lines[function.body[0].end_lineno:function.end_lineno] = [f"    {body}"]
    return "\n".join(lines)


def passes(test):
    """Whether a test is green, or waits for another equation that is not written yet."""
    try:
        test()
    except NotImplementedError as error:
        return sound.waits_for(test.__name__, error) is not None
    except (Exception, pytest.fail.Exception):
        return False
    return True


def red_equations(among=tuple(ALL), files=tuple(FILES)):
    """Those of these equations of which at least one test that needs no fixture fails."""
    red = set()
    for file in files:
        for name, test in vars(importlib.import_module(file)).items():
            numbered = re.match(r"test_eq(\d\d)_", name)
            if not numbered or int(numbered[1]) not in among:
                continue
            if not inspect.signature(test).parameters and not passes(test):
                red.add(int(numbered[1]))
    return red


@pytest.fixture
def put_in(monkeypatch):
    """put_in(number, text) runs a file's text as the grader assembled it, in the module's place."""
    def put(number, text):
        file = assignment.EQUATIONS[number].file
        module = MODULES[file]
        fresh = types.ModuleType(module.__name__)
        fresh.__file__ = str(ROOT / file)
        exec(compile(text, file, "exec"), vars(fresh))
        for name in assignment.EQUATIONS[number].functions:
            written = getattr(fresh, name)
            # it looks names up in the module, where tests put their own in
            for helper in vars(fresh).keys() - vars(module).keys():
                monkeypatch.setattr(module, helper, getattr(fresh, helper), raising=False)
            function = types.FunctionType(written.__code__, vars(module), name,
                                          written.__defaults__)
            monkeypatch.setattr(module, name, function)
    return put


# what is handed out

@pytest.fixture(scope="module")
def handout(tmp_path_factory):
    """The folder that students get, with all equations handed out."""
    out = tmp_path_factory.mktemp("made") / "mixar"
    numbers = ",".join(map(str, assignment.EQUATIONS))
    assignment.main(["make", str(out), "--equations", numbers])
    return out


def test_what_is_handed_out_has_signatures_and_docstrings_but_no_bodies(handout):
    for number, equation in assignment.EQUATIONS.items():
        given = ast.parse((handout / equation.file).read_text())
        for name in equation.functions:
            function = assignment.function_in(given, name)
            right = assignment.function_in(ast.parse(source(number)), name)
            assert assignment.is_blank(function), name
            assert f"Eq. ({number})" in ast.unparse(function.body[-1])
            assert ast.get_docstring(function) == ast.get_docstring(right)
            assert ast.unparse(function.args) == ast.unparse(right.args)
            assert function.decorator_list == []


def test_what_is_handed_out_differs_from_the_repository_in_these_bodies_alone(handout):
    """Everything else is the repository as git tracks it, without its history and the answers."""
    given = {str(path.relative_to(handout)) for path in handout.rglob("*") if path.is_file()}
    files = set(assignment.repository())
    assert given == files | {"ASSIGNMENT.md"}
    assert not given & assignment.WITHHELD
    handed_out = {equation.file for equation in assignment.EQUATIONS.values()}
    for name in files - handed_out - {"tests/sound.py"}:
        assert (handout / name).read_bytes() == (ROOT / name).read_bytes(), name
    for number in ALL:
        file = assignment.EQUATIONS[number].file
        text = source(number)
        for other in ALL:
            if assignment.EQUATIONS[other].file == file:
                text = assignment.blanked(text, other)
        assert (handout / file).read_text() == text


def test_no_statement_of_a_solution_stands_in_what_is_handed_out(handout):
    texts = {path: path.read_text() for path in handout.rglob("*.py")}
    for number, equation in assignment.EQUATIONS.items():
        for name in equation.functions:
            function = assignment.function_in(ast.parse(source(number)), name)
            # without the docstring
            for statement in function.body[1:]:
                solution = ast.get_source_segment(source(number), statement)
                found = [path.name for path, text in texts.items() if solution in text]
                assert not found, f"{name}: {solution} is shown in {found}"


def test_tests_of_what_is_handed_out_are_collected(handout):
    """The files can be imported, and all tests can be collected, the golden ones as well."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only"]
    done = subprocess.run(command, cwd=handout, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for number in ALL:
        for file, test in assignment.tests_of(number):
            assert f"{file}::{test.name}" in done.stdout


def test_the_page_for_students_says_where_and_how_and_what_first(handout):
    page = (handout / "ASSIGNMENT.md").read_text()
    assert max(map(len, page.splitlines())) <= 100
    places = [page.index(f"| ({number}) ") for number in ALL]
    assert places == sorted(places)
    for number, equation in assignment.EQUATIONS.items():
        assert f"`eq{number:02d}`" in page
        lines = (handout / equation.file).read_text().splitlines()
        for name in equation.functions:
            line = re.search(rf"`{name}`, (\d+)", page)[1]
            assert lines[int(line) - 1].startswith(f"def {name}(")
        assert 2 <= len(equation.hints) <= 3
        for hint in equation.hints:
            assert hint.split()[0] in page


def test_the_order_puts_what_an_equation_needs_first():
    assert assignment.in_order([12, 11, 9, 5, 8]) == [8, 5, 9, 11, 12]
    assert assignment.in_order([12]) == [12]


@pytest.mark.parametrize("number", ALL)
def test_what_is_not_written_yet_turns_no_other_equation_red(put_in, number):
    """Without an equation, its own tests are red. Tests of others that run it wait for it.

    The slow tests of test_backbone.py are left out.
    """
    put_in(number, assignment.blanked(source(number), number))
    red = red_equations(files=[file for file in FILES if file != "test_backbone"])
    assert not red - {number}


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(SystemExit, match="nothing is written"):
            assignment.main(["make", str(out), "--equations", "9"])
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_an_equation_that_is_not_on_offer_is_one_line_with_the_choices(tmp_path):
    for wrong in ("13", "9,x", ""):
        with pytest.raises(SystemExit, match="choose from 3, 4, 5, 6, 7, 8, 9, 10, 11, 12$"):
            assignment.main(["make", str(tmp_path), "--equations", wrong])


def test_the_list_shows_every_function_and_the_number_of_tests(capsys):
    with pytest.raises(SystemExit):
        assignment.main(["--list"])
    shown = capsys.readouterr().out
    for number, equation in assignment.EQUATIONS.items():
        tests = len(assignment.tests_of(number))
        assert tests >= 2
        row = re.search(rf"^\({number}\) +{tests} +(.*)$", shown, re.MULTILINE)
        assert all(name in row[1] for name in equation.functions)


# a student's functions in this repository's code

def test_right_functions_are_green_in_every_equation(put_in, tmp_path):
    """The solution, assembled as a submission, leaves every equation green."""
    for number in ALL:
        text, problems = assignment.assemble(number, ROOT)
        assert problems == [OURS]
        put_in(number, text)
    assert red_equations() == set()


@pytest.mark.parametrize("number, old, new", MISTAKES)
def test_a_mistake_costs_its_own_equation_alone(put_in, tmp_path, number, old, new):
    """For the other equations of the file, the submission is as good as the right one."""
    file = assignment.EQUATIONS[number].file
    folder = hand_in(tmp_path / "student", **{file[:-3]: changed(number, old, new)})
    for other in ALL:
        if assignment.EQUATIONS[other].file == file:
            text, problems = assignment.assemble(other, folder)
            assert problems == ([] if other == number else [OURS])
            right, _ = assignment.assemble(other, ROOT)
            assert (text == right) == (other != number)
    text, _ = assignment.assemble(number, folder)
    put_in(number, text)
    assert red_equations([number]) == {number}


def test_added_imports_constants_and_functions_come_along_where_they_are_used(tmp_path, put_in):
    """They come along for the equation that uses them. What the file defines stays as it was."""
    text = without_body("dc_mix", "return chosen(x_c, x_d, m)")
    text += '''
import math, numpy as np, no_such_module
from torch import where as choose, zeros
LAST = np.newaxis
def sample_codes(): raise SystemExit
def check_mask(*_): raise SystemExit
def chosen(x_c, x_d, m):
    check_mask(m, x_c, x_d)
    return choose(m[..., LAST], x_d, x_c)
def unused(): return no_such_module
'''
    folder = hand_in(tmp_path / "student", mixing=text)
    assembled, problems = assignment.assemble(9, folder)
    assert problems == []
    assert "no_such_module" not in assembled
    assert "SystemExit" not in assembled
    assert "zeros\n" not in assembled
    put_in(9, assembled)
    assert red_equations([9]) == set()
    assert assignment.assemble(12, folder) == assignment.assemble(12, ROOT)


def test_what_cannot_be_tried_is_named(tmp_path):
    """A missing or unreadable file, a missing or blank function, other arguments each say so."""
    right = source(9)
    cases = {
        "missing is no folder": None,
        "mixing.py is missing": {},
        "mixing.py does not parse (line 3)": {"mixing": "x = 1\n\ndef dc_mix(:\n"},
        "mixing.py does not parse (line 2)": {"mixing": "x = 1\nbreak\n"},
        "mixing.py does not parse (line 1)": {"mixing": bytes(range(256))},
        "(unicode error)": {"mixing": "x = 'caf\u00e9'".encode("latin-1")},
        "function dc_mix is missing": {"mixing": right.replace("def dc_mix(", "def dcmix(")},
        "signature changed: dc_mix(x_c, x_d, mask) should be dc_mix(x_c, x_d, m)":
            {"mixing": right.replace("def dc_mix(x_c, x_d, m)", "def dc_mix(x_c, x_d, mask)")},
        "not attempted: dc_mix": {"mixing": assignment.blanked(right, 9)},
    }
    for i, (expected, files) in enumerate(cases.items()):
        folder = tmp_path / str(i)
        if files is None:
            folder = tmp_path / "missing"
        else:
            hand_in(folder, **files)
        text, problems = assignment.assemble(9, folder)
        assert expected in problems[-1], problems
        # the other function of the equation can be tried where the file can be read
        assert (text is not None) == expected.startswith(("function", "signature"))


def test_annotations_and_decorators_are_no_change_of_the_signature(tmp_path):
    text = source(11).replace(
        "def predict_masked(g_M, x_d, m, y, u):",
        "@torch.no_grad()\ndef predict_masked(g_M, x_d: torch.Tensor, m, y, u) -> None:")
    assembled, problems = assignment.assemble(11, hand_in(tmp_path / "student", mixing=text))
    assert problems == []
    assert "@torch.no_grad()\ndef predict_masked(g_M, x_d, m, y, u):" in assembled


def test_a_file_that_does_not_parse_costs_the_equations_of_that_file(tmp_path):
    folder = hand_in(tmp_path / "student", mixing="def", diffusion_head=source(5))
    assert assignment.assemble(5, folder) == assignment.assemble(5, ROOT)
    assert assignment.assemble(9, folder)[0] is None


# grading

@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """The rows of marks.csv and the feedback of a class, all graded by one command."""
    place = tmp_path_factory.mktemp("class")
    endless = "while True: print('6 passed ' * 9999)"
    submissions = [
        hand_in(place / "one" / "mixar", mixing=source(11)),
        hand_in(place / "two" / "mixar" / "by" / "zip",
                mixing=changed(11, "_d, m), y)", "_d, ~m), y)")).parent.parent,
        hand_in(place / "exits", mixing=without_body("predict_masked", "import os; os._exit(0)")),
        hand_in(place / "prints", mixing=without_body("predict_masked", endless)),
        hand_in(place / "binary", mixing=bytes(range(256))),
        place / "nowhere",
    ]
    table = place / "marks" / "marks.csv"
    words = ["grade", *map(str, submissions), "--csv", str(table), "--equations", "11"]
    before = {path: path.read_bytes() for path in place.rglob("*.py")}
    assignment.main(words)
    assert before == {path: path.read_bytes() for path in place.rglob("*") if path.suffix == ".py"}
    rows = [line.split(",") for line in table.read_text().splitlines()]
    return rows, {path.name: path.read_text() for path in (table.parent / "feedback").iterdir()}




def test_marks_are_a_row_each_and_feedback_a_file_each(graded):
    """Folders of one name are told apart. Whatever a submission does costs that submission.

    Three tests of Eq. (11) are green before a student has begun, so they give no points.
    """
    rows, feedback = graded
    assert rows[0] == ["name", "eq11", "total"]
    marks = {name: float(points) for name, points, _ in rows[1:]}
    names = [name for name in marks]
    assert [name.rpartition("-")[2] for name in names] == [
        "mixar", "mixar", "exits", "prints", "binary", "nowhere"]
    assert names[0].endswith("one-mixar") and names[1].endswith("two-mixar")
    assert set(feedback) == {f"{name}.txt" for name in names}
    assert marks.pop(names[0]) == 1
    assert 0 < marks.pop(names[1]) < 1
    assert set(marks.values()) == {0}


@pytest.mark.parametrize("student, line", [
    ("one-mixar", "7 of 7 tests are green"),
    ("one-mixar", OURS),
    ("two-mixar", "Eq. (11): g_M is given the class and X_d' of Eq. (10)"),
    ("exits", "the program ended before its tests did"),
    ("prints", "prints or writes without end"),
    ("binary", "mixing.py does not parse"),
    ("nowhere", "nowhere is no folder"),
])
def test_feedback_says_what_happened(graded, student, line):
    _, feedback = graded
    pages = [page for name, page in feedback.items() if name.endswith(f"{student}.txt")]
    assert line in pages[0]


def runs(process):
    """Whether the process of this number is there and has not ended."""
    try:
        status = Path("/proc", process, "stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def test_what_does_not_end_is_ended_with_all_that_it_started(tmp_path):
    """No process of the submission is left, and the limit is what it costs."""
    body = "import os; os.fork() or os.setsid()\n"
    body += f"    open(f'{tmp_path}/{{os.getpid()}}', 'w')"
    body += "\n    while True: pass"
    folder = hand_in(tmp_path / "student", mixing=without_body("mask_discrete", body))
    start = time.monotonic()
    points, feedback = assignment.grade_equation(10, folder, ["one"], 4)
    assert time.monotonic() - start < 20
    assert points == 0
    assert feedback[-1] == "no end within 4 s"
    started = [path.name for path in tmp_path.iterdir() if path.is_file()]
    last = time.monotonic() + 10
    while any(map(runs, started)) and time.monotonic() < last:
        time.sleep(0.1)
    assert not any(map(runs, started))


def test_names_of_submissions_are_distinct_and_fit_for_files_and_tables():
    """Case does not tell names apart, since it does not on every disk."""
    for given, expected in [
        (["/s/ann", "/s/bob", "/s/ann/"], ["ann", "bob"]),
        (["/ann/mixar", "/bob/mixar"], ["ann-mixar", "bob-mixar"]),
        (["/1/ann", "/2/Ann"], ["1-ann", "2-Ann"]),
        (["/s/=a,b\n"], ["_a_b_"]),
    ]:
        assert list(assignment.named(map(Path, given))) == expected
    alike = assignment.named([Path("/s/a b"), Path("/s/a_b"), Path("/s-a/b")])
    assert len(alike) == 3


def test_a_table_of_marks_is_not_written_over(tmp_path):
    (tmp_path / "marks.csv").write_text("name,total\n")
    with pytest.raises(SystemExit, match="marks.csv is there already: choose another --csv"):
        assignment.main(["grade", str(tmp_path), "--csv", str(tmp_path / "marks.csv")])
    assert (tmp_path / "marks.csv").read_text() == "name,total\n"


def test_a_table_inside_a_submission_is_refused(tmp_path):
    folder = hand_in(tmp_path / "student")
    (tmp_path / "link").symlink_to(folder)
    for place in (folder, tmp_path / "link" / "new"):
        with pytest.raises(SystemExit, match="would lie inside"):
            assignment.main(["grade", str(folder), "--csv", str(place / "marks.csv")])
    assert list(folder.iterdir()) == []
