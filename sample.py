"""Samples a video from a caption: starts from noise, asks the model 100 times what to take away, and decodes.

    python sample.py --prompt "a red circle moves right" --seeds 0 1 2 3 --grid     four of it, and one picture of all
    python sample.py --prompts jobs.txt       one in each line, with or without JSON: a dog {"num_frames": 16}

In    captions, frames that are given (optional), a checkpoint: one of our runs, or Open-Sora's published weights.
Out   samples/00-a-red-circle.mp4, a contact sheet of its frames, .png, and what made them, .json; from Python, by
      `load` and `generate`: uint8 [B T H W 3].

Papers: DDPM (arXiv 2006.11239), learned variances (2102.09672), DDIM (2010.02502), DPM-Solver++ (2211.01095),
classifier-free guidance (2207.12598), its rescaling (2305.08891), v (2202.00512), editing (2108.01073).
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
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from einops import rearrange, repeat
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

import configs
from data import (ASPECT, IMAGE_FPS, Bucket, atomic_write, length_and_rate, one_line_errors, positive_int, read_window,
                  resize_crop, slot_generator, to_uint8, to_video, write_video)
from kernels import sequence_parallel, start_processes, use
from masks import (animate, connect, edit, extend_after, extend_before, format_strategy, frame_plan, infill,
                   parse_strategy, seamless)
from model import STDiT, read_json, read_weights, upstream_config, weights_file, with_weights
from vae import (DECODER_BYTES, clean_caption, fetch, find, fingerprint, frames_at_once, load_text_encoder, load_vae,
                 remember, stamp)

IMPORTED = time.time()
NUM_TIMESTEPS = 1000
# iddpm's is the release's; ddim: 2010.02502 has 20 to 100; dpm: 2211.01095 has 15 to 20 with guidance
DEFAULT_STEPS = {"iddpm": 100, "ddim": 50, "dpm": 20}
SAMPLERS = tuple(DEFAULT_STEPS)
FORMATS = {"mp4": ".mp4", "gif": ".gif", "png": ".png", "folder": ""}           # and the ends of their names
# STDiTConfig.as_released also turns on what the published weights are used to from their sampler:
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
    kind = {"eps": "epsilon", "v": "v_prediction"}[prediction]
    if sampler == "iddpm":                                              # by default it clips x_0 to -1..1
        scheduler = DDPMScheduler(prediction_type=kind, variance_type="learned_range", clip_sample=False)
    else:
        # DPM-Solver++ of order 1 is DDIM. diffusers' DDIMScheduler always steps from t to t - 1000 // n, which is right
        # for evenly spaced t only; this class takes any list. No variance_type: with one it would keep 3 channels.
        scheduler = DPMSolverMultistepScheduler(prediction_type=kind, solver_order=1 if sampler == "ddim" else 2)
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
        raise ValueError(f"steps={steps}: expected 1 to {most}; usual are {DEFAULT_STEPS}")
    return [round(i * (NUM_TIMESTEPS - 1) / spaces) for i in range(spaces, spaces - steps, -1)]


# ---------------------------------------------------------------- sampling in latent space
# strength    a frame              its last int(strength * steps) steps           the steps before it joins
# 1           made from noise z    it is at level t, and conditioned on t         none
# 0 < r < 1   edited: from known   the same, from known noised with z to that t   clean, and conditioned on t = 0
# 0           held: known          none                                           the same, to the end
# In x_mask, True stands for t and False for t = 0.
def joining(strength, steps: int):
    """Returns how many steps are left when each frame joins, int [B T]; steps + 1 for one that is made from noise.

    In fp32, as upstream, where 0.29 of 100 steps are 29; in fp64 they are 28.  The released iddpm changes a given frame
    one step before the model sees it as noised: a fault of that sampler, which no weights depend on."""
    last_steps = (strength.float() * steps).int()
    return torch.where(last_steps == steps, steps + 1, last_steps)


def guide(out_cond, out_null, cfg_scale: float, channels: int | None = None, rescale: float = 0.0):
    """Returns the model's outputs with and without caption, [B C_out T h w], guided classifier-free (2207.12598).

    The first `channels` are guided (None: the first half, all of eps or v); the others, the variances among them, stay
    as the caption has them.  v is linear in eps at a given x_t, so guiding either is the same.
    rescale: phi of 2305.08891, eq. 15 and 16: this share of the way back to the contrast before guidance, which a large
    cfg_scale drives up.  Per frame, as there per image: the output for a held frame has no bearing on the others.  The
    clamp is for a fresh model, whose output is 0 everywhere."""
    channels = channels or out_cond.shape[1] // 2
    cond = out_cond[:, :channels]
    null = out_null[:, :channels]
    guided = null + cfg_scale * (cond - null)
    if rescale:
        contrast = cond.std(dim=(1, 3, 4), keepdim=True)                                                 # [B 1 T 1 1]
        contrast_guided = guided.std(dim=(1, 3, 4), keepdim=True).clamp(min=1e-6)
        guided = guided * (1 - rescale + rescale * contrast / contrast_guided)
    return torch.cat([guided, out_cond[:, channels:]], dim=1)


def step_back(scheduler, out, t, x, generators):
    """Returns x at the next smaller t, from x at t and the model's output there, [B C or 2C T h w]."""
    C = x.shape[1]
    if not isinstance(scheduler, DDPMScheduler):
        return scheduler.step(out[:, :C], t, x, return_dict=False)[0]
    if out.shape[1] == C:                                               # no learned variance: its lower bound
        out = torch.cat([out, torch.full_like(out, -1)], dim=1)
    return scheduler.step(out, t, x, generator=generators, return_dict=False)[0]


@torch.no_grad()
def sample_latents(model, z, y, y_mask, cond, *, generators, steps=100, sampler="iddpm", prediction="eps",
                   cfg_scale=7.0, rescale=0.0, as_released=False, known=None, strength=None, progress=None):
    """Returns clean latents [B C T h w] from noise z [B C T h w], captions y [B L C] with y_mask [B L], and cond, a
    dict of height, width, num_frames, ar, fps, each [B].  generators: one per clip.  progress(i, steps) is called after
    step i.  The defaults are the release's.

    strength [B T] decides what each frame is, see above; None: all are made from noise.  known [B C T h w]: clean
    latents of those with strength < 1.  A held frame is known bit for bit, at every step and at the end.  It enters the
    model clean: in upstream's training it has the noise of t = 0, a hundredth of a standard deviation, which makes no
    difference."""
    B, C, T = z.shape[:3]
    masked = strength is not None
    if masked != (known is not None) or masked and strength.shape != (B, T):
        raise ValueError(f"strength must be [B T] = [{B} {T}] and stand with known, got "
                         f"{[None if value is None else list(value.shape) for value in (strength, known)]}")
    if not masked:
        known = torch.zeros_like(z)
        strength = z.new_ones(B, T)
    noised_step = joining(strength.to(z.device), steps)
    join_step = rearrange(noised_step, "b t -> b 1 t 1 1")
    rows = 1 if cfg_scale == 1 else 2                                   # rows 0..B-1 with caption, B..2B-1 without
    if rows == 2:
        null_mask = y_mask if as_released else torch.ones_like(y_mask)                                  # Q5
        y = torch.cat([y, model.null_y.to(y).expand_as(y)])
        y_mask = torch.cat([y_mask, null_mask])
        cond = {name: torch.cat([value, value]) for name, value in cond.items()}
    scheduler = noise_schedule(sampler, prediction)
    scheduler.set_timesteps(timesteps=timesteps(steps, sampler))

    def predict(x, t, steps_left):
        """Returns the guided output of the model; frames that have not joined enter it clean."""
        x_rows = repeat(torch.where(steps_left <= join_step, x, known), "b c t h w -> (rows b) c t h w", rows=rows)
        x_mask = repeat(steps_left <= noised_step, "b t -> (rows b) t", rows=rows) if masked else None
        t_rows = torch.full((rows * B,), int(t), device=x.device)
        out = model(x_rows, t_rows, y, y_mask, x_mask=x_mask, **cond)
        if rows == 1:
            return out
        out_cond, out_null = out.chunk(2)
        return guide(out_cond, out_null, cfg_scale, 3 if as_released else C, rescale)                   # Q4

    x = z
    for i, t in enumerate(scheduler.timesteps):
        steps_left = steps - i
        signal = scheduler.alphas_cumprod[t].sqrt()
        noise = (1 - scheduler.alphas_cumprod[t]).sqrt()
        # For the solver a frame that has not joined is at level t (DDPM, eq. 4), with the output that leads to
        # known (v: 2202.00512, appendix D): so a multi-step solver has a true history of it when it joins.
        x = torch.where(steps_left < join_step, x, signal * known + noise * z)
        out = predict(x, t, steps_left)
        exact = z if prediction == "eps" else signal * z - noise * known
        out = torch.cat([torch.where(steps_left <= join_step, out[:, :C], exact), out[:, C:]], dim=1)
        x = step_back(scheduler, out, t, x, generators)
        if progress:
            progress(i + 1, steps)
    latents = torch.where(join_step >= 1, x, known)
    if not latents.isfinite().all():                                    # sync
        raise ValueError(f"after {steps} steps the latents are not finite: are the weights whole? cfg_scale is "
                         f"{cfg_scale:g}")
    return latents


# ---------------------------------------------------------------- from captions to frames
@dataclass(frozen=True)
class Job:
    """A video: all that decides its frames but the checkpoint and the sampler's settings.  T is num_frames."""
    prompts: tuple[str, ...]                # one per segment of T frames
    num_frames: int
    height: int                             # pixels; what does not fill a latent cell is dropped
    width: int
    fps: float                              # of the source that the video imitates,
    frame_interval: int = 1                 # of which every frame_interval-th frame is shown
    references: tuple[str, ...] = ()        # images and videos, numbered from 0
    strategy: str = ""                      # which frames are given from them, and from segments before (masks.Given)
    overlap: int = 0                        # frames that a segment shares with the one before: they are shown once
    loop: bool = False                      # the last segment shares as many with the first one
    seed: int = 0                           # with number it decides the noise, whatever else is sampled
    number: int = 0                         # of the prompt, from 0

    @property
    def name(self):
        return f"{self.number:02d}-{slug(self.prompts[0])}" + f"-seed-{self.seed}" * (self.seed != 0)

    def plans(self, references):
        """Returns masks.frame_plan of each segment; the segments before it count as references."""
        groups = parse_strategy(self.strategy)
        lengths = [len(frames) for frames in references]
        for group in groups:
            if not 0 <= group.segment < len(self.prompts):
                raise ValueError(f"mask strategy {format_strategy([group])!r} is for segment {group.segment}, expected "
                                 f"0 to {len(self.prompts) - 1}: {len(self.prompts)} segments are made")
        return [frame_plan(groups, i, self.num_frames, lengths + [self.num_frames] * i)
                for i in range(len(self.prompts))]

    def conditions(self, as_released):
        """Returns the conditioning values of the video."""
        ar = self.height / self.width if as_released else self.width / self.height                      # Q6
        fps = self.fps if as_released else self.fps / self.frame_interval                               # Q7
        if self.num_frames == 1:
            fps = IMAGE_FPS
        return dict(height=self.height, width=self.width, num_frames=self.num_frames, ar=ar, fps=fps)


def generate(model, vae, text_encoder, prompts, *, num_frames, height, width, fps, frame_interval=1, seed=0,
             references=None, strategies=None, segments=None, overlap=None, batch_size=4, **how):
    """Returns videos, uint8 [B T H W 3], one per prompt.  Video i depends on seed, i, and the i-th of:

    prompts      a text, or "|0|text|3|text" for segments 0 to 2 and from 3 on
    references   None or a list of uint8 [K H W 3] of any size
    strategies   None or a list of masks.Given; None with references: the first frame of the first one comes first
    With segments > 1, T = segments * (num_frames - overlap) + overlap.  fps: of a source of which every
    frame_interval-th frame is taken.  how: the sampler's settings, those of sample_latents from steps to as_released,
    which by default is the model's."""
    many = len(prompts)
    how.setdefault("as_released", model.config.as_released)
    references = references or [None] * many
    strategies = strategies or [None] * many
    if not len(references) == len(strategies) == many:
        raise ValueError(f"{len(references)} references and {len(strategies)} strategies for {many} prompts: expected "
                         "one (or None) per prompt")
    references = [[np.asarray(frames) for frames in ([] if some is None else some)] for some in references]
    for shape in (frames.shape for some in references for frames in some if frames.ndim != 4):
        raise ValueError(f"references: expected per prompt a list of uint8 [K H W 3], got {list(shape)} in one")
    jobs = []
    for number, (prompt, some, groups) in enumerate(zip(prompts, references, strategies)):
        groups = (animate() if some else []) if groups is None else groups
        jobs.append(plan_job(prompt, groups, segments, overlap, num_frames=num_frames, height=height, width=width,
                             fps=fps, frame_interval=frame_interval, seed=seed, number=number))
    check_jobs(jobs, lambda job: references[job.number], vae.down, model.config.patch_size)
    made = []
    for part in (slice(i, i + batch_size) for i in range(0, many, batch_size)):
        made += sample_segments(model, vae, text_encoder, jobs[part], references[part], **how)
    return np.stack([show(vae, job, latents) for job, latents in zip(jobs, made)])


def plan_job(prompt, groups, segments, overlap, loop=False, **rest):
    """Returns the Job of a prompt: a text per segment, and `overlap` frames that it shares with the segment before.

    segments None: as many as the prompt names.  overlap None: a quarter of the frames, the most that training gives."""
    if loop and segments is None:
        segments = max(2, len(split_prompt(prompt)))
    prompts = split_prompt(prompt, segments)
    T = rest["num_frames"]
    if len(prompts) == 1 and not loop:
        return Job(prompts, strategy=format_strategy(groups), **rest)
    overlap = max(1, T // 4) if overlap is None else overlap
    if T == 1:
        raise ValueError(f"{len(prompts)} segments of 1 frame: expected 2 frames or more, as segments share some")
    if not 0 < overlap < T:
        raise ValueError(f"overlap={overlap} of segments of {T} frames: expected 1 to {T - 1}")
    chain = seamless(overlap, len(prompts)) if loop else [
        group for i in range(1, len(prompts)) for group in extend_after(overlap, segment=i, reference=-1)]
    return Job(prompts, strategy=format_strategy([*groups, *chain]), overlap=overlap, loop=loop, **rest)


def split_prompt(prompt, segments=None):
    """Returns a text per segment: "|0|a cat|2|a dog" is "a cat" in segments 0 and 1 and "a dog" from 2 on; other
    prompts are the same in all.  segments None: up to the last one named."""
    if not prompt.startswith("|0|"):
        return (prompt,) * (1 if segments is None else segments)
    texts = [(int(start), text.strip()) for start, text in re.findall(r"\|\s*(\d+)\s*\|([^|]*)", prompt)]
    starts = [start for start, _ in texts]
    segments = starts[-1] + 1 if segments is None else segments
    if not re.fullmatch(r"(\|\s*\d+\s*\|[^|]*)+", prompt) or sorted(starts) != starts or starts[-1] > segments:
        raise ValueError(f"prompt {prompt!r}: expected |0|text|3|text, each text after the segment, of {segments}, "
                         "from which on it holds")
    return tuple([text for start, text in texts if start <= i][-1] for i in range(segments))


def check_jobs(jobs, references, down, patch_size):
    """Raises ValueError, before anything is sampled, if a job cannot be.  references(job): as in sample_segments."""
    least = (down * patch_size[1], down * patch_size[2])
    if not jobs:
        raise ValueError("no prompts: expected at least one, as in \"a red circle moves right\"")
    for job in jobs:
        if not job.prompts or not all(prompt.strip() for prompt in job.prompts):
            raise ValueError(f"prompt {job.number}, {list(job.prompts)}: expected one segment or more, and each must "
                             "say something, as in \"a red circle moves right\"")
        if not job.fps > 0 or job.frame_interval < 1:
            raise ValueError(f"fps={job.fps}, frame_interval={job.frame_interval}: expected more than 0")
        if job.num_frames < 1 or job.height < least[0] or job.width < least[1]:
            raise ValueError(f"{job.num_frames} frames of {job.height}x{job.width} (height x width): expected 1 frame "
                             f"or more of {least[0]}x{least[1]} pixels, one patch, or more")
        job.plans(references(job))
    for height, width in dict.fromkeys((job.height, job.width) for job in jobs):
        if height % down or width % down:
            made = f"{height // down * down}x{width // down * down}"
            print(f"{height}x{width} asked, {made} made: a latent cell is {down} pixels wide")


def sample_segments(model, vae, text_encoder, jobs, references, progress=None, as_released=False, **how):
    """Returns the latents of each job's segments, lists of [C T h w].

    jobs: of one shape.  references: per job a list of clips of any size, each uint8 [K H W 3], or K frames of which
    those that no plan takes may be None.  how: the settings of sample_latents."""
    device = model.null_y.device
    shape = vae.channels, jobs[0].num_frames, jobs[0].height // vae.down, jobs[0].width // vae.down     # C T h w
    plans = [job.plans(some) for job, some in zip(jobs, references)]
    given = [encode_references(vae, some, plan, shape, device) for some, plan in zip(references, plans)]
    made = [[] for _ in jobs]
    for segment in range(len(jobs[0].prompts)):
        # On the CPU: a GPU draws other noise, and a video would depend on where it was made.
        generators = [slot_generator(job.seed, segment, job.number, "sample") for job in jobs]
        z = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)                 # [B C T h w]
        known = torch.zeros_like(z)
        strength = torch.stack([plan[segment][1] for plan in plans])
        for b, plan in enumerate(plans):
            sources = given[b] + made[b]
            for t, source in enumerate(plan[segment][0]):
                if source:
                    known[b, :, t] = sources[source[0]][:, source[1]]
        masks = dict(known=known, strength=strength) if (strength < 1).any() else {}
        y, y_mask = text_encoder([job.prompts[segment] for job in jobs])
        rows = [job.conditions(as_released) for job in jobs]
        cond = {name: torch.tensor([float(row[name]) for row in rows], device=device) for name in rows[0]}
        z = sample_latents(model, z, y.to(device), y_mask.to(device), cond, generators=generators,
                           as_released=as_released, progress=progress, **masks, **how)
        for segments, latent in zip(made, z):
            segments.append(latent)
    return made


def frames_taken(plans):
    """Returns {reference: its frames that a segment takes, ascending}; the segments before count as references."""
    taken = sorted({source for sources, _ in plans for source in sources if source})
    return {r: [frame for _, frame in of_one] for r, of_one in groupby(taken, lambda source: source[0])}


def encode_references(vae, references, plans, shape, device):
    """Returns the latents [C K h w] of each reference, uint8 [K H W 3]; 0 for frames that no plan takes."""
    C, _, h, w = shape
    taken = frames_taken(plans)
    latents = []
    for r, frames in enumerate(references):
        latents.append(torch.zeros(C, len(frames), h, w, device=device))
        if r in taken:
            video = torch.as_tensor(np.stack([frames[frame] for frame in taken[r]]))
            video = to_video(resize_crop(video, h * vae.down, w * vae.down))
            latents[r][:, taken[r]] = vae.encode(video[None].to(device))[0].to(latents[r])    # the posterior's mean
    return latents


def show(vae, job, segments):
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

    The weights are not read yet, so that T5 can be freed before they are.  ckpt is one of

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
    alone = not any(file.with_name(name).is_file() for name in ("config.py", "config.json"))
    if config.model.as_released and not (dist.is_initialized() and dist.get_rank()):
        print(f"{ckpt}: " + "no config.json next to it, so taken for XL/2 as published; " * alone
              + "as_released: with the quirks Q1 to Q7 that its weights were trained with, captions cleaned")
    model = with_weights(config.model, read_weights(file), file).requires_grad_(False).eval()
    model.to(weight_dtype(config, device))
    return Checkpoint(visiting(model, model.blocks, device) if offload else model.to(device), config)


def weight_dtype(config, device):
    return config.torch_dtype if torch.device(device).type == "cuda" else torch.float32


def visiting(net, blocks, device):
    """Moves a net to a device but for its blocks, which stay in host memory and are copied one by one as they compute.

    The device then holds 0.4 GB of T5-XXL at a time instead of 9, and 54 MB of XL/2 instead of 1.5 GB, in bf16."""
    at_home = {parameter: parameter.data for parameter in blocks.parameters()}
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor not in at_home:
            tensor.data = tensor.data.to(device)

    def come(block, *_):
        for parameter in block.parameters():
            parameter.data = at_home[parameter].to(device)

    def leave(block, *_):
        for parameter in block.parameters():
            parameter.data = at_home[parameter]

    for block in blocks:
        block.register_forward_pre_hook(come)
        block.register_forward_hook(leave)
    return net


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
            visiting(encoder.net, encoder.net.encoder.block, device)
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
    folder = Path(folder)
    faults = {"model.temporal_pos=True": m.temporal_pos, "model.pred_sigma=False": not m.pred_sigma,
              "model.as_released=False": m.qk_norm and not m.as_released,
              f"prediction={config.prediction!r}": config.prediction != "eps"}
    if any(faults.values()):
        raise ValueError(f"{ckpt} was trained with {', '.join(name for name, wrong in faults.items() if wrong)}: "
                         "Open-Sora would read its weights and compute something else. Expected the opposite of each")
    if not m.as_released:
        print("note: Open-Sora computes with as_released, this model was trained without: in bf16 it rounds t, sizes "
              "and fps, and given frames leave its last layer otherwise")
    folder.mkdir(parents=True, exist_ok=True)
    written = {name: value for name, value in asdict(m).items() if name not in ("as_released", "temporal_pos")}
    written |= {"model_type": "STDiT2", "architectures": ["STDiT2"], "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n", "utf-8")
    if find_checkpoint(ckpt)[0].with_name("config.py").is_file():           # a run of ours
        (folder / "config.py").write_text(configs.dump(config), "utf-8")
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})   # transformers refuses it without


# ---------------------------------------------------------------- command line: which videos
def add_job_options(parser):
    """Adds the options of one prompt; they can stand in its JSON too, as "num_frames" or "num-frames"."""
    add = parser.add_argument_group("one video (or in a prompt's JSON)").add_argument
    add("--num-frames", type=int, metavar="T", help="default: of the shortest videos the checkpoint was trained on")
    add("--size", help="HEIGHTxWIDTH in pixels, as in 240x426; default: the largest trained at that length")
    add("--fps", type=float, help="frames per second of the source that it imitates; default: the config's")
    add("--frame-interval", type=int, metavar="N", help="of these it shows every N-th; default: the config's")
    add("--seed", "--seeds", dest="seeds", type=int, nargs="+", default=[0], help="a video for each; default: 0")
    add("--segments", type=int, metavar="N", help="of T frames each; default: as a prompt |0|text|3|text names")
    add("--overlap", type=int, metavar="FRAMES", help="that a segment takes from the one before; default: T / 4")
    add("--seamless", action="store_true", default=False, help="the last segment leads back to the first: a loop")
    add = parser.add_argument_group("frames that are given: one of these (or in a prompt's JSON)").add_argument
    add("--animate", metavar="IMAGE", help="the first frame")
    add("--extend-after", metavar="CLIP", help="its last frames come first")
    add("--extend-before", metavar="CLIP", help="its first frames come last")
    add("--connect", nargs=2, metavar=("A", "B"), help="clips or images: the video leads from A to B")
    add("--keep", type=int, metavar="FRAMES", help="that these share with the video; default: T / 4, --connect: 1")
    add("--edit", metavar="CLIP", help="its first T frames, changed by --strength")
    add("--strength", type=float, default=0.5, help="0: not at all, to 1: all new; default: %(default)s")
    add("--infill", nargs=2, metavar=("CLIP", "START:STOP"), help="frames START to STOP - 1, from 0, are generated")
    add("--reference", "--reference-path", nargs="+", metavar="PATH", help="or \"a.png;b.mp4\", images and clips, for")
    add("--mask-strategy", metavar="GROUPS", help="their frames and places, as in masks.py; default: 0, the first")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\nPapers")[0], allow_abbrev=False,
                                     usage="python sample.py --prompt CAPTION [options]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", nargs="+", help="captions, each in quotes")
    what.add_argument("--prompts", metavar="FILE", help="of captions, one a line")
    what.add_argument("--plan", action="store_true", help="print the memory that sampling takes, and stop")
    what.add_argument("--export", metavar="FOLDER", help="write --ckpt as Open-Sora reads it, and stop")
    add_job_options(parser)
    add = parser.add_argument_group("how").add_argument
    add("--ckpt", default="assets/tiny", help="a run, or Open-Sora's folder, file or hub name; default: %(default)s")
    add("--vae", metavar="NAME", help="folder or hub name of the autoencoder; default: the config's")
    add("--text-encoder", metavar="NAME", help="folder or hub name of the T5; default: the config's")
    add("--sampler", choices=SAMPLERS, default="iddpm", help="default: %(default)s")
    add("--steps", type=int, help="default: " + ", ".join(f"{name} {n}" for name, n in DEFAULT_STEPS.items()))
    add("--cfg-scale", type=float, help="guidance; 1: none, at half the time; default: the config's")
    add("--rescale", type=float, default=0.0, help="of the guidance, 0 to 1; default: %(default)s")
    add = parser.add_argument_group("files").add_argument
    add("--out", type=Path, default="samples", help="folder; default: %(default)s")
    add("--format", choices=FORMATS, default="mp4", help="written with the contact sheet, .png; default: %(default)s")
    add("--grid", action="store_true", help="a picture of the contact sheets of all seeds of a prompt")
    add("--overwrite", action="store_true", help="replace videos that exist; otherwise they are skipped")
    add = parser.add_argument_group("machine").add_argument
    add("--batch-size", type=positive_int, default=4, help="videos of one size sampled at once; default: %(default)s")
    add("--offload", action="store_true", help="blocks of T5 and of the model stay in host memory until they compute")
    add("--text-cache", metavar="FOLDER", help="keeps the embeddings of captions; T5 is not loaded for those in it")
    add("--sp", type=positive_int, default=1, help="under torchrun: GPUs that share each video")
    add("--device", choices=("cuda", "cpu"), help="default: the GPU, if there is one")
    add("--plain", action="store_true", help="each op as PyTorch has it: slower, takes more memory")
    add("--debug", action="store_true", help="errors with their traceback")
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "sample.py", *(sys.argv[1:] if argv is None else argv)])
    return args


def fill(args, **defaults):
    """Sets options that were not given to their defaults."""
    vars(args).update({name: value for name, value in defaults.items() if getattr(args, name) is None})


def read_jobs(args, config):
    """Returns the jobs of the command line or of a file of prompts, one per prompt and seed."""
    lines = args.prompt or read_prompts(args.prompts)
    T, *size = default_bucket(config.trained)
    jobs = []
    for number, line in enumerate(lines):
        text, asked = split_json(line, args)
        fill(asked, num_frames=T, size="{}x{}".format(*size), fps=config.fps)
        fill(asked, frame_interval=config.frame_interval)
        height, width = parse_pair(asked.size, "x", "--size", "240x426")
        references, groups = given_frames(asked, asked.num_frames)
        jobs += [plan_job(text, groups, asked.segments, asked.overlap, asked.seamless, num_frames=asked.num_frames,
                          height=height, width=width, fps=asked.fps, frame_interval=asked.frame_interval,
                          references=tuple(references), seed=seed, number=number) for seed in asked.seeds]
    return jobs


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

    It is turned into flags and read by the same parser, so that both have the same names, types and messages."""
    text, brace, rest = line.partition("{")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_job_options(parser)
    words = []
    try:
        for name, value in json.loads(brace + rest or "{}").items():
            option = "--" + name.replace("_", "-")
            words += [option] * value if isinstance(value, bool) else (
                [option, *map(str, value)] if isinstance(value, list) else [f"{option}={value}"])
        asked, unknown = parser.parse_known_args(words, argparse.Namespace(**vars(args)))
    except json.JSONDecodeError as error:
        raise ValueError(f"prompt {line!r}: a brace starts JSON that ends it, as in a cat {{\"num_frames\": 16}}: "
                         f"{error}") from None
    except argparse.ArgumentError as error:
        raise ValueError(f"prompt {line!r}: {error}") from None
    if unknown:
        names = [action.dest for action in parser._actions]
        raise ValueError(f"prompt {line!r}: {unknown[0].split('=')[0]!r} is none of {', '.join(names)}")
    return text, asked


def parse_pair(text, sign, option, example):
    if not re.fullmatch(rf"\d+{sign}\d+", text):
        raise ValueError(f"{option} {text}: expected two whole numbers, as in {example}")
    return tuple(map(int, text.split(sign)))


def given_frames(asked, T):
    """Returns (references, groups) of the option in use."""
    forms = ("animate", "extend_after", "extend_before", "connect", "edit", "infill", "reference")
    used = [name for name in forms if getattr(asked, name) is not None]
    groups = parse_strategy(asked.mask_strategy) if asked.mask_strategy is not None else []
    if len(used) > 1 or used and used != ["reference"] and groups:
        names = ["--" + name.replace("_", "-") for name in (*used, "mask_strategy")][:2]
        raise ValueError(f"{' and '.join(names)}: expected one of them; --reference with --mask-strategy expresses any "
                         "combination")
    keep = max(1, T // 4) if asked.keep is None else asked.keep
    if asked.animate is not None:
        return [asked.animate], animate()
    if asked.extend_after is not None:
        return [asked.extend_after], extend_after(keep)
    if asked.extend_before is not None:
        return [asked.extend_before], extend_before(keep)
    if asked.connect is not None:
        return asked.connect, connect(1 if asked.keep is None else keep)
    if asked.edit is not None:
        return [asked.edit], edit(asked.strength, T)
    if asked.infill is not None:
        path, span = asked.infill
        start, stop = parse_pair(span, ":", "--infill", "4:12")
        return [path], infill(start, stop, T)
    if asked.reference is not None:
        paths = [path.strip() for path in ";".join(asked.reference).split(";")]
        return paths, animate() if asked.mask_strategy is None else groups
    return [], groups


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


def read_references(job):
    """Returns each clip or image that a job names as a list of frames at about the job's rate, uint8 [H W 3].

    Frames that no segment takes are None: a film of ten minutes does not fit into memory when only its last four frames
    are needed.  Frames are counted so that the clip's last one is among them if any group takes its end, otherwise its
    first.  A negative number counts from the segment of its group: in segment i, i segments follow the references."""
    paths = [find(path) for path in job.references]
    many = len(paths)
    segments = range(len(job.prompts))
    from_end = [group for group in parse_strategy(job.strategy) if group.ref_start < 0 and group.segment in segments]
    at_end = [any(group.reference in (r, r - many - group.segment) for group in from_end) for r in range(many)]
    moments = [at_rate(path, job.fps / job.frame_interval, end) for path, end in zip(paths, at_end)]
    references = [[None] * len(of_one) for of_one in moments]
    for r, frames in frames_taken(job.plans(moments)).items():
        if r < many:                                                # else it is a segment, not made yet
            window = moments[r][frames[0] : frames[-1] + 1]
            video, _ = read_again(paths[r], len(window), window.step, window.start)
            for frame in frames:
                references[r][frame] = video[frame - frames[0]].numpy()
    return references


@lru_cache
def at_rate(path, fps, at_end):
    """Returns which frames of a clip to take for `fps`, as a range: up to its last one or from its first one."""
    many, rate = length_and_rate(path)
    every = max(1, round((rate or fps) / fps))
    return range((many - 1) % every if at_end else 0, many, every)


read_again = lru_cache(maxsize=4)(read_window)      # several prompts or seeds for one clip; and all is read to check it


# ---------------------------------------------------------------- command line: sampling them
def run(args):
    """Samples the jobs that do not exist yet; the groups of args.sp processes share them."""
    place = start_processes(sp=args.sp, device=args.device)
    place.say(use(place.device, args.plain))
    file, config = find_checkpoint(args.ckpt)
    fill(args, vae=config.vae, text_encoder=config.text_encoder, steps=DEFAULT_STEPS[args.sampler],
         cfg_scale=config.cfg_scale)
    config = replace(config, vae=args.vae, text_encoder=args.text_encoder)
    timesteps(args.steps, args.sampler)                                     # raises where there are none
    if not math.isfinite(args.cfg_scale):
        raise ValueError(f"--cfg-scale {args.cfg_scale}: expected a number")
    if not 0 <= args.rescale <= 1:
        raise ValueError(f"--rescale {args.rescale}: expected 0, no change, to 1")
    jobs = read_jobs(args, config)
    check_captions(jobs, config)
    weights = fingerprint(read_weights(file))
    vae = load_vae(args.vae, device=place.device)
    check_jobs(jobs, read_references, vae.down, config.model.patch_size)
    check_out(args.out)
    how = {name: getattr(args, name) for name in ("steps", "sampler", "cfg_scale", "rescale")}
    how["as_released"] = config.model.as_released
    settings = dict(sampling=how, ckpt=args.ckpt, weights=weights, vae=args.vae,
                text_encoder=args.text_encoder, plain=args.plain)           # all of it is the same only to rounding
    records = {job: {"job": asdict(job)} | settings for job in jobs}
    todo = [job for job in jobs if args.overwrite or not exists(job, records[job], args, place)]
    dist.barrier()                          # collective; no rank writes before all have seen which files exist
    if mine := todo[place.data_rank::place.num_data_ranks]:                 # T5 is freed before the model is loaded
        captions = list(dict.fromkeys(prompt for job in mine for prompt in job.prompts))
        text_encoder = encode_texts(config, captions, place.device, folder=args.text_cache, offload=args.offload)
        model = load(args.ckpt, place.device, offload=args.offload).model
        if place.group:
            sequence_parallel(model, place.group)
    batches = alike(mine, args.batch_size)
    total = args.steps * sum(len(batch[0].prompts) for batch in batches)
    with tqdm(total=total, unit="step", disable=True if place.rank else None) as bar:       # None: where nobody looks
        for batch in batches:
            references = [read_references(job) for job in batch]
            made = sample_segments(model, vae, text_encoder, batch, references, lambda *_: bar.update(),
                                   prediction=config.prediction, **how)
            for job, segments in zip(batch, made) if place.reads else ():   # one of those who share it
                save(job, show(vae, job, segments), records[job], args)
    if args.grid and place.reads:
        for _, seeds in groupby(jobs, lambda job: job.number):
            write_grid(list(seeds), args.out)
    place.say(f"{len(todo)} of {len(jobs)} made, {args.steps} {args.sampler} steps: "
              f"{time.time() - started():.1f} s from the start")


def started():
    """Returns when this process began, in seconds since 1970: what a user has waited includes the imports."""
    try:
        ticks = int(Path("/proc/self/stat").read_text("utf-8").rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text("utf-8").split()[0])
        return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):           # a system without /proc
        return IMPORTED


def check_captions(jobs, config):
    """Raises ValueError for a prompt of which cleaning, where the weights want it, leaves nothing."""
    if config.model.as_released:
        for job in jobs:
            for prompt in job.prompts:
                if not clean_caption(prompt):
                    raise ValueError(f"prompt {prompt!r}: nothing is left of it when it is cleaned as the weights' "
                                     "captions were: write it in words")


def check_out(folder):
    """Raises OSError, before anything is sampled, if a file cannot be written into a folder, or where it is to be."""
    while not folder.exists():
        folder = folder.parent
    with tempfile.TemporaryFile(dir=folder):
        pass


def alike(jobs, size):
    """Returns lists of at most `size` jobs that are sampled together: of one shape and number of segments."""
    def shape(job):
        return job.num_frames, job.height, job.width, len(job.prompts)

    groups = [list(group) for _, group in groupby(sorted(jobs, key=shape), key=shape)]
    return [group[i : i + size] for group in groups for i in range(0, len(group), size)]


# out/00-name.png is the contact sheet, .mp4 the video, .json what made them, written last: where it is, all are.
# out/.00-name.safetensors are the latents of its segments, while there are more to come.
def pictures(job, args):
    kinds = [".png"] + [FORMATS[args.format]] * (job.num_frames > 1 and args.format != "png")
    return [args.out / f"{job.name}{kind}" for kind in kinds]


def save(job, frames, record, args):
    T, H, W, _ = frames.shape
    fps = job.fps / job.frame_interval
    for path in pictures(job, args):
        write_video(path, frames, fps)
        order = " in reading order" if path.suffix == ".png" else f", {fps:g} per second"
        tqdm.write(f"{path}  " + (f"{T} frames of {H}x{W}{order}" if T > 1 else f"an image of {H}x{W}"))
    with atomic_write(args.out / f"{job.name}.json") as part:
        part.write_text(json.dumps({"command": args.command} | record, indent=1), "utf-8")


def exists(job, record, args, place):
    """Returns whether a job has been sampled; raises ValueError if that was another prompt, or with other settings."""
    note = args.out / f"{job.name}.json"
    last = pictures(job, args)[-1]
    if not note.exists() or not last.exists():
        return False
    before = json.loads(note.read_text("utf-8"))
    before.pop("command", None)
    if before != json.loads(json.dumps(record)):
        raise ValueError(f"{last} already exists, of another prompt or with other settings (see its .json): choose "
                         "another --out, or replace it with --overwrite")
    place.say(f"{last} already exists, skipping (use --overwrite to replace it)")
    return True


def write_grid(jobs, out):
    """Writes the contact sheets of one prompt's seeds as one picture; the process that finishes last does it."""
    paths = [out / f"{job.name}.png" for job in jobs]
    if all(path.exists() for path in paths):
        sheets = np.concatenate([np.asarray(Image.open(path)) for path in paths], axis=int(jobs[0].num_frames == 1))
        path = out / f"{jobs[0].number:02d}-{slug(jobs[0].prompts[0])}-grid.png"
        Image.fromarray(sheets).save(path)
        print(f"{path}  seeds {' '.join(str(job.seed) for job in jobs)}")


def print_plan(ckpt):
    """Prints the GiB that sampling one video with guidance holds on a GPU: T5, which is then freed, model and VAE."""
    config = configs.load(ckpt) if ckpt.endswith(".py") else find_checkpoint(ckpt)[1]
    m = config.model
    dtype = config.torch_dtype
    gib = 2 ** 30
    from configs.plan import FROZEN, forward_bytes, parameters
    t5 = FROZEN.get(config.text_encoder, 0) * dtype.itemsize
    vae = FROZEN.get(config.vae, 0) * 4
    model = parameters(m)[0] * dtype.itemsize
    counted = "" if t5 and vae else "; T5 and VAE are not those of Open-Sora: not counted"
    print(f"{ckpt}, {config.dtype}, GiB: T5 {t5 / gib:.2f}, VAE {vae / gib:.2f} (fp32), model {model / gib:.2f}"
          f"{counted}\n{'video':>15}{'activations':>13}{'decoding':>10}{'peak':>8}{'with --offload':>16}")
    for T, height, width in ((16, 240, 426), (64, 240, 426), (16, 720, 1280)):      # of stage 3's buckets
        held = forward_bytes(m, dtype, 2, T, height // 8, width // 8)
        pixels = height * width                                                 # 3 * 4: all frames decoded, in fp32
        decoding = (DECODER_BYTES * min(T, frames_at_once(height, width)) + 3 * 4 * T) * pixels * bool(vae)
        peak = vae + max(t5, model + held, model + decoding)
        lean = vae + max(t5 / 24, model / m.depth + held, decoding)             # a block: T5-XXL has 24
        print(f"{T:>4} x {height:>3}x{width:<4}{held / gib:>13.2f}{decoding / gib:>10.2f}{peak / gib:>8.2f}"
              f"{lean / gib:>16.2f}")


def main(argv=None):
    args = parse_args(argv)
    with one_line_errors(args.debug, "; run the same command again to make the videos that are missing"):
        if args.export:
            export(args.ckpt, args.export)
        elif args.plan:
            print_plan(args.ckpt)
        else:
            run(args)


if __name__ == "__main__":
    main()
