"""Tests that the code stays readable. A failing test names the file, the line and what to do."""
import ast
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["tokenizers", "disk", "dataset", "mixing", "diffusion_head", "backbone", "checkpoint",
         "train", "output", "sample", "stages", "features", "fid"]
CODE = [ROOT / f"{name}.py" for name in NAMES]
TEXTS = [*CODE, ROOT / "README.md", *ROOT.glob("tests/*.py"), *ROOT.glob("docs/*.md")]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
LAYOUT = ("COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENCODING", "ENDMARKER")
PAPER = ["tokenizers", "mixing", "diffusion_head", "backbone", "train", "sample", "fid"]
MOST_LINES = 500
MOST_TOKENS_OF_PAPER = 19_100
MOST_TOKENS = 32_900
each_file = pytest.mark.parametrize("path", CODE, ids=NAMES)


def tokens_of_lines(path):
    """{line: number of its names, operators, numbers and strings}. Docstrings do not count."""
    tokens = {}
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if tokenize.tok_name[token.type] not in LAYOUT:
                tokens[token.start[0]] = tokens.get(token.start[0], 0) + 1
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node):
            for line in range(node.body[0].lineno, node.body[0].end_lineno + 1):
                tokens.pop(line, None)
    return tokens


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_no_line_has_more_than_100_columns(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert len(line) <= 100, f"{path.name}:{number} has {len(line)} columns: break the line"


@each_file
def test_files_are_short_and_a_line_holds_one_idea(path):
    lines = len(path.read_text().splitlines())
    assert lines <= MOST_LINES, f"{path.name} has {lines} lines: take something away"
    tokens = tokens_of_lines(path)
    mean = round(sum(tokens.values()) / len(tokens), 1)
    densest = max(tokens, key=tokens.get)
    assert mean <= 12.5, f"{path.name}:{densest} is the densest line, the mean {mean}: split lines"


def test_all_files_together_are_short():
    tokens = {path.stem: sum(tokens_of_lines(path).values()) for path in CODE}
    total = sum(tokens.values())
    assert total <= MOST_TOKENS, f"all files have {total} tokens: take something away"
    paper = sum(tokens[name] for name in PAPER)
    assert paper <= MOST_TOKENS_OF_PAPER, f"the paper's files have {paper} tokens"


@each_file
def test_statements_are_plain(path):
    for node in ast.walk(ast.parse(path.read_text())):
        place = f"{path.name}:{node.lineno}" if isinstance(node, ast.stmt) else path.name
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 50, f"{place} has over 50 lines: split it"
        if isinstance(node, ast.Assign):
            assert not isinstance(node.value, ast.Lambda), f"{place} names a lambda: write a def"
            if isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple):
                assert len(node.value.elts) < 3, f"{place} packs values: one assignment a line"
