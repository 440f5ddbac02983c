"""sample.py against upstream's recorded samplings, diffusers' DDIM, and distributions with a known answer."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file

import configs
import sample
from data import read_window, resize_crop, slot_generator, to_uint8, to_video
from model import STDiT, STDiTConfig
from sample import SampleQuirks, generate, guide, noise_schedule, sample_latents, step_back, timesteps
from vae import load_vae, make_text_encoder

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


def test_sampling_repeats_upstreams(monkeypatch):
    """Ten steps with guidance on 3 of 4 channels, every intermediate x.

    Equal to 1e-6, except that upstream multiplies its very last x_0 by 0.99983: posterior_mean_coef1[0] is 1, but in
    fp32 1 - abar_0 is off by that much.  diffusers has no place for such a coefficient: the last step is compared
    through it."""
    golden = load_file(GOLDEN / "b_sample_nomask_cfg3.safetensors")
    recorded_noise(monkeypatch, golden["noises"])
    model = Standin()
    model.null_y = golden["null"]
    xs = []
    monkeypatch.setattr(sample, "step_back", lambda *args: xs.append(step_back(*args)) or xs[-1])
    sample_latents(model, golden["z"], golden["y"][:, 0], torch.ones(2, 10, dtype=torch.bool), {}, generators=None,
                   steps=10, cfg_scale=7.0, quirks=SampleQuirks(guide_3_channels=True))
    for call, t, x in zip(model.calls, golden["model_t"], golden["model_x"], strict=True):
        assert call["t"].tolist() == [int(t[0])] * 4 and call["x_mask"] is None
        assert relative(call["x"][:2], x) < 1e-6 and relative(call["x"][2:], x) < 1e-6
    for ours, theirs in zip(xs[:-1], golden["steps"][:-1], strict=True):
        assert relative(ours, theirs) < 1e-6
    assert 1e-4 < relative(xs[-1], golden["steps"][-1]) < 1e-3
    assert relative(xs[-1] * SCHEDULES["steps10.posterior_mean_coef1"][0], golden["steps"][-1]) < 1e-6


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
                                                   ("dpm", 50, 0.012), ("dpm", 200, 0.001)])
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
    for sampler in ("ddim", "dpm"):
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


@EACH
@BOTH
def test_given_frames_stay_bit_for_bit(sampler, prediction):
    model, wanted = Standin(prediction=prediction), request()
    known = torch.randn(2, 4, 4, 3, 4, generator=torch.Generator().manual_seed(5))
    x_mask = torch.tensor([[False, True, True, False], [True] * 4])
    settings = dict(steps=6, sampler=sampler, prediction=prediction, cfg_scale=3.0)
    x = sample_latents(model, **wanted, **settings, known=known, x_mask=x_mask)
    kept = rearrange(~x_mask, "b t -> b 1 t 1 1").expand_as(x)
    assert torch.equal(x[kept], known[kept]) and not (x == known)[~kept].any() and x.isfinite().all()
    for call in model.calls:
        assert torch.equal(call["x"][:2][kept], known[kept]) and torch.equal(call["x_mask"], x_mask.repeat(2, 1))
    free = sample_latents(Standin(prediction=prediction), **request(), **settings)
    torch.testing.assert_close(free[1], x[1])                           # where nothing is given nothing changes


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


def test_references_are_the_first_frames():
    """Also where only one clip of a batch has one, and at another size and aspect ratio."""
    rng = np.random.default_rng(0)
    flat = np.repeat(np.repeat(rng.integers(0, 256, (2, 2, 3, 3), np.uint8), 8, axis=1), 8, axis=2)     # [2 16 24 3]
    model = Standin(gaussian_eps)
    frames = make(["one", "two"], model, references=[None, flat])
    assert (frames[1, :2] == flat).all() and (frames[1, 2:] != flat).any()
    assert model.calls[0]["x_mask"].tolist() == [[True] * 4, [False, False, True, True]] * 2
    np.testing.assert_array_equal(frames[0], make(["one", "two"])[0])
    blue = np.zeros((1, 50, 40, 3), np.uint8) + np.array([10, 20, 200], np.uint8)
    assert (make(references=[blue])[0, 0] == blue[0, 0, 0]).all()


@pytest.mark.parametrize("changes, message", [
    (dict(prompts=[]), "each must say something"),
    (dict(prompts=["a", " "]), "each must say something"),
    (dict(height=15), "16x16 pixels, one patch"),
    (dict(num_frames=0), "1 frame or more"),
    (dict(fps=0), "fps=0: expected more than 0"),
    (dict(references=[None, None]), "2 references for 1 prompts"),
    (dict(references=[np.zeros((4, 8, 8, 3), np.uint8)]), "4 reference frames leave nothing of 4"),
    (dict(steps=0), "steps=0"),
    (dict(sampler="euler"), "sampler='euler'"),
])
def test_mistakes_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


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
    config = configs.Config(model=shape, vae=str(folder / "vae"), text_encoder=str(folder / "text_encoder"), data="",
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
    assert "2 x 8 frames, 2 iddpm steps" in out and "does not know: dog!" in err


def test_command_line_takes_references(checkpoint, tmp_path, monkeypatch, capsys):
    """A .png for two prompts; the frames that come out first are its reconstruction by the autoencoder."""
    red = np.zeros((1, 32, 32, 3), np.uint8) + np.array([200, 30, 30], np.uint8)
    Image.fromarray(red[0]).save(tmp_path / "red.png")
    seen = []
    monkeypatch.setattr(sample, "save", lambda stem, frames, fps: seen.append((frames, fps)))
    common = ("--ckpt", checkpoint, "--steps", 2, "--sampler", "dpm", "--device", "cpu", "--num-frames", 3, "--quirks")
    command(monkeypatch, "--prompt", "one", "two", "--reference", tmp_path / "red.png", "--size", "16x24", "--fps", 12,
            *common)
    vae = load_vae(str(checkpoint / "vae"))
    expected = to_uint8(vae.decode(vae.encode(to_video(resize_crop(torch.from_numpy(red), 16, 24))[None]))[0])[0]
    for frames, fps in seen:
        assert frames.shape == (3, 16, 24, 3) and fps == 12
        assert np.abs(frames[0].astype(int) - expected).max() <= 1


def test_command_line_passes_on_what_it_is_told(checkpoint, monkeypatch):
    told = {}
    monkeypatch.setattr(sample, "generate", lambda *args, **kw: told.update(kw, prompts=args[3]) or [None])
    monkeypatch.setattr(sample, "save", lambda *args: None)
    common = ("--prompt", "a red circle", "--ckpt", checkpoint, "--device", "cpu")
    command(monkeypatch, *common)
    assert told["quirks"] == SampleQuirks() and told["prediction"] == "v" and told["steps"] == 100
    assert told["prompts"] == ["a red circle"] and told["fps"] == 8 and told["references"] == [None]
    command(monkeypatch, *common, "--quirks", "--sampler", "dpm", "--seed", 7, "--cfg-scale", 2, "--fps", 30)
    assert told["quirks"] == SampleQuirks(True, True, True, True) and told["sampler"] == "dpm" and told["steps"] == 20
    assert told["seed"] == 7 and told["cfg_scale"] == 2 and told["fps"] == 30


@pytest.mark.parametrize("args, message", [
    (["--ckpt", "runs/nowhere"], "no checkpoint runs/nowhere: .*config.py.*train.py configs/tiny.py"),
    (["--size", "32"], "--size 32: expected HEIGHTxWIDTH"),
    (["--size", "8x8"], "16x16 pixels, one patch"),
    (["--steps", "0"], "steps=0"),
    (["--num-frames", "0"], "0 frames of 32x32"),
    (["--reference", "nowhere.png"], "nowhere.png: no such file"),
    (["--reference", "a.png", "b.png"], "2 --reference files for 1 prompts"),
])
def test_command_line_mistakes_are_one_line(checkpoint, monkeypatch, capsys, args, message):
    common = ["--prompt", "a red circle", "--device", "cpu", *([] if "--ckpt" in args else ["--ckpt", checkpoint])]
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


def test_default_size_is_the_shortest_trained_video():
    buckets = {"144p": {1: (1.0, 8), 16: (1.0, 2)}, "240p": {16: (0.3, 1), 64: (0.0, None)}}
    assert sample.default_bucket(buckets) == (16, 240, 426)
    assert sample.default_bucket({"32": {1: (1.0, 8)}}) == (1, 32, 32)


def test_slugs_are_file_names():
    assert sample.slug("A red/circle: moves?") == "a-red-circle-moves" and sample.slug("日本") == "prompt"
    assert len(sample.slug("long " * 50)) <= 40
