"""Trains the ST-DiT, on clips or on their cached latents.

    python train.py configs/tiny.py                                     moving shapes, 10 to 15 minutes on 2 CPU cores
    torchrun --nproc-per-node 8 train.py configs/stage1.py --data=clips/meta.csv
    python -m configs.plan configs/stage2.py --gpus 64 --gpu h800       what a run would cost, before a GPU is rented

Writes <run>/config.py, clips.txt, log.jsonl, validation.jsonl, bad_clips.csv, samples/step-0000500.png, step-0000500/
(weights, their moving average (EMA) and optimizer state, sharded) and model.safetensors (the EMA).  The same command
resumes from the last checkpoint; another --out starts a new run.  The ranks share a file system.

Papers: DDPM (arXiv 2006.11239), improved DDPM (2102.09672), v-prediction (2202.00512), SpeeD (2405.17403),
ZeRO (1910.02054), activation checkpointing (1604.06174).
"""
# The first half of this file is the recipe, in the order of a step: the loss, one batch, the model with its optimizer
# and average, the loop.  The second half is what a long run needs: checkpoints, the log, validation, the command line.
# Which clips, windows (the frames taken from a clip), noise, t, masks and caption drops a step sees depends only on
# the seed, the step and the slot, a clip's place in the global batch.  So a run that is resumed sees the same, also on
# another number of GPUs.  A line marked "collective" waits for all ranks, one marked "sync" for the GPU.
import argparse
import json
import math
import re
import shutil
import signal
import sys
import time
import warnings
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
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
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import configs
from data import (BadClips, BucketSampler, ClipDataset, atomic_write, batches, global_batch_size, one_line_errors,
                  read_meta, slot_generator, to_video, uniform, write_video)
from kernels import Place, all_frames, own_frames, sequence_parallel, start_processes, use
from masks import draw_mask
from model import (STDiT, check_weights, check_whole, from_pixart, is_pixart, load_shards, read_step,
                   read_weights)
from sample import default_bucket, generate, noise_schedule
from vae import fetch, find, fingerprint as weights_name, load_text_encoder, load_vae, remember, write_cache

LOG_EVERY = 10              # steps, as upstream's log_every
VALIDATION_BATCHES = 8      # global batches of held-out clips


# ---------------------------------------------------------------- the loss
# DDPM noises x_0 to x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps, where abar, alphas_cumprod in the code, falls from
# 0.9999 at t = 0 to 4e-5 at t = 999, and learns to predict eps from x_t.  In improved DDPM the model also predicts the
# variance of each step back, which a variational bound trains.  The papers count t from 1, the code from 0: at t = 0,
# "x_t" is their x_1 and "x_t-1" their x_0.
def diffusion_vectors(alphas_cumprod):
    """Returns what the loss reads at t: vectors [1000] from abar, by the names of improved DDPM's code.

    They are computed in fp64: in fp32 differences of numbers near 1 would lose their digits."""
    abar = alphas_cumprod.double()
    abar_prev = torch.cat([abar.new_ones(1), abar[:-1]])
    beta = 1 - abar / abar_prev
    posterior_variance = beta * (1 - abar_prev) / (1 - abar)                # 0 at t = 0: replaced by that of t = 1
    log_low = torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log()
    return {
        # x_t of x_0 and eps: DDPM, eq. 4
        "sqrt_alphas_cumprod": abar.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - abar).sqrt(),
        # x_0 recovered from x_t and eps: eq. 15, x_t / sqrt(abar) - sqrt(1 / abar - 1) eps
        "sqrt_recip_alphas_cumprod": (1 / abar).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / abar - 1).sqrt(),
        # the mean of q(x_t-1 | x_t, x_0): eq. 7, coef1 x_0 + coef2 x_t
        "posterior_mean_coef1": beta * abar_prev.sqrt() / (1 - abar),
        "posterior_mean_coef2": (1 - abar_prev) * (1 - beta).sqrt() / (1 - abar),
        # the predicted log variance lies between those of the posterior (eq. 7) and beta (improved DDPM, eq. 15)
        "log_variance_low": log_low,
        "log_variance_span": beta.log() - log_low,
    }


def at_time(vector, t, x):
    """Returns the values of a vector [1000] at t, [B] or for each frame [B T], shaped to multiply x [B C T h w]."""
    values = vector[t].to(x)
    if t.ndim == 1:
        return rearrange(values, "b -> b 1 1 1 1")
    return rearrange(values, "b t -> b 1 t 1 1")


def q_sample(vectors, x_0, t, noise):
    """Returns x_t of x_0 [B C T h w] (DDPM, eq. 4) at t [B T]: each frame has its own time."""
    signal_share = at_time(vectors["sqrt_alphas_cumprod"], t, x_0)
    noise_share = at_time(vectors["sqrt_one_minus_alphas_cumprod"], t, x_0)
    return signal_share * x_0 + noise_share * noise


def diffusion_loss(vectors, out, x_0, x_t, noise, t, x_mask, prediction="eps"):
    """Returns L_simple + lambda L_vlb (improved DDPM, eq. 16) per clip: {"loss", "mse", "vb"} [B].

    L_vlb is a sum over 1000 values of t.  One is drawn, so its term counts 1000 times, and lambda is 0.001: the term
    has weight 1.  vb is in bits per value.
    out [B 2C T h w]: eps or v, then the variance channels.  x_mask [B T]: only noised frames count; a clip without one
    has loss 0.  The gradient of the bound reaches the variance channels only (ibid., section 3.1)."""
    predicted, variance = out.float().chunk(2, dim=1)
    target = noise
    eps = predicted
    if prediction == "v":
        a = at_time(vectors["sqrt_alphas_cumprod"], t, x_0)
        s = at_time(vectors["sqrt_one_minus_alphas_cumprod"], t, x_0)
        target = a * noise - s * x_0                                        # 2202.00512, section 4
        eps = a * predicted + s * x_t                                       # ibid., appendix D
    mse = mean_of_noised((predicted - target) ** 2, x_mask)
    vb = mean_of_noised(variational_bits(vectors, x_0, x_t, eps.detach(), variance, t), x_mask)
    return {"loss": mse + vb, "mse": mse, "vb": vb}


def mean_of_noised(error, x_mask):
    """Returns the mean [B] of error [B C T h w] over frames with x_mask [B T]; 0 if there are none (upstream: NaN)."""
    per_frame = reduce(error, "b c t h w -> b t", "mean") * x_mask
    return per_frame.sum(1) / x_mask.sum(1).clamp(min=1)


def variational_bits(vectors, x_0, x_t, eps, variance, t):
    """Returns a term of L_vlb [B C T h w] in bits (improved DDPM, eqs. 4 to 6).

    It is the KL divergence from q(x_t-1 | x_t, x_0), the true step back, to the model's; at t = 0 the decoder's
    -log p(x_0 | x_1) (DDPM, section 3.3)."""
    def posterior_mean(x):
        coef1 = at_time(vectors["posterior_mean_coef1"], t, x_0)
        coef2 = at_time(vectors["posterior_mean_coef2"], t, x_0)
        return coef1 * x + coef2 * x_t

    recip = at_time(vectors["sqrt_recip_alphas_cumprod"], t, x_0)
    recipm1 = at_time(vectors["sqrt_recipm1_alphas_cumprod"], t, x_0)
    x_0_hat = recip * x_t - recipm1 * eps
    mean = posterior_mean(x_0_hat)
    true_mean = posterior_mean(x_0)
    # The variance channels choose between the bounds: -1 is the lower one, 1 the upper (improved DDPM, eq. 15).
    more = (variance + 1) / 2 * at_time(vectors["log_variance_span"], t, x_0)
    log_var = at_time(vectors["log_variance_low"], t, x_0) + more           # the true one is log_variance_low
    kl = 0.5 * (more - 1 + (-more).exp() + (true_mean - mean) ** 2 * (-log_var).exp())      # of two Gaussians
    nll = -discretised_log_likelihood(x_0, mean, 0.5 * log_var)
    return torch.where(rearrange(t, "b -> b 1 1 1 1") == 0, nll, kl) / math.log(2)


def discretised_log_likelihood(x, mean, log_scale):
    """Returns the log of a Gaussian's mass in a bin of width 2/255 around x (eq. 13 of DDPM); the outermost are open.

    Bins are for pixels of 8 bits.  Latents have none, but Open-Sora copied this from improved DDPM's code, with the
    tanh (GELU's, 1606.08415), 0.999 and 1e-12, and we keep its loss.  It is used at t = 0 only."""
    inverse = torch.exp(-log_scale)
    above = gaussian_cdf((x - mean + 1 / 255) * inverse)
    below = gaussian_cdf((x - mean - 1 / 255) * inverse)
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


def gaussian_cdf(u):
    return 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (u + 0.044715 * u ** 3)))


def speed_probabilities(vectors):
    """Returns SpeeD's distribution of t [1000] (arXiv 2405.17403) as Open-Sora 1.1's speed.py computes it.

    Values of t where sqrt(1 - abar) still grows by more than 1e-4 per step (t < 641) are 5 times as frequent: above,
    x_t is almost pure noise, and there is little to learn."""
    growth = torch.gradient(vectors["sqrt_one_minus_alphas_cumprod"].double())[0]
    p = torch.tanh(1e6 * (growth - 1e-4)) + 1.5                             # tanh: -1 or 1, except at 638..644
    return p / p.sum()


def draw_t(config, vectors, step, slots):
    """Returns t [B], uniform over 0..999 unless config.speed.

    With SpeeD the clip of an odd slot takes the dual of the t of the slot before it: 700 - t, or from 700 on t - 700.
    The 700 is Open-Sora's; there the growth falls below 5e-5."""
    if not config.speed:
        return torch.from_numpy(uniform(config.seed, step, slots, "t") * 1000).long()
    u = torch.from_numpy(uniform(config.seed, step, slots // 2, "t"))
    t = torch.searchsorted(speed_probabilities(vectors).cumsum(0).cpu(), u).clamp(max=999)          # sync
    dual = torch.where(t < 700, 700 - t, t - 700)
    return torch.where(torch.as_tensor(slots) % 2 == 1, dual, t)


# ---------------------------------------------------------------- one batch
def to_latents(batch, vae, text_encoder, group=None):
    """Replaces the pixels and texts of a batch by mean, std [B C T h w], y [B L C] and y_mask [B L], as in a cache.

    The VAE gives a Gaussian for each value of a latent: we keep its mean and std, and loss_of draws from it.  The ranks
    of a group, which share the clips, encode some frames each."""
    if "video" in batch:
        video = batch.pop("video")                                          # uint8 [B T H W 3]
        T = video.shape[1]
        local = to_video(own_frames(video, T, group).to(vae.device))
        mean, std = vae.moments(local)
        batch["mean"] = all_frames(mean, T, group, dim=2)                   # collective
        batch["std"] = all_frames(std, T, group, dim=2)
        num_cut = text_encoder.num_cut
        batch["y"], batch["y_mask"] = text_encoder(batch.pop("text"))
        batch["captions_cut"] = text_encoder.num_cut - num_cut
    return batch


def loss_of(model, batch, config, vectors, step, device):
    """Returns the losses per clip {"loss", "mse", "vb"} and t, all [B].

    All that is random is drawn here, on the CPU, from (seed, step, slot): the same on any device and however the batch
    is split."""
    slots = batch["slots"].numpy()                                          # [B]
    shape = batch["mean"].shape[1:]                                         # C T h w
    generators = [slot_generator(config.seed, step, int(slot), "noise") for slot in slots]
    x_mask = torch.stack([draw_mask(shape[1], config.mask_ratios, g) for g in generators])          # [B T]
    latent_noise, noise = torch.stack([torch.randn(2, *shape, generator=g) for g in generators]).to(device).unbind(1)
    t = draw_t(config, vectors, step, slots)
    # Some captions are dropped: the model learns to do without, as guidance needs (2207.12598).
    drop = torch.from_numpy(uniform(config.seed, step, slots, "drop") < config.model.class_dropout_prob)
    y_mask = batch["y_mask"].cpu() | drop[:, None]                          # the null caption: all its tokens count
    all_noised = bool(x_mask.all())                                         # known on the CPU: no sync

    x_mask = x_mask.to(device)
    t = t.to(device)
    drop = drop.to(device)
    y = batch["y"].to(device)
    y = torch.where(drop[:, None, None], model.null_y.to(y.dtype), y)
    x_0 = batch["mean"].to(device) + batch["std"].to(device) * latent_noise     # a fresh draw of the latents
    x_t = q_sample(vectors, x_0, torch.where(x_mask, t[:, None], 0), noise)     # given frames are at t = 0, as upstream
    conditioning = {name: batch[name].to(device) for name in ("height", "width", "num_frames", "ar", "fps")}
    out = model(x_t, t, y, y_mask, x_mask=None if all_noised else x_mask, **conditioning)
    losses = diffusion_loss(vectors, out, x_0, x_t, noise, t, x_mask, config.prediction)
    if config.speed:    # upstream's weight of the squared error: 1 - abar = 1 / (1 + SNR), "P2" (2204.00227), gamma = 1
        weight = (vectors["sqrt_one_minus_alphas_cumprod"][t] ** 2).to(x_0)
        losses["loss"] = losses["mse"] * weight + losses["vb"]
    return losses, t


def split_batch(batch, num_parts):
    """Returns a batch's clips in micro-batches, dicts of what loss_of needs."""
    by_clip = {name: value for name, value in batch.items() if name not in ("bucket", "faults", "decoded", "waited")}
    return [{name: value[i::num_parts] for name, value in by_clip.items()} for i in range(num_parts)]


# ---------------------------------------------------------------- model, average, optimizer
class Run(NamedTuple):
    """What the steps work on."""
    config: configs.Config
    place: Place
    model: STDiT
    ema: STDiT
    optimizer: torch.optim.Optimizer
    vectors: dict

    @property
    def folder(self):
        return Path(self.config.out)


def make_run(config, place):
    """Returns a Run with fresh weights."""
    model = build_model(config, place)
    model.init_weights(config.seed)                                         # the same values however it is sharded
    ema = build_model(config, place).requires_grad_(False)
    copy_weights(model, ema)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, config.lr, weight_decay=config.weight_decay, fused=True)
    vectors = {name: v.to(place.device) for name, v in diffusion_vectors(noise_schedule().alphas_cumprod).items()}
    return Run(config, place, model, ema, optimizer, vectors)


def build_model(config, place):
    """Returns an STDiT with uninitialised fp32 weights, sharded block by block (FSDP2).

    It computes in config.dtype.  Each GPU keeps its part of the weights, of the gradients, of Adam's two moments and of
    the EMA (ZeRO stage 3); a block's weights are gathered while it computes.  Checkpointing, compiling, sharding and
    sequence parallelism are applied to the finished model, so that its forward does not know of them."""
    with torch.device("meta"):                                              # no GPU has to hold all of the weights
        model = STDiT(config.model)
    checkpoint_blocks(model, config.checkpointing)
    # Weights are gathered in config.dtype, which in bf16 halves the traffic; gradients are added up in fp32, because
    # small ones would be lost in a bf16 sum.  Inputs are not cast: in bf16 t = 500 and 501 are the same number.
    policy = MixedPrecisionPolicy(config.torch_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    shard = partial(fully_shard, mesh=place.mesh, mp_policy=policy)
    for block in model.blocks:
        if config.compile:
            block.compile()
        shard(block, reshard_after_forward=block is not model.blocks[-1])   # backward starts with the last: keep it
    shard(model)                                                            # what is not in a block
    if place.group:
        sequence_parallel(model, place.group)
    return model.to_empty(device=place.mesh.device_type)


def checkpoint_blocks(model, every):
    """Lets every `every`-th block keep only its input and recompute the rest in backward (1604.06174); 0: none."""
    for block in model.blocks[::every] if every else ():                    # no dropout in there: no RNG to preserve
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)


def local_parts(tensors):
    """Returns the parts of sharded tensors that this rank holds."""
    return [tensor.to_local() for tensor in tensors]


@torch.no_grad()
def copy_weights(source, target):
    for ours, theirs in zip(local_parts(target.parameters()), local_parts(source.parameters())):
        ours.copy_(theirs)
    for ours, theirs in zip(target.buffers(), source.buffers()):
        ours.copy_(theirs)


@torch.no_grad()
def update_average(run, step):
    """Moves the EMA of the weights, which is what is sampled from (DDPM, appendix B), towards the weights.

    From fresh weights the decay grows as (1 + step) / (10 + step), so that the random initial weights are forgotten
    quickly (TensorFlow's rule); from trained ones it is constant, as Open-Sora's.  The average is kept in fp32, because
    in bf16 a change of 1e-4 would be lost."""
    decay = run.config.ema_decay
    if not run.config.init:
        decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(local_parts(run.ema.parameters()), local_parts(run.model.parameters()), 1 - decay)


def reshard(model):
    """Frees the gathered weights that a forward without a backward leaves behind."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# ---------------------------------------------------------------- the weights that a run starts from
def find_weights(name):
    """Returns the path of the weights that a run starts from: a file or folder, else downloaded from the hub."""
    path = Path(find(name))
    if path.is_file() or path.is_dir() and any(path.iterdir()):
        return path
    missing = (f"init={str(name)!r} does not exist, expected a run's folder or one of its steps, a model.safetensors, "
               "a .pth, a folder of Open-Sora's weights, or their name on the hub: owner/repository, or "
               "owner/repository/file.pth")
    repository, _, file = str(name).rpartition("/")
    if repository.count("/") == 1:                                          # one file of a repository
        return fetch(repository, [file], missing) / file
    files = ["config.json", "model*.safetensors", "model.safetensors.index.json", "transformer/config.json"]
    return fetch(name, files, missing)                                      # the last shows the layout of diffusers


def start_from(run, path):
    """Loads the weights that a run starts from.

    A run, or one of its steps, gives weights and EMA, and with config.init_optimizer Adam's state too.  A file gives
    weights, which also become the EMA."""
    config = run.config
    last = path if is_step(path) else latest(path)
    run.place.say(f"starts from {last or path}")
    if last:
        old = configs.load(last.parent / "config.py").model
        if replace(old, class_dropout_prob=config.model.class_dropout_prob) != config.model:
            raise ValueError(f"init={str(path)!r} holds {old}, expected {config.model}")
        load_state(run, last, config.init_optimizer)
        return
    if config.init_optimizer:
        raise ValueError(f"init_optimizer=True: {path} holds weights only, expected a run's folder with checkpoints")
    is_published = (path / "config.json").is_file() and not (path / "config.py").is_file()
    if is_published and not config.model.as_released:
        run.place.say("note: Open-Sora's weights were trained with --model.as_released=True, which is off here")
    load_weights(run.model, path, config.seed)
    copy_weights(run.model, run.ema)


def load_weights(model, path, seed=0):
    """Loads weights of a file or folder into a sharded model; what PixArt-alpha's lack is drawn from the seed."""
    weights = read_weights(path)
    if is_pixart(weights):
        weights = from_pixart(weights, model.config, seed, path)
    check_weights(model, weights, path)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True))               # collective


# ---------------------------------------------------------------- the loop
def train(config, allow_changes=False, plain=False):
    """Trains to config.steps; returns 0, or the number of the signal that stopped it after a checkpoint."""
    place = start_processes(config.shard, config.sp)
    place.say(use(place.device, plain))
    patient = dist.new_group(backend="gloo", timeout=timedelta(weeks=4))    # waits while one rank works for hours
    meta = rank0_first(patient, read_meta, config.data)                     # rank 0 saves the table
    sampler = BucketSampler(meta, config)
    place.say(sampler.table())
    folder = open_folder(config, place)
    lock = on_rank0(patient, lock_folder, folder)
    try:
        return train_in_folder(config, place, patient, meta, sampler, allow_changes)
    finally:
        if lock:
            lock.close()


def train_in_folder(config, place, patient, meta, sampler, allow_changes):
    """Trains in a folder that is this run's; see train.  patient: a group of all ranks whose timeout is weeks."""
    folder = Path(config.out)
    last = latest(folder)
    first = step_of(last) if last else 0
    init = rank0_first(patient, find_weights, config.init) if config.init and not last else None
    vae = rank0_first(patient, load_vae, config.vae, config.torch_dtype, place.device)              # rank 0 downloads
    text_encoder = rank0_first(patient, load_text_encoder, config.text_encoder, config.model.model_max_length,
                               config.torch_dtype, place.device, config.model.as_released)
    inputs = fingerprint(meta, vae, text_encoder)
    if last:
        check_changes(config, last, inputs, allow_changes, place.say)
    if first >= config.steps:
        place.say(f"{last}: all {config.steps} steps are done; --steps=N continues to N, another --out is a new run")
        if place.rank == 0:                                                 # it may have been killed just before this
            export(last)
        return 0
    if place.rank == 0:
        write_text(folder / "config.py", configs.dump(config))
        write_text(folder / "clips.txt", f"{inputs}\n{sampler.table()}\n")

    # The frozen networks run at every step or, with a cache, only once, here.  Previews need the embeddings of their
    # prompts alone: with these remembered, T5's 9 GiB can go.
    encode = partial(to_latents, vae=vae, text_encoder=text_encoder, group=place.group)
    validation = Validation(config, meta, place, first, encode) if config.validate_every else None
    prompts = remember(lambda encoder=text_encoder: encoder, config.prompts)
    dataset = ClipDataset(meta, config)
    if config.cache:
        dataset = write_cache(meta, config, vae, text_encoder, place.rank, place.world, patient)
        encode = dict
    del text_encoder

    run = make_run(config, place)
    if last:
        load_state(run, last)
    elif init:
        start_from(run, init)
    place.say(f"{sum(p.numel() for p in run.model.parameters()):,} parameters, {place.world} x {place.device.type}, "
              f"{config.dtype}, steps {first} to {config.steps}")
    log = Log(run, first)
    clips = read_for_group(partial(batches, sampler, dataset, first, config.steps, known=log.bad.known), place)
    try:
        return take_steps(run, first, clips, encode, log, validation, partial(preview, run, vae, prompts))
    finally:
        for number, usual in USUAL.items():
            signal.signal(number, usual)
        log.close()
        if validation:
            validation.close()


def take_steps(run, first, clips, encode, log, validation, show):
    """Takes a step for each batch of clips; returns 0, or the number of the signal that stopped it."""
    config = run.config
    place = run.place
    signals = note_signals(place.say)
    stop = 0
    unsaved = None
    for step, batch in enumerate(clips, start=first):
        losses, norm = train_step(run, step, batch, encode)
        log.add(batch, losses)                                              # sync
        done = step + 1
        stop = max_over_ranks(signals[0] if signals else 0)                 # collective: a signal to one stops all
        saves = done % config.save_every == 0 or done == config.steps or stop
        if done % LOG_EVERY == 0 or saves:      # lines cover the same steps after a resume
            log.write(done, grad_norm=norm, lr=learning_rate(config, step), bucket=batch["bucket"])
        if saves:
            unsaved = save(run, done)                                       # collective
        if config.prompts and config.sample_every and done % config.sample_every == 0:
            show(done)
        if validation and done % config.validate_every == 0:
            validation.write(run, done)
        if stop:
            break
    if unsaved:
        raise ValueError(f"{unsaved} - the same command resumes from {latest(run.folder) or 'the start'}")
    if stop:
        place.say(f"\nsaved step {done} and stopped; the same command resumes from there")
    return stop


def train_step(run, step, batch, encode=dict):
    """Takes an optimizer step on this rank's clips of a global batch.

    Returns [(losses per clip, t, captions that were cut)] of each micro-batch, and the norm of the gradient.  encode
    turns a micro-batch of pixels into latents."""
    config = run.config
    global_batch = global_batch_size(config, batch["bucket"])
    num_data_ranks = run.place.num_data_ranks
    num_parts = min(config.accumulation, global_batch // num_data_ranks)    # the same on every rank
    found = []
    for number, part in enumerate(split_batch(batch, num_parts), start=1):
        run.model.set_requires_gradient_sync(number == num_parts)           # gradients travel once a step
        part = encode(part)
        losses, t = loss_of(run.model, part, config, run.vectors, step, run.place.device)
        # FSDP takes the mean of the gradients over all ranks, we want the sum of their clips over the global batch.
        # Ranks that share a clip count as one: the mean of their gradients is the clip's (kernels.sequence_parallel).
        (losses["loss"].sum() * num_data_ranks / global_batch).backward()
        found.append((losses, t, part.get("captions_cut", 0)))
    trained = run.optimizer.param_groups[0]["params"]
    norm = torch.nn.utils.clip_grad_norm_(trained, config.grad_clip).full_tensor().item()      # collective, sync
    if not math.isfinite(norm):
        raise not_finite(step, batch["bucket"], found, config)              # collective
    run.optimizer.param_groups[0]["lr"] = learning_rate(config, step)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    update_average(run, step)
    return found, norm


def learning_rate(config, step):
    """Returns the constant rate, after a linear warm-up."""
    return config.lr * min(1, (step + 1) / max(1, config.warmup_steps))


def not_finite(step, bucket, found, config):
    """Returns the error of a step whose gradient is not finite, which names bucket, ranks and times."""
    odd = []
    for losses, times, _ in found:
        for loss, t in zip(losses["loss"].tolist(), times.tolist()):
            if not math.isfinite(loss):
                odd.append(f"rank {dist.get_rank()} loss {loss} at t = {t}")
    odd = gather(odd)                                                       # collective
    which = f"{len(odd)} losses are not: {', '.join(odd[:4])}" if odd else "all losses are"
    return ValueError(f"step {step}: the gradient of bucket {tuple(bucket)} is not finite, {which}; nothing of it is "
                      f"saved - an lr below {config.lr} or dtype fp32 may help")


def read_for_group(read, place):
    """Yields the batches of read(rank=, world=): the first rank of a group reads them and sends them to the others.

    If each rank read by itself, one could give up on a slow clip that another waits for, and they would train on
    different clips."""
    clips = read(rank=place.data_rank, world=place.num_data_ranks) if place.reads else iter(())
    while True:
        parcel = [next(clips, None)]
        if place.group:
            dist.broadcast_object_list(parcel, group=place.group, group_src=0)          # collective
        if parcel[0] is None:
            return
        yield parcel[0]


USUAL = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


def note_signals(say):
    """Returns a list that gets the number of a SIGTERM or SIGINT (Ctrl-C) when one comes; a second one acts as usual.

    The step is finished first: a rank that stopped within one would leave the others waiting in a collective.  torchrun
    gives its processes 30 s; if the step and the save take longer, the previous checkpoint remains the last one."""
    numbers = []

    def note(number, _):
        numbers.append(number)
        signal.signal(number, USUAL[number])
        say("\nstopping after this step; once more to stop at once")

    for number in USUAL:
        signal.signal(number, note)
    return numbers


# ---------------------------------------------------------------- the folder of a run
def open_folder(config, place):
    """Creates the folder of a run and returns it.  Raises ValueError on the ranks that do not see it."""
    folder = Path(config.out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out={config.out!r} is a file, expected a folder, or the name of a new one")
    if place.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()                                                          # collective
    if not folder.is_dir():
        raise ValueError(f"rank {place.rank} does not see {folder.absolute()}, which rank 0 has created: expected a "
                         "file system that all machines share")
    return folder


def lock_folder(folder):
    """Locks a run's folder and returns the file that holds the lock until it is closed.

    The system releases the lock when the process ends, also after SIGKILL and while its reading processes still live.
    Raises ValueError if another process trains in the folder."""
    file = open(folder / ".lock", "ab")
    try:
        import fcntl
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise ValueError(f"another process trains in {folder}: wait for it, or choose another --out") from None
    except (ImportError, OSError) as error:
        warnings.warn(f"{folder} cannot be locked ({error}): do not start a second run in it", stacklevel=2)
    return file


def is_step(path):
    return path.is_dir() and re.fullmatch(r"step-\d+", path.name) is not None


def step_of(path):
    return int(path.name.removeprefix("step-"))


def steps_in(folder):
    """Returns the checkpoints of a run, oldest first."""
    return sorted(filter(is_step, Path(folder).glob("step-*")), key=step_of)


def latest(folder):
    """Returns the path of a run's last checkpoint, or None."""
    found = steps_in(folder)
    return found[-1] if found else None


# ---------------------------------------------------------------- checkpoints
def save(run, step):
    """Writes <run>/step-0000500/ and model.safetensors; collective.  Returns None, or why it failed.

    Each rank writes its own shards (torch.distributed.checkpoint) into a folder with another name, which is renamed
    when all are there, so a folder named step-* is always complete.  A failure, such as a full disk, is printed and
    does not end the run: the next save tries again."""
    folder = run.folder
    part = folder / ".saving"
    if run.place.rank == 0:
        shutil.rmtree(part, ignore_errors=True)                             # what a killed run has left
    dist.barrier()                                                          # collective
    failed = None
    try:
        dcp.save(state_of(run), checkpoint_id=part)                         # collective
        if run.place.rank == 0:
            failed = finish(part, folder / f"step-{step:07d}", run.config.keep_last)
    except (CheckpointException, OSError) as error:
        free = shutil.disk_usage(folder).free / 2 ** 30
        failed = f"step {step} could not be saved: {cause(error)}, {free:.1f} GiB of the disk are free"
        if run.place.rank == 0:
            shutil.rmtree(part, ignore_errors=True)                         # makes room
            print(f"\n{failed}; {latest(folder) or 'no checkpoint before it'} is whole, and the next save tries again",
                  file=sys.stderr)
    return next(iter(gather([failed] if failed else [])), None)             # collective: rank 0 may have failed alone


def state_of(run, optimizer=True):
    """Returns what a checkpoint holds; the tensors are the run's own, so that loading fills them in place."""
    state = {"model": run.model.state_dict(), "ema": run.ema.state_dict()}
    if optimizer:
        state["optimizer"] = get_optimizer_state_dict(run.model, run.optimizer)
    return state


def finish(part, checkpoint, keep_last):
    """Gives a checkpoint its name, removes all but the last keep_last, and exports its EMA, or returns why not."""
    shutil.rmtree(checkpoint, ignore_errors=True)
    part.replace(checkpoint)
    for old in steps_in(checkpoint.parent)[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)
    try:
        export(checkpoint)
    except OSError as error:
        print(f"\n{checkpoint} is saved, but {error}", file=sys.stderr)
        return f"{checkpoint} is saved, but {error}"


def export(checkpoint):
    """Writes the EMA of a checkpoint to the run's model.safetensors, in fp32, as sample.py and --init read it."""
    path = checkpoint.with_name("model.safetensors")
    with name_in_errors(path), atomic_write(path) as part:
        save_file(read_step(checkpoint), part)


def load_state(run, checkpoint, optimizer=True):
    """Reads weights, EMA and, if asked, the optimizer's state, except its weight decay.  Collective.

    Any number of ranks reads what any other number wrote."""
    check_whole(checkpoint)
    state = state_of(run, optimizer)
    load_shards(state, checkpoint)                                          # collective
    if optimizer:
        set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"])
        for group in run.optimizer.param_groups:
            group.update(weight_decay=run.config.weight_decay)


def cause(error):
    """Returns why a save failed; of a CheckpointException, which is no Exception, the error of one rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    if "[enforce fail at inline_container" in str(error):                   # torch.save's words for a full disk
        return "a file came out shorter than what was written to it"
    return str(error) or type(error).__name__


def write_text(path, text):
    with name_in_errors(path), atomic_write(path) as part:
        part.write_text(text, "utf-8")


@contextmanager
def name_in_errors(path):
    """Lets an error of writing, such as a full disk, name the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path} cannot be written: {error}") from error


# ---------------------------------------------------------------- is it the same run that is resumed?
# What may change when a run is resumed, because it changes later losses only by rounding, or as far as clips cannot be
# read.  With another lr, mask or seed the losses would not be those of config.py; to allow that, pass --allow-changes.
FREE_TO_CHANGE = {
    "steps", "data", "num_workers", "read_timeout", "max_bad", "cache", "checkpointing", "compile", "shard", "sp",
    "accumulation", "out", "init_optimizer", "save_every", "keep_last", "sample_every", "prompts", "validate_every",
    "sampler", "cfg_scale", "fps"}


def check_changes(config, last, inputs, allowed, say):
    """Raises ValueError if a run's config or its inputs (see fingerprint) differ from those it began with."""
    folder = Path(config.out)
    old = configs.load(folder / "config.py")
    changes = {}
    for field in fields(config):
        before = getattr(old, field.name)
        now = getattr(config, field.name)
        if before != now:
            changes[field.name] = f"{field.name} {before!r} -> {now!r}"
    clips = folder / "clips.txt"
    before = clips.read_text("utf-8").partition("\n")[0] if clips.is_file() else inputs
    if before != inputs:
        changes["clips"] = f"the clips or networks: {before} -> {inputs}"
    if changes:
        say("changed since the last start: " + ", ".join(changes.values()))
    refused = [text for name, text in changes.items() if name not in FREE_TO_CHANGE]
    same_model = old.model == config.model
    if refused and not (allowed and same_model):
        remedy = ", or add --allow-changes" if same_model else ""
        raise ValueError(f"{last} would not be continued as it began: {', '.join(refused)} - undo that, or start a new "
                         f"run with another --out{remedy}")


def fingerprint(meta, vae, text_encoder):
    """Returns a line that identifies the clips (paths, sizes and order, not their folder) and the frozen networks.

    With one row more in meta.csv, step n would see other clips."""
    digest = 0
    for name in ("key", "num_frames", "height", "width", "fps", "text_size"):
        digest = zlib.crc32(np.ascontiguousarray(meta[name]), digest)
    networks = weights_name(vae.net.state_dict()) + weights_name(text_encoder.net.state_dict())
    return f"{len(meta)} clips, checksum {digest:08x}, networks {zlib.crc32(networks.encode()):08x}"


# ---------------------------------------------------------------- the log
# Means over clips are kept as sums: a Counter of ("clips" | "loss" | "mse" | "vb", group), where group is "all", a
# quarter 0 to 3 of t, or a bucket's resolution and length.  The sums of fp32 losses are in fp64, which has digits to
# spare: the means do not depend on which rank or micro-batch has which clip.
def add_clips(sums, losses, t, *groups):
    """Adds the clips of a micro-batch, as loss_of returns them.  A sync."""
    columns = [losses["loss"], losses["mse"], losses["vb"], t.to(losses["loss"])]
    for loss, mse, vb, time_ in torch.stack(columns, dim=1).tolist():
        for group in ("all", int(time_) // 250, *groups):
            sums.update({("clips", group): 1, ("loss", group): loss, ("mse", group): mse, ("vb", group): vb})


def over_ranks(sums):
    """Returns the sum of all ranks' Counters; collective."""
    total = Counter()
    for part in gather([sums]):
        total.update(part)
    return total


def mean_of(sums, name, group="all"):
    """Returns the mean over the clips of a group, or None if it has none."""
    return sums[name, group] / sums["clips", group] if sums["clips", group] else None


class Log:
    """Writes log.jsonl, bad_clips.csv, the progress bar and, where it is installed, TensorBoard."""

    def __init__(self, run, first):
        self.config = run.config
        self.place = run.place
        is_writer = run.place.rank == 0
        self.bad = BadClips(run.folder / "bad_clips.csv", run.config.max_bad, writes=is_writer)
        self.bar = tqdm(total=run.config.steps, initial=first, desc=str(run.folder), unit="step", disable=not is_writer)
        self.file = open_log(run.folder / "log.jsonl", first) if is_writer else None
        self.board = None
        try:
            if is_writer:
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(run.folder, purge_step=first + 1)
        except ImportError:
            pass
        self.begin_line()

    def begin_line(self):
        self.sums = Counter()
        self.faults = []
        self.start = time.perf_counter()

    def add(self, batch, found):
        """Adds a step: its batch, and what train_step returned."""
        if not self.place.reads:                                            # one rank counts a clip that several share
            return
        _, flop = self.config.cost(batch["bucket"])
        self.sums.update(flop=flop * len(batch["slots"]), waited=batch["waited"], faults=len(batch["faults"]))
        self.faults += batch["faults"]
        for losses, t, captions_cut in found:
            self.sums.update(captions_cut=captions_cut)
            add_clips(self.sums, losses, t)                                 # sync

    def write(self, step, **of_step):
        """Writes the averages since the last line; of_step: the step's own grad_norm, lr and bucket.  Collective."""
        sums = over_ranks(self.sums)
        seconds = time.perf_counter() - self.start
        faults = gather(self.faults) if sums["faults"] else []
        self.bad.add(faults, sums["clips", "all"])                          # the same on all ranks, as is its error
        self.begin_line()
        if not self.file:
            return
        row = {"step": step, "loss": mean_of(sums, "loss"), "mse": mean_of(sums, "mse"), "vb": mean_of(sums, "vb"),
               "loss_by_t": [mean_of(sums, "loss", quarter) for quarter in range(4)], **of_step,
               "clips_per_s": sums["clips", "all"] / seconds,
               "tflop_per_s": sums["flop"] / seconds / self.place.world / 1e12,     # of each GPU
               "data_wait": sums["waited"] / seconds / self.place.num_data_ranks,   # a share of the time
               "captions_cut": sums["captions_cut"], "faults": self.bad.faults, "gib": peak_gib()}
        append(self.file, row)
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(f"loss {row['loss']:.3f} | grad {row['grad_norm']:.2f} | lr {row['lr']:.1e} | "
                                 f"{row['bucket'][0]} x {row['bucket'][1]} | {row['clips_per_s']:.1f} clips/s | "
                                 f"{row['tflop_per_s']:.2f} TFLOP/s | waiting for data {row['data_wait']:.0%}")
        if self.board:
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, step)

    def close(self):
        self.bar.close()
        close(self.file)
        if self.board:
            self.board.close()


def peak_gib():
    """Returns the peak of this GPU's memory in GiB, or None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2 ** 30 if torch.cuda.is_available() else None


def open_log(path, first):
    """Returns a log, open for appending, after removing lines of steps that will be repeated or that are cut short."""
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= first:
                kept.append(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} line {number}: {line.strip()!r}, expected JSON with a step - correct or remove "
                             "the line") from error
    write_text(path, "".join(kept))
    return open(path, "a", encoding="utf-8")


def append(file, row):
    with name_in_errors(file.name):
        print(json.dumps(row), file=file, flush=True)


def close(file):
    """Closes a log; what could not be written, such as to a full disk, has been reported when it was appended."""
    with suppress(OSError):
        if file:
            file.close()


# ---------------------------------------------------------------- validation and previews
class Validation:
    """Computes the loss on held-out clips: the same clips, windows, noise and t each time and in each run.

    Captions are not dropped, and no frames are given."""

    def __init__(self, config, meta, place, first, encode):
        model = replace(config.model, class_dropout_prob=0.0)
        self.config = replace(config, model=model, seed=0, speed=False, mask_ratios={"mask_no": 1.0}, cache="",
                              windows=0)
        sampler = BucketSampler(meta, self.config, validation=True)
        clips = partial(batches, sampler, ClipDataset(meta, self.config, validation=True), 0, VALIDATION_BATCHES)
        self.kinds = sorted({(bucket.resolution, bucket.num_frames) for bucket in sampler.numbered})
        self.batches = []
        for batch in read_for_group(clips, place):
            encoded = encode(batch)
            self.batches.append({name: value.cpu() if torch.is_tensor(value) else value     # a GPU is for training
                                 for name, value in encoded.items()})
        self.file = open_log(Path(config.out) / "validation.jsonl", first) if place.rank == 0 else None

    @torch.no_grad()
    def write(self, run, step):
        """Writes a line of validation.jsonl: loss, loss_by_t (quarters), loss_by_bucket.  Collective."""
        sums = Counter()
        for i, batch in enumerate(self.batches):
            losses, t = loss_of(run.model, batch, self.config, run.vectors, i, run.place.device)
            bucket = batch["bucket"]
            add_clips(sums, losses, t, (bucket.resolution, bucket.num_frames))              # sync
        reshard(run.model)
        sums = over_ranks(sums)
        if self.file:
            by_bucket = {f"{kind[0]} x {kind[1]}": mean_of(sums, "loss", kind) for kind in self.kinds
                         if sums["clips", kind]}
            by_t = [mean_of(sums, "loss", quarter) for quarter in range(4)]
            append(self.file, {"step": step, "loss": mean_of(sums, "loss"), "loss_by_t": by_t,
                               "loss_by_bucket": by_bucket})

    def close(self):
        close(self.file)


def preview(run, vae, text_encoder, step):
    """Writes samples/step-0000500.png, a row of frames per prompt, sampled from the EMA.  Collective."""
    config = run.config
    num_frames, height, width = default_bucket(config.trained)
    videos = generate(run.ema, vae, text_encoder, list(config.prompts), num_frames=num_frames, height=height,
                      width=width, fps=config.fps, frame_interval=config.frame_interval, sampler="dpm", steps=20,
                      prediction=config.prediction, cfg_scale=config.cfg_scale, seed=config.seed)
    reshard(run.ema)
    if run.place.rank == 0:
        write_video(run.folder / "samples" / f"step-{step:07d}.png", rearrange(videos, "b t h w c -> (b t) h w c"))


# ---------------------------------------------------------------- between the ranks
def max_over_ranks(number):
    """Returns the largest number of all ranks; collective."""
    number = torch.tensor(number)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def gather(items):
    """Returns the items of all ranks in one list; collective."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return sum(parts, [])


def on_rank0(patient, make, *args):
    """Returns make(*args) on rank 0 and None on the others; its error is raised on all.  Collective on `patient`."""
    made = None
    failed = [None]
    if dist.get_rank() == 0:
        try:
            made = make(*args)
        except (ValueError, OSError) as error:
            failed = [str(error)]
    dist.broadcast_object_list(failed, src=0, group=patient)
    if failed[0] is not None:
        raise ValueError(failed[0])
    return made


def rank0_first(patient, make, *args):
    """Returns make(*args), called on rank 0 and then on the others, which find what it wrote or downloaded.

    Collective on `patient`."""
    made = on_rank0(patient, make, *args)
    return made if dist.get_rank() == 0 else make(*args)


# ---------------------------------------------------------------- the command line
def load_config(path, overrides):
    """Returns the config of a file.  A run's own config.py means the run it lies in, also after it has been copied."""
    if Path(path).name == "config.py" and Path(path).with_name("clips.txt").is_file():
        overrides = [f"--out={Path(path).parent}", *overrides]
    return configs.load(path, overrides)


def main(argv=None):
    parser = argparse.ArgumentParser(
        allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python train.py CONFIG [options] [--field=value ...]", description=__doc__,
        epilog="any field of the config is --field=value, as in --lr=1e-5:\n\n" + configs.fields_text())
    parser.add_argument("config", metavar="CONFIG", help="such as configs/tiny.py, or the config.py of a run")
    parser.add_argument("--print", action="store_true", help="print the config as a file and stop")
    parser.add_argument("--plain", action="store_true", help="each op as plain PyTorch: slower, takes more memory")
    parser.add_argument("--allow-changes", action="store_true", help="resume with another config or other clips")
    parser.add_argument("--debug", action="store_true", help="show errors with their traceback")
    args, overrides = parser.parse_known_args(argv)
    with one_line_errors(args.debug, "; the same command resumes from the last checkpoint, if there is one"):
        config = load_config(args.config, overrides)
        if args.print:
            print(configs.dump(config), end="")
            return
        number = train(config, args.allow_changes, args.plain)
        if number:
            sys.exit(128 + number)                                          # as a shell reports a signal


if __name__ == "__main__":
    main()
