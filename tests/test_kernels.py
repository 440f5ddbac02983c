"""kernels.py against formulas written out in fp64, and RoPE against a golden tensor of Open-Sora 1.1."""
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kernels

GOLDEN = Path(__file__).parent / "golden"


def rand(*shape, seed=0, dtype=torch.float64):
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype, device="cpu")
    return drawn.to(torch.get_default_device())


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def softmax_attention(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1) @ v


@pytest.mark.parametrize("frames", [1, 3])
def test_modulate_and_gate_are_per_frame(frames, all_ops):
    x, update = rand(2, 3, 5, 12), rand(2, 3, 5, 12, seed=3)
    shift, scale = rand(2, frames, 12, seed=1), rand(2, frames, 12, seed=2)
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    got, gated = kernels.modulate(x, shift, scale), kernels.gated_residual(x, shift, update)
    for t in range(3):
        f = t if frames == 3 else 0
        want = normed[:, t] * (1 + scale[:, f, None]) + shift[:, f, None]
        assert error(got[:, t], want) < 1e-12, f"modulate, frame {t}"
        assert error(gated[:, t], x[:, t] + shift[:, f, None] * update[:, t]) < 1e-12, f"gate, frame {t}"


def test_rms_norm_rounds_before_the_weight():
    x, weight = rand(4, 12), rand(12, seed=1)
    want = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    assert error(kernels.rms_norm(x, weight), want) < 1e-12
    x, weight = rand(64, 12).bfloat16(), rand(12, seed=1).bfloat16()
    wide = x.float()
    want = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6)).bfloat16() * weight
    assert torch.equal(kernels.rms_norm(x, weight), want)


def test_rope_is_the_golden_one_and_keeps_lengths():
    golden = load_file(GOLDEN / "f_embeddings.safetensors")
    angle = torch.arange(6.0)[:, None] * golden["rope.freqs"]
    got = kernels.rope(golden["rope.in"], angle.cos(), angle.sin())
    assert error(got, golden["rope.out"]) < 1e-6
    assert torch.allclose(got.norm(dim=-1), golden["rope.in"].norm(dim=-1), rtol=1e-5)


def test_norm_rope_in_both_orders():
    x, weight, angle = rand(2, 3, 4, 12), rand(12, seed=1), rand(4, 6, seed=2)
    rotary = (angle.cos(), angle.sin())
    after = kernels.rope(kernels.rms_norm(x, weight), *rotary)
    before = kernels.rms_norm(kernels.rope(x, *rotary), weight)
    assert torch.equal(kernels.norm_rope(x, weight, rotary), after)
    assert torch.equal(kernels.norm_rope(x, weight, rotary, rope_first=True), before)
    assert error(after, before) > 1e-2, "the two orders must differ"
    assert torch.equal(kernels.norm_rope(x, None, None, rope_first=True), x)
    assert torch.equal(kernels.norm_rope(x, weight, None, rope_first=True), kernels.rms_norm(x, weight))


@pytest.mark.parametrize("lengths", [[4, 4, 4], [3, 1, 7], [5, 2, 5]])
def test_cross_attention_sees_its_own_caption_only(lengths, all_ops):
    q = rand(3, 2, 6, 8).requires_grad_()
    k, v = (rand(sum(lengths), 2, 8, seed=seed).requires_grad_() for seed in (1, 2))
    got = kernels.cross_attention(q, k, v, lengths)
    start, wants = 0, []
    for b, length in enumerate(lengths):
        own = slice(start, start + length)
        wants.append(softmax_attention(q[b], k[own].transpose(0, 1), v[own].transpose(0, 1)))
        start += length
    want, weight = torch.stack(wants), rand(3, 2, 6, 8, seed=3)
    assert error(got, want) < 1e-12
    grads, want_grads = (torch.autograd.grad((out * weight).sum(), (q, k, v)) for out in (got, want))
    assert max(error(a, b) for a, b in zip(grads, want_grads)) < 1e-12


def compare(name, args, dtype):
    """(error of the fast form, of the plain one) for each output and gradient, against fp64 of the same arguments."""
    op = getattr(kernels, name)
    args = tuple(z.to(dtype) if torch.is_tensor(z) else z for z in args)
    with torch.device("cpu"):       # where noise is drawn
        exact = kernels.forward_backward(op.plain, args, torch.float64)()
        both = [kernels.forward_backward(form, args)() for form in (op, op.plain)]
    for got in both[0]:
        assert got.dtype == dtype, f"{name}: {got.dtype}"
    assert [z.shape for z in both[0]] == [z.shape for z in exact]
    return [(error(fast, want), error(plain, want), want.numel()) for fast, plain, want in zip(*both, exact)]


def assert_as_close(name, args, dtype):
    for number, (fast, plain, count) in enumerate(compare(name, args, dtype)):
        luck = 2 * torch.finfo(dtype).eps if count < 50 else 0      # few values may be exact by chance
        assert fast <= 1.5 * plain + luck, (name, dtype, f"result {number}", fast, plain)


SHAPES = [(1, 1, 1, 24), (1, 3, 5, 24), (2, 5, 37, 120), (2, 4, 145, 96), (1, 16, 36, 1152)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_frame", [False, True])
@pytest.mark.parametrize("B, T, S, C", SHAPES)
def test_modulate_and_gate_are_as_close_as_the_plain_form(B, T, S, C, per_frame, dtype, all_ops):
    x, update, n = 3 * rand(B, T, S, C) + 1, rand(B, T, S, C, seed=3), T if per_frame else 1
    shift, scale = rand(B, n, 2 * C, seed=1).chunk(2, dim=-1)               # not contiguous, as from the model
    across = lambda x: x.transpose(1, 2).contiguous().transpose(1, 2)
    for view in (lambda x: x, across):
        assert_as_close("modulate", (view(x), shift, scale), dtype)
        assert_as_close("gated_residual", (x, shift, view(update)), dtype)
        assert_as_close("gated_residual", (view(x), shift, update), dtype)
    wide = rand(B, T + 1, S, 2 * C)
    assert_as_close("modulate", (wide[:, 1:, :, ::2], shift, scale), dtype)
    assert_as_close("gated_residual", (x, shift, wide[:, 1:, :, ::2]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope_first", [False, True])
@pytest.mark.parametrize("axis", ["space", "time"])
@pytest.mark.parametrize("B, T, S, C", SHAPES)
def test_qk_norm_rope_is_as_close_as_the_plain_form(B, T, S, C, axis, rope_first, dtype, all_ops):
    D, n = {24: 6, 120: 20, 96: 48, 1152: 72}[C], {"space": S, "time": T}[axis]
    qkv, weights, angle = rand(B, T, S, 3 * C), list(1 + rand(2, D, seed=1)), rand(n, D // 2, seed=2).float()
    for rotary in (None, (angle.cos(), angle.sin())):
        assert_as_close("qk_norm_rope", (qkv, *weights, rotary, rope_first, C // D, axis), dtype)
        across = qkv.transpose(1, 2).contiguous().transpose(1, 2)
        assert_as_close("qk_norm_rope", (across, *weights, rotary, rope_first, C // D, axis), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 9, 24), (7, 24), (3, 5, 37, 120)])
def test_gelu_linear_is_as_close_as_the_plain_form(shape, dtype, all_ops):
    C = shape[-1]
    assert_as_close("gelu_linear", (4 * rand(*shape), rand(12, C, seed=1) / C ** 0.5, rand(12, seed=2)), dtype)
    assert_as_close("gelu_linear", (4 * rand(*shape[:-1], 2 * C)[..., ::2], rand(12, C, seed=1), rand(12)), dtype)


@pytest.mark.parametrize("axis", ["space", "time"])
def test_q_k_v_lie_as_attention_writes(axis, ops):
    """[N n heads D] in memory, so that what attention returns needs no copy; v is a view where it can be."""
    qkv, heads = rand(1, 3, 5, 3 * 24).float(), 2
    q, k, v = kernels.qk_norm_rope(qkv, *torch.ones(2, 12), None, False, heads, axis)
    N, n = {"space": (3, 5), "time": (5, 3)}[axis]
    assert q.shape == k.shape == v.shape == (N, heads, n, 12)
    assert q.transpose(1, 2).is_contiguous() and k.transpose(1, 2).is_contiguous()
    assert v.untyped_storage()._cdata == qkv.untyped_storage()._cdata


def test_gradients_are_those_of_finite_differences(ops):
    """In fp64, of each op with all its arguments; also those that need no gradient are left out rightly."""
    leaf = lambda *shape, seed: rand(*shape, seed=seed).requires_grad_()
    angle = rand(3, 2, seed=5)
    check = torch.autograd.gradcheck
    for n in (1, 3):
        x, shift, scale = leaf(2, 3, 2, 8, seed=0), leaf(2, n, 8, seed=1), leaf(2, n, 8, seed=2)
        assert check(kernels.modulate, (x, shift, scale))
        assert check(kernels.gated_residual, (x, shift, leaf(2, 3, 2, 8, seed=3)))
        assert check(lambda x, *frozen: kernels.modulate(x, *frozen), (x, shift.detach(), scale.detach()))
    for axis, rotary in (("space", None), ("time", (angle.cos(), angle.sin()))):
        for rope_first in (False, True):
            how = rotary, rope_first, 2, axis
            args = leaf(2, 3, 2, 24, seed=1), leaf(4, seed=2), leaf(4, seed=3)
            assert check(lambda *args, how=how: kernels.qk_norm_rope(*args, *how), args)
    assert check(lambda x: kernels.qk_norm_rope(x, None, None, (angle.cos(), angle.sin()), True, 2, "time"), (args[0],))
    assert check(kernels.gelu_linear, (leaf(2, 3, 8, seed=0), leaf(4, 8, seed=1), leaf(4, seed=2)))


def test_gradients_that_are_not_needed(all_ops):
    """A frozen weight, or an input that is data."""
    qkv, weights = rand(1, 3, 4, 24).float(), [torch.ones(4).requires_grad_(), torch.ones(4)]
    sum(z.square().sum() for z in kernels.qk_norm_rope(qkv, *weights, None, False, 2, "space")).backward()
    assert weights[0].grad.any() and weights[1].grad is None and qkv.grad is None
    x, gate = rand(1, 3, 4, 8).float(), rand(1, 1, 8).float().requires_grad_()
    kernels.modulate(kernels.gated_residual(x, gate, x), gate.detach(), gate.detach()).square().sum().backward()
    assert gate.grad.any() and x.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_nothing(dtype, ops):
    case, threads, found = kernels.cases(T=4, S=37), torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append([z for name in ("modulate", "gated_residual", "qk_norm_rope, time") for z in
                          kernels.forward_backward(case[name][0], kernels.cast(case[name][1], dtype, "cpu"))()])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(error(a, b) < 1e-6 if ops != "C++" else torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_so(dtype, all_ops):
    x, zero = torch.ones(1, 1, 2, 24, dtype=dtype), torch.zeros(1, 1, 24, dtype=dtype)
    for bad in (float("nan"), float("inf")):
        x[0, 0, 1, 3] = bad
        qkv = kernels.qk_norm_rope(x, *torch.ones(2, 8, dtype=dtype), None, False, 1, "space")
        for out in (kernels.modulate(x, zero, zero), kernels.gated_residual(x, zero, x), qkv[0].transpose(1, 2),
                    kernels.gelu_linear(x, torch.eye(24, dtype=dtype), zero[0, 0])):
            assert out.flatten(0, 2)[0].isfinite().all() and not out.flatten(0, 2)[1].isfinite().all()


def test_what_use_says(monkeypatch, tmp_path):
    monkeypatch.setattr(kernels, "CHOICE", {"plain": False})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert kernels.use("cpu", plain=True) == "ops: plain"
    assert kernels.use("meta") == "ops: PyTorch's, recomputed in backward"
    with monkeypatch.context() as without:
        without.setattr(kernels.shutil, "which", lambda name: None)
        assert re.fullmatch("ops: PyTorch's, .*; no C.*: found no c.*", kernels.use("cpu"))
        assert "cpu" not in kernels.CHOICE
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    with monkeypatch.context() as broken:
        broken.setattr(kernels, "CPP", "this is not C++")
        assert re.match("ops: PyTorch's, .*; no C.*: .*error", kernels.use("cpu")) and "cpu" not in kernels.CHOICE
    assert kernels.use("cpu").startswith("ops: fused C++ on the CPU (")
    file, = (tmp_path / "cache" / "nanosora").iterdir()
    stamp = file.stat().st_mtime_ns
    assert kernels.use("cpu").startswith("ops: fused") and file.stat().st_mtime_ns == stamp, "compiled once"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "no C++:" in kernels.use("cpu"), "where the cache cannot be written"


def test_plain_is_the_plain_form(monkeypatch):
    monkeypatch.setattr(kernels, "CHOICE", {"plain": False})
    monkeypatch.setattr(kernels, "FAST", dict.fromkeys(kernels.FAST))
    kernels.use("cpu", plain=True)
    for name, (op, args) in kernels.cases(B=2, T=2, S=3, heads=2, D=8, L=4).items():
        if hasattr(op, "plain"):
            assert torch.is_tensor(op(*args)) or len(op(*args)) == 3, name
            with pytest.raises(TypeError, match="NoneType"):
                kernels.CHOICE["plain"] = False
                op(*args)
            kernels.CHOICE["plain"] = True


def test_the_table_has_a_row_for_each_op_and_dtype(monkeypatch, capsys):
    monkeypatch.setattr(kernels, "CHOICE", {"plain": False})
    small = kernels.cases(B=2, T=2, S=3, heads=2, D=8, L=4)
    monkeypatch.setattr(kernels, "cases", lambda: small)
    monkeypatch.setattr("sys.argv", ["kernels.py"])
    kernels.main()
    assert len(capsys.readouterr().out.splitlines()) == 2 + 3 * len(small)


def test_has_a_version_for_transformers():
    assert isinstance(kernels.__version__, str)
