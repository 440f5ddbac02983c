"""train.py against upstream's recorded losses, a run against itself: killed, resumed, cut among two processes."""
import errno
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import configs
import data
import sample
import train
from assets.shapes import write_shapes
from data import BucketSampler, read_meta, slot_generator
from masks import RECIPE
from model import STDiT
from sample import noise_schedule

ROOT = Path(__file__).parent.parent
GOLDEN = load_file(ROOT / "tests/golden/b_training_losses.safetensors")
SCHEDULES = load_file(ROOT / "tests/golden/b_schedules.safetensors")
SPEED = load_file(ROOT / "tests/golden/b_speed_losses.safetensors")
OURS = train.diffusion_vectors(noise_schedule().alphas_cumprod)
MASKS = {"nomask": torch.ones_like(GOLDEN["mask"]), "mask": GOLDEN["mask"]}
WRITER = train.dcp.FileSystemWriter
EACH_MASK = pytest.mark.parametrize("case", MASKS)


def upstream_vectors():
    full = {name.removeprefix("full1000."): v for name, v in SCHEDULES.items() if name.startswith("full1000.")}
    low = full["posterior_log_variance_clipped"]
    ours = {"log_variance_low": low, "log_variance_span": full["betas"].log() - low}
    return {name: ours.get(name, full.get(name)) for name in OURS}


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


def losses(vectors, x_mask, t=GOLDEN["t"], out=GOLDEN["model_output"], prediction="eps"):
    """x_t, terms and the gradient of the mean loss with regard to out, on upstream's inputs."""
    x_0, noise, out = GOLDEN["x_start"], GOLDEN["noise"], out.clone().requires_grad_()
    x_t = train.q_sample(vectors, x_0, torch.where(x_mask, t[:, None], 0), noise)
    terms = train.diffusion_loss(vectors, out, x_0, x_t, noise, t, x_mask, prediction)
    terms["loss"].mean().backward()
    return x_t, {name: value.detach() for name, value in terms.items()}, out.grad


# ---------------------------------------------------------------- the loss, given upstream's numbers
@EACH_MASK
def test_loss_is_upstreams(case):
    """With its fp32 vectors, all of it.  Its "rescaled" losses are bitwise these: they multiply by 1000 / 1000."""
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
    beta, abar = (SCHEDULES[f"full1000.{name}"].double() for name in ("betas", "alphas_cumprod"))
    span = torch.log1p(beta[1:] * abar[:-1] / (1 - abar[:-1]))      # log(beta / posterior variance), nothing cancels
    torch.testing.assert_close(OURS["log_variance_span"][1:], span, rtol=1e-3, atol=0)
    vectors = OURS | {"posterior_mean_coef1": OURS["posterior_mean_coef1"].clone()}
    assert abs(vectors["posterior_mean_coef1"][0] - 1) < 1e-12
    vectors["posterior_mean_coef1"][0] = SCHEDULES["full1000.posterior_mean_coef1"][0]
    x_t, terms, grad = losses(vectors, MASKS[case])
    assert relative(x_t, GOLDEN[f"full1000.{case}.x_t"]) < 1e-5
    assert relative(terms["mse"], GOLDEN[f"full1000.{case}.mse"]) < 1e-5
    torch.testing.assert_close(terms["vb"], GOLDEN[f"full1000.{case}.vb"], rtol=1e-3, atol=0)
    for ours, theirs in zip(grad.chunk(2, 1), GOLDEN[f"full1000.{case}.grad_model_output"].chunk(2, 1)):
        assert relative(ours, theirs) < 1e-3
    _, exact, exact_grad = losses(OURS, MASKS[case])
    noised = GOLDEN["t"] > 0
    torch.testing.assert_close(exact["vb"][noised], GOLDEN[f"full1000.{case}.vb"][noised], rtol=1e-3, atol=0)
    torch.testing.assert_close(exact["vb"], GOLDEN[f"full1000.{case}.vb"], rtol=6e-3, atol=0)
    assert relative(exact_grad, GOLDEN[f"full1000.{case}.grad_model_output"]) < 2.5e-3


def test_a_clip_without_noised_frame_has_loss_0():
    """Upstream: 0 / 0."""
    x_mask = GOLDEN["mask"].clone()
    x_mask[0] = False
    assert GOLDEN["allmasked.loss"][0].isnan()
    _, terms, grad = losses(upstream_vectors(), x_mask)
    assert terms["loss"][0] == 0 and (grad[0] == 0).all()
    torch.testing.assert_close(terms["loss"][1:], GOLDEN["allmasked.loss"][1:], rtol=1e-5, atol=0)


def test_v_is_eps_told_otherwise():
    """v = (eps - sqrt(1 - abar) x_t) / sqrt(abar): the same bound and variance gradient, the error divided by abar."""
    x_mask, t = MASKS["nomask"], torch.tensor([0, 1, 37, 500, 700, 0])      # at 999 fp32 leaves nothing to compare
    at = lambda name: rearrange(OURS[name][t].float(), "b -> b 1 1 1 1")
    a, s = at("sqrt_alphas_cumprod"), at("sqrt_one_minus_alphas_cumprod")
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
def test_speed_weights_are_upstreams():
    t = SPEED["t_sampled"]
    for vectors, bound in ((upstream_vectors(), 1e-6), (OURS, 1e-5)):
        _, terms, _ = losses(vectors, GOLDEN["mask"], t)
        weighted = terms["mse"] * vectors["sqrt_one_minus_alphas_cumprod"][t].float() ** 2
        for value, name in ((weighted, "mse"), (terms["vb"], "vb"), (weighted + terms["vb"], "loss")):
            assert relative(value, SPEED[name]) < bound


def test_speed_probabilities_are_upstreams():
    """Flat to 1e-5; between t = 635 and 650, where tanh turns over, fp32 and fp64 schedules are up to 0.8% apart."""
    p, expected = train.speed_probabilities(OURS), SCHEDULES["speed.p"].double()
    edge = torch.arange(635, 651)
    off = (p - expected).abs() / expected
    assert off[edge].max() < 0.008
    off[edge] = 0
    assert off.max() < 1e-5
    torch.testing.assert_close(train.speed_probabilities(upstream_vectors()), expected, rtol=1e-5, atol=0)


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


def test_t_is_distributed_as_told():
    """999 degrees of freedom: a chi-square of 999 +- 45, for upstream's 200,000 draws as for ours."""
    p = train.speed_probabilities(OURS)
    dual = torch.tensor([700 - i if i < 700 else i - 700 for i in range(1000)])
    expected = 1e5 * (p + torch.zeros_like(p).index_add(0, dual, p))

    def draw(speed):
        config = SimpleNamespace(speed=speed, seed=0)
        return torch.cat([train.draw_t(config, OURS, step, np.arange(1000)) for step in range(200)])

    t = draw(True)
    assert torch.equal(t[1::2], dual[t[::2]])
    assert chi_square(t.bincount(minlength=1000), expected) < 1150
    assert chi_square(SCHEDULES["speed.t_hist_200k"], expected) < 1150
    assert chi_square(draw(False).bincount(minlength=1000), torch.full((1000,), 200.0)) < 1150


# ---------------------------------------------------------------- one batch
MODEL = dict(depth=2, hidden_size=48, num_heads=2)
ARGS = [f"--model.{name}={value}" for name, value in MODEL.items()] + [
    f"--vae={ROOT / 'assets/tiny/vae'}", f"--text_encoder={ROOT / 'assets/tiny/text_encoder'}", "--prompts=()",
    "--buckets={'32': {1: (1.0, 8), 8: (1.0, 4)}}", "--steps=20", "--save_every=8", "--warmup_steps=4"]


def latents(slots, T=8):
    """A batch as CachedClips makes them; each clip a function of its slot."""
    draws = [slot_generator(1, 0, slot, "latents") for slot in slots]
    shapes = (16, T, 4, 4), (16, T, 4, 4), (16, 64)
    mean, std, y = (torch.stack([torch.randn(shape, generator=g) for g in draws]) for shape in shapes)
    told = {name: torch.full((len(slots),), 8.0) for name in ("height", "width", "num_frames", "ar", "fps")}
    y_mask = torch.arange(16).expand(len(slots), 16) < 5
    return dict(mean=mean, std=std.abs(), y=y, y_mask=y_mask, slots=torch.tensor(slots), **told)


def filled(config):
    """A model none of whose parameters are zero."""
    model = STDiT(config.model)
    for name, p in model.named_parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05, generator=slot_generator(0, 0, 0, name))
    return model


@pytest.mark.parametrize("speed", [False, True])
def test_a_slot_does_not_know_its_batch(speed):
    config = replace(configs.load(ROOT / "configs/tiny.py", ARGS), speed=speed, mask_ratios={n: 1 / 9 for n in RECIPE})
    model = filled(config)
    part = lambda slots: train.loss_of(model, latents(slots), config, OURS, 3, "cpu")
    (whole, t), parts = part(list(range(8))), [part([0, 2, 4, 6]), part([1, 3, 5, 7])]
    assert torch.equal(t, rearrange([p[1] for p in parts], "rank b -> (b rank)"))
    for name, value in whole.items():
        joined = rearrange([terms[name] for terms, _ in parts], "rank b -> (b rank)")
        torch.testing.assert_close(joined, value, rtol=1e-5, atol=1e-6)
    weight = OURS["sqrt_one_minus_alphas_cumprod"][t].float() ** 2 if speed else 1
    torch.testing.assert_close(whole["loss"], whole["mse"] * weight + whole["vb"])
    assert not torch.equal(t, train.loss_of(model, latents(list(range(8))), config, OURS, 4, "cpu")[1])


def test_what_the_model_is_told():
    """Given frames carry the noise of t = 0 and do not count; a dropped caption is the null one with all its tokens."""
    more = ["--mask_ratios={'mask_quarter_head': 1.0}", "--model.class_dropout_prob=0.5"]
    config = configs.load(ROOT / "configs/tiny.py", ARGS + more)
    batch, calls, answers = latents(list(range(64))), [], []

    class Model:
        null_y = torch.full((16, 64), 7.0)

        def __init__(self, of_given):
            self.of_given = of_given                                        # its answer for given frames

        def __call__(self, x_t, t, y, y_mask, x_mask, **told):
            calls.append(dict(x_t=x_t, t=t, y=y, y_mask=y_mask, x_mask=x_mask, told=told))
            return torch.where(rearrange(x_mask, "b t -> b 1 t 1 1"), 1.0, self.of_given).expand(64, 32, 8, 4, 4)

    batch["std"] = torch.full_like(batch["std"], 0.01)                      # as much as the noise of t = 0
    for of_given in (0.0, 5.0):
        terms, t = train.loss_of(Model(of_given), batch, config, OURS, 0, "cpu")
        answers.append(torch.stack(list(terms.values())))
    assert torch.equal(*answers)
    call = calls[0]
    x_mask, dropped = call["x_mask"], (call["y"] == 7).all((1, 2))
    assert torch.equal(call["t"], t) and not x_mask[:, 0].any() and x_mask[:, 2:].all()
    assert 16 < dropped.sum() < 48 and torch.equal(call["y"][~dropped], batch["y"][~dropped])
    assert call["y_mask"][dropped].all() and not call["y_mask"][~dropped][:, 5:].any()
    assert call["told"].keys() == {"height", "width", "num_frames", "ar", "fps"}
    x_t, x_0 = (rearrange(x, "b c t h w -> b t c h w") for x in (call["x_t"], batch["mean"]))
    at = lambda name: rearrange(OURS[name][torch.where(x_mask, t[:, None], 0)].float(), "b t -> b t 1 1 1")
    a, s = at("sqrt_alphas_cumprod"), at("sqrt_one_minus_alphas_cumprod")
    noise = (x_t - a * x_0) / (s ** 2 + (0.01 * a) ** 2).sqrt()
    assert abs(noise[~x_mask].std() - 1) < 0.05 and abs(noise[x_mask].std() - 1) < 0.05


# ---------------------------------------------------------------- whole runs
@pytest.fixture(autouse=True)
def end_processes():
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A config on 60 clips, started from weights without zeros, and its undisturbed run: (config, rows of its log)."""
    folder, threads = tmp_path_factory.mktemp("world"), torch.get_num_threads()
    torch.set_num_threads(1)                                                # as in the processes started below
    log_every, train.LOG_EVERY = train.LOG_EVERY, 1
    write_shapes(folder / "clips", num_clips=60)
    paths = {"data": "clips/meta.csv", "cache": "cache", "init": "init.safetensors", "out": "undisturbed"}
    args = [f"--{name}={folder / path}" for name, path in paths.items()]
    config = configs.load(ROOT / "configs/tiny.py", ARGS + args)
    save_file(filled(config).state_dict(), folder / "init.safetensors")
    run(config, first_gradients=folder / "gradients.pt")
    yield config, rows(config)
    train.LOG_EVERY = log_every
    torch.set_num_threads(threads)


def run(config, first_gradients=None, **more):
    """Trains here.  first_gradients: a file for those of the first step, whole and not yet clipped."""
    clip = torch.nn.utils.clip_grad_norm_

    def keep(parameters, max_norm):
        whole = [p.grad.full_tensor() for p in parameters]
        if dist.get_rank() == 0 and not first_gradients.is_file():
            torch.save(whole, first_gradients)
        return clip(parameters, max_norm)

    torch.nn.utils.clip_grad_norm_ = keep if first_gradients else clip
    try:
        train.train(config, **more)
    finally:
        torch.nn.utils.clip_grad_norm_ = clip
        if dist.is_initialized():
            dist.destroy_process_group()


def rows(config):
    """The lines of log.jsonl without what a clock tells."""
    lines = [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]
    clocks = ("clips_per_s", "tokens_per_s", "tflop_per_s", "decoded_per_s", "data_wait", "save_wait")
    return [{name: value for name, value in line.items() if name not in clocks} for line in lines]


def weights(config):
    return load_file(Path(config.out) / "model.safetensors")


def start(config, *mode, torchrun=0, **more):
    """Trains in a process of its own, or `torchrun` of them; `mode` is read by the last lines of this file."""
    path = Path(f"{config.out}.py")
    path.write_text(configs.dump(config))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torchrun),
                "--max-restarts", "1" if "die-once" in mode else "0"] if torchrun else []
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, __file__, *map(str, mode), str(path)]
    return subprocess.run(command, env=env, capture_output=True, text=True, **more)


def test_the_log_tells_what_happened(world):
    config, log = world
    assert [row["step"] for row in log] == list(range(1, 21))
    assert log[0]["lr"] == config.lr / 4 and log[3]["lr"] == log[9]["lr"] == config.lr
    assert {tuple(row["bucket"])[1] for row in log} == {1, 8}
    row = log[0]
    assert row["loss"] == pytest.approx(row["mse"] + row["vb"]) and len(row["loss_by_t"]) == 4 and row["grad_norm"] > 0
    assert sorted(p.name for p in Path(config.out).glob("step-*")) == ["step-0000016", "step-0000020"]
    assert configs.load(Path(config.out) / "config.py") == config
    model = STDiT(config.model)
    model.load_state_dict(weights(config))


def test_killed_and_started_again(world, tmp_path):
    """SIGKILL in a random step, then in a save; then to the end: every line of the log as if nothing had happened."""
    config, at = replace(world[0], out=str(tmp_path / "killed")), random.SystemRandom().randrange(9, 19)
    done = start(config, "die-at", at)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(rows(config)) == at, f"killed in step {at}"
    before = train.latest(config.out)                                       # one that was on its way may be missing
    done = start(config, "die-in-save")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert train.latest(config.out) == before and (tmp_path / "killed/.saving").is_dir()
    assert len(rows(config)) >= min(20, (int(before.name[5:]) if before else 0) + 8)
    run(config)
    assert rows(config) == world[1], f"killed in step {at}"
    assert all(torch.equal(value, weights(world[0])[name]) for name, value in weights(config).items())


def test_a_process_that_dies_takes_the_others_along_and_torchrun_starts_them_again(world, tmp_path):
    config = replace(world[0], out=str(tmp_path / "died"), save_every=4)
    done = start(config, "die-once", 11, torchrun=2)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"steps (\d+) to 20", done.stdout) in (["0", "8"], ["0", "4"])
    assert max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(rows(config), world[1], strict=True)) < 1e-6


@pytest.mark.parametrize("processes, changes", [
    (2, {}), (4, {"shard": 2, "accumulation": 2}), (0, {"accumulation": 3}), (0, {"checkpointing": 2}),
    (3, {"sp": 3, "cache": "", "num_workers": 1}), (4, {"sp": 2, "checkpointing": 1})],
    ids=["sharded", "hybrid-accumulated", "accumulated", "checkpointed", "clips-shared", "clips-shared-by-two-pairs"])
def test_processes_and_parts_train_as_one(world, tmp_path, processes, changes):
    """First loss and gradients equal but for rounding (measured: 0 and 2e-7); over 20 steps the losses stay within 8e-8
    and the averaged weights, by Adam, within 2e-5."""
    config = replace(world[0], out=str(tmp_path / "parts"), **changes)
    done = start(config, "gradients", tmp_path / "gradients.pt", torchrun=processes)
    assert done.returncode == 0, done.stderr
    one, many = world[1], rows(config)
    assert abs(many[0]["loss"] / one[0]["loss"] - 1) < 1e-6
    files = tmp_path / "gradients.pt", Path(world[0].out).parent / "gradients.pt"
    pairs = list(zip(*map(torch.load, files), strict=True))
    noise = 1e-9 * max(b.norm() for _, b in pairs)      # the first bucket is of images: QK-norm in time has only noise
    assert all(b.any() for _, b in pairs) and all((a - b).norm() < 1e-5 * b.norm() + noise for a, b in pairs)
    assert max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(many, one, strict=True)) < 1e-6
    assert all(relative(value, weights(world[0])[name]) < 2e-4 for name, value in weights(config).items())
    (tmp_path / "parts/latest").write_text("step-0000016")
    run(replace(config, shard=0, sp=1))                                     # what many began, one goes on with
    assert max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(rows(config), many, strict=True)) < 1e-6
    if processes == 2:
        (tmp_path / "parts/latest").write_text("step-0000016")
        done = start(config, "run", torchrun=4)                             # and four
        assert done.returncode == 0, done.stderr
        assert max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(rows(config), many, strict=True)) < 1e-6


def test_checkpointing_holds_less_and_changes_nothing(world, tmp_path):
    """To the last bit."""
    config = replace(world[0], out=str(tmp_path / "checkpointed"), steps=4, checkpointing=1)
    run(config)
    assert rows(config) == world[1][:4]
    held = []
    for every in (0, 2, 1):
        model = filled(config)
        train.checkpoint_blocks(model, every)
        held.append(0)

        def hold(x):
            held[-1] += x.numel()
            return x
        with torch.autograd.graph.saved_tensors_hooks(hold, lambda x: x):
            train.loss_of(model, latents(list(range(4))), config, OURS, 0, "cpu")
    assert held[0] > 1.5 * held[1] > 2 * held[2]


def test_conditioning_stays_in_fp32_under_bf16(world, tmp_path):
    """t = 500 and 501 are one number in bf16: the model tells them apart, and a size from the next."""
    config = replace(world[0], dtype="bf16")
    model = train.build_model(config, train.start_processes().mesh)
    train.load_weights(model, world[0].init)
    batch = {name: value for name, value in latents([0]).items() if name not in ("mean", "std", "slots")}
    x = torch.randn(1, 16, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    ask = lambda t, **more: model(x, torch.tensor([t]), **batch | more)
    with torch.no_grad():
        assert ask(500).dtype == torch.float32 and torch.equal(ask(500), ask(500))
        assert not torch.equal(ask(500), ask(501))
        assert not torch.equal(ask(500, height=torch.tensor([500.0])), ask(500, height=torch.tensor([501.0])))


def test_bf16_has_the_loss_of_fp32(world):
    """Within a thousandth."""
    mesh, losses = train.start_processes().mesh, []
    for dtype in ("fp32", "bf16"):
        config = replace(world[0], dtype=dtype)
        model = train.build_model(config, mesh)
        train.load_weights(model, world[0].init)
        losses.append(train.loss_of(model, latents(list(range(8))), config, OURS, 0, "cpu")[0]["loss"].mean().item())
    assert 0 < abs(losses[1] / losses[0] - 1) < 1e-3


@pytest.mark.parametrize("number, processes", [(signal.SIGTERM, 0), (signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_a_signal_saves_and_stops(world, tmp_path, number, processes):
    config = replace(world[0], out=str(tmp_path / "stopped"))
    done = start(config, "signal-at", 11, int(number), torchrun=processes)
    assert done.returncode == (128 + number if not processes else 1), done.stderr
    assert "saved step 12 and stopped; the same command goes on" in done.stdout
    assert (tmp_path / "stopped/latest").read_text() == "step-0000012" and len(rows(config)) == 12
    run(config)
    assert max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(rows(config), world[1], strict=True)) < 1e-6
    assert processes or rows(config) == world[1]


def test_a_slow_save_is_of_its_step(world, tmp_path, monkeypatch):
    """Training goes on while the files of step 16 are written: what they hold is copied before."""
    config, write = replace(world[0], out=str(tmp_path / "run"), steps=17, save_every=16), WRITER.write_data
    with monkeypatch.context() as patch:
        patch.setattr(WRITER, "write_data", lambda *args: (time.sleep(1), write(*args))[1])
        run(config)
    (tmp_path / "run/latest").write_text("step-0000016")
    run(replace(config, steps=20))
    assert rows(config) == world[1]


def test_a_run_that_is_done_says_so(world, tmp_path, monkeypatch, capsys):
    """And writes model.safetensors: it may have been killed before it did."""
    shutil.copytree(world[0].out, tmp_path / "run")
    (tmp_path / "run/model.safetensors").write_bytes((tmp_path / "run/clips.txt").read_bytes())
    monkeypatch.delattr(train, "make_run")
    config = replace(world[0], out=str(tmp_path / "run"))
    for steps in (20, 19):
        assert train.train(replace(config, steps=steps)) == 0
        dist.destroy_process_group()
        assert f"step-0000020: all {steps} steps are done; --steps=N goes on" in capsys.readouterr().out
    assert rows(config) == world[1]
    assert all(torch.equal(value, weights(world[0])[name]) for name, value in weights(config).items())


@pytest.mark.parametrize("name, old, new, said", [
    ("log.jsonl", "\n", "\nslower from here\n", "log.jsonl line 2: 'slower from here', expected JSON with a step"),
    ("log.jsonl", '"step"', '"steps"', "log.jsonl line 1: .*mend or remove the line"),
    ("latest", "step", "stop", "latest says 'stop-0000020', expected one of step-0000016, step-0000020"),
    ("latest", "step-0000020", "", "latest says '', expected one of")])
def test_a_run_that_was_edited_says_where(world, tmp_path, name, old, new, said):
    file = tmp_path / "run" / name
    shutil.copytree(world[0].out, file.parent)
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=said):
        run(replace(world[0], out=str(file.parent), steps=21))


def test_checkpoints_that_stay(world, tmp_path):
    config = replace(world[0], out=str(tmp_path / "run"), steps=10, save_every=1, keep_last=3, keep_every=4)
    run(config)
    assert sorted(int(p.name[5:]) for p in (tmp_path / "run").glob("step-*")) == [4, 8, 9, 10]


def test_resuming_names_what_changed(world, tmp_path, capsys, monkeypatch):
    config = replace(world[0], out=str(tmp_path / "run"))
    shutil.copytree(world[0].out, config.out)
    with pytest.raises(ValueError, match="would go on otherwise than it began: lr 0.001 -> 0.0005 - .*--allow-changes"):
        run(replace(config, steps=21, lr=5e-4))
    run(replace(config, steps=21, lr=5e-4), allow_changes=True)
    said = capsys.readouterr().out
    assert "steps 20 -> 21" in said and "lr 0.001 -> 0.0005" in said
    assert [row["step"] for row in rows(config)] == list(range(1, 22))
    assert rows(config)[-1]["lr"] == 5e-4
    with pytest.raises(ValueError, match="another --out"):
        run(replace(config, model=replace(config.model, depth=1)))
    monkeypatch.setattr(train, "weights_name", lambda net: "a VAE that was trained again")
    with pytest.raises(ValueError, match="otherwise than it began: the clips or networks: 60 clips, .* networks"):
        run(replace(config, steps=21, lr=5e-4))


def test_another_run_is_gone_on_from(world):
    """Weights and EMA, which differ, and Adam's state where it is asked for; a file has the EMA alone."""
    place, folder = train.start_processes(), Path(world[0].out)
    old, again, whole, file = (train.make_run(world[0], place) for _ in range(4))
    train.load_state(old, train.latest(folder))
    train.start_from(again, folder)
    train.start_from(whole._replace(config=replace(world[0], init_optimizer=True, weight_decay=0.1)), folder)
    train.start_from(file, folder / "model.safetensors")
    for run_, weights_ in ((again, old.model.parameters()), (whole, old.model.parameters()),
                           (file, old.ema.weights.values())):
        assert all(torch.equal(a, b) for a, b in zip(run_.model.parameters(), weights_, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(run_.ema.weights.values(), old.ema.weights.values(), strict=True))
    moments = lambda run_: [state["exp_avg"].full_tensor() for state in run_.optimizer.state.values()]
    assert all(torch.equal(a, b) and a.any() for a, b in zip(moments(whole), moments(old), strict=True))
    assert whole.optimizer.param_groups[0]["weight_decay"] == 0.1 and not moments(again)
    deeper = replace(world[0], model=replace(world[0].model, depth=3))
    with pytest.raises(ValueError, match="holds STDiTConfig.depth=2.* expected STDiTConfig.depth=3"):
        train.start_from(again._replace(config=deeper), folder)
    with pytest.raises(ValueError, match="init_optimizer=True: .*expected a run's folder"):
        train.start_from(again._replace(config=replace(world[0], init_optimizer=True)), folder / "model.safetensors")


def test_with_a_cache_the_text_encoder_goes(world, tmp_path, monkeypatch):
    """It takes 9 GiB of a GPU; previews know their prompts' embeddings."""
    nets, load, steps = [], train.load_text_encoder, train.take_steps

    def load_and_note(*args):
        encoder = load(*args)
        nets.append(weakref.ref(encoder.net))
        return encoder

    def look(*args):
        gone.append(nets[-1]() is None)
        return steps(*args)

    gone = []
    monkeypatch.setattr(train, "load_text_encoder", load_and_note)
    monkeypatch.setattr(train, "take_steps", look)
    prompts = ("a red circle moves right",)
    run(replace(world[0], out=str(tmp_path / "cached"), steps=1, prompts=prompts))
    run(replace(world[0], out=str(tmp_path / "pixels"), steps=1, prompts=prompts, cache=""))
    assert gone == [True, False]


def test_previews_change_nothing(world, tmp_path, monkeypatch):
    generate = train.generate
    monkeypatch.setattr(train, "generate", lambda *args, **more: generate(*args, **more | {"steps": 2}))
    prompts = ("a red circle moves right",)
    config = replace(world[0], out=str(tmp_path / "run"), steps=5, sample_every=2, prompts=prompts)
    run(config)
    assert rows(config) == world[1][:5]
    assert sorted(p.name for p in (tmp_path / "run/samples").iterdir()) == ["step-0000002.png", "step-0000004.png"]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_without_a_cache(world, tmp_path, method, monkeypatch):
    """From pixels, at the windows that the cache holds, the losses are the same."""
    monkeypatch.setattr(data, "multiprocessing", multiprocessing.get_context(method))
    config = replace(world[0], out=str(tmp_path / "run"), cache="", num_workers=1)
    run(config)
    for ours, cached in zip(rows(config), world[1], strict=True):
        for name in ("loss", "mse", "vb"):
            assert ours[name] == pytest.approx(cached[name], rel=1e-5), (ours["step"], name)


def test_unreadable_clips_are_replaced_and_listed_the_same_when_resumed(world, tmp_path):
    """In a run from pixels by two readers, that is stopped after a checkpoint, while one clip is mended."""
    shutil.copytree(Path(world[0].data).parent, tmp_path / "clips")
    meta = read_meta(str(tmp_path / "clips/meta.csv"))
    victim = Path(meta.path(BucketSampler(meta, world[0]).plan(10).clips[0, 0]))
    whole, _ = victim.read_bytes(), victim.write_bytes(b"")
    config = replace(world[0], data=str(tmp_path / "clips/meta.csv"), cache="", num_workers=2, steps=12,
                     out=str(tmp_path / "undisturbed"))
    run(config)
    faults = (tmp_path / "undisturbed/bad_clips.csv").read_text()
    assert [line.split(",")[0] for line in faults.splitlines()[1:]].count("10") == 1 and str(victim) in faults
    again = replace(config, out=str(tmp_path / "again"))
    run(replace(again, steps=8))
    shutil.copy(tmp_path / "undisturbed/bad_clips.csv", tmp_path / "again")      # a killed run had come so far
    victim.write_bytes(whole)
    run(again)
    assert rows(again)[8:] == rows(config)[8:] and (tmp_path / "again/bad_clips.csv").read_text() == faults
    assert all(torch.equal(a, b) for a, b in zip(weights(again).values(), weights(config).values(), strict=True))


@pytest.fixture(scope="module")
def validated(world, tmp_path_factory):
    """A run that looks at held-out clips after steps 4 and 8: (config, its validation.jsonl)."""
    config = replace(world[0], out=str(tmp_path_factory.mktemp("validated") / "run"), steps=8, holdout=0.4, cache="",
                     num_workers=0, validate_every=4, validate_batches=3)
    run(config)
    return config, (Path(config.out) / "validation.jsonl").read_text()


def test_validation_changes_nothing(validated, tmp_path):
    config = replace(validated[0], out=str(tmp_path / "run"), validate_every=0)
    run(config)
    assert rows(config) == rows(validated[0])
    assert all(torch.equal(a, b) for a, b in zip(weights(config).values(), weights(validated[0]).values(), strict=True))


def test_validation_is_the_same_in_each_run(validated, tmp_path):
    """Whatever the seed, masks, caption drop or processes; resumed, a line is not there twice."""
    config, text = validated
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == [4, 8] and lines[0]["loss"] != lines[1]["loss"]
    assert len(lines[0]["loss_by_t"]) == 4 and set(lines[0]["loss_by_bucket"]) <= {"32 x 1", "32 x 8"}
    other = replace(config, out=str(tmp_path / "other"), steps=1, validate_every=1, lr=1e-30, warmup_steps=0)
    for changes in ({}, {"seed": 5, "mask_ratios": {"mask_quarter_head": 1.0}, "speed": True}):
        run(replace(other, out=str(tmp_path / f"other{len(changes)}"), **changes))
    first, second = ((tmp_path / name / "validation.jsonl").read_text() for name in ("other0", "other3"))
    assert first == second
    done = start(replace(other, out=str(tmp_path / "two")), "run", torchrun=2)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two/validation.jsonl").read_text())
    assert two["loss"] == pytest.approx(json.loads(first)["loss"], rel=1e-6)
    (Path(config.out) / "latest").write_text("step-0000008")
    shutil.copytree(config.out, tmp_path / "resumed")
    run(replace(config, out=str(tmp_path / "resumed"), steps=12))
    resumed = (tmp_path / "resumed/validation.jsonl").read_text()
    assert resumed.startswith(text) and resumed.count("\n") == 3


def sick_at(bad, loss_of=train.loss_of):
    """train.loss_of, whose losses of the steps in `bad` are nan."""
    def sick(model, batch, config, vectors, step, device):
        terms, t = loss_of(model, batch, config, vectors, step, device)
        return {name: value * float("nan") if step in bad else value for name, value in terms.items()}, t
    return sick


def test_a_gradient_that_is_not_finite(world, tmp_path, monkeypatch, capsys):
    """Stops the run, naming what it was, or is skipped as often as told; then the run is that of the other steps."""
    config = replace(world[0], out=str(tmp_path / "stopped"))
    monkeypatch.setattr(train, "loss_of", sick_at({12}))
    said = stderr_of(config, capsys, monkeypatch)
    bucket = tuple(world[1][12]["bucket"])
    assert re.search(rf"error: step 12: the gradient of bucket {re.escape(str(bucket))} is not finite, \d losses are "
                     r"not: rank 0 loss nan at t = \d+.*nothing of it is saved.*--skip_nonfinite=10", said), said
    assert train.latest(config.out).name == "step-0000008" and len(rows(config)) == 12
    run(replace(config, skip_nonfinite=1))
    log = rows(config)
    assert log[:12] == world[1][:12] and [row["skipped"] for row in log] == 12 * [0] + 8 * [1]
    assert log[12]["loss"] is None and all(row["loss"] for row in log[13:])
    assert "step 12: the gradient" in capsys.readouterr().out
    monkeypatch.setattr(train, "loss_of", sick_at({5, 6}))
    with pytest.raises(ValueError, match="step 6"):
        run(replace(config, out=str(tmp_path / "twice"), skip_nonfinite=1))


def test_spikes_are_marked():
    draw = random.Random(0)
    losses = [draw.gauss(0.5, 0.05) for _ in range(500)]
    marks = [train.is_spike(loss, losses[max(0, i - 50):i]) for i, loss in enumerate(losses)]
    assert not any(marks)
    assert train.is_spike(1.0, losses) and train.is_spike(1.0, [*losses[:10], None])
    assert not any(train.is_spike(*case) for case in ((1.0, losses[:9]), (None, losses), (0.1, losses)))


def test_tensorboard_gets_the_log(world, tmp_path, monkeypatch):
    """If the package is there."""
    seen = {}
    board = SimpleNamespace(add_scalar=lambda name, value, step: seen.setdefault(name, []).append((step, value)))
    fake = SimpleNamespace(SummaryWriter=lambda folder, purge_step: board)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    run(replace(world[0], out=str(tmp_path / "run"), steps=3))
    assert seen["loss"] == [(row["step"], row["loss"]) for row in world[1][:3]] and {"grad_norm", "lr"} < set(seen)


def test_bench_times_each_bucket(world, tmp_path, monkeypatch, capsys):
    """The same loop on random latents; nothing is read, nothing is written."""
    monkeypatch.chdir(tmp_path)
    train.bench(replace(world[0], data="nowhere", vae="nowhere", text_encoder="nowhere", out="nowhere", cache=""))
    ops, head, columns, *lines = capsys.readouterr().out.splitlines()
    assert ops.startswith("ops: ") and head.startswith("1 x ") and [line.split()[:4] for line in lines] == [
        ["32", "x", "1", "8"], ["32", "x", "8", "4"]]
    assert all(float(cell.replace(",", "")) > 0 for line in lines for cell in line.split()[4:6])
    assert not any(tmp_path.iterdir())


def test_profile_writes_a_trace(world, tmp_path, capsys):
    train.bench(replace(world[0], buckets={"32": {1: (1.0, 2)}}), str(tmp_path / "trace.json"))
    assert "aten::mm" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]) > 1000


def test_what_memory_does_not_hold_is_not_timed(world, monkeypatch):
    """The run is made anew: what FSDP holds half way cannot go on."""
    _, measure = train.stopwatch(world[0])
    loss_of, made = train.loss_of, []

    def limited(model, batch, *args):
        made.append(model)
        out = loss_of(model, batch, *args)
        if len(batch["slots"]) > 4:
            raise torch.OutOfMemoryError("too much")
        return out

    monkeypatch.setattr(train, "loss_of", limited)
    assert measure(("32", 8), 4, steps=1)[0] > 0 and measure(("32", 8), 5, steps=1) == (math.inf, None)
    assert measure(("32", 8), 4, steps=1)[0] > 0 and len({id(model) for model in made}) == 2


@pytest.mark.parametrize("name", ["p.pth", "p/config.json", "p/transformer/config.json"])
def test_init_takes_pixarts_weights(world, tmp_path, monkeypatch, name):
    """Which from_pixart makes of them: tests/test_model.py."""
    model, given = train.build_model(world[0], train.start_processes().mesh), filled(world[0]).state_dict()
    monkeypatch.setattr(train, "from_pixart", lambda path, config, seed: {tmp_path / path.name: dict(given)}[path])
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}")
    train.load_weights(model, tmp_path / name.split("/")[0])
    assert all(torch.equal(value.full_tensor() if hasattr(value, "full_tensor") else value, given[name])
               for name, value in model.state_dict().items())


def test_init_takes_open_soras_weights(world, tmp_path):
    """A folder with config.json and model.safetensors."""
    model, given = train.build_model(world[0], train.start_processes().mesh), filled(world[0]).state_dict()
    (tmp_path / "config.json").write_text("{}")
    save_file(given, tmp_path / "model.safetensors")
    train.load_weights(model, tmp_path)
    assert all(torch.equal(value.full_tensor() if hasattr(value, "full_tensor") else value, given[name])
               for name, value in model.state_dict().items())
    save_file(given | {"rope.freqs": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"misshapen rope.freqs \[3\]"):
        train.load_weights(model, tmp_path)


def test_init_may_name_pixart_on_the_hub(tmp_path, monkeypatch):
    files = []
    monkeypatch.setattr(sample, "snapshot_download",
                        lambda name, allow_patterns: files.extend(allow_patterns) or str(tmp_path / name))
    assert train.find_weights("PixArt-alpha/PixArt-XL-2-1024-MS") == tmp_path / "PixArt-alpha/PixArt-XL-2-1024-MS"
    assert files == ["transformer/*", "config.json", "model.safetensors"]   # the last two are Open-Sora's
    (tmp_path / "w.safetensors").touch()
    assert train.find_weights(tmp_path / "w.safetensors") == tmp_path / "w.safetensors"


# ---------------------------------------------------------------- help and errors
def test_help_shows_commands_and_then_every_field(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and 0 < said.index("torchrun") < said.index("\ninstead of training:\n")
    shown = re.findall(r"^    (\w+): [^#\n]+", said, re.M)
    assert shown == [field.name for kind in (configs.Config, configs.STDiTConfig) for field in fields(kind)]
    assert re.search(r"lr: float +# AdamW's step", said) and re.search("read_timeout: float = 60.0 +# seconds", said)


def stderr_of(config, capsys, monkeypatch, *args, status=2):
    path = Path(f"{config.out}.py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(configs.dump(config))
    monkeypatch.setattr(sys, "argv", ["train.py", str(path), *args])
    with pytest.raises(SystemExit) as stopped:
        train.main()
    assert stopped.value.code == status
    return capsys.readouterr().err


@pytest.mark.parametrize("arg, said", {
    "--learning_rate=1": "there is no learning_rate",
    "--mask_ratios={'mask_non': 1.0}": "did you mean 'mask_no'",
    "--data=nowhere/meta.csv": "no file nowhere/meta.csv - `python -m assets.shapes DIR`",
    "--buckets={'720p': {16: (1.0, 1)}}": "no clip fits any bucket",
    "--init=nowhere": "init='nowhere' is not there",
    "--init=README.md": "README.md cannot be read: ",
    f"--out={ROOT / 'README.md'}": "out='.*README.md' is a file, expected a folder",
    "--vae=/no/such/folder": "AutoencoderKL '/no/such/folder'",
    "--lr=1e30": "the gradient of bucket .* is not finite",
}.items())
def test_mistakes_are_told_in_one_line(world, tmp_path, capsys, monkeypatch, arg, said):
    message = stderr_of(replace(world[0], out=str(tmp_path / "run")), capsys, monkeypatch, arg)
    error = message[message.index("error: "):]
    assert re.search(said, error), error
    assert "Traceback" not in message and (error.count("\n") == 1 or "bucket" in said)


def test_one_rank_says_it(world, tmp_path):
    done = start(replace(world[0], out=str(tmp_path / "run"), data="nowhere/meta.csv"), "run", torchrun=2)
    assert done.returncode and done.stderr.count("error: ") == 1 and "nowhere/meta.csv" in done.stderr, done.stderr


def test_a_save_that_fails_leaves_the_last_one_whole(world, tmp_path, capsys, monkeypatch):
    """A full disk at the checkpoints of steps 16 and 20: it is told at once, again at the end, and the run goes on."""
    config = replace(world[0], out=str(tmp_path / "run"))
    write = WRITER.write_data

    def full(self, *args):
        if (tmp_path / "run/latest").is_file():
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(WRITER, "write_data", full)
        said = stderr_of(config, capsys, patch)
    assert "step 16 could not be saved: [Errno 28] No space left on device, " in said
    assert "step-0000008 is whole; the next save is tried at step 20" in said
    assert re.search(r"error: step 20 could not .* goes on from .*step-0000008\n$", said), said
    assert sorted(p.name for p in (tmp_path / "run").glob("*s*-*")) == ["step-0000008"]
    run(config)
    assert rows(config) == world[1]


@pytest.mark.parametrize("owner, name, error, said, whole", [
    (WRITER, "write_data", RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"),
     "a file came out shorter than what was written to it, ", "none before it"),
    (train, "save_file", SafetensorError("I/O error: No space left on device (os error 28)"),
     "model.safetensors cannot be written: I/O error: No space left on device (os error 28), ", "step-0000008")],
    ids=["torch", "safetensors"])
def test_a_full_disk_in_other_words(world, tmp_path, capsys, monkeypatch, owner, name, error, said, whole):
    """At step 8 only: the run goes on, and nothing that is half written takes up the disk."""
    config, write, left = replace(world[0], out=str(tmp_path / "run")), getattr(owner, name), []

    def full(*args):
        if left:
            left.append(sorted(path.name for path in (tmp_path / "run").glob(".*.part")))
            return write(*args)
        left.append([])
        if name == "save_file":
            args[1].write_bytes(b"half")
        raise error

    monkeypatch.setattr(owner, name, full)
    run(config)
    message = capsys.readouterr().err
    assert f"step 8 could not be saved: {tmp_path / 'run' if name == 'save_file' else ''}" in message
    assert said in message and f"{whole} is whole; the next save is tried at step 16" in message
    assert left == [[]] * 3 and rows(config) == world[1]
    assert all(torch.equal(value, weights(world[0])[name]) for name, value in weights(config).items())


if __name__ == "__main__":                                                  # in a process that `start` started
    mode, *args, path = sys.argv[1:]
    sys.argv[1:] = [path]
    torch.set_num_threads(1)
    train.LOG_EVERY = 1
    loss_of, kill = train.loss_of, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    if mode == "die-at":
        train.loss_of = lambda *inputs: kill() if inputs[4] == int(args[0]) else loss_of(*inputs)
    if mode == "die-once" and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        train.loss_of = lambda *inputs: kill() if inputs[4] == int(args[0]) else loss_of(*inputs)
    if mode == "signal-at":                                                 # only the first of several gets it
        ask = lambda: os.environ.get("RANK", "0") == "0" and os.kill(os.getpid(), int(args[1]))
        train.loss_of = lambda *inputs: (inputs[4] == int(args[0]) and ask(), loss_of(*inputs))[1]
    if mode == "die-in-save":
        WRITER.finish = kill                            # all is written but what makes it whole
    if mode == "gradients":
        run(configs.load(path), Path(args[0]))
    else:
        train.main()
