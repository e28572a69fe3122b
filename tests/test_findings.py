"""The README's tables are those of assets/findings.json, and the plan's commands are ones that the programs understand."""
import json

import pytest

import fid
import findings
import train


def test_readme_shows_the_tables_of_the_raw_results():
    readme = (findings.ROOT / "README.md").read_text()
    for name, table in findings.tables(json.loads(findings.RESULTS.read_text())).items():
        assert table in readme, f"{name}: python tests/findings.py tables prints\n{table}"


def test_cells_hold_mean_and_standard_deviation():
    assert findings.cell([]) == "" and findings.cell([1.234]) == "1.23" and findings.cell([1.0, 2.0, 4.5]) == "2.50 ± 1.80"


@pytest.mark.parametrize("data", ["shapes", "fashion-mnist"])
def test_the_plan_is_understood(data):
    """Every command parses; every run that is scored is trained before, and no key stands twice."""
    plan, trained = findings.plan(data, 1), set()
    assert not any("--features" in command for _, command in findings.plan(data, 0)), "nobody has trained the classifier before seed 0"
    assert len({key for key, _ in plan}) == len(plan)
    for key, (program, *arguments) in plan:
        if program != "fid.py":
            args = train.parse(arguments)
            trained.add(args.out or f"runs1/{data}-{args.guidance}")
        else:
            assert fid.parse(arguments).pictures in trained
