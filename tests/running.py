"""How the tests start train.py and sample.py: small runs in this process, programs in others."""
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

import quick_train  # noqa: F401, cheap pictures

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
SMALL = ["--images", "64", "--batch-size", "8", "--vae-steps", "2", "--vq-steps", "2",
         "--prior-steps", "2", "--amp", "fp32", "--sample-every", "0"]
# few sampling steps of sample.py, with guidance
FEW = ["--amp", "fp32", "--ar-steps", "2", "--diffusion-steps", "2",
       "--cfg", "2", "--prior-cfg", "1"]


def mixar(runs, out, *flags):
    """The arguments of train.py for a MixAR run in `out` on the finished stages in `runs`."""
    return ["--runs", str(runs), "--out", str(out), *SMALL, *map(str, flags)]


def sampling(run, out, *flags):
    """The arguments of sample.py for few pictures of `run` in few steps."""
    return [str(run), "--out", str(out), *FEW, *map(str, flags)]


def weights(path, key="model"):
    """What the checkpoint in the folder or file `path` holds under `key`."""
    path = path / "last.pt" if path.is_dir() else path
    return torch.load(path, weights_only=True)[key]


def same_weights(a, b):
    """Whether two state dicts are equal bit by bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def change_weight(path, key):
    """Add 1 to the weight `key` of the moving average in the checkpoint file `path`."""
    saved = torch.load(path, weights_only=True)
    saved["ema"][key] += 1
    torch.save(saved, path)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(*words, processes=1):
    """A started Python program, with several processes by torchrun. Its output is text."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        command += [f"--master_port={free_port()}"]
    return subprocess.Popen([*command, *map(str, words)], cwd=ROOT, env=ENVIRONMENT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run(*words, processes=1):
    """Run such a program to its end -> its exit code, stdout and stderr."""
    process = start(*words, processes=processes)
    out, err = process.communicate()
    return process.returncode, out, err
