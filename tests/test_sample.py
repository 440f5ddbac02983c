"""sample.py against recorded samplings of the release, diffusers and exact solutions; then its command line."""
import inspect
import json
import math
import os
import pickle
import shlex
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import av
import diffusers
import numpy as np
import pytest
import torch
import transformers
from einops import rearrange
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import configs
import sample
from assets.shapes import BACKGROUNDS, Thing, render
from data import UnreadableClip, read_window, slot_generator, to_uint8, write_video
from inputs import example_inputs
from masks import Given, edit, parse_strategy
from model import STDiT, STDiTConfig, from_upstream
from reader import Judge, obey, prompts as prompts_of_shapes, read_clip, read_frame
from sample import (export, generate, guide, load, noise_schedule, sample_latents, step_back,
                    offload_blocks, timesteps)
from vae import load_text_encoder, load_vae

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
SCHEDULES = load_file(GOLDEN / "b_schedules.safetensors")
PARSING = json.loads((GOLDEN / "c_inference_parsing.json").read_text())
TINY_VAE = ROOT / "assets/tiny/vae"
TINY_T5 = ROOT / "assets/tiny/text_encoder"
# DDPM, section 4: linear betas over 1000 steps
ALPHAS_CUMPROD = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)

each_sampler = pytest.mark.parametrize("sampler", ["iddpm", "ddim", "dpm"])
each_sampler_and_prediction = pytest.mark.parametrize("sampler, prediction",
                                                      [("iddpm", "v"), ("ddim", "eps"), ("dpm", "eps"), ("dpm", "v")])


def relative(a, b):
    return float((a - b).norm() / b.norm())


def abar(t):
    return ALPHAS_CUMPROD[t].float().view(-1, 1, 1, 1, 1)


class Standin:
    """A network that records its calls; `eps(x, t, m)` is its answer, with m [B] the mean of each caption.

    marks_given: answers 0.05 more for given frames, as in the recorded samplings."""

    def __init__(self, eps=None, prediction="eps", null=0.0, learned_variance=True, marks_given=True):
        self.null_y = torch.full((10, 8), null)
        self.config = SimpleNamespace(patch_size=(1, 2, 2), as_released=False)
        self.eps = eps or tanh_eps
        self.prediction = prediction
        self.learned_variance = learned_variance
        self.marks_given = marks_given
        self.calls = []
        self.answers = []

    def __call__(self, x, t, y, y_mask, x_mask=None, **conditioning):
        self.calls.append(dict(x=x, t=t, y=y, y_mask=y_mask, x_mask=x_mask, **conditioning))
        m = y.mean((1, 2)).view(-1, 1, 1, 1, 1)
        u = t.view(-1, 1, 1, 1, 1) / 1000
        answer = self.eps(x, t, m)
        if x_mask is not None and self.marks_given:
            answer = answer + 0.05 * rearrange(~x_mask, "b t -> b 1 t 1 1")
        if self.prediction == "v":                                      # the same function, expressed as v
            answer = (answer - (1 - abar(t)).sqrt() * x) / abar(t).sqrt()
        self.answers.append(answer)
        if not self.learned_variance:
            return answer
        return torch.cat([answer, 0.8 * torch.cos(x + m + u)], dim=1)


def tanh_eps(x, t, m):
    u = t.view(-1, 1, 1, 1, 1) / 1000
    return torch.tanh(0.6 * x + 0.2 * x.roll(1, dims=2) + m * (1 - u)) + 0.1 * torch.sin(3 * u)


MEAN = 0.5
STD = 0.3


def gaussian_eps(x, t, m):
    """Returns the best answer when the latents are drawn from N(MEAN, STD^2)."""
    return (1 - abar(t)).sqrt() * (x - abar(t).sqrt() * MEAN) / (abar(t) * STD**2 + 1 - abar(t))


def gaussian_caption_eps(x, t, m):
    """Returns the best answer when the caption moves the mean of the latents by m."""
    return gaussian_eps(x - abar(t).sqrt() * m, t, m)


def gaussian_flow(z):
    """Returns where the exact deterministic sampler takes noise z when the latents are N(MEAN, STD^2)."""
    a = ALPHAS_CUMPROD[-1].float()
    return MEAN + STD * (z - a.sqrt() * MEAN) / (a * STD**2 + 1 - a).sqrt()


def request(B=2, T=4, seed=0, first=0):
    """Returns arguments of sample_latents for clips first..first + B - 1, which differ in caption and noise."""
    generators = [slot_generator(seed, 0, i, "sample") for i in range(first, first + B)]
    z = torch.stack([torch.randn(4, T, 3, 4, generator=g) for g in generators])
    y = torch.stack([torch.full((10, 8), 0.1 * i) for i in range(first, first + B)])
    y_mask = torch.arange(10).expand(B, 10) < 3
    conditioning = {name: torch.full((B,), 32.0) for name in ("height", "width", "num_frames", "ar", "fps")}
    return dict(z=z, y=y, y_mask=y_mask, cond=conditioning, generators=generators)


def clean_latents(T=4):
    return torch.randn(2, 4, T, 3, 4, generator=torch.Generator().manual_seed(5))


# ---------------------------------------------------------------- the schedule
def test_timesteps_are_the_releases():
    cases = json.loads((GOLDEN / "b_iddpm.json").read_text())["space_timesteps"]
    assert len(cases) == 5
    for name, expected in cases.items():
        assert timesteps(int(name.split("|")[1])) == expected[::-1], name
    assert timesteps(1) == [999]
    assert timesteps(2) == [999, 0]
    # A second-order step to 0 would overshoot, so dpm stops before it.
    assert timesteps(10, "dpm") == timesteps(11)[:-1]
    assert timesteps(1, "dpm") == [999]
    for steps, sampler in [(0, "iddpm"), (0, "dpm"), (1001, "ddim"), (1000, "dpm")]:
        with pytest.raises(ValueError, match=f"steps={steps}"):
            timesteps(steps, sampler)


@each_sampler
def test_the_schedule_matches_the_releases(sampler):
    """Compares alphas and betas to what the release's fp32 leaves of them; small betas need fp64 here."""
    alphas = noise_schedule(sampler).alphas_cumprod
    torch.testing.assert_close(alphas.double(), ALPHAS_CUMPROD, rtol=1e-12, atol=0)
    for case in ("full1000", "steps100", "steps10"):
        ours = alphas[SCHEDULES[f"{case}.timestep_map"]]
        torch.testing.assert_close(ours.float(), SCHEDULES[f"{case}.alphas_cumprod"], rtol=1e-6, atol=0)
        previous = torch.cat([torch.ones(1), ours[:-1]])
        torch.testing.assert_close((1 - ours / previous).float(), SCHEDULES[f"{case}.betas"], rtol=1e-6, atol=0)


# ---------------------------------------------------------------- recorded steps of the release
def draw_recorded_noise(monkeypatch, noises):
    """Lets the n-th draw of generator i be noises[n, i]; returns the generators."""
    generators = [torch.Generator() for _ in range(noises.shape[1])]
    num_drawn = [0] * len(generators)

    def randn(*shape, generator, **options):
        clip = [g is generator for g in generators].index(True)
        num_drawn[clip] += 1
        shape = shape if isinstance(shape[0], int) else tuple(shape[0])
        return noises[num_drawn[clip] - 1, clip].reshape(shape).clone()
    monkeypatch.setattr(torch, "randn", randn)
    return generators


def sample_as_recorded(monkeypatch, case):
    """Repeats a recorded sampling of ten steps with its noises; returns (golden, the network's calls, the result)."""
    golden = load_file(GOLDEN / f"b_sample_{case}.safetensors")
    strength = golden.get("mask")
    noises = golden["noises"]
    z = golden["z"]
    given = {}
    if strength is not None:                    # there z holds the given frames, and each step draws noise twice:
        given = dict(known=z, strength=strength)                    # for a frame that joins, and for the posterior
        held = rearrange(strength == 0, "b t -> b 1 t 1 1")
        z = torch.where(held, noises[18], z)                        # held frames of the release join at the last step
        noises = noises[1::2]
    model = Standin()
    model.null_y = golden["null"]
    generators = draw_recorded_noise(monkeypatch, noises)
    x = sample_latents(model, z, golden["y"][:, 0], torch.ones(2, 10, dtype=torch.bool), {}, generators=generators,
                       steps=10, cfg_scale=7.0, as_released="cfg3" in case, **given)
    return golden, model.calls, x


def first_coefficient():
    """Returns what the release multiplies its last x_0 by: 1 in theory, but its fp32 1 - abar_0 is 2e-4 off."""
    return SCHEDULES["steps10.posterior_mean_coef1"][0]


@pytest.mark.parametrize("case", ["nomask_cfg3", "ones_cfg3", "ref_cfg3", "ref_cfgNone"])
def test_sampling_repeats_the_releases(monkeypatch, case):
    """Ten guided steps: without masks, with masks that hold nothing, and with references.  All that the network is
    given at each step is compared, so every intermediate x is.

    The release changes a held frame in its very last step; here it stays as given, bit for bit."""
    golden, calls, x = sample_as_recorded(monkeypatch, case)
    strength = golden.get("mask", torch.ones(2, 6))
    held = rearrange(strength == 0, "b t -> b 1 t 1 1").expand_as(x)
    assert len(calls) == 10
    for i, call in enumerate(calls):
        assert call["t"].tolist() == [int(golden["model_t"][i][0])] * 4
        if "mask" in golden:
            assert torch.equal(call["x_mask"], golden["model_x_mask"][i].repeat(2, 1))
        else:
            assert call["x_mask"] is None
        for half in call["x"].chunk(2):
            assert torch.equal(half[held], golden["z"][held])
            assert relative(half * ~held, golden["model_x"][i] * ~held) < 1e-6
    assert torch.equal(x[held], golden["z"][held])
    assert relative(x * ~held * first_coefficient(), golden["steps"][-1] * ~held) < 1e-6


def one_step(monkeypatch, sampler, t, x, out, noise):
    """Returns x after the step at t of a sampling in 100 steps, from the network's answer and the noise drawn."""
    scheduler = noise_schedule(sampler)
    scheduler.set_timesteps(timesteps=timesteps(100))
    if sampler != "iddpm":
        scheduler.set_begin_index(timesteps(100).index(t))
    with monkeypatch.context() as patched:
        generators = draw_recorded_noise(patched, noise[None])
        return step_back(scheduler, out, t, x, generators)


def test_single_steps_are_the_releases(monkeypatch):
    """Six t of a sampling in 100 steps.  At t = 10 the release's fp32 coefficients are 2.4e-5 off."""
    golden = load_file(GOLDEN / "b_single_step.safetensors")
    for i, t in enumerate(golden["model_t"]):
        x, out, noise = (golden[name][i : i + 1] for name in ("x", "model_output", "p_sample.noise"))
        tolerance = 5e-5 if t == 10 else 2e-6
        coefficient = SCHEDULES["steps100.posterior_mean_coef1"][0] if t == 0 else 1
        for draw, expected in [(0 * noise, "pmv.clipFalse.mean"), (noise, "p_sample.sample")]:
            ours = one_step(monkeypatch, "iddpm", t, x, out, draw)
            assert relative(ours * coefficient, golden[expected][i : i + 1]) < tolerance, (int(t), expected)
        ours = one_step(monkeypatch, "ddim", t, x, out, noise)
        assert relative(ours, golden["ddim.eta0.0.sample"][i : i + 1]) < 2e-6, int(t)


def test_guidance_is_the_releases():
    """Three or all of the latent channels are guided, never the variances."""
    golden = load_file(GOLDEN / "b_forward_with_cfg.safetensors")
    out_cond, out_null = golden["model_out"].chunk(2)
    for channels, name in [(3, "cfg3"), (None, "cfgNone")]:
        torch.testing.assert_close(guide(out_cond, out_null, 7.0, channels), golden[name][:2])
    torch.testing.assert_close(guide(out_cond, out_null, 1.0), out_cond)


# ---------------------------------------------------------------- known answers
@pytest.mark.parametrize("sampler, steps, error", [("ddim", 50, 0.05), ("ddim", 200, 0.013), ("dpm", 50, 0.012)])
def test_deterministic_samplers_converge_to_the_exact_solution(sampler, steps, error):
    arguments = request()
    x = sample_latents(Standin(gaussian_eps), **arguments, steps=steps, sampler=sampler, cfg_scale=1.0)
    assert relative(x, gaussian_flow(arguments["z"])) < error


def test_iddpm_has_the_right_distribution():
    x = sample_latents(Standin(gaussian_eps, "v"), **request(B=16, T=8), steps=50, prediction="v", cfg_scale=1.0)
    assert abs(float(x.mean()) - MEAN) < 0.03                           # of 6,144 values
    assert abs(float(x.std()) - STD) < 0.03


def test_ddim_is_diffusers_ddim(monkeypatch):
    """Compares single steps to DDIMScheduler, on the even spacing that it knows (t = 999, 989, .., 9)."""
    theirs = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    theirs.alphas_cumprod = ALPHAS_CUMPROD
    theirs.set_timesteps(100)
    ours = noise_schedule("ddim")
    ours.set_timesteps(timesteps=theirs.timesteps.tolist())
    x = x_theirs = request()["z"]
    for t in theirs.timesteps:
        x = step_back(ours, tanh_eps(x, t[None], 0.3), t, x, None)
        x_theirs = theirs.step(tanh_eps(x_theirs, t[None], 0.3), t, x_theirs).prev_sample
    assert relative(x, x_theirs) < 2e-5


def test_dpm_is_diffusers():
    """Compares to their class as it comes, with its own timesteps."""
    theirs = diffusers.DPMSolverMultistepScheduler()
    theirs.set_timesteps(20)
    arguments = request()
    x = arguments["z"]
    for t in theirs.timesteps:
        x = theirs.step(gaussian_eps(x, t[None], 0), t, x).prev_sample
    ours = sample_latents(Standin(gaussian_eps), **arguments, steps=20, sampler="dpm", cfg_scale=1.0)
    assert relative(ours, x) < 1e-5


@each_sampler
def test_eps_and_v_give_the_same_sample(sampler):
    """One guided function, expressed as eps or as v; near t = 1000 fp32 loses a little of eps."""
    samples = []
    for prediction in ("eps", "v"):
        model = Standin(gaussian_caption_eps, prediction)
        samples.append(sample_latents(model, **request(), steps=10, sampler=sampler, prediction=prediction,
                                      cfg_scale=3.0))
    assert relative(*samples) < 1e-3


def test_without_a_learned_variance_it_is_the_posteriors(monkeypatch):
    """A network with C channels out: iddpm is diffusers' DDPM with variance_type="fixed_small"."""
    arguments = request(B=1)
    noises = torch.randn(10, 1, 4, 4, 3, 4, generator=torch.Generator().manual_seed(7))
    theirs = diffusers.DDPMScheduler(clip_sample=False)
    theirs.set_timesteps(timesteps=timesteps(10))
    x = arguments["z"]
    with monkeypatch.context() as patched:
        [generator] = draw_recorded_noise(patched, noises)
        for t in theirs.timesteps:
            x = theirs.step(gaussian_eps(x, t[None], 0), t, x, generator=generator).prev_sample
    with monkeypatch.context() as patched:
        arguments["generators"] = draw_recorded_noise(patched, noises)
        ours = sample_latents(Standin(gaussian_eps, learned_variance=False), **arguments, steps=10, cfg_scale=1.0)
    assert relative(ours, x) < 1e-5


# ---------------------------------------------------------------- what the network is given
def test_guidance_asks_with_caption_and_with_a_full_length_null_caption():
    arguments = request()
    for cut in (False, True):
        model = Standin(null=0.7)
        sample_latents(model, **arguments, steps=2, cfg_scale=3.0, as_released=cut)
        assert len(model.calls) == 2
        call = model.calls[0]
        null = (call["y"] == 0.7).all(dim=(1, 2))
        assert null.sum() == 2
        assert torch.equal(call["y"][~null], arguments["y"])
        assert torch.equal(call["y_mask"][~null], arguments["y_mask"])
        assert torch.equal(call["x"][null], call["x"][~null])
        assert call["fps"].tolist() == [32] * 4
        assert call["y_mask"][null].all() != cut                        # Q5: cut to the caption's length


def test_without_guidance_the_null_caption_is_not_asked_for():
    model = Standin(null=0.7)
    sample_latents(model, **request(), steps=2, cfg_scale=1.0)
    assert [len(call["x"]) for call in model.calls] == [2, 2]
    assert not (model.calls[0]["y"] == 0.7).any()


@each_sampler
def test_latents_do_not_depend_on_their_batch(sampler):
    settings = dict(steps=4, sampler=sampler, cfg_scale=3.0)
    together = sample_latents(Standin(), **request(B=3), **settings)
    alone = sample_latents(Standin(), **request(B=1, first=2), **settings)
    torch.testing.assert_close(together[2:], alone)
    assert relative(together[:1], together[1:2]) > 0.1
    assert relative(sample_latents(Standin(), **request(B=1, first=2, seed=1), **settings), alone) > 0.1


@each_sampler_and_prediction
def test_given_frames_stay_bit_for_bit(sampler, prediction):
    known = clean_latents()
    model = Standin(prediction=prediction)
    strength = torch.tensor([[0.0, 1.0, 1.0, 0.1], [1.0] * 4])                         # 0.1 of 6 steps: none
    settings = dict(steps=6, sampler=sampler, prediction=prediction, cfg_scale=3.0)
    x = sample_latents(model, **request(), **settings, known=known, strength=strength)
    held = rearrange(strength < 1, "b t -> b 1 t 1 1").expand_as(x)
    assert torch.equal(x[held], known[held])
    assert not (x == known)[~held].any()
    assert x.isfinite().all()
    for call in model.calls:
        assert torch.equal(call["x"][:2][held], known[held])
        assert torch.equal(call["x_mask"], (strength == 1).repeat(2, 1))
    free = sample_latents(Standin(prediction=prediction), **request(), **settings)
    torch.testing.assert_close(free[1], x[1])                           # a clip without given frames is as without any


@pytest.mark.parametrize("steps, joined", [(10, [0, 0, 2, 3, 5, 9, 10]), (100, [0, 9, 29, 30, 50, 99, 100])])
def test_an_edited_frame_is_generated_in_as_many_steps_as_in_the_release(steps, joined):
    """int(strength * steps) of the last steps, in fp32: 0.29 of 100 steps are 29 (in fp64 28), of 10 they are 2."""
    strength = torch.tensor([[0.0, 0.09, 0.29, 0.3, 0.5, 0.999, 1.0]])
    model = Standin()
    sample_latents(model, **request(B=1, T=7), steps=steps, cfg_scale=1.0, known=clean_latents(7)[:1],
                   strength=strength)
    for i, call in enumerate(model.calls):
        assert call["x_mask"].tolist() == [[steps - i <= last for last in joined]]


@each_sampler_and_prediction
def test_each_frame_has_the_noise_level_that_the_network_is_told(sampler, prediction):
    """The level is measured: without its clean part the input has a standard deviation of sqrt(1 - abar).  The
    network's answers are exact here, so this holds at every step of an edited frame too."""
    z, known = torch.randn(2, 1, 4, 5, 24, 32, generator=torch.Generator().manual_seed(1))
    strength = torch.tensor([[0.0, 0.29, 0.5, 0.8, 1.0]])

    def exact_eps(x, t, m):
        return (x - abar(t).sqrt() * known) / (1 - abar(t)).sqrt()

    model = Standin(exact_eps, prediction, learned_variance=False, marks_given=False)
    sample_latents(model, **request(B=1) | dict(z=z), steps=10, sampler=sampler, prediction=prediction, cfg_scale=1.0,
                   known=known, strength=strength)
    for call in model.calls:
        signal = abar(call["t"])[0].sqrt()
        noise = (1 - abar(call["t"])[0]).sqrt()
        for frame, is_noised in enumerate(call["x_mask"][0]):
            x = call["x"][0, :, frame]
            x_0 = known[0, :, frame]
            if is_noised:                                               # 3,072 values: 0.013 is a standard deviation
                level = float((x - signal * x_0).std() / noise)
                assert abs(level - 1) < 0.05, (call["t"], frame, level)
            else:
                assert torch.equal(x, x_0)


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_frame_that_joins_has_a_true_history(prediction):
    """Its first step, of second order, is diffusers' for this frame alone after five steps that foresaw x_0 exactly."""
    kind = {"eps": "epsilon", "v": "v_prediction"}[prediction]
    known = clean_latents()[:, :, 1:2]
    z = request()["z"][:, :, 1:2]
    model = Standin(prediction=prediction)
    strength = torch.tensor([[0.0, 0.5, 1.0, 0.29]] * 2)
    sample_latents(model, **request(), steps=10, sampler="dpm", prediction=prediction, cfg_scale=1.0,
                   known=clean_latents(), strength=strength)
    theirs = diffusers.DPMSolverMultistepScheduler(prediction_type=kind)
    theirs.set_timesteps(10)
    x = abar(999).sqrt() * known + (1 - abar(999)).sqrt() * z
    for i, t in enumerate(theirs.timesteps[:6]):
        answer = z if prediction == "eps" else abar(t).sqrt() * z - (1 - abar(t)).sqrt() * known
        if i == 5:
            assert relative(model.calls[5]["x"][:, :, 1:2], x) < 1e-5
            answer = model.answers[5][:, :, 1:2]
        x = theirs.step(answer, t, x).prev_sample
    assert relative(model.calls[6]["x"][:, :, 1:2], x) < 1e-5


@each_sampler
def test_editing_goes_from_the_input_to_something_new(sampler):
    known = clean_latents()
    settings = dict(steps=10, sampler=sampler, cfg_scale=1.0)
    distances = []
    for strength in (0.0, 0.3, 0.6, 0.9):
        x = sample_latents(Standin(gaussian_eps), **request(), **settings, known=known,
                           strength=torch.full((2, 4), strength))
        distances.append(relative(x, known))
    assert distances[0] == 0 < distances[1] < distances[2] < distances[3]
    free = sample_latents(Standin(gaussian_eps), **request(), **settings)
    all_new = sample_latents(Standin(gaussian_eps), **request(), **settings, known=known, strength=torch.ones(2, 4))
    assert torch.equal(all_new, free)


@pytest.mark.parametrize("known, strength", [(clean_latents(), None), (None, torch.ones(2, 4)),
                                             (clean_latents(), torch.ones(2, 3))])
def test_given_latents_need_a_strength_for_each_frame(known, strength):
    with pytest.raises(ValueError, match="strength"):
        sample_latents(Standin(), **request(), steps=3, known=known, strength=strength)


# ---------------------------------------------------------------- generate: captions in, frames out
class StandinVAE:
    """Goes 8x down by averaging and up by repeating; z holds R, G, B and their mean."""
    down = 8
    channels = 4

    def encode(self, video):
        cells = rearrange(video, "b c t (h a) (w d) -> b c t h w a d", a=8, d=8).mean((-1, -2))
        return torch.cat([cells, cells.mean(1, keepdim=True)], dim=1)

    def decode(self, z):
        return z[:, :3].repeat_interleave(8, 3).repeat_interleave(8, 4)


def decoded(z):
    """Returns the frames, uint8 [T H W 3], of one clip's latents."""
    return to_uint8(StandinVAE().decode(z)[0])


def standin_text(captions):
    y = torch.stack([torch.full((10, 8), len(caption) / 50) for caption in captions])
    return y, torch.arange(10).expand(len(captions), 10) < 3


def make(prompts=("a red circle",), model=None, text_encoder=standin_text, **changes):
    settings = dict(num_frames=4, height=16, width=24, fps=24, steps=3, seed=3, sampler="ddim", cfg_scale=2.0)
    return generate(model or Standin(gaussian_eps), StandinVAE(), text_encoder, list(prompts), **settings | changes)


def flat_frames(seed, num_frames, rows=2, columns=3):
    """Returns uint8 [T 8*rows 8*columns 3] of one random colour per cell: StandinVAE gives them back exactly."""
    cells = np.random.default_rng(seed).integers(0, 256, (num_frames, rows, columns, 3), np.uint8)
    return cells.repeat(8, axis=1).repeat(8, axis=2)


@each_sampler
def test_a_video_is_the_same_alone_and_in_a_batch(sampler):
    prompts = ["one", "two words", "now three words"]
    together = make(prompts, Standin(), sampler=sampler, batch_size=3)
    alone = make(prompts, Standin(), sampler=sampler, batch_size=1)
    assert together.shape == (3, 4, 16, 24, 3)
    assert together.dtype == np.uint8
    assert np.abs(together.astype(int) - alone).max() <= 1
    assert (together[0] != together[1]).any()
    np.testing.assert_array_equal(make(prompts, Standin(), sampler=sampler, batch_size=1), alone)


def test_noise_differs_between_seeds_prompts_and_segments():
    noises = []
    for seed in (0, 1, 2):
        model = Standin()
        make(["one", "two"], model, seed=seed, segments=3, overlap=1, steps=1, cfg_scale=1.0)
        for call in model.calls:                                        # one per segment: 2 prompts in a batch
            noises += [tuple(x[:, 1:].flatten().tolist()) for x in call["x"]]
    assert len(noises) == len(set(noises)) == 3 * 2 * 3


def test_the_network_is_given_sizes_and_rates():
    def conditioning(**changes):
        model = Standin(gaussian_eps)
        make(model=model, **changes)
        return {name: float(model.calls[-1][name][0]) for name in ("height", "width", "num_frames", "ar", "fps")}

    assert conditioning(frame_interval=3) == dict(height=16, width=24, num_frames=4, ar=1.5, fps=8)
    released = conditioning(frame_interval=3, as_released=True)
    assert released == dict(height=16, width=24, num_frames=4, ar=pytest.approx(16 / 24), fps=24)
    assert conditioning(num_frames=1)["fps"] == 120                     # a still image


def test_odd_sizes_are_rounded_down_and_reported(capsys):
    model = Standin(gaussian_eps)
    assert make(model=model, height=17, width=30).shape == (1, 4, 16, 24, 3)
    out = capsys.readouterr().out
    assert "17x30" in out and "16x24" in out
    assert float(model.calls[0]["height"][0]) == 17                     # as in the release: the size that was asked for
    assert float(model.calls[0]["width"][0]) == 30
    make()
    assert capsys.readouterr().out == ""


def test_the_released_mask_language_places_frames_of_references():
    """Each recorded strategy: a held frame is the reference's, the others are generated.

    One segment is made here; the release ignores groups of others, which are an error."""
    rows = [row for row in PARSING["apply_mask_strategy"]["rows"]
            if row["strategy"] and row["strategy"] != "-1,0" and row["loop_i"] == 0 and "out" in row]
    assert len(rows) >= 10
    references = [flat_frames(r, num_frames) for r, num_frames in enumerate((1, 4, 8))]
    model = Standin(gaussian_eps)
    strategies = []
    for row in rows:
        strategies.append([group for group in parse_strategy(row["strategy"]) if group.segment == 0])
    videos = make([row["strategy"] for row in rows], model, num_frames=8, references=[references] * len(rows),
                  strategies=strategies, batch_size=len(rows), steps=10)
    for i, row in enumerate(rows):
        for t, (strength, source) in enumerate(zip(row["out"]["mask"], row["out"]["z"])):
            joins = [bool(call["x_mask"][i, t]) for call in model.calls]
            assert sum(joins) == int(strength * 10), (row["strategy"], t)
            if strength == 0:
                expected = references[int(source) // 100 - 1][int(source) % 100]
                assert (videos[i, t] == expected).all(), (row["strategy"], t)


def test_only_the_clip_with_references_is_held():
    flat = flat_frames(0, 2)
    model = Standin(gaussian_eps)
    frames = make(["one", "two"], model, references=[None, [flat]], strategies=[None, [Given(length=2)]])
    assert (frames[1, :2] == flat).all()
    assert (frames[1, 2:] != flat).any()
    assert model.calls[0]["x_mask"].tolist() == [[True] * 4, [False, False, True, True]] * 2
    np.testing.assert_array_equal(frames[0], make(["one", "two"])[0])


def test_a_reference_of_another_shape_is_cropped_in_its_middle():
    """Without a strategy, its first frame is the video's first."""
    wide = flat_frames(1, 2, rows=2, columns=5)
    high = flat_frames(2, 2, rows=4, columns=3)
    blue = np.zeros((2, 50, 40, 3), np.uint8) + np.array([10, 20, 200], np.uint8)
    videos = make(["one", "two", "three"], references=[[wide], [high], [blue]])
    assert (videos[0, 0] == wide[0, :, 8:32]).all()
    assert (videos[1, 0] == high[0, 8:24]).all()
    assert (videos[2, 0] == blue[0, 0, 0]).all()                        # resized, too
    assert (videos[:, 1] != videos[:, 0]).any(axis=(1, 2, 3)).all()


@each_sampler
def test_a_clip_edited_by_nothing_comes_back_and_edited_by_all_is_forgotten(sampler):
    clip = flat_frames(3, 4)
    settings = dict(sampler=sampler, steps=4)

    def edited(strength, clip=clip):
        return make(references=[[clip]], strategies=[edit(strength, 4)], **settings)[0]

    def distance(strength):
        return np.abs(edited(strength).astype(int) - clip).mean()

    assert (edited(0.0) == clip).all()
    assert (edited(1.0) == make(**settings)[0]).all()
    assert 0 < distance(0.25) < distance(0.75)
    assert (edited(0.5) != edited(0.5, flat_frames(4, 4))).any()


def test_texts_of_segments_are_the_releases():
    """Compares but for the cleaning of captions, which takes the bars out of what does not start with |0|."""
    for case in PARSING["process_prompts"]:
        captions = []

        def text_encoder(asked, captions=captions):
            captions.extend(asked)
            return standin_text(asked)

        arguments = dict(segments=case["num_loop"], num_frames=2, overlap=1, steps=1, cfg_scale=1.0)
        if "error" in case:
            with pytest.raises(ValueError):
                make([case["inp"]], text_encoder=text_encoder, **arguments)
        else:
            make([case["inp"]], text_encoder=text_encoder, **arguments)
            assert [" ".join(text.replace("|", " ").lower().split()) for text in captions] == case["out"][0], case


def test_segments_start_with_the_last_frames_of_the_one_before():
    """Each has its own text and noise, is held at its start, and shared frames are shown once."""
    T, K = 6, 2
    prompt = "|0|one|1|now two words|2|three"
    model = Standin()
    video = make([prompt], model, num_frames=T, overlap=K, cfg_scale=1.0)[0]
    assert video.shape == (3 * (T - K) + K, 16, 24, 3)
    first_calls = model.calls[::3]
    assert [round(float(call["y"].mean()) * 50) for call in first_calls] == [3, 13, 5]
    assert first_calls[0]["x_mask"] is None
    for segment, call in enumerate(first_calls[1:], 1):
        assert call["x_mask"].tolist() == [[False] * K + [True] * (T - K)]
        start = segment * (T - K)
        assert (decoded(call["x"][:, :, :K]) == video[start : start + K]).all()
    assert len({frame.tobytes() for frame in video}) == len(video)      # none is shown twice
    assert make(["one"], num_frames=T, segments=4).shape[1] == 4 * (T - 1) + 1         # by default T // 4 are shared


@pytest.mark.parametrize("changes, named", [
    (dict(prompts=[]), "0 prompts"),
    (dict(prompts=["a", " "]), "prompt 1"),
    (dict(height=15), "15x24"),
    (dict(num_frames=0), "num_frames=0"),
    (dict(fps=0), "fps=0"),
    (dict(frame_interval=0), "frame_interval=0"),
    (dict(references=[None, None]), "2 references"),
    (dict(references=[np.zeros((2, 8, 8, 3), np.uint8)]), r"references: .*\[8, 8, 3\]"),
    (dict(strategies=[[Given()]]), "reference=0"),
    (dict(segments=0), "segment"),
    (dict(prompts=["a", "|0|a|1|b"]), "2 segments and prompt 0 has 1"),
    (dict(seed=2 ** 63), "seed=9223372036854775808"),
    (dict(segments=2, overlap=4), "overlap=4"),
    (dict(segments=2, strategies=[parse_strategy("1,1")]), "'1,1,0,0,1,0': reference=1"),
    (dict(steps=0), "steps=0"),
    (dict(sampler="euler"), "sampler='euler'"),
])
def test_mistakes_in_a_call_of_generate_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        make(**changes)


def test_all_is_checked_before_anything_is_sampled():
    """A mistake in the last segment of the last video."""
    model = Standin()
    with pytest.raises(ValueError, match="'2,9,0,0,1,0': reference=9"):
        make(["a", "b"], model, segments=3, batch_size=1, strategies=[None, [Given(segment=2, reference=9)]])
    assert not model.calls


# ---------------------------------------------------------------- the command line
def write_run(folder, prediction="v", seed=0, **shape):
    """Writes a run: a config and a small network of random weights, with the shipped autoencoder and T5."""
    shape = dict(depth=1, hidden_size=24, num_heads=2, in_channels=8, caption_channels=64,
                 model_max_length=16) | shape
    config = configs.Config(model=STDiTConfig(**shape), vae="assets/tiny/vae", text_encoder="assets/tiny/text_encoder",
                            data="d", buckets={"64": {1: (1.0, 2), 8: (1.0, 2), 16: (0.5, 1)}}, steps=1, fps=8.0,
                            mask_ratios={"mask_no": 1.0}, prediction=prediction, lr=1e-3, out="runs/test")
    folder.mkdir(exist_ok=True)
    (folder / "config.py").write_text(configs.dump(config))
    save_file(random_weights(config.model, seed), folder / "model.safetensors")
    return folder


def random_weights(shape, seed=0):
    """Returns weights of which none is zero: a fresh network answers 0 whatever it is asked."""
    model = STDiT(shape)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in model.state_dict().items():
        weights[name] = 0.1 * torch.randn(value.shape, generator=generator)
    weights["rope.freqs"] = model.rope.freqs.data
    return weights


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def command(run_script, checkpoint, tmp_path):
    """A function that runs sample.py on the CPU with a small checkpoint, into tmp_path / "out" unless asked otherwise;
    fails where it fails."""
    def run(*args):
        ended = run_script("sample", "--ckpt", checkpoint, "--device", "cpu", "--out", tmp_path / "out", *args)
        assert ended.status == 0, ended.err
        return ended.out
    return run


@pytest.fixture(autouse=True)
def no_enlargement(monkeypatch):
    """Small videos stay small, so that their frames can be read back."""
    monkeypatch.setattr(sample, "SHOWN_SIDE", 0)


@pytest.fixture
def calls(monkeypatch):
    """A list of what the network is given at each call, by name."""
    noted = []
    forward = STDiT.forward
    signature = inspect.signature(forward)

    def noting(self, *args, **named):
        noted.append(dict(signature.bind(self, *args, **named).arguments))
        return forward(self, *args, **named)
    monkeypatch.setattr(STDiT, "forward", noting)
    return noted


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with clips of 9 frames that carry their number: red.mp4 and blue.mp4 (24 fps), red.png, torn.mp4."""
    folder = tmp_path_factory.mktemp("clips")
    for color, direction, start, end in [("red", "right", (16, 32), (48, 32)), ("blue", "down", (32, 16), (32, 48))]:
        frames = render(Thing(color, "square", direction, 26, start, end), BACKGROUNDS[0], 9, 64, 64)
        write_video(folder / f"{color}.mp4", frames, 24)
        Image.fromarray(frames[0]).save(folder / f"{color}.png")
    (folder / "torn.mp4").write_bytes((folder / "red.mp4").read_bytes()[:600])
    (folder / "empty.txt").touch()
    (folder / "latin1.txt").write_bytes("a café".encode("latin-1"))
    return folder


def label(frame):
    """Returns the clip and number of a frame of `clips`, as in "red5": an object moves by 4 pixels a frame."""
    color, _, (x, y) = read_frame(frame)
    return f"{color}{round(((y if color == 'blue' else x) - 16) / 4)}"


def read_video(path):
    return read_window(str(path))[0].numpy()


QUICK = ("--sampler", "ddim", "--steps", 2)
SMALL = (*QUICK, "--num-frames", 4, "--size", "16x24")


def test_videos_and_contact_sheets_are_written(command, calls, tmp_path):
    """Defaults come from the checkpoint: the size and rate that it was trained with, and its prediction."""
    command("--prompt", "a red circle moves right", "A dog/cat: moves?", "日本", "long " * 50, "--steps", 2)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(files) == 4 * 3
    for stem in ("00-a-red-circle-moves-right", "01-a-dog-cat-moves", "02-prompt"):
        assert {f"{stem}.mp4", f"{stem}.png", f"{stem}.json"} <= set(files)
        assert read_video(tmp_path / f"out/{stem}.mp4").shape == (8, 64, 64, 3)
        assert Image.open(tmp_path / f"out/{stem}.png").width > 8 * 64
    assert max(len(name) for name in files) < 60                        # whatever the prompt
    assert len(calls) == 2
    conditioning = {name: float(calls[0][name][0]) for name in ("height", "width", "num_frames", "ar", "fps")}
    assert conditioning == dict(height=64, width=64, num_frames=8, ar=1, fps=8)
    assert calls[0]["x_mask"] is None


def test_each_video_has_the_embedding_of_its_own_caption(command, calls):
    captions = ["a red circle", "a blue square moves up", "a green triangle"]
    command("--prompt", *captions, *SMALL)
    expected, expected_mask = load_text_encoder(TINY_T5, 16)(captions)
    y = calls[0]["y"][:3]
    y_mask = calls[0]["y_mask"][:3]
    assert torch.equal(y_mask, expected_mask)
    torch.testing.assert_close(y[y_mask], expected[expected_mask])


@pytest.mark.parametrize("args, steps", [((), 100), (("--sampler", "ddim"), 50), (("--sampler", "dpm"), 20)])
def test_each_sampler_has_its_usual_number_of_steps(command, calls, args, steps):
    command("--prompt", "a red circle", *args, "--num-frames", 1, "--size", "16x16", "--cfg-scale", 1)
    assert len(calls) == steps
    assert len(calls[0]["x"]) == 1                                      # without guidance there is no null caption


def test_the_default_is_the_shortest_video_at_its_largest_size():
    trained = {("144p", 16): 6, ("240p", 16): 2, ("144p", 32): 3, ("240p", 1): 4, ("480p", 64): 1}
    assert sample.default_bucket(trained) == (16, 240, 426)
    assert sample.default_bucket({("144p", 1): 6, ("512", 1): 2}) == (1, 512, 512)


def test_options_reach_the_network_and_the_file(command, calls, tmp_path):
    command("--prompt", "a red circle", *SMALL, "--fps", 30, "--frame-interval", 3, "--seeds", 7, 8)
    with av.open(str(tmp_path / "out/00-a-red-circle-seed-7.mp4")) as video:
        assert video.streams.video[0].average_rate == 10
    assert calls[0]["x"].shape[0] == 4
    assert calls[0]["fps"].tolist() == [10] * 4
    assert calls[0]["ar"].tolist() == [1.5] * 4
    assert not torch.equal(calls[0]["x"][0], calls[0]["x"][1])


def frames_0_to_7(color):
    return {t: f"{color}{t}" for t in range(8)}


@pytest.mark.parametrize("args, held", [
    (["--animate", "red.png"], {0: "red0"}),
    (["--extend-after", "red.mp4"], {0: "red7", 1: "red8"}),
    (["--extend-before", "red.mp4", "--keep", "3"], {5: "red0", 6: "red1", 7: "red2"}),
    (["--connect", "red.mp4", "blue.mp4"], {0: "red8", 7: "blue0"}),
    (["--connect", "red.mp4", "blue.mp4", "--keep", "2"], {0: "red7", 1: "red8", 6: "blue0", 7: "blue1"}),
    (["--fps", "9", "--reference", "red.mp4", "--mask-strategy", "0,0,1"], {0: "red3"}),       # 24 / 9 is nearer 3
    (["--edit", "red.mp4", "--strength", "0"], frames_0_to_7("red")),
    (["--infill", "blue.mp4", "2:6"], {0: "blue0", 1: "blue1", 6: "blue6", 7: "blue7"}),
    (["--reference", "red.mp4;blue.mp4"], {0: "red0"}),
    (["--reference", "red.mp4", "blue.mp4", "--mask-strategy", "0,1,-2,0,2;0,0,0,-1"],
     {0: "blue7", 1: "blue8", 7: "red0"}),
    (["--reference", "red.mp4", "blue.mp4", "--mask-strategy", "0,-1,4,3;0,-2,1,2"], {2: "red1", 3: "blue4"}),
    (["--reference", "red.mp4", "--mask-strategy", ""], {}),
    # Every third frame of 24 a second for a video at 8, up to the last one where the end is asked for.
    (["--fps", "8", "--reference", "red.mp4", "--mask-strategy", "0,0,0,0,3"], {0: "red0", 1: "red3", 2: "red6"}),
    (["--frame-interval", "3", "--extend-after", "red.mp4"], {0: "red5", 1: "red8"}),
    (["--fps", "60", "--reference", "red.mp4", "--mask-strategy", "0,0,4;0,0,-1,1"], {0: "red4", 1: "red8"}),
])
def test_given_frames_are_those_asked_for(command, calls, clips, tmp_path, monkeypatch, args, held):
    monkeypatch.chdir(clips)
    command("--prompt", "a red circle", "--fps", 24, *QUICK, "--num-frames", 8, "--size", "64x64", *args)
    video = read_video(tmp_path / "out/00-a-red-circle.mp4")
    assert len(video) == 8
    if held:
        for call in calls:
            assert call["x_mask"][0].tolist() == [t not in held for t in range(8)]
    else:
        assert calls[0]["x_mask"] is None
    assert {t: label(video[t]) for t in held} == held


@pytest.mark.parametrize("strategy, first, second", [
    ("1,-1,-2,0,2", "red3", "blue3"),           # -1 in segment 1 is segment 0
    ("1,-2,-2,0,2", "red3", "blue5"),           # .. and -2 the last reference
    ("1,-3,-2,0,2", "red5", "blue3"),
    ("0,-1,-2,0,2", "red3", "blue5"),
    ("2,0,-1;1,2,-1", "red5", "blue3"),         # segment 0 by its number
])
def test_the_end_of_a_reference_is_that_of_the_clip_meant(command, clips, tmp_path, monkeypatch, strategy, first,
                                                          second):
    """Every third frame of two clips is used, counted from their last one where any segment asks for their end; the
    middle one of each is shown."""
    monkeypatch.chdir(clips)
    command("--prompt", "a red circle", *QUICK, "--num-frames", 4, "--size", "64x64", "--fps", 24, "--frame-interval",
            3, "--segments", 3, "--overlap", 1, "--reference", "red.mp4", "blue.mp4", "--mask-strategy",
            strategy + ";0,0,1;0,1,1,1")
    video = read_video(tmp_path / "out/00-a-red-circle.mp4")
    assert [label(frame) for frame in video[:2]] == [first, second]


def test_latents_are_scaled_as_the_autoencoder_says(command, calls, clips, tmp_path):
    """The shipped autoencoder with another scale gives other latents of a held frame, but the same frame."""
    vae = tmp_path / "vae"
    shutil.copytree(TINY_VAE, vae)
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.2}))
    common = ("--prompt", "a red circle", "--animate", clips / "red.png", *QUICK, "--num-frames", 2, "--size", "64x64")
    command(*common)
    command(*common, "--vae", vae, "--out", tmp_path / "scaled")
    for out in ("out", "scaled"):
        assert label(read_video(tmp_path / out / "00-a-red-circle.mp4")[0]) == "red0"
    held = [call["x"][0, :, 0] for call in calls[::2]]
    torch.testing.assert_close(held[1] / 0.2, held[0] / config["scaling_factor"])


def test_an_edited_clip_is_generated_in_the_last_steps(command, calls, clips):
    common = ("--prompt", "a red circle", "--edit", clips / "red.mp4", "--fps", 24, "--sampler", "dpm", "--steps", 10,
              "--num-frames", 4, "--size", "16x16", "--overwrite")
    command(*common, "--strength", 0.2)
    assert [call["x_mask"].all().item() for call in calls] == [False] * 8 + [True] * 2
    assert not calls[0]["x_mask"].any()
    calls.clear()
    command(*common)
    assert [call["x_mask"].all().item() for call in calls] == [False] * 5 + [True] * 5


def test_a_long_film_is_not_read_to_animate_its_first_frame(command, tmp_path):
    film = np.zeros((400, 64, 96, 3), np.uint8)
    write_video(tmp_path / "film.mp4", film, 24)
    tracemalloc.start()
    command("--prompt", "x", *SMALL, "--fps", 24, "--animate", tmp_path / "film.mp4")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < film.nbytes / 2


@pytest.mark.parametrize("form, first, last", [(["--extend-before", "red.mp4", "--keep", "2"], None, "red1"),
                                               (["--connect", "red.mp4", "blue.mp4"], "red8", "blue0")])
def test_in_a_long_video_the_frames_at_its_end_come_last(command, clips, tmp_path, monkeypatch, form, first, last):
    monkeypatch.chdir(clips)
    command("--prompt", "a red circle", *QUICK, "--num-frames", 4, "--size", "64x64", "--fps", 24, "--segments", 2, *form)
    video = read_video(tmp_path / "out/00-a-red-circle.mp4")
    assert len(video) == 7
    assert label(video[-1]) == last
    assert first is None or label(video[0]) == first


def test_a_seamless_video_leads_back_to_its_start(command, calls, tmp_path):
    """The last of two segments ends with the first frames of the first one, which are not shown a second time."""
    command("--prompt", "a red circle", *QUICK, "--num-frames", 6, "--size", "16x24", "--overlap", 2, "--seamless",
            "--format", "folder")
    frames = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "out/00-a-red-circle").iterdir())]
    assert len(frames) == 2 * (6 - 2)
    segment_1 = calls[2]                                                # two steps a segment
    assert segment_1["x_mask"][0].tolist() == [False, False, True, True, False, False]
    ends = to_uint8(load_vae(TINY_VAE).decode(segment_1["x"][:1, :, -2:])[0])
    assert np.abs(ends.astype(int) - frames[:2]).max() <= 1


JOBS = '''a red circle

a dog {"num_frames": 3, "size": "16x24"}
A [cat]. {"seeds": [0, 5], "reference": "red.mp4", "mask_strategy": "0,0,-1,-1"}
a bird {"reference_path": "red.mp4;blue.mp4", "mask_strategy": "0,1,4,0,1,0"}
a fish {"connect": ["red.mp4", "blue.mp4"], "keep": 1}
a cow {"seamless": false, "segments": 1, "animate": "blue.png", "num-frames": 4}
|0|a hen|1|a cock {"num_frames": 4, "overlap": 2}
'''


def test_a_file_of_prompts_with_json(command, calls, clips, tmp_path, monkeypatch):
    """One video a line, or one per seed, each with its own options, which override those of the command line."""
    monkeypatch.chdir(clips)
    (tmp_path / "jobs.txt").write_text(JOBS, "utf-8")
    command("--prompts", tmp_path / "jobs.txt", *QUICK, "--fps", 24, "--size", "64x64", "--batch-size", 8)
    stems = ("00-a-red-circle", "01-a-dog", "02-a-cat", "02-a-cat-seed-5", "03-a-bird", "04-a-fish", "05-a-cow",
             "06-a-hen")
    videos = {stem: read_video(tmp_path / f"out/{stem}.mp4") for stem in stems}
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 8
    assert videos["01-a-dog"].shape == (3, 16, 24, 3)
    assert videos["05-a-cow"].shape == (4, 64, 64, 3)
    assert label(videos["02-a-cat"][7]) == label(videos["02-a-cat-seed-5"][7]) == "red8"
    assert (videos["02-a-cat"] != videos["02-a-cat-seed-5"]).any()
    assert label(videos["03-a-bird"][0]) == "blue4"
    assert [label(videos["04-a-fish"][t]) for t in (0, 7)] == ["red8", "blue0"]
    assert label(videos["05-a-cow"][0]) == "blue0"
    assert videos["06-a-hen"].shape == (2 + 2 + 2, 64, 64, 3)
    batches = sorted(len(call["x"]) // 2 for call in calls[::2])
    assert batches == [1, 1, 1, 1, 5]                                   # those of one size are sampled together


def test_what_exists_is_skipped_and_other_settings_are_refused(command, run_script, tmp_path):
    """Weights that were trained further are other settings, too."""
    run = write_run(tmp_path / "run")
    common = ("--ckpt", run, "--prompt", "a cat", "a dog", *SMALL)
    command(*common)
    cat = tmp_path / "out/00-a-cat.mp4"
    original = cat.read_bytes()
    os.utime(cat, ns=(1, 1))
    (tmp_path / "out/01-a-dog.json").unlink()                           # as if stopped before its end
    out = command(*common, "--cfg-scale", 7)                            # the config's own
    assert str(cat) in out
    assert cat.stat().st_mtime_ns == 1
    assert (tmp_path / "out/01-a-dog.json").exists()

    def refuse(*changes):
        ended = run_script("sample", "--device", "cpu", "--out", tmp_path / "out", *common, *changes)
        assert ended.status == 2
        assert "00-a-cat" in ended.err and "--overwrite" in ended.err
        assert cat.stat().st_mtime_ns == 1

    refuse("--cfg-scale", 3)
    refuse("--steps", 3)
    refuse("--fps", 12)
    refuse("--format", "gif", "--steps", 3)                             # though there is no .gif yet
    refuse("--num-frames", 1)
    shutil.copytree(TINY_T5, tmp_path / "t5")
    refuse("--text-encoder", tmp_path / "t5")
    write_run(run, seed=1)
    refuse()
    write_run(run)
    command(*common, "--overwrite")
    assert cat.stat().st_mtime_ns != 1
    assert cat.read_bytes() == original                                 # the same command, the same bytes
    command(*common, "--cfg-scale", 3, "--overwrite")
    assert cat.read_bytes() != original


@pytest.mark.parametrize("text", ["[1]", "null", '{"a":', ""])
def test_a_damaged_record_is_named(command, run_script, checkpoint, tmp_path, text):
    command("--prompt", "a cat", *SMALL)
    (tmp_path / "out/00-a-cat.json").write_text(text)
    base = ("sample", "--ckpt", checkpoint, "--device", "cpu", "--out", tmp_path / "out", "--prompt", "a cat", *SMALL)
    ended = run_script(*base)
    assert ended.status == 2
    assert "00-a-cat.json is damaged" in ended.err
    command("--prompt", "a cat", *SMALL, "--overwrite")
    assert json.loads((tmp_path / "out/00-a-cat.json").read_text("utf-8"))["job"]["num_frames"] == 4


def test_a_record_belongs_to_the_files_beside_it(command, run_script, checkpoint, tmp_path, monkeypatch):
    """When new files are not all written, the old record is gone, so that the next command makes them again."""
    command("--prompt", "a cat", *SMALL)
    with monkeypatch.context() as patched:
        patched.setattr(sample, "enlarge", None)                        # after the contact sheet, before the mp4
        with pytest.raises(TypeError):
            command("--prompt", "a cat", *SMALL, "--steps", 3, "--overwrite")
    assert not (tmp_path / "out/00-a-cat.json").exists()


def test_another_picture_under_the_same_name_is_another_setting(command, run_script, checkpoint, clips, tmp_path):
    shutil.copy(clips / "red.png", tmp_path / "still.png")
    common = ("--prompt", "a cat", *SMALL, "--animate", tmp_path / "still.png")
    command(*common)
    command(*common)
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "still.png")
    ended = run_script("sample", "--ckpt", checkpoint, "--device", "cpu", "--out", tmp_path / "out", *common)
    assert ended.status == 2
    assert "--overwrite" in ended.err


def test_a_seed_that_is_given_twice_is_sampled_once(command, tmp_path):
    out = command("--prompt", "a cat", *SMALL, "--seeds", 1, 1)
    assert "1 of 1 made" in out


def test_what_is_wrong_is_found_before_the_model_is_loaded(run_script, checkpoint, clips, tmp_path, monkeypatch):
    """A reference that is damaged in its middle, a folder of frames with other files, a caption that cleaning empties."""
    monkeypatch.setattr(sample, "load", None)
    monkeypatch.setattr(sample, "load_vae", None)
    (tmp_path / "out/00-a-cat").mkdir(parents=True)
    (tmp_path / "out/00-a-cat/notes.txt").touch()
    base = ("sample", "--device", "cpu", *SMALL, "--out", tmp_path / "out")
    ended = run_script(*base, "--ckpt", checkpoint, "--prompt", "a cat", "--format", "folder")
    assert ended.status == 2 and "notes.txt" in ended.err

    def unreadable(path, *_):
        raise UnreadableClip(f"{path}: frame 5 is damaged")
    with monkeypatch.context() as patched:
        patched.setattr(sample, "read_window", unreadable)
        ended = run_script(*base, "--ckpt", checkpoint, "--prompt", "a dog", "--animate", clips / "red.mp4")
    assert ended.status == 2 and "frame 5 is damaged" in ended.err
    released = write_run(tmp_path / "released", as_released=True)
    ended = run_script(*base, "--ckpt", released, "--prompt", "@somebody #12")
    assert ended.status == 2 and "@somebody" in ended.err


def test_a_stopped_command_leaves_no_half_video_and_its_repetition_ends_the_same(command, run_script, checkpoint,
                                                                                 tmp_path, monkeypatch):
    common = ("--prompt", "a cat", *SMALL, "--segments", 3, "--overlap", 1)
    command(*common, "--out", tmp_path / "whole")
    forward = STDiT.forward
    with monkeypatch.context() as patched:
        num_calls = []

        def stop_in_the_third_segment(*args, **named):
            num_calls.append(1)
            if len(num_calls) == 5:
                raise KeyboardInterrupt
            return forward(*args, **named)
        patched.setattr(STDiT, "forward", stop_in_the_third_segment)
        ended = run_script("sample", "--ckpt", checkpoint, "--device", "cpu", "--out", tmp_path / "out", *common)
    assert ended.status == 130
    assert "Traceback" not in ended.err
    assert not list((tmp_path / "out").glob("[0-9]*"))
    command(*common)
    for name in ("00-a-cat.mp4", "00-a-cat.png"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(tmp_path / "whole"))


def test_the_record_of_a_video_holds_the_command_that_makes_it_again(command, run_script, tmp_path):
    command("--prompt", "a cat", "a dog", *SMALL, "--seed", 4, "--batch-size", 1)
    record = json.loads((tmp_path / "out/01-a-dog-seed-4.json").read_text("utf-8"))
    words = shlex.split(record["command"])
    assert words[:2] == ["python", "sample.py"]
    assert run_script("sample", *words[2:], "--out", tmp_path / "again").status == 0
    name = "01-a-dog-seed-4.png"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


@pytest.mark.parametrize("size, shown", [("16x24", (256, 384, 3)), ("96x80", (288, 240, 3)), ("136x128", (272, 256, 3)),
                                         ("136x160", (136, 160, 3))])
def test_a_small_video_is_enlarged(command, tmp_path, monkeypatch, size, shown):
    """By a whole number and smoothly, so that averaging gives the frames back."""
    common = ("--prompt", "a cat", *QUICK, "--num-frames", 2, "--size", size)
    command(*common, "--format", "folder")
    monkeypatch.setattr(sample, "SHOWN_SIDE", 256)
    command(*common)
    [enlarged, _] = read_video(tmp_path / "out/00-a-cat.mp4")
    assert enlarged.shape == shown
    original = np.asarray(Image.open(tmp_path / "out/00-a-cat/00000.png")).astype(float)
    height, width, _ = original.shape
    shrunk = enlarged.reshape(height, shown[0] // height, width, shown[1] // width, 3).mean((1, 3))
    assert np.abs(shrunk - original).mean() < 6


def test_a_gif_is_written(command, tmp_path):
    command("--prompt", "a cat", *SMALL, "--format", "gif")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"00-a-cat.png", "00-a-cat.json", "00-a-cat.gif"}
    assert len(read_video(tmp_path / "out/00-a-cat.gif")) == 4


def test_a_still_is_a_picture(command, tmp_path):
    command("--prompt", "a cat", *SMALL, "--num-frames", 1, "--seeds", 0, 1)
    still, other = (np.asarray(Image.open(tmp_path / f"out/00-a-cat{end}.png")) for end in ("", "-seed-1"))
    assert still.shape == (128, 192, 3)                                 # enlarged
    assert (still != other).any()
    assert not list((tmp_path / "out").glob("*.mp4"))


def test_offloaded_networks_give_the_same_video(command, tmp_path):
    command("--prompt", "a red circle", *SMALL)
    command("--prompt", "a red circle", *SMALL, "--offload", "--out", tmp_path / "offloaded")
    name = "00-a-red-circle.png"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "offloaded" / name).read_bytes()


def test_cached_texts_need_no_t5(command, run_script, checkpoint, tmp_path, monkeypatch):
    """Captions that are cut, and words that the tokenizer does not know, are warned of when they are encoded."""
    prompts = ("--prompt", "a dog", "right " * 20)
    common = (*SMALL, "--text-cache", tmp_path / "cache", "--overwrite")
    base = ("sample", "--ckpt", checkpoint, "--device", "cpu", "--out", tmp_path / "out")
    ended = run_script(*base, *prompts, *common)
    assert ended.status == 0
    assert "dog" in ended.err
    assert "21" in ended.err and "right right" in ended.err
    original = (tmp_path / "out/00-a-dog.png").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(transformers.T5EncoderModel, "from_pretrained", None)
        command(*prompts, *common)
        assert (tmp_path / "out/00-a-dog.png").read_bytes() == original
        with pytest.raises(TypeError):                                  # a new caption, or captions cut otherwise
            command("--prompt", "a cat", *common)
        for name, shape in (("short", {"model_max_length": 8}), ("cleaned", {"as_released": True})):
            with pytest.raises(TypeError):
                command(*prompts, *common, "--ckpt", write_run(tmp_path / name, **shape))


NO_PROMPT = ("--prompt", "--prompts", "--export", "--promt")


@pytest.mark.parametrize("args, named", [
    (["--ckpt", "runs/nowhere"], ["runs/nowhere"]),
    (["--vae", "nowhere"], ["nowhere"]),
    (["--text-encoder", "nowhere"], ["nowhere"]),
    (["--size", "32"], ["--size 32"]),
    (["--size", "8x8"], ["8x8"]),
    (["--steps", "0"], ["steps=0"]),
    (["--steps", "1001"], ["steps=1001"]),
    (["--num-frames", "0"], ["num_frames=0"]),
    (["--frame-interval", "0"], ["--frame-interval", "'0'"]),
    (["--fps", "0", "--animate", "nowhere.png"], ["--fps", "'0'"]),
    (["--fps", "inf"], ["--fps", "'inf'"]),
    (["--prompt", 'a cat {"fps": -1}'], ["a cat", "fps", "'-1'"]),
    (["--animate", "nowhere.png"], ["nowhere.png"]),
    (["--reference", "torn.mp4"], ["torn.mp4"]),
    (["--edit", "red.mp4", "--animate", "red.png"], ["--edit", "--animate"]),
    (["--edit", "red.mp4", "--mask-strategy", "0"], ["--edit", "--mask-strategy"]),
    (["--edit", "red.mp4", "--strength", "2"], ["2"]),
    (["--infill", "red.mp4", "4"], ["--infill 4"]),
    (["--infill", "red.mp4", "6:2"], ["6:2"]),
    (["--extend-after", "red.mp4", "--keep", "0"], ["keep=0"]),
    (["--mask-strategy", "0,x"], ["'0,x'", "reference"]),
    (["--reference", "red.mp4", "--mask-strategy", "0,9"], ["reference=9"]),
    (["--mask-strategy", "0"], ["reference=0"]),
    (["--prompts", "nowhere.txt"], ["nowhere.txt"]),
    (["--prompts", "empty.txt"], ["empty.txt holds no prompt"]),
    (["--prompts", "latin1.txt"], ["latin1.txt is not UTF-8"]),
    (["--cfg-scale", "nan"], ["--cfg-scale nan"]),
    (["--cfg-scale", "inf"], ["--cfg-scale inf"]),
    (["--num-frames", "1", "--segments", "3"], ["3 segments of 1 frame"]),
    (["--reference", "red.mp4", "--mask-strategy", "0;2,0,0", "--segments", "2"], ["segment 2", "0 to 1"]),
    (["--reference", "red.mp4", "--mask-strategy=-1,0"], ["segment=-1"]),
    (["--prompt", "a cat", " "], ["prompt 1"]),
    (["--segments", "0"], ["segment"]),
    (["--segments", "2", "--overlap", "8"], ["overlap=8"]),
    (["--seamless", "--segments", "1"], ["segments=1"]),
    (["--seamless", "--num-frames", "2"], ["2 segments of 2 frames", "3 frames"]),
    (["--seamless", "--num-frames", "8", "--overlap", "4"], ["overlap=4", "1 to 3"]),
    (["--seed", "9" * 20], ["seed=9999"]),
    (["--reference", "red.mp4", "--mask-strategy=0,0;-1,0,-1"], ["group 2", "segment=-1"]),
    (["--animate", "."], [".: is a folder"]),
    (["--prompt", "a cat", "a dog {\"size\": \"3\"}"], ["a dog", "--size 3"]),
    (["--prompt", "a cat {\"animate\": null}"], ["a cat", "animate", "null"]),
    (["--prompt", "a cat {\"seamless\": []}"], ["seamless", "[]"]),
    (["--prompt", "a cat {\"animate\": false}"], ["--no-animate"]),
    (["--prompt", "|0|a|3|b", "--segments", "2"], ["|0|a|3|b"]),
    (["--prompt", "|0|a|x|b"], ["|0|a|x|b"]),
    (["--prompt", "|0|a|2|b|1|c"], ["|0|a|2|b|1|c"]),
    (["--prompt", "|0||1|b"], ["prompt 0"]),
    (["--prompt", 'A cat{"a": {"b": 1}}'], ["A cat", "'--a'"]),
    (["--prompt", 'A cat{"a": 1} tail'], ["A cat"]),
    (["--prompt", 'A {cat} {"a":1}'], ["A {cat}"]),
    (["--prompt", '{"num_frames": 4}'], ["prompt 0"]),
    (["--prompt", 'a cat {"num_frames": "many"}'], ["num-frames", "many"]),
    (["--export", "exported"], ["prediction='v'"]),
    (["--promt", "a dog"], ["--prompt"]),
    (["--num_frames=3"], ["--num_frames"]),
    (["--zzz"], ["--zzz"]),
    (["--num-frames", "many"], ["--num-frames", "many"]),
    (["--sampler", "euler"], ["--sampler", "euler"]),
    (["--format", "avi"], ["--format", "avi"]),
    (["--batch-size", "0"], ["--batch-size", "0"]),
    (["--prompt", "a cat", "--prompts", "empty.txt"], ["--prompt"]),
])
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks`")      # diffusers, for a --vae that is no folder
def test_a_mistake_is_one_line_that_names_it(run_script, checkpoint, clips, tmp_path, monkeypatch, args, named):
    monkeypatch.chdir(clips)
    words = [] if args[0] in NO_PROMPT else ["--prompt", "a red circle"]
    if args[0] != "--ckpt":
        words += ["--ckpt", checkpoint]
    ended = run_script("sample", *words, "--device", "cpu", "--out", tmp_path / "out", *args)
    assert ended.status == 2
    error = ended.err.splitlines()[-1]                                  # warnings of libraries may come before
    assert "error: " in error
    for part in named:
        assert part in error
    assert not (tmp_path / "out").exists()
    assert not Path("exported").exists()


def test_latents_that_are_not_finite_are_no_video(run_script, tmp_path):
    """A weight that is NaN would make a black one."""
    folder = write_run(tmp_path / "run")
    weights = load_file(folder / "model.safetensors")
    weights["x_embedder.proj.bias"][0] = math.nan
    save_file(weights, folder / "model.safetensors")
    ended = run_script("sample", "--ckpt", folder, "--prompt", "a cat", *SMALL, "--device", "cpu", "--out",
                       tmp_path / "out")
    assert ended.status == 2
    assert "not finite" in ended.err
    assert not list(tmp_path.glob("out/*.mp4"))


def test_an_output_that_cannot_be_written_is_found_out_first(run_script, checkpoint, tmp_path, monkeypatch):
    """Not after the work: the model is not even loaded."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sample, "load", None)
    ended = run_script("sample", "--ckpt", checkpoint, "--prompt", "a cat", *SMALL, "--device", "cpu", "--out",
                       tmp_path / "file/out")
    assert ended.status == 2
    assert str(tmp_path / "file") in ended.err


def test_a_prompts_file_may_begin_with_a_byte_order_mark(command, tmp_path):
    """As Windows' editors write it: it is no part of the first word."""
    (tmp_path / "jobs.txt").write_bytes("a cat\n\na dog\n".encode("utf-8-sig"))
    command("--prompts", tmp_path / "jobs.txt", *SMALL)
    record = json.loads((tmp_path / "out/00-a-cat.json").read_text("utf-8"))
    assert record["job"]["prompts"] == ["a cat"]


def test_a_prompt_of_which_cleaning_leaves_nothing_is_an_error():
    """It would be sampled as if there were no caption."""
    config = SimpleNamespace(model=SimpleNamespace(as_released=True))
    jobs = [SimpleNamespace(prompts=("a cat", "@somebody #12"))]
    with pytest.raises(ValueError, match="somebody"):
        sample.check_captions(jobs, config)
    config.model.as_released = False
    sample.check_captions(jobs, config)


def test_blanks_around_the_names_of_references_do_not_count(command, clips, tmp_path, monkeypatch):
    monkeypatch.chdir(clips)
    common = ("--prompt", "a cat", *SMALL, "--mask-strategy", "0;0,1,0,-1,1")
    command(*common, "--reference", "red.png ; blue.png")
    command(*common, "--reference", "red.png", "blue.png", "--out", tmp_path / "again")
    name = "00-a-cat.png"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_what_to_sample_must_be_said(run_script):
    ended = run_script("sample", "--steps", 2)
    assert ended.status == 2
    assert "--prompt" in ended.err


def test_debug_shows_where_an_error_is_from(run_script, checkpoint):
    with pytest.raises(ValueError, match="steps=0"):
        run_script("sample", "--ckpt", checkpoint, "--device", "cpu", "--prompt", "x", "--steps", 0, "--debug")


def test_help_and_captions_that_look_like_flags(run_script, command, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    ended = run_script("sample", "--help")
    assert ended.status == 0
    assert "--prompt" in ended.out
    assert len(ended.out.splitlines()) <= 56                            # a screen
    command("--prompt", "-- a dash --", *SMALL)
    assert (tmp_path / "out/00-a-dash.mp4").exists()


@pytest.mark.slow
def test_mistakes_are_reported_before_the_slow_imports():
    """diffusers and transformers take three of four seconds of importing all."""
    code = ("import sys, sample\n"
            "try:\n"
            "    sample.main(['--prompt', 'a cat', '--animate', 'nowhere.png'])\n"
            "except SystemExit as ended:\n"
            "    assert ended.code == 2\n"
            "assert not {'diffusers', 'transformers', 'torch._dynamo'} & set(sys.modules)\n")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
def test_processes_share_prompts_and_clips(run_script, tmp_path):
    """Two prompts, two pairs of processes, a clip of 5 frames for each pair: what one process makes, but for rounding.
    This is also the one real start of the script."""
    args = ["--prompt", "a red circle", "a blue square", "--steps", "3", "--num-frames", "5", "--size", "24x40",
            "--device", "cpu", "--out"]
    assert run_script("sample", *args, tmp_path / "one").status == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    subprocess.run([*torchrun, ROOT / "sample.py", *args, tmp_path / "four", "--sp", "2"], check=True,
                   env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert sorted(os.listdir(tmp_path / "four")) == sorted(os.listdir(tmp_path / "one"))
    for name in ("00-a-red-circle.png", "01-a-blue-square.png"):
        one, four = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("one", "four"))
        assert np.abs(one - four).max() <= 1


# ---------------------------------------------------------------- the shipped weights
@pytest.fixture(scope="module")
def judge():
    return Judge("assets/tiny", steps=4, sampler="dpm")


def test_the_shipped_weights_obey_prompts(judge):
    """Four steps of dpm are enough: all of these were obeyed when this was written.  test_weights.py measures more."""
    names = prompts_of_shapes(6)
    scores = obey(names, judge.sample([f"a {color} {shape} moves {way}" for color, shape, way in names]))
    assert scores["all"] >= 0.8, scores


def test_the_command_line_and_generate_make_the_same_video(judge, run_script, tmp_path):
    """The command line takes prediction and guidance from the checkpoint's config; the judge passes them."""
    text = "a red circle moves right"
    ended = run_script("sample", "--prompt", text, "--sampler", "dpm", "--steps", 4, "--device", "cpu", "--format",
                       "folder", "--out", tmp_path)
    assert ended.status == 0
    folder = tmp_path / "00-a-red-circle-moves-right"
    frames = np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])
    [expected] = judge.sample([text])
    assert np.abs(frames.astype(int) - expected).max() <= 1
    seen = read_clip(frames)
    assert (seen.color, seen.shape, seen.direction) == ("red", "circle", "right")


def test_a_given_frame_comes_back_from_the_shipped_weights(judge):
    """The frames, not only their latents: within 25 dB of the picture that was given."""
    frames = render(Thing("red", "circle", "right", 24, (16, 32), (48, 32)), BACKGROUNDS[0], 8, 64, 64)
    [video] = judge.sample(["a red circle moves right"], references=[[frames]], strategies=[[Given(length=2)]])
    error = np.mean((video[:2].astype(float) - frames[:2]) ** 2)
    assert 10 * np.log10(255**2 / error) > 25
    centers = [read_frame(frame)[2][0] for frame in video]
    assert centers[-1] > centers[1] + 8                                 # and it moves on


# ---------------------------------------------------------------- checkpoints
SHAPE = {"depth": 1, "hidden_size": 24, "num_heads": 2, "in_channels": 8, "caption_channels": 64,
         "model_max_length": 16, "qk_norm": True}
HUGGING_FACE = {"_name_or_path": "hpcai-tech/OpenSora-STDiT-v2-stage3", "architectures": ["STDiT2"],
                "model_type": "STDiT2", "torch_dtype": "float32", "transformers_version": "4.39.3"}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Weights in Open-Sora's layout, with the config.json that it publishes, but small."""
    folder = tmp_path_factory.mktemp("published")
    (folder / "config.json").write_text(json.dumps(SHAPE | HUGGING_FACE))
    save_file(random_weights(STDiTConfig(**SHAPE)), folder / "model.safetensors", {"format": "pt"})
    return folder


def in_hub_cache(folder, name, monkeypatch, tmp_path):
    """Makes the hub's cache hold `folder` as the model `name`."""
    hub = tmp_path / "hub" / ("models--" + name.replace("/", "--"))
    (hub / "refs").mkdir(parents=True)
    (hub / "refs/main").write_text("0" * 40)
    (hub / "snapshots").mkdir()
    (hub / "snapshots" / ("0" * 40)).symlink_to(folder)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def test_published_weights_load_in_every_form(published, tmp_path, monkeypatch, capsys):
    """A folder, a name on the hub, and either kind of file: with the quirks that they were trained with, reported."""
    in_hub_cache(published, "some/name", monkeypatch, tmp_path)
    weights = load_file(published / "model.safetensors")
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "w.pth")
    (tmp_path / "config.json").write_text((published / "config.json").read_text())
    for ckpt in (published, "some/name", published / "model.safetensors", tmp_path / "w.pth"):
        model, config = load(ckpt)
        state = model.state_dict()
        assert state.keys() == weights.keys()
        assert all(torch.equal(value, weights[name]) for name, value in state.items())
        assert config.model.as_released
        assert model.config.as_released
        assert not model.training
        out = capsys.readouterr().out
        assert str(ckpt) in out and "quirks" in out
    assert (config.cfg_scale, config.prediction) == (7, "eps")
    assert (config.vae, config.text_encoder) == ("stabilityai/sd-vae-ft-ema", "DeepFloyd/t5-v1_1-xxl")


def test_published_weights_are_sampled_as_the_release_does(published, run_script, tmp_path, monkeypatch):
    """Without further options: 16 frames of 240p, raw fps, ar = height / width, a cut null caption, clean captions."""
    calls = []

    def stop(self, *args, **named):
        calls.append(dict(inspect.signature(forward).bind(self, *args, **named).arguments))
        raise KeyboardInterrupt
    forward = STDiT.forward
    monkeypatch.setattr(STDiT, "forward", stop)
    ended = run_script("sample", "--prompt", "A <b>Red</b> Circle", "--ckpt", published, "--vae", TINY_VAE,
                       "--text-encoder", TINY_T5, "--device", "cpu", "--out", tmp_path)
    assert ended.status == 130
    [call] = calls
    assert call["x"].shape == (2, 8, 16, 30, 53)
    conditioning = {name: float(call[name][0]) for name in ("height", "width", "num_frames", "ar", "fps")}
    assert conditioning == dict(height=240, width=426, num_frames=16, ar=pytest.approx(240 / 426), fps=24)
    y, y_mask = load_text_encoder(TINY_T5, 16)(["a red circle"])
    assert torch.equal(call["y_mask"], y_mask.repeat(2, 1))
    torch.testing.assert_close(call["y"][0][y_mask[0]], y[0][y_mask[0]])


def test_weights_without_a_config_are_taken_for_xl_2(published, tmp_path):
    (tmp_path / "w.safetensors").symlink_to(published / "model.safetensors")
    with pytest.raises(ValueError, match="w.safetensors: .* depth 28.* missing blocks.1.scale_shift_table"):
        load(tmp_path / "w.safetensors")


def remove_a_weight(weights):
    del weights["blocks.0.attn.k_norm.weight"]


def add_a_weight(weights):
    weights["pos_embed"] = torch.zeros(1)


def reshape_a_weight(weights):
    weights["t_block.1.bias"] = torch.ones(9)


def change_the_rotary_frequencies(weights):
    weights["rope.freqs"] = torch.ones(6)


@pytest.mark.parametrize("change, named", [
    (remove_a_weight, "missing blocks.0.attn.k_norm.weight"), (add_a_weight, "pos_embed"),
    (reshape_a_weight, r"t_block.1.bias \[9\]"), (change_the_rotary_frequencies, "rope.freqs"),
])
def test_weights_that_do_not_fit_are_named(published, tmp_path, change, named):
    weights = load_file(published / "model.safetensors")
    change(weights)
    (tmp_path / "config.json").write_text((published / "config.json").read_text())
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"w.pth: .*{named}"):
        load(tmp_path / "w.pth")


def test_published_weights_may_be_in_shards(published, tmp_path):
    weights = load_file(published / "model.safetensors")
    (tmp_path / "config.json").write_text((published / "config.json").read_text())
    weight_map = {name: f"model-{len(name) % 2}.safetensors" for name in weights}
    for shard in set(weight_map.values()):
        save_file({name: value for name, value in weights.items() if weight_map[name] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for ckpt in (tmp_path, tmp_path / "model.safetensors.index.json"):
        model, config = load(ckpt)
        assert config.model.as_released
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("text, named", [("", "JSON"), ("[1]", "list"), ('{"depth": null}', "depth is None"),
                                         ('{"dept": 1}', "dept")])
def test_a_broken_config_json_is_named(published, tmp_path, text, named):
    shutil.copy(published / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path}/config.json.*{named}"):
        load(tmp_path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_are_named_and_no_code_in_a_file_is_run(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("config.json").write_text((published / "config.json").read_text())
    torch.save({"x": Bomb()}, "bomb.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Bomb()))
    Path("torn.safetensors").write_bytes((published / "model.safetensors").read_bytes()[:5000])
    Path("torn.pth").write_bytes(b"PK")
    Path("empty.pth").touch()
    Path("empty.safetensors").touch()
    for name in ("bomb.pth", "plain.pth", "torn.safetensors", "torn.pth", "empty.pth", "empty.safetensors"):
        with pytest.raises(ValueError, match=name):
            load(tmp_path / name)
    assert not Path("exploded").exists()


def test_a_checkpoint_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="hpcai-tech/nothing"):
        load("hpcai-tech/nothing")                                      # offline, and not in the hub's cache
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "model.safetensors")):
        load(tmp_path)


def test_a_run_is_loaded_with_its_own_config(checkpoint, tmp_path, capsys):
    """Its averaged weights are those of model.safetensors, whatever else lies in the folder."""
    run = write_run(tmp_path / "run")
    others = random_weights(configs.load(str(run / "config.py")).model, seed=1)
    (run / "step-0000001").mkdir()
    for name in ("a.safetensors", "z.safetensors", "step-0000001/model.safetensors"):
        save_file(others, run / name)
    averaged = load_file(checkpoint / "model.safetensors")
    for ckpt in (run, run / "model.safetensors"):
        model, config = load(ckpt)
        assert config == configs.load(str(run / "config.py"))
        assert not config.model.as_released
        assert all(torch.equal(value, averaged[name]) for name, value in model.state_dict().items())
    assert not capsys.readouterr().out
    assert load("assets/tiny").model.null_y.dtype == torch.float32      # though it is stored in bf16


def test_a_run_goes_to_open_sora_and_comes_back(tmp_path, run_script, capsys):
    run = write_run(tmp_path / "run", prediction="eps", as_released=True)
    out = tmp_path / "out"
    assert run_script("sample", "--export", out, "--ckpt", run).status == 0
    before = load(run)
    after = load(out)
    assert after.config == before.config
    assert after.config.model.as_released == before.config.model.as_released
    with safe_open(out / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}                         # transformers refuses it without
        assert {f.get_slice(name).get_dtype() for name in f.keys()} == {"F32"}
    written = json.loads((out / "config.json").read_text())
    allowed = set(SHAPE) | {"class_dropout_prob", "input_sq_size", "mlp_ratio", "patch_size", "pred_sigma",
                            "model_type", "architectures", "torch_dtype"}
    assert set(written) == allowed                                      # those of its STDiT2Config
    theirs = from_upstream(written, load_file(out / "model.safetensors"))
    inputs = example_inputs(before.config.model, B=2)
    with torch.no_grad():
        expected = before.model(**inputs)
        assert expected.std() > 0.01
        assert torch.equal(theirs(**inputs), expected)
    (out / "config.py").unlink()                                        # as it would come from there
    assert load(out).config.model.as_released
    assert load(out).config.model == before.config.model
    export(out, out)                                                    # over the file that it is read from
    again = load(out).model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in before.model.state_dict().items())


@pytest.mark.parametrize("changes, named", [
    ({"prediction": "eps"}, "model.as_released=False"),
    ({"prediction": "v", "qk_norm": False}, "prediction='v'"),
    ({"prediction": "eps", "qk_norm": False, "temporal_pos": True}, "model.temporal_pos=True"),
    ({"prediction": "eps", "qk_norm": False, "pred_sigma": False}, "model.pred_sigma=False"),
])
def test_what_open_sora_would_compute_otherwise_is_not_exported(tmp_path, changes, named):
    with pytest.raises(ValueError, match=named):
        export(write_run(tmp_path / "run", **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_small_differences_to_open_sora_are_noted(tmp_path, capsys):
    export(write_run(tmp_path / "run", prediction="eps", qk_norm=False), tmp_path / "out")
    out = capsys.readouterr().out
    assert "as_released" in out


def test_blocks_are_on_the_device_only_while_they_compute(checkpoint):
    """A dtype stands for the device here: all but the blocks are moved for good."""
    model = load(checkpoint).model
    inputs = example_inputs(model.config)
    with torch.no_grad():
        expected = model(**inputs)
        at_home = {parameter: parameter.data_ptr() for parameter in model.blocks.parameters()}
        offload_blocks(model, model.blocks, torch.float64)
        out = model(**inputs)
    assert {parameter: parameter.data_ptr() for parameter in model.blocks.parameters()} == at_home
    assert {parameter.dtype for parameter in model.blocks.parameters()} == {torch.float32}
    assert model.null_y.dtype == torch.float64
    assert 0 < relative(out, expected) < 1e-5                           # the products were those of fp64
