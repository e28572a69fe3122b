"""The assignment kit: equations handed out as exercises, and what comes back graded.

    python tests/assignment.py --list
    python tests/assignment.py make OUT --equations 8,9,11,12,5
    python tests/assignment.py grade SUBMISSION... --csv marks.csv --equations 8,9,11,12,5

`make` writes a copy of the repository without the bodies of these equations' functions.
`grade` puts what a student wrote for one equation, alone, into a copy of this repository. So one
mistake costs one equation. It runs the equation's tests there, in a process of its own.

This is not a sandbox. Students' code runs as you and can do whatever you can. Limits of time,
memory and file size stop accidents, not malice. Linux or macOS is needed.
"""
import argparse
import ast
import copy
import contextlib
import errno
import functools
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
# Students do not get these: they hold the solutions, or versions one change away from them.
WITHHELD = {"tests/assignment.py", "tests/test_assignment.py", "tests/test_planted.py",
            "tests/ti_train.py"}
QUIET = ["-q", "-p", "no:cacheprovider", "--tb=line", "--show-capture=no"]
LARGEST_FILE = 16 * 2 ** 20
LARGEST_MEMORY = 4 * 2 ** 30


@dataclass
class Equation:
    """What is handed out of an equation.

    needs: the equations whose functions its tests run as well
    """
    title: str
    file: str
    functions: list
    hints: list
    needs: tuple = ()


EQUATIONS = {
    3: Equation("the prior's loss", "train.py", ["training_mask", "code_loss"], [
        "One u sets the share of hidden codes of an image. Each code has a second u of its own.",
        "The share is acos(u) / (pi / 2). It lacks two axes to be compared with (B, N, S).",
        "torch has a cross-entropy that smooths labels. It wants one row of logits for each code.",
    ]),
    4: Equation("drawing X_d", "sample.py", ["prior_cfg_at", "least_certain"], [
        "The guidance rises along half a wave of a cosine. The power bends the time i / steps.",
        "Codes that were kept before stay. Give them a score that no threshold reaches.",
        "k is acos(done) / (pi / 2) of all codes of an image, rounded down, then bounded on both "
        "sides. The k-th lowest score of an image is its threshold.",
    ]),
    5: Equation("the diffusion loss", "diffusion_head.py", ["add_noise", "denoising_loss"], [
        "The token shrinks as the noise grows, so that the variance of their sum stays 1.",
        "c holds both factors for every timestep. `at` looks them up and adds the channels' axis.",
        "The loss has one value for each token, so the mean is over the last axis alone.",
    ], needs=(7, 8)),
    6: Equation("how many tokens a step draws", "sample.py", ["hidden_after"], [
        "The share of hidden tokens falls along a quarter of a cosine, from 1 to 0.",
        "Steps count from 0. After step s, s + 1 steps are done. Round down.",
        "Every step draws at least one token, and at least one is left for the last step.",
    ]),
    7: Equation("the two kinds of tokens", "tokenizers.py", ["reparameterize", "quantise"], [
        "Any normal distribution is the standard normal one, scaled and shifted.",
        "std is the deviation: not the variance, and not a logarithm.",
        "torch's sign has three values, a bit has two. The docstring says what zero becomes.",
    ]),
    8: Equation("which positions are masked", "mixing.py", ["mask_ratio", "sample_mask"], [
        "`hide` does most of sample_mask. What is left to find is how many positions it hides.",
        "r N need not be whole: see the docstring. Refuse an r outside [0, 1], nan as well.",
        "mask_ratio: ndtr is the standard normal distribution function, ndtri its inverse. u "
        "chooses a height between the values of ndtr at both ends of the cut. Invert that.",
    ], needs=(7,)),
    9: Equation("discrete tokens where masked", "mixing.py", ["pad", "dc_mix"], [
        "dc_mix makes a choice for every token, so m needs one more axis, that of the channels.",
        "`check_mask` refuses what does not fit. Make a new tensor: the inputs are used later.",
        "pad: the bits come first, zeros follow. Too many bits are an error with both numbers.",
    ]),
    10: Equation("the discrete mask token", "mixing.py", ["mask_discrete"], [
        "It is the choice of Eq. (9), with a constant in the place of one sequence.",
        "Every bit of the mask token is 0, which is neither -1 nor +1.",
        "`check_mask` refuses what does not fit. Make a new tensor: x_d is used later.",
    ]),
    11: Equation("g_M predicts what is masked", "mixing.py", ["predict_masked"], [
        "There are three parts: what g_M sees, codes drawn from its logits, a choice as in (9).",
        "g_M must not see what it predicts. It is not trained here, so it needs no gradient.",
        "`sample_codes` draws, `tokenizers.codes_to_bits` writes bits. How many bits a group "
        "has follows from the shapes of x_d and of the logits.",
    ], needs=(10,)),
    12: Equation("part truth, part predicted", "mixing.py", ["ti_mix", "ti_lambda"], [
        "Where is a predicted token taken? Two conditions must hold together.",
        "Mind rho = lambda. rho and m decide over whole tokens, so they need the channels' axis.",
        "Refuse shapes that do not fit and any lambda outside [0, 1]. ti_lambda is a straight "
        "line through two points, and a run of one step must not divide by zero.",
    ], needs=(7, 8, 10, 11)),
}


# The equations

def word(number):
    """The word by which pytest's -k finds the tests of an equation."""
    return f"eq{number:02d}"


def in_order(numbers):
    """The equations, each after those that it needs."""
    left = sorted(numbers)
    ordered = []
    while left:
        ready = [number for number in left if not set(EQUATIONS[number].needs) & set(left)]
        ordered.append(ready[0])
        left.remove(ready[0])
    return ordered


@functools.cache
def tree_of(name):
    """A file of the repository as a syntax tree."""
    return ast.parse((ROOT / name).read_text())


def tests_of(number):
    """[(file, function)] of an equation's tests. The file that says most about it comes first."""
    tests = []
    for name in repository():
        if name.startswith("tests/test_"):
            functions = [node for node in tree_of(name).body if isinstance(node, ast.FunctionDef)]
            prefix = f"test_{word(number)}_"
            tests += [(name, test) for test in functions if test.name.startswith(prefix)]
    own = f"tests/test_{EQUATIONS[number].file}"
    names = [name for name, _ in tests]
    return sorted(tests, key=lambda test: (test[0] != own, -names.count(test[0])))


def listing():
    """The equations on offer as a table in plain text."""
    rows = ["equation   tests   functions"]
    for number, equation in EQUATIONS.items():
        tests = len(tests_of(number))
        places = [f"{equation.file[:-3]}.{name}" for name in equation.functions]
        rows.append(f"{f'({number})':<8}{tests:>8}   {', '.join(places)}")
    return "\n".join(rows)


# A copy without the solutions

@functools.cache
def repository():
    """The names of the files that git tracks here, those that are withheld left out."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit(f"git does not list the files of {ROOT}: the kit needs a clone") from None
    names = [name for name in listed.split("\0") if (ROOT / name).is_file()]
    return [name for name in names if name not in WITHHELD]


def copy_repository(folder):
    """Copy the files of the repository to this folder."""
    for name in repository():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)


def function_in(tree, name):
    """The top-level function of that name, the last if there are several, or None."""
    found = None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            found = node
    return found


def blanked(text, number):
    """The text of the equation's file without the bodies of its functions."""
    for name in EQUATIONS[number].functions:
        function = function_in(ast.parse(text), name)
        lines = text.split("\n")
        body = slice(function.body[0].end_lineno, function.end_lineno)
        lines[body] = [f'    raise NotImplementedError("Eq. ({number}): write {name}")']
        text = "\n".join(lines)
    return text


def unsound(text, numbers):
    """The text of tests/sound.py, in which these equations are the students' own.

    The tests of an equation run on sound versions of the others, which would show a solution.
    """
    lines = text.split("\n")
    for node in reversed(ast.parse(text).body):
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            note = node.decorator_list[0]
            if isinstance(note, ast.Call) and note.args[0].value in numbers:
                own = f"{node.name} = {ast.unparse(note.args[1])}.{node.name}"
                lines[note.lineno - 1:node.end_lineno] = [own]
    return "\n".join(lines)


def make(args):
    """Write the folder that students get."""
    out = args.out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SystemExit(f"{out} exists and is not an empty folder: nothing is written")
    copy_repository(out)
    for number in args.equations:
        path = out / EQUATIONS[number].file
        path.write_text(blanked(path.read_text(), number))
    sound = out / "tests" / "sound.py"
    sound.write_text(unsound(sound.read_text(), args.equations))
    (out / "ASSIGNMENT.md").write_text(assignment(args.equations, out))
    numbers = ", ".join(f"({number})" for number in args.equations)
    print(f"{out} holds Eqs. {numbers}; {out / 'ASSIGNMENT.md'} tells students what to do")


ASSIGNMENT = """\
# Assignment

The functions below have lost their bodies. Write them again from the paper and from their
docstrings. The order is one in which they can be worked.

{table}

## How to test

`python -m pytest -q -k {word}` runs the tests of one equation. The docstring of a red test says
what the equation asks for. A test that also runs another equation, which is not written yet, is
skipped: it waits for that one.

## What is allowed

- Names and arguments of the functions stay as they are.
- You may add functions, constants and imports to the same file, but no `import *`.
- You may call every function of the repository. Changes in other functions do not count.

## How it is marked

Each equation is put alone into right code: a mistake in one costs no points in another. Only a file
that does not parse costs all its equations. Points are the share of green tests among those that
are red now. Hand in this folder, or only
{files}.

## Hints

The hints of an equation say more and more. Read one, then try again.
"""


def assignment(numbers, folder):
    """The text of ASSIGNMENT.md for the equations handed out in this folder."""
    rows = ["| equation | file | function, line | tests |", "| --- | --- | --- | --- |"]
    hints = []
    for number in numbers:
        equation = EQUATIONS[number]
        tree = ast.parse((folder / equation.file).read_text())
        lines = [f"`{name}`, {function_in(tree, name).lineno}" for name in equation.functions]
        title = f"({number}) {equation.title}"
        rows.append(f"| {title} | `{equation.file}` | {'; '.join(lines)} | `{word(number)}` |")
        hints.append(f"\n### Eq. {title}\n\n")
        for i, hint in enumerate(equation.hints, 1):
            hints.append(textwrap.fill(f"{i}. {hint}", 100, subsequent_indent="   ") + "\n")
    files = sorted({f"`{EQUATIONS[number].file}`" for number in numbers})
    page = ASSIGNMENT.format(table="\n".join(rows), word=word(numbers[0]), files=", ".join(files))
    return page + "".join(hints)


# A student's functions in this repository's code

def parse(path):
    """A student's file -> (its tree, ""), or (None, what is wrong with it)."""
    try:
        if not path.is_file():
            if not path.parent.is_dir():
                return None, f"{path.parent} is no folder"
            return None, f"{path.name} is missing"
        if path.stat().st_size > LARGEST_FILE:
            return None, f"{path.name} is too large"
        source = path.read_bytes()
        compile(source, path.name, "exec", dont_inherit=True)
        tree = ast.parse(source)
        # what is nested too deeply to be written again is refused here
        ast.unparse(tree)
        return tree, ""
    except SyntaxError as error:
        # a file with null bytes has no lines
        return None, f"{path.name} does not parse (line {error.lineno or 1}): {error.msg}"
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        return None, f"{path.name} cannot be read: {error!r}"


def signature(function):
    """The name and the arguments of a function, without annotations."""
    arguments = copy.deepcopy(function.args)
    for node in ast.walk(arguments):
        if isinstance(node, ast.arg):
            node.annotation = None
    return f"{function.name}({ast.unparse(arguments)})"


def is_blank(function):
    """Whether a function's body is what it was when it was handed out."""
    first, *rest = function.body
    last = rest[-1] if rest else first
    is_raise = isinstance(last, ast.Raise) and "NotImplementedError" in ast.unparse(last)
    return is_raise and len(rest) < 2


def fault(function, right):
    """Why a student's function cannot be tried in the place of the right one, or ""."""
    if function is None:
        return f"function {right.name} is missing"
    if signature(function) != signature(right):
        return f"signature changed: {signature(function)} should be {signature(right)}"
    if is_blank(function):
        return f"not attempted: {right.name}"
    return ""


def names_bound(statement):
    """The names that a function, class, import or plain assignment at the top level defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name.partition(".")[0] for alias in statement.names}
    if isinstance(statement, ast.Assign):
        return {target.id for target in statement.targets if isinstance(target, ast.Name)}
    return set()


def one_by_one(statements):
    """The statements, with an import of several names taken apart."""
    for statement in statements:
        if not isinstance(statement, (ast.Import, ast.ImportFrom)):
            yield statement
            continue
        for alias in statement.names:
            single = copy.copy(statement)
            single.names = [alias]
            yield single


def additions(student, teacher, functions):
    """The imports, constants and functions of a student's file that these functions use.

    A name that the teacher's file defines keeps the teacher's meaning.
    """
    ours = set().union(*map(names_bound, teacher.body))
    theirs = [node for node in one_by_one(student.body) if not names_bound(node) & ours]
    taken = []
    todo = list(functions)
    while todo:
        nodes = ast.walk(todo.pop())
        used = {node.id for node in nodes if isinstance(node, ast.Name)}
        more = [node for node in theirs if names_bound(node) & used and node not in taken]
        taken += more
        todo += more
    return [node for node in theirs if node in taken]


def assemble(number, submission):
    """This repository's file of an equation with a student's functions in it.

    Returns its text, None if there is nothing to run, and a list of what is wrong.
    """
    equation = EQUATIONS[number]
    teacher = ast.parse(blanked((ROOT / equation.file).read_text(), number))
    student, problem = parse(submission / equation.file)
    if problem:
        return None, [problem]
    ours = ast.parse((ROOT / equation.file).read_text())

    def is_ours(function):
        return ast.unparse(function) == ast.unparse(function_in(ours, function.name))

    problems = []
    written = []
    for name in equation.functions:
        function = function_in(student, name)
        right = function_in(teacher, name)
        problem = fault(function, right)
        if problem:
            problems.append(problem)
            continue
        written.append(function)
        teacher.body[teacher.body.index(right)] = function
    if not written:
        return None, problems
    if not problems and all(map(is_ours, written)):
        problems = ["word for word as in this repository: was it handed out?"]
    for function in written:
        function.args = function_in(ours, function.name).args
        function.returns = None
    teacher.body += additions(student, teacher, written)
    return ast.unparse(teacher), problems


# The tests

def limit_resources(seconds):
    """Limits of the process that calls this, and of all that it starts."""
    limits = {
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_CPU: int(2 * seconds) + 1,
        resource.RLIMIT_DATA: LARGEST_MEMORY,
        resource.RLIMIT_FSIZE: LARGEST_FILE,
    }
    for kind, most in limits.items():
        _, hard = resource.getrlimit(kind)
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(kind, (most, most))


def run_tests(numbers, file, text, seconds):
    """Run these equations' tests in a copy of the repository whose `file` holds this text.

    Returns {test: why it is red, or "" if it is green} of the tests that ran, and what kept the
    others from running, or "".
    """
    with tempfile.TemporaryDirectory(prefix="grading-", ignore_cleanup_errors=True) as box:
        code = Path(box) / "code"
        report = Path(box) / "report.xml"
        copy_repository(code)
        (code / file).write_text(text)
        words = " or ".join(map(word, numbers))
        files = dict.fromkeys(name for number in numbers for name, _ in tests_of(number))
        command = [sys.executable, "-m", "pytest", *QUIET, "-k", words, f"--junitxml={report}"]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTEST_ADDOPTS": "",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": box,
        }
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                [*command, *files], cwd=code, env=environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output, start_new_session=True,
                preexec_fn=functools.partial(limit_resources, seconds))
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                return {}, f"no end within {seconds:g} s"
            finally:
                end_all(process, box)
            try:
                # what students print stands in the output, not in the report
                return read_report(ElementTree.parse(report))
            except (OSError, ElementTree.ParseError):
                output.seek(0)
                *_, last = ["", *output.read().decode(errors="replace").splitlines()]
                return {}, f"the program ended before its tests did: {last[:200]}"


def end_all(process, box):
    """End a process and all that it started: its group, and who left the group but has its TMPDIR.

    Where there is no /proc, as on macOS, who left the group goes on until its time is up.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"TMPDIR={box}".encode() in environment.read_bytes():
                os.kill(int(environment.parent.name), signal.SIGKILL)


def read_report(report):
    """What pytest's report says, in the form of run_tests."""
    results = {}
    for case in report.iter("testcase"):
        name = f"{case.get('classname')}.{case.get('name')}"
        red = [child for child in case if child.tag in ("failure", "error", "skipped")]
        if red and red[0].get("message") == "collection failure":
            return {}, f"the file cannot be imported: {(red[0].text or '')[-200:]}"
        if red:
            why = (red[0].get("message") or red[0].tag).splitlines()[0][:200]
            too_large = os.strerror(errno.EFBIG)
            results[name] = "it prints or writes without end" if too_large in why else why
        else:
            results.setdefault(name, "")
    return results, ""


def expected_tests(numbers, seconds):
    """{equation: its tests that decide}: green for this repository, red for what students get.

    SystemExit if this repository itself is red.
    """
    first = EQUATIONS[numbers[0]].file
    own, problem = run_tests(numbers, first, (ROOT / first).read_text(), seconds * len(numbers))
    expected = {}
    for number in tqdm(numbers, desc="tests that decide", unit="equation", disable=None):
        tests = [test for test in own if f".test_{word(number)}_" in test]
        red = [test for test in tests if own[test]]
        if red or not tests:
            why = red or problem or "no test ran"
            raise SystemExit(f"Eq. ({number}) of this repository is not green: {why}")
        file = EQUATIONS[number].file
        blank = blanked((ROOT / file).read_text(), number)
        results, problem = run_tests([number], file, blank, seconds)
        expected[number] = [test for test, why in results.items() if why and test in tests]
        if not expected[number]:
            raise SystemExit(f"no test notices that Eq. ({number}) is missing: {problem}")
    return expected


# The marks

def docstring_of(number, test):
    """The docstring of a test, given as in run_tests."""
    name = test.partition("[")[0].rpartition(".")[2]
    found = [function for _, function in tests_of(number) if function.name == name]
    return ast.get_docstring(found[0]) or ""


def grade_equation(number, submission, expected, seconds):
    """(points, lines of feedback) of one equation of one submission.

    expected: the tests that decide. Points are the share of them that is green.
    """
    text, feedback = assemble(number, submission)
    if text is None:
        return 0.0, feedback
    results, problem = run_tests([number], EQUATIONS[number].file, text, seconds)
    red = [test for test in expected if results.get(test) != ""]
    points = round(1 - len(red) / len(expected), 2)
    feedback.append(f"{len(expected) - len(red)} of {len(expected)} tests are green")
    if problem:
        return points, [*feedback, problem]
    for test in red:
        why = results.get(test, "it did not run to its end")
        if not why.startswith("NotImplementedError"):
            feedback += [f"red: {test}", docstring_of(number, test), f"pytest says: {why}"]
            break
    return points, feedback


def named(submissions):
    """{name: folder}. The names are fit for a file, a table and a screen.

    Folders of one name are told apart by the folders they lie in, or else by numbers.
    """
    folders = list(dict.fromkeys(path.resolve() for path in submissions))
    for parts in range(1, 99):
        paths = ["-".join(folder.parts[-parts:]) for folder in folders]
        names = [re.sub(r"[^\w.-]", "_", path) for path in paths]
        if len({name.casefold() for name in names}) == len(folders):
            return dict(zip(names, folders))
    return {f"{name}-{i}": folder for i, (name, folder) in enumerate(zip(names, folders), 1)}


def write_whole(path, lines):
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8", errors="backslashreplace")
    os.replace(partial, path)


def unpacked(folder):
    """The folder, or the only one in it, and so on: unpacking often adds a folder around all."""
    while folder.is_dir():
        inside = list(folder.iterdir())
        if len(inside) != 1 or not inside[0].is_dir():
            break
        folder = inside[0]
    return folder


def grade(args):
    """Grade all submissions: a line each on the screen, a table, and a file of feedback each.

    Below a line stands what kept an equation from being tried.
    """
    submissions = named(args.submissions)
    table = args.csv.resolve()
    if table.exists():
        raise SystemExit(f"{table} is there already: choose another --csv")
    feedback = table.parent / "feedback"
    for folder in submissions.values():
        for place in (table, feedback.resolve()):
            if place.is_relative_to(folder):
                raise SystemExit(f"{place} would lie inside the submission {folder}")
    expected = expected_tests(args.equations, args.seconds)
    table_lines = [",".join(["name", *map(word, expected), "total"])]
    bar = tqdm(total=len(submissions) * len(expected), unit="equation", disable=None)
    for name, folder in submissions.items():
        marks = {}
        remarks = []
        page = [f"{name}: {folder}"]
        for number, tests in expected.items():
            points, lines = grade_equation(number, unpacked(folder), tests, args.seconds)
            marks[number] = points
            if not lines[0].endswith("are green"):
                remarks.append(f"    ({number}) {lines[0]}")
            page += ["", f"Eq. ({number}) {EQUATIONS[number].title}: {points:g}", *lines]
            bar.update()
        total = sum(marks.values())
        shown = "  ".join(f"({number}) {points:.2f}" for number, points in marks.items())
        bar.write(f"{name:<20} {shown}  total {total:.2f} of {len(marks)}")
        for remark in remarks:
            bar.write(remark)
        table_lines.append(",".join([name, *map(str, marks.values()), f"{total:.2f}"]))
        write_whole(feedback / f"{name}.txt", page)
        write_whole(table, table_lines)
    bar.close()
    print(f"marks: {table}; feedback to each student: {feedback}")


# The command line

def equations(text):
    """Numbers with commas between -> the equations in the order of work."""
    numbers = {entry.strip() for entry in text.split(",")}
    unknown = numbers - set(map(str, EQUATIONS))
    if unknown:
        choices = ", ".join(map(str, EQUATIONS))
        raise SystemExit(f"no equation {', '.join(sorted(unknown))}: choose from {choices}")
    return in_order(map(int, numbers))


def main(argv=None):
    warnings.simplefilter("ignore", SyntaxWarning)
    # resource limits are set between fork and exec, where no other thread may run
    tqdm.monitor_interval = 0
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True)
    maker = commands.add_parser("make", help="write the folder that students get",
                                formatter_class=raw)
    maker.add_argument("out", type=Path, metavar="OUT")
    maker.set_defaults(command=make)
    grader = commands.add_parser("grade", help="grade what students hand in",
                                 formatter_class=raw)
    grader.add_argument("submissions", type=Path, nargs="+", metavar="SUBMISSION",
                        help="a student's copy of the folder, or a folder of the changed files")
    grader.add_argument("--csv", type=Path, required=True,
                        help="the table of marks; feedback/NAME.txt is written beside it")
    grader.add_argument("--seconds", type=float, default=60.0,
                        help="how long the tests of one equation may take (default 60)")
    grader.set_defaults(command=grade)
    for each in (maker, grader):
        each.add_argument("--equations", type=equations, default="8,9,11,12,5",
                          help="numbers with commas between (default 8,9,11,12,5)")
    for each in (parser, maker):
        # argparse prints such a text and ends, whatever else is missing
        each.add_argument("--list", action="version", version=listing(),
                          help="show the equations on offer and end")
    args = parser.parse_args(argv)
    args.command(args)


if __name__ == "__main__":
    main()
