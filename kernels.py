"""The operations of ST-DiT besides its matrix products, and the processes that train it.

Each op is first plain PyTorch, which defines it.  For the three that are worth it there is CUDA C++, compiled by the
NVRTC that comes with PyTorch: no compiler and no Triton is needed.  A kernel reads its input once, keeps nothing else
for backward and computes the rest again there: with them a block holds 26 elements per token and unit of width for
backward, in the plain form 39 (fp32) to 51 (bf16).

In    tensors of any float dtype.
Out   the same dtype; sums and rotations are computed in fp32 or wider.
Run   `python kernels.py` checks every op against fp64, forward and backward; tests/bench_kernels.py times them.

Passes over [N C] in a block's forward, plain -> CUDA: modulate 3 x (5 -> 2), QK-norm 12 -> 4, with RoPE 28 -> 4,
attention over time with its norm and rotation 12 -> 4.

Papers: RMSNorm 1910.07467, RoPE 2104.09864, QK-norm 2302.05442, DSP 2403.10266.  model.py explains the letters.
"""
import argparse
import ctypes
import os
import warnings
from functools import cache, lru_cache, partial
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

__version__ = "0"   # transformers looks for a package called `kernels`, finds this file, and asks for its version
EPS = 1e-6          # of every norm in the model, LayerNorm and RMSNorm alike


# ---------------------------------------------------------------- the ops
def modulate(x, shift, scale):
    """Returns LayerNorm(x) (1 + scale) + shift: adaLN of DiT (arXiv 2212.09748), chosen for each frame.

    x [B T S C]; shift, scale [B T C], or [B 1 C] for all frames."""
    if has_kernels(modulate_kernels, x, shift, scale):
        return Modulate.apply(x, shift, scale)
    x = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return torch.addcmul(shift[:, :, None], x, 1 + scale[:, :, None])


def gated_residual(x, gate, update):
    """Returns x + gate * update.  x, update [B T S C]; gate [B T C] or [B 1 C]."""
    return torch.addcmul(x, gate[:, :, None], update)


def rms_norm(x, weight):
    """Divides x [... D] by the root of its mean square, then multiplies by weight [D]."""
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def rope(x, cos, sin):
    """Rotates the pairs (2i, 2i+1) of x [... T D] by their angles; cos, sin [T D/2]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    even, odd = rearrange(wide, "... (pair two) -> two ... pair", two=2)
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def norm_rope(x, weight, rotary, rope_first):
    """Returns queries or keys x [N n heads D] normalised by weight [D] and rotated by (cos, sin); None skips a step."""
    if rotary is not None and rope_first:       # Q1 in model.py: what the published weights were trained with
        x = rope(x, *rotary)
    if weight is not None:
        x = rms_norm(x, weight)
    if rotary is not None and not rope_first:
        x = rope(x, *rotary)
    return x


def qk_norm_rope(qkv, q_weight, k_weight, rotary, rope_first, num_heads, axis):
    """Returns q, k, v [N heads n D] of attention along axis "space" (N = B T, n = S) or "time" (N = B S, n = T).

    qkv [B T S 3C]; q and k are normalised by q_weight, k_weight [D] and rotated by rotary, two [n D/2] or None."""
    if has_kernels(qk_norm_rope_kernels, qkv, q_weight, k_weight, rotary, rope_first, num_heads):
        return QKNormRope.apply(qkv, q_weight, k_weight, *(rotary or (None, None)), rope_first, num_heads, axis)
    q, k, v = (by_sequence(z, num_heads, axis) for z in qkv.chunk(3, dim=-1))   # [N n heads D]
    if rotary is not None:
        cos, sin = rotary
        rotary = cos[:, None], sin[:, None]                                     # the same for all heads
    q = norm_rope(q, q_weight, rotary, rope_first)
    k = norm_rope(k, k_weight, rotary, rope_first)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def by_sequence(x, num_heads, axis):
    """Returns x [B T S C] as the sequences of an axis, [N n heads D]."""
    sequences = {"space": "(b t) s heads d", "time": "(b s) t heads d"}[axis]
    return rearrange(x, f"b t s (heads d) -> {sequences}", heads=num_heads)


def gelu_linear(x, weight, bias):
    """Returns the second half of an MLP, GELU in its tanh form and the product: x [... N], weight [M N], bias [M]."""
    if on_gpu(x, weight, bias):
        return GeluLinear.apply(x, weight, bias)
    return F.linear(F.gelu(x, approximate="tanh"), weight, bias)


def attention(q, k, v):
    """Returns softmax(q k^T / sqrt(D)) v.  q [N heads S D]; k, v [N heads L D].

    D = 72 needs no padding: in bf16 an H100 took cuDNN's kernel, for the text of few clips FlashAttention-2; a CPU has
    its own flash kernel.  They read any strides, and write what the projection reads."""
    return F.scaled_dot_product_attention(q, k, v)


def time_attention(qkv, q_weight, k_weight, rotary, rope_first, num_heads):
    """Returns self-attention over the frames of each position, [(B S) T C], of qkv [B T S 3C].

    On a GPU up to 32 frames are one kernel: FlashAttention's tiles of 128 would be nearly empty."""
    if has_kernels(time_attention_kernels, qkv, q_weight, k_weight, rotary, rope_first, num_heads):
        return TimeAttention.apply(qkv, q_weight, k_weight, *rotary, rope_first, num_heads)
    out = attention(*qk_norm_rope(qkv, q_weight, k_weight, rotary, rope_first, num_heads, "time"))
    return rearrange(out, "n heads t d -> n t (heads d)")


def cross_attention(q, k, v, lengths):
    """Returns attention of each clip to its own caption.  q [B heads N D]; k, v [sum(lengths) heads D], end to end."""
    if len(set(lengths)) == 1:                              # one batch, as the null captions of guidance are
        k, v = (rearrange(z, "(b l) heads d -> b heads l d", l=lengths[0]) for z in (k, v))
        return attention(q, k, v)
    if takes_varlen(q):
        from torch.nn.attention.varlen import varlen_attn       # a second to import, and only GPUs need it
        B, _, N, _ = q.shape
        out = varlen_attn(rearrange(q, "b heads n d -> (b n) heads d"), k, v, offsets((N,) * B, q.device),
                          offsets(tuple(lengths), q.device), N, max(lengths))
        return rearrange(out, "(b n) heads d -> b heads n d", b=B)
    # Elsewhere, as on a CPU: captions of equal length share a call.  A mask over padded text took twice the time.
    k, v = (rearrange(z, "l heads d -> heads l d").split(lengths, dim=1) for z in (k, v))
    outs = []
    order = []
    for length in sorted(set(lengths)):
        clips = [b for b, n in enumerate(lengths) if n == length]
        outs.append(attention(q[clips], torch.stack([k[b] for b in clips]), torch.stack([v[b] for b in clips])))
        order += clips
    back = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(outs)[back]


def takes_varlen(q):
    """Returns whether FlashAttention takes captions of different lengths: its limits in torch 2.11 to 2.13."""
    return (on_gpu(q) and q.dtype == torch.bfloat16 and q.shape[-1] % 8 == 0
            and torch.cuda.get_device_capability(q.device)[0] >= 8)


@lru_cache(maxsize=64)      # every block of a step asks for the same two
def offsets(lengths, device):
    """Returns where each clip's rows begin and end, int32 on the device, without a sync: the CPU knows the lengths."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).pin_memory().to(device, non_blocking=True)


# ---------------------------------------------------------------- which form runs
PLAIN = {"only": False}     # set by use()
CUDA_NAMES = {torch.float32: "float", torch.bfloat16: "bf16"}      # the dtypes that kernels take


def use(device, plain=False):
    """Chooses the plain form of every op, or CUDA for those that have kernels; returns a line that names the choice."""
    PLAIN["only"] = plain
    if plain or torch.device(device).type != "cuda":
        return "ops: plain PyTorch"
    return f"ops: CUDA C++ on {torch.cuda.get_device_name(device)}"


def on_gpu(*tensors):
    """Returns whether tensors may go to a kernel: torch.compile writes its own, and fake tensors have no data."""
    if PLAIN["only"] or torch.compiler.is_compiling():
        return False
    dtype = tensors[0].dtype
    return dtype in CUDA_NAMES and all(
        type(z) in (torch.Tensor, torch.nn.Parameter) and z.is_cuda and z.dtype == dtype for z in tensors)


def has_kernels(kernel_names, *args):
    """Returns whether an op runs as CUDA with these arguments.  kernel_names: a function of them, or None of it."""
    tensors = [z for z in args if torch.is_tensor(z)]
    names = kernel_names(*args) if on_gpu(*tensors) else None
    return names is not None and compiles(names, tensors[0].device.index)


@cache
def compiles(names, device):
    """Compiles kernels for a device; if that fails, warns once, and the op runs in its plain form."""
    try:
        for name in names:
            kernel(name, device)
    except (RuntimeError, OSError, AttributeError, TypeError, ImportError) as error:    # no NVRTC, another torch, ...
        warnings.warn(f"{names[0]} runs as plain PyTorch: {type(error).__name__}: {error}", stacklevel=2)
        return False
    return True


# ---------------------------------------------------------------- what is kept for backward
class Modulate(torch.autograd.Function):
    """Keeps x and the mean and 1 / deviation of each row; backward normalises x again."""

    @staticmethod
    def forward(ctx, x, shift, scale):
        x = x.contiguous()
        scale = scale.contiguous()
        out, mean, rstd = modulate_forward(x, shift.contiguous(), scale)
        ctx.save_for_backward(x, mean, rstd, scale)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return modulate_backward(grad.contiguous(), *ctx.saved_tensors)


class QKNormRope(torch.autograd.Function):
    """Keeps qkv; attention itself keeps the q and k that are returned."""

    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, cos, sin, *how):
        kept = [z if z is None else z.contiguous() for z in (qkv, q_weight, k_weight, cos, sin)]
        ctx.save_for_backward(*kept)
        ctx.how = how
        return qk_norm_rope_forward(*kept, *how)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        grads = [z.transpose(1, 2).contiguous().transpose(1, 2) for z in grads]     # stored as q, k, v are
        return *qk_norm_rope_backward(*grads, *ctx.saved_tensors, *ctx.how), *[None] * 5


class TimeAttention(torch.autograd.Function):
    """Keeps qkv alone."""

    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, cos, sin, *how):
        kept = [z.contiguous() for z in (qkv, q_weight, k_weight, cos, sin)]
        ctx.save_for_backward(*kept)
        ctx.how = how
        return time_attention_forward(*kept, *how)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return *time_attention_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.how), *[None] * 4


class GeluLinear(torch.autograd.Function):
    """Keeps x; backward computes GELU(x), as large, again for the weight's gradient.  PyTorch's own ops do it."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x, approximate="tanh"), weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        dx = (grad @ weight).view(x.shape)
        torch.ops.aten.gelu_backward.grad_input(dx, x, approximate="tanh", grad_input=dx)       # in place
        active = F.gelu(x, approximate="tanh").flatten(0, -2)
        return dx, grad.mT @ active, grad.sum(0)


# ---------------------------------------------------------------- CUDA C++
# Compiled by NVRTC.  No header is included: a driver and torch's own NVRTC are enough.

# How values become fp32 and back; the tests replace these lines where they run the rest on a CPU.
CUDA_TYPES = r"""
struct bf16 { unsigned short bits; };
static __device__ float wide(float x) { return x; }
static __device__ float wide(bf16 x) { return __uint_as_float((unsigned)x.bits << 16); }
static __device__ void narrow(float x, float& y) { y = x; }
static __device__ void narrow(float x, bf16& y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
"""

# Every kernel keeps a row (of C values in modulate, of D values, a head, in the others) in the registers of the LANES
# threads that share it.  Thread l of them holds columns (k LANES + l) V ... + V - 1 for each k < K, and reads or writes
# these V values at once.  Widths are template arguments, so that the compiler unrolls every loop over a row.
CUDA = r"""
typedef long long Offset;                       // offsets pass 2^31 at 720p
constexpr float EPS = 1e-6f;

// V: as many values as 16 bytes hold, or fewer if the width is no multiple of it.  K: how often LANES threads take V.
template <class T, int WIDTH> constexpr int V_OF = WIDTH % 8 == 0 && sizeof(T) == 2 ? 8 : WIDTH % 4 == 0 ? 4 : 2;
template <class T, int WIDTH, int LANES> constexpr int K_OF = (WIDTH / V_OF<T, WIDTH> + LANES - 1) / LANES;

template <class T, int V> struct alignas(V * sizeof(T)) Pack {
    T x[V];
    __device__ float operator[](int i) const { return wide(x[i]); }
};

template <int V, class T> static __device__ Pack<T, V> load(const T* from) {
    return *(const Pack<T, V>*)from;
}

// Copies V values in one access.  Of type T they could be written one by one.
template <int V, class T> static __device__ void copy(T* to, const T* from) {
    struct alignas(V * sizeof(T)) Words { unsigned x[V * sizeof(T) / 4]; };
    *(Words*)to = *(const Words*)from;
}

// The sum of x over LANES neighbouring threads; each of them gets it.
template <int LANES> static __device__ float sum_over_lanes(float x) {
    #pragma unroll
    for (int mask = LANES / 2; mask; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
    return x;
}

// Writes to out [WIDTH] the sum over the warps of a block, always in the same order, of what the first LANES threads of
// each warp hold.
template <int WIDTH, int LANES, int K, int V>
static __device__ void sum_over_warps(const float (&own)[K][V], float* out) {
    __shared__ float sum[K * V * LANES];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    for (int w = 0; w < warps; w++) {
        if (warp == w && lane < LANES) {
            #pragma unroll
            for (int k = 0; k < K; k++) {
                const int column = (k * LANES + lane) * V;
                if (column < WIDTH) {
                    #pragma unroll
                    for (int i = 0; i < V; i++) {
                        float& s = sum[(k * V + i) * LANES + lane];     // no two threads share a bank
                        s = own[k][i] + (w ? s : 0);
                        if (w == warps - 1) out[column + i] = s;
                    }
                }
            }
        }
        __syncthreads();
    }
}

// ---- modulate: a warp owns a row ----
// The rows of a group share shift and scale [groups C].  A block owns up to rows_per_block rows of one group, and its
// warps take turns.

// Reads x, writes out and 8 bytes of statistics per row: 2 passes, where layer_norm and addcmul take 4.
template <class T, int C> __global__ void __launch_bounds__(128, 3) modulate_forward(
        const T* __restrict__ x, const T* __restrict__ shift, const T* __restrict__ scale, T* __restrict__ out,
        float* __restrict__ mean, float* __restrict__ rstd,
        int rows_per_group, int blocks_per_group, int rows_per_block) {
    constexpr int V = V_OF<T, C>, K = K_OF<T, C, 32>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int group = blockIdx.x / blocks_per_group, first = blockIdx.x % blocks_per_group * rows_per_block;
    const Offset begin = (Offset)group * rows_per_group + first;
    const Offset end = begin + min(rows_per_block, rows_per_group - first);

    Pack<T, V> shifts[K], scales[K], xs[K];
    #pragma unroll
    for (int k = 0; k < K; k++) {
        const int column = (k * 32 + lane) * V;
        if (column < C) {
            shifts[k] = load<V>(shift + (Offset)group * C + column);
            scales[k] = load<V>(scale + (Offset)group * C + column);
        }
    }
    for (Offset row = begin + warp; row < end; row += warps) {
        float sum = 0, squares = 0;
        #pragma unroll
        for (int k = 0; k < K; k++) {
            const int column = (k * 32 + lane) * V;
            if (column < C) {
                xs[k] = load<V>(x + row * C + column);
                #pragma unroll
                for (int i = 0; i < V; i++) sum += xs[k][i];
            }
        }
        const float m = sum_over_lanes<32>(sum) / C;
        #pragma unroll
        for (int k = 0; k < K; k++) {
            if ((k * 32 + lane) * V < C) {
                #pragma unroll
                for (int i = 0; i < V; i++) squares += (xs[k][i] - m) * (xs[k][i] - m);
            }
        }
        const float r = rsqrtf(sum_over_lanes<32>(squares) / C + EPS);
        #pragma unroll
        for (int k = 0; k < K; k++) {
            const int column = (k * 32 + lane) * V;
            if (column < C) {
                Pack<T, V> result;
                #pragma unroll
                for (int i = 0; i < V; i++)
                    narrow(shifts[k][i] + (xs[k][i] - m) * r * (1 + scales[k][i]), result.x[i]);
                copy<V>(out + row * C + column, result.x);
            }
        }
        if (lane == 0) {
            mean[row] = m;
            rstd[row] = r;
        }
    }
}

// Reads grad and x, writes dx: 3 passes, where autograd takes 10.  partial [2 blocks C] gets this block's sums for the
// gradients of shift and scale.
template <class T, int C> __global__ void __launch_bounds__(128, 2) modulate_backward(
        const T* __restrict__ grad, const T* __restrict__ x, const float* __restrict__ mean,
        const float* __restrict__ rstd, const T* __restrict__ scale, T* __restrict__ dx, float* __restrict__ partial,
        int rows_per_group, int blocks_per_group, int rows_per_block) {
    constexpr int V = V_OF<T, C>, K = K_OF<T, C, 32>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const int group = blockIdx.x / blocks_per_group, first = blockIdx.x % blocks_per_group * rows_per_block;
    const Offset begin = (Offset)group * rows_per_group + first;
    const Offset end = begin + min(rows_per_block, rows_per_group - first);

    float dshift[K][V] = {}, dscale[K][V] = {};
    Pack<T, V> scales[K], grads[K], xs[K];
    #pragma unroll
    for (int k = 0; k < K; k++) {
        const int column = (k * 32 + lane) * V;
        if (column < C) scales[k] = load<V>(scale + (Offset)group * C + column);
    }
    for (Offset row = begin + warp; row < end; row += warps) {
        const float m = mean[row], r = rstd[row];
        float sum = 0, dot = 0;
        #pragma unroll
        for (int k = 0; k < K; k++) {
            const int column = (k * 32 + lane) * V;
            if (column < C) {
                grads[k] = load<V>(grad + row * C + column);
                xs[k] = load<V>(x + row * C + column);
            }
        }
        #pragma unroll
        for (int k = 0; k < K; k++) {
            if ((k * 32 + lane) * V < C) {
                #pragma unroll
                for (int i = 0; i < V; i++) {
                    const float g = grads[k][i];
                    const float normed = (xs[k][i] - m) * r;
                    const float dnormed = g * (1 + scales[k][i]);
                    dshift[k][i] += g;
                    dscale[k][i] += g * normed;
                    sum += dnormed;
                    dot += dnormed * normed;
                }
            }
        }
        sum = sum_over_lanes<32>(sum) / C;
        dot = sum_over_lanes<32>(dot) / C;
        #pragma unroll
        for (int k = 0; k < K; k++) {
            const int column = (k * 32 + lane) * V;
            if (column < C) {
                Pack<T, V> result;
                #pragma unroll
                for (int i = 0; i < V; i++) {
                    const float dnormed = grads[k][i] * (1 + scales[k][i]);
                    narrow(r * (dnormed - sum - (xs[k][i] - m) * r * dot), result.x[i]);
                }
                copy<V>(dx + row * C + column, result.x);
            }
        }
    }
    sum_over_warps<C, 32>(dshift, partial + (Offset)blockIdx.x * C);
    sum_over_warps<C, 32>(dscale, partial + ((Offset)gridDim.x + blockIdx.x) * C);
}

// ---- a head of D values: 4 threads own it ----

template <int D, class T, int V, int K> static __device__ void load_head(float (&x)[K][V], const T* from) {
    const int lane = threadIdx.x % 4;
    #pragma unroll
    for (int k = 0; k < K; k++) {
        const int column = (k * 4 + lane) * V;
        if (column < D) {
            const Pack<T, V> values = load<V>(from + column);
            #pragma unroll
            for (int i = 0; i < V; i++) x[k][i] = values[i];
        }
    }
}

template <int D, class T, int V, int K> static __device__ void store_head(T* to, const float (&x)[K][V]) {
    const int lane = threadIdx.x % 4;
    #pragma unroll
    for (int k = 0; k < K; k++) {
        const int column = (k * 4 + lane) * V;
        if (column < D) {
            Pack<T, V> result;
            #pragma unroll
            for (int i = 0; i < V; i++) narrow(x[k][i], result.x[i]);
            copy<V>(to + column, result.x);
        }
    }
}

// Loads the angles of a head: angle[k][i] is the cosine of a pair for its even i, and the sine for its odd i.
template <int D, int V, int K>
static __device__ void load_angles(float (&angle)[K][V], const float* cos, const float* sin) {
    const int lane = threadIdx.x % 4;
    #pragma unroll
    for (int k = 0; k < K; k++) {
        const int column = (k * 4 + lane) * V;
        if (column < D) {
            const Pack<float, V / 2> c = load<V / 2>(cos + column / 2), s = load<V / 2>(sin + column / 2);
            #pragma unroll
            for (int i = 0; i < V; i++) angle[k][i] = i % 2 ? s[i / 2] : c[i / 2];
        }
    }
}

// Rotates each pair by its angle, or back for sign = -1.
template <int V, int K> static __device__ void rotate(float (&x)[K][V], const float (&angle)[K][V], float sign) {
    #pragma unroll
    for (int k = 0; k < K; k++) {
        #pragma unroll
        for (int i = 0; i < V; i += 2) {
            const float even = x[k][i], odd = x[k][i + 1], s = sign * angle[k][i + 1];
            x[k][i] = even * angle[k][i] - odd * s;
            x[k][i + 1] = odd * angle[k][i] + even * s;
        }
    }
}

// RMSNorm of a head by weight [D], and its rotation.  ROPE: 0 = none, 1 = after the norm, 2 = before it (which leaves
// the sum of squares as it is).  only_norm: without the weight, and a rotation only where it comes first, as backward
// needs it.  Returns 1 / the root of the mean square.
template <int D, int ROPE, class T, int V, int K>
static __device__ float norm_rope(float (&x)[K][V], const T* __restrict__ weight, const float (&angle)[K][V],
                                  bool only_norm) {
    const int lane = threadIdx.x % 4;
    float squares = 0;
    #pragma unroll
    for (int k = 0; k < K; k++) {
        if ((k * 4 + lane) * V < D) {
            #pragma unroll
            for (int i = 0; i < V; i++) squares += x[k][i] * x[k][i];
        }
    }
    const float r = rsqrtf(sum_over_lanes<4>(squares) / D + EPS);
    if (ROPE == 2) rotate(x, angle, 1);
    #pragma unroll
    for (int k = 0; k < K; k++) {
        const int column = (k * 4 + lane) * V;
        if (column < D) {
            const Pack<T, V> weights = load<V>(weight + column);
            #pragma unroll
            for (int i = 0; i < V; i++) x[k][i] *= only_norm ? r : r * weights[i];
        }
    }
    if (ROPE == 1 && !only_norm) rotate(x, angle, 1);
    return r;
}

// The backward of norm_rope: x as it was given to that; grad, the gradient of the result, becomes that of x; dweight
// gets this head's part of the weight's gradient added.
template <int D, int ROPE, class T, int V, int K>
static __device__ void norm_rope_backward(float (&x)[K][V], float (&grad)[K][V], const T* __restrict__ weight,
                                          const float (&angle)[K][V], float (&dweight)[K][V]) {
    const int lane = threadIdx.x % 4;
    const float r = norm_rope<D, ROPE>(x, weight, angle, true);
    float dot = 0;
    if (ROPE == 1) rotate(grad, angle, -1);
    #pragma unroll
    for (int k = 0; k < K; k++) {
        const int column = (k * 4 + lane) * V;
        if (column < D) {
            const Pack<T, V> weights = load<V>(weight + column);
            #pragma unroll
            for (int i = 0; i < V; i++) {
                dweight[k][i] += grad[k][i] * x[k][i];
                grad[k][i] *= weights[i];
                dot += grad[k][i] * x[k][i];
            }
        }
    }
    dot = sum_over_lanes<4>(dot) / D;
    #pragma unroll
    for (int k = 0; k < K; k++) {
        if ((k * 4 + lane) * V < D) {
            #pragma unroll
            for (int i = 0; i < V; i++) grad[k][i] = r * (grad[k][i] - x[k][i] * dot);
        }
    }
    if (ROPE == 2) rotate(grad, angle, -1);
}

// Sums over the 8 heads that a warp has at once, for each of a head's 4 threads.
template <int V, int K> static __device__ void sum_over_heads(float (&x)[K][V]) {
    #pragma unroll
    for (int k = 0; k < K; k++) {
        #pragma unroll
        for (int i = 0; i < V; i++) {
            #pragma unroll
            for (int mask = 4; mask < 32; mask *= 2) x[k][i] += __shfl_xor_sync(~0u, x[k][i], mask);
        }
    }
}

// ---- qk_norm_rope: a warp owns 8 heads of tokens at a time ----
// Reads q and k in qkv [B F S 3C], writes them as sequences over S or (over_time) over F, and v too with copies_v:
// 4 passes over C (6 with v), where the plain form takes 24 in space and 72 in time, most of them in fp32.
// BACKWARD: q, k, v are gradients and are read, dqkv is written, partial [2 blocks D] gets this block's sums for the
// gradients of the weights: 8 passes of 42 and 90.
template <class T, int D, int ROPE, int BACKWARD> __global__ void __launch_bounds__(128, 3) qk_norm_rope(
        const T* __restrict__ qkv, const T* __restrict__ q_weight, const T* __restrict__ k_weight,
        const float* __restrict__ cos, const float* __restrict__ sin, T* __restrict__ q, T* __restrict__ k,
        T* __restrict__ v, T* __restrict__ dqkv, float* __restrict__ partial,
        int num_items, int heads, int F, int S, int over_time, int copies_v) {
    constexpr int V = V_OF<T, D>, K = K_OF<T, D, 4>;
    const int lane = threadIdx.x % 4, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const Offset C = (Offset)heads * D;
    float dweight[2][K][V] = {};
    for (int first = (blockIdx.x * warps + warp) * 8; first < num_items; first += gridDim.x * warps * 8) {
        // All threads of a warp take part in its shuffles: beyond the last item they repeat it, and write nothing.
        const int own = first + (int)threadIdx.x % 32 / 4, item = min(own, num_items - 1);
        const int row = item / heads, s = row % S, f = row / S % F;
        const int angle_row = (over_time ? f : s) * (D / 2);
        const Offset from = row * 3 * C + item % heads * D;
        const Offset to = (over_time ? ((Offset)(row / S / F) * S + s) * F + f : row) * C + item % heads * D;
        float angle[K][V];
        if (ROPE) load_angles<D>(angle, cos + angle_row, sin + angle_row);
        #pragma unroll
        for (int j = 0; j < 2; j++) {           // q, then k
            T* const sequence = (j ? k : q) + to;
            const T* const weight = j ? k_weight : q_weight;
            float x[K][V] = {}, grad[K][V] = {};
            load_head<D>(x, qkv + from + j * C);
            if (BACKWARD) {
                if (own == item) load_head<D>(grad, sequence);
                norm_rope_backward<D, ROPE>(x, grad, weight, angle, dweight[j]);
                if (own == item) store_head<D>(dqkv + from + j * C, grad);
            } else {
                norm_rope<D, ROPE>(x, weight, angle, false);
                if (own == item) store_head<D>(sequence, x);
            }
        }
        if (copies_v && own == item) {
            #pragma unroll
            for (int n = 0; n < K; n++) {
                const int column = (n * 4 + lane) * V;
                if (column < D) {
                    if (BACKWARD) copy<V>(dqkv + from + 2 * C + column, v + to + column);
                    else copy<V>(v + to + column, qkv + from + 2 * C + column);
                }
            }
        }
    }
    if (BACKWARD) {
        #pragma unroll
        for (int j = 0; j < 2; j++) {
            sum_over_heads(dweight[j]);
            sum_over_warps<D, 4>(dweight[j], partial + ((Offset)j * gridDim.x + blockIdx.x) * D);
        }
    }
}

// ---- time_attention: a warp owns a head of a position, all of its F <= M frames, M a multiple of 8 ----
// Tables in shared memory have M rows of D + 4 or of M + 1 values, so that no two rows which are read at once share a
// bank.  Four threads own each 8th row: thread t the rows 8 n + t / 4 for n < M / 8, and of an M x M table every fourth
// column of those, 4 j + t % 4.

// scores = a b^T for a, b [M D].
template <int M, int D> static __device__ void multiply_transposed(
        const float* a, const float* b, float (&scores)[M / 8][M / 4]) {
    for (int column = 0; column < D; column += 4) {
        Pack<float, 4> x[M / 8], y[M / 4];
        #pragma unroll
        for (int n = 0; n < M / 8; n++) {
            const int row = 8 * n + threadIdx.x / 4;
            x[n] = load<4>(a + row * (D + 4) + column);
        }
        #pragma unroll
        for (int j = 0; j < M / 4; j++) y[j] = load<4>(b + (4 * j + threadIdx.x % 4) * (D + 4) + column);
        #pragma unroll
        for (int n = 0; n < M / 8; n++) {
            #pragma unroll
            for (int j = 0; j < M / 4; j++) {
                #pragma unroll
                for (int i = 0; i < 4; i++) scores[n][j] += x[n].x[i] * y[j].x[i];
            }
        }
    }
}

// out += a b for a [M F], or a^T b if TRANSPOSED, and b [F D].
template <int M, int D, int TRANSPOSED, int V, int K> static __device__ void multiply(
        const float* a, const float* b, int F, float (&out)[M / 8][K][V]) {
    const int lane = threadIdx.x % 4;
    for (int f = 0; f < F; f++) {
        #pragma unroll
        for (int k = 0; k < K; k++) {
            const int column = (k * 4 + lane) * V;
            if (column < D) {
                #pragma unroll
                for (int h = 0; h < V; h += 4) {
                    const Pack<float, 4> y = load<4>(b + f * (D + 4) + column + h);
                    #pragma unroll
                    for (int n = 0; n < M / 8; n++) {
                        const int row = 8 * n + threadIdx.x / 4;
                        #pragma unroll
                        for (int i = 0; i < 4; i++)
                            out[n][k][h + i] += a[TRANSPOSED ? f * (M + 1) + row : row * (M + 1) + f] * y.x[i];
                    }
                }
            }
        }
    }
}

// Reads qkv [B F S 3C], writes out [B S F C]: 4 passes, where q, k, v and attention take 12.
// BACKWARD: reads dout, computes all again, writes the gradient of qkv into out, and into partial [2 blocks D] this
// block's sums for the gradients of the weights: 7 passes of 20.
template <class T, int D, int ROPE, int BACKWARD, int M> __global__ void __launch_bounds__(32) time_attention(
        const T* __restrict__ qkv, const T* __restrict__ q_weight, const T* __restrict__ k_weight,
        const float* __restrict__ cos, const float* __restrict__ sin, const T* __restrict__ dout, T* __restrict__ out,
        float* __restrict__ partial, int num_items, int heads, int F, int S) {
    constexpr int V = V_OF<T, D>, K = K_OF<T, D, 4>, TABLE = M * (D + 4);
    __shared__ alignas(16) float tables[(3 + BACKWARD) * TABLE], weights[(1 + BACKWARD) * M * (M + 1)], sums[2 * D];
    float* const queries = tables;
    float* const keys = tables + TABLE;
    float* const values = tables + 2 * TABLE;
    float* const douts = tables + 3 * TABLE;                    // in backward only, as is the next one
    float* const dweights = weights + M * (M + 1);
    const int lane = threadIdx.x % 4;
    const Offset C = (Offset)heads * D;
    const float scale = rsqrtf(D);
    float angle[K][V];
    for (int i = threadIdx.x; i < 2 * D; i += 32) sums[i] = 0;
    for (int item = blockIdx.x; item < num_items; item += gridDim.x) {
        const int s = item / heads % S, b = item / heads / S;
        const Offset to = ((Offset)b * S + s) * F * C + item % heads * D;
        const Offset from = ((Offset)b * F * S + s) * 3 * C + item % heads * D;

        // The tables of q, k, v and, in backward, dout.  All threads take part in the shuffles: rows from F on repeat
        // the last frame, and become zeros.
        #pragma unroll
        for (int n = 0; n < M / 8; n++) {
            const int row = 8 * n + threadIdx.x / 4, f = min(row, F - 1);
            if (ROPE) load_angles<D>(angle, cos + f * (D / 2), sin + f * (D / 2));
            #pragma unroll
            for (int j = 0; j < 3 + BACKWARD; j++) {
                float x[K][V] = {};
                load_head<D>(x, j == 3 ? dout + to + f * C : qkv + from + (Offset)f * S * 3 * C + j * C);
                if (j < 2) norm_rope<D, ROPE>(x, j ? k_weight : q_weight, angle, false);
                #pragma unroll
                for (int k = 0; k < K; k++) {
                    const int column = (k * 4 + lane) * V;
                    if (column < D) {
                        #pragma unroll
                        for (int i = 0; i < V; i++)
                            tables[(j * M + row) * (D + 4) + column + i] = row < F ? x[k][i] : 0;
                    }
                }
            }
        }
        __syncwarp();

        // p = softmax(q k^T / sqrt(D)); in backward also the gradient of what the softmax is taken of.
        float p[M / 8][M / 4] = {}, dp[M / 8][M / 4] = {};
        multiply_transposed<M, D>(queries, keys, p);
        if (BACKWARD) multiply_transposed<M, D>(douts, values, dp);
        #pragma unroll
        for (int n = 0; n < M / 8; n++) {
            const int row = 8 * n + threadIdx.x / 4;
            float most = -1e30f, sum = 0, delta = 0;
            #pragma unroll
            for (int j = 0; j < M / 4; j++) {
                if (4 * j + lane < F) most = fmaxf(most, p[n][j]);
            }
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            #pragma unroll
            for (int j = 0; j < M / 4; j++) {
                p[n][j] = 4 * j + lane < F ? expf((p[n][j] - most) * scale) : 0;
                sum += p[n][j];
                delta += p[n][j] * dp[n][j];
            }
            sum = sum_over_lanes<4>(sum);
            if (BACKWARD) delta = sum_over_lanes<4>(delta) / sum;
            #pragma unroll
            for (int j = 0; j < M / 4; j++) {
                const int place = row * (M + 1) + 4 * j + lane;
                weights[place] = p[n][j] / sum;
                if (BACKWARD) dweights[place] = p[n][j] / sum * (dp[n][j] - delta) * scale;
            }
        }
        __syncwarp();

        // out = p v; or in backward the gradients of q, k and v, one after the other.
        #pragma unroll 1
        for (int j = 0; j < (BACKWARD ? 3 : 1); j++) {
            float result[M / 8][K][V] = {}, dweight[K][V] = {};
            if (!BACKWARD) multiply<M, D, 0>(weights, values, F, result);
            else if (j == 0) multiply<M, D, 0>(dweights, keys, F, result);
            else multiply<M, D, 1>(j == 1 ? dweights : weights, j == 1 ? queries : douts, F, result);
            #pragma unroll
            for (int n = 0; n < M / 8; n++) {
                const int row = 8 * n + threadIdx.x / 4, f = min(row, F - 1);
                const Offset at = from + (Offset)f * S * 3 * C + j * C;
                if (BACKWARD && j < 2) {
                    float x[K][V] = {};
                    load_head<D>(x, qkv + at);
                    if (ROPE) load_angles<D>(angle, cos + f * (D / 2), sin + f * (D / 2));
                    norm_rope_backward<D, ROPE>(x, result[n], j ? k_weight : q_weight, angle, dweight);
                }
                if (row < F) store_head<D>(out + (BACKWARD ? at : to + f * C), result[n]);
            }
            if (BACKWARD && j < 2) {
                sum_over_heads(dweight);
                if (threadIdx.x < 4) {
                    #pragma unroll
                    for (int k = 0; k < K; k++) {
                        const int column = (k * 4 + lane) * V;
                        if (column < D) {
                            #pragma unroll
                            for (int i = 0; i < V; i++) sums[j * D + column + i] += dweight[k][i];
                        }
                    }
                }
            }
        }
        __syncwarp();
    }
    if (BACKWARD) {
        for (int i = threadIdx.x; i < 2 * D; i += 32)
            partial[((Offset)(i / D) * gridDim.x + blockIdx.x) * D + i % D] = sums[i];
    }
}
"""


# ---------------------------------------------------------------- launching the kernels
@cache
def kernel(name, device):
    """Compiles a kernel such as "modulate_forward<bf16, 1152>" for the device of that number.

    Returns call(blocks, threads, arguments), which launches it in torch's stream.  What torch keeps private is used
    here and nowhere else."""
    from torch.utils import cpp_extension       # imported here, as it needs setuptools
    home = cpp_extension.CUDA_HOME
    cpp_extension.CUDA_HOME = home or "none"    # it insists on a place of headers, though none is included
    try:
        with torch.cuda.device(device):
            function = torch.cuda._compile_kernel(CUDA_TYPES + CUDA, name).func
    finally:
        cpp_extension.CUDA_HOME = home
    # With torch's own call an op took 197 us of a processor, with these lines 50.  PyDLL keeps Python's lock, so that
    # threads may share the buffers.
    start = ctypes.PyDLL(torch.cuda._utils._get_gpu_runtime_library()._name).cuLaunchKernel
    values = (ctypes.c_longlong * 24)()
    places = (ctypes.c_void_p * 24)(*[ctypes.addressof(values) + 8 * i for i in range(24)])

    def call(blocks, threads, arguments):
        values[:len(arguments)] = arguments
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        code = start(function, blocks, 1, 1, threads, 1, 1, 0, stream, places, None)
        if code == 201:                         # this thread has no context yet, as autograd's at first
            torch.cuda.set_device(device)
            code = start(function, blocks, 1, 1, threads, 1, 1, 0, stream, places, None)
        if code:
            raise RuntimeError(f"{name}: cuLaunchKernel returned CUDA error {code}")
    return call


def launch(name, blocks, threads, x, *args):
    """Launches a kernel on x's device.  None stands for a tensor that is neither read nor written."""
    arguments = []
    aligned = []                                # holds copies until the launch
    for z in (x, *args):
        if torch.is_tensor(z):
            aligned.append(z.clone() if z.data_ptr() % 16 else z)               # outputs are always aligned
            arguments.append(aligned[-1].data_ptr())
        else:
            arguments.append(int(z or 0))
    kernel(name, x.device.index)(blocks, threads, arguments)


def modulate_kernels(x, shift, scale):
    """Returns the names of the kernels for forward and backward."""
    widths = f"<{CUDA_NAMES[x.dtype]}, {x.shape[-1]}>"
    return "modulate_forward" + widths, "modulate_backward" + widths


def share_rows(x, per_group):
    """Returns how blocks share the rows of x [B T S C]: rows per group, blocks per group, rows per block.

    A group shares a row of per_group, [B T C] or [B 1 C].

    The gradient of per_group is a sum over rows: each block writes its own, and a second, small op adds those.  Atomic
    additions would come in another order each time, and a run would not repeat itself."""
    num_rows = x[..., 0].numel()
    rows_per_group = num_rows // per_group[..., 0].numel()
    # These fill a GPU with few partial sums; the same on any card.
    blocks_per_group = -(-rows_per_group // min(64, max(16, num_rows // 512)))
    return rows_per_group, blocks_per_group, -(-rows_per_group // blocks_per_group)


def modulate_forward(x, shift, scale):
    """Returns out [B T S C] and the mean and 1 / deviation of each row."""
    name, _ = modulate_kernels(x, shift, scale)
    sizes = share_rows(x, shift)
    blocks = shift[..., 0].numel() * sizes[1]
    out = torch.empty_like(x)
    mean, rstd = x.new_empty(2, x[..., 0].numel() + 3 & ~3, dtype=torch.float32)        # rows of 16 bytes
    launch(name, blocks, 128, x, shift, scale, out, mean, rstd, *sizes)
    return out, mean, rstd


def modulate_backward(grad, x, mean, rstd, scale):
    """Returns the gradients of x, shift and scale."""
    _, name = modulate_kernels(x, None, scale)
    sizes = share_rows(x, scale)
    blocks = scale[..., 0].numel() * sizes[1]
    dx = torch.empty_like(x)
    partial_sums = x.new_empty(2, *scale.shape[:2], sizes[1], x.shape[-1], dtype=torch.float32)
    launch(name, blocks, 128, grad, x, mean, rstd, scale, dx, partial_sums, *sizes)
    dshift, dscale = partial_sums.sum(3).to(x.dtype)
    return dx, dshift, dscale


def qk_norm_rope_kernels(qkv, q_weight, k_weight, rotary, rope_first, num_heads):
    """Returns the names of the kernels for forward and backward, or None without QK-norm."""
    if q_weight is None:
        return None
    order = 0 if rotary is None else 2 if rope_first else 1
    head_dim = qkv.shape[-1] // 3 // num_heads
    return tuple(f"qk_norm_rope<{CUDA_NAMES[qkv.dtype]}, {head_dim}, {order}, {back}>" for back in (0, 1))


def qk_norm_rope_forward(qkv, q_weight, k_weight, cos, sin, rope_first, num_heads, axis):
    """Returns q, k, v [N heads n D]."""
    B, T, S, C3 = qkv.shape
    N, n = {"space": (B * T, S), "time": (B * S, T)}[axis]
    shape = N, n, num_heads, C3 // 3 // num_heads
    q = qkv.new_empty(shape).transpose(1, 2)
    k = qkv.new_empty(shape).transpose(1, 2)
    v = by_sequence(qkv[..., C3 // 3 * 2:], num_heads, axis).transpose(1, 2)    # a view of qkv, which is kept anyway
    copied = None
    if axis == "time" and B > 1:                # over time no strides describe the sequences of several clips
        v = copied = qkv.new_empty(shape).transpose(1, 2)
    rotary = None if cos is None else (cos.float(), sin.float())
    name, _ = qk_norm_rope_kernels(qkv, q_weight, k_weight, rotary, rope_first, num_heads)
    num_items = B * T * S * num_heads
    blocks = -(-num_items // 32)                # of 4 warps, with 8 heads each
    launch(name, blocks, 128, qkv, q_weight, k_weight, *(rotary or (None, None)), q, k, copied, None, None,
           num_items, num_heads, T, S, axis == "time", copied is not None)
    return q, k, v


def qk_norm_rope_backward(dq, dk, dv, qkv, q_weight, k_weight, cos, sin, rope_first, num_heads, axis):
    """Returns the gradients of qkv, q_weight and k_weight."""
    B, T, S, C3 = qkv.shape
    rotary = None if cos is None else (cos.float(), sin.float())
    _, name = qk_norm_rope_kernels(qkv, q_weight, k_weight, rotary, rope_first, num_heads)
    num_items = B * T * S * num_heads
    blocks = min(-(-num_items // 32), 1024)     # which take further heads in turn, as each leaves a row of sums
    dqkv = torch.empty_like(qkv)
    partial_sums = qkv.new_empty(2, blocks, C3 // 3 // num_heads, dtype=torch.float32)
    launch(name, blocks, 128, qkv, q_weight, k_weight, *(rotary or (None, None)), dq, dk, dv, dqkv, partial_sums,
           num_items, num_heads, T, S, axis == "time", True)
    dq_weight, dk_weight = partial_sums.sum(1).to(qkv.dtype)
    return dqkv, dq_weight, dk_weight


def time_attention_kernels(qkv, q_weight, k_weight, rotary, rope_first, num_heads):
    """Returns the names of the kernels for forward and backward, or None for what they do not take."""
    T = qkv.shape[1]
    head_dim = qkv.shape[-1] // 3 // num_heads
    # With more frames tensor cores win; wider heads do not fit into shared memory.
    if q_weight is None or rotary is None or T > 32 or head_dim % 8 or head_dim > 72:
        return None
    order = 2 if rope_first else 1
    most_frames = -(-T // 8) * 8
    return tuple(f"time_attention<{CUDA_NAMES[qkv.dtype]}, {head_dim}, {order}, {back}, {most_frames}>"
                 for back in (0, 1))


def time_attention_forward(qkv, q_weight, k_weight, cos, sin, rope_first, num_heads):
    """Returns out [(B S) T C]."""
    B, T, S, C3 = qkv.shape
    name, _ = time_attention_kernels(qkv, q_weight, k_weight, (cos, sin), rope_first, num_heads)
    out = qkv.new_empty(B * S, T, C3 // 3)
    num_items = B * S * num_heads
    launch(name, num_items, 32, qkv, q_weight, k_weight, cos.float(), sin.float(), None, out, None, num_items,
           num_heads, T, S)
    return out


def time_attention_backward(dout, qkv, q_weight, k_weight, cos, sin, rope_first, num_heads):
    """Returns the gradients of qkv, q_weight and k_weight."""
    B, T, S, C3 = qkv.shape
    _, name = time_attention_kernels(qkv, q_weight, k_weight, (cos, sin), rope_first, num_heads)
    num_items = B * S * num_heads
    blocks = min(num_items, 4096)               # which take further heads in turn, as each leaves a row of sums
    dqkv = torch.empty_like(qkv)
    partial_sums = qkv.new_empty(2, blocks, C3 // 3 // num_heads, dtype=torch.float32)
    launch(name, blocks, 32, qkv, q_weight, k_weight, cos.float(), sin.float(), dout, dqkv, partial_sums, num_items,
           num_heads, T, S)
    dq_weight, dk_weight = partial_sums.sum(1).to(qkv.dtype)
    return dqkv, dq_weight, dk_weight


# ---------------------------------------------------------------- python kernels.py
def cases(B=2, T=4, S=36, heads=16, D=72, L=100):
    """Returns {name: (op, its arguments in fp64)} at the width of XL/2: B clips of T frames of S positions."""
    C = heads * D
    generator = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = rand(B, T, S, C)
    qkv = rand(B, T, S, 3 * C)
    norms = rand(2, D)
    angle = rand(T, D // 2)
    rotary = angle.cos(), angle.sin()
    text = rand(2, L + L // 2, heads, D)
    return {
        "modulate": (modulate, (x, rand(B, T, C), rand(B, T, C))),
        "gated_residual": (gated_residual, (x, rand(B, T, C), rand(B, T, S, C))),
        "qk_norm_rope, space": (qk_norm_rope, (qkv, *norms, None, False, heads, "space")),
        "qk_norm_rope, time": (qk_norm_rope, (qkv, *norms, rotary, False, heads, "time")),
        "qk_norm_rope, Q1": (qk_norm_rope, (qkv, *norms, rotary, True, heads, "time")),
        "time_attention": (time_attention, (qkv, *norms, rotary, False, heads)),
        "time_attention, Q1": (time_attention, (qkv, *norms, rotary, True, heads)),
        "gelu_linear": (gelu_linear, (rand(B, T, S, 4 * C), rand(C, 4 * C) / C ** 0.5, rand(C))),
        "attention": (attention, tuple(rand(3, B * T, heads, S, D))),
        "cross_attention": (cross_attention, (rand(B, heads, T * S, D), *text, [L, L // 2])),
    }


def cast(value, dtype, device):
    """Returns tensors, and those in tuples, in a dtype on a device, and anything else as it is."""
    if isinstance(value, tuple):
        return tuple(cast(v, dtype, device) for v in value)
    return value.to(device, dtype) if torch.is_tensor(value) else value


def forward_backward(op, args):
    """Returns run(): the outputs of an op, and the gradients by its tensors of the outputs' product with noise."""
    args = [z.detach().requires_grad_() if torch.is_tensor(z) else z for z in args]
    leaves = [z for z in args if torch.is_tensor(z)]
    generator = torch.Generator().manual_seed(1)
    noise = [torch.randn(z.shape, generator=generator).to(z.device, z.dtype) for z in as_tuple(op(*args))]

    def run():
        outs = as_tuple(op(*args))
        return [*outs, *torch.autograd.grad(outs, leaves, noise)]
    return run


def as_tuple(outs):
    return outs if isinstance(outs, tuple) else (outs,)


def error(got, want):
    """Returns the error of got relative to want, in the L2 norm."""
    want = want.double().cpu()
    return ((got.double().cpu() - want).norm() / want.norm()).item()


def main(argv=None):
    argparse.ArgumentParser(description="Checks every op in each dtype against fp64, forward and backward.",
                            allow_abbrev=False).parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(use(device))
    print(f"{'op, forward and backward':<26}{'dtype':<10}largest error: plain{'' if device == 'cpu' else '     CUDA'}")
    for name, (op, in_fp64) in cases().items():
        for dtype in CUDA_NAMES:
            args = cast(in_fp64, dtype, device)
            # Arguments are rounded before the exact result is computed of them, so that an error is the op's own.
            exact = forward_backward(op, cast(args, torch.float64, device))()
            errors = []
            for plain in (True, False) if device == "cuda" else (True,):
                use(device, plain)
                errors.append(max(map(error, forward_backward(op, args)(), exact)))
            print(f"{name:<26}{str(dtype).removeprefix('torch.'):<10}" + "".join(f"{e:20.1e}" for e in errors))


# ---------------------------------------------------------------- processes
class Place(NamedTuple):
    """The place of a process among all.  mesh: those that shard the weights.  group: those that share each clip.

    The two are independent: the ranks of a group compute different frames with the same weights, of which each keeps
    its own shard, as any others do.  group is None without sequence parallelism."""
    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh
    group: dist.ProcessGroup | None

    @property
    def num_data_ranks(self):
        """Returns among how many a global batch is divided: a group counts as one."""
        return self.world // (self.group.size() if self.group else 1)

    @property
    def data_rank(self):
        return self.rank // (self.group.size() if self.group else 1)

    @property
    def reads(self):
        """Returns whether this is the process of its group that reads the clips, and counts them."""
        return self.group is None or self.group.rank() == 0

    def say(self, text):
        """Prints from rank 0 only."""
        if self.rank == 0:
            print(text)


def start_processes(shard=0, sp=1, device=None):
    """Starts the process group and returns the Place of this process; without torchrun it is a group of one.

    The weights are sharded over all processes, or with shard (HSDP) over `shard` neighbours, which have replicas; `sp`
    neighbours share each clip.  Neighbours are mostly of one machine: weights and frames travel within it, and only the
    gradients of replicas between machines.  device: "cpu" to leave a GPU unused.  Raises ValueError."""
    number = int(os.environ.get("LOCAL_RANK", 0))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds no GPU here (torch.cuda.is_available() is False)")
    if torch.cuda.is_available() and device != "cpu":
        device = torch.device("cuda", number)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"          # gloo for counts and objects, which are on the CPU
    else:
        device = torch.device("cpu")
        backend = "gloo"
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
    else:
        store = dist.HashStore()
        rank = 0
        world = 1
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # Processes that torchrun has restarted would find the addresses of the dead ones in its store.
        store = dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    for name, size in (("shard", shard or world), ("sp", sp)):
        if world % size:
            processes = "process" if world == 1 else "processes"
            raise ValueError(f"{name}={size} in a world of {world} {processes}: expected a divisor of it; "
                             "torchrun --nproc-per-node 8 makes it one of 8")
    mesh = init_device_mesh(device.type, (world,))
    if shard and shard < world:
        mesh = init_device_mesh(device.type, (world // shard, shard), mesh_dim_names=("replicas", "shard"))
    group = None
    if sp > 1:
        places = init_device_mesh(device.type, (world // sp, sp), mesh_dim_names=("data", "sequence"))
        group = places["sequence"].get_group()
    return Place(rank, world, device, mesh, group)


# ---------------------------------------------------------------- sequence parallelism
# The n ranks of a group share every clip, in the manner of DSP: each computes the blocks for some of the frames, and
# around attention over time they exchange these for all frames of some positions.  Frames and positions are padded with
# zeros to multiples of n, which no attention sees.
def sequence_parallel(model, group):
    """Lets the ranks of a group share the frames of each clip in a finished model, whose forward stays as it is.

    All ranks call the model with the same arguments, and all get the whole output.  Their gradients differ; the mean
    over the group is right, as if the ranks were data-parallel with the same clips."""
    def keep_frames(block, args):
        x, mod, mod_temp, text, lengths, rotary = args
        T = len(rotary[0])
        if block is model.blocks[0]:
            x = own_frames(x, T, group)
        return x, own_frames(mod, T, group), own_frames(mod_temp, T, group), text, lengths, rotary

    def gather(block, args, out):
        if out.requires_grad:       # the other ranks do the same for their frames, and the mean divides by the size
            out.register_hook(lambda grad: grad * group.size())
        _, _, _, _, _, rotary = args
        return all_frames(out, len(rotary[0]), group)

    def exchange(attention_over_frames, x, axis, rotary):
        S = x.shape[2]
        x = to_positions(x, len(rotary[0]), group)
        return to_frames(attention_over_frames(x, axis, rotary), S, group)

    for block in model.blocks:
        block.register_forward_pre_hook(keep_frames)
        block.attn_temp.forward = partial(exchange, block.attn_temp.forward)
    model.blocks[-1].register_forward_hook(gather)


def own_frames(x, T, group):
    """Returns this rank's frames [B ceil(T/n) ...] of x [B T ...]; what stands for all frames, [B 1 ...], stays."""
    if group is None or x.shape[1] != T:
        return x
    return pad_to_multiple(x, 1, group.size()).chunk(group.size(), dim=1)[group.rank()].clone()


def all_frames(x, T, group, dim=1):
    """Returns x [B T ...] of all ranks' frames [B ceil(T/n) ...]; its gradient reaches this rank's frames only."""
    if group is None:
        return x
    own = x.detach().contiguous()                                           # as NCCL asks of the parts, too
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own, group=group)                                # collective
    parts[group.rank()] = x
    return torch.cat(parts, dim).narrow(dim, 0, T)


def to_positions(x, T, group):
    """Returns all frames of this rank's positions [B T ceil(S/n) C], for x [B ceil(T/n) S C], its frames."""
    return Exchange.apply(pad_to_multiple(x, 2, group.size()), group, 2, 1)[:, :T]


def to_frames(x, S, group):
    """Returns all positions of this rank's frames [B ceil(T/n) S C], for x [B T ceil(S/n) C], its positions."""
    return Exchange.apply(pad_to_multiple(x, 1, group.size()), group, 1, 2)[:, :, :S]


def pad_to_multiple(x, dim, n):
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim) + [0, -x.shape[dim] % n])


class Exchange(torch.autograd.Function):
    """Splits x along one dimension, sends each rank its part, and joins what arrives along another: one all-to-all.

    It moves values and changes none, so that its gradient is the exchange back."""

    @staticmethod
    def forward(ctx, x, group, split_dim, join_dim):
        ctx.back = group, join_dim, split_dim
        parts = torch.stack(x.chunk(group.size(), dim=split_dim))
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)                # collective
        return torch.cat(received.unbind(), dim=join_dim)

    @staticmethod
    def backward(ctx, grad):
        return Exchange.apply(grad, *ctx.back), None, None, None


if __name__ == "__main__":
    main()
