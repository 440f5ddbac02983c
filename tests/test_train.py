"""train.py against upstream's recorded losses, against plain PyTorch, and a run against itself: stopped, cut, killed.

Most tests compare with one undisturbed run of 6 steps (the fixture `world`).  The last lines of this file are what the
slow tests start as processes of their own.
"""
import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import warnings
import weakref
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import configs
import train
import vae as vae_module
from assets.shapes import write_shapes
from bench_train import synthetic
from configs.plan import state_bytes
from conftest import restore_process
from data import Bucket, BucketSampler, ClipDataset, batches, read_meta, slot_generator
from masks import RECIPE
from model import NOT_IN_PIXART, STDiT, from_pixart, read_weights
from sample import noise_schedule
from vae import load_text_encoder, load_vae

ROOT = Path(__file__).parents[1]
GOLDEN = load_file(ROOT / "tests/golden/b_training_losses.safetensors")
SCHEDULES = load_file(ROOT / "tests/golden/b_schedules.safetensors")
SPEED = load_file(ROOT / "tests/golden/b_speed_losses.safetensors")
OURS = train.diffusion_vectors(noise_schedule().alphas_cumprod)
MASKS = {"nomask": torch.ones_like(GOLDEN["mask"]), "mask": GOLDEN["mask"]}
EACH_MASK = pytest.mark.parametrize("case", MASKS)


def upstream_vectors():
    """Returns the vectors of the schedule as upstream has them, in fp32."""
    full = {}
    for name, value in SCHEDULES.items():
        if name.startswith("full1000."):
            full[name.removeprefix("full1000.")] = value
    low = full["posterior_log_variance_clipped"]
    full["log_variance_low"] = low
    full["log_variance_span"] = full["betas"].log() - low
    return {name: full[name] for name in OURS}


def relative(a, b):
    """Returns how far a is from b, as a share of b's norm."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def losses(vectors, x_mask, t=GOLDEN["t"], out=GOLDEN["model_output"], prediction="eps"):
    """Returns x_t, the terms and the gradient of the mean loss with regard to out, on upstream's inputs."""
    x_0 = GOLDEN["x_start"]
    noise = GOLDEN["noise"]
    out = out.clone().requires_grad_()
    x_t = train.q_sample(vectors, x_0, torch.where(x_mask, t[:, None], 0), noise)
    terms = train.diffusion_loss(vectors, out, x_0, x_t, noise, t, x_mask, prediction)
    terms["loss"].mean().backward()
    return x_t, {name: value.detach() for name, value in terms.items()}, out.grad


# ---------------------------------------------------------------- the loss, given upstream's numbers
@EACH_MASK
def test_loss_and_gradient_are_upstreams(case):
    """With upstream's fp32 vectors.  Its "rescaled" losses are bitwise these: they multiply by 1000 / 1000."""
    x_t, terms, grad = losses(upstream_vectors(), MASKS[case])
    assert torch.equal(x_t, GOLDEN[f"full1000.{case}.x_t"])
    for name, value in terms.items():
        torch.testing.assert_close(value, GOLDEN[f"full1000.{case}.{name}"], rtol=1e-5, atol=0)
    expected = GOLDEN[f"full1000.{case}.grad_model_output"]
    assert relative(grad, expected) < 1e-6
    for ours, theirs in zip(grad.chunk(2, 1), expected.chunk(2, 1)):        # eps, variance
        assert relative(ours, theirs) < 1e-5


@EACH_MASK
def test_loss_with_exact_vectors(case):
    """In fp32 upstream's posterior_mean_coef1[0] is 0.99983 where 1 is right: at t = 0, 0.5% of the bound and 1.5% of
    its gradient.  With this one number put in, all is equal to 1e-3 (measured: 2e-4)."""
    beta = SCHEDULES["full1000.betas"].double()
    abar = SCHEDULES["full1000.alphas_cumprod"].double()
    span = torch.log1p(beta[1:] * abar[:-1] / (1 - abar[:-1]))      # log(beta / posterior variance), nothing cancels
    torch.testing.assert_close(OURS["log_variance_span"][1:], span, rtol=1e-3, atol=0)
    assert abs(OURS["posterior_mean_coef1"][0] - 1) < 1e-12

    vectors = OURS | {"posterior_mean_coef1": OURS["posterior_mean_coef1"].clone()}
    vectors["posterior_mean_coef1"][0] = SCHEDULES["full1000.posterior_mean_coef1"][0]
    x_t, terms, grad = losses(vectors, MASKS[case])
    expected = {name: GOLDEN[f"full1000.{case}.{name}"] for name in ("x_t", "mse", "vb", "grad_model_output")}
    assert relative(x_t, expected["x_t"]) < 1e-5
    assert relative(terms["mse"], expected["mse"]) < 1e-5
    torch.testing.assert_close(terms["vb"], expected["vb"], rtol=1e-3, atol=0)
    for ours, theirs in zip(grad.chunk(2, 1), expected["grad_model_output"].chunk(2, 1)):
        assert relative(ours, theirs) < 1e-3

    _, exact, exact_grad = losses(OURS, MASKS[case])
    noised = GOLDEN["t"] > 0
    torch.testing.assert_close(exact["vb"][noised], expected["vb"][noised], rtol=1e-3, atol=0)
    torch.testing.assert_close(exact["vb"], expected["vb"], rtol=6e-3, atol=0)
    assert relative(exact_grad, expected["grad_model_output"]) < 2.5e-3


def test_a_clip_without_noised_frames_has_loss_0():
    """Upstream divides 0 by 0 there."""
    x_mask = GOLDEN["mask"].clone()
    x_mask[0] = False
    assert GOLDEN["allmasked.loss"][0].isnan()
    _, terms, grad = losses(upstream_vectors(), x_mask)
    assert terms["loss"][0] == 0
    assert (grad[0] == 0).all()
    torch.testing.assert_close(terms["loss"][1:], GOLDEN["allmasked.loss"][1:], rtol=1e-5, atol=0)


def test_v_prediction_agrees_with_eps():
    """v = (eps - sqrt(1 - abar) x_t) / sqrt(abar): the same bound and variance gradient, the error divided by abar."""
    x_mask = MASKS["nomask"]
    t = torch.tensor([0, 1, 37, 500, 700, 0])                               # at 999 fp32 leaves nothing to compare
    a = rearrange(OURS["sqrt_alphas_cumprod"][t].float(), "b -> b 1 1 1 1")
    s = rearrange(OURS["sqrt_one_minus_alphas_cumprod"][t].float(), "b -> b 1 1 1 1")
    eps, variance = GOLDEN["model_output"].chunk(2, dim=1)
    x_t, as_eps, grad_eps = losses(OURS, x_mask, t)
    _, as_v, grad_v = losses(OURS, x_mask, t, torch.cat([(eps - s * x_t) / a, variance], dim=1), "v")
    torch.testing.assert_close(as_v["vb"], as_eps["vb"], rtol=1e-5, atol=0)
    torch.testing.assert_close(as_v["mse"] * a.flatten() ** 2, as_eps["mse"], rtol=1e-5, atol=0)
    assert relative(grad_v[:, 4:], grad_eps[:, 4:]) < 1e-4
    assert relative(grad_v[:, :4] * a, grad_eps[:, :4]) < 1e-5
    right = torch.cat([a * GOLDEN["noise"] - s * GOLDEN["x_start"], variance], dim=1)
    assert losses(OURS, x_mask, t, right, "v")[1]["mse"].max() < 1e-12


# ---------------------------------------------------------------- SpeeD
def test_speed_losses_are_upstreams():
    """Weighted as test_a_clip_does_not_depend_on_its_batch sees train.py do it."""
    t = SPEED["t_sampled"]
    for vectors, bound in ((upstream_vectors(), 1e-6), (OURS, 1e-5)):
        _, terms, _ = losses(vectors, GOLDEN["mask"], t)
        weighted = terms["mse"] * vectors["sqrt_one_minus_alphas_cumprod"][t].float() ** 2
        assert relative(weighted, SPEED["mse"]) < bound
        assert relative(terms["vb"], SPEED["vb"]) < bound
        assert relative(weighted + terms["vb"], SPEED["loss"]) < bound


def test_speed_probabilities_are_upstreams():
    """Flat to 1e-5; between t = 635 and 650, where tanh turns over, fp32 and fp64 schedules are up to 0.8% apart."""
    expected = SCHEDULES["speed.p"].double()
    edge = torch.arange(635, 651)
    off = (train.speed_probabilities(OURS) - expected).abs() / expected
    assert off[edge].max() < 0.008
    off[edge] = 0
    assert off.max() < 1e-5
    torch.testing.assert_close(train.speed_probabilities(upstream_vectors()), expected, rtol=1e-5, atol=0)


def draw_many(speed, steps=50):
    """Returns t of 1,000 slots of each of some steps."""
    config = SimpleNamespace(speed=speed, seed=0)
    return torch.cat([train.draw_t(config, OURS, step, np.arange(1000)) for step in range(steps)])


def chi_square(counts, expected):
    expected = expected / expected.sum() * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_t_has_its_distribution():
    """999 degrees of freedom: a chi-square of 999 +- 45, for upstream's 200,000 draws as for ours.

    The first quarter of SpeeD's draws has a chi-square of its own, as duals make pairs of all others."""
    p = train.speed_probabilities(OURS)
    dual = torch.tensor([700 - i if i < 700 else i - 700 for i in range(1000)])
    expected = p + torch.zeros_like(p).index_add(0, dual, p)
    t = draw_many(speed=True)
    assert torch.equal(t[1::2], dual[t[::2]])
    assert chi_square(t.bincount(minlength=1000), expected) < 1150
    assert chi_square(t[::2].bincount(minlength=1000), p) < 1150
    assert chi_square(SCHEDULES["speed.t_hist_200k"], expected) < 1150
    assert chi_square(draw_many(speed=False).bincount(minlength=1000), torch.ones(1000)) < 1150


# ---------------------------------------------------------------- one batch
# A global batch is 8 stills or 4 clips: twice the batch size, as the config's world is 2 whatever runs it.  The decay
# of the average is reached in step 3, the gradient is clipped in some steps only.
ARGS = ["--model.depth=2", "--model.hidden_size=48", "--model.num_heads=2",
        f"--vae={ROOT / 'assets/tiny/vae'}", f"--text_encoder={ROOT / 'assets/tiny/text_encoder'}", "--prompts=()",
        "--buckets={'64': {1: (1.0, 4), 8: (1.0, 2)}}", "--world=2", "--steps=6", "--save_every=3", "--keep_last=1",
        "--warmup_steps=4", "--weight_decay=0.1", "--ema_decay=0.3", "--grad_clip=0.45",
        "--mask_ratios={'mask_no': 0.4, 'mask_quarter_head': 0.3, 'mask_quarter_random': 0.3}"]


def tiny_config(*args):
    return configs.load(ROOT / "configs/tiny.py", [*ARGS, *args])


def latents(slots, num_frames=8):
    """Returns a batch as a cache holds it; each clip is a function of its slot."""
    draws = [slot_generator(1, 0, slot, "latents") for slot in slots]
    batch = {}
    for name, shape in (("mean", (8, num_frames, 8, 8)), ("std", (8, num_frames, 8, 8)), ("y", (16, 64))):
        batch[name] = torch.stack([torch.randn(shape, generator=g) for g in draws])
    batch["std"] = batch["std"].abs()
    batch["y_mask"] = torch.arange(16).expand(len(slots), 16) < 5
    batch["slots"] = torch.tensor(slots)
    for name in ("height", "width", "num_frames", "ar", "fps"):
        batch[name] = torch.full((len(slots),), 8.0)
    return batch


def filled(config):
    """Returns a model none of whose parameters are zero."""
    model = STDiT(config.model)
    for name, p in model.named_parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05, generator=slot_generator(0, 0, 0, name))
    return model


def loss_at(model, batch, config, step=0):
    """Returns the terms of the clips of a batch at a step, and their t."""
    return train.loss_of(model, batch, config, OURS, step, "cpu")


@pytest.mark.parametrize("speed", [False, True])
def test_a_clip_does_not_depend_on_its_batch(speed):
    """Its loss is the same in any part of the batch; with SpeeD it is weighted by 1 - abar."""
    config = replace(tiny_config(), speed=speed, mask_ratios={name: 1 / 9 for name in RECIPE})
    model = filled(config)
    whole, t = loss_at(model, latents([0, 1, 2, 3]), config, step=3)
    even, even_t = loss_at(model, latents([0, 2]), config, step=3)
    odd, odd_t = loss_at(model, latents([1, 3]), config, step=3)
    assert torch.equal(t, rearrange([even_t, odd_t], "part b -> (b part)"))
    for name, value in whole.items():
        joined = rearrange([even[name], odd[name]], "part b -> (b part)")
        torch.testing.assert_close(joined, value, rtol=1e-5, atol=1e-6)
    weight = OURS["sqrt_one_minus_alphas_cumprod"][t].float() ** 2 if speed else 1
    torch.testing.assert_close(whole["loss"], whole["mse"] * weight + whole["vb"])


class Recorder:
    """In place of a model: keeps what it is asked; answers 1 for noised frames and `of_given` for given ones."""
    null_y = torch.full((16, 64), 7.0)

    def __init__(self, of_given=0.0):
        self.of_given = of_given

    def __call__(self, x_t, t, y, y_mask, x_mask, **conditioning):
        self.asked = {"x_t": x_t, "t": t, "y": y, "y_mask": y_mask, "x_mask": x_mask, "conditioning": conditioning}
        B, C, T, h, w = x_t.shape
        if x_mask is None:
            return torch.ones(B, 2 * C, T, h, w)
        return torch.where(rearrange(x_mask, "b t -> b 1 t 1 1"), 1.0, self.of_given).expand(B, 2 * C, T, h, w)


def test_what_the_model_is_asked():
    """Given frames carry the noise of t = 0 and do not count; a dropped caption is the null one with all its tokens."""
    config = tiny_config("--mask_ratios={'mask_quarter_head': 1.0}", "--model.class_dropout_prob=0.5")
    batch = latents(list(range(64)))
    batch["std"] = torch.full_like(batch["std"], 0.01)                      # as much as the noise of t = 0
    model = Recorder()
    terms, t = loss_at(model, batch, config)
    others, _ = loss_at(Recorder(of_given=5.0), batch, config)
    for name, value in terms.items():
        assert torch.equal(value, others[name]), f"{name} counts given frames"

    x_mask = model.asked["x_mask"]
    assert torch.equal(model.asked["t"], t)
    assert not x_mask[:, 0].any()
    assert x_mask[:, 2:].all()
    assert model.asked["conditioning"].keys() == {"height", "width", "num_frames", "ar", "fps"}

    dropped = (model.asked["y"] == 7).all((1, 2))
    assert 16 < dropped.sum() < 48
    assert torch.equal(model.asked["y"][~dropped], batch["y"][~dropped])
    assert model.asked["y_mask"][dropped].all()
    assert not model.asked["y_mask"][~dropped][:, 5:].any()

    times = torch.where(x_mask, t[:, None], 0)
    a = rearrange(OURS["sqrt_alphas_cumprod"][times].float(), "b t -> b 1 t 1 1")
    s = rearrange(OURS["sqrt_one_minus_alphas_cumprod"][times].float(), "b t -> b 1 t 1 1")
    noise = (model.asked["x_t"] - a * batch["mean"]) / (s ** 2 + (0.01 * a) ** 2).sqrt()
    noise = rearrange(noise, "b c t h w -> b t c h w")
    assert abs(noise[~x_mask].std() - 1) < 0.05
    assert abs(noise[x_mask].std() - 1) < 0.05


@pytest.mark.parametrize("changed", ["seed", "step", "slot"])
def test_each_seed_step_and_slot_has_its_own_draws(changed):
    """Other noise, t, masks and dropped captions; also another draw of what the VAE says, seen at t = 0."""
    config = tiny_config("--mask_ratios={'mask_quarter_random': 1.0}", "--model.class_dropout_prob=0.5")
    here = list(range(16))
    batch = latents(here)
    other = dict(batch)
    step = 0
    if changed == "seed":
        config_of_other = replace(config, seed=1)
    else:
        config_of_other = config
    if changed == "step":
        step = 1
    if changed == "slot":
        other["slots"] = torch.tensor(here) + 16
    one = Recorder()
    another = Recorder()
    loss_at(one, batch, config)
    loss_at(another, other, config_of_other, step)
    for name in ("t", "y", "x_mask", "x_t"):
        assert not torch.equal(one.asked[name], another.asked[name]), name
    given = ~(one.asked["x_mask"] | another.asked["x_mask"])
    first = rearrange(one.asked["x_t"], "b c t h w -> b t c h w")[given]
    second = rearrange(another.asked["x_t"], "b c t h w -> b t c h w")[given]
    assert (first - second).std() > 0.5, "of a given frame only the draw of the VAE differs"


# ---------------------------------------------------------------- whole runs
@pytest.fixture(autouse=True)
def end_processes():
    """Ends the process group that a test has started without main()."""
    yield
    restore_process()


SAME = ("step", "loss", "mse", "vb", "loss_by_t", "grad_norm", "lr", "bucket")      # no clock decides these


def run(config, *flags):
    """Trains here, as `python train.py CONFIG` would; what ends in an error raises it."""
    try:
        train.main([config_file(config), "--debug", *flags])
    finally:
        restore_process()


def config_file(config):
    """Writes a config next to its run; returns the file's name."""
    path = Path(f"{config.out}.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(configs.dump(config), encoding="utf-8")
    return str(path)


def rows(config):
    """Returns the lines of log.jsonl, without what a clock decides."""
    found = []
    for line in (Path(config.out) / "log.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        found.append({name: row.get(name) for name in SAME})
    return found


def weights(config):
    return load_file(Path(config.out) / "model.safetensors")


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def checkpoints(config):
    return sorted(path.name for path in Path(config.out).glob("step-*"))


def assert_close(ours, theirs, rel=1e-6):
    """Asserts that two logs have the same losses and gradients but for rounding."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        for name in ("step", "loss", "mse", "vb", "grad_norm", "lr"):
            assert a[name] == pytest.approx(b[name], rel=rel, abs=1e-7), (a["step"], name)


@pytest.fixture(scope="module")
def every_step():
    """Logs every step, and computes with one thread, as the processes do that `start` starts."""
    threads = torch.get_num_threads()
    log_every = train.LOG_EVERY
    torch.set_num_threads(1)
    train.LOG_EVERY = 1
    yield
    train.LOG_EVERY = log_every
    torch.set_num_threads(threads)


def undisturbed(folder, *args):
    """Trains on 32 clips, from weights without zeros; returns (config, rows of its log)."""
    write_shapes(folder / "clips", num_clips=32)
    config = tiny_config(f"--data={folder / 'clips/meta.csv'}", f"--cache={folder / 'cache'}",
                         f"--init={folder / 'init.safetensors'}", f"--out={folder / 'undisturbed'}", *args)
    save_file(filled(config).state_dict(), folder / "init.safetensors")
    run(config)
    return config, rows(config)


@pytest.fixture(scope="module")
def world(every_step, tmp_path_factory):
    """A config, and the log of its undisturbed run; of one block, as many tests start a run."""
    return undisturbed(tmp_path_factory.mktemp("world"), "--model.depth=1")


@pytest.fixture(scope="module")
def deep_world(every_step, tmp_path_factory):
    """The same with two blocks, for the tests of many processes."""
    return undisturbed(tmp_path_factory.mktemp("deep"))


def elsewhere(world, tmp_path, **changes):
    """Returns the world's config with another folder, and other changes."""
    return replace(world[0], **{"out": str(tmp_path / "run")} | changes)


def copied(world, tmp_path, **changes):
    """Returns a config that continues a copy of the undisturbed run."""
    config = elsewhere(world, tmp_path, **changes)
    shutil.copytree(world[0].out, config.out)
    return config


class Reference:
    """The same training in plain PyTorch: one process, nothing sharded, nothing in parts."""

    def __init__(self, config, weights, average):
        self.config = config
        self.model = STDiT(config.model)
        self.model.load_state_dict(weights)
        self.average = {name: average[name].clone() for name, _ in self.model.named_parameters()}
        self.forget()

    def forget(self):
        """Starts with a new optimizer."""
        self.optimizer = torch.optim.AdamW(self.model.parameters(),
                                           weight_decay=self.config.weight_decay)

    def step(self, number, batch):
        """Takes a step; returns the row of the log."""
        lr = self.config.lr * min(1, (number + 1) / self.config.warmup_steps)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.zero_grad()
        terms, t = loss_at(self.model, batch, self.config, number)
        terms["loss"].mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip).item()
        self.optimizer.step()
        decay = self.config.ema_decay
        for name, p in self.model.named_parameters():
            self.average[name] = decay * self.average[name] + (1 - decay) * p.detach()
        row = {name: value.mean().item() for name, value in terms.items()}
        by_t = []
        for quarter in range(4):
            chosen = terms["loss"][t // 250 == quarter]
            by_t.append(chosen.mean().item() if len(chosen) else None)
        return row | {"step": number + 1, "grad_norm": norm, "lr": lr, "loss_by_t": by_t}

    def distance(self, weights):
        """Returns how far the average is from a file's weights, at the worst parameter."""
        return max(relative(value, weights[name]) for name, value in self.average.items())


@pytest.fixture(scope="module")
def reference(world):
    """The undisturbed run in plain PyTorch: (a Reference after 6 steps, its rows, the batches)."""
    config = replace(world[0], num_workers=0)
    meta = read_meta(config.data)
    vae = load_vae(config.vae)
    text_encoder = load_text_encoder(config.text_encoder, config.model.model_max_length)
    made = []
    for batch in batches(BucketSampler(meta, config), ClipDataset(meta, config), 0, config.steps):
        made.append(train.to_latents(batch, vae, text_encoder))
    start = load_file(config.init)
    plain = Reference(config, start, start)
    log = [plain.step(number, batch) for number, batch in enumerate(made)]
    return plain, log, made


def test_a_run_is_plain_training(world, reference):
    """Loss, gradient, clipping, warm-up, AdamW and the average are those of the plain loop, from pixels, too."""
    plain, log, _ = reference
    assert_close(world[1], log, rel=1e-5)
    for ours, theirs in zip(world[1], log):
        for a, b in zip(ours["loss_by_t"], theirs["loss_by_t"], strict=True):
            assert a == (b and pytest.approx(b, rel=1e-5))
    assert plain.distance(weights(world[0])) < 5e-5
    norms = [row["grad_norm"] for row in log]
    assert min(norms) < world[0].grad_clip < max(norms), "clips some gradients, not all"


def test_a_run_leaves_what_others_read(world):
    config, log = world
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    assert [row["lr"] / config.lr for row in log] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert {tuple(row["bucket"])[1] for row in log} == {1, 8}
    assert checkpoints(config) == ["step-0000006"], "the last one stays"
    assert configs.load(Path(config.out) / "config.py") == config
    STDiT(config.model).load_state_dict(weights(config))


def test_a_resumed_run_is_the_undisturbed_one(world, tmp_path):
    """To the last bit, after a stop at step 4; a killed run has written a line and a half more of the log."""
    config = elsewhere(world, tmp_path)
    run(replace(config, steps=4))
    assert rows(config) == world[1][:4]
    lines = (Path(world[0].out) / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    with open(Path(config.out) / "log.jsonl", "a", encoding="utf-8") as f:
        f.write(lines[4] + lines[5][:20])
    run(config)
    assert rows(config) == world[1]
    assert same_weights(weights(config), weights(world[0]))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_stops(world, tmp_path, run_script, monkeypatch, number):
    """The step in which it comes is finished; the same command continues, to the last bit."""
    config = elsewhere(world, tmp_path)
    with monkeypatch.context() as patch:
        at_optimizer_step(4, lambda: os.kill(os.getpid(), number), patch)
        ended = run_script("train", config_file(config))
    assert ended.status == 128 + number, ended.err
    assert "step 4" in ended.out
    assert checkpoints(config) == ["step-0000004"]
    assert rows(config) == world[1][:4]
    run(config)
    assert rows(config) == world[1]
    assert same_weights(weights(config), weights(world[0]))


def at_optimizer_step(count, action, patch):
    """Does something in the n-th optimizer step of this process, before it changes a weight."""
    step = torch.optim.AdamW.step
    done = []

    def interrupted(self, *args, **more):
        done.append(self)
        if len(done) == count:
            action()
        return step(self, *args, **more)

    patch.setattr(torch.optim.AdamW, "step", interrupted)


def test_a_save_that_fails_leaves_the_last_one_whole(world, tmp_path, run_script, monkeypatch):
    """The disk is full at the second: an error that says so, no half checkpoint, and a resume from step 3."""
    config = elsewhere(world, tmp_path)
    write = FileSystemWriter.write_data

    def full(self, *args):
        if checkpoints(config):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", full)
        ended = run_script("train", config_file(config))
    assert ended.status == 2
    assert "No space left on device" in ended.err
    assert checkpoints(config) == ["step-0000003"]
    run(config)
    assert rows(config) == world[1]
    assert same_weights(weights(config), weights(world[0]))


def test_accumulation_changes_nothing(world, tmp_path):
    """But for rounding; 8 stills or 4 clips in 3 parts are parts of different sizes."""
    config = elsewhere(world, tmp_path, accumulation=3, steps=3)
    run(config)
    assert_close(rows(config), world[1][:3], rel=1e-5)


def test_checkpointing_changes_nothing(world, tmp_path):
    """To the last bit."""
    config = elsewhere(world, tmp_path, checkpointing=1, steps=3)
    run(config)
    assert rows(config) == world[1][:3]


def test_checkpointing_holds_less():
    config = tiny_config()
    held = []
    for every in (0, 2, 1):
        model = filled(config)
        train.checkpoint_blocks(model, every)
        sizes = []

        def keep(x, sizes=sizes):
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss_at(model, latents([0, 1, 2, 3]), config)
        held.append(sum(sizes))
    assert held[0] > 1.5 * held[1]
    assert 1.5 * held[1] > 2 * held[2]


def test_pixels_train_as_their_cache(world, tmp_path):
    """Read by two processes; at the windows that the cache holds, the losses are the same."""
    config = elsewhere(world, tmp_path, cache="", num_workers=2, save_every=9)
    run(config)
    assert_close(rows(config), world[1], rel=1e-5)


def test_bad_clips_are_replaced_and_listed_the_same_when_resumed(world, tmp_path):
    """A run is stopped at step 2 while its bad_clips.csv is further, as after a kill, and the clip is mended then."""
    shutil.copytree(Path(world[0].data).parent, tmp_path / "clips")
    config = elsewhere(world, tmp_path, data=str(tmp_path / "clips/meta.csv"), cache="", num_workers=0, steps=4,
                       save_every=9)
    meta = read_meta(config.data)
    victim = Path(meta.path(BucketSampler(meta, config).plan(3).clips[0, 0]))
    content = victim.read_bytes()
    victim.write_bytes(b"")
    run(config)
    listed = (tmp_path / "run/bad_clips.csv").read_text(encoding="utf-8")
    steps = [line.split(",")[0] for line in listed.splitlines()[1:]]
    assert steps.count("3") == 1
    assert str(victim) in listed
    again = replace(config, out=str(tmp_path / "again"))
    run(replace(again, steps=2))
    shutil.copy(tmp_path / "run/bad_clips.csv", tmp_path / "again")
    victim.write_bytes(content)
    run(again)
    assert rows(again) == rows(config)
    assert (tmp_path / "again/bad_clips.csv").read_text(encoding="utf-8") == listed
    assert same_weights(weights(again), weights(config))


@pytest.fixture(scope="module")
def validated(world, tmp_path_factory):
    """The config of a run that validates after steps 1 and 2, on 0.4 of the clips."""
    folder = tmp_path_factory.mktemp("validated")
    config = replace(world[0], out=str(folder / "run"), steps=2, holdout=0.4, cache="", num_workers=0,
                     buckets={"64": {1: (1.0, 1), 8: (1.0, 1)}}, validate_every=1)
    run(config)
    return config


def validation(config):
    """Returns the lines of validation.jsonl."""
    text = (Path(config.out) / "validation.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_validation_changes_nothing(validated, tmp_path):
    config = replace(validated, out=str(tmp_path / "run"), validate_every=0)
    run(config)
    assert rows(config) == rows(validated)
    assert same_weights(weights(config), weights(validated))


def test_validation_has_a_line_each_time(validated, tmp_path):
    """A resumed run has none twice."""
    lines = validation(validated)
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["loss"] != lines[1]["loss"]
    assert len(lines[0]["loss_by_t"]) == 4
    assert set(lines[0]["loss_by_bucket"]) <= {"64 x 1", "64 x 8"}
    config = replace(validated, out=str(tmp_path / "run"), steps=3)
    shutil.copytree(validated.out, config.out)
    with open(Path(config.out) / "validation.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(lines[1] | {"step": 3}) + "\n")
    run(config)
    resumed = validation(config)
    assert resumed[:2] == lines
    assert [line["step"] for line in resumed] == [1, 2, 3]


def test_validation_is_the_same_in_each_run(validated, tmp_path):
    """With the same weights: whatever the seed, masks, SpeeD and dropped captions, in each step."""
    still = replace(validated, steps=1, lr=1e-30, warmup_steps=0)
    one = replace(still, out=str(tmp_path / "one"))
    other = replace(still, out=str(tmp_path / "other"), steps=2, seed=5, speed=True,
                    mask_ratios={"mask_quarter_head": 1.0}, model=replace(still.model, class_dropout_prob=0.5))
    run(one)
    run(other)
    first, second = validation(other)
    assert first == validation(one)[0]
    assert second == first | {"step": 2}


def test_previews_change_nothing_and_are_samples_of_the_average(world, tmp_path, run_script):
    prompt = "a red circle moves right"
    config = elsewhere(world, tmp_path, steps=2, sample_every=2, prompts=(prompt,))
    run(config)
    assert rows(config) == world[1][:2]
    (preview,) = (tmp_path / "run/samples").iterdir()
    assert preview.name == "step-0000002.png"
    ended = run_script("sample", "--ckpt", config.out, "--prompt", prompt, "--sampler", "dpm", "--out", tmp_path)
    assert ended.status == 0, ended.err
    (sampled,) = tmp_path.glob("00-*.png")
    difference = np.array(Image.open(preview)).astype(int) - np.array(Image.open(sampled))
    assert abs(difference).max() <= 1


def test_tensorboard_gets_the_log(world, tmp_path, monkeypatch):
    """Where that package is installed."""
    seen = {}

    def add_scalar(name, value, step):
        seen.setdefault(name, []).append((step, value))

    def writer(folder, **more):
        return SimpleNamespace(add_scalar=add_scalar, close=lambda: None)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=writer))
    run(elsewhere(world, tmp_path, steps=1))
    assert seen["loss"] == [(1, world[1][0]["loss"])]
    assert {"grad_norm", "lr"} < set(seen)


def test_with_a_cache_the_text_encoder_is_freed(world, tmp_path, monkeypatch):
    """T5 takes 9 GiB of a GPU; previews have the embeddings of their prompts."""
    nets = []
    alive = []
    load = train.load_text_encoder

    def load_and_note(*args):
        encoder = load(*args)
        nets.append(weakref.ref(encoder.net))
        return encoder

    monkeypatch.setattr(train, "load_text_encoder", load_and_note)
    at_optimizer_step(1, lambda: alive.append(nets[-1]() is not None), monkeypatch)
    run(elsewhere(world, tmp_path, steps=1, prompts=("a red circle moves right",)))
    assert alive == [False]


def test_a_run_that_is_done_says_so(world, tmp_path, run_script):
    """It writes model.safetensors again: a kill may have come just before that."""
    config = copied(world, tmp_path, steps=5)
    (Path(config.out) / "model.safetensors").write_bytes(b"half")
    ended = run_script("train", config_file(config))
    assert ended.status == 0
    assert "all 5 steps are done" in ended.out
    assert rows(config) == world[1]
    assert same_weights(weights(config), weights(world[0]))


# ---------------------------------------------------------------- the folder of a run
def test_one_step_of_a_run_is_where_another_starts_and_what_is_sampled(world, tmp_path, run_script):
    """What we write, we read; the average is that of the step."""
    step = Path(world[0].out) / "step-0000006"
    assert same_weights(read_weights(step), weights(world[0]))
    config = elsewhere(world, tmp_path, init=str(step), steps=1, lr=1e-30, warmup_steps=0, ema_decay=0.0)
    run(config)
    last = load_step(step, "model.")
    assert same_weights(weights(config), last)
    ended = run_script("sample", "--ckpt", step, "--prompt", "a red circle", "--steps", 1, "--sampler", "ddim",
                       "--out", tmp_path / "samples")
    assert ended.status == 0, ended.err


def test_the_average_that_a_run_starts_from_is_kept(world, tmp_path):
    """A decay that warms up again would replace it within a few steps."""
    config = elsewhere(world, tmp_path, init=world[0].out, steps=2, lr=1e-30, warmup_steps=0, ema_decay=0.999)
    run(config)
    before = weights(world[0])
    after = weights(config)
    moved = max(relative(after[name], before[name]) for name in before)
    last = load_step(Path(world[0].out) / "step-0000006", "model.")
    distance = max(relative(last[name], before[name]) for name in before)
    assert moved < 0.01 * distance


def load_step(folder, prefix):
    """Returns what a checkpoint holds under names that begin with the prefix."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    held = {name: torch.empty(value.size) for name, value in metadata.items() if name.startswith(prefix)}
    with warnings.catch_warnings(action="ignore"):              # of no_dist, which is asked for
        dcp.load(held, checkpoint_id=folder, no_dist=True)
    return {name.removeprefix(prefix): value for name, value in held.items()}


def test_without_its_last_step_a_run_is_resumed_from_the_one_before(world, tmp_path):
    """The folders are all there is: no second file says which one counts."""
    config = elsewhere(world, tmp_path, save_every=2, keep_last=2)
    run(config)
    assert checkpoints(config) == ["step-0000004", "step-0000006"]
    shutil.rmtree(Path(config.out) / "step-0000006")
    run(config)
    assert rows(config) == world[1]
    assert same_weights(weights(config), weights(world[0]))


def test_the_config_of_a_copied_run_means_the_copy(world, tmp_path):
    config = elsewhere(world, tmp_path, steps=3)
    run(config)
    shutil.copytree(config.out, tmp_path / "copy")
    before = checkpoints(config)
    train.main([str(tmp_path / "copy/config.py"), "--steps=4", "--debug"])
    assert checkpoints(config) == before
    assert "step-0000004" in checkpoints(replace(config, out=str(tmp_path / "copy")))


def test_two_runs_do_not_share_a_folder(world, tmp_path, run_script):
    """The lock is another process's, which is killed in the end: the folder is free at once."""
    config = copied(world, tmp_path, steps=7)
    before = {file: file.read_bytes() for file in Path(config.out).rglob("*") if file.is_file()}
    hold = ("import fcntl, sys, time; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); "
            "print(flush=True); time.sleep(99)")
    with subprocess.Popen([sys.executable, "-c", hold, Path(config.out) / ".lock"], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        ended = run_script("train", config_file(config))
        assert ended.status == 2
        assert "another process trains" in ended.err and config.out in ended.err
        for file, content in before.items():
            assert file.read_bytes() == content
        other.kill()
    assert run_script("train", config_file(config)).status == 0


def test_a_rank_that_does_not_see_the_folder_says_so(world, tmp_path):
    """As on a machine that does not share the file system."""
    place = train.start_processes()
    config = elsewhere(world, tmp_path)
    with pytest.raises(ValueError, match=f"rank 1 .*{config.out}"):
        train.open_folder(config, place._replace(rank=1))
    assert train.open_folder(config, place).is_dir()


@pytest.mark.parametrize("fault, named", [
    ("missing", "__0_0.distcp is missing"),
    ("cut short", "__0_0.distcp has been cut short"),
    ("empty", "__0_0.distcp has been cut short"),
    ("no metadata", ".metadata is damaged"),
    ("changed", "a shard is damaged"),
])
def test_a_damaged_checkpoint_is_named(world, tmp_path, run_script, fault, named):
    config = copied(world, tmp_path, steps=7)
    folder = Path(config.out) / "step-0000006"
    shard = folder / "__0_0.distcp"
    if fault == "missing":
        shard.unlink()
    elif fault == "cut short":
        shard.write_bytes(shard.read_bytes()[:-5000])
    elif fault == "empty":
        shard.write_bytes(b"")
    elif fault == "changed":
        stored = dcp.FileSystemReader(folder).read_metadata().storage_data
        (at,) = [shard.offset for index, shard in stored.items() if index.fqn == "ema.blocks.0.mlp.fc1.weight"]
        content = bytearray(shard.read_bytes())
        content[at:at + 64] = bytes(64)
        shard.write_bytes(content)
    else:
        (folder / ".metadata").write_bytes(b"")
    for script, *words in (("train", config_file(config)), ("sample", "--prompt=a cat", "--ckpt", folder)):
        ended = run_script(script, *words)
        assert ended.status == 2
        assert named in ended.err
        assert "Traceback" not in ended.err and "weights_only" not in ended.err
    assert folder.is_dir()


def test_a_step_is_saved_even_if_its_average_cannot_be_exported(world, tmp_path, run_script):
    config = elsewhere(world, tmp_path, steps=3)
    (Path(config.out) / "model.safetensors" / "in the way").mkdir(parents=True)
    ended = run_script("train", config_file(config))
    assert ended.status == 2
    assert re.search("step-0000003 is saved, but .*model.safetensors cannot be written", ended.err)
    assert checkpoints(config) == ["step-0000003"]


def test_after_validation_the_weights_are_sharded_again(world, tmp_path):
    """Else the average could not be updated, and memory would be held."""
    config = replace(world[0], out=str(tmp_path / "run"), holdout=0.4, cache="", num_workers=0, validate_every=1,
                     buckets={"64": {1: (1.0, 1), 8: (1.0, 1)}})
    (tmp_path / "run").mkdir()
    place = train.start_processes()
    made = train.make_run(config, place)
    encode = partial(train.to_latents, vae=load_vae(config.vae),
                     text_encoder=load_text_encoder(config.text_encoder, config.model.model_max_length))
    validation = train.Validation(config, read_meta(config.data), place, 0, encode)
    validation.write(made, 1)
    validation.close()
    train.update_average(made, 1)
    for p in made.model.parameters():
        assert isinstance(p, DTensor)


def test_a_run_leaves_no_file_open(world, tmp_path):
    config = elsewhere(world, tmp_path, steps=1, holdout=0.4, validate_every=1, cache="", num_workers=0,
                       buckets={"64": {1: (1.0, 1), 8: (1.0, 1)}})
    before = set(os.listdir("/proc/self/fd"))
    run(config)
    opened = [os.readlink(f"/proc/self/fd/{fd}") for fd in set(os.listdir("/proc/self/fd")) - before
              if os.path.exists(f"/proc/self/fd/{fd}")]
    assert not [path for path in opened if str(tmp_path) in path]


# ---------------------------------------------------------------- 64 ranks, as far as one process can show them
@pytest.mark.parametrize("shard", [64, 8])
def test_a_step_on_one_of_64_ranks_holds_what_the_plan_says(shard):
    """The fake process group moves nothing: values mean nothing.  Most tensors have fewer rows than there are ranks."""
    config = tiny_config("--model.hidden_size=192", "--model.num_heads=4", "--world=64")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=64)
    mesh = init_device_mesh("cpu", (64,))
    if shard < 64:
        mesh = init_device_mesh("cpu", (64 // shard, shard), mesh_dim_names=("replicas", "shard"))
    made = train.make_run(config, train.Place(0, 64, torch.device("cpu"), mesh, None))
    batch = synthetic(made, Bucket("64", 8, "1.00"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(math, "isfinite", lambda value: True)
        train.train_step(made, 0, batch)
    states = [made.model.parameters(), made.ema.parameters()]
    states += [(value for name, value in state.items() if name != "step") for state in made.optimizer.state.values()]
    held = sum(value.to_local().nbytes for group in states for value in group)
    planned = state_bytes(config, shard)
    assert held == pytest.approx(planned["weights"] + planned["EMA"] + planned["Adam"], rel=0.25)


# ---------------------------------------------------------------- other weights, other configs
@pytest.mark.parametrize("with_optimizer", [False, True])
def test_another_run_is_where_a_run_starts(world, reference, tmp_path, with_optimizer):
    """From its weights and its average, which differ, and with init_optimizer from Adam's state, too.

    The weight decay is the new config's."""
    plain = deepcopy(reference[0])
    if not with_optimizer:
        plain.forget()
    plain.optimizer.param_groups[0]["weight_decay"] = 5.0
    config = elsewhere(world, tmp_path, init=world[0].out, init_optimizer=with_optimizer, steps=1, weight_decay=5.0)
    row = plain.step(0, reference[2][0])
    run(config)
    assert_close(rows(config), [row], rel=1e-5)
    assert plain.distance(weights(config)) < 5e-5


def test_a_folder_of_open_soras_weights_is_where_a_run_starts(world, tmp_path):
    """The undisturbed run starts from a file."""
    (tmp_path / "published").mkdir()
    (tmp_path / "published/config.json").write_text("{}")
    shutil.copy(Path(world[0].out) / "model.safetensors", tmp_path / "published")
    config = elsewhere(world, tmp_path, init=str(tmp_path / "published"), steps=1, lr=1e-30, warmup_steps=0)
    run(config)
    assert same_weights(weights(config), weights(world[0]))


@pytest.mark.parametrize("name", ["w.pth", "w.bin"])
def test_pixarts_weights_are_where_a_run_starts(world, tmp_path, name):
    """Whatever their file is called; tests/test_model.py has what from_pixart makes of them."""
    config = replace(world[0].model, input_sq_size=512, temporal_pos=False)
    pixart = {}
    for key, value in STDiT(config, seed=6).state_dict().items():
        if not any(part in key for part in NOT_IN_PIXART):
            pixart[key] = value
    pixart["x_embedder.proj.weight"] = pixart["x_embedder.proj.weight"].squeeze(2)
    torch.save({"state_dict": pixart}, tmp_path / name)
    model = train.build_model(replace(world[0], model=config), train.start_processes())
    train.load_weights(model, tmp_path / name, seed=5)
    expected = from_pixart(pixart, config, seed=5)
    for key, value in model.state_dict().items():
        assert torch.equal(whole(value), expected[key]), key


def test_open_soras_weights_may_be_in_a_pth(world, tmp_path):
    given = filled(world[0]).state_dict()
    torch.save({"state_dict": given}, tmp_path / "ema.pth")
    model = train.build_model(world[0], train.start_processes())
    train.load_weights(model, tmp_path / "ema.pth")
    for key, value in model.state_dict().items():
        assert torch.equal(whole(value), given[key]), key


def whole(value):
    """Returns a sharded tensor in one piece; buffers are in one."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def test_weights_may_be_on_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / name)

    monkeypatch.setattr(vae_module, "snapshot_download", download)
    assert train.find_weights("hpcai-tech/OpenSora") == tmp_path / "hpcai-tech/OpenSora"
    pixarts = "PixArt-alpha/PixArt-alpha/PixArt-XL-2-1024-MS.pth"
    assert train.find_weights(pixarts) == tmp_path / pixarts
    (name, patterns), one_file = asked
    assert name == "hpcai-tech/OpenSora"
    assert {"config.json", "model*.safetensors", "model.safetensors.index.json"} <= set(patterns)
    assert one_file == ("PixArt-alpha/PixArt-alpha", ["PixArt-XL-2-1024-MS.pth"])


def test_conditioning_stays_in_fp32_under_bf16(world):
    """t = 500 and 501 are one number in bf16: the model tells them apart, and a size from the next."""
    config = replace(world[0], dtype="bf16")
    model = train.build_model(config, train.start_processes())
    train.load_weights(model, world[0].init)
    batch = latents([0])
    for name in ("mean", "std", "slots"):
        del batch[name]
    x = torch.randn(1, 8, 8, 8, 8, generator=torch.Generator().manual_seed(0))

    def ask(t, **more):
        with torch.no_grad():
            return model(x, torch.tensor([t]), **batch | more)

    assert ask(500).dtype == torch.float32
    assert torch.equal(ask(500), ask(500))
    assert not torch.equal(ask(500), ask(501))
    assert not torch.equal(ask(500, height=torch.tensor([500.0])), ask(500, height=torch.tensor([501.0])))


def test_bf16_has_the_loss_of_fp32(world):
    """Within a thousandth."""
    mesh = train.start_processes()
    found = []
    for dtype in ("fp32", "bf16"):
        config = replace(world[0], dtype=dtype)
        model = train.build_model(config, mesh)
        train.load_weights(model, world[0].init)
        found.append(loss_at(model, latents([0, 1, 2, 3]), config)[0]["loss"].mean().item())
    assert 0 < abs(found[1] / found[0] - 1) < 1e-3


# ---------------------------------------------------------------- mistakes
@pytest.mark.parametrize("args, named", [
    ("--learning_rate=1", "learning_rate"),
    ("--mask_ratios={'mask_non':1.0}", "mask_non"),
    ("--data=nowhere/meta.csv", "nowhere/meta.csv"),
    ("--buckets={'720p':{16:(1.0,1)}}", "no clip fits any bucket"),
    ("--buckets={'64':{8:(1.0,500)}}", "no bucket has the clips of one batch"),
    ("--init=nowhere", "init='nowhere'"),
    (f"--init={ROOT / 'README.md'}", "README.md"),
    ("--init=UNDISTURBED --model.depth=2", "depth=2"),
    ("--init=UNDISTURBED/model.safetensors --init_optimizer=True", "init_optimizer"),
    ("--init=UNDISTURBED/model.safetensors --model.hidden_size=72", "model.safetensors"),
    (f"--out={ROOT / 'README.md'}", "README.md' is a file"),
    ("--vae=/no/such/folder", "/no/such/folder"),
    ("--text_encoder=/no/such/folder", "/no/such/folder"),
    ("--sp=2", "sp=2"),
    ("--shard=3", "shard=3"),
])
def test_a_mistake_is_one_line(world, tmp_path, run_script, args, named):
    config = elsewhere(world, tmp_path)
    words = args.replace("UNDISTURBED", world[0].out).split()
    ended = run_script("train", config_file(config), *words)
    assert ended.status == 2
    error = ended.err[ended.err.index("error: "):]
    assert named in error
    assert "Traceback" not in ended.err
    assert error.count("\n") == 1 or "bucket" in named, "a table of buckets may follow"


def test_a_gradient_that_is_not_finite_is_not_saved(world, tmp_path, run_script, monkeypatch):
    """The error names the step and the bucket; the last checkpoint is that of the steps before."""
    config = elsewhere(world, tmp_path)
    whole = train.diffusion_loss
    calls = []

    def sick(*args, **more):
        calls.append(args)
        terms = whole(*args, **more)
        return {name: value * float("nan") if len(calls) == 5 else value for name, value in terms.items()}

    monkeypatch.setattr(train, "diffusion_loss", sick)
    ended = run_script("train", config_file(config))
    assert ended.status == 2
    assert "step 4" in ended.err
    assert str(tuple(world[1][4]["bucket"])) in ended.err
    assert checkpoints(config) == ["step-0000003"]
    assert rows(config) == world[1][:4]


def test_a_log_that_was_edited_is_refused(world, tmp_path, run_script):
    config = copied(world, tmp_path, steps=7)
    log = Path(config.out) / "log.jsonl"
    log.write_text(log.read_text(encoding="utf-8").replace("\n", "\nslower from here\n", 1), encoding="utf-8")
    ended = run_script("train", config_file(config))
    assert ended.status == 2
    assert "log.jsonl line 2" in ended.err


def test_a_changed_config_is_refused(world, tmp_path, run_script):
    """Where it changes the losses, unless --allow-changes asks for it; another model is refused always."""
    config = copied(world, tmp_path, steps=7)
    ended = run_script("train", config_file(replace(config, lr=5e-4)))
    assert ended.status == 2
    assert "lr 0.001 -> 0.0005" in ended.err
    assert rows(config) == world[1]
    deeper = config_file(replace(config, model=replace(config.model, depth=2)))
    assert run_script("train", deeper, "--allow-changes").status == 2
    ended = run_script("train", config_file(replace(config, lr=5e-4)), "--allow-changes")
    assert ended.status == 0, ended.err
    assert rows(config)[:6] == world[1]
    assert [row["lr"] for row in rows(config)[6:]] == [5e-4]


@pytest.mark.parametrize("changed", ["clips", "vae"])
def test_changed_clips_and_networks_are_refused(world, tmp_path, run_script, changed):
    """A row more in meta.csv, and step n would see other clips; another VAE, and latents would mean something else."""
    config = copied(world, tmp_path, steps=7)
    if changed == "clips":
        shutil.copytree(Path(world[0].data).parent, tmp_path / "clips", ignore=shutil.ignore_patterns(".*"))
        meta = tmp_path / "clips/meta.csv"
        lines = meta.read_text(encoding="utf-8").splitlines(keepends=True)
        meta.write_text("".join(lines[:-1]), encoding="utf-8")
        config = replace(config, data=str(meta))
    else:
        shutil.copytree(config.vae, tmp_path / "vae")
        (file,) = (tmp_path / "vae").glob("*.safetensors")
        tensors = load_file(file)
        name = sorted(tensors)[0]
        tensors[name] = tensors[name] + 1
        save_file(tensors, file)
        config = replace(config, vae=str(tmp_path / "vae"))
    ended = run_script("train", config_file(config))
    assert ended.status == 2
    assert "clips or networks" in ended.err
    assert rows(config) == world[1]


def test_what_changes_no_loss_may_change(world, tmp_path):
    """The files may move, too: the same clips in another folder."""
    config = copied(world, tmp_path, steps=7, num_workers=1, accumulation=2, checkpointing=1, save_every=1, cache="",
                    data=str(tmp_path / "clips/meta.csv"))
    shutil.copytree(Path(world[0].data).parent, tmp_path / "clips")
    run(config)
    assert rows(config)[:6] == world[1]
    assert len(rows(config)) == 7


def test_help_names_every_field(run_script):
    ended = run_script("train", "--help")
    assert ended.status == 0
    for field in fields(configs.Config):
        assert f"{field.name}: " in ended.out


# ---------------------------------------------------------------- processes of their own
def start(config, action="run", at=0, processes=0, **more):
    """Trains in a process of its own, or under torchrun; `action` and `at` are for the last lines of this file."""
    command = [sys.executable]
    if processes:
        restarts = 1 if action == "kill-one" else 0
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
                    f"--max-restarts={restarts}"]
    command += [__file__, action, str(at), config_file(config)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, **more)


@pytest.mark.slow
def test_the_script_itself_runs(world, tmp_path):
    here = elsewhere(world, tmp_path, out=str(tmp_path / "here"), steps=1)
    run(here)
    config = replace(here, out=str(tmp_path / "started"))
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "train.py", config_file(config)], cwd=ROOT, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    assert same_weights(weights(config), weights(here))


@pytest.mark.slow
def test_a_killed_run_continues_to_the_last_bit(world, tmp_path):
    """SIGKILL in a random step, then within a save, when all is written but what makes it whole."""
    config = elsewhere(world, tmp_path)
    at = random.SystemRandom().randrange(4, 6)
    done = start(config, "kill", at)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(rows(config)) == at - 1, f"killed in step {at}"
    before = checkpoints(config)
    done = start(config, "kill-in-save")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert checkpoints(config) == before, f"killed in step {at}"
    run(config)
    assert rows(config) == world[1], f"killed in step {at}"
    assert same_weights(weights(config), weights(world[0]))


@pytest.mark.slow
def test_torchrun_starts_again_what_one_dead_process_ended(deep_world, tmp_path):
    config = elsewhere(deep_world, tmp_path)
    done = start(config, "kill-one", 5, processes=2)
    assert done.returncode == 0, done.stderr
    assert_close(rows(config), deep_world[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("processes, changes", [
    (2, {}),
    (4, {"shard": 2, "accumulation": 2}),
    (4, {"sp": 2, "checkpointing": 1, "cache": "", "num_workers": 1}),
], ids=["sharded", "hybrid-accumulated", "sequence-parallel"])
def test_processes_train_as_one(deep_world, tmp_path, processes, changes):
    """Losses and gradients are equal but for rounding; what many began, one continues."""
    config = elsewhere(deep_world, tmp_path, **changes)
    done = start(replace(config, steps=4), processes=processes)
    assert done.returncode == 0, done.stderr
    assert_close(rows(config), deep_world[1][:4], rel=1e-5)
    run(replace(config, shard=0, sp=1))
    assert_close(rows(config), deep_world[1], rel=1e-5)
    for name, value in weights(config).items():
        assert relative(value, weights(deep_world[0])[name]) < 2e-4, name


@pytest.mark.slow
def test_eight_processes_train_as_one(deep_world, tmp_path):
    """Two replicas of weights that are sharded over four."""
    alone = replace(deep_world[0], out=str(tmp_path / "run"), world=1, steps=3,
                    buckets={"64": {1: (1.0, 8), 8: (1.0, 8)}})
    run(alone)
    eight = replace(alone, out=str(tmp_path / "eight"), shard=4, num_workers=0)
    done = start(eight, processes=8)
    assert done.returncode == 0, done.stderr
    assert_close(rows(eight), rows(alone), rel=1e-5)


@pytest.mark.slow
def test_more_processes_continue_what_one_began_and_validate_the_same(validated, tmp_path):
    config = replace(validated, out=str(tmp_path / "run"), steps=4)
    shutil.copytree(validated.out, config.out)
    alone = replace(config, out=str(tmp_path / "alone"))
    shutil.copytree(validated.out, alone.out)
    run(alone)
    done = start(config, processes=2)
    assert done.returncode == 0, done.stderr
    assert_close(rows(config), rows(alone), rel=1e-5)
    assert validation(config)[-1]["loss"] == pytest.approx(validation(alone)[-1]["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_step(deep_world, tmp_path):
    config = elsewhere(deep_world, tmp_path)
    done = start(config, "terminate-one", 4, processes=2)
    assert done.returncode == 1, done.stderr
    assert checkpoints(config)[-1] == "step-0000004"
    run(config)
    assert_close(rows(config), deep_world[1], rel=1e-5)


@pytest.mark.slow
def test_an_error_of_all_ranks_is_printed_once(world, tmp_path):
    done = start(elsewhere(world, tmp_path, data="nowhere/meta.csv"), processes=2)
    assert done.returncode
    by_a_rank = [line for line in done.stderr.splitlines() if line.startswith("error: ")]       # torchrun quotes it
    assert len(by_a_rank) == 1
    assert "nowhere/meta.csv" in by_a_rank[0]


@pytest.mark.slow
def test_the_benchmark_times_each_bucket(world, tmp_path, run_script, monkeypatch):
    """Nothing is read and nothing written, but for the trace that is asked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.py").write_text(configs.dump(elsewhere(world, tmp_path, data="nowhere", vae="nowhere", cache="")))
    ended = run_script("bench_train", "run.py", "--profile", "trace.json")
    assert ended.status == 0, ended.err
    for num_frames in (1, 8):
        assert f"64 x {num_frames} " in ended.out
    assert len(json.loads(Path("trace.json").read_text())["traceEvents"]) > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.py", "trace.json"]


def main(action, at, config):
    """Trains as train.py does, logs each step, and at its n-th step does what a test asked for."""
    rank = os.environ.get("RANK", "0")
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def kill(*args, **more):
        os.kill(os.getpid(), signal.SIGKILL)

    train.LOG_EVERY = 1
    if action == "kill" or (action == "kill-one" and rank == "1" and first_start):
        at_optimizer_step(at, kill, pytest.MonkeyPatch())
    if action == "kill-in-save":
        FileSystemWriter.finish = kill
    if action == "terminate-one" and rank == "0":
        at_optimizer_step(at, lambda: os.kill(os.getpid(), signal.SIGTERM), pytest.MonkeyPatch())
    train.main([config])


if __name__ == "__main__":                                                  # started by `start`
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
