"""The paper's findings, run again at small scale: Tables 1 and 2, Figs. 7 and 8, and how few steps do.

`plan` lists every command behind a number of the README. `run` carries them out for one data set and one seed and keeps each
report as runsSEED/findings/KEY.json; `collect` gathers them into assets/findings.json with command, seed, commit, hardware and
date; `tables` turns that file into the README's tables, which test_findings.py compares with the README.

Try: python tests/findings.py run shapes 0 --only dcmix      (one row; without --only all of them, hours)
     python tests/findings.py tables
"""
import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import fid
import sample

RESULTS = ROOT / "assets" / "findings.json"
FASHION = "/usr/share/datasets/fashion-mnist"                                # Debian's package dataset-fashion-mnist
METHODS = ("none", "dcmix", "dcsa", "dcca")
AR_STEPS, DIFFUSION_STEPS, ANNEALED = (1, 2, 4, 8, 16, 32, 64), (5, 10, 15, 25, 50, 100), ("15:5", "25:10", "50:10")
# guidance and temperature, chosen for each method on 1,000 validation pictures (of shapes, of fashion-mnist's train split), seed 0; else the run's
SETTINGS = {"shapes": dict(none="--cfg 2.5 --temperature 0.5", guided="--prior-cfg 1 --cfg 2.5 --temperature 0.5", discrete="--prior-cfg 3"),
            "fashion-mnist": dict(none="--cfg 9 --temperature 0.75", guided="--prior-cfg 3 --cfg 6 --temperature 0.75", discrete="--prior-cfg 9")}
COUNT = 2000                                                                 # samples of a row
LONGER = 600                                                                 # steps of Fig. 8 beyond the dcmix checkpoint


def plan(data, seed):
    """Every command for one data set and seed, in order -> list of (key, arguments); trainings have the key "train ..."."""
    runs, given = f"runs{seed}", [] if data == "shapes" else ["--data", FASHION, "--images", "20000"]
    source, features = given[1] if given else data, ["--features", f"runs0/{data}/classifier.pt"]
    train = lambda guidance, *more: ["train.py", *given, "--guidance", guidance, "--seed", str(seed), "--runs", runs, "--sample-every", "0", *more]
    steps = [(f"train {guidance}", train(guidance)) for guidance in METHODS]
    for name, more in (("longer", []), ("ti", ["--ti-mix"])):                # Fig. 8
        steps.append((f"train {name}", train("dcmix", *more, "--init", f"{runs}/{data}-dcmix", "--steps", str(LONGER), "--out", f"{runs}/{data}-{name}")))

    def score(key, run, count, *more):
        kind = "discrete" if "discrete" in more else "none" if run == "none" else "guided"
        steps.append((key, ["fid.py", f"{runs}/{data}-{run}", source, "--seed", str(seed), "--count", str(count), *features, *SETTINGS[data][kind].split(), *more]))

    score("dcmix", "dcmix", COUNT, "--rfd")                                  # Table 1
    for guidance in ("none", "dcsa", "dcca"):
        score(guidance, guidance, COUNT)
    score("discrete", "dcmix", COUNT, "--decode", "discrete")
    for run in ("longer", "ti"):                                             # Fig. 8
        score(run, run, COUNT)
    for run in ("dcmix", "longer", "ti"):
        score(f"{run} truth", run, COUNT, "--truth")
    for n in AR_STEPS:                                                       # beyond the paper
        for run in ("none", "dcmix"):
            score(f"{run} ar {n}", run, 1000, "--ar-steps", str(n))
    for n in (*map(str, DIFFUSION_STEPS), *ANNEALED):
        score(f"dcmix diffusion {n}", "dcmix", 1000, "--diffusion-steps", n)
    return steps


def hardware():
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown CPU")
    return f"{model}, {os.environ.get('OMP_NUM_THREADS', os.cpu_count())} threads"


def run(data, seed, only):
    """Carry out the plan from the root of the project; commands whose report is there are not repeated."""
    folder = ROOT / f"runs{seed}" / "findings"
    folder.mkdir(parents=True, exist_ok=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    for key, command in plan(data, seed):
        file, report = folder / f"{data} {key}.json", folder / f"{data} {key}.report"
        if file.is_file() or only and not any(key == name or key == f"train {name}" for name in only):
            continue
        print(time.strftime("%H:%M:%S"), data, seed, key, flush=True)
        start = time.time()
        subprocess.run([sys.executable, *command, *(["--json", str(report)] if command[0] == "fid.py" else [])], cwd=ROOT, check=True)
        entry = dict(data=data, seed=seed, key=key, command="python " + " ".join(command), commit=commit, hardware=hardware(),
                     date=time.strftime("%Y-%m-%d %H:%M"), seconds=round(time.time() - start, 1))
        if report.is_file():
            entry["results"] = [values(r) for r in json.loads(report.read_text())["results"]]
        file.write_text(json.dumps(entry))


def values(result):
    """What the tables need of one result of fid.py."""
    return dict(source=result["source"], count=result["count"], FD=round(result["frechet_distance"], 4), CS=round(result["classifier_score"]["mean"], 3),
                seconds=result["seconds"], settings=result.get("settings"))


def collect():
    """All reports of fid.py in runs*/findings -> assets/findings.json, one line an entry."""
    entries = [entry for path in ROOT.glob("runs*/findings/*.json") if "results" in (entry := json.loads(path.read_text()))]
    entries.sort(key=lambda e: (e["data"], e["key"], e["seed"]))
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(e) for e in entries) + "\n]\n")


def draw(data, seed, columns=20):
    """One row of pictures a method, all from the same X_d, noise and classes -> assets/findings-DATA.png: X_d alone, then METHODS."""
    rows, y = [], torch.arange(columns) // 2 % 10
    for key in ("discrete", *METHODS):
        args = fid.parse(next(command for name, command in plan(data, seed) if name == key.replace("discrete", "dcmix"))[1:])
        system = sample.System(ROOT / args.pictures)
        settings = system.meta["sampling"] | {k: getattr(args, k) for k in system.meta["sampling"] if hasattr(args, k)}
        rows.append(system.draw(seed, range(columns), y, settings, "discrete" if key == "discrete" else "continuous")[0])
    sample.save_grid(torch.cat(rows), ROOT / "assets" / f"findings-{data}.png", columns)


# ------------------------------------------------------------------ the README's tables

TABLE_1 = (("held-out pictures through the VAE (x_c)", "dcmix", 1, "1.01M"), ("held-out pictures through the bit tokenizer (x_d)", "dcmix", 2, "0.60M"),
           ("discrete decode: the prior's X_d alone", "discrete", 0, "0.83M"), ("none (plain MAR on the same x_c)", "none", 0, "2.45M"),
           ("**dcmix**", "dcmix", 0, "2.45M"), ("dcsa", "dcsa", 0, "2.49M"), ("dcca", "dcca", 0, "3.10M"))
FIGURE_8 = (("dcmix, the checkpoint", "dcmix"), ("trained on without TI-Mix", "longer"), ("trained on with TI-Mix", "ti"))


def found(entries, data, key, place=0, value="FD"):
    """The value in place `place` of the reports of a row, one a seed."""
    return [entry["results"][place][value] for entry in entries if (entry["data"], entry["key"]) == (data, key)]


def cell(numbers, digits=2):
    """Mean and, of several seeds, the standard deviation; a value alone is of one seed."""
    if not numbers:
        return ""
    spread = f" ± {np.std(numbers, ddof=1):.{digits}f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.{digits}f}{spread}"


def markdown(head, rows):
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def tables(entries):
    """The entries of assets/findings.json -> {name: a table of the README in markdown}."""
    data = ("shapes", "fashion-mnist")
    both = lambda key, place=0: [cell(found(entries, d, key, place, value)) for d in data for value in ("FD", "CS")]
    FD = lambda key: [cell(found(entries, d, key)) for d in data]
    made = {
        "Table 1": markdown(["", *(f"{d} {v}" for d in data for v in ("FD", "CS")), "parameters"],
                            [[label, *both(key, place), parameters] for label, key, place, parameters in TABLE_1]),
        "Figure 8": markdown(["FD", *(f"{d}, {x}" for x in ("X_d of the prior", "true X_d") for d in data)],
                             [[label, *FD(key), *FD(f"{key} truth")] for label, key in FIGURE_8]),
        "AR steps": markdown(["FD", *map(str, AR_STEPS)], [[f"{d}, {run}", *cells] for d in data for run in ("none", "dcmix")
                                                          if any(cells := [cell(found(entries, d, f"{run} ar {n}")) for n in AR_STEPS])]),
        "diffusion steps": markdown(["FD of dcmix", *map(str, DIFFUSION_STEPS), *ANNEALED],
                                    [[d, *cells] for d in data if any(cells := [cell(found(entries, d, f"dcmix diffusion {n}")) for n in (*DIFFUSION_STEPS, *ANNEALED)])])}
    return {name: table for name, table in made.items() if table.count("\n") > 1}                # without those that have no row yet


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("what", choices=["run", "draw", "collect", "tables"])
    p.add_argument("data", nargs="?", choices=["shapes", "fashion-mnist"])
    p.add_argument("seed", nargs="?", type=int)
    p.add_argument("--only", nargs="*", help="keys of rows")
    args = p.parse_args()
    if args.what == "run":
        run(args.data, args.seed, args.only)
    elif args.what == "draw":
        draw(args.data, args.seed)
    elif args.what == "collect":
        collect()
    else:
        for name, table in tables(json.loads(RESULTS.read_text())).items():
            print(f"{name}\n\n{table}\n")
