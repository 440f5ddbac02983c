"""Trains the ST-DiT, on clips or on their cached latents.

    python train.py configs/tiny.py                                     the shapes world, 9 minutes on 2 CPU cores
    torchrun --nproc-per-node 8 train.py configs/stage1.py --data=clips/meta.csv
    python -m configs.plan configs/stage2.py --gpus 64 --gpu h800       what a run would take, before a GPU is rented

writes <run>/config.py, clips.txt, log.jsonl, validation.jsonl, bad_clips.csv, samples/step-0000500.png, step-0000500/
(weights, optimizer and EMA, sharded), model.safetensors (the EMA).  The same command goes on from the last checkpoint;
another --out starts over.  A single process is a process group of one.  The clips of a step, their noise, t, masks and
caption drops are functions of (seed, step, slot of the global batch): resumed, or on other GPUs, a run sees the same.

Papers: DDPM (arXiv 2006.11239), improved DDPM (2102.09672), v-prediction (2202.00512), SpeeD (2405.17403),
ZeRO (1910.02054), activation checkpointing (1604.06174), sequence parallelism in the manner of DSP (2403.10266).
"""
# The first half of this file is the recipe, in the order of a step: the loss, one batch, the model with its optimizer
# and average, the loop. The second half is what a long run needs: checkpoints, the log, timing, the command line.
# Upstream is Open-Sora 1.1, whose weights and recipe this trains on.
import os
import signal
if __name__ in ("__main__", "__mp_main__"):
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # until main(): Ctrl-C shows no traceback of a half-done import
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")     # waiting OpenMP threads sleep soon, for a busy machine
import argparse
import json
import math
import shutil
import sys
import time
import warnings
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from einops import rearrange, reduce
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import configs
from kernels import Place, all_frames, own_frames, sequence_parallel, start_processes, use
from data import (BadClips, BucketSampler, ClipDataset, atomic_write, batches, one_line_errors, read_meta,
                  slot_generator, to_video, uniform, write_video)
from masks import draw_mask
from model import STDiT, check_weights, from_pixart, is_pixart, read_weights
from sample import PUBLISHED, SampleQuirks, default_bucket, generate, noise_schedule
from vae import fetch, find, fingerprint as weights_name, load_text_encoder, load_vae, remember, write_cache

LOG_EVERY = 10              # steps, as upstream's log_every
VALIDATION_BATCHES = 8      # global batches of held-out clips


# ---------------------------------------------------------------- the loss
# DDPM noises x_0 to x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps, abar falling from 0.9999 at t = 0 to 4e-5 at t = 999,
# and learns to tell eps from x_t. Improved DDPM has the model also tell the variance of each step back, which a
# variational bound trains. The papers count t from 1, the code from 0: at t = 0, "x_t" is their x_1, "x_t-1" x_0.
def diffusion_vectors(alphas_cumprod):
    """What the loss reads at t: vectors [1000] from abar, by the names of improved DDPM's code.

    In fp64: in fp32 the span at t = 999, 8e-7, is lost, and coef1 at t = 0 is 0.99983 where 1 is right."""
    abar = alphas_cumprod.double()
    abar_prev = torch.cat([abar.new_ones(1), abar[:-1]])
    beta = 1 - abar / abar_prev
    posterior_variance = beta * (1 - abar_prev) / (1 - abar)                # 0 at t = 0: its logarithm is that of t = 1
    log_low = torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log()
    return {
        # x_t of x_0 and eps: DDPM, eq. 4
        "sqrt_alphas_cumprod": abar.sqrt(), "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        # the x_0 that x_t and eps leave: eq. 15, x_t / sqrt(abar) - sqrt(1 / abar - 1) eps
        "sqrt_recip_alphas_cumprod": (1 / abar).sqrt(), "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
        # the mean of q(x_t-1 | x_t, x_0): eq. 7, coef1 x_0 + coef2 x_t
        "posterior_mean_coef1": beta * abar_prev.sqrt() / (1 - abar),
        "posterior_mean_coef2": (1 - abar_prev) * (1 - beta).sqrt() / (1 - abar),
        # log of the variance of a step back, between eq. 7's (10 of improved DDPM) and beta
        "log_variance_low": log_low, "log_variance_span": beta.log() - log_low,
    }


def q_sample(vectors, x_0, t, noise):
    """Eq. 4 of DDPM: x_t of x_0 [B C T h w] at t [B T], each frame at its own time."""
    at = lambda name: rearrange(vectors[name][t].to(x_0), "b t -> b 1 t 1 1")
    return at("sqrt_alphas_cumprod") * x_0 + at("sqrt_one_minus_alphas_cumprod") * noise


def diffusion_loss(vectors, out, x_0, x_t, noise, t, x_mask, prediction="eps"):
    """L_simple + lambda L_vlb, eq. 16 of improved DDPM, per clip: {"loss", "mse", "vb"} of [B]; vb in bits per value.

    L_vlb is a sum over 1000 t of which one is drawn, and lambda is 0.001: so the drawn term has weight 1.
    out [B 2C T h w]: eps or v, and the variance channels.  x_mask [B T]: only noised frames count; a clip without
    one has loss 0.  The gradient of the bound reaches the variance channels only (ibid., section 3.1)."""
    answer, variance = out.float().chunk(2, dim=1)
    at = lambda name: rearrange(vectors[name][t].to(x_0), "b -> b 1 1 1 1")
    a, s = at("sqrt_alphas_cumprod"), at("sqrt_one_minus_alphas_cumprod")
    target = noise if prediction == "eps" else a * noise - s * x_0         # v: 2202.00512, section 4
    eps = answer if prediction == "eps" else a * answer + s * x_t         # ibid., appendix D
    bits = variational_bits(at, x_0, x_t, eps.detach(), variance, t)
    mse, vb = (mean_of_noised(error, x_mask) for error in ((answer - target) ** 2, bits))
    return {"loss": mse + vb, "mse": mse, "vb": vb}


def mean_of_noised(error, x_mask):
    """[B C T h w] -> [B]: the mean over frames with x_mask [B T] True, 0 if there are none (upstream: 0 / 0)."""
    per_frame = reduce(error, "b c t h w -> b t", "mean") * x_mask
    return per_frame.sum(1) / x_mask.sum(1).clamp(min=1)


def variational_bits(at, x_0, x_t, eps, variance, t):
    """A term of L_vlb [B C T h w] in bits (improved DDPM, eqs. 4 to 6): the KL divergence from q(x_t-1 | x_t, x_0), the
    true step back, to the model's; at t = 0 the decoder's -log p(x_0 | x_1) (DDPM, section 3.3)."""
    posterior_mean = lambda x: at("posterior_mean_coef1") * x + at("posterior_mean_coef2") * x_t
    x_0_hat = at("sqrt_recip_alphas_cumprod") * x_t - at("sqrt_recipm1_alphas_cumprod") * eps
    mean, true_mean = posterior_mean(x_0_hat), posterior_mean(x_0)
    more = (variance + 1) / 2 * at("log_variance_span")                 # -1..1 spans the two bounds, eq. 15 of iDDPM
    log_var = at("log_variance_low") + more                             # the true one's is log_variance_low
    kl = 0.5 * (more - 1 + (-more).exp() + (true_mean - mean) ** 2 * (-log_var).exp())      # of two Gaussians
    nll = -discretised_log_likelihood(x_0, mean, 0.5 * log_var)
    return torch.where(rearrange(t, "b -> b 1 1 1 1") == 0, nll, kl) / math.log(2)


def discretised_log_likelihood(x, mean, log_scale):
    """log of the Gaussian's mass in a bin of width 2/255 around x, eq. 13 of DDPM; the outermost bins are open.

    Bins are for pixels of 8 bits.  Latents have none, yet Open-Sora's loss, which this is, took it over with the tanh
    (GELU's, 1606.08415), 0.999 and 1e-12 from improved DDPM's code.  Only t = 0 is concerned."""
    cdf = lambda u: 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (u + 0.044715 * u ** 3)))
    inverse = torch.exp(-log_scale)
    above, below = cdf((x - mean + 1 / 255) * inverse), cdf((x - mean - 1 / 255) * inverse)
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


def speed_probabilities(vectors):
    """SpeeD's distribution of t [1000] (arXiv 2405.17403) as Open-Sora 1.1's speed.py has it: 2.5 to 0.5, 5 times more
    often where a step still adds noise, sqrt(1 - abar) growing by more than 1e-4: t < 641."""
    growth = torch.gradient(vectors["sqrt_one_minus_alphas_cumprod"].double())[0]
    p = torch.tanh(1e6 * (growth - 1e-4)) + 1.5                             # tanh: -1 or 1 but at 638..644
    return p / p.sum()


def draw_t(config, vectors, step, slots):
    """t [B], uniform over 0..999; with SpeeD an odd slot takes the dual of the even one before: 700 - t, or t - 700.

    700 is upstream's, where the growth falls below 5e-5; its speed.py: the dual balances the pair, noisy or clean."""
    if not config.speed:
        return torch.from_numpy(uniform(config.seed, step, slots, "t") * 1000).long()
    u = torch.from_numpy(uniform(config.seed, step, slots // 2, "t"))
    t = torch.searchsorted(speed_probabilities(vectors).cumsum(0).cpu(), u).clamp(max=999)          # sync
    return torch.where(torch.as_tensor(slots) % 2 == 1, torch.where(t < 700, 700 - t, t - 700), t)


# ---------------------------------------------------------------- one batch
def to_latents(batch, vae, text_encoder, group=None):
    """Adds mean, std [B C T h w], y and y_mask to a batch of videos, as batches from the cache have them already.

    The VAE says a Gaussian for each value of a latent: its mean and std stay, loss_of draws from it.
    The ranks of a group, which share the clips, encode some frames each."""
    if "video" in batch:
        cut, video = text_encoder.num_cut, batch.pop("video")                   # [B T H W 3]
        own = to_video(own_frames(video, video.shape[1], group).to(vae.device))
        batch["mean"], batch["std"] = (all_frames(z, video.shape[1], group, dim=2) for z in vae.moments(own))
        batch["y"], batch["y_mask"] = text_encoder(batch.pop("text"))
        batch["cut"] = text_encoder.num_cut - cut
    return batch


def loss_of(model, batch, config, vectors, step, device):
    """Per-clip losses {"loss", "mse", "vb"} and t, all [B].

    All that is left to chance is drawn here, on the CPU, of (seed, step, slot): the same on any device, and whoever
    else is in the batch."""
    slots, shape = batch["slots"].numpy(), batch["mean"].shape              # [B], [B C T h w]
    generators = [slot_generator(config.seed, step, int(slot), "noise") for slot in slots]
    x_mask = torch.stack([draw_mask(shape[2], config.mask_ratios, g) for g in generators])          # [B T]
    posterior, noise = torch.stack([torch.randn(2, *shape[1:], generator=g) for g in generators]).to(device).unbind(1)
    t = draw_t(config, vectors, step, slots)
    drop = torch.from_numpy(uniform(config.seed, step, slots, "drop") < config.model.class_dropout_prob)

    # Some captions are dropped: the model learns to do without, as guidance needs (2207.12598).
    told_mask = None if x_mask.all() else x_mask.to(device)                 # known on the CPU, as is y_mask: no sync
    y, y_mask = batch["y"].to(device), batch["y_mask"].cpu() | drop[:, None]
    x_mask, t, drop = x_mask.to(device), t.to(device), drop.to(device)
    y = torch.where(drop[:, None, None], model.null_y.to(y.dtype), y)       # the null caption: all its tokens count

    x_0 = batch["mean"].to(device) + batch["std"].to(device) * posterior    # a draw of what the VAE says, each time
    x_t = q_sample(vectors, x_0, torch.where(x_mask, t[:, None], 0), noise)  # given frames are at t = 0, as upstream
    told = {name: batch[name].to(device) for name in ("height", "width", "num_frames", "ar", "fps")}
    out = model(x_t, t, y, y_mask, x_mask=told_mask, **told)
    terms = diffusion_loss(vectors, out, x_0, x_t, noise, t, x_mask, config.prediction)
    if config.speed:    # upstream's weight of the squared error: 1 - abar = 1 / (1 + SNR), "P2" (2204.00227), gamma = 1
        terms["loss"] = terms["mse"] * (vectors["sqrt_one_minus_alphas_cumprod"][t] ** 2).to(x_0) + terms["vb"]
    return terms, t


def cut(batch, n):
    """A batch's clips in n parts (config.accumulation, where memory is short), as dicts of what loss_of needs."""
    by_clip = {name: value for name, value in batch.items() if name not in ("bucket", "faults", "decoded", "waited")}
    return [{name: value[i::n] for name, value in by_clip.items()} for i in range(n)]


# ---------------------------------------------------------------- model, optimizer, EMA on a mesh
class Run(NamedTuple):
    """What the steps work on."""
    config: configs.Config
    place: Place
    model: STDiT
    optimizer: torch.optim.Optimizer
    ema: "Average"

    @property
    def folder(self):
        return Path(self.config.out)


def make_run(config, place):
    """A Run with fresh weights."""
    model = build_model(config, place.mesh)
    if place.group:
        sequence_parallel(model, place.group)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.lr, weight_decay=config.weight_decay, fused=True)
    return Run(config, place, model, optimizer, Average(model, config.ema_decay))


def build_model(config, mesh):
    """The STDiT with fp32 weights, sharded over a mesh block by block (FSDP2), that computes in config.dtype.

    Of weights, gradients, Adam's two moments and the EMA each GPU keeps its part (ZeRO stage 3); a block's weights are
    gathered while it computes.  Each step of the way is one more line over a finished model, as in torchtitan."""
    with torch.device("meta"):                                              # no GPU ever holds all of the weights
        model = STDiT(config.model)
    checkpoint_blocks(model, config.checkpointing)
    # Weights are gathered in config.dtype, half the traffic in bf16; gradients are added up in fp32, as small ones of
    # many GPUs would be lost in bf16. Inputs are not cast: in bf16 t = 500 and 501 are one number.
    policy = MixedPrecisionPolicy(config.torch_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    shard = partial(fully_shard, mesh=mesh, mp_policy=policy)
    for block in model.blocks:
        if config.compile:
            block.compile()
        shard(block, reshard_after_forward=block is not model.blocks[-1])   # backward begins with the last: it stays
    shard(model)                                                            # what is not in a block
    model.to_empty(device=mesh.device_type)
    model.init_weights(config.seed)                                         # the same values however it is sharded
    return model


def checkpoint_blocks(model, every):
    """Each every-th block keeps its input only, and is computed again in backward (arXiv 1604.06174); 0 = none."""
    for block in model.blocks[::every] if every else ():                    # no dropout in there: no RNG to preserve
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


class Average:
    """Exponential moving average of the trained weights, sharded as they are: what is sampled from (DDPM, appendix B).

    In fp32, as a step of 1e-4 of the way would be lost in bf16."""

    def __init__(self, model, decay):
        self.decay, self.model = decay, model
        self.restart()

    def restart(self):
        """From the model's weights as they are."""
        self.weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}

    @torch.no_grad()
    def update(self, step):
        """The decay grows as (1 + step) / (10 + step) up to its value: the first weights do not linger.

        TensorFlow's rule (tf.train.ExponentialMovingAverage); it ends at step 90,000 for a decay of 0.9999."""
        decay = min(self.decay, (1 + step) / (10 + step))
        own = [p.to_local() for p in self.model.parameters()]
        torch._foreach_lerp_([w.to_local() for w in self.weights.values()], own, 1 - decay)

    @torch.no_grad()
    def swap(self):
        """Exchanges the model's weights and the average; twice is no change."""
        for module in (self.model, self.model.blocks[-1]):                  # these keep what they last gathered
            module.reshard()
        for p, w in zip(self.model.parameters(), self.weights.values()):
            kept = p.to_local().clone()
            p.to_local().copy_(w.to_local())
            w.to_local().copy_(kept)


# ---------------------------------------------------------------- the weights that a run starts from
def find_weights(name):
    """Returns the path of the weights that a run starts from: a file or folder, else downloaded from the hub."""
    path = Path(find(name))
    if path.is_file() or path.is_dir() and any(path.iterdir()):
        return path
    missing = (f"init={str(name)!r} does not exist, expected a run's folder, a model.safetensors, a .pth, a folder of "
               "Open-Sora's weights, or their name on the hub: owner/repository, or owner/repository/file.pth")
    repository, _, file = str(name).rpartition("/")
    if repository.count("/") == 1:                                          # one file of a repository
        return fetch(repository, [file], missing) / file
    files = ["config.json", "model*.safetensors", "model.safetensors.index.json", "transformer/config.json"]
    return fetch(name, files, missing)                                      # the last shows the layout of diffusers


def start_from(run, path):
    """Weights and EMA, with config.init_optimizer also Adam's state, of another run; or weights alone of a file."""
    checkpoint, config = latest(path), run.config
    run.place.say(f"starts from {checkpoint or path}")
    if checkpoint:
        old = replace(configs.load(path / "config.py").model, class_dropout_prob=config.model.class_dropout_prob)
        if old != config.model:
            raise ValueError(f"init={str(path)!r} holds {old}, expected {config.model}")
        load_state(run, checkpoint, config.init_optimizer)
    elif config.init_optimizer:
        raise ValueError(f"init_optimizer=True: {path} holds weights only, expected a run's folder with checkpoints")
    else:
        if (path / "config.json").is_file() and not config.model.as_released:
            run.place.say("note: Open-Sora's weights were trained with --model.as_released=True, which is off here")
        load_weights(run.model, path, config.seed)
        run.ema.restart()


def load_weights(model, path, seed=0):
    """Loads a file or folder that read_weights reads into a sharded model: a run's weights, Open-Sora's, or the image
    model's of PixArt-alpha; what that lacks is drawn from the seed."""
    weights = read_weights(path)
    if is_pixart(weights):
        weights = from_pixart(weights, model.config, seed, path)
    check_weights(model, weights, path)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))               # collective


# ---------------------------------------------------------------- the loop
def train(config, allow_changes=False, plain=False):
    """Trains to config.steps; returns 0, or the number of the signal that stopped it after a checkpoint."""
    place, folder = start_processes(config.shard, config.sp), Path(config.out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={config.out!r} is a file, expected a folder, or the name of a new one")
    checkpoint = latest(folder)
    first = step_of(checkpoint) if checkpoint else 0
    place.say(use(place.device, plain))
    meta = rank0_first(lambda: read_meta(config.data))                      # which builds the index
    sampler = BucketSampler(meta, config)
    place.say(sampler.table())
    init = rank0_first(lambda: find_weights(config.init)) if config.init and not checkpoint else None
    vae = load_vae(config.vae, config.torch_dtype, place.device)
    text_encoder = load_text_encoder(config.text_encoder, config.model.model_max_length, config.torch_dtype,
                                     place.device, config.model.as_released)
    read = fingerprint(meta, vae, text_encoder)
    if checkpoint:
        check_changes(config, read, allow_changes, place.say)
    if first >= config.steps:
        place.say(f"{checkpoint}: all {config.steps} steps are done; --steps=N goes on to N, another --out starts over")
        if place.rank == 0:                                                 # it may have been killed just before this
            export(checkpoint, folder / "model.safetensors")
        return 0
    if place.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.py", configs.dump(config))
        write_text(folder / "clips.txt", f"{read}\n{sampler.table()}\n")

    # The frozen networks work at every step, or, with a cache, once and now. Previews ask for their prompts alone: with
    # these remembered, T5's 9 GiB can go (a default of the lambda holds it no longer than that; a closure would).
    encode = partial(to_latents, vae=vae, text_encoder=text_encoder, group=place.group)
    validation = Validation(config, meta, place, first, encode) if config.validate_every else None
    prompts = remember(lambda encoder=text_encoder: encoder, config.prompts)
    dataset = ClipDataset(meta, config)
    if config.cache:
        patient = dist.new_group(backend="gloo", timeout=timedelta(weeks=4))    # ranks end hours apart
        dataset = write_cache(meta, config, vae, text_encoder, place.rank, place.world, patient)
        encode = dict
    del text_encoder

    run = make_run(config, place)
    if checkpoint:
        load_state(run, checkpoint)
    elif init:
        start_from(run, init)
    place.say(f"{sum(w.numel() for w in run.ema.weights.values()):,} parameters, {place.world} x {place.device.type}, "
              f"{config.dtype}, steps {first} to {config.steps}")
    log, checkpoints = Log(run, first), Checkpoints(run)
    show = partial(preview, run, vae, prompts) if config.prompts and config.sample_every else None
    clips = shared(partial(batches, sampler, dataset, first, config.steps, known=log.bad.known), place)
    try:
        return take_steps(run, first, clips, log, encode, checkpoints, show, validation)
    finally:
        checkpoints.wait()


def take_steps(run, first, clips, log, encode=dict, checkpoints=None, show=None, validation=None):
    """The loop: a step per batch of clips; returns 0, or the number of the signal that stopped it."""
    config, place, model, optimizer = run.config, run.place, run.model, run.optimizer
    trained = optimizer.param_groups[0]["params"]
    vectors = {n: v.to(place.device) for n, v in diffusion_vectors(noise_schedule().alphas_cumprod).items()}
    signals, stop = note_signals(place.say), 0
    for step, batch in enumerate(clips, start=first):
        lr = config.lr * min(1, (step + 1) / max(1, config.warmup_steps))
        optimizer.param_groups[0]["lr"] = lr
        level, num_frames, _ = bucket = batch["bucket"]
        whole_batch = config.buckets[level][num_frames][1] * config.world
        parts = cut(batch, min(config.accumulation, whole_batch // place.num_data_ranks))   # as many on every rank
        answers = []
        for i, part in enumerate(parts):
            model.set_requires_gradient_sync(i == len(parts) - 1)           # gradients travel once a step
            part = encode(part)
            terms, t = loss_of(model, part, config, vectors, step, place.device)
            # FSDP takes the mean over all ranks; those that share a clip count as one.
            (terms["loss"].sum() * place.num_data_ranks / whole_batch).backward()
            answers.append((terms, t, part.get("cut", 0)))
        norm = torch.nn.utils.clip_grad_norm_(trained, config.grad_clip).full_tensor().item()      # collective, sync
        if math.isfinite(norm):
            optimizer.step()
            run.ema.update(step)
        else:
            refuse(step, bucket, answers, config)                           # collective
        log.add(batch, answers)                                             # sync
        optimizer.zero_grad(set_to_none=True)

        done, stop = step + 1, highest(signals[0] if signals else 0)        # collective: a signal to one stops all
        saves = checkpoints and (done % config.save_every == 0 or done == config.steps or stop)
        if done % LOG_EVERY == 0 or saves:                                  # resumed, its lines average the same steps
            log.line(done, grad_norm=norm, lr=lr, bucket=bucket)
        if saves:
            log.saving += checkpoints.save(done)
        if show and done % config.sample_every == 0:
            show(done)
        if validation and done % config.validate_every == 0:
            validation.line(run, vectors, done)
        if stop:
            break
    if checkpoints and (failed := checkpoints.wait()):
        raise ValueError(f"{failed} - the same command goes on from {latest(run.folder) or 'the start'}")
    if checkpoints and stop:
        place.say(f"\nsaved step {done} and stopped; the same command goes on from there")
    return stop


def refuse(step, bucket, answers, config):
    """A step whose gradient is not finite is an error of all ranks, which names bucket, ranks and times."""
    odd = gather([f"rank {dist.get_rank()} loss {loss} at t = {t}" for terms, ts, _ in answers
                  for loss, t in zip(terms["loss"].tolist(), ts.tolist()) if not math.isfinite(loss)])
    said = f"step {step}: the gradient of bucket {tuple(bucket)} is not finite, " + (
        f"{len(odd)} losses are not: {', '.join(odd[:4])}" if odd else "all losses are")
    raise ValueError(f"{said}; nothing of it is saved - an lr below {config.lr} or dtype fp32 may help")


def shared(read, place):
    """What read(rank=, world=) yields on the first of a group, sent to all of it: each reading by itself, one might
    give up a slow clip that another waits for, and they would train on different ones."""
    clips = read(rank=place.data_rank, world=place.num_data_ranks) if place.reads else iter(())
    while True:
        parcel = [next(clips, None)]
        if place.group:
            dist.broadcast_object_list(parcel, group=place.group, group_src=0)          # collective
        if parcel[0] is None:
            return
        yield parcel[0]


def note_signals(say):
    """A list that gets the number of a SIGTERM or SIGINT (Ctrl-C) when one comes; a second one acts as ever.

    The step is ended first: a rank that stopped within one would leave the others waiting in a collective."""
    numbers, usual = [], {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}

    def note(number, _):
        numbers.append(number)
        signal.signal(number, usual[number])
        say("\nstopping after this step; once more to stop at once")

    for number in usual:
        signal.signal(number, note)
    return numbers


# ---------------------------------------------------------------- checkpoints
class Checkpoints:
    """<run>/step-0000500/ with weights, optimizer and EMA; `latest` names the last; see config.keep_last.

    Each rank writes its own part (torch.distributed.checkpoint), and any number of ranks reads them back.  The steps
    stand still while the state is copied to host memory; threads write the copy under another name, fsync, rename: what
    has its name is whole, whenever the power fails.  Their collectives go through a group of their own, as they would
    otherwise meet those of the steps in another order on each rank."""

    def __init__(self, run):
        self.run, self.folder, self.part = run, run.folder, run.folder / ".saving"
        self.group, self.thread, self.pending = dist.new_group(backend="gloo"), ThreadPoolExecutor(1), None

    def save(self, step):
        """Returns the seconds that the steps stood still for it."""
        start, run = time.perf_counter(), self.run
        self.wait()                                                         # one at a time
        if run.place.rank == 0:
            shutil.rmtree(self.part, ignore_errors=True)                    # what a killed run has left
        dist.barrier()                                                      # collective
        state = {"model": run.model.state_dict(), "optimizer": get_optimizer_state_dict(run.model, run.optimizer),
                 "ema": run.ema.weights | dict(run.model.named_buffers())}  # with buffers it is a whole model: export
        written = dcp.async_save(state, checkpoint_id=self.part, process_group=self.group)
        self.pending = self.thread.submit(self.finish, written, step)
        return time.perf_counter() - start

    def wait(self):
        """Until what is being saved is whole, or for good is not: then why."""
        return self.pending and self.pending.result()

    def finish(self, written, step):
        """In its thread: gives what is written its name.  A failure, a full disk say, is told and does not end the run:
        the next save tries again."""
        config, leads = self.run.config, self.run.place.rank == 0
        try:
            written.result()
            if leads:
                self.name(f"step-{step:07d}")
        except (CheckpointException, OSError) as error:
            free = shutil.disk_usage(self.folder).free / 2**30
            failed = f"step {step} could not be saved: {cause(error)}, {free:.1f} GiB of the disk are free"
            if leads:
                shutil.rmtree(self.part, ignore_errors=True)                # makes room
                again = min((step // config.save_every + 1) * config.save_every, config.steps)
                print(f"\n{failed} - {latest(self.folder) or 'none before it'} is whole"
                      + f"; the next save is tried at step {again}" * (step < config.steps), file=sys.stderr)
            return failed

    def name(self, name):
        folder, config = self.folder / name, self.run.config
        shutil.rmtree(folder, ignore_errors=True)                           # a checkpoint that `latest` never named
        self.part.replace(folder)
        write_text(self.folder / "latest", name)
        # `latest` set back by hand leaves checkpoints past this one: they do not count, and are overwritten one by one
        for old in sorted(p for p in self.folder.glob("step-*") if p <= folder)[:-config.keep_last]:
            shutil.rmtree(old)
        export(folder, self.folder / "model.safetensors")


def cause(error):
    """Why a save or load failed.  Of a CheckpointException, which is no Exception: what it wraps, of one rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if "[enforce fail at inline_container" in str(error):                   # torch.save's words for a full disk
        return "a file came out shorter than what was written to it"
    return str(error) or type(error).__name__


def latest(folder):
    """The path of a run's last whole checkpoint, or None."""
    file = Path(folder) / "latest"
    if not file.is_file():
        return None
    name, there = file.read_text("utf-8").strip(), sorted(path.name for path in file.parent.glob("step-*"))
    if name not in there:
        raise ValueError(f"{file} says {name!r}, expected one of {', '.join(there) or 'no checkpoints'}")
    return file.with_name(name)


def step_of(checkpoint):
    return int(checkpoint.name.removeprefix("step-"))


def load_state(run, checkpoint, optimizer=True):
    """Reads weights, EMA and, if asked, the optimizer's state; its lr and decay stay the config's.

    What other ranks wrote, cut among another number of GPUs, is read by whoever needs it now."""
    state = {"model": run.model.state_dict(), "ema": run.ema.weights}       # the tensors themselves: filled in place
    if optimizer:
        state["optimizer"] = get_optimizer_state_dict(run.model, run.optimizer)
    try:
        dcp.load(state, checkpoint_id=checkpoint)
    except CheckpointException as error:
        raise ValueError(f"{checkpoint} cannot be read: {cause(error)} - write the name of an older checkpoint into "
                         f"{checkpoint.parent / 'latest'}, or start over with another --out") from error
    if optimizer:
        set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"])
        for group in run.optimizer.param_groups:
            group.update(weight_decay=run.config.weight_decay)


def export(checkpoint, path):
    """The EMA of a checkpoint as one file, whole, in fp32, as sample.py and --init read it.  No collective: a thread of
    rank 0 does it, from the files, while the steps go on."""
    held = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    ema = {name: torch.empty(of.size) for name, of in held.items() if name.startswith("ema.")}
    warnings.filterwarnings("ignore", "torch.distributed is disabled")      # as no_dist asks for
    dcp.load(ema, checkpoint_id=checkpoint, no_dist=True)
    with naming(path), atomic_write(path) as part:
        save_file({name.removeprefix("ema."): value for name, value in ema.items()}, part)


def write_text(path, text):
    with naming(path), atomic_write(path) as part:
        part.write_text(text, "utf-8")


@contextmanager
def naming(path):
    """An error of writing, a full disk say, names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error


# ---------------------------------------------------------------- is it the same run that goes on?
# When a run goes on: what its next losses do not hang on, or by rounding only. With another lr, mask or seed they would
# not be what config.py and the log say; whoever wants that says --allow-changes.
FREE_TO_CHANGE = {
    "steps", "data", "num_workers", "read_timeout", "max_bad", "cache", "checkpointing", "compile", "shard", "sp",
    "accumulation", "out", "init", "init_optimizer", "save_every", "keep_last", "sample_every", "prompts",
    "validate_every"}


def check_changes(config, read, allowed, say):
    """Raises ValueError where a run's config, or what it read (fingerprint), was another before, unless allowed."""
    folder = Path(config.out)
    old, clips = configs.load(folder / "config.py"), folder / "clips.txt"
    pairs = {f.name: (getattr(old, f.name), getattr(config, f.name)) for f in fields(config)}
    changes = {name: f"{name} {before!r} -> {now!r}" for name, (before, now) in pairs.items() if before != now}
    if clips.is_file() and (before := clips.read_text("utf-8").partition("\n")[0]) != read:
        changes["clips"] = f"the clips or networks: {before} -> {read}"
    if changes:
        say("changed since the last start: " + ", ".join(changes.values()))
    refused = ", ".join(text for name, text in changes.items() if name not in FREE_TO_CHANGE)
    if refused and not (allowed and old.model == config.model):
        raise ValueError(f"{latest(folder)} would go on otherwise than it began: {refused} - undo that, or start over "
                         "with another --out" + ", or add --allow-changes" * (old.model == config.model))


def fingerprint(meta, vae, text_encoder):
    """One line that tells clips (paths, sizes and order, not the folder that they are in) and networks from others: a
    row more in meta.csv, and step n would see other clips."""
    digest = 0
    for name in ("key", "num_frames", "height", "width", "fps", "text_size"):
        digest = zlib.crc32(np.ascontiguousarray(meta[name]), digest)
    nets = "".join(weights_name(net.state_dict()) for net in (vae.net, text_encoder.net))
    return f"{len(meta)} clips, checksum {digest:08x}, networks {zlib.crc32(nets.encode()):08x}"


# ---------------------------------------------------------------- seeing
# What is averaged over clips is first added up in a Counter: ("clips" | "loss" | "mse" | "vb", group) -> sum, a group
# being "all", a quarter 0 to 3 of t, or a bucket's kind. fp32 losses add up in fp64 without rounding: whichever clips
# a rank or a part of a batch has, the means are the same.
def add_clips(sums, terms, t, *groups):
    """terms and t: of loss_of.  A sync."""
    columns = [terms["loss"], terms["mse"], terms["vb"], t.to(terms["loss"])]
    for loss, mse, vb, time_ in torch.stack(columns, dim=1).tolist():
        for group in ("all", int(time_) // 250, *groups):
            sums.update({("clips", group): 1, ("loss", group): loss, ("mse", group): mse, ("vb", group): vb})


def over_ranks(sums):
    """The sums of all ranks' Counters; a collective."""
    total = Counter()
    for part in gather([sums]):
        total.update(part)
    return total


def mean(sums, name, group="all"):
    """None without a clip: all steps of a line may have been skipped."""
    return sums[name, group] / sums["clips", group] if sums["clips", group] else None


class Log:
    """Averages since the last line over all ranks: loss, mse, vb, loss by quarter of t; clips, tokens, decoded frames a
    second, TFLOP/s of a GPU, the shares of the time spent waiting for data and for saves; and bad_clips.csv."""

    def __init__(self, run, first):
        config, self.place, self.cost = run.config, run.place, run.config.cost
        leads = run.place.rank == 0 and run.folder.is_dir()                 # tests/bench_train.py has no folder
        self.file, old = open_log(run.folder / "log.jsonl", first) if leads else (None, [])
        self.recent = deque((row.get("loss") for row in old), SPIKE_WINDOW)
        self.bad = BadClips(run.folder / "bad_clips.csv", config.max_bad, writes=leads)
        self.bar = tqdm(total=config.steps, initial=first, desc=str(run.folder), unit="step", disable=not leads)
        self.board = None
        self.restart()
        with suppress(ImportError):                                         # TensorBoard, where it is installed
            if leads:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(run.folder, purge_step=first + 1)

    def restart(self):
        """A line begins."""
        self.sums, self.faults, self.saving, self.start = Counter(), [], 0.0, time.perf_counter()

    def add(self, batch, answers):
        """A step: its batch, and of each part the terms and t, [B] each, and the number of captions that were cut."""
        if not self.place.reads:                                            # of ranks that share clips one counts them
            return
        clips, (tokens, flop) = len(batch["slots"]), self.cost(batch["bucket"])
        self.sums.update(decoded=batch["decoded"], waited=batch["waited"], faults=len(batch["faults"]),
                         tokens=tokens * clips, flop=flop * clips)
        self.faults += batch["faults"]
        for terms, t, cut in answers:
            self.sums.update(captions_cut=cut)
            add_clips(self.sums, terms, t)                                  # sync

    def line(self, step, **more):
        """grad_norm, lr and bucket in `more` are of the step itself, no averages."""
        sums, seconds = over_ranks(self.sums), time.perf_counter() - self.start        # collective
        rate = lambda name: sums[name] / seconds
        row = dict(step=step, loss=mean(sums, "loss"), mse=mean(sums, "mse"), vb=mean(sums, "vb"),
                   loss_by_t=[mean(sums, "loss", quarter) for quarter in range(4)], **more,
                   clips_per_s=rate(("clips", "all")), tokens_per_s=rate("tokens"), decoded_per_s=rate("decoded"),
                   tflop_per_s=rate("flop") / self.place.world / 1e12,
                   data_wait=rate("waited") / self.place.num_data_ranks,
                   save_wait=self.saving / seconds, captions_cut=sums["captions_cut"],
                   gib=peak_gib())
        faults = gather(self.faults) if sums["faults"] else []              # collective
        self.bad.add(faults, sums["clips", "all"])                          # the same on all ranks, as is its error
        self.restart()
        if self.file:
            row |= {"spike": is_spike(row["loss"], self.recent), "faults": self.bad.faults}
            self.recent.append(row["loss"])
            with naming(self.file.name):
                print(json.dumps(row), file=self.file, flush=True)
            self.show(row)

    def show(self, row):
        if row["spike"]:
            self.bar.write(f"step {row['step']}: loss {row['loss']:.4f} is a spike, its median was "
                           f"{median(self.recent):.4f}; bucket {row['bucket']}")
        self.bar.update(row["step"] - self.bar.n)
        number = lambda x: "-" if x is None else f"{x:.3f}"
        self.bar.set_postfix_str(" | ".join([
            f"loss {number(row['loss'])}", "by t " + " ".join(map(number, row["loss_by_t"])),
            f"grad {row['grad_norm']:.2f}", f"lr {row['lr']:.1e}", "{} x {}".format(*row["bucket"]),
            f"{row['clips_per_s']:.1f} clips/s", f"{row['tokens_per_s']:,.0f} tokens/s",
            f"{row['tflop_per_s']:.2f} TFLOP/s",
            f"data {row['data_wait']:.0%}", f"save {row['save_wait']:.0%}",
            *([f"{row['gib']:.1f} GiB"] if row["gib"] else [])]))
        for name, value in row.items() if self.board else ():
            if isinstance(value, (int, float)):
                self.board.add_scalar(name, value, row["step"])


# Lines of the log, and how many times their median distance from their median a spike is off it: 6.7 standard
# deviations of normal noise. By hand: false alarms (none in 500 draws, tests/test_train.py) against spikes unmarked.
SPIKE_WINDOW, SPIKE = 50, 10


def is_spike(loss, recent):
    """Whether a loss is far above those before it; not told from fewer than ten.

    Medians, as an earlier spike among `recent` would drag a mean along and hide the next."""
    recent = [x for x in recent if x is not None]
    if loss is None or len(recent) < 10:
        return False
    middle = median(recent)
    return loss > middle + SPIKE * median(abs(x - middle) for x in recent)


def peak_gib():
    """The most of this GPU's memory so far; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None


def open_log(path, first):
    """The log, to be appended to, and its rows.  Lines of steps that will be taken again are cut off, and what a killed
    run has left of one."""
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= first:
                kept.append(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} line {number}: {line.strip()!r}, expected JSON with a step, as this file began - "
                             "mend or remove the line") from error
    write_text(path, "".join(kept))
    return open(path, "a", encoding="utf-8"), list(map(json.loads, kept))


class Validation:
    """The loss on held-out clips: the same clips, windows, noises and t each time and in each run; captions are not
    dropped, frames not given.  A line of validation.jsonl: loss, loss_by_t (quarters), loss_by_bucket."""

    def __init__(self, config, meta, place, first, encode):
        model = replace(config.model, class_dropout_prob=0.0)
        self.config = replace(config, model=model, seed=0, speed=False, mask_ratios={"mask_no": 1.0}, cache="",
                              windows=0)
        sampler = BucketSampler(meta, self.config, validation=True)
        clips = partial(batches, sampler, ClipDataset(meta, self.config, validation=True), 0, VALIDATION_BATCHES)
        self.kinds = sorted({bucket[:2] for bucket in sampler.numbered})
        keep = lambda value: value.cpu() if torch.is_tensor(value) else value       # a GPU's memory is for training
        self.batches = [{name: keep(v) for name, v in encode(batch).items()} for batch in shared(clips, place)]
        self.file = open_log(Path(config.out) / "validation.jsonl", first)[0] if place.rank == 0 else None

    @torch.no_grad()
    def line(self, run, vectors, step):
        sums = Counter()
        for i, batch in enumerate(self.batches):
            terms, t = loss_of(run.model, batch, self.config, vectors, i, run.place.device)
            add_clips(sums, terms, t, batch["bucket"][:2])                  # sync
        sums = over_ranks(sums)                                             # collective
        if self.file:
            seen = [kind for kind in self.kinds if sums["clips", kind]]
            row = {"step": step, "loss": mean(sums, "loss"), "loss_by_t": [mean(sums, "loss", i) for i in range(4)],
                   "loss_by_bucket": {f"{level} x {t}": mean(sums, "loss", (level, t)) for level, t in seen}}
            with naming(self.file.name):
                print(json.dumps(row), file=self.file, flush=True)


def preview(run, vae, text_encoder, step):
    """samples/step-0000500.png: one row of frames per prompt, sampled with the EMA; 50 steps, half of sample.py's."""
    config, (num_frames, height, width) = run.config, default_bucket(run.config.trained)
    run.ema.swap()
    videos = generate(run.model, vae, text_encoder, list(config.prompts), num_frames=num_frames, height=height,
                      width=width, fps=config.fps, frame_interval=config.frame_interval, steps=50,
                      prediction=config.prediction, cfg_scale=config.cfg_scale, seed=config.seed,
                      quirks=PUBLISHED if config.model.as_released else SampleQuirks())
    run.ema.swap()
    if run.place.rank == 0:
        write_video(run.folder / "samples" / f"step-{step:07d}.png", rearrange(videos, "b t h w c -> (b t) h w c"))


# ---------------------------------------------------------------- between the ranks
def highest(number):
    """Of all ranks; a collective."""
    number = torch.tensor(number)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def gather(items):
    """The items of all ranks, in one list: a collective."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return sum(parts, [])


def rank0_first(make):
    """make() on rank 0, then on the others, which find what it wrote or downloaded."""
    if dist.get_rank() == 0:
        made = make()
    dist.barrier()
    return made if dist.get_rank() == 0 else make()


# ---------------------------------------------------------------- the command line
def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python train.py CONFIG [options] [--field=value ...]", description=__doc__,
        epilog="any field of the config is --field=value, as in --lr=1e-5:\n\n" + configs.fields_text())
    parser.add_argument("config", metavar="CONFIG", help="configs/tiny.py, or the config.py of a run")
    add = parser.add_argument_group("instead of training").add_argument
    add("--print", action="store_true", help="the config, as a file that can be run")
    add = parser.add_argument_group("training").add_argument
    add("--plain", action="store_true", help="each op as PyTorch has it: slower, takes more memory")
    add("--allow-changes", action="store_true", help="go on with another config or other clips")
    add("--debug", action="store_true", help="errors with their traceback")
    return parser.parse_known_args(argv)


def main(argv=None):
    args, overrides = parse_args(argv)
    with one_line_errors(args.debug, "; the same command goes on from the last checkpoint, if there is one"):
        config = configs.load(args.config, overrides)
        if args.print:
            print(configs.dump(config), end="")
        elif number := train(config, args.allow_changes, args.plain):
            sys.exit(128 + number)                                          # as a shell tells of a signal


if __name__ == "__main__":
    from train import main; main()
