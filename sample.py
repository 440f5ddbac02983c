"""Samples videos from captions: starts from noise, asks the model at each step what to take away, and decodes.

    python sample.py --prompt "a red circle moves right" --seeds 0 1 2 3
    python sample.py --prompt "a red circle moves up" --animate first-frame.png
    python sample.py --prompts prompts.txt          one a line; options may follow: a dog {"num_frames": 16}

In    captions, frames that are given (optional), a checkpoint: one of our runs, or Open-Sora's published weights.
Out   samples/00-a-red-circle.mp4, a contact sheet of its frames, .png, and what made them, .json; from Python, by
      `load` and `generate`: uint8 [B T H W 3].

Papers: DDPM (arXiv 2006.11239), learned variances (2102.09672), DDIM (2010.02502), DPM-Solver++ (2211.01095),
classifier-free guidance (2207.12598), v (2202.00512), editing (2108.01073).
"""
import argparse
import json
import math
import os
import re
import shlex
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from einops import rearrange, repeat
from safetensors.torch import save_file
from tqdm import tqdm

import configs
from data import (ASPECT, IMAGE_FPS, Bucket, atomic_write, check_no_other_files, enlarge, length_and_rate,
                  one_line_errors, positive_int, read_window, resize_crop, slot_generator, to_uint8, to_video,
                  write_video)
from kernels import sequence_parallel, start_processes, use
from masks import (animate, chain, connect, edit, extend_after, extend_before, format_strategy, frame_plan, infill,
                   parse_strategy, seamless)
from model import STDiT, read_json, read_weights, upstream_config, weights_file, with_weights
from vae import (clean_caption, fetch, find, fingerprint, hugging_face, load_text_encoder, load_vae, remember, stamp)

IMPORTED = time.time()
NUM_TIMESTEPS = 1000
SAMPLERS = tuple(configs.SAMPLING_STEPS)
SUFFIXES = {"mp4": ".mp4", "gif": ".gif", "folder": ""}
SHOWN_SIDE = 256        # pixels, up to which an mp4 of small frames is enlarged: a player would show them tiny
# STDiTConfig.as_released also turns on what the published weights expect of their sampler:
#   Q4    of the 4 latent channels the first 3 are guided
#   Q5    the null caption is cut to the length of the prompt in the same row
#   Q6    ar is height / width, while in training it was width / height
#   Q7    fps is that of the source file, whatever the frame interval


# ---------------------------------------------------------------- the noise schedule
def noise_schedule(sampler: str = "iddpm", prediction: str = "eps"):
    """Returns a diffusers scheduler with linear betas 1e-4..0.02 over 1000 steps (DDPM, section 4).

    Training uses its `alphas_cumprod`, sampling its `step`."""
    if sampler not in SAMPLERS or prediction not in ("eps", "v"):
        raise ValueError(f"sampler={sampler!r}, prediction={prediction!r}: expected one of {SAMPLERS}; 'eps' or 'v'")
    diffusers, _ = hugging_face()
    kind = {"eps": "epsilon", "v": "v_prediction"}[prediction]
    if sampler == "iddpm":                                              # by default it clips x_0 to -1..1
        scheduler = diffusers.DDPMScheduler(prediction_type=kind, variance_type="learned_range", clip_sample=False)
    else:
        # DPM-Solver++ of order 1 is DDIM. diffusers' DDIMScheduler always steps from t to t - 1000 // n, which is right
        # for evenly spaced t only; this class takes any list. No variance_type: with one it would keep 3 channels.
        order = 1 if sampler == "ddim" else 2
        scheduler = diffusers.DPMSolverMultistepScheduler(prediction_type=kind, solver_order=order)
    # fp64, as diffusers' fp32 betas are 1e-4 off where 1 - abar is small; x stays fp32 when multiplied by such scalars
    scheduler.betas = torch.linspace(1e-4, 0.02, NUM_TIMESTEPS, dtype=torch.float64)
    scheduler.alphas = 1 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    return scheduler


def timesteps(steps: int, sampler: str = "iddpm") -> list[int]:
    """Returns `steps` times of 999..0, evenly spaced with both ends (2102.09672, section 4): 999, 989, ..., 10, 0.

    dpm leaves out 0: log(SNR) rises so steeply there that a second-order step to 0 overshoots.  For latents that are
    N(0.5, 0.3^2), 50 steps are 5% off the exact solution with 0 and 1% without."""
    spaces = steps if sampler == "dpm" else max(1, steps - 1)
    if not 1 <= spaces < NUM_TIMESTEPS or steps < 1:
        most = NUM_TIMESTEPS - 1 if sampler == "dpm" else NUM_TIMESTEPS
        raise ValueError(f"steps={steps}: expected 1 to {most}; usual are {configs.SAMPLING_STEPS}")
    return [round(i * (NUM_TIMESTEPS - 1) / spaces) for i in range(spaces, spaces - steps, -1)]


def step_back(scheduler, out, t, x, generators):
    """Returns x at the next smaller t, from x at t and the model's output there, [B C or 2C T h w]."""
    C = x.shape[1]
    if scheduler.config.get("variance_type") is None:
        out = out[:, :C]
    elif out.shape[1] == C:                                             # no learned variance: its lower bound
        out = torch.cat([out, torch.full_like(out, -1)], dim=1)
    return scheduler.step(out, t, x, generator=generators, return_dict=False)[0]


# ---------------------------------------------------------------- sampling in latent space
@torch.no_grad()
def sample_latents(model, z, y, y_mask, cond, *, generators, steps=100, sampler="iddpm", prediction="eps",
                   cfg_scale=7.0, as_released=False, known=None, strength=None, progress=None):
    """Returns clean latents [B C T h w] from noise z [B C T h w], captions y [B L C] with y_mask [B L], and cond, a
    dict of height, width, num_frames, ar, fps, each [B].  generators: one per clip.  progress(i, steps) is called after
    step i.  The defaults are the release's.

    strength [B T] decides what each frame is, see "given frames"; None: all are made from noise.  known [B C T h w]:
    clean latents of those with strength < 1.  A held frame is known bit for bit, at every step and at the end.  It
    enters the model clean: in upstream's training it has the noise of t = 0, a hundredth of a standard deviation, which
    makes no difference."""
    B, C, T = z.shape[:3]
    masked = strength is not None
    if masked != (known is not None) or masked and strength.shape != (B, T):
        raise ValueError(f"strength must be [B T] = [{B} {T}] and stand with known, got "
                         f"{[None if value is None else list(value.shape) for value in (strength, known)]}")
    if not masked:
        known = torch.zeros_like(z)
        strength = z.new_ones(B, T)
    join_step = join_steps(strength.to(z.device), steps)
    rows = 1 if cfg_scale == 1 else 2                                   # rows 0..B-1 with caption, B..2B-1 without
    if rows == 2:
        null_mask = y_mask if as_released else torch.ones_like(y_mask)                                  # Q5
        y = torch.cat([y, model.null_y.to(y).expand_as(y)])
        y_mask = torch.cat([y_mask, null_mask])
        cond = {name: torch.cat([value, value]) for name, value in cond.items()}
    scheduler = noise_schedule(sampler, prediction)
    scheduler.set_timesteps(timesteps=timesteps(steps, sampler))

    def predict(x, t, joined):
        """Returns the guided output of the model.  Frames that have not joined enter it clean; their output is replaced
        by the one that leads to `known` (v: 2202.00512, appendix D), a true history for a multi-step solver."""
        joined_frames = rearrange(joined, "b t -> b 1 t 1 1")
        x_rows = repeat(torch.where(joined_frames, x, known), "b c t h w -> (rows b) c t h w", rows=rows)
        x_mask = repeat(joined, "b t -> (rows b) t", rows=rows) if masked else None
        t_rows = torch.full((rows * B,), int(t), device=x.device)
        out = model(x_rows, t_rows, y, y_mask, x_mask=x_mask, **cond)
        if rows == 2:
            out_cond, out_null = out.chunk(2)
            out = guide(out_cond, out_null, cfg_scale, 3 if as_released else C)                         # Q4
        abar = scheduler.alphas_cumprod[t]
        exact = z if prediction == "eps" else abar.sqrt() * z - (1 - abar).sqrt() * known
        return torch.cat([torch.where(joined_frames, out[:, :C], exact), out[:, C:]], dim=1)

    x = z
    for i, t in enumerate(scheduler.timesteps):
        steps_left = steps - i
        abar = scheduler.alphas_cumprod[t]
        # For the solver a given frame is noised to level t until it joins (DDPM, eq. 4), while the model sees it clean.
        is_solved = rearrange(steps_left < join_step, "b t -> b 1 t 1 1")
        x = torch.where(is_solved, x, abar.sqrt() * known + (1 - abar).sqrt() * z)
        out = predict(x, t, steps_left <= join_step)
        x = step_back(scheduler, out, t, x, generators)
        if progress:
            progress(i + 1, steps)
    is_held = rearrange(join_step == 0, "b t -> b 1 t 1 1")
    latents = torch.where(is_held, known, x)
    if not latents.isfinite().all():                                    # sync
        raise ValueError(f"after {steps} steps the latents are not finite: are the weights whole? cfg_scale is "
                         f"{cfg_scale:g}")
    return latents


def guide(out_cond, out_null, cfg_scale: float, channels: int | None = None):
    """Returns the model's outputs with and without caption, [B C_out T h w], guided classifier-free (2207.12598).

    The first `channels` are guided (None: the first half, all of eps or v); the others, the variances among them, stay
    as the caption has them.  v is linear in eps at a given x_t, so guiding either is the same."""
    channels = channels or out_cond.shape[1] // 2
    cond = out_cond[:, :channels]
    null = out_null[:, :channels]
    return torch.cat([null + cfg_scale * (cond - null), out_cond[:, channels:]], dim=1)


# ---------------------------------------------------------------- given frames
# strength    a frame              its last int(strength * steps) steps           the steps before it joins
# 1           made from noise z    it is at level t, and conditioned on t         none
# 0 < r < 1   edited: from known   the same, from known noised with z to that t   clean, and conditioned on t = 0
# 0           held: known          none                                           the same, to the end
# In x_mask, True stands for t and False for t = 0.
def join_steps(strength, steps: int):
    """Returns how many steps are left when each frame joins, int [B T]; steps + 1 for one that is made from noise.

    In fp32, as upstream, where 0.29 of 100 steps are 29; in fp64 they are 28.  The released iddpm changes a given frame
    one step before the model sees it as noised: a fault of that sampler, which no weights depend on."""
    last_steps = (strength.float() * steps).int()
    return torch.where(last_steps == steps, steps + 1, last_steps)


# ---------------------------------------------------------------- from captions to frames
class Reference(NamedTuple):
    """A clip or image whose frames can be given; its frame k is frame `first` + k * `interval` of the file."""
    path: str
    num_frames: int
    first: int = 0
    interval: int = 1


@dataclass(frozen=True)
class Job:
    """A video: all that decides its frames but the checkpoint and the sampler's settings.  T is num_frames."""
    prompts: tuple[str, ...]                # one per segment of T frames
    num_frames: int
    height: int                             # pixels; what does not fill a latent cell is dropped
    width: int
    fps: float                              # of the source that the video imitates,
    frame_interval: int = 1                 # of which every frame_interval-th frame is shown
    references: tuple[Reference, ...] = ()  # numbered from 0
    strategy: str = ""                      # which frames are given from them, and from segments before (masks.Given)
    overlap: int = 0                        # frames that a segment shares with the one before: they are shown once
    loop: bool = False                      # the last segment shares as many with the first one
    seed: int = 0                           # with number it decides the noise, whatever else is sampled
    number: int = 0                         # of the prompt, from 0

    def __post_init__(self):
        if not self.prompts or not all(text.strip() for text in self.prompts):
            raise ValueError(f"prompt {self.number}, {list(self.prompts)}: expected one segment or more, and each must "
                             "say something, as in \"a red circle moves right\"")
        if self.num_frames < 1 or not self.fps > 0 or self.frame_interval < 1:
            raise ValueError(f"num_frames={self.num_frames}, fps={self.fps}, frame_interval={self.frame_interval}: "
                             "expected more than 0 of each")
        if not -2 ** 63 <= self.seed < 2 ** 63:
            raise ValueError(f"seed={self.seed}: expected an integer of 64 bits")

    @property
    def name(self):
        seed = f"-seed-{self.seed}" if self.seed else ""
        return f"{self.number:02d}-{slug(self.prompts[0])}{seed}"

    def plan(self, segment):
        """Returns masks.frame_plan of a segment; the segments before it count as references."""
        lengths = [reference.num_frames for reference in self.references] + [self.num_frames] * segment
        return frame_plan(parse_strategy(self.strategy), segment, self.num_frames, lengths)

    def given(self):
        """Returns the frames that are taken from references, as (number of the reference, its frame), sorted."""
        sources = set()
        for segment in range(len(self.prompts)):
            sources.update(self.plan(segment)[0])
        return sorted(source for source in sources - {None} if source[0] < len(self.references))

    def conditions(self, as_released):
        """Returns the conditioning values of the video."""
        ar = self.height / self.width if as_released else self.width / self.height                      # Q6
        fps = self.fps if as_released else self.fps / self.frame_interval                               # Q7
        if self.num_frames == 1:
            fps = IMAGE_FPS
        return dict(height=self.height, width=self.width, num_frames=self.num_frames, ar=ar, fps=fps)


def plan_job(prompts, groups, overlap=None, loop=False, **rest):
    """Returns the Job of a text per segment; raises ValueError if it cannot be made.

    overlap None: a quarter of the frames, the most that training gives."""
    segments = len(prompts)
    T = rest["num_frames"]
    if segments < 2 and not loop:
        overlap = 0
    else:
        overlap = max(1, T // 4) if overlap is None else overlap
        most = (T - 1) // 2 if loop else T - 1          # the last segment of a loop shares frames at both ends
        if most < 1:
            raise ValueError(f"{segments} segments of {T} frames: expected {3 if loop else 2} frames or more, as "
                             "segments share some")
        if not 0 < overlap <= most:
            raise ValueError(f"overlap={overlap} of segments of {T} frames: expected 1 to {most}")
        groups = [*groups, *(seamless(overlap, segments) if loop else chain(overlap, segments))]
    for group in groups:
        if group.segment >= segments:
            raise ValueError(f"mask strategy {format_strategy([group])!r} is for segment {group.segment}, expected 0 "
                             f"to {segments - 1}: {segments} segments are made")
    job = Job(prompts, strategy=format_strategy(groups), overlap=overlap, loop=loop, **rest)
    job.given()                             # raises if a group does not fit
    return job


def split_prompt(prompt, segments=None, least=1):
    """Returns a text per segment: "|0|a cat|2|a dog" is "a cat" in segments 0 and 1 and "a dog" from 2 on; other
    prompts are the same in all.  segments None: up to the last one named, but at least `least`."""
    if not prompt.startswith("|0|"):
        return (prompt,) * (least if segments is None else segments)
    texts = [(int(start), text.strip()) for start, text in re.findall(r"\|\s*(\d+)\s*\|([^|]*)", prompt)]
    starts = [start for start, _ in texts]
    segments = max(least, starts[-1] + 1) if segments is None else segments
    if not re.fullmatch(r"(\|\s*\d+\s*\|[^|]*)+", prompt) or sorted(starts) != starts or starts[-1] > segments:
        raise ValueError(f"prompt {prompt!r}: expected |0|text|3|text, each text after the segment, of {segments}, "
                         "from which on it holds")
    return tuple([text for start, text in texts if start <= i][-1] for i in range(segments))


def check_sizes(jobs, down, patch_size, say=print):
    """Raises ValueError for a video that is smaller than one patch, and reports those that are not made as asked."""
    least = (down * patch_size[1], down * patch_size[2])
    for height, width in dict.fromkeys((job.height, job.width) for job in jobs):
        if height < least[0] or width < least[1]:
            raise ValueError(f"{height}x{width} (height x width): expected {least[0]}x{least[1]} pixels, one patch, or "
                             "more")
        if height % down or width % down:
            made = f"{height // down * down}x{width // down * down}"
            say(f"{height}x{width} asked, {made} made: a latent cell is {down} pixels wide")


def generate(model, vae, text_encoder, prompts, *, num_frames, height, width, fps, frame_interval=1, seed=0,
             references=None, strategies=None, segments=None, overlap=None, batch_size=4, **how):
    """Returns videos, uint8 [B T H W 3], one per prompt.  Video i depends on seed, i, and the i-th of:

    prompts      a text, or "|0|text|3|text" for segments 0 to 2 and from 3 on
    references   None or a list of uint8 [K H W 3] of any size
    strategies   None or a list of masks.Given; None with references: the first frame of the first one comes first
    With segments > 1, T = segments * (num_frames - overlap) + overlap.  fps: of a source of which every
    frame_interval-th frame is taken.  how: the sampler's settings, those of sample_latents from steps to as_released,
    which by default is the model's."""
    how.setdefault("as_released", model.config.as_released)
    references = references or [None] * len(prompts)
    strategies = strategies or [None] * len(prompts)
    if not len(references) == len(strategies) == len(prompts) > 0:
        raise ValueError(f"{len(references)} references and {len(strategies)} strategies for {len(prompts)} prompts: "
                         "expected at least one prompt, and one (or None) of each per prompt")
    jobs = []
    frames = []
    for number, prompt in enumerate(prompts):
        clips = [np.asarray(clip) for clip in ([] if references[number] is None else references[number])]
        for clip in clips:
            if clip.ndim != 4:
                raise ValueError(f"references: expected per prompt a list of uint8 [K H W 3], got {list(clip.shape)} "
                                 "in one")
        groups = strategies[number]
        if groups is None:
            groups = animate() if clips else []
        job = plan_job(split_prompt(prompt, segments), groups, overlap, num_frames=num_frames, height=height,
                       width=width, fps=fps, frame_interval=frame_interval, seed=seed, number=number,
                       references=tuple(Reference("", len(clip)) for clip in clips))
        if len(job.prompts) != len(jobs[0].prompts if jobs else job.prompts):
            raise ValueError(f"prompt {number} has {len(job.prompts)} segments and prompt 0 has "
                             f"{len(jobs[0].prompts)}: expected as many in each, or segments=N")
        jobs.append(job)
        frames.append({(r, k): clips[r][k] for r, k in job.given()})
    check_sizes(jobs, vae.down, model.config.patch_size)
    made = []
    for part in (slice(i, i + batch_size) for i in range(0, len(jobs), batch_size)):
        made += sample_segments(model, vae, text_encoder, jobs[part], frames[part], **how)
    return np.stack([decode(vae, job, latents) for job, latents in zip(jobs, made)])


def sample_segments(model, vae, text_encoder, jobs, frames, progress=None, as_released=False, **how):
    """Returns the latents of each job's segments, lists of [C T h w].

    jobs: of one shape.  frames: for each the frames of Job.given, {(reference, frame): uint8 [H W 3]}, of any size.
    how: the settings of sample_latents."""
    device = model.null_y.device
    T = jobs[0].num_frames
    h = jobs[0].height // vae.down
    w = jobs[0].width // vae.down
    latents = [encode_frames(vae, some, h, w, device) for some in frames]           # {(reference, frame): [C h w]}
    made = [[] for _ in jobs]
    for segment in range(len(jobs[0].prompts)):
        # On the CPU: a GPU draws other noise, and a video would depend on where it was made.
        generators = [slot_generator(job.seed, segment, job.number, "sample") for job in jobs]
        z = torch.stack([torch.randn(vae.channels, T, h, w, generator=g) for g in generators]).to(device)
        known = torch.zeros_like(z)                                                                       # [B C T h w]
        strength = torch.ones(len(jobs), T)
        for b, job in enumerate(jobs):
            sources, strength[b] = job.plan(segment)
            for t, source in enumerate(sources):
                if source:
                    known[b, :, t] = latents[b][source]
        given = dict(known=known, strength=strength) if (strength < 1).any() else {}
        y, y_mask = text_encoder([job.prompts[segment] for job in jobs])
        rows = [job.conditions(as_released) for job in jobs]
        cond = {name: torch.tensor([float(row[name]) for row in rows], device=device) for name in rows[0]}
        x = sample_latents(model, z, y.to(device), y_mask.to(device), cond, generators=generators,
                           as_released=as_released, progress=progress, **given, **how)
        for b, job in enumerate(jobs):
            made[b].append(x[b])
            number = len(job.references) + segment
            latents[b] |= {(number, t): x[b, :, t] for t in range(T)}
    return made


def encode_frames(vae, frames, h, w, device):
    """Returns latents {key: [C h w]} of frames {key: uint8 [H W 3]} of any size."""
    if not frames:
        return {}
    resized = [resize_crop(torch.as_tensor(frame)[None], h * vae.down, w * vae.down) for frame in frames.values()]
    video = to_video(torch.cat(resized))[None].to(device)                                               # [1 3 K H W]
    z = vae.encode(video)[0]                                                                # the posterior's mean
    return dict(zip(frames, z.unbind(1)))


def decode(vae, job, segments):
    """Returns the video, uint8 [T_total H W 3], of segments [C T h w]; frames that two of them share are shown once."""
    videos = []
    for i, z in enumerate(segments):
        first = job.overlap if i > 0 else 0
        closes_loop = job.loop and i == len(segments) - 1
        stop = job.num_frames - job.overlap if closes_loop else job.num_frames
        videos.append(to_uint8(vae.decode(z[None, :, first:stop])[0]))
    return np.concatenate(videos)


# ---------------------------------------------------------------- checkpoints, in and out
def find_checkpoint(ckpt) -> tuple[Path, configs.Config]:
    """Returns the file of a checkpoint's weights and its config, for Open-Sora's what sampling needs of one.

    ckpt is one of

    our runs, or assets/tiny   a folder with config.py and model.safetensors
    Open-Sora's weights        a folder with config.json and model.safetensors, or shards with their
                               model.safetensors.index.json, the name of one on the hub, or the weights' file alone,
                               .safetensors or .pth: without a config.json next to it, of XL/2"""
    path = Path(find(ckpt))
    if not path.exists():
        missing = (f"there is no checkpoint {ckpt}, expected a run (config.py and model.safetensors, as `python "
                   "train.py configs/tiny.py` writes to runs/tiny; assets/tiny comes with this repository), or "
                   "Open-Sora's weights: a folder with config.json and model.safetensors, a .safetensors, a .pth, or "
                   "their name on the hub")
        path = fetch(ckpt, ["config.json", "model*.safetensors", "model.safetensors.index.json"], missing)
    file = weights_file(path)
    own = file.with_name("config.py")
    upstreams = file.with_name("config.json")
    if own.is_file():
        return file, configs.load(str(own))
    shape = upstream_config(read_json(upstreams) if upstreams.is_file() else {}, upstreams)
    config = replace(configs.load("configs/stage3.py"), model=shape, buckets={"240p": {16: (1.0, 1)}})
    return file, config


class Checkpoint(NamedTuple):
    model: STDiT
    config: configs.Config


def load(ckpt, device="cpu", offload=False) -> Checkpoint:
    """Returns a checkpoint's model, ready to sample: in bf16 on a GPU if it was trained so, else in fp32.

    offload: its blocks stay in host memory.  Raises ValueError for weights that are missing, unknown or misshapen."""
    file, config = find_checkpoint(ckpt)
    if config.model.as_released and not (dist.is_initialized() and dist.get_rank()):
        has_config = file.with_name("config.py").is_file() or file.with_name("config.json").is_file()
        shape = "" if has_config else "no config.json next to it, so taken for XL/2 as published; "
        print(f"{ckpt}: {shape}as_released: with the quirks Q1 to Q7 that its weights were trained with, captions "
              "cleaned")
    model = with_weights(config.model, read_weights(file), file).requires_grad_(False).eval()
    model.to(weight_dtype(config, device))
    if offload:
        offload_blocks(model, model.blocks, device)
    else:
        model.to(device)
    return Checkpoint(model, config)


def weight_dtype(config, device):
    return config.torch_dtype if torch.device(device).type == "cuda" else torch.float32


def offload_blocks(net, blocks, device):
    """Moves a net to a device but for its blocks, which stay in host memory and are copied one by one as they compute.

    The device then holds 0.4 GB of T5-XXL at a time instead of 9, and 54 MB of XL/2 instead of 1.5 GB, in bf16."""
    in_host_memory = {parameter: parameter.data for parameter in blocks.parameters()}
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor not in in_host_memory:
            tensor.data = tensor.data.to(device)

    def copy_to_device(block, *_):
        for parameter in block.parameters():
            parameter.data = in_host_memory[parameter].to(device)

    def free_copy(block, *_):
        for parameter in block.parameters():
            parameter.data = in_host_memory[parameter]

    for block in blocks:
        block.register_forward_pre_hook(copy_to_device)
        block.register_forward_hook(free_copy)


def encode_texts(config, captions, device="cpu", folder=None, offload=False):
    """Returns a text encoder for generate() that knows these captions; T5 itself is loaded, used and freed here.

    folder: keeps the embeddings for the next time, when T5 is not loaded at all.  A local T5 is identified by the sizes
    and times of its files, one on the hub by its name.  offload: its blocks stay in host memory."""
    name = find(config.text_encoder)
    dtype = weight_dtype(config, device)
    L = config.model.model_max_length

    def load_it():
        encoder = load_text_encoder(name, L, dtype, "cpu" if offload else device, config.model.as_released)
        if offload:
            offload_blocks(encoder.net, encoder.net.encoder.block, device)
        return encoder

    files = sorted(Path(name).iterdir()) if Path(name).is_dir() else []
    identity = [(file.name, *stamp(file)[1:]) for file in files] or name
    return remember(load_it, captions, folder, (identity, str(dtype), L, config.model.as_released))


def export(ckpt, folder):
    """Writes one of our runs in the layout of Open-Sora 1.1, whose STDiT2.from_pretrained(folder) then reads it.

    Its config.py is written next to config.json and model.safetensors, so that `load` takes the folder for our run.
    Raises ValueError if Open-Sora would compute something else: it has no embedding of the frame, rotates queries and
    keys before QK-norm, and samples eps with a learned variance."""
    model, config = load(ckpt)                                              # on the CPU, so in fp32
    m = config.model
    faults = {"model.temporal_pos=True": m.temporal_pos, "model.pred_sigma=False": not m.pred_sigma,
              "model.as_released=False": m.qk_norm and not m.as_released,
              f"prediction={config.prediction!r}": config.prediction != "eps"}
    if any(faults.values()):
        raise ValueError(f"{ckpt} was trained with {', '.join(name for name, wrong in faults.items() if wrong)}: "
                         "Open-Sora would read its weights and compute something else. Expected the opposite of each")
    if not m.as_released:
        print("note: Open-Sora computes with as_released, this model was trained without: in bf16 it rounds t, sizes "
              "and fps, and given frames leave its last layer otherwise")
    written = {name: value for name, value in asdict(m).items() if name not in ("as_released", "temporal_pos")}
    written |= {"model_type": "STDiT2", "architectures": ["STDiT2"], "torch_dtype": "float32"}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", "utf-8")
    if find_checkpoint(ckpt)[0].with_name("config.py").is_file():           # a run of ours
        (folder / "config.py").write_text(configs.dump(config), "utf-8")
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})   # transformers refuses it without
    print(f"{folder}: config.json and model.safetensors, as Open-Sora reads them")


# ---------------------------------------------------------------- command line: which videos
def add_job_options(parser):
    """Adds the options of one video; they can stand in a prompt's JSON too, as "num_frames" or "num-frames"."""
    add = parser.add_argument_group("the video (also in a prompt's JSON)").add_argument
    add("--num-frames", type=int, metavar="T", help="default: those of the shortest videos trained on")
    add("--size", metavar="HxW", help="height x width, pixels; default: largest trained")
    add("--fps", type=positive_float, metavar="X", help="of the imitated source; default: the config's")
    add("--frame-interval", type=positive_int, metavar="N", help="shows every N-th of its frames")
    add("--seeds", "--seed", type=int, nargs="+", default=[0], metavar="N", help="a video for each; default: 0")
    add("--segments", type=int, metavar="N", help="of T frames each, chained to a long video")
    add("--overlap", type=int, metavar="N", help="frames that segments share; default: T / 4")
    add("--seamless", action=argparse.BooleanOptionalAction, help="the last segment leads back to the first")
    add = parser.add_argument_group("given frames: one of these (also in a prompt's JSON)").add_argument
    add("--animate", metavar="IMAGE", help="comes first")
    add("--extend-after", metavar="CLIP", help="its last frames come first")
    add("--extend-before", metavar="CLIP", help="its first frames come last")
    add("--connect", nargs=2, metavar=("A", "B"), help="clips or images; the video leads from A to B")
    add("--keep", type=int, metavar="N", help="frames of these; default: T / 4, of --connect 1")
    add("--edit", metavar="CLIP", help="its first T frames are changed")
    add("--strength", type=float, default=0.5, metavar="R", help="of --edit, 0 to 1; default: %(default)s")
    add("--infill", nargs=2, metavar=("CLIP", "A:B"), help="its frames A to B - 1 are generated")
    add("--reference", nargs="+", metavar="PATH", help="clips and images for --mask-strategy")
    add("--reference-path", dest="reference", nargs="+", help=argparse.SUPPRESS)     # Open-Sora's name for it
    add("--mask-strategy", metavar="GROUPS", help="where their frames go (masks.py); default: 0")


def parse_args(argv=None):
    wide = partial(argparse.RawDescriptionHelpFormatter, max_help_position=30)
    parser = argparse.ArgumentParser(description=__doc__.split("\nIn ")[0], allow_abbrev=False, formatter_class=wide,
                                     usage="python sample.py --prompt CAPTION [options]")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", nargs="+", metavar="CAPTION", help="captions, each in quotes")
    what.add_argument("--prompts", metavar="FILE", help="a text file, a caption a line")
    what.add_argument("--export", metavar="FOLDER", help="write --ckpt as Open-Sora reads it")
    add = parser.add_argument
    add("--ckpt", default="assets/tiny", metavar="NAME", help="a run, or a hub name; default: %(default)s")
    add("--vae", metavar="NAME", help="folder or hub name; default: the config's")
    add("--text-encoder", metavar="NAME", help="T5's folder or hub name; default: the config's")
    add("--sampler", choices=SAMPLERS, help="default: the config's")
    add("--steps", type=int, metavar="N",
        help="default: " + ", ".join(f"{name} {steps}" for name, steps in configs.SAMPLING_STEPS.items()))
    add("--cfg-scale", type=float, metavar="X", help="guidance; 1: none; default: the config's")
    add("--out", type=Path, default="samples", metavar="FOLDER", help="default: %(default)s")
    add("--format", choices=SUFFIXES, default="mp4", help="next to a contact sheet; default: %(default)s")
    add("--overwrite", action="store_true", help="replace what exists; otherwise it is skipped")
    add_job_options(parser)
    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=positive_int, default=4, metavar="N", help="videos at once; default: %(default)s")
    add("--offload", action="store_true", help="blocks stay in host memory until they compute")
    add("--text-cache", metavar="FOLDER", help="keeps embeddings, so that T5 is not loaded")
    add("--sp", type=positive_int, default=1, metavar="N", help="GPUs that share a video (torchrun)")
    add("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    add("--debug", action="store_true", help="show errors with their traceback")
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "sample.py", *(sys.argv[1:] if argv is None else argv)])
    return args


def positive_float(text):
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return number


def fill(args, **defaults):
    """Sets options that were not given to their defaults."""
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})


def read_jobs(args, config):
    """Returns the jobs of the command line or of a file of prompts, one per prompt and seed."""
    jobs = []
    for number, line in enumerate(args.prompt or read_prompts(args.prompts)):
        try:
            jobs += read_job(line, number, args, config)
        except (ValueError, argparse.ArgumentError) as error:
            raise ValueError(f"prompt {line!r}: {error}") from None
    return jobs


def read_job(line, number, args, config):
    """Returns the jobs of a prompt, one per seed.  Raises ValueError or argparse.ArgumentError."""
    text, asked = split_json(line, args)
    T, H, W = default_bucket(config.trained)
    fill(asked, num_frames=T, size=f"{H}x{W}", fps=config.fps, frame_interval=config.frame_interval)
    height, width = parse_pair(asked.size, "x", "--size", "240x426")
    prompts = split_prompt(text, asked.segments, least=2 if asked.seamless else 1)
    paths, groups = given_frames(asked, asked.num_frames, len(prompts))
    references = find_references(paths, groups, asked.fps / asked.frame_interval)
    job = plan_job(prompts, groups, asked.overlap, bool(asked.seamless), num_frames=asked.num_frames, height=height,
                   width=width, fps=asked.fps, frame_interval=asked.frame_interval, references=references,
                   number=number)
    return [replace(job, seed=seed) for seed in dict.fromkeys(asked.seeds)]


def read_prompts(path):
    """Returns the lines of a file that are not blank; raises ValueError unless it is UTF-8, with or without a BOM."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): save it in that encoding") from None
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} holds no prompt, expected one in each line")
    return lines


def split_json(line, args):
    """Returns (text, options) of a prompt: JSON at its end, {"mask_strategy": "0", ...}, overrides the command line.

    The JSON is turned into flags and read by the same parser, so that both have the same names, types and messages."""
    text, brace, rest = line.partition("{")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_job_options(parser)
    try:
        options = json.loads(brace + rest or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"a brace starts JSON that ends the prompt, as in a cat {{\"num_frames\": 16}}: {error}"
                         ) from None
    words = []
    for name, value in options.items():
        option = name.replace("_", "-")
        if value is None or value == []:
            raise ValueError(f"{name}: {json.dumps(value)}, expected a value, or to leave it out")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        elif isinstance(value, list):
            words += [f"--{option}", *map(str, value)]
        else:
            words.append(f"--{option}={value}")
    asked, unknown = parser.parse_known_args(words, argparse.Namespace(**vars(args)))
    if unknown:
        names = dict.fromkeys(action.dest for action in parser._actions)
        raise ValueError(f"{unknown[0].split('=')[0]!r} is none of {', '.join(names)}")
    return text, asked


def parse_pair(text, sign, option, example):
    if not re.fullmatch(rf"\d+{sign}\d+", text):
        raise ValueError(f"{option} {text}: expected two whole numbers, as in {example}")
    return tuple(map(int, text.split(sign)))


def given_frames(asked, T, segments):
    """Returns (paths, groups) of the option in use: the references, and what is given from them."""
    forms = ("animate", "extend_after", "extend_before", "connect", "edit", "infill", "reference")
    used = [name for name in forms if getattr(asked, name) is not None]
    groups = parse_strategy(asked.mask_strategy) if asked.mask_strategy is not None else []
    if groups and used != ["reference"]:
        used.append("mask_strategy")
    if len(used) > 1:
        names = " and ".join("--" + name.replace("_", "-") for name in used)
        raise ValueError(f"{names}: expected one of them; --reference with --mask-strategy expresses any combination")
    keep = max(1, T // 4) if asked.keep is None else asked.keep
    if asked.animate is not None:
        return [asked.animate], animate()
    if asked.extend_after is not None:
        return [asked.extend_after], extend_after(keep)
    if asked.extend_before is not None:
        return [asked.extend_before], extend_before(keep, segments - 1)
    if asked.connect is not None:
        return asked.connect, connect(1 if asked.keep is None else keep, segments)
    if asked.edit is not None:
        return [asked.edit], edit(asked.strength, T)
    if asked.infill is not None:
        path, span = asked.infill
        start, stop = parse_pair(span, ":", "--infill", "4:12")
        return [path], infill(start, stop, T)
    if asked.reference is not None:
        paths = [path.strip() for path in ";".join(asked.reference).split(";")]
        if asked.mask_strategy is None:
            groups = animate()
        return paths, groups
    return [], groups


def find_references(paths, groups, fps):
    """Returns the Reference of each path, at about `fps` frames per second.

    Frames are counted so that a clip's last one is among them if any group takes its end, otherwise its first.  A
    negative reference counts from the segment of its group: in segment i, i segments follow the references."""
    references = []
    for r, path in enumerate(paths):
        num_frames, rate = length_and_rate(find(path))
        interval = max(1, round((rate or fps) / fps))
        from_end = any(group.ref_start < 0 and group.reference % (len(paths) + group.segment) == r for group in groups)
        first = (num_frames - 1) % interval if from_end else 0
        references.append(Reference(path, len(range(first, num_frames, interval)), first, interval))
    return tuple(references)


def slug(prompt):
    """Returns the first letters and digits of a caption, for a file name on any system."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "prompt"


def default_bucket(trained):
    """Returns (num_frames, height, width) to sample at: of config.trained the shortest video, at its largest size."""
    T = min((T for _, T in trained if T > 1), default=1)
    sizes = [Bucket(name, T, usual_aspect(name)) for name, frames in trained if frames == T]
    best = max(sizes, key=lambda bucket: bucket.height * bucket.width)
    return T, best.height, best.width


def usual_aspect(resolution):
    """Returns the ratio of 16:9, which most video has, or the most square one if a resolution has no such size."""
    return "0.56" if "0.56" in ASPECT[resolution] else min(ASPECT[resolution], key=lambda ar: abs(float(ar) - 1))


# ---------------------------------------------------------------- command line: sampling them
def run(args):
    """Samples the jobs that do not exist yet; the groups of args.sp processes share them.

    What can be wrong with them is checked before T5 and the model are loaded."""
    place = start_processes(sp=args.sp, device=args.device)
    place.say(use(place.device))
    file, config = find_checkpoint(args.ckpt)
    fill(args, vae=config.vae, text_encoder=config.text_encoder, sampler=config.sampler, cfg_scale=config.cfg_scale)
    fill(args, steps=configs.SAMPLING_STEPS[args.sampler])
    config = replace(config, vae=args.vae, text_encoder=args.text_encoder)
    timesteps(args.steps, args.sampler)                                     # raises where there are none
    if not math.isfinite(args.cfg_scale):
        raise ValueError(f"--cfg-scale {args.cfg_scale}: expected a number")
    jobs = read_jobs(args, config)
    check_captions(jobs, config)
    check_out(args.out)
    how = dict(steps=args.steps, sampler=args.sampler, cfg_scale=args.cfg_scale, as_released=config.model.as_released)
    settings = dict(sampling=how, ckpt=args.ckpt, weights=fingerprint(read_weights(file)), vae=args.vae,
                    text_encoder=args.text_encoder)
    records = {}
    for job in jobs:
        files = [stamp(find(reference.path))[1:] for reference in job.references]       # size and time of change
        records[job] = {"job": asdict(job), "references": files} | settings
    todo = [job for job in jobs if args.overwrite or not exists(job, records[job], args, place)]
    dist.barrier()                          # collective; no rank writes before all have seen which files exist
    mine = todo[place.data_rank::place.num_data_ranks]
    for job in mine:
        read_given(job)                     # raises for a damaged reference; they are read again when it is their turn
        for path in outputs(job, args):
            check_no_other_files(path)
    if mine:
        make_videos(args, config, place, mine, records, how)
    rank = "" if place.world == 1 else "rank 0: "
    place.say(f"{rank}{len(mine)} of {len(jobs)} made, {args.steps} {args.sampler} steps: "
              f"{time.time() - process_start():.1f} s from the start")


def make_videos(args, config, place, jobs, records, how):
    """Samples and writes videos.  T5 is loaded, used and freed before the model is loaded."""
    vae = load_vae(args.vae, device=place.device)
    check_sizes(jobs, vae.down, config.model.patch_size, place.say)
    captions = [prompt for job in jobs for prompt in job.prompts]
    text_encoder = encode_texts(config, captions, place.device, folder=args.text_cache, offload=args.offload)
    model = load(args.ckpt, place.device, offload=args.offload).model
    if place.group:
        sequence_parallel(model, place.group)
    batches = group_jobs(jobs, args.batch_size)
    total = args.steps * sum(len(batch[0].prompts) for batch in batches)
    with tqdm(total=total, unit="step", disable=True if place.rank else None) as bar:       # None: only in a terminal
        for batch in batches:
            frames = [read_given(job) for job in batch]
            made = sample_segments(model, vae, text_encoder, batch, frames, lambda *_: bar.update(),
                                   prediction=config.prediction, **how)
            for job, segments in zip(batch, made):
                if place.reads:             # one of those who share it
                    save(job, decode(vae, job, segments), records[job], args)


def process_start():
    """Returns when this process began, in seconds since 1970: what a user has waited includes the imports."""
    try:
        ticks = int(Path("/proc/self/stat").read_text("utf-8").rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text("utf-8").split()[0])
        return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):           # a system without /proc
        return IMPORTED


def check_captions(jobs, config):
    """Raises ValueError for a prompt that is empty after the cleaning that as_released weights need."""
    if not config.model.as_released:
        return
    for job in jobs:
        for prompt in job.prompts:
            if not clean_caption(prompt):
                raise ValueError(f"prompt {prompt!r}: nothing is left of it when it is cleaned as the weights' "
                                 "captions were: write it in words")


def check_out(folder):
    """Raises OSError, before anything is sampled, if a folder cannot be written into, or cannot be created."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(f"--out {folder} cannot be written to: {error.strerror}") from None


def read_given(job):
    """Returns the frames of Job.given from their files, {(reference, frame): uint8 [H W 3]}; raises UnreadableClip.

    Only the span that is needed is read: a film of ten minutes does not fit into memory."""
    frames = {}
    for r, sources in groupby(job.given(), key=lambda source: source[0]):
        wanted = [frame for _, frame in sources]
        path, _, first, interval = job.references[r]
        span = wanted[-1] - wanted[0] + 1
        video, _ = read_window(find(path), span, interval, first + wanted[0] * interval)
        for frame in wanted:
            frames[r, frame] = video[frame - wanted[0]].numpy()
    return frames


def group_jobs(jobs, size):
    """Returns lists of at most `size` jobs that are sampled together: of one shape and number of segments."""
    def shape(job):
        return job.num_frames, job.height, job.width, len(job.prompts)

    batches = []
    for _, group in groupby(sorted(jobs, key=shape), key=shape):
        group = list(group)
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    return batches


# out/00-name.png is the contact sheet, .mp4 the video, .json what made them: if it exists, they do and are its.
def outputs(job, args):
    """Returns the files of a job's frames."""
    suffixes = [".png"]
    if job.num_frames > 1:
        suffixes.append(SUFFIXES[args.format])
    return [args.out / f"{job.name}{suffix}" for suffix in suffixes]


def save(job, frames, record, args):
    """Writes the files of a job, and prints what they are."""
    T, H, W, _ = frames.shape
    fps = job.fps / job.frame_interval
    note = args.out / f"{job.name}.json"
    note.unlink(missing_ok=True)            # of the files that are now replaced
    for path in outputs(job, args):
        write_video(path, enlarge(frames, SHOWN_SIDE) if path.suffix == ".mp4" else frames, fps)
        what = f"an image of {H}x{W}"
        if T > 1:
            order = "in reading order" if path.suffix == ".png" else f"{fps:g} per second"
            what = f"{T} frames of {H}x{W}, {order}"
        tqdm.write(f"{path}  {what}")
    with atomic_write(note) as part:
        part.write_text(json.dumps({"command": args.command} | record, indent=1), "utf-8")


def exists(job, record, args, place):
    """Returns whether a job has been sampled; raises ValueError if that was another prompt, or with other settings."""
    note = args.out / f"{job.name}.json"
    if not note.exists():
        return False
    try:
        before = dict(json.loads(note.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{note} is damaged ({error}): remove it, or use --overwrite") from None
    before.pop("command", None)
    *_, last = outputs(job, args)
    if before != json.loads(json.dumps(record)):
        raise ValueError(f"{last.with_suffix('')} already exists, of another prompt or with other settings (see its "
                         ".json): choose another --out, or replace it with --overwrite")
    if not all(path.exists() for path in outputs(job, args)):
        return False
    place.say(f"{last} already exists, skipping (use --overwrite to replace it)")
    return True


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors(args.debug, "; run the same command again to make the videos that are missing"):
        if args.export is not None:
            export(args.ckpt, args.export)
        else:
            run(args)


if __name__ == "__main__":
    main()
