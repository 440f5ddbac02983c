"""What all tests share: no network, scripts run in this process, and the form of the ops that a test runs with."""
import importlib
import os
import signal
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "5000")     # as the scripts set it: see kernels.py; before torch is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")        # otherwise a name that is no folder is asked for on the hub

import pytest  # noqa: E402
import torch.distributed as dist  # noqa: E402

import data  # noqa: E402
import kernels  # noqa: E402


signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell starts background jobs with Ctrl-C ignored


class Ended(NamedTuple):
    """How a script ended: its exit status, and what it printed."""
    status: int
    out: str
    err: str


@pytest.fixture
def run_script(capsys):
    """A function that runs a script's main() in this process, as `python NAME.py ARGS` would; returns an Ended.

    run_script("train", "configs/tiny.py", "--steps=2"); "assets.shapes" is a name too.  A new interpreter would cost
    four seconds of imports.  Errors that a user should never see, such as KeyError, are raised."""
    def run(name, *args):
        capsys.readouterr()
        status = 0
        try:
            importlib.import_module(name).main([str(arg) for arg in args])
        except SystemExit as ended:
            status = ended.code or 0
        finally:
            restore_process()
        return Ended(status, *capsys.readouterr())
    return run


def restore_process():
    """Undoes what a script's main() leaves behind in its process: signal handlers and the process group."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def ops_as_imported(monkeypatch):
    """Gives each test the ops as they are after an import: what a test chooses does not last."""
    monkeypatch.setattr(kernels, "CHOICE", {"plain": False})


@pytest.fixture(autouse=True)
def nothing_reported(monkeypatch):
    """Lets each test see reports that were made before it, of which a process makes each once."""
    monkeypatch.setattr(data, "REPORTED", set())


@pytest.fixture(params=["plain", "recomputed", "C++"])
def ops(request, ops_as_imported):
    """Runs a test once with each form of the ops that a CPU has."""
    choose_ops(request.param)
    return request.param


def choose_ops(form):
    """Chooses "plain", "recomputed" or "C++"; skips the test where there is no compiler for the last."""
    if form == "recomputed":
        return
    message = kernels.use("cpu", plain=form == "plain")
    if form == "C++" and "C++ on" not in message:
        pytest.skip(message)
