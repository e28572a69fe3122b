"""The paper's findings, run again at small scale: Tables 1 and 2, Figs. 7 and 8, and how few steps do.

`plan` lists every command behind a number of the README. `run` carries them out for one data set and one seed and keeps each
report as runsSEED/findings/KEY.json, `time` does so for Table 2; `collect` gathers them into assets/findings.json with command,
seed, commit, hardware and date; `tables` and `plots` turn that file into the README's tables, which test_findings.py compares
with the README, and its pictures.

Try: python tests/findings.py run shapes 0 --only dcmix      (one row; without --only all of them, hours; seed 0 first)
     python tests/findings.py tables
"""
import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import fid
import sample
import tokenizers

RESULTS = ROOT / "assets" / "findings.json"
FASHION = "/usr/share/datasets/fashion-mnist"                                # Debian's package dataset-fashion-mnist
METHODS = ("none", "dcmix", "dcsa", "dcca")
AR_STEPS, DIFFUSION_STEPS, ANNEALED = (1, 2, 4, 8, 16, 32, 64), (5, 10, 15, 25, 50, 100), ("15:5", "25:10", "50:10")
# guidance and temperature chosen for each method, the numbers of steps for dcmix, all on validation pictures (of shapes, of fashion-mnist's train split), seed 0
SETTINGS = {"shapes": dict(none="--cfg 2.5 --temperature 0.5", guided="--prior-cfg 1 --cfg 2.5 --temperature 0.5", discrete="--prior-cfg 3"),
            "fashion-mnist": dict(none="--cfg 9 --temperature 0.75", guided="--prior-cfg 3 --cfg 6 --temperature 0.75", discrete="--prior-cfg 9")}
STEPS = "--ar-steps 8 --diffusion-steps 10 --prior-steps 16"                 # today's defaults; runs carry those of their day
COUNT, FEW, FEWEST = 10_000, 2000, 1000                                     # samples a row of Table 1, of Fig. 8, of the sweeps
LONGER = 600                                                                 # steps of Fig. 8 beyond the dcmix checkpoint


def plan(data, seed):
    """Every command for one data set and seed, in order -> list of (key, arguments); trainings have the key "train ..."."""
    runs, given, steps = f"runs{seed}", [] if data == "shapes" else ["--data", FASHION, "--images", "20000"], []
    source, features = given[1] if given else data, ["--features", f"runs0/{data}/classifier.pt"] if seed else []     # seed 0 trains it

    def train(key, guidance, *more, program="train.py"):
        steps.append((f"train {key}", [program, *given, "--guidance", guidance, "--seed", str(seed), "--runs", runs, "--sample-every", "0", *more]))

    def score(key, run, count, *more):
        kind = "discrete" if key == "discrete" else "none" if run == "none" else "guided"
        steps.append((key, ["fid.py", f"{runs}/{data}-{run}", source, "--seed", str(seed), "--count", str(count), *features,
                            *f"{SETTINGS[data][kind]} {STEPS}".split(), *more]))

    for guidance in METHODS:
        train(guidance, guidance)
    for name, more in (("longer", []), ("ti", ["--ti-mix"])):                # Fig. 8
        train(name, "dcmix", *more, "--init", f"{runs}/{data}-dcmix", "--steps", str(LONGER), "--out", f"{runs}/{data}-{name}")
    train("deeper", "dcmix", "--out", f"{runs}/{data}-deeper", program="tests/deeper_train.py")
    train("encoder", "dcmix", "--mix-at", "encoder", "--out", f"{runs}/{data}-encoder")
    score("dcmix", "dcmix", COUNT, "--rfd")                                  # Table 1
    for run in ("none", "dcsa", "dcca", "deeper"):
        score(run, run, COUNT)
    score("discrete", "dcmix", COUNT, "--decode", "discrete")
    for run in ("dcmix", "longer", "ti"):                                    # Fig. 8
        score(f"{run} few", run, FEW)
        score(f"{run} truth", run, FEW, "--truth")
    for n in (1, 16):                                                        # X_d as TI-Mix trains on it, in one pass, and as inference draws it
        score(f"discrete {n}", "dcmix", FEW, "--decode", "discrete", "--prior-steps", str(n))
    for run in ("dcmix", "encoder"):                                         # who sees X_d
        score(f"{run} sight", run, FEW)
    for n in AR_STEPS:                                                       # beyond the paper
        for run in ("none", "dcmix"):
            score(f"{run} ar {n}", run, FEWEST, "--ar-steps", str(n))
    for n in (*map(str, DIFFUSION_STEPS), *ANNEALED):
        score(f"dcmix diffusion {n}", "dcmix", FEWEST, "--diffusion-steps", n)
    return steps


def hardware():
    model = next((line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown CPU")
    return f"{model}, {os.environ.get('OMP_NUM_THREADS', os.cpu_count())} threads"


def about(data, seed, key, command, start):
    """What is recorded beside every result."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return dict(data=data, seed=seed, key=key, command="python " + " ".join(command), commit=commit, hardware=hardware(),
                date=time.strftime("%Y-%m-%d %H:%M"), seconds=round(time.time() - start, 1))


def run(data, seed, only):
    """Carry out the plan from the root of the project; commands whose report is there are not repeated."""
    folder = ROOT / f"runs{seed}" / "findings"
    folder.mkdir(parents=True, exist_ok=True)
    for key, command in plan(data, seed):
        file, report = folder / f"{data} {key}.json", folder / f"{data} {key}.report"
        if file.is_file() or only and not any(key == name or key == f"train {name}" for name in only):
            continue
        print(time.strftime("%H:%M:%S"), data, seed, key, flush=True)
        start = time.time()
        subprocess.run([sys.executable, *command, *(["--json", str(report)] if command[0] == "fid.py" else [])], cwd=ROOT, check=True)
        entry = about(data, seed, key, command, start)
        if report.is_file():
            entry["results"] = [values(r) for r in json.loads(report.read_text())["results"]]
        file.write_text(json.dumps(entry))


def time_methods(data, seed):
    """Table 2: seconds of an epoch from 100 training steps after the first 50, seconds an image from 240 samples drawn at once."""
    for guidance in METHODS:
        start, runs, out = time.time(), f"runs{seed}", f"runs{seed}/{data}-{guidance}"
        train = next(command for key, command in plan(data, seed) if key == f"train {guidance}") + ["--steps", "150", "--out", f"{out}-timed"]
        draw = ["sample.py", out, "--count", "240", "--batch-size", "240", "--out", f"{runs}/timed.npz", *f"{SETTINGS[data]['none' if guidance == 'none' else 'guided']} {STEPS}".split()]
        shutil.rmtree(ROOT / f"{out}-timed", ignore_errors=True)
        subprocess.run([sys.executable, *train], cwd=ROOT, check=True)
        said = subprocess.run([sys.executable, *draw], cwd=ROOT, check=True, capture_output=True, text=True).stdout
        log = {int(row["step"]): float(row["seconds"]) for row in csv.DictReader((ROOT / f"{out}-timed" / "log.csv").open())}
        pictures = json.loads((ROOT / runs / data / "tokens" / "meta.json").read_text())["made_from"]["pictures"]
        entry = about(data, seed, f"time {guidance}", [*train, "&&", "python", *draw], start)
        entry["results"] = [dict(image=float(said.split(" s/image")[0]), epoch=round((log[150] - log[50]) / 100 * pictures / 32, 1))]
        (ROOT / runs / "findings" / f"{data} time {guidance}.json").write_text(json.dumps(entry))


def validation(data):
    """The 5,000 pictures on which settings were chosen, which no table uses -> runs0/DATA-validation.npz: shapes of a third seed, the end of fashion-mnist's train split."""
    source = tokenizers.open_source("shapes" if data == "shapes" else FASHION, "train", 32, 5000 if data == "shapes" else None)
    if data == "shapes":
        source.seed = 2
    pictures = np.stack([source.read(i) for i in range(len(source.labels))[-5000:]])
    tokenizers.write_whole(ROOT / "runs0" / f"{data}-validation.npz", lambda file: np.savez(file, arr_0=pictures.transpose(0, 2, 3, 1)))


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
        system = sample.open_run(ROOT / args.pictures, args)
        rows.append(system.draw(seed, range(columns), y, "discrete" if key == "discrete" else "continuous"))
    sample.save_grid(torch.cat(rows), ROOT / "assets" / f"findings-{data}.png", columns)


# the README's tables

TABLE_1 = (("held-out pictures through the VAE (x_c)", "dcmix", 1, "1.01M"), ("held-out pictures through the bit tokenizer (x_d)", "dcmix", 2, "0.60M"),
           ("discrete decode: the prior's X_d alone", "discrete", 0, "0.83M"), ("none (plain MAR on the same x_c)", "none", 0, "2.45M"),
           ("**dcmix**", "dcmix", 0, "2.45M"), ("dcsa", "dcsa", 0, "2.50M"), ("dcca", "dcca", 0, "3.11M"), ("dcmix with a fourth layer", "deeper", 0, "3.07M"))
TABLE_2 = (("none", 2.45, 64), ("dcmix", 2.45, 64), ("dcsa", 2.50, 128), ("dcca", 3.11, 64))         # guidance, million parameters, tokens
FIGURE_8 = (("dcmix, the checkpoint", "dcmix"), ("trained on without TI-Mix", "longer"), ("trained on with TI-Mix", "ti"))
X_D = (("one step, as TI-Mix's x_hat where all is masked", "discrete 1"), ("16 steps, as X_d at inference", "discrete 16"))
SIGHT = (("dcmix: X_d at hidden positions, in the decoder", "dcmix"), ("dcmix with `--mix-at encoder`: there, in both", "encoder"))
DATA = ("shapes", "fashion-mnist")


def found(entries, data, key, place=0, value="FD"):
    """The value in place `place` of the reports of a row, one a seed."""
    return [entry["results"][place][value] for entry in entries if (entry["data"], entry["key"]) == (data, key)]


def cell(numbers, digits=2):
    """Mean and, of several seeds, the standard deviation; a value alone is of one seed."""
    if not numbers:
        return ""
    spread = f" ± {np.std(numbers, ddof=1):.{digits}f}" if len(numbers) > 1 else ""
    return f"{np.mean(numbers):.{digits}f}{spread}"


def markdown(head, rows, constants=0):
    """A table without the rows that have no number yet; the last `constants` columns are known beforehand."""
    rows = [row for row in rows if any(row[1:len(row) - constants])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def tables(entries):
    """The entries of assets/findings.json -> {name: a table of the README in markdown}."""
    cells = lambda key, place=0, *values: [cell(found(entries, d, key, place, value)) for d in DATA for value in values or ("FD",)]
    sweep = lambda keys: [cell(found(entries, d, key)) for key in keys]
    made = {
        "Table 1": markdown(["", *(f"{d} {v}" for d in DATA for v in ("FD", "CS")), "parameters"],
                            [[label, *cells(key, place, "FD", "CS"), parameters] for label, key, place, parameters in TABLE_1], 1),
        "Mix at": markdown(["shapes", "FD", "CS"], [[label, *(cell(found(entries, "shapes", f"{key} sight", 0, v)) for v in ("FD", "CS"))] for label, key in SIGHT]),
        "Table 2": markdown(["", "s/image", "s/epoch", "parameters", "tokens"],
                            [[name, *(cell(found(entries, "shapes", f"time {name}", 0, x), digits) for x, digits in (("image", 4), ("epoch", 1))),
                              f"{millions:.2f}M", str(tokens)] for name, millions, tokens in TABLE_2], 2),
        "Figure 8": markdown(["FD", *(f"{d}, {x}" for x in ("X_d of the prior", "true X_d") for d in DATA)],
                             [[label, *cells(f"{key} few"), *cells(f"{key} truth")] for label, key in FIGURE_8]),
        "X_d alone": markdown(["FD of X_d alone", *DATA], [[f"the prior in {steps}", *cells(key)] for steps, key in X_D]),
        "AR steps": markdown(["FD", *map(str, AR_STEPS)], [[f"{d}, {run}", *(cell(found(entries, d, f"{run} ar {n}")) for n in AR_STEPS)] for d in DATA for run in ("none", "dcmix")]),
        "diffusion steps": markdown(["FD of dcmix", *map(str, DIFFUSION_STEPS), *ANNEALED],
                                    [[d, *(cell(found(entries, d, f"dcmix diffusion {n}")) for n in (*DIFFUSION_STEPS, *ANNEALED))] for d in DATA])}
    return {name: table for name, table in made.items() if table.count("\n") > 1}                # without those that have no row yet


# the README's plots

COLOURS = dict(none="#777777", dcmix="#c03020", dcsa="#2060c0", dcca="#209050", deeper="#c08020", fixed="#c03020", falling="#2060c0")


def plot(draw, left, top, title, axis, lines, W=480, H=340):
    """One panel: lines {name: [(x, numbers)]}, x on a logarithmic axis, the mean of the numbers with their standard deviation as a bar."""
    points = [(name, x, np.mean(n), np.std(n, ddof=1) if len(n) > 1 else 0) for name, line in lines.items() for x, n in line]
    _, xs, means, spreads = zip(*points)
    most, x0, x1, y0, y1 = 1.05 * max(np.add(means, spreads)), left + 60, left + W - 90, top + H - 50, top + 40
    span = np.log(max(xs) / min(xs)) or 1                                 # a single x stands at the left
    X = lambda x: x0 + (x1 - x0) * (0.08 + 0.84 * np.log(x / min(xs)) / span)
    Y = lambda y: y0 + (y1 - y0) * y / most
    write = lambda x, y, text, anchor, colour="black": draw.text((x, y), text, colour, ImageFont.load_default(14), anchor)
    write(x0, top + 14, title, "lm")
    write((x0 + x1) / 2, y0 + 38, axis, "mm")
    draw.line([(x0, y1), (x0, y0), (x1, y0)], "black")
    for y in np.arange(0, most, next(step for k in (0.01, 0.1, 1, 10) for step in (k, 2 * k, 5 * k) if most / step < 8)):
        draw.line([(x0 - 4, Y(y)), (x0, Y(y))], "black")
        write(x0 - 8, Y(y), f"{y:.3g}", "rm")
    right = x0
    for x in sorted(set(xs)):
        if X(x) > right:                                                     # beside the tick before it
            write(X(x), y0 + 12, f"{x:g}", "mm")
            right = X(x) + 32
    labels = []
    for name, line in sorted(lines.items(), key=lambda item: -np.mean(item[1][-1][1])):
        draw.line([(X(x), Y(np.mean(n))) for x, n in line], COLOURS[name], 2)
        x, y = X(line[-1][0]) + 8, Y(np.mean(line[-1][1]))
        while any(abs(x - a) < 50 and abs(y - b) < 15 for a, b in labels):   # below the label it would cover
            y += 1
        labels.append((x, y))
        write(x, y, name, "lm", COLOURS[name])
    for name, x, mean, spread in points:
        draw.line([(X(x), Y(mean - spread)), (X(x), Y(mean + spread))], COLOURS[name])
        draw.ellipse([X(x) - 4, Y(mean) - 4, X(x) + 4, Y(mean) + 4], COLOURS[name])


def plots(entries):
    """assets/findings-figure7.png, FD against tokens and parameters; findings-steps.png, FD against AR and diffusion steps."""
    def lines(data, points):
        """[(name, x, key)] -> {name: [(x, numbers)]} of those that are measured."""
        out = {}
        for name, x, key in points:
            if numbers := found(entries, data, key):
                out.setdefault(name, []).append((x, numbers))
        return out

    figures = {"figure7": (("tokens", lambda d: lines(d, [(name, tokens, name) for name, _, tokens in TABLE_2])),
                           ("million parameters", lambda d: lines(d, [(name, millions, name) for name, millions, _ in (*TABLE_2, ("deeper", 3.07, 64))]))),
               "steps": (("AR steps", lambda d: lines(d, [(run, n, f"{run} ar {n}") for run in ("none", "dcmix") for n in AR_STEPS])),
                         ("diffusion steps (falling: the mean)", lambda d: lines(d, [("fixed", n, f"dcmix diffusion {n}") for n in DIFFUSION_STEPS] +
                                                       [("falling", sum(map(int, n.split(":"))) / 2, f"dcmix diffusion {n}") for n in ANNEALED])))}
    for figure, panels in figures.items():
        image = Image.new("RGB", (960, 680), "white")
        for i, d in enumerate(DATA):
            for k, (axis, of) in enumerate(panels):
                if found_lines := of(d):
                    plot(ImageDraw.Draw(image), 480 * k, 340 * i, f"FD, {d}", axis, found_lines)
        image.save(ROOT / "assets" / f"findings-{figure}.png")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    p.add_argument("what", choices=["run", "time", "draw", "validation", "collect", "tables", "plots"])
    p.add_argument("data", nargs="?", choices=["shapes", "fashion-mnist"])
    p.add_argument("seed", nargs="?", type=int)
    p.add_argument("--only", nargs="*", help="keys of rows")
    args = p.parse_args()
    if args.what == "run":
        run(args.data, args.seed, args.only)
    elif args.what == "time":
        time_methods(args.data, args.seed)
    elif args.what == "draw":
        draw(args.data, args.seed)
    elif args.what == "validation":
        validation(args.data)
    elif args.what == "collect":
        collect()
    elif args.what == "plots":
        plots(json.loads(RESULTS.read_text()))
    else:
        for name, table in tables(json.loads(RESULTS.read_text())).items():
            print(f"{name}\n\n{table}\n")
