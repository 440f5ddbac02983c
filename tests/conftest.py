"""What all tests share: no network, scripts run in this process, and the form of the ops that a test runs with."""
import importlib
import os
import signal
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "5000")     # OpenMP's threads sleep soon: two runs of pytest share cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")        # otherwise a name that is no folder is asked for on the hub

import pytest  # noqa: E402
import torch  # noqa: E402
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
    monkeypatch.setattr(kernels, "PLAIN", {"only": False})


@pytest.fixture(autouse=True)
def nothing_reported(monkeypatch):
    """Lets each test see reports that were made before it, of which a process makes each once."""
    monkeypatch.setattr(data, "REPORTED", set())


def may_take_kernels(*tensors):
    """Stands for kernels.on_gpu where tensors on the CPU are to take the way of a GPU's."""
    if kernels.PLAIN["only"] or torch.compiler.is_compiling():
        return False
    dtype = tensors[0].dtype
    return dtype in kernels.CUDA_NAMES and all(
        type(z) in (torch.Tensor, torch.nn.Parameter) and z.dtype == dtype for z in tensors)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Lets tensors on the CPU take the way of a GPU's, with PyTorch in place of the kernels.

    So what autograd keeps and what it returns is a GPU's; tests/test_kernels_cuda.py runs the kernels themselves."""
    def plainly(op, *args):
        with monkeypatch.context() as patched:
            patched.setattr(kernels, "PLAIN", {"only": True})
            return op(*args)

    def gradients(op, grads, args):
        args = [z.detach().requires_grad_() if torch.is_tensor(z) and z.is_floating_point() else z for z in args]
        with torch.enable_grad():
            outs = kernels.as_tuple(plainly(op, *args))
        return torch.autograd.grad(outs, args[:3], grads)

    def modulate_forward(x, shift, scale):
        mean, rstd = x.new_ones(2, x[..., 0].numel(), dtype=torch.float32)
        return plainly(kernels.modulate, x, shift, scale), mean, rstd

    def modulate_backward(grad, x, mean, rstd, scale):
        return gradients(kernels.modulate, [grad], [x, torch.zeros_like(scale), scale])

    def rotated(op):
        def run(qkv, q_weight, k_weight, cos, sin, *how):
            rotary = None if cos is None else (cos, sin)
            return op(qkv, q_weight, k_weight, rotary, *how)
        return run

    qk_norm_rope = rotated(kernels.qk_norm_rope)
    time_attention = rotated(kernels.time_attention)

    def qk_norm_rope_backward(dq, dk, dv, *args):
        return gradients(qk_norm_rope, [dq, dk, dv], args)

    def time_attention_backward(dout, *args):
        return gradients(time_attention, [dout], args)

    stand_ins = {
        "on_gpu": may_take_kernels, "compiles": lambda names, device: True, "takes_varlen": lambda q: False,
        "modulate_forward": modulate_forward, "modulate_backward": modulate_backward,
        "qk_norm_rope_forward": lambda *args: plainly(qk_norm_rope, *args),
        "qk_norm_rope_backward": qk_norm_rope_backward,
        "time_attention_forward": lambda *args: plainly(time_attention, *args),
        "time_attention_backward": time_attention_backward,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(kernels, name, stand_in)


@pytest.fixture(params=["plain", "as on a GPU"])
def ops(request):
    """Runs a test once with each form of the ops."""
    if request.param != "plain":
        request.getfixturevalue("as_on_a_gpu")
    return request.param
