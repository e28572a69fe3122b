"""docs/findings.md shows what assets/findings.json holds; the programs know the plan's flags."""
import json

import pytest

import fid
import findings
import sample
import train


def test_the_page_shows_the_tables_of_the_raw_results():
    page = (findings.ROOT / "docs" / "findings.md").read_text()
    entries = json.loads(findings.RESULTS.read_text())
    for name, table in findings.tables(entries).items():
        assert table in page, f"{name}: python tests/findings.py tables prints\n{table}"


def test_cells_hold_mean_and_standard_deviation():
    assert findings.cell([]) == ""
    assert findings.cell([1.234]) == "1.23"
    assert findings.cell([1.0, 2.0, 4.5]) == "2.50 ± 1.80"


def test_reconstructions_are_told_from_samples():
    """fid.py --rfd reports a run's samples first, then both reconstructions of the pictures."""
    samples = dict(source="runs0/shapes-dcmix", FD=3.0)
    vae = dict(source="shapes reconstructed by the vae of runs0/shapes-dcmix", FD=1.0)
    vq = dict(source="shapes reconstructed by the vq of runs0/shapes-dcmix", FD=2.0)
    entries = [dict(data="shapes", seed=0, key="dcmix", results=[samples, vae, vq])]
    assert findings.found(entries, "shapes", "dcmix") == [3.0]
    assert findings.found(entries, "shapes", "vae") == [1.0]
    assert findings.found(entries, "shapes", "vq") == [2.0]
    assert findings.found(entries, "fashion-mnist", "vq") == []


@pytest.mark.parametrize("data", findings.DATA)
def test_the_plan_is_understood(data):
    """Every command parses, what is sampled was trained before, what is scored was sampled."""
    plan = findings.plan(data, 1)
    assert len({key for key, _ in plan}) == len(plan)
    made = set()
    for _, commands in plan:
        for program, *arguments in commands:
            if program == "fid.py":
                assert fid.parse(arguments).pictures in made
            elif program == "sample.py":
                args = sample.parse(arguments)
                assert args.run in made
                made.add(args.out)
            else:
                if program == "tests/ti_train.py":
                    # the name of a reading
                    del arguments[0]
                made.add(train.parse(arguments).out)


@pytest.mark.parametrize("data", findings.DATA)
def test_seed_0_trains_the_classifier_first(data):
    """The first score of seed 0 names no features file, so it trains one; all others name it."""
    scores = []
    for _, commands in findings.plan(data, 0):
        scores += [command for command in commands if command[0] == "fid.py"]
    assert "--features" not in scores[0]
    assert scores[0][1] == f"runs0/{data}-dcmix"
    for command in scores[1:]:
        assert command[command.index("--features") + 1] == f"runs0/{data}/classifier.pt"
