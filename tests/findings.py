"""The paper's findings, measured again at small scale: Tables 1 and 2, Figs. 7 and 8.

Most rows of docs/findings.md are in `plan`: the commands that a user would type.

    run         carry out the plan for one data set and one seed; this takes hours
    time        measure the seconds of Table 2; let nothing else run
    draw        draw the grids of pictures: every method from the same X_d
    validation  write the pictures on which the sampling settings were chosen
    collect     gather all reports in assets/findings.json
    tables      print the tables of docs/findings.md, which test_findings.py compares with it
    plots       draw the plots of docs/findings.md

Starts train.py, sample.py and fid.py, and reads their reports. Read docs/findings.md next.

Try: python tests/findings.py tables
     python tests/findings.py run shapes 0 --only dcmix tokenizers      (two rows)
"""
import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import output
import dataset

RESULTS = ROOT / "assets" / "findings.json"
DATA = ("shapes", "fashion-mnist")
# fashion-mnist lies where Debian's package dataset-fashion-mnist puts it
SOURCE = {"shapes": "shapes", "fashion-mnist": "/usr/share/datasets/fashion-mnist"}
METHODS = ("none", "dcmix", "dcsa", "dcca")

# chosen for each method on validation pictures with the models of seed 0
SETTINGS = {
    "shapes": {
        "none": "--cfg 2.5 --temperature 0.5",
        "guided": "--prior-cfg 1 --cfg 2.5 --temperature 0.5",
        "discrete": "--prior-cfg 3",
    },
    "fashion-mnist": {
        "none": "--cfg 9 --temperature 0.75",
        "guided": "--prior-cfg 3 --cfg 6 --temperature 0.75",
        "discrete": "--prior-cfg 9",
    },
}
# chosen for dcmix; given always, so that a later change of the defaults changes no row
STEPS = "--ar-steps 8 --diffusion-steps 10 --prior-steps 16"

# samples of a row of Table 1, of a row of Fig. 8, and of a row of the sweeps
COUNT = 10_000
FEW = 2000
FEWEST = 1000
# steps of Fig. 8 beyond the dcmix checkpoint
LONGER = 600
# the sweeps; "15:5" falls from 15 diffusion steps in the first AR step to 5 in the last
AR_STEPS = (1, 2, 4, 8, 16, 32, 64)
DIFFUSION_STEPS = ("5", "10", "15", "25", "50", "100")
FALLING = ("15:5", "25:10", "50:10")
# lengths of stage mixar and the ends of their runs' names, for FD against training time. 1,760 are
# plain MAR's steps in the time of dcmix's 1,200 and those of its bit tokenizer and prior
LENGTHS = {200: "-200", 600: "-600", 1000: "", 1200: "-1200", 1760: "-1760"}


# the plan

def pictures_file(data, seed, key):
    """Where the samples of a row lie until they are scored."""
    return f"runs{seed}/findings/{data}-{key.replace(' ', '-')}.npz"


def training(data, seed, name, guidance, *more):
    """The row ("train NAME", commands) that trains runsSEED/DATA-NAME."""
    command = ["train.py", "--guidance", guidance, "--seed", str(seed), "--sample-every", "0"]
    command += ["--runs", f"runs{seed}", "--out", f"runs{seed}/{data}-{name}"]
    if data == "fashion-mnist":
        command += ["--data", SOURCE[data], "--images", "20000"]
    return f"train {name}", [[*command, *more]]


def sampling(data, seed, key, run, count, *more, chosen=None):
    """The command that draws `count` pictures of a run into the pictures_file of the row `key`.

    chosen: which of SETTINGS to use; by default those of the run's guidance.
    """
    if chosen is None:
        chosen = "none" if run == "none" else "guided"
    command = ["sample.py", f"runs{seed}/{data}-{run}", "--seed", str(seed), "--count", str(count)]
    settings = f"{SETTINGS[data][chosen]} {STEPS}".split()
    return [*command, *settings, *more, "--out", pictures_file(data, seed, key)]


def scored(data, seed, key, run, count, *more, chosen=None):
    """The row (key, commands) that draws pictures of a run and compares them with held-out ones."""
    draw = sampling(data, seed, key, run, count, *more, chosen=chosen)
    classifier = ["--features", f"runs0/{data}/classifier.pt"]
    return key, [draw, ["fid.py", pictures_file(data, seed, key), SOURCE[data], *classifier]]


def tokenizer_row(data, seed):
    """The row that scores the held-out pictures through both tokenizers.

    In seed 0 it comes before all other scores: it trains the classifier that gives their features.
    """
    command = ["fid.py", f"runs{seed}/{data}-dcmix", SOURCE[data], "--rfd"]
    command += ["--seed", str(seed), "--count", str(FEWEST)]
    if seed > 0:
        command += ["--features", f"runs0/{data}/classifier.pt"]
    return "tokenizers", [command]


def plan(data, seed):
    """All rows of one data set and seed, in order: a list of (key, commands).

    A command is a list: the program, then its arguments. Keys of trainings begin with "train ".
    """
    train = partial(training, data, seed)
    score = partial(scored, data, seed)
    longer = ("--init", f"runs{seed}/{data}-dcmix", "--steps", str(LONGER))

    rows = [train(guidance, guidance) for guidance in METHODS]
    rows.append(train("longer", "dcmix", *longer))
    rows.append(train("ti", "dcmix", "--ti-mix", *longer))
    rows.append(train("encoder", "dcmix", "--mix-at", "encoder"))

    # Table 1
    rows.append(tokenizer_row(data, seed))
    for run in METHODS:
        rows.append(score(run, run, COUNT))
    rows.append(score("discrete", "dcmix", COUNT, "--decode", "discrete", chosen="discrete"))

    # Fig. 8, and X_d as TI-Mix trains on it (one step) and as inference draws it (16 steps)
    for run in ("dcmix", "longer", "ti"):
        rows.append(score(f"{run} few", run, FEW))
        rows.append(score(f"{run} truth", run, FEW, "--truth"))
    for n in ("1", "16"):
        one = ("--decode", "discrete", "--prior-steps", n)
        rows.append(score(f"discrete {n}", "dcmix", FEW, *one))

    # other readings of TI-Mix
    if data == "fashion-mnist":
        for _, run in READINGS[:3]:
            rows.append(score(f"reading {run}", run, FEW))
        for _, run in READINGS[3:]:
            key, [[_, *flags]] = train(run, "dcmix", "--ti-mix", *longer)
            rows.append((key, [["tests/ti_train.py", run, *flags]]))
            rows.append(score(f"reading {run}", run, FEW))

    # which part of MixAR sees X_d
    for run in ("dcmix", "encoder"):
        rows.append(score(f"{run} sight", run, FEW))

    # the guidances after the steps of today's recipe
    rows.append(score("curve discrete", "dcmix", FEW, "--decode", "discrete", chosen="discrete"))
    rows += [score(f"curve {guidance}", guidance, FEW) for guidance in METHODS]

    # Fig. 1: FD against training time
    if data == "shapes":
        for guidance, chosen in (("none", "none"), ("dcmix", "guided")):
            for n in (200, 600, 1200, 1760):
                name = f"{guidance}-{n}"
                rows.append(train(name, guidance, "--steps", str(n)))
                rows.append(score(f"curve {name}", name, FEW, chosen=chosen))

    # the sweeps over steps, beyond the paper
    for n in AR_STEPS:
        for run in ("none", "dcmix"):
            rows.append(score(f"{run} ar {n}", run, FEWEST, "--ar-steps", str(n)))
    for n in (*DIFFUSION_STEPS, *FALLING):
        rows.append(score(f"dcmix diffusion {n}", "dcmix", FEWEST, "--diffusion-steps", n))
    return rows


# carrying it out

def hardware():
    """The processor's name and the number of threads."""
    model = "unknown CPU"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":")[1].strip()
            break
    threads = os.environ.get("OMP_NUM_THREADS", os.cpu_count())
    return f"{model}, {threads} threads"


def start(command, **options):
    """Run one command of the plan from the root of the project."""
    return subprocess.run([sys.executable, *command], cwd=ROOT, check=True, **options)


def about(data, seed, key, commands, began):
    """What is recorded beside every result."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return dict(
        data=data,
        seed=seed,
        key=key,
        command=" && ".join("python " + " ".join(command) for command in commands),
        commit=commit,
        hardware=hardware(),
        date=time.strftime("%Y-%m-%d %H:%M"),
        seconds=round(time.time() - began, 1),
    )


def values(result):
    """What the tables need of one result in a report of fid.py."""
    return dict(
        source=result["source"],
        count=result["count"],
        FD=round(result["frechet_distance"], 4),
        CS=round(result["classifier_score"]["mean"], 3),
        seconds=result["seconds"],
    )


def training_seconds(folder):
    """The seconds that the steps of a run took, from its log."""
    with (ROOT / folder / "log.csv").open() as file:
        return float(list(csv.DictReader(file))[-1]["seconds"])


def run(data, seed, only):
    """Carry out the plan; a row whose entry is there already is not repeated.

    - only: names of rows, or None for all of them; a name stands for its training, too
    """
    folder = ROOT / f"runs{seed}" / "findings"
    folder.mkdir(parents=True, exist_ok=True)
    for key, commands in plan(data, seed):
        file = folder / f"{data} {key}.json"
        wanted = only is None or key.removeprefix("train ") in only
        if file.is_file() or not wanted:
            continue
        print(time.strftime("%H:%M:%S"), data, seed, key, flush=True)
        began = time.time()
        results = []
        for command in commands:
            if command[0] == "fid.py":
                report = folder / "reports" / f"{data} {key}.json"
                start([*command, "--json", str(report)])
                results += [values(result) for result in json.loads(report.read_text())["results"]]
            else:
                start(command)
        if key.startswith("train "):
            command, = commands
            folder = command[command.index("--out") + 1]
            results.append(dict(training=training_seconds(folder)))
        (ROOT / pictures_file(data, seed, key)).unlink(missing_ok=True)
        entry = about(data, seed, key, commands, began)
        if results:
            entry["results"] = results
        file.write_text(json.dumps(entry))


def epoch_seconds(data, seed, folder):
    """Seconds of an epoch, from 100 training steps after the first 50 of a run in `folder`."""
    seconds = {}
    with (ROOT / folder / "log.csv").open() as file:
        for row in csv.DictReader(file):
            seconds[int(row["step"])] = float(row["seconds"])
    tokens = json.loads((ROOT / f"runs{seed}" / data / "tokens" / "meta.json").read_text())
    steps = tokens["made_from"]["pictures"] / 32
    return (seconds[150] - seconds[50]) / 100 * steps


def time_methods(data, seed):
    """Table 2: seconds of an epoch, and seconds an image of 240 samples drawn at once."""
    for guidance in METHODS:
        began = time.time()
        key = f"time {guidance}"
        folder = f"runs{seed}/{data}-{guidance}-timed"
        shutil.rmtree(ROOT / folder, ignore_errors=True)
        _, [train] = training(data, seed, guidance, guidance, "--steps", "150")
        train += ["--out", folder]
        draw = sampling(data, seed, key, guidance, 240, "--batch-size", "240")

        start(train)
        said = start(draw, capture_output=True, text=True).stdout
        (ROOT / pictures_file(data, seed, key)).unlink()
        image = float(said.split(" s/image")[0])
        epoch = round(epoch_seconds(data, seed, folder), 1)

        entry = about(data, seed, key, [train, draw], began)
        entry["results"] = [dict(image=image, epoch=epoch)]
        file = ROOT / f"runs{seed}" / "findings" / f"{data} {key}.json"
        file.write_text(json.dumps(entry))


def validation(data):
    """Write runs0/DATA-validation.npz: 5,000 pictures that no table uses.

    They are shapes of a third seed, or the end of fashion-mnist's train split.
    """
    count = 5000
    if data == "shapes":
        source = dataset.open_source("shapes", "train", 32, count)
        source.seed = 2
    else:
        source = dataset.open_source(SOURCE[data], "train", 32, None)
    last = range(len(source.labels))[-count:]
    pictures = np.stack([source.read(i) for i in last])                  # (n, 3, H, W)
    np.savez(ROOT / "runs0" / f"{data}-validation.npz", arr_0=pictures.transpose(0, 2, 3, 1))


def draw(data, seed, columns=20):
    """Write assets/findings-DATA.png: a row of X_d alone, then one of each method.

    All rows share X_d, noise and classes; two neighbouring columns share a class.
    """
    classes = ",".join(str(k // 2) for k in range(columns))
    rows = []
    for method in ("discrete", *METHODS):
        key = f"grid {method}"
        if method == "discrete":
            command = sampling(data, seed, key, "dcmix", columns, "--decode", "discrete")
        else:
            command = sampling(data, seed, key, method, columns)
        start([*command, "--classes", classes])
        file = ROOT / pictures_file(data, seed, key)
        rows.append(np.load(file)["arr_0"].transpose(0, 3, 1, 2))        # (columns, 3, H, W)
        file.unlink()
    images = torch.tensor(np.concatenate(rows))
    output.save_png(output.tile(images, columns), ROOT / "assets" / f"findings-{data}.png")


def collect():
    """Write assets/findings.json: all entries with results in runs*/findings, one a line."""
    entries = [json.loads(path.read_text()) for path in ROOT.glob("runs*/findings/*.json")]
    entries = [entry for entry in entries if "results" in entry]
    entries.sort(key=lambda entry: (entry["data"], entry["key"], entry["seed"]))
    lines = ",\n".join(json.dumps(entry) for entry in entries)
    RESULTS.write_text(f"[\n{lines}\n]\n")


# the tables of docs/findings.md

TABLE_1 = (
    ("held-out x_c, decoded", "vae", "1.01M"),
    ("held-out x_d, decoded", "vq", "0.60M"),
    ("the prior's X_d, decoded", "discrete", "0.83M"),
    ("none (plain MAR on the same x_c)", "none", "2.45M"),
    ("**dcmix**", "dcmix", "2.45M"),
    ("dcsa", "dcsa", "2.50M"),
    ("dcca", "dcca", "3.11M"),
)
SIGHT = (
    ("dcmix: X_d at hidden positions, in the decoder", "dcmix sight"),
    ("dcmix with `--mix-at encoder`: there, in both", "encoder sight"),
)
# guidance, million parameters, tokens as Fig. 7 counts them: class, continuous and discrete
TABLE_2 = (
    ("none", 2.45, 72),
    ("dcmix", 2.45, 72),
    ("dcsa", 2.50, 136),
    ("dcca", 3.11, 136),
)
FIGURE_8 = (
    ("dcmix, the checkpoint", "dcmix"),
    ("trained on without TI-Mix", "longer"),
    ("trained on with TI-Mix", "ti"),
)
READINGS = (
    ("dcmix, the checkpoint", "dcmix"),
    ("trained on without TI-Mix", "longer"),
    ("TI-Mix as printed, lambda from 1 to 0", "ti"),
    ("g_M also sees what Eq. (12) keeps", "fit"),
    ("lambda is 0.8 at every step", "share"),
    ("lambda from 1 to 0.8", "floor0.8"),
)
PREFIX = (
    ("in encoder and decoder", "curve dcsa"),
    ("in the encoder alone", "curve dcsa-encoder"),
)
X_D = (
    ("the prior in one step, as TI-Mix's x_hat where all is masked", "discrete 1"),
    ("the prior in 16 steps, as X_d at inference", "discrete 16"),
)


def row_of(entry, result):
    """The key of the row that a result belongs to; "vae" and "vq" are what they reconstructed."""
    for tokenizer in ("vae", "vq"):
        if f"reconstructed by the {tokenizer} of" in result.get("source", ""):
            return tokenizer
    return entry["key"]


def by_seed(entries, data, key, value="FD"):
    """The measured numbers of a row, {seed: number}."""
    numbers = {}
    for entry in entries:
        for result in entry["results"]:
            if entry["data"] == data and row_of(entry, result) == key:
                numbers[entry["seed"]] = result[value]
    return numbers


def found(entries, data, key, value="FD"):
    """The measured numbers of a row, one a seed."""
    return list(by_seed(entries, data, key, value).values())


def cell(numbers, digits=2):
    """The mean and, of several seeds, the standard deviation."""
    if not numbers:
        return ""
    mean = f"{np.mean(numbers):.{digits}f}"
    if len(numbers) == 1:
        return mean
    return f"{mean} ± {np.std(numbers, ddof=1):.{digits}f}"


def markdown(head, rows):
    """A table of the cells of `head` and `rows`."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table_1(entries):
    head = ["", "shapes FD", "shapes CS", "fashion-mnist FD", "fashion-mnist CS", "parameters"]
    rows = []
    for label, key, parameters in TABLE_1:
        row = [label]
        for data in DATA:
            row.append(cell(found(entries, data, key, "FD")))
            row.append(cell(found(entries, data, key, "CS")))
        rows.append([*row, parameters])
    return markdown(head, rows)


def mix_at(entries):
    rows = []
    for label, key in SIGHT:
        FD = found(entries, "shapes", key, "FD")
        CS = found(entries, "shapes", key, "CS")
        rows.append([label, cell(FD), cell(CS)])
    return markdown(["shapes", "FD", "CS"], rows)


def table_2(entries):
    rows = []
    for guidance, millions, tokens in TABLE_2:
        image = cell(found(entries, "shapes", f"time {guidance}", "image"), digits=4)
        epoch = cell(found(entries, "shapes", f"time {guidance}", "epoch"), digits=1)
        rows.append([guidance, image, epoch, f"{millions:.2f}M", str(tokens)])
    return markdown(["", "s/image", "s/epoch", "parameters", "tokens"], rows)


def figure_8(entries):
    head = ["FD", "shapes, drawn X_d", "shapes, true X_d"]
    head += ["fashion-mnist, drawn X_d", "fashion-mnist, true X_d"]
    rows = []
    for label, run in FIGURE_8:
        row = [label]
        for data in DATA:
            row.append(cell(found(entries, data, f"{run} few")))
            row.append(cell(found(entries, data, f"{run} truth")))
        rows.append(row)
    return markdown(head, rows)


def readings(entries):
    """FD of each reading of TI-Mix, seed by seed, and less that of training on without it."""
    longer = np.array(found(entries, "fashion-mnist", "reading longer"))
    rows = []
    for label, run in READINGS:
        FD = np.array(found(entries, "fashion-mnist", f"reading {run}"))
        difference = ", ".join(f"{d:+.2f}" for d in FD - longer) if run != "longer" else ""
        rows.append([label, ", ".join(f"{d:.2f}" for d in FD), difference])
    return markdown(["fashion-mnist, seeds 0 and 1", "FD", "minus that of training on"], rows)


def prefix(entries):
    """FD of dcsa by where its prefix runs, of the seeds that were trained both ways."""
    rows = []
    for label, key in PREFIX:
        row = [label]
        for data in DATA:
            both = by_seed(entries, data, "curve dcsa-encoder")
            FD = by_seed(entries, data, key)
            row.append(", ".join(f"{FD[seed]:.2f}" for seed in both))
        rows.append(row)
    head = ["FD of dcsa, by its prefix", "shapes, seeds 0 to 2", "fashion-mnist, seed 1"]
    return markdown(head, rows)


def x_d_alone(entries):
    rows = []
    for label, key in X_D:
        rows.append([label, *(cell(found(entries, data, key)) for data in DATA)])
    return markdown(["FD of X_d alone", *DATA], rows)


def figure_1(entries):
    """FD and seconds of training against the length of stage mixar, on shapes."""
    rows = [["X_d alone", "", "", cell(found(entries, "shapes", "curve discrete")), ""]]
    for n, end in LENGTHS.items():
        row = [str(n)]
        for guidance in ("none", "dcmix"):
            row.append(cell(found(entries, "shapes", f"curve {guidance}{end}")))
            row.append(cell(found(entries, "shapes", f"train {guidance}{end}", "training"), 0))
        rows.append(row)
    return markdown(["steps", "none, FD", "seconds", "dcmix, FD", "seconds"], rows)


def after_1000(entries):
    """X_d alone and the guidances after the 1,000 steps of today's recipe."""
    rows = []
    for method in ("discrete", *METHODS):
        row = ["the prior's X_d, decoded" if method == "discrete" else method]
        for data in DATA:
            FD = found(entries, data, f"curve {method}")
            row += [", ".join(f"{d:.2f}" for d in FD), cell(FD)]
        rows.append(row)
    head = ["FD", "shapes, seeds 0 to 2", "shapes", "fashion-mnist, seeds 0 to 2", "fashion-mnist"]
    return markdown(head, rows)


def ar_steps(entries):
    head = ["AR steps", "shapes, none", "shapes, dcmix"]
    head += ["fashion-mnist, none", "fashion-mnist, dcmix"]
    rows = []
    for n in AR_STEPS:
        row = [str(n)]
        for data in DATA:
            row.append(cell(found(entries, data, f"none ar {n}")))
            row.append(cell(found(entries, data, f"dcmix ar {n}")))
        rows.append(row)
    return markdown(head, rows)


def diffusion_steps(entries):
    rows = []
    for n in (*DIFFUSION_STEPS, *FALLING):
        key = f"dcmix diffusion {n}"
        rows.append([n, *(cell(found(entries, data, key)) for data in DATA)])
    return markdown(["diffusion steps", *DATA], rows)


def tables(entries):
    """The entries of assets/findings.json -> {name: table in markdown}."""
    return {
        "Table 1": table_1(entries),
        "Mix at": mix_at(entries),
        "Table 2": table_2(entries),
        "Figure 8": figure_8(entries),
        "readings of TI-Mix": readings(entries),
        "X_d alone": x_d_alone(entries),
        "prefix of DC-SA": prefix(entries),
        "Figure 1": figure_1(entries),
        "1,000 steps": after_1000(entries),
        "AR steps": ar_steps(entries),
        "diffusion steps": diffusion_steps(entries),
    }


# the plots of docs/findings.md

PANEL_WIDTH = 480
PANEL_HEIGHT = 340
COLOURS = dict(
    none="#777777",
    dcmix="#c03020",
    dcsa="#2060c0",
    dcca="#209050",
    fixed="#c03020",
    falling="#2060c0",
)


def tick_step(most):
    """The smallest of 0.01, 0.02, 0.05, 0.1, ... that gives at most eight ticks up to `most`."""
    for power in (0.01, 0.1, 1, 10):
        for step in (power, 2 * power, 5 * power):
            if most / step < 8:
                return step


class Panel:
    """One plot of lines {name: [(x, numbers)]}; x has a logarithmic axis, y begins at 0.

    A point stands at the mean of its numbers, a bar shows their standard deviation.
    """

    def __init__(self, image, left, top, lines):
        self.pen = ImageDraw.Draw(image)
        self.font = ImageFont.load_default(14)
        self.lines = lines
        self.points = []
        for name, line in lines.items():
            for x, numbers in line:
                spread = np.std(numbers, ddof=1) if len(numbers) > 1 else 0
                self.points.append((name, x, np.mean(numbers), spread))
        self.xs = sorted({x for _, x, _, _ in self.points})
        self.most = 1.05 * max(mean + spread for _, _, mean, spread in self.points)
        # the axes, in pixels
        self.top = top
        self.x0 = left + 60
        self.x1 = left + PANEL_WIDTH - 90
        self.y0 = top + PANEL_HEIGHT - 50
        self.y1 = top + 40

    def x(self, value):
        """The column of pixels of a value; a single one stands at the left."""
        first, last = self.xs[0], self.xs[-1]
        span = np.log(last / first) or 1
        return self.x0 + (self.x1 - self.x0) * (0.08 + 0.84 * np.log(value / first) / span)

    def y(self, value):
        """The row of pixels of a value."""
        return self.y0 + (self.y1 - self.y0) * value / self.most

    def write(self, x, y, text, anchor, colour="black"):
        self.pen.text((x, y), text, colour, self.font, anchor)

    def axes(self, title, axis):
        """Title, axes and ticks; a tick on the x axis that would cover the last has no number."""
        self.write(self.x0, self.top + 14, title, "lm")
        self.write((self.x0 + self.x1) / 2, self.y0 + 38, axis, "mm")
        self.pen.line([(self.x0, self.y1), (self.x0, self.y0), (self.x1, self.y0)], "black")
        for value in np.arange(0, self.most, tick_step(self.most)):
            y = self.y(value)
            self.pen.line([(self.x0 - 4, y), (self.x0, y)], "black")
            self.write(self.x0 - 8, y, f"{value:.3g}", "rm")
        free_from = self.x0
        for value in self.xs:
            x = self.x(value)
            if x > free_from:
                self.write(x, self.y0 + 12, f"{value:g}", "mm")
                free_from = x + 32

    def curves(self):
        """Each line with its name at its end, from the highest end to the lowest."""
        ends = {name: np.mean(line[-1][1]) for name, line in self.lines.items()}
        labels = []
        for name in sorted(ends, key=ends.get, reverse=True):
            line = self.lines[name]
            self.pen.line([(self.x(x), self.y(np.mean(n))) for x, n in line], COLOURS[name], 2)
            x = self.x(line[-1][0]) + 8
            y = self.y(ends[name])
            # a name that would cover another goes below it
            while any(abs(x - a) < 50 and abs(y - b) < 15 for a, b in labels):
                y += 1
            labels.append((x, y))
            self.write(x, y, name, "lm", COLOURS[name])

    def means(self):
        """Each point with its bar."""
        for name, value, mean, spread in self.points:
            x = self.x(value)
            y = self.y(mean)
            bar = [(x, self.y(mean - spread)), (x, self.y(mean + spread))]
            self.pen.line(bar, COLOURS[name])
            self.pen.ellipse([x - 4, y - 4, x + 4, y + 4], COLOURS[name])


def lines_of(entries, data, points):
    """Points (name, x, key) -> {name: [(x, numbers)]}, without those not yet measured."""
    lines = {}
    for name, x, key in points:
        numbers = found(entries, data, key)
        if numbers:
            lines.setdefault(name, []).append((x, numbers))
    return lines


def save_figure(entries, figure, panels):
    """Write assets/findings-FIGURE.png: a row a data set, a column for each of two panels.

    - panels: pairs (label of the x axis, points as in lines_of)
    """
    image = Image.new("RGB", (2 * PANEL_WIDTH, 2 * PANEL_HEIGHT), "white")
    for i, data in enumerate(DATA):
        for k, (axis, points) in enumerate(panels):
            lines = lines_of(entries, data, points)
            if lines:
                panel = Panel(image, PANEL_WIDTH * k, PANEL_HEIGHT * i, lines)
                panel.axes(f"FD, {data}", axis)
                panel.curves()
                panel.means()
    image.save(ROOT / "assets" / f"findings-{figure}.png")


def plots(entries):
    """FD against tokens and parameters, and FD against AR steps and diffusion steps."""
    tokens = [(name, count, name) for name, _, count in TABLE_2]
    parameters = [(name, millions, name) for name, millions, _ in TABLE_2]
    save_figure(entries, "figure7", [("tokens", tokens), ("million parameters", parameters)])

    ar = []
    for run in ("none", "dcmix"):
        for n in AR_STEPS:
            ar.append((run, n, f"{run} ar {n}"))
    diffusion = [("fixed", int(n), f"dcmix diffusion {n}") for n in DIFFUSION_STEPS]
    for n in FALLING:
        first, last = n.split(":")
        diffusion.append(("falling", (int(first) + int(last)) / 2, f"dcmix diffusion {n}"))
    panels = [("AR steps", ar), ("diffusion steps (falling: the mean)", diffusion)]
    save_figure(entries, "steps", panels)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    actions = ["run", "time", "draw", "validation", "collect", "tables", "plots"]
    p.add_argument("what", choices=actions)
    p.add_argument("data", nargs="?", choices=DATA)
    p.add_argument("seed", nargs="?", type=int)
    p.add_argument("--only", nargs="*", help="names of rows, with their trainings (default: all)")
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


if __name__ == "__main__":
    main()
