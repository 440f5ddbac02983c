"""Checks each op of kernels.py, forward and backward, against its formula written out here in fp64.

An op is plain PyTorch; some have CUDA C++ beside it, which must be as close to fp64 (tests/test_kernels_cuda.py).
"""
import math
import subprocess
import sys
import threading
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import kernels

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
EPS = 1e-6          # of LayerNorm and RMSNorm in Open-Sora


# ---- the formulas ----

def exact_modulate(x, shift, scale):
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return normed * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)


def exact_gated_residual(x, gate, update):
    return x + gate.unsqueeze(2) * update


def exact_rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def exact_rope(x, cos, sin):
    """Multiplies each pair of values, as a complex number, by that of its angle.  x [... T D]; cos, sin [T D/2]."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2)


def exact_attention(q, k, v):
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
    return weights @ v


def exact_qk_norm_rope(qkv, q_weight, k_weight, rotary, rope_first, num_heads, axis):
    B, T, S, C3 = qkv.shape
    heads = qkv.view(B, T, S, 3, num_heads, C3 // 3 // num_heads)
    if axis == "space":
        q, k, v = heads.permute(3, 0, 1, 4, 2, 5).flatten(1, 2)     # each [B T, heads, S, D]
    else:
        q, k, v = heads.permute(3, 0, 2, 4, 1, 5).flatten(1, 2)     # each [B S, heads, T, D]
    found = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        if rotary is not None and rope_first:
            x = exact_rope(x, *rotary)
        if weight is not None:
            x = exact_rms_norm(x, weight)
        if rotary is not None and not rope_first:
            x = exact_rope(x, *rotary)
        found.append(x)
    return *found, v


def exact_time_attention(qkv, q_weight, k_weight, rotary, rope_first, num_heads):
    q, k, v = exact_qk_norm_rope(qkv, q_weight, k_weight, rotary, rope_first, num_heads, "time")
    return exact_attention(q, k, v).transpose(1, 2).flatten(2)


def exact_gelu_linear(x, weight, bias):
    gelu = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
    return gelu @ weight.T + bias


def exact_cross_attention(q, k, v, lengths):
    outs = []
    start = 0
    for clip, length in zip(q, lengths):
        caption = slice(start, start + length)
        outs.append(exact_attention(clip, k[caption].transpose(0, 1), v[caption].transpose(0, 1)))
        start += length
    return torch.stack(outs)


FORMULAS = {
    "modulate": exact_modulate,
    "gated_residual": exact_gated_residual,
    "qk_norm_rope": exact_qk_norm_rope,
    "time_attention": exact_time_attention,
    "gelu_linear": exact_gelu_linear,
    "attention": exact_attention,
    "cross_attention": exact_cross_attention,
}


# ---- the arguments ----

def rand(*shape, seed=0):
    """Returns normal noise in fp64, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")


def frames_last(x):
    """Returns x [B T S C] with the same values, but stored as [B S T C], as attention over time leaves it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def every_second(x):
    """Returns x with the same values, but with a stride of 2 along the last axis."""
    return torch.stack([x, x], dim=-1).flatten(-2)[..., ::2]


def modulate_args(B, T, S, C, per_frame, layout=None):
    x = 3 * rand(B, T, S, C) + 1
    shift, scale = rand(B, T if per_frame else 1, 2 * C, seed=1).chunk(2, dim=-1)    # strided, as from the model
    return layout(x) if layout else x, shift, scale


def gate_args(B, T, S, C, per_frame, layout=None):
    gate, _ = rand(B, T if per_frame else 1, 2 * C, seed=1).chunk(2, dim=-1)
    update = rand(B, T, S, C, seed=3)
    return rand(B, T, S, C), gate, layout(update) if layout else update


def qk_args(B, T, S, heads, D, axis, turned, rope_first, layout=None):
    qkv = rand(B, T, S, 3 * heads * D)
    q_weight, k_weight = 1 + 0.5 * rand(2, D, seed=1)
    rotary = None
    if turned:
        angle = rand(S if axis == "space" else T, D // 2, seed=2)
        rotary = angle.cos(), angle.sin()
    return layout(qkv) if layout else qkv, q_weight, k_weight, rotary, rope_first, heads, axis


def time_args(B, T, S, heads, D, rope_first, layout=None):
    return qk_args(B, T, S, heads, D, "time", True, rope_first, layout)[:-1]


def gelu_args(*shape, layout=None):
    x = 4 * rand(*shape)
    return layout(x) if layout else x, rand(12, shape[-1], seed=1) / math.sqrt(shape[-1]), rand(12, seed=2)


def text_args(lengths):
    keys = rand(sum(lengths), 2, 8, seed=1)
    values = rand(sum(lengths), 2, 8, seed=2)
    return rand(len(lengths), 2, 6, 8), keys, values, lengths


CASES = {
    "modulate, all frames alike": ("modulate", modulate_args(2, 3, 5, 24, per_frame=False)),
    "modulate, each frame its own": ("modulate", modulate_args(2, 4, 37, 36, per_frame=True, layout=frames_last)),
    "modulate, one token": ("modulate", modulate_args(1, 1, 1, 24, per_frame=False, layout=every_second)),
    "gated_residual, all frames alike": ("gated_residual", gate_args(2, 3, 5, 24, per_frame=False, layout=frames_last)),
    "gated_residual, each frame its own": ("gated_residual", gate_args(2, 4, 37, 36, per_frame=True)),
    "gated_residual, one token": ("gated_residual", gate_args(1, 1, 1, 24, per_frame=False, layout=every_second)),
    "qk_norm_rope, space": ("qk_norm_rope", qk_args(2, 3, 5, 2, 12, "space", False, False)),
    "qk_norm_rope, space, turned": ("qk_norm_rope", qk_args(1, 2, 7, 3, 8, "space", True, True)),
    "qk_norm_rope, time": ("qk_norm_rope", qk_args(2, 3, 5, 2, 12, "time", True, False)),
    "qk_norm_rope, time, Q1": ("qk_norm_rope", qk_args(2, 3, 5, 2, 12, "time", True, True, layout=frames_last)),
    "qk_norm_rope, one token": ("qk_norm_rope", qk_args(1, 1, 1, 2, 12, "time", True, False, layout=every_second)),
    "time_attention, even T": ("time_attention", time_args(2, 4, 3, 2, 8, False)),
    "time_attention, odd T, Q1": ("time_attention", time_args(1, 17, 3, 2, 8, True, layout=frames_last)),
    "time_attention, one frame": ("time_attention", time_args(2, 1, 3, 2, 8, False)),
    "time_attention, more than a GPU's kernel takes": ("time_attention", time_args(1, 33, 2, 2, 8, False)),
    "gelu_linear, tokens": ("gelu_linear", gelu_args(2, 3, 37, 24)),
    "gelu_linear, strided text": ("gelu_linear", gelu_args(7, 24, layout=every_second)),
    "attention": ("attention", (rand(2, 3, 5, 12), rand(2, 3, 7, 12, seed=1), rand(2, 3, 7, 12, seed=2))),
    "cross_attention, equal captions": ("cross_attention", text_args([4, 4, 4])),
    "cross_attention, different captions": ("cross_attention", text_args([3, 7, 1])),
    "cross_attention, some equal": ("cross_attention", text_args([5, 2, 5])),
}
# The width of XL/2, for GPUs only: on a CPU it takes seconds.
WIDE_CASES = {
    "modulate, XL/2": ("modulate", modulate_args(2, 5, 37, 1152, per_frame=True)),
    "gated_residual, XL/2": ("gated_residual", gate_args(2, 5, 37, 1152, per_frame=True, layout=frames_last)),
    "qk_norm_rope, XL/2, space": ("qk_norm_rope", qk_args(2, 5, 37, 16, 72, "space", False, False)),
    "qk_norm_rope, XL/2, time": ("qk_norm_rope", qk_args(2, 5, 37, 16, 72, "time", True, False)),
    "time_attention, XL/2": ("time_attention", time_args(2, 16, 37, 16, 72, False)),
    "time_attention, XL/2, Q1": ("time_attention", time_args(2, 32, 37, 16, 72, True)),
    "gelu_linear, XL/2": ("gelu_linear", gelu_args(2, 5, 37, 4608)),
}


# ---- the comparison ----

def error(got, want):
    """Returns the relative L2 error; of what is about zero, the absolute one."""
    got, want = got.double().cpu(), want.double().cpu()
    return ((got - want).norm() / want.norm().clamp(min=1)).item()


def to_dtype(args, dtype):
    """Returns args on the default device: tensors in dtype, cos and sin in fp32 at least, as the model gives them."""
    device = torch.get_default_device()
    table_dtype = torch.promote_types(dtype, torch.float32)
    found = []
    for value in args:
        if torch.is_tensor(value):
            strided = torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=device)
            found.append(strided.copy_(value))
        elif isinstance(value, tuple):
            found.append(tuple(table.to(device, table_dtype) for table in value))
        else:
            found.append(value)
    return found


def results(op, args):
    """Returns outputs, then gradients by each tensor in args of the outputs' product with noise."""
    args = [value.detach().requires_grad_() if torch.is_tensor(value) else value for value in args]
    outputs = op(*args)
    if torch.is_tensor(outputs):
        outputs = (outputs,)
    noise = [rand(*z.shape, seed=9).to(z.device, z.dtype) for z in outputs]
    leaves = [value for value in args if torch.is_tensor(value)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, noise)]


def exact_results(name, args):
    """Returns what results() gives for the op's formula in fp64, of the same rounded args."""
    return results(FORMULAS[name], to_dtype(args, torch.float64))


def plain_results(name, args):
    """Returns what results() gives for the plain form of an op, whatever is chosen."""
    chosen = kernels.PLAIN["only"]
    kernels.PLAIN["only"] = True
    try:
        return results(getattr(kernels, name), args)
    finally:
        kernels.PLAIN["only"] = chosen


def assert_as_close(name, args, dtype):
    """Asserts that the op as it is called now is about as close to fp64 as its plain form is."""
    args = to_dtype(args, dtype)
    exact = exact_results(name, args)
    fast = results(getattr(kernels, name), args)
    plain = plain_results(name, args)
    for number, want in enumerate(exact):
        assert fast[number].dtype == dtype, (name, number)
        assert fast[number].shape == want.shape, (name, number)
        luck = 2 * torch.finfo(dtype).eps if want.numel() < 50 else 0     # few values may be exact by chance
        limit = 1.5 * error(plain[number], want) + luck
        assert error(fast[number], want) <= limit, (name, dtype, f"result {number}")


# ---- the ops ----

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_plain_form_is_the_formula(case, dtype):
    name, args = CASES[case]
    args = to_dtype(args, dtype)
    got = plain_results(name, args)
    exact = exact_results(name, args)
    assert len(got) == len(exact)
    for number, want in enumerate(exact):
        assert got[number].dtype == dtype, number
        assert got[number].shape == want.shape, number
        assert error(got[number], want) < 8 * torch.finfo(dtype).eps, f"result {number}"


@pytest.mark.parametrize("case, dtype", [
    ("modulate, each frame its own", torch.float32),
    ("qk_norm_rope, time, Q1", torch.bfloat16),
    ("time_attention, odd T, Q1", torch.float32),
    ("gelu_linear, tokens", torch.bfloat16),
    ("gelu_linear, strided text", torch.float32),
])
def test_an_autograd_function_is_as_close_as_the_plain_form(as_on_a_gpu, case, dtype):
    assert_as_close(*CASES[case], dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, *WIDE_CASES])
def test_on_a_gpu_every_op_is_as_close_as_its_plain_form(case):
    use_gpu_ops()
    with torch.device("cuda"):
        for dtype in (torch.float32, torch.bfloat16):
            assert_as_close(*(CASES | WIDE_CASES)[case], dtype)


def use_gpu_ops():
    """Chooses the ops of a GPU; skips the test where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    warnings.simplefilter("error")      # a kernel that does not compile is warned of
    assert "CUDA" in kernels.use("cuda")


def test_rms_norm_in_bf16_is_rounded_once():
    """Open-Sora's own rounds before the weight, too, which is less accurate and four kernels on a GPU."""
    x = rand(64, 72).bfloat16()
    weight = rand(72, seed=1).bfloat16()
    wide = x.double()
    exact = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS) * weight.double()
    twice = exact.div(weight.double()).bfloat16() * weight
    assert error(kernels.rms_norm(x, weight), exact) < 0.8 * error(twice, exact)


def test_rope_is_that_of_open_sora():
    golden = load_file(GOLDEN / "f_embeddings.safetensors")
    angle = torch.arange(6.0)[:, None] * golden["rope.freqs"]
    got = kernels.rope(golden["rope.in"], angle.cos(), angle.sin())
    assert error(got, golden["rope.out"]) < 1e-6


def test_without_qk_norm_only_the_rotation_is_left():
    """Some published weights have no QK-norm; its weights are None then."""
    qkv, _, _, rotary, _, heads, axis = qk_args(2, 3, 5, 2, 12, "time", True, False)
    want = exact_qk_norm_rope(qkv, None, None, rotary, False, heads, axis)
    for rope_first in (False, True):
        got = kernels.qk_norm_rope(qkv, None, None, rotary, rope_first, heads, axis)
        for z, exact in zip(got, want):
            assert error(z, exact) < 1e-12


def assert_frozen_arguments_get_no_gradient():
    qkv = rand(1, 3, 4, 24).float().to(torch.get_default_device())
    trained = torch.ones(4, requires_grad=True)
    frozen = torch.ones(4)
    q, k, v = kernels.qk_norm_rope(qkv, trained, frozen, None, False, 2, "space")
    (q + k + v).square().sum().backward()
    assert trained.grad.any()
    assert frozen.grad is None
    assert qkv.grad is None

    x = qkv[..., :8]
    gate = torch.ones(1, 1, 8, requires_grad=True)
    gated = kernels.gated_residual(x, gate, x)
    kernels.modulate(gated, gate.detach(), gate.detach()).pow(3).sum().backward()
    assert gate.grad.any()
    assert x.grad is None


def test_frozen_arguments_get_no_gradient(ops):
    assert_frozen_arguments_get_no_gradient()


@pytest.mark.gpu
def test_on_a_gpu_frozen_arguments_get_no_gradient():
    use_gpu_ops()
    with torch.device("cuda"):
        assert_frozen_arguments_get_no_gradient()


def assert_only_the_bad_token_is_not_finite():
    zero = torch.zeros(1, 1, 24, dtype=torch.bfloat16)
    identity = torch.eye(24, dtype=torch.bfloat16)
    weights = torch.ones(2, 8, dtype=torch.bfloat16)
    for bad in (math.nan, math.inf):
        x = torch.ones(1, 1, 2, 24, dtype=torch.bfloat16)
        x[0, 0, 1, 3] = bad
        q, _, _ = kernels.qk_norm_rope(x, *weights, None, False, 1, "space")
        outputs = [kernels.modulate(x, zero, zero), kernels.gated_residual(x, zero, x),
                   kernels.gelu_linear(x, identity, zero[0, 0]), q.transpose(1, 2)]
        for out in outputs:
            good_token, bad_token = out.flatten(0, 2)
            assert good_token.isfinite().all()
            assert not bad_token.isfinite().all()


def test_what_is_not_finite_stays_so_and_does_not_spread(ops):
    assert_only_the_bad_token_is_not_finite()


@pytest.mark.gpu
def test_on_a_gpu_what_is_not_finite_stays_so():
    use_gpu_ops()
    with torch.device("cuda"):
        assert_only_the_bad_token_is_not_finite()


# ---- which form runs ----

def test_use_names_the_form():
    for plain in (False, True):
        assert kernels.use("cpu", plain=plain) == "ops: plain PyTorch"


def test_compiled_code_takes_the_plain_form(as_on_a_gpu, monkeypatch):
    """torch.compile fuses it into kernels of its own."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    name, args = CASES["modulate, all frames alike"]
    out = kernels.modulate(*[z.float().requires_grad_() for z in args])
    assert "Modulate" not in type(out.grad_fn).__name__


def test_transformers_takes_kernels_for_no_package_of_its_own():
    """transformers looks for a package called `kernels`, finds this file, and compares its version."""
    assert isinstance(kernels.__version__, str)


# ---- processes that share a clip ----

def in_threads(world, run):
    """Calls run(group) in `world` threads that stand for processes, connected by gloo; returns what each returned."""
    store = dist.HashStore()
    found = [None] * world

    def rank_thread(rank):
        try:
            group = dist.ProcessGroup(store, rank, world)
            gloo = dist.ProcessGroupGloo(store, rank, world, timedelta(seconds=60))
            group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
            found[rank] = run(group)
        except BaseException as failure:    # raised below, where pytest sees it
            found[rank] = failure

    threads = [threading.Thread(target=rank_thread, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for value in found:
        if isinstance(value, BaseException):
            raise value
    return found


def test_frames_are_cut_and_joined_again(monkeypatch):
    """4 frames over 3 ranks.  gloo takes tensors that are not contiguous, but NCCL does not."""
    frames = torch.arange(24.0).view(2, 3, 4).mT
    one_for_all = frames[:, :1]
    gather = dist.all_gather

    def gather_as_nccl(parts, x, group):
        for tensor in (*parts, x):
            assert tensor.is_contiguous()
        gather(parts, x, group=group)

    monkeypatch.setattr(dist, "all_gather", gather_as_nccl)

    def run(group):
        own = kernels.own_frames(frames, 4, group)
        assert own.shape == (2, 2, 3)
        assert torch.equal(kernels.own_frames(one_for_all, 4, group), one_for_all)
        return kernels.all_frames(own.mT.contiguous().mT, 4, group)

    for joined in in_threads(3, run):
        assert torch.equal(joined, frames)


# ---- python kernels.py ----

@pytest.fixture
def small_cases(monkeypatch):
    """Lets scripts run the ops at a tiny size instead of that of XL/2; returns the table of ops."""
    small = kernels.cases(B=2, T=2, S=3, heads=2, D=8, L=4)
    monkeypatch.setattr(kernels, "cases", lambda *size: small)
    return small


def test_the_script_measures_each_op_in_each_dtype(run_script, small_cases):
    ended = run_script("kernels")
    assert ended.status == 0
    for name in small_cases:
        for dtype in ("float32", "bfloat16"):
            rows = [line for line in ended.out.splitlines() if line.startswith(f"{name} ") and f" {dtype} " in line]
            assert len(rows) == 1, (name, dtype)
            assert 0 < float(rows[0].split()[-1]) < 0.02


@pytest.mark.slow
def test_python_kernels_py_checks_each_op():
    done = subprocess.run([sys.executable, "kernels.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in kernels.cases():
        assert done.stdout.count(f"\n{name} ") == 2, name


@pytest.mark.slow
def test_the_benchmark_of_the_ops_runs(small_cases, monkeypatch, capsys):
    import bench_kernels
    monkeypatch.setattr(bench_kernels, "cases", kernels.cases)
    bench_kernels.main()
    printed = capsys.readouterr().out
    for name in small_cases:
        assert printed.count(f"{name} ") >= 2, name


def test_a_gpu_that_does_not_exist_is_an_error(monkeypatch):
    """Never a silent run on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device cuda"):
        kernels.start_processes(device="cuda")
