"""ST-DiT-2, the video transformer of Open-Sora 1.1: (noisy latents, time, caption) -> (eps or v, variance).

In   x [B C_in T h w] latents, t [B] in 0..999, y [B L C_text] captions; height, width, num_frames, ar, fps [B].
Out  fp32 [B C_out T h w].  Nothing of diffusion is in here.
Run  `python model.py` prints parameters, FLOPs at the training shapes and the time of one small forward.
Read STDiT.forward first, then Block.  Papers: DiT 2212.09748, PixArt-alpha 2310.00426, Open-Sora 2412.20404.

B clips, T latent frames, S tokens per frame, N = T S, C width, D = C / heads, L text tokens, H W pixels, h w latents.
What the published weights were trained with by mistake is on with STDiTConfig.as_released, off for new models:
  Q1    temporal attention rotates queries and keys before their norm, not after
  Q2    t, sizes, ar and fps are rounded to the model's dtype: in bf16 t = 999 is 1000, 507 times remain
  Q3    the final layer modulates given frames twice: by time t as if noised, then by time 0 + size
  Q4-7  of the sampler (sample.py), of captions (vae.clean_caption) and of fps (data.conditioning)
Kept in every model: positions are scaled by clip 0's size (a batch shares one); the final layer sees time but not size.
"""
import os
import signal
if __name__ in ("__main__", "__mp_main__"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # Ctrl-C ends it without a traceback
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")    # see kernels.py
import argparse
import json
import math
import re
import time
import weakref
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors.torch import load_file
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import (all_frames, attention, cross_attention, gated_residual, gelu_linear, modulate, own_frames,
                     qk_norm_rope, time_attention, to_frames, to_positions)


@dataclass(frozen=True)
class STDiTConfig:
    """The defaults are XL/2, the size of the published weights."""
    depth: int = 28
    hidden_size: int = 1152
    num_heads: int = 16
    mlp_ratio: float = 4.0
    patch_size: tuple[int, int, int] = (1, 2, 2)    # frames, rows, columns of latent cells in a token
    in_channels: int = 4
    caption_channels: int = 4096
    model_max_length: int = 200                     # text tokens of the null caption
    input_sq_size: int = 512                        # a square of this many pixels has positions 0 .. sqrt(S) - 1
    qk_norm: bool = True
    class_dropout_prob: float = 0.1                 # how often train.py swaps a caption for the null caption
    pred_sigma: bool = True
    # Add a sinusoidal embedding of the frame index to the tokens, as the ST-DiT of Open-Sora 1.0 did. Rotary attention
    # sees distances only: frames of pure noise look alike to it; a small model has no way to know which comes first.
    temporal_pos: bool = False
    as_released: bool = False                       # Q1 to Q7, for the weights that Open-Sora published

    def __post_init__(self):
        if len(self.patch_size) != 3:
            raise ValueError(f"patch_size must be (frames, rows, columns), got {self.patch_size}")
        C, heads, channels = self.hidden_size, self.num_heads, (self.in_channels, self.caption_channels)
        if min(self.depth, C, heads, *self.patch_size, *channels, self.model_max_length) < 1:
            raise ValueError(f"depth, sizes, channels and lengths must be 1 or more, got {self}")
        if C % 12:
            raise ValueError(f"hidden_size must be a multiple of 12 (3 sizes and 4 position tables share it), got {C}")
        if C % heads or (C // heads) % 2:
            raise ValueError(f"hidden_size / num_heads must be an even number (RoPE turns pairs), got {C} / {heads}")

    @property
    def head_dim(self):
        return self.hidden_size // self.num_heads

    @property
    def out_channels(self):
        return self.in_channels * (2 if self.pred_sigma else 1)

    def grid(self, T, h, w):
        """Tokens along time, rows and columns; the last patch of an axis may be padded."""
        return tuple(math.ceil(n / p) for n, p in zip((T, h, w), self.patch_size))


XL_2 = STDiTConfig()
TINY = STDiTConfig(depth=4, hidden_size=144, num_heads=6, patch_size=(1, 1, 1), in_channels=16, caption_channels=64,
                   model_max_length=16, input_sq_size=32, temporal_pos=True)


# ---- tables, computed in fp32 at each forward: they depend on the clip's size and cost less than looking them up ----

def frequencies(dim, device=None):
    """10000^(-2i / dim) for i < dim / 2, in fp32.  Attention Is All You Need, section 3.5."""
    return torch.exp(-math.log(10000) * torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


def sin_cos(position, dim):
    """position [n] -> [n dim], sines first."""
    angle = position[:, None] * frequencies(dim, position.device)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def position_table(rows, columns, scale, dim):
    """2-D sinusoidal embedding [S dim]: the first half of the channels tells the column, the second the row.

    scale: side of the clip in pixels / input_sq_size, so that a cell keeps its place at any resolution (PixArt-alpha).
    """
    base = round((rows * columns) ** 0.5)
    device = scale.device if torch.is_tensor(scale) else None
    row, column = (sin_cos(torch.arange(n, device=device) / scale * base / n, dim // 2) for n in (rows, columns))
    return torch.cat([repeat(column, "w c -> (h w) c", h=rows), repeat(row, "h c -> (h w) c", w=columns)], dim=-1)


def rotary_table(num_frames, head_dim, device=None):
    """cos and sin [T D/2] of the temporal RoPE; positions count latent frames whatever the fps."""
    angle = torch.arange(num_frames, device=device, dtype=torch.float32)[:, None] * frequencies(head_dim, device)
    return angle.cos(), angle.sin()


# ---- embedders: parameter names are upstream's; a module touches only its own parameters, as FSDP wants ----

class PatchEmbed(nn.Module):
    """x [B C_in T h w] -> tokens [B T S C], zero-padded at the end of each axis to whole patches."""
    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, x):
        pt, ph, pw = self.patch_size
        T, h, w = x.shape[2:]
        x = F.pad(x.to(self.proj.weight.dtype), (0, -w % pw, 0, -h % ph, 0, -T % pt))
        x = rearrange(x, "b c (t pt) (h ph) (w pw) -> b t (h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)     # a convolution whose stride is its kernel


class ScalarEmbedder(nn.Module):
    """A number such as t, a height or fps: s [...] fp32 -> [... dim]; cosines first, unlike the positions."""
    def __init__(self, dim, num_frequencies=256):
        super().__init__()
        self.num_frequencies = num_frequencies
        self.mlp = nn.Sequential(nn.Linear(num_frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, s):
        angle = s[..., None] * frequencies(self.num_frequencies, s.device)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class Mlp(nn.Module):
    def __init__(self, dim_in, hidden, dim_out):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim_in, hidden), nn.Linear(hidden, dim_out)

    def forward(self, x):
        return gelu_linear(self.fc1(x), self.fc2.weight, self.fc2.bias)


class CaptionEmbedder(nn.Module):
    """y [tokens C_text] -> [tokens C].  Keeps the null caption too: drawn at initialisation, never trained."""
    def __init__(self, config):
        super().__init__()
        self.register_buffer("y_embedding", torch.empty(config.model_max_length, config.caption_channels))
        self.y_proj = Mlp(config.caption_channels, config.hidden_size, config.hidden_size)

    def forward(self, y):
        return self.y_proj(y.to(self.y_proj.fc1.weight.dtype))


class Rope(nn.Module):
    """Holds rope.freqs as the published files do.  Not read: rotary_table computes it, safe from casts to bf16."""
    def __init__(self, head_dim):
        super().__init__()
        self.freqs = nn.Parameter(torch.empty(head_dim // 2), requires_grad=False)


# ---- the block ----

class RMSNorm(nn.Module):
    """Only the weight: kernels.qk_norm_rope does the work together with RoPE."""
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Attention(nn.Module):
    """Self attention of x [B T S C] along axis "space" or "time".  rotary None or (cos, sin)."""
    def __init__(self, config):
        super().__init__()
        self.num_heads, self.rope_first = config.num_heads, config.as_released        # Q1
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim) if config.qk_norm else None
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, axis, rotary=None):
        weights = [norm and norm.weight for norm in (self.q_norm, self.k_norm)]
        if axis == "space":
            out = attention(*qk_norm_rope(self.qkv(x), *weights, rotary, self.rope_first, self.num_heads, axis))
            return self.proj(rearrange(out, "(b t) heads s d -> b t s (heads d)", b=len(x)))
        out = self.proj(time_attention(self.qkv(x), *weights, rotary, self.rope_first, self.num_heads))
        return rearrange(out, "(b s) t c -> b t s c", b=len(x))     # as it lies: gated_residual reads any order


class CrossAttention(nn.Module):
    """x [B T S C] attends to text [sum(lengths) C]; lengths: tokens of each clip's caption."""
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.q_linear = nn.Linear(config.hidden_size, config.hidden_size)
        self.kv_linear = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, text, lengths):
        q = rearrange(self.q_linear(x), "b t s (heads d) -> b heads (t s) d", heads=self.num_heads)
        k, v = rearrange(self.kv_linear(text), "l (two heads d) -> two l heads d", two=2, heads=self.num_heads)
        out = cross_attention(q, k, v, lengths)
        return self.proj(rearrange(out, "b heads (t s) d -> b t s (heads d)", t=x.shape[1]))


class Block(nn.Module):
    """Space, time, text, MLP.  Cross attention has no norm, no modulation and no gate, as in PixArt-alpha."""
    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        self.scale_shift_table = nn.Parameter(torch.empty(6, C))
        self.scale_shift_table_temporal = nn.Parameter(torch.empty(3, C))
        self.attn, self.attn_temp, self.cross_attn = Attention(config), Attention(config), CrossAttention(config)
        self.mlp = Mlp(C, int(C * config.mlp_ratio), C)

    def forward(self, x, mod, mod_temp, text, lengths, rotary, group=None):
        """x [B T S C]; mod [B T 6C], mod_temp [B T 3C], or T = 1; text [sum(lengths) C]; rotary (cos, sin) of all T.

        group: the ranks that share the clip; x, mod and mod_temp are then of this rank's frames."""
        mod = rearrange(mod, "b t (six c) -> b t six c", six=6) + self.scale_shift_table
        mod_temp = rearrange(mod_temp, "b t (three c) -> b t three c", three=3) + self.scale_shift_table_temporal
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = mod.unbind(2)
        shift_tmp, scale_tmp, gate_tmp = mod_temp.unbind(2)
        S, T = x.shape[2], rotary[0].shape[0]

        x = gated_residual(x, gate_msa, self.attn(modulate(x, shift_msa, scale_msa), "space"))
        h = to_positions(modulate(x, shift_tmp, scale_tmp), T, group)                   # collective, as is to_frames
        x = gated_residual(x, gate_tmp, to_frames(self.attn_temp(h, "time", rotary), S, group))
        x = x + self.cross_attn(x, text, lengths)
        return gated_residual(x, gate_mlp, self.mlp(modulate(x, shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """x [B T S C], cond [B T C] -> [B T S (pt ph pw C_out)].  again (Q3): None or (x_mask, cond of given frames)."""
    def __init__(self, config):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(2, config.hidden_size))
        self.linear = nn.Linear(config.hidden_size, math.prod(config.patch_size) * config.out_channels)

    def modulate(self, x, cond):
        shift, scale = (self.scale_shift_table + cond[:, :, None]).unbind(2)
        return modulate(x, shift, scale)

    def forward(self, x, cond, again=None):
        x = self.modulate(x, cond)
        if again is not None:
            x_mask, given_cond = again
            x = torch.where(x_mask[:, :, None, None], x, self.modulate(x, given_cond))
        return self.linear(x)


# ---- the model ----

class STDiT(nn.Module):
    """Under FSDP2 use MixedPrecisionPolicy(cast_forward_inputs=False): times, sizes and rotary tables stay fp32.

    group: None, or the process group whose ranks share each clip: all are given the same arguments, each computes some
    frames, all return the whole. A rank's gradient is then the part of its frames; the sum over the group is right."""
    group = None

    def __init__(self, config: STDiTConfig, seed: int = 0):
        super().__init__()
        self.config, C = config, config.hidden_size
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = ScalarEmbedder(C)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(C, 6 * C))
        self.t_block_temp = nn.Sequential(nn.SiLU(), nn.Linear(C, 3 * C))
        self.y_embedder = CaptionEmbedder(config)
        self.rope = Rope(config.head_dim)
        self.csize_embedder, self.ar_embedder = ScalarEmbedder(C // 3), ScalarEmbedder(C // 3)
        self.fl_embedder, self.fps_embedder = ScalarEmbedder(C), ScalarEmbedder(C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.init_weights(seed)

    @property
    def null_y(self):
        """The caption "no caption" [L C_text].  Dropout and guidance put it into rows of y; the model never does."""
        return self.y_embedder.y_embedding

    @torch.no_grad()
    def init_weights(self, seed: int = 0):
        """Fills every parameter and buffer, also after `to_empty`; the same values on any device, sharded or not."""
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, value in [*self.named_parameters(), *self.named_buffers()]:
            if value.is_meta:
                continue
            full = initial_value(name, value.shape, generator).to(value.device, value.dtype)
            if isinstance(value, DTensor):      # src_data_rank=None: all have drawn all, so nothing needs to be sent
                full = distribute_tensor(full, value.device_mesh, value.placements, src_data_rank=None)
            value.copy_(full)

    def forward(self, x, t, y, y_mask=None, x_mask=None, height=None, width=None, num_frames=None, ar=None, fps=None):
        """x [B C_in T h w]; t [B]; y [B L C_text]; height, width in pixels, num_frames, ar, fps: [B].

        y_mask [B L]: the tokens that count, None = all; best left on the CPU.  x_mask [B T] bool: True = noised, at
        time t; False = given, at time 0; None = all are noised.  Returns fp32 [B C_out T h w].  Raises ValueError if a
        shape does not fit.
        """
        sizes = {"height": height, "width": width, "num_frames": num_frames, "ar": ar, "fps": fps}
        check_inputs(self.config, x, t, y, y_mask, x_mask, sizes)
        (T, h, w), (pt, ph, pw) = x.shape[2:], self.config.patch_size
        frames, rows, columns = self.config.grid(T, h, w)
        tokens = self.x_embedder(x)                                                     # [B T S C]
        t, height, width, num_frames, ar, fps = (self.condition(s, tokens.dtype) for s in (t, *sizes.values()))

        tokens = tokens + self.positions(frames, rows, columns, (height[0] * width[0]).sqrt()).to(tokens.dtype)
        frame_t = t[:, None] if x_mask is None else torch.where(x_mask, t[:, None], 0)  # each frame has its own time
        time_vec = self.t_embedder(frame_t)                                             # [B T C]; T = 1 without mask
        size_vec = self.csize_embedder(torch.stack([height, width], dim=1)).flatten(1)
        size_vec = torch.cat([size_vec, self.ar_embedder(ar)], dim=1)[:, None]          # [B 1 C], a third each
        rate_vec = (self.fl_embedder(num_frames) + self.fps_embedder(fps))[:, None]     # [B 1 C]
        mod, mod_temp = self.t_block(time_vec + size_vec), self.t_block_temp(time_vec + rate_vec)
        text, lengths = pack_text(y, y_mask)
        text = self.y_embedder(text)                                                    # [sum(lengths) C]
        rotary = rotary_table(frames, self.config.head_dim, x.device)
        own = partial(own_frames, T=frames, group=self.group)
        tokens, mod, mod_temp = map(own, (tokens, mod, mod_temp))
        for block in self.blocks:
            tokens = block(tokens, mod, mod_temp, text, lengths, rotary, self.group)

        if self.config.as_released and x_mask is not None:                              # Q3
            again = own(x_mask), own(time_vec + size_vec)
            out = self.final_layer(tokens, self.t_embedder(t[:, None]), again)
        else:
            out = self.final_layer(tokens, own(time_vec))
        out = all_frames(out, frames, self.group)
        out = rearrange(out, "b t (h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", h=rows, pt=pt, ph=ph, pw=pw)
        return out[:, :, :T, :h, :w].to(torch.float32, copy=True)                       # FSDP2 warns of a view

    def condition(self, s, dtype):
        return s.to(dtype).float() if self.config.as_released else s.float()            # Q2

    def positions(self, frames, rows, columns, pixels_per_side):
        """[T S C], or [S C] if only rotary attention is to tell the frames apart."""
        table = position_table(rows, columns, pixels_per_side / self.config.input_sq_size, self.config.hidden_size)
        if self.config.temporal_pos:
            table = table + sin_cos(torch.arange(frames, device=table.device), self.config.hidden_size)[:, None]
        return table


def pack_text(y, y_mask):
    """y [B L C_text], y_mask [B L] -> the counted tokens end to end [sum(lengths) C_text], and lengths as a list."""
    if y_mask is None:
        return y.flatten(0, 1), [y.shape[1]] * y.shape[0]
    counted, lengths = y_mask.flatten().nonzero()[:, 0], (y_mask != 0).sum(1).tolist()  # a sync, if y_mask is on a GPU
    if 0 in lengths:
        row = lengths.index(0)
        raise ValueError(f"y_mask row {row} counts no token, expected 1 at least: T5 ends each caption with </s>")
    return y.flatten(0, 1)[counted.to(y.device)], lengths


def check_inputs(config, x, t, y, y_mask, x_mask, sizes):
    """Shapes, once, where data enters; raises ValueError with both values."""
    def expect(name, value, letters, *shape):
        got = None if value is None else list(value.shape)
        if got != list(shape):
            raise ValueError(f"{name} must be {letters} = {list(shape)}, got {got}")

    if x.ndim != 5 or x.shape[1] != config.in_channels:
        raise ValueError(f"x must be [B C_in T h w] with C_in = {config.in_channels}, got {list(x.shape)}")
    if y.ndim != 3:
        raise ValueError(f"y must be [B L C_text] with C_text = {config.caption_channels}, got {list(y.shape)}")
    B, T, L = x.shape[0], x.shape[2], y.shape[1]
    expect("y", y, "[B L C_text]", B, L, config.caption_channels)
    for name, value in {"t": t, **sizes}.items():
        expect(name, value, "[B]", B)
    if y_mask is not None:
        expect("y_mask", y_mask, "[B L]", B, L)
    if x_mask is not None:
        expect("x_mask", x_mask, "[B T]", B, T)
        if x_mask.dtype != torch.bool:
            raise ValueError(f"x_mask must be bool, True = noised, got {x_mask.dtype}")
        if config.patch_size[0] != 1:
            raise ValueError(f"x_mask needs patches of 1 frame (no token is half given), got {config.patch_size}")


# ---- weights in ----

def initial_value(name, shape, generator):
    """PixArt-alpha's and Open-Sora's recipe: time and text attention add nothing at first; a fresh model outputs 0."""
    zero = ("attn_temp.proj.weight", "cross_attn.proj.weight", "final_layer.linear.weight", ".bias")
    value = torch.empty(shape, device="cpu")
    if name.endswith("rope.freqs"):
        return frequencies(2 * shape[0])
    if name.endswith(zero):
        return value.zero_()
    if name.endswith("norm.weight"):
        return value.fill_(1)
    if "scale_shift_table" in name or name.endswith("y_embedding"):
        return value.normal_(std=shape[-1] ** -0.5, generator=generator)
    if name.startswith(("t_embedder", "t_block", "y_embedder.y_proj")):
        return value.normal_(std=0.02, generator=generator)
    return nn.init.xavier_uniform_(value.flatten(1), generator=generator).reshape(shape)


def check_weights(model, weights, source="these weights"):
    """ValueError where weights, a dict, are not the model's by name and shape; it names the first of each kind."""
    own = model.state_dict()
    odd = {"missing": [key for key in own if key not in weights],
           "unknown": [key for key in weights if key not in own],
           "misshapen": [f"{key} {list(weights[key].shape)}, expected {list(own[key].shape)}"
                         for key in own if key in weights and weights[key].shape != own[key].shape]}
    said = [f"{kind} {names[0]}" + f" (and {len(names) - 1} more)" * (len(names) > 1)
            for kind, names in odd.items() if names]
    if said:
        raise ValueError(f"{source}: not those of a model with depth {model.config.depth}, width "
                         f"{model.config.hidden_size}: {'; '.join(said)}")


# What else upstream's config.json holds: it does not change what the model computes.
IGNORED_KEYS = {
    "architectures", "auto_map", "dtype", "torch_dtype", "model_type", "transformers_version", "_name_or_path",
    "from_pretrained", "freeze", "input_size", "drop_path", "no_temporal_pos_emb", "enable_flash_attn",
    "enable_flashattn", "enable_layernorm_kernel", "enable_sequence_parallelism",
}


def from_upstream(config: dict, weights: dict) -> STDiT:
    """Open-Sora's config.json and weights -> a model as released.  ValueError if either holds what we do not know."""
    return with_weights(upstream_config(config), weights)


def upstream_config(config: dict) -> STDiTConfig:
    """Of Open-Sora's config.json, as released; what it leaves out is as in XL/2."""
    known = {field.name for field in fields(STDiTConfig)}
    unknown = sorted(set(config) - known - IGNORED_KEYS)
    if unknown:
        raise ValueError(f"config.json: unknown keys {unknown} - expected those of STDiT2: {sorted(known)}")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items() if key in known}
    return STDiTConfig(**values | {"as_released": True})


def with_weights(config: STDiTConfig, weights: dict, source="these weights") -> STDiT:
    """The model that has these weights, the tensors themselves.  ValueError if they are not its own, one for one."""
    with torch.device("meta"):
        model = STDiT(config)
    check_weights(model, weights, source)
    model.load_state_dict(weights, assign=True)
    exact = frequencies(model.config.head_dim)
    if not torch.allclose(model.rope.freqs.float(), exact, rtol=2 ** -8):   # 2^-8: they may have been in bf16
        raise ValueError(f"{source}: rope.freqs are not 10000^(-2i/D), which this model computes and cannot change")
    return model


# PixArt-alpha's parameters: its own .pth names them as we do (left); diffusers' folder as on the right, where some that
# we keep stacked lie apart. Of a block without "blocks.N."; weight and bias alike. The rest of STDiT is time's.
PIXART_NAMES = {
    "x_embedder.proj": "pos_embed.proj", "t_block.1": "adaln_single.linear",
    "t_embedder.mlp.0": "adaln_single.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "adaln_single.emb.timestep_embedder.linear_2",
    "csize_embedder.mlp.0": "adaln_single.emb.resolution_embedder.linear_1",
    "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
    "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
    "ar_embedder.mlp.2": "adaln_single.emb.aspect_ratio_embedder.linear_2",
    "y_embedder.y_embedding": "caption_projection.y_embedding",
    "y_embedder.y_proj.fc1": "caption_projection.linear_1", "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    "scale_shift_table": "scale_shift_table",
    "attn.qkv": "attn1.to_q attn1.to_k attn1.to_v", "attn.proj": "attn1.to_out.0",
    "cross_attn.q_linear": "attn2.to_q", "cross_attn.kv_linear": "attn2.to_k attn2.to_v",
    "cross_attn.proj": "attn2.to_out.0", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
    "final_layer.linear": "proj_out", "final_layer.scale_shift_table": "scale_shift_table",
}
# What else may be there: position tables (position_table computes them for any size).
PIXART_UNUSED = {"pos_embed", "pos_embed.pos_embed"}


@torch.no_grad()
def from_pixart(path, config: STDiTConfig, seed: int = 0) -> dict:
    """The image model PixArt-alpha-XL-2-1024-MS -> a whole state dict of STDiT(config), the start of stage 0.

    path: its .pth, or diffusers' folder (config.json in it or in transformer/). What PixArt lacks is that of
    STDiT(config, seed), where temporal attention adds nothing: without QK-norm each frame of 1024 x 1024 pixels comes
    out as PixArt's image would. PixArt was told height / width as ar, and its final layer sees the size too: other
    shapes start further off.  ValueError names what is missing, unknown or misshapen.
    """
    path, heads = Path(path), config.num_heads      # a .pth does not tell how many heads
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        heads = json.loads((folder / "config.json").read_text("utf-8"))["num_attention_heads"]
        source = load_file(folder / "diffusion_pytorch_model.safetensors")
    else:
        source = torch.load(path, map_location="cpu", weights_only=True)
        source = source.get("state_dict", source)
    for key, value in {"num_heads": heads, "input_sq_size": 512, "temporal_pos": False}.items():
        if getattr(config, key) != value:           # shapes do not tell; its position scale is 2 at 1024 pixels
            raise ValueError(f"{key}={getattr(config, key)} does not suit {path}, expected {key}={value}")
    model, left = STDiT(config, seed), set(source) - PIXART_UNUSED
    state = model.state_dict()      # its tensors are the model's: what is copied here is in the model too
    for name, value in state.items():
        block, part, leaf = re.fullmatch(r"(blocks\.\d+\.)?(.+?)(\.weight|\.bias)?", name).groups(default="")
        if part not in PIXART_NAMES:
            continue
        theirs = [block + part + leaf]
        if path.is_dir():
            theirs = ["transformer_" * bool(block) + block + key + leaf for key in PIXART_NAMES[part].split()]
        if part == "y_embedder.y_embedding" and path.is_dir() and theirs[0] not in source:
            continue                # diffusers' class has none; the published folder has
        missing = [key for key in theirs if key not in source]
        if missing:
            raise ValueError(f"{path} has no {missing[0]}, expected the weights of PixArt-alpha at 1024 with {config}")
        new = torch.cat([source[key] for key in theirs])
        if part == "y_embedder.y_embedding":    # 120 tokens -> 200: the last one again, as upstream starts
            new = torch.cat([new, new[-1:].expand(len(value), -1)])[:len(value)]
        if name == "x_embedder.proj.weight":
            new = new.unsqueeze(2)              # a patch of one frame
        if new.shape != value.shape:
            raise ValueError(f"{path}: {theirs[0]} gives {name} {list(new.shape)}, expected {list(value.shape)}")
        value.copy_(new)
        left -= set(theirs)
    if left:
        raise ValueError(f"{path}: unknown weights {sorted(left)}, expected PixArt-alpha's with {config.depth} blocks")
    # PixArt's final layer sees time + size, ours time alone: its table takes the size vector of 1024 x 1024 pixels.
    size_vec = torch.cat([model.csize_embedder(torch.tensor([1024.0, 1024.0])).flatten(),
                          model.ar_embedder(torch.tensor(1.0))])
    state["final_layer.scale_shift_table"] += size_vec
    return state


# ---- what it costs ----

def num_params(config):
    with torch.device("meta"):
        return sum(p.numel() for p in STDiT(config).parameters())


def flops(config, T, h, w, L, B=1):
    """Of one forward: matrix products and attention, 2 per multiply-add; mostly 36 N C^2 per block."""
    frames, rows, columns = config.grid(T, h, w)
    C, S, N = config.hidden_size, rows * columns, frames * rows * columns
    products = 2 * N * C * C * (4 + 4 + 2 + 2 * config.mlp_ratio) + 4 * L * C * C    # space, time, text, MLP; text keys
    attentions = 4 * N * C * (S + frames + L)
    patches = 2 * N * C * math.prod(config.patch_size) * (config.in_channels + config.out_channels)
    text = 2 * L * C * (config.caption_channels + C)
    return int(B * (config.depth * (products + attentions) + patches + text))


def held_bytes(forward, own):
    """What autograd keeps of forward() for backward, each storage once, but for those in own (their _cdata)."""
    kept = []                   # holds the tensors: the address of a freed storage could come again
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        forward()
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in kept}
    return sum(size for key, size in storages.items() if key not in own)


def _weights_and_inputs(model, dtype, B, T, h, w, L):
    """Of the right shapes, as dicts; what is in them is left open."""
    weights = {name: torch.empty(value.shape, dtype=dtype, requires_grad=value.requires_grad)
               for name, value in model.state_dict(keep_vars=True).items()}
    return weights, example_inputs(model.config, B, T, h, w, L) | {"x_mask": torch.ones(B, T, dtype=torch.bool)}


def forward_bytes(config: STDiTConfig, B, T, h, w, L, dtype):
    """The most bytes of activations at once in a forward without gradients, of the same arguments."""
    with torch.device("meta"):
        model = STDiT(replace(config, depth=2))     # blocks come one after another
    with FakeTensorMode(), torch.no_grad():
        weights, inputs = _weights_and_inputs(model, dtype, B, T, h, w, L)
        with LiveBytes([*weights.values(), *inputs.values()]) as memory:
            functional_call(model, weights, kwargs=inputs)
        return memory.peak


class LiveBytes(TorchDispatchMode):
    """now, peak: bytes of all storages but the known ones that live, and the most that did."""
    def __init__(self, known):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, {x.untyped_storage()._cdata for x in known}

    def __torch_dispatch__(self, op, types, args, kwargs=None):
        out = op(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in self.known:
                self.known.add(key)
                self.now += x.untyped_storage().nbytes()
                weakref.finalize(x.untyped_storage(), self.free, key, x.untyped_storage().nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size


def example_inputs(config, B=1, T=4, h=8, w=8, L=8):
    """Random arguments for a forward, as keywords."""
    size = {"height": 8 * h, "width": 8 * w, "num_frames": T, "ar": w / h, "fps": 8}
    return {"x": torch.randn(B, config.in_channels, T, h, w), "t": torch.full((B,), 500),
            "y": torch.randn(B, L, config.caption_channels), **{k: torch.full((B,), float(v)) for k, v in size.items()}}


# ---- python model.py ----

EXAMPLES = """What the model is and costs.

    python model.py     parameters, FLOPs of a forward, the time of a small one
"""


def main(argv=None):
    argparse.ArgumentParser(description=EXAMPLES,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    stages = ("16x144x256", "16x240x426", "16x480x854", "16x720x1280")
    print(f"{'':<6}{'parameters':>12}   TFLOP of a forward at " + "".join(f"{stage:>12}" for stage in stages))
    for name, config in {"XL/2": XL_2, "tiny": TINY}.items():
        shapes = [map(int, stage.split("x")) for stage in stages]
        costs = [flops(config, T, H // 8, W // 8, config.model_max_length) / 1e12 for T, H, W in shapes]
        print(f"{name:<6}{num_params(config):>12,}   {'':<22}" + "".join(f"{cost:>12.3f}" for cost in costs))
    B, T, h, w, L = 8, 8, 4, 4, 8
    model, inputs = STDiT(TINY), example_inputs(TINY, B, T, h, w, L)
    with torch.no_grad():
        model(**inputs)     # the first call pays for start-up
        start = time.perf_counter()
        model(**inputs)
        seconds = time.perf_counter() - start
    rate = flops(TINY, T, h, w, L, B) / seconds / 1e9
    print(f"tiny, {B} clips of {T}x{h}x{w} latents on {torch.get_num_threads()} CPU threads: "
          f"{1e3 * seconds:.1f} ms, {rate:.1f} GFLOP/s")


if __name__ == "__main__":
    from model import main; main()
