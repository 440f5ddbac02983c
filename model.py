"""ST-DiT-2, the video transformer of Open-Sora 1.1: predicts the noise (or v) in noisy latents, and the
variance of the denoising step.

Start with STDiT.forward, then read Block.  This file knows nothing of diffusion: it computes one function
    x [B C_in T h w] latents, t [B] in 0..999, y [B L C_text] captions, and height, width, num_frames, ar, fps [B]
    -> fp32 [B C_out T h w]
`python model.py` prints the parameters, and the FLOPs of a forward at the training shapes.
Papers: DiT 2212.09748, PixArt-alpha 2310.00426, Open-Sora 2412.20404.

B clips, T latent frames, S tokens per frame, N = T S, C width, D = C / heads, L text tokens, H W pixels, h w latents.
t is the noise level, also called diffusion time, 0 (clean) to 999 (noise).  ar is the aspect ratio, width / height.
STDiTConfig.as_released turns on the quirks of Open-Sora's code that the published weights were trained with:
  Q1    temporal attention rotates queries and keys before it normalises them, not after
  Q2    t and the conditioning values are rounded to the model's dtype: in bf16, 999 becomes 1000, and only 507 of the
        1000 noise levels stay distinct
  Q3    the final layer modulates given frames twice: for noise level t, as if they were noised, then for level 0 with
        the size added
  Q4-7  concern the sampler (sample.py), captions (vae.clean_caption) and fps (data.conditioning)
New models do without these.  Two more quirks stay in every model: positions are scaled by the size of clip 0 (the clips
of a batch share one size), and the final layer is conditioned on t but not on the size.
"""
import argparse
import json
import math
import pickle
import re
import struct
import warnings
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from einops import rearrange, repeat
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor

from kernels import attention, cross_attention, gated_residual, gelu_linear, modulate, qk_norm_rope, time_attention


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
    model_max_length: int = 200                     # most text tokens of a caption; the null caption has as many
    input_sq_size: int = 512                        # side in pixels at which rows and columns count 0, 1, 2, ...
    qk_norm: bool = True
    class_dropout_prob: float = 0.1                 # how often train.py swaps a caption for the null caption
    pred_sigma: bool = True
    # Add a sinusoidal embedding of the frame index to the tokens, as the ST-DiT of Open-Sora 1.0 did. Rotary attention
    # sees distances only: frames of pure noise look alike to it, and a small model cannot know which comes first.
    temporal_pos: bool = False
    as_released: bool = False                       # Q1 to Q7, for the weights that Open-Sora published

    def __post_init__(self):
        C = self.hidden_size
        heads = self.num_heads
        if len(self.patch_size) != 3:
            raise ValueError(f"patch_size must be (frames, rows, columns), got {self.patch_size}")
        counts = (self.depth, C, heads, *self.patch_size, self.in_channels, self.caption_channels,
                  self.model_max_length)
        if min(counts) < 1:
            raise ValueError(f"depth, sizes, channels and lengths must be 1 or more, got {self}")
        if C % 12:
            raise ValueError(f"hidden_size must be a multiple of 12 (by 3 for height, width and ar, by 4 for sines and "
                             f"cosines of rows and columns), got {C}")
        if C % heads or (C // heads) % 2:
            raise ValueError(f"hidden_size / num_heads must be an even number (RoPE turns pairs), got {C} / {heads}")

    @property
    def head_dim(self):
        return self.hidden_size // self.num_heads

    @property
    def out_channels(self):
        return 2 * self.in_channels if self.pred_sigma else self.in_channels

    def grid(self, T, h, w):
        """Returns how many tokens lie along time, rows and columns; the last patch of an axis may be padded."""
        pt, ph, pw = self.patch_size
        return math.ceil(T / pt), math.ceil(h / ph), math.ceil(w / pw)


XL_2 = STDiTConfig()
TINY = STDiTConfig(depth=4, hidden_size=144, num_heads=6, in_channels=8, caption_channels=64,
                   model_max_length=16, input_sq_size=64, temporal_pos=True)


# ---- tables, computed in fp32 at each forward: they depend on the clip's size, and computing them is cheap ----

def frequencies(dim, device=None):
    """Returns 10000^(-2i / dim) for i < dim / 2 (Attention Is All You Need, section 3.5)."""
    return torch.exp(-math.log(10000) * torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


def sin_cos(position, dim):
    """Returns the sinusoidal embedding [n dim] of positions [n], sines first."""
    angle = position[:, None] * frequencies(dim, position.device)                       # [n dim/2]
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def position_table(rows, columns, scale, dim, device=None):
    """Returns the 2-D sinusoidal embedding [S dim]: columns in the first half of the channels, rows in the second.

    scale: side of the clip in pixels / input_sq_size.  A clip of 256 pixels has the positions 0, 2, 4, ... where one of
    512 pixels has 0, 1, 2, ..., so the same part of a picture has the same positions at any resolution (PixArt-alpha).
    """
    base = round((rows * columns) ** 0.5)
    row = sin_cos(torch.arange(rows, device=device) / scale * base / rows, dim // 2)             # [rows dim/2]
    column = sin_cos(torch.arange(columns, device=device) / scale * base / columns, dim // 2)    # [columns dim/2]
    row = repeat(row, "h c -> (h w) c", w=columns)
    column = repeat(column, "w c -> (h w) c", h=rows)
    return torch.cat([column, row], dim=-1)


def rotary_table(num_frames, head_dim, device=None):
    """Returns cos and sin [T D/2] of the temporal RoPE; positions count latent frames whatever the fps."""
    position = torch.arange(num_frames, device=device, dtype=torch.float32)
    angle = position[:, None] * frequencies(head_dim, device)
    return angle.cos(), angle.sin()


# ---- embedders: parameter names are Open-Sora's ----

class PatchEmbed(nn.Module):
    """Turns x [B C_in T h w] into tokens [B T S C]; pads with zeros at the end of each axis to whole patches."""
    def __init__(self, config):
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, x):
        pt, ph, pw = self.patch_size
        T, h, w = x.shape[2:]
        x = x.to(self.proj.weight.dtype)
        x = F.pad(x, (0, -w % pw, 0, -h % ph, 0, -T % pt))
        x = rearrange(x, "b c (t pt) (h ph) (w pw) -> b t (h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)     # a convolution whose stride is its kernel


class ScalarEmbedder(nn.Module):
    """Embeds numbers such as t, a height or fps: s [...] fp32 -> [... dim]; cosines first, unlike the positions."""
    def __init__(self, dim, num_frequencies=256):
        super().__init__()
        self.num_frequencies = num_frequencies
        self.mlp = nn.Sequential(nn.Linear(num_frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, s):
        angle = s[..., None] * frequencies(self.num_frequencies, s.device)
        waves = torch.cat([angle.cos(), angle.sin()], dim=-1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


class Mlp(nn.Module):
    def __init__(self, dim_in, hidden, dim_out):
        super().__init__()
        self.fc1 = nn.Linear(dim_in, hidden)
        self.fc2 = nn.Linear(hidden, dim_out)

    def forward(self, x):
        return gelu_linear(self.fc1(x), self.fc2.weight, self.fc2.bias)


class CaptionEmbedder(nn.Module):
    """Projects y [tokens C_text] to [tokens C].  Holds the null caption: drawn at initialisation, never trained."""
    def __init__(self, config):
        super().__init__()
        self.register_buffer("y_embedding", torch.empty(config.model_max_length, config.caption_channels))
        self.y_proj = Mlp(config.caption_channels, config.hidden_size, config.hidden_size)

    def forward(self, y):
        return self.y_proj(y.to(self.y_proj.fc1.weight.dtype))


class Rope(nn.Module):
    """Holds rope.freqs as the published files do.  The forward uses rotary_table instead, which no cast can round."""
    def __init__(self, head_dim):
        super().__init__()
        self.freqs = nn.Parameter(torch.empty(head_dim // 2), requires_grad=False)


# ---- the block ----

class RMSNorm(nn.Module):
    """Holds the weight only: kernels.qk_norm_rope normalises, together with RoPE."""
    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


class Attention(nn.Module):
    """Self attention of x [B T S C] along axis "space" or "time".  rotary: None, or (cos, sin)."""
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.rope_first = config.as_released                                            # Q1
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim) if config.qk_norm else None
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, axis, rotary=None):
        norms = (None, None)
        if self.q_norm is not None:
            norms = (self.q_norm.weight, self.k_norm.weight)
        qkv = self.qkv(x)                                                               # [B T S 3C]
        if axis == "space":
            q, k, v = qk_norm_rope(qkv, *norms, rotary, self.rope_first, self.num_heads, axis)
            out = attention(q, k, v)                                                    # [(B T) heads S D]
            out = rearrange(out, "(b t) heads s d -> b t s (heads d)", b=len(x))
            return self.proj(out)
        out = time_attention(qkv, *norms, rotary, self.rope_first, self.num_heads)      # [(B S) T C]
        return rearrange(self.proj(out), "(b s) t c -> b t s c", b=len(x))              # a view: no copy is needed


class CrossAttention(nn.Module):
    """Lets x [B T S C] attend to text [sum(lengths) C]; lengths: tokens of each clip's caption."""
    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_heads
        self.q_linear = nn.Linear(config.hidden_size, config.hidden_size)
        self.kv_linear = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, text, lengths):
        q = rearrange(self.q_linear(x), "b t s (heads d) -> b heads (t s) d", heads=self.num_heads)
        k, v = rearrange(self.kv_linear(text), "l (two heads d) -> two l heads d", two=2, heads=self.num_heads)
        out = cross_attention(q, k, v, lengths)                                         # [B heads N D]
        return self.proj(rearrange(out, "b heads (t s) d -> b t s (heads d)", t=x.shape[1]))


class Block(nn.Module):
    """Attention in space, attention in time, cross attention to the text, MLP.

    modulate(x, shift, scale) is LayerNorm(x) * (1 + scale) + shift; gated_residual(x, gate, y) is x + gate * y.  Cross
    attention has neither norm nor modulation nor gate, as in PixArt-alpha."""
    def __init__(self, config):
        super().__init__()
        C = config.hidden_size
        self.scale_shift_table = nn.Parameter(torch.empty(6, C))
        self.scale_shift_table_temporal = nn.Parameter(torch.empty(3, C))
        self.attn = Attention(config)
        self.attn_temp = Attention(config)
        self.cross_attn = CrossAttention(config)
        self.mlp = Mlp(C, int(C * config.mlp_ratio), C)

    def forward(self, x, mod, mod_temp, text, lengths, rotary):
        """Returns x [B T S C] after the block.

        mod [B T 6C], mod_temp [B T 3C], or [B 1 ...] if all frames have the same; text [sum(lengths) C]; rotary: (cos,
        sin) of all T."""
        mod = rearrange(mod, "b t (six c) -> b t six c", six=6) + self.scale_shift_table
        mod_temp = rearrange(mod_temp, "b t (three c) -> b t three c", three=3) + self.scale_shift_table_temporal
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = mod.unbind(2)  # [B T C] each
        shift_tmp, scale_tmp, gate_tmp = mod_temp.unbind(2)

        x = gated_residual(x, gate_msa, self.attn(modulate(x, shift_msa, scale_msa), "space"))
        x = gated_residual(x, gate_tmp, self.attn_temp(modulate(x, shift_tmp, scale_tmp), "time", rotary))
        x = x + self.cross_attn(x, text, lengths)
        return gated_residual(x, gate_mlp, self.mlp(modulate(x, shift_mlp, scale_mlp)))


class FinalLayer(nn.Module):
    """Turns x [B T S C] into [B T S (pt ph pw C_out)], modulated by cond [B T C] or [B 1 C].

    Q3: where x_mask [B T] is False, x is modulated by given_cond [B T C] as well."""
    def __init__(self, config):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(2, config.hidden_size))
        self.linear = nn.Linear(config.hidden_size, math.prod(config.patch_size) * config.out_channels)

    def modulate(self, x, cond):
        shift, scale = (self.scale_shift_table + cond[:, :, None]).unbind(2)            # [B T C] each
        return modulate(x, shift, scale)

    def forward(self, x, cond, x_mask=None, given_cond=None):
        x = self.modulate(x, cond)
        if given_cond is not None:
            x = torch.where(x_mask[:, :, None, None], x, self.modulate(x, given_cond))
        return self.linear(x)


# ---- the model ----

class STDiT(nn.Module):
    """Under FSDP2 use MixedPrecisionPolicy(cast_forward_inputs=False): times, sizes and rotary tables stay fp32."""

    def __init__(self, config: STDiTConfig, seed: int = 0):
        super().__init__()
        C = config.hidden_size
        self.config = config
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = ScalarEmbedder(C)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(C, 6 * C))
        self.t_block_temp = nn.Sequential(nn.SiLU(), nn.Linear(C, 3 * C))
        self.y_embedder = CaptionEmbedder(config)
        self.rope = Rope(config.head_dim)
        self.csize_embedder = ScalarEmbedder(C // 3)                                    # height and width
        self.ar_embedder = ScalarEmbedder(C // 3)
        self.fl_embedder = ScalarEmbedder(C)                                            # number of frames
        self.fps_embedder = ScalarEmbedder(C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)
        self.init_weights(seed)

    def forward(self, x, t, y, y_mask=None, x_mask=None, height=None, width=None, num_frames=None, ar=None, fps=None):
        """Returns fp32 [B C_out T h w] of x [B C_in T h w]; t [B]; y [B L C_text]; height, width (pixels), num_frames,
        ar, fps: [B].

        x_mask [B T] bool: True for a frame that is noised to level t, False for one that is given, at level 0; None if
        all are noised.  y_mask [B L]: the tokens that are no padding, None if all; on the CPU it costs no sync.  Raises
        ValueError if a shape does not fit.
        """
        values = {"t": t, "height": height, "width": width, "num_frames": num_frames, "ar": ar, "fps": fps}
        check_inputs(self.config, x, y, y_mask, x_mask, values)
        T, h, w = x.shape[2:]
        frames, rows, columns = self.config.grid(T, h, w)

        tokens = self.x_embedder(x)                                                     # [B T S C]
        t, height, width, num_frames, ar, fps = [self.to_fp32(s, tokens.dtype) for s in values.values()]
        pixels_per_side = (height[0] * width[0]).sqrt()
        tokens = tokens + self.positions(frames, rows, columns, pixels_per_side).to(tokens.dtype)
        text, lengths = pack_text(y, y_mask)
        text = self.y_embedder(text)                                                    # [sum(lengths) C]
        rotary = rotary_table(frames, self.config.head_dim, x.device)                   # cos and sin [T D/2]

        frame_t = t[:, None] if x_mask is None else torch.where(x_mask, t[:, None], 0)  # each frame has its own time
        time_vec = self.t_embedder(frame_t)                                             # [B T C]; T = 1 without mask
        size_vec = self.size_vector(height, width, ar)                                  # [B 1 C]
        rate_vec = (self.fl_embedder(num_frames) + self.fps_embedder(fps))[:, None]     # [B 1 C]
        mod = self.t_block(time_vec + size_vec)                                         # [B T 6C]
        mod_temp = self.t_block_temp(time_vec + rate_vec)                               # [B T 3C]

        for block in self.blocks:
            tokens = block(tokens, mod, mod_temp, text, lengths, rotary)                # [B T S C]

        if self.config.as_released and x_mask is not None:                              # Q3
            t_vec = self.t_embedder(t[:, None])                                         # [B 1 C]
            out = self.final_layer(tokens, t_vec, x_mask, time_vec + size_vec)
        else:
            out = self.final_layer(tokens, time_vec)                                    # [B T S (pt ph pw C_out)]
        pt, ph, pw = self.config.patch_size
        out = rearrange(out, "b t (h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", h=rows, pt=pt, ph=ph, pw=pw)
        return out[:, :, :T, :h, :w].to(torch.float32, copy=True)                       # FSDP2 warns about views

    def to_fp32(self, s, dtype):
        """Returns t or a conditioning value [B] in fp32; with Q2 it is rounded to the dtype of the tokens first."""
        if self.config.as_released:
            s = s.to(dtype)
        return s.float()

    def positions(self, frames, rows, columns, pixels_per_side):
        """Returns the table that is added to the tokens: [S C], or [T S C] if the config has temporal_pos."""
        C = self.config.hidden_size
        scale = pixels_per_side / self.config.input_sq_size
        table = position_table(rows, columns, scale, C, scale.device)
        if self.config.temporal_pos:
            table = table + sin_cos(torch.arange(frames, device=scale.device), C)[:, None]
        return table

    def size_vector(self, height, width, ar):
        """Returns the embedding [B 1 C] of height, width and ar, each [B] and a third of the channels."""
        size = torch.stack([height, width], dim=1)                                      # [B 2]
        size_vec = torch.cat([self.csize_embedder(size).flatten(1), self.ar_embedder(ar)], dim=1)
        return size_vec[:, None]

    @property
    def null_y(self):
        """The null caption [L C_text].  Training and guidance put it into rows of y; the model itself never does."""
        return self.y_embedder.y_embedding

    @torch.no_grad()
    def init_weights(self, seed: int = 0):
        """Fills every parameter and buffer, also after `to_empty`; the same values on any device, sharded or not."""
        generator = torch.Generator("cpu").manual_seed(seed)
        for name, value in [*self.named_parameters(), *self.named_buffers()]:
            if value.is_meta:
                continue
            full = initial_value(name, value.shape, generator).to(value.device, value.dtype)
            if isinstance(value, DTensor):      # every rank has drawn the whole tensor: None, nothing is sent
                full = distribute_tensor(full, value.device_mesh, value.placements, src_data_rank=None)
            value.copy_(full)


def initial_value(name, shape, generator):
    """Returns the initial value of a parameter or buffer, by the recipe of PixArt-alpha and Open-Sora: at first
    temporal attention and cross attention add nothing, and the model outputs 0."""
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


def pack_text(y, y_mask):
    """Returns the tokens of y [B L C_text] that are no padding by y_mask [B L], end to end [sum(lengths) C_text], and
    how many each caption has."""
    B, L, _ = y.shape
    tokens = y.flatten(0, 1)
    if y_mask is None:
        return tokens, [L] * B
    lengths = (y_mask != 0).sum(1).tolist()                                             # sync, if y_mask is on a GPU
    if 0 in lengths:
        row = lengths.index(0)
        raise ValueError(f"y_mask row {row} counts no token, expected 1 at least: T5 ends each caption with </s>")
    counted = y_mask.flatten().nonzero()[:, 0]
    return tokens[counted.to(y.device)], lengths


def check_inputs(config, x, y, y_mask, x_mask, values):
    """Raises ValueError if a shape does not fit; values: {name: t or a conditioning value}."""
    if x.ndim != 5 or x.shape[1] != config.in_channels:
        raise ValueError(f"x must be [B C_in T h w] with C_in = {config.in_channels}, got {list(x.shape)}")
    if y.ndim != 3:
        raise ValueError(f"y must be [B L C_text] with C_text = {config.caption_channels}, got {list(y.shape)}")
    B, _, T, _, _ = x.shape
    L = y.shape[1]
    check_shape("y", y, "[B L C_text]", [B, L, config.caption_channels])
    for name, value in values.items():
        check_shape(name, value, "[B]", [B])
    if y_mask is not None:
        check_shape("y_mask", y_mask, "[B L]", [B, L])
    if x_mask is not None:
        check_shape("x_mask", x_mask, "[B T]", [B, T])
        if x_mask.dtype != torch.bool:
            raise ValueError(f"x_mask must be bool, True = noised, got {x_mask.dtype}")
        if config.patch_size[0] != 1:
            raise ValueError(f"x_mask needs patches of 1 frame (no token is half given), got {config.patch_size}")


def check_shape(name, value, letters, expected):
    got = None if value is None else list(value.shape)
    if got != expected:
        raise ValueError(f"{name} must be {letters} = {expected}, got {got}")


# ---- weights: names and shapes must fit exactly, and code that a file may hold is never run ----

DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
# What torch.load raises for a file that is damaged or of another kind.
UNREADABLE = (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError,
              AssertionError, struct.error)


def weights_file(path):
    """Returns the file with the weights: path itself, or of a folder its model.safetensors or the index of its shards.

    A checkpoint of a run (step-0000500) is returned unchanged.  Raises FileNotFoundError, and ValueError for the
    layout of diffusers."""
    path = Path(path)
    if (path / ".metadata").is_file():
        return path
    for file in (path, path / "model.safetensors", path / "model.safetensors.index.json"):
        if file.is_file() and file.name != DIFFUSERS_FILE:
            return file
    if path.name == DIFFUSERS_FILE or (path / DIFFUSERS_FILE).is_file() or (path / "transformer").is_dir():
        raise ValueError(f"{path} has the layout of diffusers, expected that of the authors: for PixArt-alpha the file "
                         "PixArt-XL-2-1024-MS.pth of PixArt-alpha/PixArt-alpha on the hub")
    raise FileNotFoundError(f"{path / 'model.safetensors'} does not exist, expected it, or shards with their "
                            "model.safetensors.index.json")


def read_weights(path) -> dict:
    """Returns {name: tensor} of a .safetensors, of what torch.save wrote, of the index of shards, or of a folder."""
    file = weights_file(path)
    if file.is_dir():
        return read_step(file)
    if file.name.endswith(".safetensors.index.json"):
        return unwrap(read_shards(file), file)
    if file.suffix == ".safetensors":
        return unwrap(read_safetensors(file), file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:     # torch's own message advises to run the code in the file
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if found:
            raise ValueError(f"{file} holds an object of {found[1]}, which could run code, expected tensors") from None
        with open(file, "rb") as raw:
            start = raw.read(24)
        raise ValueError(f"{file} is damaged or not a file of torch.save: it starts with {start!r}") from None
    return unwrap(content, file)


def read_safetensors(file):
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read, it is damaged or not a safetensors file: {error}") from error


def read_shards(index):
    """Returns the tensors of all shards that a model.safetensors.index.json lists."""
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise ValueError(f"{index} has no weight_map, expected one of tensor names to shards")
    weights = {}
    for name in sorted(set(listed.values())):
        shard = index.parent / name
        if not shard.is_file():
            raise FileNotFoundError(f"{shard} does not exist, but {index} lists it")
        weights |= read_safetensors(shard)
    return weights


def read_step(folder):
    """Returns the averaged weights (EMA) of a step-0000500 of a run, which ranks have written in shards."""
    check_whole(folder)
    held = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    weights = {name: torch.empty(tensor.size) for name, tensor in held.items() if name.startswith("ema.")}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as no_dist asks for
        load_shards(weights, folder, no_dist=True)
    return {name.removeprefix("ema."): value for name, value in weights.items()}


def load_shards(state, folder, **how):
    """Fills the tensors of a state dict from a step of a run; collective unless no_dist.  Raises ValueError."""
    try:
        dcp.load(state, checkpoint_id=folder, **how)
    except CheckpointException as error:    # a BaseException, whose message advises to unpickle the file
        kinds = {type(failure).__name__ for failure, _ in error.failures.values()}
        raise ValueError(f"{folder} cannot be read, a shard is damaged or of another model ({', '.join(kinds)}) - "
                         "remove this step to resume from the one before it") from None


def check_whole(folder):
    """Raises ValueError, which names the file, if a shard of a step is missing or has been cut short.

    It does not find bytes that have changed."""
    remedy = "remove this step to resume from the one before it"
    try:
        shards = dcp.FileSystemReader(folder).read_metadata().storage_data.values()
    except Exception as error:          # whatever unpickling raises is about the file
        raise ValueError(f"{folder / '.metadata'} is damaged ({error!r}) - {remedy}") from None
    sizes = {}
    for shard in shards:
        sizes[shard.relative_path] = max(shard.offset + shard.length, sizes.get(shard.relative_path, 0))
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            raise ValueError(f"{file} is missing - {remedy}")
        if file.stat().st_size < size:
            raise ValueError(f"{file} has been cut short, {file.stat().st_size:,} of {size:,} bytes - {remedy}")


def read_json(path):
    """Returns the object in a JSON file as a dict."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected an object {{...}}")
    return content


def unwrap(content, source):
    """Returns the dict of tensors that content is or has under a key, without DistributedDataParallel's prefix."""
    parts = content.values() if isinstance(content, dict) else ()
    models = [part for part in (content, *parts) if is_weights(part)]
    if len(models) != 1:
        held = f"a {type(content).__name__}"
        if parts:
            held += " of " + ", ".join(str(key) for key in list(content)[:8])
        raise ValueError(f"{source} holds {held}, expected one dict of tensors, by itself or under a key such as "
                         "state_dict")
    weights = models[0]
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    return weights


def is_weights(value):
    """Returns whether a value is a dict of tensors, of at least one."""
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in value.items())


def check_weights(model, weights, source="these weights"):
    """Raises ValueError unless names and shapes are the model's; it gives the first of each kind of fault."""
    expected = {name: list(value.shape) for name, value in model.state_dict().items()}
    got = {name: list(value.shape) for name, value in weights.items()}
    faults = {
        "missing": [name for name in expected if name not in got],
        "unknown": [name for name in got if name not in expected],
        "misshapen": [f"{name} {got[name]}, expected {shape}" for name, shape in expected.items()
                      if got.get(name, shape) != shape],
    }
    first = [f"{kind} {names[0]} ({len(names)} in all)" for kind, names in faults.items() if names]
    if first:
        raise ValueError(f"{source}: not those of a model with depth {model.config.depth}, width "
                         f"{model.config.hidden_size}: {'; '.join(first)}")


# What else upstream's config.json holds: it does not change what the model computes.
IGNORED_KEYS = {
    "architectures", "auto_map", "dtype", "torch_dtype", "model_type", "transformers_version", "_name_or_path",
    "from_pretrained", "freeze", "input_size", "drop_path", "no_temporal_pos_emb", "enable_flash_attn",
    "enable_flashattn", "enable_layernorm_kernel", "enable_sequence_parallelism",
}


def upstream_config(config: dict, source="config.json") -> STDiTConfig:
    """Returns the STDiTConfig of Open-Sora's config.json, with as_released; keys that are missing are XL/2's."""
    known = {field.name for field in fields(STDiTConfig)}
    unknown = sorted(set(config) - known - IGNORED_KEYS)
    if unknown:
        raise ValueError(f"{source}: unknown keys {unknown} - expected those of STDiT2: {sorted(known)}")
    values = {}
    for key in known & set(config):
        value = tuple(config[key]) if isinstance(config[key], list) else config[key]
        kind = type(getattr(XL_2, key))
        if not isinstance(value, (int, float) if kind is float else kind):
            raise ValueError(f"{source}: {key} is {config[key]!r}, expected {kind.__name__}")
        values[key] = value
    return STDiTConfig(**values | {"as_released": True})


def from_upstream(config: dict, weights: dict) -> STDiT:
    """Returns Open-Sora's model from its config.json and weights, with as_released.  Raises ValueError if they do not
    fit."""
    return with_weights(upstream_config(config), weights)


def with_weights(config: STDiTConfig, weights: dict, source="these weights") -> STDiT:
    """Returns the model with these weights.  Raises ValueError unless names and shapes are the model's."""
    with torch.device("meta"):
        model = STDiT(config)
    check_weights(model, weights, source)
    model.load_state_dict(weights, assign=True)
    exact = frequencies(config.head_dim)
    if not torch.allclose(model.rope.freqs.float(), exact, rtol=2 ** -8):   # 2^-8: they may have been in bf16
        raise ValueError(f"{source}: rope.freqs are not 10000^(-2i/D), which this model computes and cannot change")
    return model


# What STDiT has and PixArt-alpha has not: the names of all else are the same.
NOT_IN_PIXART = ("attn_temp", "_temporal", "t_block_temp", "fl_embedder", "fps_embedder", "rope", "q_norm", "k_norm")


def is_pixart(weights):
    """Returns whether weights are PixArt-alpha's rather than Open-Sora's: they have no temporal parameters."""
    return "t_block.1.weight" in weights and not any("temp" in name for name in weights)


@torch.no_grad()
def from_pixart(weights: dict, config: STDiTConfig, seed: int = 0, source="these weights") -> dict:
    """Returns a whole state dict of STDiT(config) from the image model PixArt-alpha-XL-2-1024-MS: the start of stage 0.

    Parameters that PixArt lacks are initialised as in STDiT(config, seed), where temporal attention adds nothing.  So
    without QK-norm each frame of 1024 x 1024 pixels comes out as PixArt's image would.  Other shapes differ more,
    because PixArt was trained with ar = height / width, and its final layer is conditioned on the size too.  Raises
    ValueError if names or shapes do not fit.
    """
    for key, value in {"input_sq_size": 512, "temporal_pos": False}.items():    # its positions at 1024 have scale 2
        if getattr(config, key) != value:
            raise ValueError(f"{key}={getattr(config, key)} does not suit {source}, expected {key}={value}")
    model = STDiT(config, seed)
    state = model.state_dict()      # shares its memory with the model
    fresh = {name: value for name, value in state.items() if any(part in name for part in NOT_IN_PIXART)}
    pixart = dict(weights)
    pixart.pop("pos_embed", None)   # position_table computes it for any size
    if "x_embedder.proj.weight" in pixart:
        pixart["x_embedder.proj.weight"] = pixart["x_embedder.proj.weight"].unsqueeze(2)        # a patch of one frame
    if "y_embedder.y_embedding" in pixart:
        # The null caption has 120 tokens: its last one is repeated up to 200, as upstream does.
        null_y = pixart["y_embedder.y_embedding"]
        tokens = torch.arange(config.model_max_length).clamp(max=len(null_y) - 1)
        pixart["y_embedder.y_embedding"] = null_y[tokens]
    check_weights(model, fresh | pixart, source)
    model.load_state_dict(fresh | pixart)
    # PixArt's final layer sees time + size, ours time alone: its table takes the size vector of 1024 x 1024 pixels.
    side = torch.tensor([1024.0])
    state["final_layer.scale_shift_table"] += model.size_vector(side, side, torch.tensor([1.0]))[0]
    return state


# ---- python model.py ----

def main(argv=None):
    from configs import flops
    about = "Prints the parameters, and the FLOPs of a forward of one clip at the training shapes."
    argparse.ArgumentParser(description=about).parse_args(argv)
    for name, config in {"XL/2": XL_2, "tiny": TINY}.items():
        with torch.device("meta"):
            model = STDiT(config)
        print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    for T, H, W in ((16, 144, 256), (16, 240, 426), (16, 480, 854), (16, 720, 1280)):
        flop = flops(XL_2, T, H // 8, W // 8, XL_2.model_max_length)
        print(f"XL/2, {T} x {H}x{W}: {flop / 1e12:.2f} TFLOP")


if __name__ == "__main__":
    main()
