"""The operations ST-DiT is made of besides its matrix products, each as the plain PyTorch lines that define it.

In: tensors of any float dtype. Out: the same dtype; means of squares and rotations run in fp32 or wider.
Run: `python kernels.py` checks each op in fp32 and bf16 against fp64 and prints its error, time and memory rate.
Papers: RMSNorm 1910.07467, RoPE 2104.09864, QK-norm 2302.05442. Letters are explained in model.py.
"""
import torch
import torch.nn.functional as F
from einops import rearrange
from torch.utils.benchmark import Timer

__version__ = "0"  # transformers probes for a package called `kernels` and, finding this file, asks for its version
EPS = 1e-6         # of every norm in the model, LayerNorm and RMSNorm alike


def _wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def modulate(x, shift, scale):
    """adaLN of DiT (arXiv 2212.09748): affine-free LayerNorm, then x (1 + scale) + shift, chosen per frame.

    x [B T S C]; shift, scale [B T C], or [B 1 C] for all frames.
    """
    x = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return torch.addcmul(shift[:, :, None], x, 1 + scale[:, :, None])


def gated_residual(x, gate, update):
    """x + gate * update.  x, update [B T S C]; gate [B T C] or [B 1 C]."""
    return torch.addcmul(x, gate[:, :, None], update)


def rms_norm(x, weight):
    """Over the last axis, rounded to x's dtype before the weight is applied, as T5 does.  x [... D], weight [D]."""
    return F.rms_norm(_wide(x), x.shape[-1:], eps=EPS).to(x.dtype) * weight


def rope(x, cos, sin):
    """Turns the pairs (2i, 2i+1) of x by their angles.  x [... T D]; cos, sin [T D/2]."""
    even, odd = rearrange(_wide(x), "... (pair two) -> two ... pair", two=2)
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)


def norm_rope(x, weight, rotary, rope_first=False):
    """Queries or keys x [N heads T D]: QK-norm by weight [D], rotation by rotary (cos, sin); None leaves a step out."""
    if rope_first and rotary is not None:   # Q1 in model.py: what the published weights were trained with
        x, rotary = rope(x, *rotary), None
    x = x if weight is None else rms_norm(x, weight)
    return x if rotary is None else rope(x, *rotary)


def attention(q, k, v):
    """softmax(q k^T / sqrt(D)) v.  q [N heads S D]; k, v [N heads L D]."""
    return F.scaled_dot_product_attention(q, k, v)


def cross_attention(q, k, v, lengths):
    """Each clip sees its own caption, without padding.  q [B heads N D]; k, v [sum(lengths) heads D], end to end."""
    if len(set(lengths)) == 1:
        k, v = (rearrange(z, "(b l) heads d -> b heads l d", l=lengths[0]) for z in (k, v))
        return attention(q, k, v)
    k, v = (rearrange(z, "l heads d -> heads l d").split(lengths, dim=1) for z in (k, v))
    outs, order = [], []
    for length in sorted(set(lengths)):     # captions of equal length share one call
        rows = [b for b, n in enumerate(lengths) if n == length]
        outs.append(attention(q[rows], torch.stack([k[b] for b in rows]), torch.stack([v[b] for b in rows])))
        order += rows
    back = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(outs)[back]


def cases(B=2, T=8, S=144, heads=16, D=72, L=100):
    """name -> (op, its arguments in fp64), at the shape of a 144p clip of 8 frames in the XL/2 model."""
    C, draw = heads * D, torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    x, per_frame, q = rand(B, T, S, C), [rand(B, T, C) for _ in range(2)], rand(B * S, heads, T, D)
    rotary, text = (rand(T, D // 2).cos(), rand(T, D // 2).sin()), [rand(L + L // 2, heads, D) for _ in range(2)]
    space = [rand(B * T, heads, S, D) for _ in range(3)]
    return {
        "modulate": (modulate, (x, *per_frame)),
        "gated_residual": (gated_residual, (x, per_frame[0], rand(B, T, S, C))),
        "norm_rope": (norm_rope, (q, rand(D), rotary)),
        "rope_norm (Q1)": (lambda *args: norm_rope(*args, rope_first=True), (q, rand(D), rotary)),
        "attention": (attention, space),
        "cross_attention": (lambda q, k, v: cross_attention(q, k, v, [L, L // 2]), (rand(B, heads, T * S, D), *text)),
    }


def cast(value, dtype, device):
    return value.to(device, dtype) if torch.is_tensor(value) else tuple(cast(v, dtype, device) for v in value)


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{'op on ' + device:<18} {'dtype':<9} {'shape':<20} {'error':>8} {'ms':>8} {'GB/s':>7}")
    for name, (op, fp64_args) in cases().items():
        for dtype in (torch.float32, torch.bfloat16):
            args = cast(fp64_args, dtype, device)
            exact = op(*cast(args, torch.float64, "cpu"))     # of the same rounded arguments
            out, names = op(*args), {"op": op, "args": args}
            seconds = Timer("op(*args)", globals=names, num_threads=torch.get_num_threads()).timeit(5).median
            error = (out.double().cpu() - exact).norm() / exact.norm()
            moved = sum(a.nbytes for a in args if torch.is_tensor(a)) + out.nbytes
            shape = "x".join(map(str, args[0].shape))
            rate = moved / seconds / 1e9
            print(f"{name:<18} {str(dtype)[6:]:<9} {shape:<20} {error:8.1e} {1e3 * seconds:8.2f} {rate:7.1f}")


if __name__ == "__main__":
    from kernels import main; main()
