"""One rule for reading a file, and one for writing it. Weights become a model in `build`.

Whatever goes wrong with a file ends the program with one line: which file, what was wrong, what to
do. `write_whole` writes a file whole or not at all. Inside `locked`, no other program that locks
the same folder writes into it.

Reads no other file of this folder. Feeds all that read or write files.
Not needed to follow the paper.
Try: echo nothing > no.pt && python sample.py no.pt
"""
import argparse
import fcntl
import hashlib
import json
import os
import pickle
import re
import zipfile
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

import torch


@contextmanager
def reading(path, what):
    """Whatever goes wrong inside ends the program with one line: PATH: not a WHAT: reason."""
    try:
        yield
    except Exception as error:
        reason = shorten(str(error), 300, placeholder=" ...") or type(error).__name__
        if isinstance(error, KeyError):
            reason = f"missing {reason}"
        # numpy and torch speak of pickles and of their own readers
        if "allow_pickle" in reason or "PytorchStreamReader" in reason:
            reason = "it is damaged, cut off or of another kind"
        raise SystemExit(f"{path}: not a {what}: {reason}") from None


def differences(was, now):
    """A text for every entry in which two dicts differ, also in dicts within them.

    An entry that only one of them has is not compared: files of earlier versions have fewer.
    """
    for name in was:
        old, new = was[name], now.get(name, was[name])
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(old, new)
        elif name == "names" and old != new:
            # a hash tells a reader nothing
            yield "pictures of other names or sizes"
        elif old != new:
            yield f"{name} {old}, not {new}"


def check_same(path, was, now):
    """SystemExit naming what differs between two dicts that say how `path` was made."""
    # Tuples become lists, as in files.
    different = "; ".join(sorted(differences(*json.loads(json.dumps([was, now])))))
    if different:
        raise SystemExit(f"{path} was made with {different}: choose another --runs or --out "
                         "folder, or remove it")


@contextmanager
def locked(folder):
    """Inside, no other program may lock `folder`. SystemExit if one has locked it.

    The system frees the lock however a program ends. Half-written files that a killed one left are
    removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SystemExit(f"{folder}: another program is writing into this folder; wait for "
                             "its end or choose another --runs or --out") from None
        for leftover in folder.glob(".*.unfinished"):
            leftover.unlink()
        yield


def write_whole(path, write):
    """Write a file by write(file), whole or not at all. SystemExit where it cannot be written."""
    # the file that a link names is written, not the link
    path = Path(path).resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        if path.exists() and not path.is_file():
            raise OSError("it exists and is not a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    # On a full disk torch.save raises a RuntimeError.
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"{path} cannot be written: {error}") from None
    finally:
        if temporary.is_file():
            temporary.unlink()


def write_json(path, value):
    write_whole(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def read_json(path):
    """The dict that write_json wrote, or {} if there is no such file."""
    with reading(path, "readable note; remove it, or choose another folder"):
        return dict(json.loads(path.read_text())) if path.is_file() else {}


def fingerprint(module):
    """16 hexadecimal digits that tell the weights of a module from others."""
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def checkpoint_file(path):
    """The path of a file, or of last.pt in a folder."""
    return Path(path) / "last.pt" if Path(path).is_dir() else Path(path)


def load_checkpoint(path, kind):
    """The dict in the file `path`, read without running any code in it.

    path: a file, or a folder with last.pt
    kind: "vae", "vq", "prior", "mixar" or "classifier"
    SystemExit if there is no such file, if it is damaged or if it holds another kind.
    """
    path = checkpoint_file(path)
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; expected a {kind} checkpoint")
    with reading(path, f"{kind} checkpoint"):
        # MAR's files also hold their flags
        with torch.serialization.safe_globals([argparse.Namespace]):
            mmap = zipfile.is_zipfile(path)
            with path.open("rb") as file:
                pickled = file.read(1) == b"\x80"                            # by an older PyTorch
            if not mmap and not pickled:
                raise ValueError("it is not a file of weights")
            try:
                saved = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            except (pickle.UnpicklingError, LookupError, EOFError) as error:
                other = re.search(r"GLOBAL (\S+)", str(error))
                raise ValueError(f"it holds {other[1] if other else 'more than weights'}, which "
                                 "could run code when loaded; if you trust it, load it with "
                                 "weights_only=False and save its state_dict alone") from None
        found = saved.get("kind", kind)
        step = int(saved.get("step", 0))
        if found != kind or step < 0:
            raise ValueError(f"it is a {found} checkpoint of {step} steps")
    return saved


def build(cls, config, state):
    """The model cls(**config) with the weights `state`, ready for inference.

    ValueError if the config is impossible, or a weight is not finite or not of the model's kind.
    RuntimeError, of load_state_dict, for other names or shapes.
    """
    # a damaged config must not build millions of layers, or heads that do not divide the width
    depths = [config.get(name, 0) for name in ("depth", "head_depth", "blocks")]
    if max(depths) > len(state) or config.get("D", 0) % config.get("heads", 1):
        raise ValueError(f"no model with {len(state)} weights has the config {config}")
    # On the meta device no time is lost on initial weights.
    with torch.device("meta"):
        model = cls(**config)
    check_weights(model, state)
    model.to_empty(device="cpu").load_state_dict(state)
    # requires_grad stays True: autocast keeps bf16 copies only of weights that have it
    return model.eval()


def check_weights(model, state):
    """ValueError naming a weight in `state` that is not finite or of another kind than its own."""
    for name, own in model.state_dict().items():
        # a weight that is missing is reported by load_state_dict
        value = state.get(name, own)
        same_kind = value.is_floating_point() == own.is_floating_point()
        if not same_kind or value.is_complex() or value.layout != torch.strided:
            raise ValueError(f"{name} holds {value.layout} {value.dtype}")
        if value is not own and not value.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")


def count_modules(state, prefix):
    """How many numbered modules lie under `prefix` in the state dict `state`."""
    return len({key[len(prefix):].split(".")[0] for key in state if key.startswith(prefix)})


def check_equal(path, what, found, expected):
    """SystemExit if the file at `path` has another `what` than the files it is used with."""
    if found != expected:
        raise SystemExit(f"{path} has {found} {what}; what it is used with has {expected}")
