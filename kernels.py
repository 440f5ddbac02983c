"""The operations ST-DiT is made of besides its matrix products, each as the plain PyTorch lines that define it.
Also what processes that share the work need: who they are, and how they exchange frames.

In: tensors of any float dtype. Out: the same dtype; means of squares and rotations run in fp32 or wider.
Run: `python kernels.py` checks each op in fp32 and bf16 against fp64 and prints its error, time and memory rate.
Papers: RMSNorm 1910.07467, RoPE 2104.09864, QK-norm 2302.05442, DSP 2403.10266. Letters are explained in model.py.
"""
import os
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
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


# ---- processes ----

class Place(NamedTuple):
    """A process in the world.  mesh: what the weights are cut over.  group: those who share each clip, or None."""
    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh
    group: dist.ProcessGroup | None

    @property
    def share(self):
        """(i, n): of the n shares of a global batch, this process works on the i-th."""
        together = self.group.size() if self.group else 1
        return self.rank // together, self.world // together

    @property
    def reads(self):
        """Whether it is the one of its group that reads the clips, and counts them."""
        return self.group is None or self.group.rank() == 0

    def say(self, text):
        if self.rank == 0:
            print(text)


def start_processes(shard=0, sp=1, device=None):
    """The Place of this process.  Without torchrun the world is one process; its collectives run all the same.

    Weights will be cut among all, or with shard (HSDP) among `shard` neighbours, with replicas beside; `sp` neighbours
    share each clip.  device: "cpu" where there is a GPU that is not to be used."""
    number = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", number) if torch.cuda.is_available() and device != "cpu" else torch.device("cpu")
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, world = next(dist.rendezvous("env://")) if "RANK" in os.environ else (dist.HashStore(), 0, 1)
    if os.environ.get("GROUP_WORLD_SIZE") == "1":   # restarted by torchrun, it finds the addresses of the dead in there
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    for name, n in {"shard": shard or world, "sp": sp}.items():
        if world % n:
            raise ValueError(f"{name}={n} in a world of {world} process{'es' * (world > 1)}: expected a divisor of it; "
                             "torchrun --nproc-per-node 8 makes it one of 8")
    cut = lambda n, names: init_device_mesh(device.type, (world // n, n), mesh_dim_names=names)
    mesh = cut(shard, ("replicas", "shard")) if shard and shard < world else init_device_mesh(device.type, (world,))
    group = cut(sp, ("data", "sequence"))["sequence"].get_group() if sp > 1 else None
    return Place(rank, world, device, mesh, group)


# ---- sequence parallelism: the n ranks of a group share a clip (DSP); without a group these do nothing ----
# Each rank keeps some frames. Frames and positions are padded with zeros to multiples of n: no attention ever sees the
# padding, as after an exchange a rank holds all frames of its positions, or all positions of its frames.

def own_frames(x, T, group):
    """[B T ...] -> this rank's [B ceil(T/n) ...], of its own storage; what stands for all frames, [B 1 ...], stays."""
    if group is None or x.shape[1] != T:
        return x
    return _padded(x, 1, group.size()).chunk(group.size(), dim=1)[group.rank()].clone()


def all_frames(x, T, group, dim=1):
    """[B ceil(T/n) ...] -> [B T ...] on every rank; its gradient is that of this rank's own frames."""
    if group is None:
        return x
    own = x.detach().contiguous()                                           # as NCCL wants the parts, too
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own, group=group)                                # collective
    parts[group.rank()] = x
    return torch.cat(parts, dim).narrow(dim, 0, T)


def to_positions(x, T, group):
    """All positions of own frames [B ceil(T/n) S C] -> all frames of own positions [B T ceil(S/n) C]."""
    return x if group is None else _Exchange.apply(_padded(x, 2, group.size()), group, 2, 1)[:, :T]


def to_frames(x, S, group):
    """The way back: [B T ceil(S/n) C] -> [B ceil(T/n) S C]."""
    return x if group is None else _Exchange.apply(_padded(x, 1, group.size()), group, 1, 2)[:, :, :S]


def _padded(x, dim, n):
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, -x.shape[dim] % n])


class _Exchange(torch.autograd.Function):
    """One all-to-all: each rank cuts x along `cut` into a part for each, and joins what it gets along `join`."""
    @staticmethod
    def forward(ctx, x, group, cut, join):
        ctx.back = group, join, cut
        parts = torch.stack(x.chunk(group.size(), dim=cut))
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)                # collective
        return torch.cat(received.unbind(), dim=join)

    @staticmethod
    def backward(ctx, grad):
        return _Exchange.apply(grad, *ctx.back), None, None, None


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
