"""What all tests share: the product's files on the import path, untouched signals, small runs."""
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import running
import sound
import train

# of these small tensors a second thread would cost more than it brings
torch.set_num_threads(1)
HANDLERS = {number: signal.getsignal(number) for number in train.SIGNALS}


@pytest.fixture(autouse=True)
def others_are_sound(request):
    """A test of one equation does not fail because of another one."""
    with sound.others(request.node.name):
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """In an assignment, a test that stops at another equation, not yet written, waits for it."""
    try:
        return (yield)
    except NotImplementedError as error:
        equation = sound.waits_for(item.name, error)
        if equation:
            pytest.skip(f"waits for {equation}")
        raise


@pytest.fixture(autouse=True)
def signals():
    """train.main and sample.main handle signals. Afterwards Ctrl-C ends pytest again."""
    yield
    for number, handler in HANDLERS.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder of runs with every stage trained for two steps. Tests read it and do not write."""
    folder = tmp_path_factory.mktemp("runs")
    train.main([*running.SMALL, "--runs", str(folder), "--steps", "2"])
    return folder
