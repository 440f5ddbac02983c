"""kernels.py against formulas written out in fp64, and RoPE against a golden tensor of Open-Sora 1.1."""
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kernels

GOLDEN = Path(__file__).parent / "golden"


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def error(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def softmax_attention(q, k, v):
    return torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1) @ v


@pytest.mark.parametrize("frames", [1, 3])
def test_modulate_and_gate_are_per_frame(frames):
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
def test_cross_attention_sees_its_own_caption_only(lengths):
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


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_every_op_keeps_dtype_and_precision(dtype, limit):
    for name, (op, exact_args) in kernels.cases(B=2, T=3, S=4, heads=2, D=8, L=6).items():
        args = kernels.cast(exact_args, dtype, "cpu")
        got, want = op(*args), op(*kernels.cast(args, torch.float64, "cpu"))
        assert got.dtype == dtype, f"{name}: {got.dtype}"
        assert error(got, want) < limit, f"{name}: {error(got, want)}"


def test_has_a_version_for_transformers():
    assert isinstance(kernels.__version__, str)
