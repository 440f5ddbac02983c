"""sample.py against upstream's recorded samplings, diffusers' DDIM, and distributions with a known answer."""

import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import configs
import sample
from data import read_window, resize_crop, slot_generator, to_uint8, to_video, write_video
from masks import Given, edit, format_strategy, parse_strategy
from model import QUIRKS, STDiT, STDiTConfig, XL_2, example_inputs, from_upstream
from sample import (PUBLISHED, RELEASED, Job, SampleQuirks, encode_texts, export, find_checkpoint, generate, guide,
                    load, noise_schedule, sample_latents, step_back, timesteps, visiting)
from reader import prompts as prompts_of_shapes
from assets.tiny.make import make_text_encoder
from vae import load_text_encoder, load_vae, read_note

GOLDEN = Path(__file__).parent / "golden"
SCHEDULES = load_file(GOLDEN / "b_schedules.safetensors")
BOTH = pytest.mark.parametrize("prediction", ["eps", "v"])
EACH = pytest.mark.parametrize("sampler", sample.SAMPLERS)


def relative(a, b):
    return float((a - b).norm() / b.norm())


def abar(t):
    return noise_schedule().alphas_cumprod[t.cpu()].float().view(-1, 1, 1, 1, 1)


class Standin:
    """A model that notes its calls; `eps(x, t, m)` is its answer, m [B] the mean of each caption."""

    def __init__(self, eps=None, prediction="eps", null=0.0, learned_variance=True):
        self.null_y, self.prediction, self.calls = torch.full((10, 8), null), prediction, []
        self.eps, self.learned_variance = eps or tanh_eps, learned_variance
        self.config = SimpleNamespace(patch_size=(1, 2, 2))

    def __call__(self, x, t, y, y_mask, x_mask=None, **cond):
        self.calls.append(dict(x=x, t=t, y=y, y_mask=y_mask, x_mask=x_mask, **cond))
        m = y.mean((1, 2)).view(-1, 1, 1, 1, 1)
        u = t.view(-1, 1, 1, 1, 1) / 1000
        answer = self.eps(x, t, m)
        if x_mask is not None:                                          # as the recorded model has it
            answer = answer + 0.05 * rearrange(~x_mask, "b t -> b 1 t 1 1")
        if self.prediction == "v":                                      # the same function, told as v
            answer = (answer - (1 - abar(t)).sqrt() * x) / abar(t).sqrt()
        return torch.cat([answer, 0.8 * torch.cos(x + m + u)], dim=1) if self.learned_variance else answer


def tanh_eps(x, t, m):
    u = t.view(-1, 1, 1, 1, 1) / 1000
    return torch.tanh(0.6 * x + 0.2 * x.roll(1, dims=2) + m * (1 - u)) + 0.1 * torch.sin(3 * u)


def request(B=2, T=4, seed=0, first=0):
    """Arguments of sample_latents for clips first..first + B - 1 that differ in caption and noise."""
    generators = [slot_generator(seed, 0, i, "sample") for i in range(first, first + B)]
    z = torch.stack([torch.randn(4, T, 3, 4, generator=g) for g in generators])
    y = torch.stack([torch.full((10, 8), 0.1 * i) for i in range(first, first + B)])
    y_mask = torch.arange(10).expand(B, 10) < 3
    cond = {name: torch.full((B,), 32.0) for name in ("height", "width", "num_frames", "ar", "fps")}
    return dict(z=z, y=y, y_mask=y_mask, cond=cond, generators=generators)


# ---------------------------------------------------------------- schedules
def test_timesteps_are_upstreams():
    cases = json.loads((GOLDEN / "b_iddpm.json").read_text())["space_timesteps"]
    assert len(cases) == 5
    for name, expected in cases.items():
        assert timesteps(int(name.split("|")[1])) == expected[::-1], name
    assert timesteps(1000) == list(range(1000))[::-1] and timesteps(1) == [999] and timesteps(2) == [999, 0]
    assert timesteps(10, "dpm") == timesteps(11)[:-1] and timesteps(1, "dpm") == [999]
    unipc = noise_schedule("unipc")
    for steps in range(1, 1000):                                        # its class takes a number, not a list
        unipc.set_timesteps(steps)                                      # it rounds a few 499.5 otherwise
        assert np.abs(unipc.timesteps.numpy() - timesteps(steps, "unipc")).max() <= (steps not in (10, 20, 50, 100))
        assert timesteps(steps, "unipc") == timesteps(steps, "dpm")
    for steps, sampler in [(0, "iddpm"), (0, "dpm"), (1001, "ddim"), (1000, "dpm")]:
        with pytest.raises(ValueError, match=f"steps={steps}: expected 1 to 999"):
            timesteps(steps, sampler)


@EACH
@BOTH
def test_schedule_matches_upstreams(sampler, prediction):
    """To what upstream's fp32 leaves of it."""
    scheduler = noise_schedule(sampler, prediction)
    for case in ("full1000", "steps100", "steps10"):
        ours = scheduler.alphas_cumprod[SCHEDULES[f"{case}.timestep_map"]]
        torch.testing.assert_close(ours.float(), SCHEDULES[f"{case}.alphas_cumprod"], rtol=1e-6, atol=0)
        previous = torch.cat([torch.ones(1), ours[:-1]])
        torch.testing.assert_close((1 - ours / previous).float(), SCHEDULES[f"{case}.betas"], rtol=1e-6, atol=0)
    assert scheduler.alphas_cumprod.dtype == torch.float64
    assert scheduler.config.prediction_type == {"eps": "epsilon", "v": "v_prediction"}[prediction]
    assert not scheduler.config.thresholding and not scheduler.config.get("clip_sample", False)


def test_wrong_sampler_is_named():
    with pytest.raises(ValueError, match="sampler='euler'"):
        noise_schedule("euler")


# ---------------------------------------------------------------- upstream's recorded steps
def recorded_noise(monkeypatch, noises):
    noises = iter(noises)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, **_: next(noises))


def upstream_step(scheduler, out, t, x, generators):
    """One DDPM step with the fp32 vectors that upstream has for ten steps; the learned variance as in 2102.09672."""
    vectors = {name.removeprefix("steps10."): v[int(t) // 111] for name, v in SCHEDULES.items() if "steps10." in name}
    eps, share = out[:, :4], (out[:, 4:] + 1) / 2
    x_0 = vectors["sqrt_recip_alphas_cumprod"] * x - vectors["sqrt_recipm1_alphas_cumprod"] * eps
    log_variance = share * vectors["betas"].log() + (1 - share) * vectors["posterior_log_variance_clipped"]
    noise = diffusers.schedulers.scheduling_ddpm.randn_tensor(x.shape) * (t > 0)
    mean = vectors["posterior_mean_coef1"] * x_0 + vectors["posterior_mean_coef2"] * x
    return mean + (0.5 * log_variance).exp() * noise


def sample_as_recorded(monkeypatch, case, step=step_back, quirk=True):
    """(golden, strength, known, model's calls, x after each step, result) of ten steps with the recorded noises."""
    golden = load_file(GOLDEN / f"b_sample_{case}.safetensors")
    strength, z, known, noises = golden.get("mask"), golden["z"], None, golden["noises"]
    if strength is not None:                                            # there z holds given frames; two draws a step:
        known, noises = z, noises[1::2]                                 # at which a frame joins, and the posterior's
        held = rearrange(strength == 0, "b t -> b 1 t 1 1")
        z = torch.where(held, golden["noises"][18], z)                  # upstream's held frames join at the last step
    recorded_noise(monkeypatch, noises)
    model, xs = Standin(), []
    model.null_y = golden["null"]
    monkeypatch.setattr(sample, "step_back", lambda *args: xs.append(step(*args)) or xs[-1])
    quirks = SampleQuirks(guide_3_channels="cfg3" in case, join_untold=quirk)
    x = sample_latents(model, z, golden["y"][:, 0], torch.ones(2, 10, dtype=torch.bool), {}, generators=None, steps=10,
                       cfg_scale=7.0, known=known, strength=strength, quirks=quirks)
    return golden, strength, known, model.calls, xs, x


@pytest.mark.parametrize("step, near, last", [(step_back, 1e-6, 1e-3), (upstream_step, 1e-5, 1e-5)])
@pytest.mark.parametrize("case", ["nomask_cfg3", "ones_cfg3", "ref_cfg3", "ref_cfgNone"])
def test_sampling_repeats_upstreams(monkeypatch, case, step, near, last):
    """Ten guided steps without masks, with masks that hold nothing, and with references: what the model is told, and
    every intermediate x.

    Equal to 1e-6, except that upstream multiplies its very last x_0 by 0.99983: posterior_mean_coef1[0] is 1, but in
    fp32 1 - abar_0 is off by that much.  diffusers has no place for such a coefficient."""
    golden, strength, _, calls, xs, x = sample_as_recorded(monkeypatch, case, step)
    for i, (call, t, x_in) in enumerate(zip(calls, golden["model_t"], golden["model_x"], strict=True)):
        assert call["t"].tolist() == [int(t[0])] * 4
        assert call["x_mask"] is None if strength is None else (
            call["x_mask"] == golden["model_x_mask"][i].repeat(2, 1)).all()
        assert relative(call["x"][:2], x_in) < near and relative(call["x"][2:], x_in) < near
    free = torch.ones(2, 1, 6, 1, 1) if strength is None else rearrange(strength, "b t -> b 1 t 1 1")
    for ours, theirs in zip(xs[:-1], golden["steps"][:-1], strict=True):
        assert relative(ours * free, theirs * free) < near
    assert relative(x, golden["steps"][-1]) < last
    if step is step_back:
        assert relative(x, golden["steps"][-1]) > 1e-4
        assert relative(x * SCHEDULES["steps10.posterior_mean_coef1"][0], golden["steps"][-1]) < 1e-6


@pytest.mark.parametrize("case", ["ref_cfg3", "ref_cfgNone"])
def test_without_the_quirk_references_stay_as_given(monkeypatch, case):
    """Nine steps are upstream's, and in the tenth, in which it changes its references, they are held as before."""
    golden, strength, known, calls, xs, x = sample_as_recorded(monkeypatch, case, upstream_step, quirk=False)
    kept = rearrange(strength == 0, "b t -> b 1 t 1 1").expand_as(x)
    for call in calls:
        assert torch.equal(call["x"][:2][kept], known[kept])
        assert torch.equal(call["x_mask"], (strength > 0).repeat(2, 1))
    for call, x_in in zip(calls[:-1], golden["model_x"][:-1]):
        assert relative(call["x"][:2], x_in) < 1e-5
    assert torch.equal(x[kept], known[kept])
    theirs = golden["steps"][-1]
    assert 0.01 < (theirs[kept] - known[kept]).abs().max() < 0.07
    assert relative(x[~kept], theirs[~kept]) < 1e-5


def test_single_steps_are_upstreams(monkeypatch):
    """Six t of a 100-step sampling, t = 0 with upstream's coefficient (see above).  At t = 10 its fp32 coefficients are
    2.4e-5 off; our x_0 mixed by its coefficients is equal to 2e-6 at every t."""
    golden = load_file(GOLDEN / "b_single_step.safetensors")
    coef1, coef2 = (SCHEDULES[f"steps100.posterior_mean_coef{k}"] for k in (1, 2))
    for i, (t, index) in enumerate(zip(golden["model_t"], golden["t"], strict=True)):
        x, out, noise = (golden[name][i : i + 1] for name in ("x", "model_output", "p_sample.noise"))
        for draw, expected in [(torch.zeros_like(noise), "pmv.clipFalse.mean"), (noise, "p_sample.sample")]:
            recorded_noise(monkeypatch, [draw])
            ours = step_back(schedule_at("iddpm", t), out, t, x, None) * (coef1[0] if t == 0 else 1)
            assert relative(ours, golden[expected][i : i + 1]) < (5e-5 if t == 10 else 2e-6), (int(t), expected)
        recorded_noise(monkeypatch, [noise])
        x_0 = schedule_at("iddpm", t).step(out, t, x).pred_original_sample
        assert relative(x_0, golden["pmv.clipFalse.pred_xstart"][i : i + 1]) < 2e-6
        assert relative(coef1[index] * x_0 + coef2[index] * x, golden["pmv.clipFalse.mean"][i : i + 1]) < 2e-6
        if t > 0:                                                       # at 0 no noise is added
            ours = schedule_at("iddpm", t)._get_variance(t, predicted_variance=out[:, 4:])
            torch.testing.assert_close(ours, golden["pmv.clipFalse.log_variance"][i : i + 1], rtol=0, atol=5e-4)
        ours = step_back(schedule_at("ddim", t), out, t, x, None)
        assert relative(ours, golden["ddim.eta0.0.sample"][i : i + 1]) < 2e-6, int(t)


def schedule_at(sampler, t):
    """A fresh 100-step schedule whose next step is the one at t."""
    scheduler = noise_schedule(sampler)
    scheduler.set_timesteps(timesteps=timesteps(100))
    if sampler != "iddpm":
        scheduler.set_begin_index(timesteps(100).index(t))
    return scheduler


def test_guidance_is_upstreams():
    golden = load_file(GOLDEN / "b_forward_with_cfg.safetensors")
    cond, null = golden["model_out"].chunk(2)
    for channels, name in [(3, "cfg3"), (None, "cfgNone")]:
        torch.testing.assert_close(guide(cond, null, 7.0, channels), golden[name][:2])
    torch.testing.assert_close(guide(cond, null, 1.0), cond)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescaled_guidance_has_the_contrast_of_the_caption(rescale):
    """Eq. 15 and 16 of 2305.08891, written frame by frame; variances and unguided channels stay."""
    generator = torch.Generator().manual_seed(0)
    cond, null = torch.randn(2, 3, 8, 5, 3, 4, generator=generator)
    out = guide(cond, null, 7.0, 3, rescale)
    assert torch.equal(out[:, 3:], cond[:, 3:])
    for b in range(3):
        for t in range(5):
            pos, cfg = cond[b, :3, t], null[b, :3, t] + 7 * (cond - null)[b, :3, t]
            torch.testing.assert_close(out[b, :3, t], rescale * cfg * pos.std() / cfg.std() + (1 - rescale) * cfg)
    assert guide(0 * cond, 0 * null, 7.0, None, rescale).isfinite().all()            # a fresh model answers exactly 0


def test_rescaling_brings_the_contrast_back():
    """Captions that ask for a wider spread of the latents: guidance overshoots it, less so when rescaled."""
    wide = lambda x, t, m: (1 - abar(t)).sqrt() * x / (abar(t) * (0.3 + m) ** 2 + 1 - abar(t))
    wanted = dict(steps=20, sampler="ddim", cfg_scale=4.0)
    spread = [float(sample_latents(Standin(wide), **request(B=1, first=3), **wanted, rescale=phi).std())
              for phi in (0.0, 0.7, 1.0)]
    assert spread[0] > 1.2 * spread[1] > 1.2 * spread[2] > 0.6, spread


# ---------------------------------------------------------------- known answers
MEAN, STD = 0.5, 0.3


def gaussian_eps(x, t, m):
    """The best answer when the latents are drawn from N(MEAN, STD^2)."""
    return (1 - abar(t)).sqrt() * (x - abar(t).sqrt() * MEAN) / (abar(t) * STD**2 + 1 - abar(t))


def gaussian_flow(z):
    a = noise_schedule().alphas_cumprod[-1].float()
    return MEAN + STD * (z - a.sqrt() * MEAN) / (a * STD**2 + 1 - a).sqrt()


@BOTH
@pytest.mark.parametrize("sampler, steps, error", [("ddim", 50, 0.05), ("ddim", 400, 0.007),
                                                   ("dpm", 50, 0.012), ("dpm", 200, 0.001),
                                                   ("unipc", 50, 0.012), ("unipc", 200, 0.002)])
def test_deterministic_samplers_converge_to_the_flow(sampler, steps, error, prediction):
    wanted = request(B=4)
    x = sample_latents(Standin(gaussian_eps, prediction), **wanted, steps=steps, sampler=sampler, prediction=prediction,
                       cfg_scale=1.0)
    assert relative(x, gaussian_flow(wanted["z"])) < error


@BOTH
def test_iddpm_has_the_right_distribution(prediction):
    wanted = request(B=16, T=8)
    x = sample_latents(Standin(gaussian_eps, prediction), **wanted, steps=100, prediction=prediction, cfg_scale=1.0)
    assert abs(float(x.mean()) - MEAN) < 0.03 and abs(float(x.std()) - STD) < 0.03                  # 6,144 values


def test_ddim_is_diffusers_ddim():
    """On the even spacing that its class knows (t = 999, 989, .., 9)."""
    theirs = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    ours = noise_schedule("ddim")
    theirs.alphas_cumprod = ours.alphas_cumprod
    theirs.set_timesteps(100)
    ours.set_timesteps(timesteps=theirs.timesteps.tolist())
    a = b = request()["z"]
    for t in theirs.timesteps:
        a = theirs.step(tanh_eps(a, t[None], 0.3), t, a).prev_sample
        b = step_back(ours, tanh_eps(b, t[None], 0.3), t, b, None)
    assert relative(b, a) < 2e-5


def test_dpm_and_unipc_are_diffusers():
    """Their classes with their own fp32 betas and timesteps; the two differ from each other by what they are."""
    results, wanted = {}, request()
    for sampler, kind in [("dpm", diffusers.DPMSolverMultistepScheduler), ("unipc", diffusers.UniPCMultistepScheduler)]:
        theirs, x = kind(), wanted["z"]
        theirs.set_timesteps(20)
        for t in theirs.timesteps:
            x = theirs.step(gaussian_eps(x, t[None], 0), t, x).prev_sample
        results[sampler] = sample_latents(Standin(gaussian_eps), **wanted, steps=20, sampler=sampler, cfg_scale=1.0)
        assert relative(results[sampler], x) < 1e-5, sampler
    assert relative(results["dpm"], results["unipc"]) > 1e-3


@EACH
def test_eps_and_v_are_one_model(sampler):
    """One function, told as eps or as v, guided, gives one sample; from eps at t near 1000 fp32 loses a little."""
    one, two = (sample_latents(Standin(gaussian_caption_eps, prediction), **request(), steps=20, sampler=sampler,
                               prediction=prediction, cfg_scale=3.0) for prediction in ("eps", "v"))
    assert relative(one, two) < 1e-3


def gaussian_caption_eps(x, t, m):
    return gaussian_eps(x - abar(t).sqrt() * m, t, m)


def test_without_learned_variance_it_is_the_posteriors(monkeypatch):
    """A model with C channels out, against diffusers' variance_type="fixed_small"; dpm and ddim take no variance."""
    x, out = request()["z"], 0.3 * request()["z"]
    theirs = diffusers.DDPMScheduler(clip_sample=False)
    theirs.set_timesteps(timesteps=timesteps(10))
    for t in theirs.timesteps:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(int(t)))
        recorded_noise(monkeypatch, [noise, noise])
        ours = noise_schedule("iddpm")
        ours.set_timesteps(timesteps=timesteps(10))
        assert relative(step_back(ours, out, t, x, None), theirs.step(out, t, x).prev_sample) < 1e-5
    model = Standin(gaussian_eps)
    halved = Standin(gaussian_eps, learned_variance=False)
    for sampler in ("ddim", "dpm", "unipc"):
        assert torch.equal(*(sample_latents(m, **request(), steps=5, sampler=sampler) for m in (model, halved)))


# ---------------------------------------------------------------- what the model is told, what is given
def test_one_call_of_both_halves_and_a_full_length_null():
    for cut in (False, True):
        model, wanted = Standin(null=0.7), request()
        sample_latents(model, **wanted, steps=2, cfg_scale=3.0, quirks=SampleQuirks(cut_null=cut))
        call = model.calls[0]
        assert len(model.calls) == 2 and call["x"].shape[0] == 4 and call["fps"].shape == (4,)
        assert (call["x"][:2] == call["x"][2:]).all()
        assert (call["y"][:2] == wanted["y"]).all() and (call["y"][2:] == 0.7).all()
        assert (call["y_mask"][:2] == wanted["y_mask"]).all() and call["y_mask"][2:].all() != cut
    model = Standin()
    sample_latents(model, **request(), steps=2, cfg_scale=1.0)
    assert model.calls[0]["x"].shape[0] == 2


@EACH
def test_a_clip_does_not_depend_on_its_batch(sampler):
    settings = dict(steps=5, sampler=sampler, cfg_scale=3.0)
    together = sample_latents(Standin(), **request(B=3), **settings)
    alone = sample_latents(Standin(), **request(B=1, first=2), **settings)
    torch.testing.assert_close(together[2:], alone)
    assert relative(together[:1], together[1:2]) > 0.1
    assert relative(sample_latents(Standin(), **request(B=1, first=2, seed=1), **settings), alone) > 0.1


STRENGTH = torch.tensor([[0.0, 0.5, 1.0, 0.29], [1.0, 1.0, 1.0, 1.0]])


def given(seed=5):
    return torch.randn(2, 4, 4, 3, 4, generator=torch.Generator().manual_seed(seed))


@EACH
@BOTH
def test_given_frames_stay_bit_for_bit(sampler, prediction):
    model, wanted, known = Standin(prediction=prediction), request(), given()
    strength = torch.tensor([[0.0, 1.0, 1.0, 0.1], [1.0] * 4])                         # 0.1 of 6 steps: none
    settings = dict(steps=6, sampler=sampler, prediction=prediction, cfg_scale=3.0)
    x = sample_latents(model, **wanted, **settings, known=known, strength=strength)
    kept = rearrange(strength < 1, "b t -> b 1 t 1 1").expand_as(x)
    assert torch.equal(x[kept], known[kept]) and not (x == known)[~kept].any() and x.isfinite().all()
    for call in model.calls:
        assert torch.equal(call["x"][:2][kept], known[kept])
        assert torch.equal(call["x_mask"], (strength == 1).repeat(2, 1))
    free = sample_latents(Standin(prediction=prediction), **request(), **settings)
    torch.testing.assert_close(free[1], x[1])                           # where nothing is given nothing changes


def test_shares_of_the_steps_are_upstreams():
    """int(strength * steps) in fp32: 0.29 of 100 are 29, of 10 are 2; only 1 has joined before the first step."""
    strength = torch.tensor([[0.0, 0.09, 0.29, 0.3, 0.5, 0.999, 1.0]])
    joins, told = sample.joining(strength, 10)
    assert told.tolist() == [[0, 0, 2, 3, 5, 9, 10]] and joins.tolist() == [[0, 0, 2, 3, 5, 9, 11]]
    assert sample.joining(strength, 10, join_untold=True)[0].tolist() == [[1, 1, 3, 4, 6, 10, 11]]
    assert sample.joining(strength, 100)[1].tolist() == [[0, 9, 29, 30, 50, 99, 100]]


@EACH
@BOTH
def test_each_frame_is_told_the_level_it_has(sampler, prediction):
    """The level is measured: what is left of the model's input without the known part has a standard deviation of
    sqrt(1 - abar).  The model's answer here is exact, so this holds for x_0 = known at every step."""
    generator = torch.Generator().manual_seed(1)
    z, known = torch.randn(2, 1, 4, 5, 24, 32, generator=generator)
    strength = torch.tensor([[0.0, 0.29, 0.5, 0.8, 1.0]])
    exact = lambda x, t, m: (x - abar(t).sqrt() * known) / (1 - abar(t)).sqrt()
    model = Standin(exact, prediction, learned_variance=False)
    sample_latents(model, **request(B=1) | dict(z=z), steps=20, sampler=sampler, prediction=prediction, cfg_scale=1.0,
                   known=known, strength=strength)
    for i, call in enumerate(model.calls):
        assert call["x_mask"].tolist() == [[20 - i <= joins for joins in (0, 5, 10, 16, 20)]]
        noise = (1 - abar(call["t"])).sqrt()
        for frame, told in enumerate(call["x_mask"][0]):
            x, x_0 = call["x"][0, :, frame], known[0, :, frame]
            if told:                                                    # 3,072 values: 0.013 is a standard deviation
                level = float((x - abar(call["t"])[0].sqrt() * x_0).std() / noise)
                assert abs(level - 1) < 0.05, (i, frame, level)
            else:
                assert torch.equal(x, x_0)


@BOTH
@pytest.mark.parametrize("sampler", ["dpm", "unipc"])
def test_a_frame_that_joins_has_a_true_history(monkeypatch, sampler, prediction):
    """Its first step is that of a run of this frame alone in which x_0 was foreseen exactly until then."""
    known, z, steps, first, x = given(), request()["z"], 10, 5, []
    model, calls = Standin(prediction=prediction), []
    monkeypatch.setattr(sample, "step_back", lambda *args: calls.append((args[1], step_back(*args))) or calls[-1][1])
    sample_latents(model, **request(), steps=steps, sampler=sampler, prediction=prediction, cfg_scale=3.0, known=known,
                   strength=STRENGTH)
    assert [call["x_mask"][0, 1].item() for call in model.calls] == [False] * first + [True] * 5

    scheduler, frame = noise_schedule(sampler, prediction), lambda value: value[:1, :, 1:2]     # at strength 0.5
    scheduler.set_timesteps(steps)
    for i, t in enumerate(scheduler.timesteps[: first + 1]):
        signal, noise = abar(t).sqrt(), (1 - abar(t)).sqrt()
        x = signal * frame(known) + noise * frame(z) if i == 0 else x
        eps = (x - signal * frame(known)) / noise
        answer = eps if prediction == "eps" else (signal * x - frame(known)) / noise
        if i == first:
            assert relative(frame(model.calls[i]["x"]), x) < 1e-5
            answer = frame(calls[i][0])                                 # what the model really said
        x = step_back(scheduler, answer, t, x, None)
    assert relative(frame(calls[first][1]), x) < 1e-5


def test_the_join_quirk_is_iddpms():
    """dpm's and unipc's last step is from far above t = 0: a held frame would come out noised."""
    for sampler in sample.SAMPLERS:
        x = sample_latents(Standin(gaussian_eps), **request(), steps=5, sampler=sampler, quirks=RELEASED, known=given(),
                           strength=torch.zeros(2, 4))
        assert torch.equal(x, given()) == (sampler != "iddpm")


@EACH
def test_editing_goes_from_the_input_to_something_new(sampler):
    known, settings = given(), dict(steps=20, sampler=sampler, cfg_scale=1.0)
    away = [relative(sample_latents(Standin(gaussian_eps), **request(), **settings, known=known,
                                    strength=torch.full((2, 4), r)), known) for r in (0.0, 0.3, 0.6, 0.9)]
    assert away[0] == 0 < away[1] < away[2] < away[3]
    noise = sample_latents(Standin(gaussian_eps), **request(), **settings)
    given_but_free = sample_latents(Standin(gaussian_eps), **request(), **settings, known=known,
                                    strength=torch.ones(2, 4))
    assert torch.equal(given_but_free, noise)


def test_progress_is_called_after_each_step():
    seen = []
    sample_latents(Standin(), **request(), steps=3, progress=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("known, strength", [(given(), None), (None, STRENGTH), (given(), STRENGTH[:, :3])])
def test_given_frames_need_a_strength_each(known, strength):
    with pytest.raises(ValueError, match=r"strength must be \[B T\] = \[2 4\] and stand with known, got \["):
        sample_latents(Standin(), **request(), steps=3, known=known, strength=strength)


# ---------------------------------------------------------------- captions in, frames out
class StandinVAE:
    """8x down by averaging, up by repeating; z holds R, G, B and their mean."""

    down, channels = 8, 4

    def encode(self, video):
        cells = rearrange(video, "b c t (h a) (w d) -> b c t h w a d", a=8, d=8).mean((-1, -2))
        return torch.cat([cells, cells.mean(1, keepdim=True)], dim=1)

    def decode(self, z):
        return z[:, :3].repeat_interleave(8, 3).repeat_interleave(8, 4)


def standin_text(captions):
    y = torch.stack([torch.full((10, 8), len(caption) / 50) for caption in captions])
    return y, torch.arange(10).expand(len(captions), 10) < 3


def make(prompts=("a red circle",), model=None, **changes):
    settings = dict(num_frames=4, height=16, width=24, fps=24, steps=3, seed=3, sampler="ddim", cfg_scale=2.0) | changes
    return generate(model or Standin(gaussian_eps), StandinVAE(), standin_text, list(prompts), **settings)


def test_generate_gives_one_clip_per_prompt_whatever_the_batch_size():
    prompts = ["one", "two words", "now three words"]
    for sampler in sample.SAMPLERS:
        frames = make(prompts, Standin(), sampler=sampler, batch_size=3)
        assert frames.shape == (3, 4, 16, 24, 3) and frames.dtype == np.uint8
        alone = make(prompts, Standin(), sampler=sampler, batch_size=1)
        assert np.abs(frames.astype(int) - alone).max() <= 1 and (frames[0] != frames[1]).any()
    assert (make(prompts, Standin(), seed=4) != make(prompts, Standin())).any()


def test_the_model_is_told_sizes_and_rates():
    model = Standin(gaussian_eps)
    make(model=model, frame_interval=3)
    told = {name: model.calls[0][name].tolist() for name in ("height", "width", "num_frames", "ar", "fps")}
    assert told == {"height": [16] * 2, "width": [24] * 2, "num_frames": [4] * 2, "ar": [1.5] * 2, "fps": [8] * 2}
    make(model=model, frame_interval=3, quirks=SampleQuirks(ar_h_over_w=True, raw_fps=True))
    assert model.calls[-1]["ar"][0] == pytest.approx(16 / 24) and model.calls[-1]["fps"][0] == 24
    make(model=model, num_frames=1)
    assert model.calls[-1]["fps"][0] == 120


def test_odd_sizes_are_floored_and_said(capsys):
    model = Standin(gaussian_eps)
    assert make(model=model, height=17, width=30).shape == (1, 4, 16, 24, 3)
    assert "17x30 asked, 16x24 made" in (said := capsys.readouterr().out) and said.count("\n") == 1
    assert model.calls[0]["height"][0] == 17 and model.calls[0]["width"][0] == 30      # told as asked, like upstream
    make()
    assert capsys.readouterr().out == ""


def flat_frames(seed, many, cells=(2, 3)):
    """uint8 [many 16 24 3] of one colour per cell: StandinVAE gives them back exactly."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (many, *cells, 3), np.uint8).repeat(8, axis=1).repeat(8, axis=2)


def test_references_are_the_first_frames():
    """Also where only one clip of a batch has one, and at another size and aspect ratio; without a strategy its first
    frame alone."""
    flat, model = flat_frames(0, 2), Standin(gaussian_eps)
    frames = make(["one", "two"], model, references=[None, [flat]], strategies=[None, [Given(length=2)]])
    assert (frames[1, :2] == flat).all() and (frames[1, 2:] != flat).any()
    assert model.calls[0]["x_mask"].tolist() == [[True] * 4, [False, False, True, True]] * 2
    np.testing.assert_array_equal(frames[0], make(["one", "two"])[0])
    blue = np.zeros((2, 50, 40, 3), np.uint8) + np.array([10, 20, 200], np.uint8)
    frames = make(references=[[blue]])[0]
    assert (frames[0] == blue[0, 0, 0]).all() and (frames[1] != blue[0, 0, 0]).any()


def test_only_frames_that_are_used_are_encoded(monkeypatch):
    seen, encode = [], StandinVAE.encode
    monkeypatch.setattr(StandinVAE, "encode", lambda self, video: seen.append(video.shape) or encode(self, video))
    clip, many = flat_frames(1, 9), flat_frames(2, 7)
    frames = make(references=[[clip, many]], strategies=[parse_strategy("0,1,-2,0,2;0,1,0,3,1")])[0]
    assert seen == [(1, 3, 3, 16, 24)] and (frames[[0, 1, 3]] == many[[5, 6, 0]]).all()


@EACH
def test_editing_by_nothing_gives_the_clip_back_and_by_all_forgets_it(sampler):
    clip, other = flat_frames(3, 4), flat_frames(4, 4)
    settings = dict(sampler=sampler, steps=4)
    edited = lambda clip, strength: make(references=[[clip]], strategies=[edit(strength, 4)], **settings)[0]
    assert (edited(clip, 0.0) == clip).all()
    assert (edited(clip, 1.0) == make(**settings)[0]).all()
    away = lambda strength: np.abs(edited(clip, strength).astype(int) - clip).mean()
    assert 0 < away(0.25) < away(0.75) and (edited(clip, 0.5) != edited(other, 0.5)).any()


@pytest.mark.parametrize("changes, message", [
    (dict(prompts=[]), "no prompts: expected at least one"),
    (dict(prompts=["a", " "]), "each must say something"),
    (dict(height=15), "16x16 pixels, one patch"),
    (dict(num_frames=0), "1 frame or more"),
    (dict(fps=0), "fps=0, frame_interval=1: expected more than 0"),
    (dict(references=[None, None]), "2 references and 1 strategies for 1 prompts"),
    (dict(references=[np.zeros((2, 8, 8, 3), np.uint8)]), r"a list of uint8 \[K H W 3\], got \[8, 8, 3\]"),
    (dict(strategies=[[Given()]]), "reference=0, but there are 0"),
    (dict(segments=0), "expected one segment or more"),
    (dict(segments=2, overlap=4), "overlap=4 of segments of 4 frames: expected 1 to 3"),
    (dict(prompts=["|0|a|3|b"], segments=2), r"\|3\|b': expected \|0\|text\|3\|text, .* of 2"),
    (dict(segments=2, strategies=[parse_strategy("1,1")]), "group 1 of 2, '1,1,0,0,1,0': reference=1, but there are 1"),
    (dict(steps=0), "steps=0"),
    (dict(sampler="euler"), "sampler='euler'"),
])
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_all_is_checked_before_anything_is_sampled():
    """A mistake in the last segment of the last job."""
    model = Standin()
    with pytest.raises(ValueError, match="group 1 of 3, '2,9,0,0,1,0': reference=9, but there are 2"):
        make(["a", "b"], model, segments=3, batch_size=1, strategies=[None, [Given(segment=2, reference=9)]])
    assert not model.calls


# ---------------------------------------------------------------- the command line
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The real classes, fresh and small: config.py, model.safetensors, vae/, text_encoder/."""
    folder = tmp_path_factory.mktemp("tiny")
    make_text_encoder(["a red circle moves right"], folder / "text_encoder", width=16)
    torch.manual_seed(0)
    diffusers.AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                            block_out_channels=(8,) * 4, norm_num_groups=4).save_pretrained(folder / "vae")
    shape = STDiTConfig(depth=1, hidden_size=24, num_heads=2, caption_channels=16, model_max_length=8)
    config = configs.Config(model=shape, vae=str(folder / "vae"), text_encoder=str(folder / "text_encoder"), data="d",
                            buckets={"32": {1: (1.0, 2), 8: (1.0, 2), 16: (0.5, 1)}}, mask_ratios={"mask_no": 1.0},
                            prediction="v", fps=8.0, lr=1e-3, steps=1, out="runs/test")
    (folder / "config.py").write_text(configs.dump(config))
    save_file(STDiT(shape).state_dict(), folder / "model.safetensors")
    return folder


def command(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["sample.py", *map(str, args)])
    sample.main()


def test_command_line_writes_videos_and_sheets(checkpoint, tmp_path, monkeypatch, capsys):
    command(monkeypatch, "--prompt", "a red circle moves right", "a dog!", "--ckpt", checkpoint,
            "--out", tmp_path / "new", "--steps", 2, "--device", "cpu")
    out, err = capsys.readouterr()
    for stem in ("00-a-red-circle-moves-right", "01-a-dog"):
        assert f"{stem}.mp4  8 frames of 32x32, 8 per second" in out and (tmp_path / f"new/{stem}.png").stat().st_size
        assert read_window(str(tmp_path / f"new/{stem}.mp4"))[0].shape == (8, 32, 32, 3)
    assert "2 of 2 made, 2 iddpm steps" in out and "does not know: dog!" in err


def test_command_line_takes_references(checkpoint, tmp_path, monkeypatch, capsys):
    """A .png for two prompts; the frames that come out first are its reconstruction by the autoencoder."""
    red = np.zeros((1, 32, 32, 3), np.uint8) + np.array([200, 30, 30], np.uint8)
    Image.fromarray(red[0]).save(tmp_path / "red.png")
    seen = []
    monkeypatch.setattr(sample, "save", lambda job, frames, *_: seen.append((frames, job.fps)))
    common = ("--ckpt", checkpoint, "--steps", 2, "--sampler", "dpm", "--device", "cpu", "--num-frames", 3)
    vae = load_vae(str(checkpoint / "vae"))
    expected = to_uint8(vae.decode(vae.encode(to_video(resize_crop(torch.from_numpy(red), 16, 24))[None]))[0])[0]
    for option in ("--reference", "--animate"):
        command(monkeypatch, "--prompt", "one", "two", option, tmp_path / "red.png", "--size", "16x24", "--fps", 12,
                "--out", tmp_path / "none", *common)
    assert len(seen) == 4
    for frames, fps in seen:
        assert frames.shape == (3, 16, 24, 3) and fps == 12
        assert np.abs(frames[0].astype(int) - expected).max() <= 1


def test_command_line_passes_on_what_it_is_told(checkpoint, tmp_path, monkeypatch):
    told = {}
    def note(model, vae, text_encoder, jobs, references, made, progress, **how):
        told.update(how, jobs=jobs)
        return []
    monkeypatch.setattr(sample, "sample_segments", note)
    monkeypatch.setattr(sample, "show", lambda *args: None)
    monkeypatch.setattr(sample, "save", lambda *args: None)
    common = ("--prompt", "a red circle", "--ckpt", checkpoint, "--device", "cpu", "--out", tmp_path)
    command(monkeypatch, *common)
    assert told["quirks"] == SampleQuirks() and told["prediction"] == "v" and told["steps"] == 100
    assert told["jobs"] == [Job(("a red circle",), 8, 32, 32, 8.0)]
    command(monkeypatch, *common, "--quirks", "--sampler", "dpm", "--seed", 7, "--cfg-scale", 2, "--fps", 30,
            "--frame-interval", 3, "--rescale", 0.5)
    assert told["quirks"] == RELEASED and told["sampler"] == "dpm" and told["steps"] == 20
    assert told["jobs"] == [Job(("a red circle",), 8, 32, 32, 30.0, 3, seed=7)]
    assert told["cfg_scale"] == 2 and told["rescale"] == 0.5


@pytest.mark.parametrize("args, message", [
    (["--ckpt", "runs/nowhere"], "no checkpoint runs/nowhere: .*config.py.*train.py configs/tiny.py"),
    (["--size", "32"], "--size 32: expected two whole numbers, as in 240x426"),
    (["--size", "8x8"], "16x16 pixels, one patch"),
    (["--steps", "0"], "steps=0"),
    (["--rescale", "3"], "--rescale 3.0: expected 0, no change, to 1"),
    (["--num-frames", "0"], "0 frames of 32x32"),
    (["--frame-interval", "0"], "fps=8.0, frame_interval=0: expected more than 0"),
    (["--fps", "0", "--animate", "nowhere.png"], "fps=0.0, frame_interval=1: expected more than 0"),
    (["--reference", "nowhere.png"], "nowhere.png: no such file"),
    (["--edit", "a.mp4", "--animate", "a.png"], "--animate and --edit: expected one of them"),
    (["--edit", "a.mp4", "--mask-strategy", "0"], "--edit and --mask-strategy: expected one of them"),
    (["--infill", "a.mp4", "4"], "--infill 4: expected two whole numbers, as in 4:12"),
    (["--mask-strategy", "0,x"], "group 1 of 1, '0,x': reference='x': expected a whole number"),
    (["--prompts", "nowhere.txt"], "nowhere.txt"),
    (["--again", "pyproject.toml"], "--again pyproject.toml: expected the .json beside a video"),
    (["--again", "assets/samples.png"], "--again assets/samples.png: expected the .json beside a video"),
])
def test_command_line_mistakes_are_one_line(checkpoint, monkeypatch, capsys, args, message):
    common = ["--device", "cpu", *([] if {"--ckpt", "--again"} & set(args) else ["--ckpt", checkpoint])]
    common += [] if {"--prompts", "--again"} & set(args) else ["--prompt", "a red circle"]
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *common, *args)
    *_, last = capsys.readouterr().err.splitlines()                                    # loading may have its say before
    assert stop.value.code == 2 and last.startswith("error: ") and re.search(message, last)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        command(monkeypatch, *common, *args, "--debug")


def test_processes_share_prompts_and_clips(tmp_path):
    """Two prompts, two pairs of processes, a pair a clip of 5 frames: what one process makes, but for rounding."""
    root = Path(__file__).parents[1]
    args = [str(root / "sample.py"), "--prompt", "a red circle", "a blue square", "--steps", "3", "--num-frames", "5",
            "--size", "24x40", "--device", "cpu", "--out"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *args, tmp_path / "one"], check=True, env=env)
    subprocess.run([sys.executable, *torchrun, *args, tmp_path / "four", "--sp", "2"], check=True, env=env)
    for name in ("00-a-red-circle.png", "01-a-blue-square.png"):
        one, four = (np.asarray(Image.open(tmp_path / folder / name)).astype(int) for folder in ("one", "four"))
        assert np.abs(one - four).max() <= 1


def test_the_plan_of_the_published_size(monkeypatch, capsys):
    """Its parts against live tensors: tests/test_plan.py, tests/test_vae.py.  The sum is made here by hand."""
    command(monkeypatch, "--plan", "--ckpt", "configs/stage3.py")
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert "T5 8.87, VAE 0.31 (fp32), model 1.43" in head and len(rows) == 3
    for row in rows:
        held, decoding, peak, lean = map(float, row.split()[-4:])
        assert peak == pytest.approx(0.31 + max(8.87, 1.43 + max(held, decoding)), abs=0.02)
        assert lean == pytest.approx(0.31 + max(8.87 / 24, 1.43 / 28 + held, decoding), abs=0.02)


def test_default_size_is_the_shortest_trained_video():
    buckets = {"144p": {1: (1.0, 8), 16: (1.0, 2)}, "240p": {8: (0.0, 1), 16: (0.3, 1), 64: (0.0, None)}}
    tiny = configs.load("configs/tiny.py")
    assert sample.default_bucket(replace(tiny, buckets=buckets).trained) == (16, 240, 426)
    assert sample.default_bucket(replace(tiny, buckets={"32": {1: (1.0, 8)}}).trained) == (1, 32, 32)


@pytest.mark.parametrize("many", [0, 1, 2, 3, 96, 200])
def test_the_benchs_prompts_are_as_many_as_asked(many):
    names = prompts_of_shapes(many)
    assert len(names) == many and names == prompts_of_shapes(many)


def test_slugs_are_file_names():
    assert sample.slug("A red/circle: moves?") == "a-red-circle-moves" and sample.slug("日本") == "prompt"
    assert len(sample.slug("long " * 50)) <= 40


# ---------------------------------------------------------------- jobs: prompts, JSON, forms
PARSING = json.loads((GOLDEN / "c_inference_parsing.json").read_text())


def test_texts_of_segments_are_upstreams():
    """But for its cleaning of captions, which takes the bars out of what does not start with |0|."""
    failed = []
    for case in PARSING["process_prompts"]:
        try:
            texts = sample.split_prompt(case["inp"], case["num_loop"])
        except ValueError:
            failed.append(case["inp"])
            assert "error" in case
        else:
            clean = [" ".join(text.replace("|", " ").lower().split()) for text in texts]
            assert "error" not in case and clean == case["out"][0], case
    assert failed == ["|0|a cat|5|dog", "|0|a|1|b|"]
    assert sample.split_prompt("|0|a|3|b") == ("a", "a", "a", "b")
    for wrong in ("|0|a|x|b", "|0|a|2|b|1|c", "|0||1|"):
        with pytest.raises(ValueError):
            sample.check_jobs([sample.plan_job(wrong, [], None, 1, num_frames=4, height=16, width=16, fps=8)],
                              lambda job: [], 8, (1, 2, 2))


def asked(*args):
    return sample.parse_args(["--prompt", "x", *args])


def test_json_of_prompts_is_upstreams(monkeypatch):
    """What upstream reads is read alike.  A bracket is a part of the caption; what names no option is an error."""
    meant = {"A [cat].": "A [cat].", "x[\"a\"]": "x[\"a\"]"}           # upstream: an error, and a list
    wrong = []
    for case in PARSING["extract_json_from_prompts"]:
        try:
            text, options = sample.split_json(case["inp"], asked())
        except ValueError as error:
            wrong.append((case["inp"], str(error)))
        else:
            told = case["out"][1][0] if "out" in case and case["inp"] not in meant else {}
            assert text == (meant.get(case["inp"]) or case["out"][0][0]), case
            assert options.mask_strategy == told.get("mask_strategy"), case
    assert [text for text, _ in wrong] == ["A cat{\"a\": {\"b\": 1}}", "{\"a\": 1}", "A cat{\"a\": 1} tail",
                                           "A {cat} {\"a\":1}"]
    assert "'--a' is none of num_frames" in wrong[0][1] and "Extra data" in wrong[2][1]
    _, options = sample.split_json('x {"reference_path": "a;b", "num_frames": 16, "seamless": true, "seed": 3, '
                                   '"connect": ["a", "b"]}', asked("--size", "16x16", "--num-frames", "4"))
    assert (options.reference, options.num_frames, options.seamless) == (["a;b"], 16, True)
    assert (options.connect, options.seeds, options.size) == (["a", "b"], [3], "16x16")
    _, options = sample.split_json('x {"mask_strategy": "-1,0", "seamless": false}', asked())    # no option, though "-"
    assert (options.mask_strategy, options.seamless) == ("-1,0", False)
    with pytest.raises(ValueError, match="--num-frames: invalid int value: 'many'"):
        sample.split_json('x {"num_frames": "many"}', asked())


@pytest.mark.parametrize("args, references, strategy", [
    ([], [], ""),
    (["--animate", "a.png"], ["a.png"], "0,0,0,0,1,0"),
    (["--extend-after", "a.mp4"], ["a.mp4"], "0,0,-4,0,4,0"),
    (["--extend-before", "a.mp4", "--keep", "8"], ["a.mp4"], "0,0,0,-8,8,0"),
    (["--connect", "a.png", "b.png"], ["a.png", "b.png"], "0,0,-1,0,1,0;0,1,0,-1,1,0"),
    (["--connect", "a", "b", "--keep", "2"], ["a", "b"], "0,0,-2,0,2,0;0,1,0,-2,2,0"),
    (["--edit", "a.mp4", "--strength", "0.4"], ["a.mp4"], "0,0,0,0,16,0.4"),
    (["--infill", "a.mp4", "4:12"], ["a.mp4"], "0,0,0,0,4,0;0,0,12,12,4,0"),
    (["--reference", "a.png;b.mp4", "c.gif"], ["a.png", "b.mp4", "c.gif"], "0,0,0,0,1,0"),
    (["--reference", "a.mp4", "--mask-strategy", "0,0,0,0,8,0.3;"], ["a.mp4"], "0,0,0,0,8,0.3"),
    (["--reference", "a.mp4", "--mask-strategy", ""], ["a.mp4"], ""),
])
def test_forms_of_what_is_given(args, references, strategy):
    paths, groups = sample.given_frames(asked(*args), 16)
    assert paths == references and format_strategy(groups) == strategy


def test_a_file_of_prompts(checkpoint, tmp_path, monkeypatch, capsys):
    """One job a line, each with its own size and seeds; those of one size are sampled together."""
    (tmp_path / "jobs.txt").write_text('a red circle\n\na dog {"num_frames": 3, "size": "16x24"}\n'
                                       'a cat {"seeds": [0, 5]}\n', "utf-8")
    sizes, real = [], sample.sample_segments
    note = lambda *args, **how: sizes.append(len(args[3])) or real(*args, **how)
    monkeypatch.setattr(sample, "sample_segments", note)
    common = ("--prompts", tmp_path / "jobs.txt", "--ckpt", checkpoint, "--steps", 2, "--device", "cpu")
    command(monkeypatch, *common, "--out", tmp_path / "out", "--format", "gif")
    assert sorted(sizes) == [1, 3] and "4 of 4 made" in capsys.readouterr().out
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {f"{stem}{end}" for end in (".png", ".gif", ".json")
                     for stem in ("00-a-red-circle", "01-a-dog", "02-a-cat", "02-a-cat-seed-5")}
    assert read_window(str(tmp_path / "out/01-a-dog.gif"))[0].shape[0] == 3


def reference_clip(path, many=10, fps=24):
    levels = np.arange(many, dtype=np.uint8) * 20                       # frame i is 20 i bright
    write_video(path, levels.repeat(32 * 48 * 3).reshape(many, 32, 48, 3), fps)


def levels_of(reference):
    """Which frames of reference_clip a reference has; None for those that were not read."""
    assert all(frame.shape == (32, 48, 3) and frame.dtype == np.uint8 for frame in reference if frame is not None)
    return [frame if frame is None else round(frame.mean() / 20) for frame in reference]


def test_references_are_read_at_the_jobs_rate(tmp_path):
    """Every third frame of 24 a second for a job at 8, up to the last one where the end is wanted; what is taken."""
    reference_clip(tmp_path / "a.mp4", many=9)
    common = dict(prompts=("x",), num_frames=4, height=17, width=16, references=(str(tmp_path / "a.mp4"),))
    for fps, interval, strategy, frames in [
            (24, 3, "0,0,0,0,3", [0, 3, 6]), (24, 3, "0,0,-2,0,2", [None, 5, 8]), (24, 3, "0", [0, None, None]),
            (8, 1, "0,0,-1", [None, None, 8]), (60, 1, "0,0,4;0,0,-1,1", [None] * 4 + [4, None, None, None, 8])]:
        [clip] = sample.read_references(Job(**common, fps=fps, frame_interval=interval, strategy=strategy))
        assert levels_of(clip) == frames


@pytest.mark.parametrize("strategy, ends", [
    ("1,-1,-2,0,2", [False, False]),            # -1 in segment 1 is segment 0: --animate, and on from there
    ("1,-2,-2,0,2", [False, True]), ("1,-3,-2,0,2", [True, False]), ("0,-1,-2,0,2", [False, True]),
    ("2,-3,-2,0,2", [False, True]), ("0,-2,-2,0,2", [True, False]), ("1,1,-1", [False, True]),
    ("1,2,-1", [False, False]),                 # segment 0 by its number
    ("3,0,-1;-1,1,-1", [False, False]),         # of segments that are never made
])
def test_the_end_that_is_taken_is_that_of_the_clip_meant(tmp_path, strategy, ends):
    """Of three segments with two clips of 9 frames, of which every third is shown; each clip's middle one is given."""
    reference_clip(tmp_path / "a.mp4", many=9)
    job = Job(("x",) * 3, 4, 16, 16, 24, 3, (str(tmp_path / "a.mp4"),) * 2, strategy + ";0,0,1;0,1,1,1")
    assert [levels_of(clip)[1] for clip in sample.read_references(job)] == [5 if end else 3 for end in ends]


def test_a_film_is_not_read_to_animate_its_first_frame(checkpoint, tmp_path, monkeypatch):
    """Frames, stride and start of what is read: once before anything is sampled, so that a fault is told then."""
    reference_clip(tmp_path / "a.gif", many=9)
    read, windows = sample.read_window, []
    monkeypatch.setattr(sample, "read_again", lambda *args: windows.append(args[1:]) or read(*args))
    common = ("--prompt", "x", "--ckpt", checkpoint, "--steps", 1, "--device", "cpu", "--fps", 8, "--out", tmp_path)
    command(monkeypatch, *common, "--animate", tmp_path / "a.gif", "--num-frames", 4)
    command(monkeypatch, *common, "--extend-after", tmp_path / "a.gif", "--num-frames", 3, "--keep", 2, "--overwrite")
    assert windows == [(1, 3, 0)] * 2 + [(2, 3, 5)] * 2


def test_clips_of_several_seeds_are_decoded_once(tmp_path, monkeypatch):
    reference_clip(tmp_path / "a.mp4", many=9)
    jobs = [Job(("x",), 4, 16, 16, 24, references=(str(tmp_path / "a.mp4"),), strategy="0", seed=s) for s in range(9)]
    frames = [sample.read_references(job)[0][0] for job in jobs]
    assert all(np.shares_memory(frame, frames[0]) for frame in frames)


# ---------------------------------------------------------------- jobs: long video
def test_segments_share_frames_and_are_shown_without_seams():
    """Each starts with the last latents of the one before and says its own text; shared frames are shown once."""
    model, T, K = Standin(), 6, 2
    prompt = "|0|one|1|now two words|2|three"
    [job] = jobs = [sample.plan_job(prompt, [], None, K, num_frames=T, height=16, width=24, fps=8, seed=3)]
    how = dict(steps=3, sampler="ddim", cfg_scale=1.0, quirks=SampleQuirks())
    rounds = list(sample.sample_segments(model, StandinVAE(), standin_text, jobs, [[]], [[]], **how))
    assert len(rounds) == 3
    for before, after in zip(rounds, rounds[1:]):
        assert torch.equal(after[:, :, :K], before[:, :, -K:]) and not torch.equal(after[:, :, K:], before[:, :, K:])
    said = [round(float(call["y"].mean()) * 50) for call in model.calls[::3]]
    assert said == [3, 13, 5] and model.calls[3]["x_mask"].tolist() == [[False] * K + [True] * 4]
    video = make([prompt], Standin(), num_frames=T, overlap=K, cfg_scale=1.0)[0]
    assert video.shape == (3 * (T - K) + K, 16, 24, 3)
    z = torch.cat([rounds[0], *(after[:, :, K:] for after in rounds[1:])], dim=2)
    assert (video == to_uint8(StandinVAE().decode(z)[0])).all()
    assert make(["one"], num_frames=T, segments=4).shape[1] == 4 * (T - 1) + 1            # a quarter of 6 is 1


def test_a_seamless_video_leads_back_to_its_start():
    job = sample.plan_job("one", [], None, 2, True, num_frames=6, height=16, width=24, fps=8)
    how = dict(steps=2, sampler="ddim", cfg_scale=1.0, quirks=SampleQuirks())
    rounds = [z[0] for z in sample.sample_segments(Standin(), StandinVAE(), standin_text, [job], [[]], [[]], **how)]
    assert len(rounds) == 2 and torch.equal(rounds[1][:, -2:], rounds[0][:, :2])
    assert sample.show(StandinVAE(), job, rounds).shape == (2 * (6 - 2), 16, 24, 3)


LONG = ("--prompt", "|0|a red circle|1|a blue square|2|a green dog", "a cat", "--segments", 3, "--num-frames", 4,
        "--overlap", 1, "--size", "16x24", "--steps", 2, "--device", "cpu")


def test_a_stopped_long_video_goes_on(checkpoint, tmp_path, monkeypatch, capsys):
    """Stopped in the third segment, started again: it is the only one made then, and the files are the same.  Segments
    of other weights or settings are of no use."""
    common, real, calls = (*LONG, "--ckpt", checkpoint), sample.sample_latents, []
    command(monkeypatch, *common, "--out", tmp_path / "one")

    def stop_at(n):
        def sample_latents(*args, **how):
            calls.append(1)
            if len(calls) == n:
                raise KeyboardInterrupt
            return real(*args, **how)
        calls.clear()
        monkeypatch.setattr(sample, "sample_latents", sample_latents)

    stop_at(3)
    with pytest.raises(SystemExit, match="130"):
        command(monkeypatch, *common, "--out", tmp_path / "two")
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == [
        ".00-a-red-circle.safetensors", ".01-a-cat.safetensors"]
    note = read_note(tmp_path / "two/.01-a-cat.safetensors")
    cat = Job(**json.loads(note)["job"] | {"prompts": ("a cat",) * 3})
    assert len(sample.read_latents(cat, note, tmp_path / "two")) == 2
    assert not sample.read_latents(cat, note.replace('"weights": "', '"weights": "0'), tmp_path / "two")
    stop_at(99)
    capsys.readouterr()
    command(monkeypatch, *common, "--out", tmp_path / "two")
    assert len(calls) == 1 and "00-a-red-circle: goes on behind 2 of 3 segments" in capsys.readouterr().out
    for name in ("00-a-red-circle.png", "00-a-red-circle.mp4", "01-a-cat.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert not list((tmp_path / "two").glob(".*"))


# ---------------------------------------------------------------- jobs: files
def test_the_json_makes_the_video_again(checkpoint, tmp_path, monkeypatch):
    """Alone and bit-equal in a batch of one, from another place in a list, with references, segments and settings."""
    reference_clip(tmp_path / "a.mp4", fps=8)
    common = ("--ckpt", checkpoint, "--device", "cpu", "--batch-size", 1)
    command(monkeypatch, "--prompt", "a cat", "a red circle", *LONG[3:], *common, "--extend-after", tmp_path / "a.mp4",
            "--seeds", 0, 4, "--sampler", "ddim", "--cfg-scale", 3, "--out", tmp_path / "one", "--format", "folder")
    stem = "01-a-red-circle-seed-4"
    command(monkeypatch, "--again", tmp_path / f"one/{stem}.json", *common[2:], "--out", tmp_path / "two", "--format",
            "folder")
    one, two = (sorted((tmp_path / folder / stem).iterdir()) for folder in ("one", "two"))
    assert len(one) == len(two) == 3 * (4 - 1) + 1
    assert [a.read_bytes() for a in one] == [b.read_bytes() for b in two]
    told = json.loads((tmp_path / f"two/{stem}.json").read_text())
    assert told == json.loads((tmp_path / f"one/{stem}.json").read_text())
    assert told["job"]["number"] == 1 and told["sampling"]["cfg_scale"] == 3 and told["ckpt"] == str(checkpoint)


def test_the_json_tells_of_plain_ops(checkpoint, tmp_path, monkeypatch, capsys):
    common = ("--device", "cpu", "--format", "png", "--out")
    command(monkeypatch, "--prompt", "a cat", "--ckpt", checkpoint, "--steps", 1, "--plain", *common, tmp_path / "one")
    assert "ops: plain" in capsys.readouterr().out
    command(monkeypatch, "--again", tmp_path / "one/00-a-cat.json", *common, tmp_path / "two")
    assert "ops: plain" in capsys.readouterr().out
    one, two = ((tmp_path / folder / "00-a-cat.json").read_text("utf-8") for folder in ("one", "two"))
    assert one == two and json.loads(one)["plain"] is True


@pytest.mark.parametrize("words, named", [(["--steps", 5], "--steps"), (["--seed", 1, "--plain"], "--seeds, --plain")])
def test_again_takes_no_other_settings(checkpoint, tmp_path, monkeypatch, capsys, words, named):
    with pytest.raises(SystemExit, match="2"):
        command(monkeypatch, "--again", tmp_path / "a.json", *words)
    assert capsys.readouterr().err == f"error: --again {tmp_path / 'a.json'} takes all from there: leave out {named}\n"


def test_what_is_there_is_skipped(checkpoint, tmp_path, monkeypatch, capsys):
    common = ("--prompt", "a cat", "a dog", "--ckpt", checkpoint, "--device", "cpu", "--steps", 2, "--out", tmp_path)
    command(monkeypatch, *common)
    (tmp_path / "01-a-dog.json").unlink()                               # as if stopped before the end
    before = (tmp_path / "00-a-cat.mp4").stat().st_mtime_ns
    capsys.readouterr()
    command(monkeypatch, *common)
    out = capsys.readouterr().out
    assert "00-a-cat.mp4 is there: skipped, --overwrite makes it anew" in out and "1 of 2 made" in out
    assert (tmp_path / "00-a-cat.mp4").stat().st_mtime_ns == before and (tmp_path / "01-a-dog.json").exists()
    with pytest.raises(ValueError, match="00-a-cat.mp4 is there, of another prompt or made with other settings"):
        command(monkeypatch, *common, "--cfg-scale", 3, "--debug")
    command(monkeypatch, *common, "--cfg-scale", 3, "--overwrite")
    assert (tmp_path / "00-a-cat.mp4").stat().st_mtime_ns != before


def test_a_grid_of_seeds(checkpoint, tmp_path, monkeypatch, capsys):
    common = ("--prompt", "a cat", "--ckpt", checkpoint, "--device", "cpu", "--steps", 2, "--seeds", 0, 1, 2, "--grid")
    command(monkeypatch, *common, "--out", tmp_path, "--format", "png")
    sheets = [np.asarray(Image.open(tmp_path / f"00-a-cat{end}.png")) for end in ("", "-seed-1", "-seed-2")]
    assert (np.asarray(Image.open(tmp_path / "00-a-cat-grid.png")) == np.concatenate(sheets)).all()
    assert "00-a-cat-grid.png  seeds 0 1 2" in capsys.readouterr().out and not list(tmp_path.glob("*.mp4"))
    command(monkeypatch, *common, "--out", tmp_path / "stills", "--num-frames", 1)
    assert Image.open(tmp_path / "stills/00-a-cat-grid.png").size == (3 * 128, 128)
    assert not list((tmp_path / "stills").glob("*.mp4"))


def test_an_unknown_flag_is_named_first(capsys):
    """Not the --prompt that is missing without it."""
    for words, said in ((["--promt", "a dog"], "there is no --promt, did you mean --prompt?"),
                        (["--prompt=x", "--num_frames=3"], "there is no --num_frames, did you mean --num-frames?"),
                        (["--prompt", "x", "--zzz"], "there is no --zzz, --help shows what is"),
                        (["--prompt", "x", "--num-frames", "many"], "argument --num-frames: invalid int value: 'many'"),
                        ([], "one of the arguments --prompt --prompts --again --plan --export is required")):
        with pytest.raises(SystemExit, match="2"):
            sample.parse_args(words)
        assert capsys.readouterr().err == f"error: {said}\n"
    assert sample.parse_args(["--prompt", "-- a dash --", "--size=16x16"]).prompt == ["-- a dash --"]


def test_help_shows_examples_first(capsys):
    with pytest.raises(SystemExit):
        sample.parse_args(["--help"])
    shown = capsys.readouterr().out
    assert shown.startswith("usage: python sample.py --prompt")
    first, *rest = map(shown.index, ("python sample.py --prompts jobs.txt", "--num-frames", "--batch-size"))
    assert [first, *rest] == sorted([first, *rest])
    assert "Q4" not in shown.split("--quirks")[0]


# ---------------------------------------------------------------- weights in and out
def published(depth):
    """{name: shape} of OpenSora-STDiT-v2-stage3, by FACTS.md, cut to `depth` blocks."""
    C, linear = 1152, {}
    for name, width in {"t_embedder": C, "fl_embedder": C, "fps_embedder": C, "csize_embedder": 384,
                        "ar_embedder": 384}.items():
        linear |= {f"{name}.mlp.0": (width, 256), f"{name}.mlp.2": (width, width)}
    linear |= {"t_block.1": (6912, C), "t_block_temp.1": (3456, C), "y_embedder.y_proj.fc1": (C, 4096),
               "y_embedder.y_proj.fc2": (C, C), "final_layer.linear": (32, C)}
    shapes = {"rope.freqs": (36,), "y_embedder.y_embedding": (200, 4096), "x_embedder.proj.weight": (C, 4, 1, 2, 2),
              "x_embedder.proj.bias": (C,), "final_layer.scale_shift_table": (2, C)}
    for block in (f"blocks.{i}." for i in range(depth)):
        for name in ("attn", "attn_temp"):
            linear |= {f"{block}{name}.qkv": (3 * C, C), f"{block}{name}.proj": (C, C)}
            shapes |= {f"{block}{name}.q_norm.weight": (72,), f"{block}{name}.k_norm.weight": (72,)}
        linear |= {f"{block}cross_attn.q_linear": (C, C), f"{block}cross_attn.kv_linear": (2304, C),
                   f"{block}cross_attn.proj": (C, C), f"{block}mlp.fc1": (4608, C), f"{block}mlp.fc2": (C, 4608)}
        shapes |= {f"{block}scale_shift_table": (6, C), f"{block}scale_shift_table_temporal": (3, C)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def random_weights(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return weights | {"rope.freqs": 10000 ** (-torch.arange(0, 72, 2).float() / 72)}


HUGGING_FACE = {"_name_or_path": "hpcai-tech/OpenSora-STDiT-v2-stage3", "architectures": ["STDiT2"],
                "model_type": "STDiT2", "torch_dtype": "float32", "transformers_version": "4.39.3"}
XL = {"caption_channels": 4096, "class_dropout_prob": 0.1, "hidden_size": 1152, "in_channels": 4, "input_sq_size": 512,
      "mlp_ratio": 4.0, "model_max_length": 200, "num_heads": 16, "patch_size": [1, 2, 2], "pred_sigma": True,
      "qk_norm": True}


@pytest.fixture(scope="module")
def xl(tmp_path_factory):
    """The published layout with one block of its 28."""
    folder = tmp_path_factory.mktemp("xl")
    (folder / "config.json").write_text(json.dumps(XL | HUGGING_FACE | {"depth": 1}))
    save_file(random_weights(published(1)), folder / "model.safetensors", {"format": "pt"})
    return folder


def test_the_published_keys_are_all_and_no_others():
    with torch.device("meta"):
        own = STDiT(XL_2).state_dict()
    assert {name: tuple(value.shape) for name, value in own.items()} == published(28)


def test_published_weights_load_in_every_form(xl, tmp_path, monkeypatch, capsys):
    weights = load_file(xl / "model.safetensors")
    monkeypatch.setattr(sample, "snapshot_download", lambda name, allow_patterns: {"some/name": str(xl)}[name])
    torch.save({"state_dict": weights, "epoch": 3}, tmp_path / "w.pth")
    (tmp_path / "config.json").write_text((xl / "config.json").read_text())
    for ckpt in (xl, "some/name", xl / "model.safetensors", tmp_path / "w.pth"):
        model, config, quirks = load(ckpt)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert quirks == PUBLISHED and config.raw_fps and config.captions_cleaned
        assert [getattr(model.config, name) for name in QUIRKS] == [True] * 3 and not model.training
        said = capsys.readouterr().out
        assert said.count("\n") == 1 and f"{ckpt}: quirks on: rope_before_norm" in said and "ar_h_over_w" in said


def test_published_weights_are_sampled_as_the_release_does(xl):
    config = find_checkpoint(xl)[1]
    assert sample.default_bucket(config.trained) == (16, 240, 426)
    assert (config.fps, config.frame_interval, config.prediction, config.cfg_scale) == (24, 3, "eps", 7)
    assert (config.vae, config.text_encoder, config.model.model_max_length) == (
        "stabilityai/sd-vae-ft-ema", "DeepFloyd/t5-v1_1-xxl", 200)
    assert sample.weight_dtype(config, "cuda") == torch.bfloat16 and configs.load  # as inference there


def test_open_soras_weights_from_the_command_line(tmp_path, monkeypatch, capsys):
    """A small model in upstream's layout, with an autoencoder and a T5 by folder; its .json makes the video again."""
    told = {"depth": 1, "hidden_size": 48, "num_heads": 4, "in_channels": 16, "caption_channels": 64,
            "model_max_length": 16, "qk_norm": True, "model_type": "STDiT2"}
    (tmp_path / "config.json").write_text(json.dumps(told))
    net = STDiT(STDiTConfig(**{name: value for name, value in told.items() if name != "model_type"}), seed=1)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    tiny = Path(__file__).parents[1] / "assets/tiny"
    command(monkeypatch, "--prompt", "A Red Circle", "--ckpt", tmp_path, "--vae", tiny / "vae", "--text-encoder",
            tiny / "text_encoder", "--steps", 2, "--num-frames", 3, "--size", "32x48", "--out", tmp_path / "one")
    out = capsys.readouterr().out
    assert "quirks on: rope_before_norm, round_conditions, final_twice, guide_3_channels" in out
    assert "captions are cleaned" in out and "join_untold" not in out
    command(monkeypatch, "--again", tmp_path / "one/00-a-red-circle.json", "--out", tmp_path / "two")
    one, two = ((tmp_path / folder / "00-a-red-circle.png").read_bytes() for folder in ("one", "two"))
    assert one == two


def test_weights_alone_are_taken_for_xl_2(xl, tmp_path, capsys):
    (tmp_path / "w.safetensors").symlink_to(xl / "model.safetensors")
    assert find_checkpoint(tmp_path / "w.safetensors")[1].model == replace(
        XL_2, rope_before_norm=True, round_conditions=True, final_twice=True)
    with pytest.raises(ValueError, match=r"w.safetensors: not those .* depth 28.* missing blocks.1.scale_shift_table"):
        load(tmp_path / "w.safetensors")
    assert "no config.json beside it, so taken for XL/2" in capsys.readouterr().out


@pytest.mark.parametrize("change, message", [
    (lambda w: w.pop("blocks.0.attn.k_norm.weight"), "missing blocks.0.attn.k_norm.weight$"),
    (lambda w: w.update({"pos_embed": torch.zeros(1)}), "unknown pos_embed$"),
    (lambda w: w.update({"t_block.1.bias": torch.ones(9)}), r"misshapen t_block.1.bias \[9\], expected \[6912\]$"),
    (lambda w: w.update({"rope.freqs": torch.ones(36)}), "rope.freqs are not"),
    (dict.clear, r"missing x_embedder.proj.weight \(and 58 more\)$"),
])
def test_weights_that_do_not_fit_are_named(xl, tmp_path, change, message):
    weights = load_file(xl / "model.safetensors")
    change(weights)
    (tmp_path / "config.json").write_text((xl / "config.json").read_text())
    torch.save(weights, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=f"w.pth: .*{message}"):
        load(tmp_path / "w.pth")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize("name", ["empty.pth", "empty.safetensors"])
def test_an_empty_file_is_told(name, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=f"{name} cannot be read: .* - is it whole"):
        sample.read_weights(tmp_path / name)


def test_no_code_in_a_file_is_run(xl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text((xl / "config.json").read_text())
    torch.save({"x": Bomb()}, "bomb.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Bomb()))
    Path("torn.safetensors").write_bytes((xl / "model.safetensors").read_bytes()[:5000])
    Path("torn.pth").write_bytes(b"PK")
    for name in ("bomb.pth", "plain.pth", "torn.safetensors", "torn.pth"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            load(tmp_path / name)
    assert not Path("exploded").exists()


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    def offline(name, allow_patterns):
        raise OSError("no connection\nand more")

    monkeypatch.setattr(sample, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError) as error:
        load("hpcai-tech/nothing")
    assert re.fullmatch("no checkpoint hpcai-tech/nothing: .* on the hub, which gave: no connection", str(error.value))
    with pytest.raises(FileNotFoundError, match=f"there is no {tmp_path / 'model.safetensors'}, expected a run"):
        load(tmp_path)


def test_a_run_is_loaded_with_its_own_config(checkpoint, capsys):
    model, config, quirks = load(checkpoint)
    assert config == configs.load(str(checkpoint / "config.py")) and quirks == SampleQuirks()
    assert all(torch.equal(value, load_file(checkpoint / "model.safetensors")[name])
               for name, value in model.state_dict().items())
    assert load(checkpoint / "model.safetensors").config == config and not capsys.readouterr().out
    assert load("assets/tiny").model.null_y.dtype == torch.float32                     # though kept in bf16


def a_run(folder, prediction="eps", **changes):
    """A run's folder with random weights, those that are 0 in a fresh model too."""
    shape = STDiTConfig(**dict(depth=2, hidden_size=24, num_heads=2, caption_channels=16, model_max_length=8) | changes)
    config = configs.Config(model=shape, vae="v", text_encoder="t", data="d", buckets={"32": {8: (1.0, 2)}}, steps=1,
                            mask_ratios={"mask_no": 1.0}, prediction=prediction, raw_fps=True, lr=1e-3, out="runs/test")
    folder.mkdir()
    (folder / "config.py").write_text(configs.dump(config))
    model, generator = STDiT(shape), torch.Generator().manual_seed(0)
    random = {name: 0.1 * torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()}
    save_file(random | {"rope.freqs": model.rope.freqs.data}, folder / "model.safetensors")
    return folder


def test_a_run_goes_to_open_sora_and_comes_back(tmp_path, capsys):
    run, out = a_run(tmp_path / "run", **dict.fromkeys(QUIRKS, True)), tmp_path / "out"
    export(run, out)
    before, after = load(run), load(out)
    assert after.config == before.config and after.quirks == before.quirks
    assert "note:" not in capsys.readouterr().out
    with safe_open(out / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"} and {f.get_slice(name).get_dtype() for name in f.keys()} == {"F32"}
    written = json.loads((out / "config.json").read_text())
    assert set(written) == set(XL) | {"depth", "model_type", "architectures", "torch_dtype"}       # STDiT2Config's
    theirs = from_upstream(written, load_file(out / "model.safetensors"))
    inputs = example_inputs(before.config.model, B=2)
    with torch.no_grad():
        assert torch.equal(theirs(**inputs), before.model(**inputs)) and before.model(**inputs).std() > 0.01
    (out / "config.py").unlink()                                            # as it would come from there
    model, config, quirks = load(out)
    assert quirks == PUBLISHED and config.model == before.config.model
    export(out, out)                                                        # over the file that it is read from
    again = load(out).model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in before.model.state_dict().items())
    assert {file.name for file in out.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("changes, message", [
    ({}, "model.rope_before_norm=False:"), ({"prediction": "v", "qk_norm": False}, "prediction='v':"),
    ({"temporal_pos": True, "pred_sigma": False, "qk_norm": False}, "model.temporal_pos=True, .*pred_sigma=False:")])
def test_what_open_sora_would_compute_otherwise_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"was trained with {message}"):
        export(a_run(tmp_path / "run", **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_small_differences_to_open_sora_are_noted(tmp_path, capsys):
    export(a_run(tmp_path / "run", qk_norm=False), tmp_path / "out")        # without QK-norm there is no order
    said = capsys.readouterr().out
    assert "note: Open-Sora computes with round_conditions" in said and "with final_twice" in said


# ---------------------------------------------------------------- what need not be in memory together
def test_texts_are_encoded_ahead(checkpoint, tmp_path, monkeypatch, capsys):
    config, captions = load(checkpoint).config, ["a red circle", "a dog", "right " * 9]
    expected = load_text_encoder(config.text_encoder, 8)
    for again in (False, True):
        encode = encode_texts(config, captions, folder=tmp_path)
        for caption in captions:
            (y, y_mask), (theirs, their_mask) = encode([caption]), expected([caption])
            assert torch.equal(y_mask, their_mask) and torch.equal(y[y_mask], theirs[their_mask])
        said = capsys.readouterr().err
        assert ("does not know: dog" in said and "cut at 8 of its 10 tokens: right" in said) != again
        monkeypatch.setattr(sample, "load_text_encoder", None)              # not needed the second time
    for other in (replace(config, captions_cleaned=True), replace(config, text_encoder="assets/tiny/text_encoder")):
        with pytest.raises(TypeError):
            encode_texts(other, captions, folder=tmp_path)


def test_blocks_visit_the_device(checkpoint):
    """A dtype stands for the device here: all but the blocks are there for good, and those while they compute."""
    encoder = load_text_encoder(load(checkpoint).config.text_encoder, 8)
    model, inputs = load(checkpoint).model, example_inputs(load(checkpoint).config.model)
    with torch.no_grad():
        model.final_layer.linear.weight.normal_()
        expected, before = model(**inputs), {p: p.data_ptr() for p in model.blocks.parameters()}
        out = visiting(model, model.blocks, torch.float64)(**inputs)
    assert {p: p.data_ptr() for p in model.blocks.parameters()} == before
    assert {p.dtype for p in model.blocks.parameters()} == {torch.float32} and model.null_y.dtype == torch.float64
    assert 0 < relative(out, expected) < 1e-5                               # the products were those of fp64
    y, _ = encoder(["a red circle"])
    visiting(encoder.net, encoder.net.encoder.block, torch.float64)
    again, _ = encoder(["a red circle"])
    assert encoder.net.encoder.block[0].layer[0].SelfAttention.q.weight.dtype == torch.float32
    assert 0 < relative(again, y) < 1e-5
    quiet = load(checkpoint, offload=True)
    assert all(block._forward_pre_hooks for block in quiet.model.blocks)
    assert all(map(torch.equal, encode_texts(quiet.config, ["right"], offload=True)(["right"]),
                   encode_texts(quiet.config, ["right"])(["right"])))
