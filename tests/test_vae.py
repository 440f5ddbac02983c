"""vae.py: the networks against diffusers and transformers called directly; the cache; the small networks it makes."""
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import AutoTokenizer, T5EncoderModel

import vae as vae_module
from configs import Config
from data import BucketSampler, CachedClips, ClipDataset, read_meta, shapes_clip, to_video, write_shapes, write_video
from masks import RECIPE
from model import TINY
from vae import fit_vae, load_text_encoder, load_vae, make_text_encoder, psnr, write_cache

ROOT = Path(__file__).parents[1]
TINY_VAE, TINY_TEXT = str(ROOT / "assets/tiny/vae"), str(ROOT / "assets/tiny/text_encoder")


def square_frames(seed, num_clips):
    """uint8 [T 32 32 3]: the frames of those of the world's first clips that are not wide, end to end."""
    clips = (shapes_clip(seed, i)[0] for i in range(num_clips))
    return np.concatenate([frames for frames in clips if frames.shape[2] == 32])


@pytest.fixture(scope="module")
def vae():
    return load_vae(TINY_VAE)


@pytest.fixture(scope="module")
def video():
    return to_video(square_frames(7, 8))[None]


def test_frames_are_encoded_one_by_one_as_diffusers_does(vae, video):
    net = AutoencoderKL.from_pretrained(TINY_VAE, torch_dtype=torch.float32)
    with torch.no_grad():
        posts = [net.encode(video[:, :, t]).latent_dist for t in range(video.shape[2])]
    mean, std = vae.moments(video)
    torch.testing.assert_close(mean, torch.stack([p.mean for p in posts], 2) * vae.scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std, torch.stack([p.std for p in posts], 2) * vae.scale, rtol=1e-4, atol=1e-5)
    assert vae.down == 8 and mean.shape == (1, vae.channels, video.shape[2], 4, 4)


def test_micro_batches_change_nothing(vae, video, monkeypatch):
    z = vae.encode(video)
    again = vae.decode(z)
    monkeypatch.setattr(vae_module, "FRAMES_AT_ONCE", 3)
    torch.testing.assert_close(vae.encode(video), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(z), again, rtol=1e-4, atol=1e-4)


def test_a_generator_draws_from_the_posterior(vae, video):
    mean, std = vae.moments(video)
    draws = torch.stack([vae.encode(video, torch.Generator().manual_seed(i)) for i in range(200)])
    assert not torch.equal(draws[0], draws[1])
    assert ((draws - mean) / std).std().item() == pytest.approx(1, abs=0.02)


def test_shipped_vae_reconstructs_clips_it_never_saw(vae):
    """A viewer, and tests/reader.py, need about 30 dB.  It was fitted on H.264: colours softer at edges than these."""
    videos = (to_video(shapes_clip(99, i)[0])[None] for i in range(30))
    quality = [psnr(vae.decode(vae.encode(v)), v) for v in videos]
    assert np.median(quality) > 31 and min(quality) > 28


def test_sizes_are_floored_to_cells(vae):
    assert vae.encode(torch.zeros(1, 3, 1, 42, 55)).shape[-2:] == (5, 6)      # as upstream's 426 pixels are 53 cells


def test_wrong_shape_and_missing_folder(vae, tmp_path):
    with pytest.raises(ValueError, match=r"video must be \[B 3 T H W\], got \[1, 4, 2, 8, 8\]"):
        vae.encode(torch.zeros(1, 4, 2, 8, 8))
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        load_vae(str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        load_text_encoder(str(tmp_path / "none"), 8)


# ---- text ----

def test_captions_are_encoded_as_transformers_does():
    captions = ["a red circle moves right", "a cyan square"]
    y, y_mask = load_text_encoder(TINY_TEXT, 16)(captions)
    net = T5EncoderModel.from_pretrained(TINY_TEXT, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY_TEXT)
    assert y.shape == (2, 16, 64) and y_mask.sum(1).tolist() == [6, 4]        # words and </s>
    for row, mask, caption in zip(y, y_mask, captions):                       # padding does not reach the tokens
        with torch.no_grad():
            alone = net(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(row[mask], alone, rtol=1e-4, atol=1e-5)


def test_unknown_words_are_named():
    assert load_text_encoder(TINY_TEXT, 16).unknown("a red dog moves sideways") == ["dog", "sideways"]


def test_a_word_is_nearly_the_same_in_any_caption(tmp_path):
    make_text_encoder(["a red circle moves right", "a blue square"], tmp_path)
    y, _ = load_text_encoder(tmp_path, 8)(["a red circle moves right", "a red square"])
    like = torch.nn.functional.cosine_similarity(y[0, :, None], y[1, None], dim=-1)
    assert like[1, 1] > 0.9 and like[2, 2] < 0.5                              # red, red; circle, square


# ---- the small VAE and the cache ----

def test_fit_vae_learns(tmp_path):
    frames = torch.from_numpy(square_frames(0, 40))
    early, late = (fit_vae([frames], steps=n, batch=16, widths=(8, 8, 8, 16)) for n in (2, 60))
    late.save_pretrained(tmp_path)
    video, loaded = to_video(frames[:16])[None], load_vae(str(tmp_path))
    images = video[0].transpose(0, 1)                                         # [N 3 H W]
    assert psnr(loaded.decode(loaded.encode(video)), video) > psnr(early(images).sample, images) + 3
    assert loaded.encode(video).std().item() == pytest.approx(1, abs=0.3)


@pytest.fixture
def world(tmp_path):
    write_shapes(tmp_path / "clips", 24)
    config = Config(model=TINY, vae=TINY_VAE, text_encoder=TINY_TEXT, data=str(tmp_path / "clips/meta.csv"),
                    buckets={"32": {1: (1.0, 2), 8: (1.0, 2), 16: (1.0, 1)}}, cache=str(tmp_path / "cache"),
                    mask_ratios=RECIPE, lr=1e-3, steps=1, out="-")
    return config, lambda: BucketSampler(read_meta(config.data), config.buckets)


def test_cache_holds_what_the_networks_give(world, vae):
    config, make = world
    sampler, text_encoder = make(), load_text_encoder(TINY_TEXT, 16)
    cached = CachedClips(sampler, write_cache(config, sampler, vae, text_encoder))
    plain = ClipDataset(sampler)
    for step in range(6):
        ours, theirs = cached[step], plain[step]
        mean, std = vae.moments(theirs["video"])
        y, y_mask = text_encoder(theirs["text"])
        torch.testing.assert_close(ours["mean"], mean, rtol=1e-2, atol=1e-2)  # kept in bf16
        torch.testing.assert_close(ours["std"], std, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(ours["y"] * y_mask[..., None], y * y_mask[..., None], rtol=1e-2, atol=1e-2)
        assert torch.equal(ours["y_mask"], y_mask)
        for name in ("height", "width", "num_frames", "fps", "ar", "slots"):
            assert torch.equal(ours[name], theirs[name]), name


def test_cache_is_written_once_and_never_stale(world, vae):
    config, make = world
    text_encoder = load_text_encoder(TINY_TEXT, 16)
    files = write_cache(config, make(), vae, text_encoder)
    times = {file: file.stat().st_mtime_ns for file in files.values()}
    assert write_cache(config, make(), vae, text_encoder) == files
    assert times == {file: file.stat().st_mtime_ns for file in files.values()}
    other = load_vae(TINY_VAE)
    other.net.encoder.conv_in.weight.add_(0.01)
    changed = write_cache(config, make(), other, text_encoder)
    assert changed["text"] == files["text"] and not set(changed.values()) - {changed["text"]} & set(files.values())


def test_cache_notices_that_clips_were_rendered_anew(world, vae):
    config, make = world
    text_encoder = load_text_encoder(TINY_TEXT, 16)
    files = write_cache(config, make(), vae, text_encoder)
    write_shapes(Path(config.data).parent, 24, seed=1)
    assert not set(write_cache(config, make(), vae, text_encoder).values()) & set(files.values())


def test_unreadable_clips_are_replaced(world, vae, capfd):
    config, make = world
    sampler = make()
    victim = next(path for path, frames in zip(sampler.meta.paths, sampler.meta.num_frames) if frames == 8)
    Path(victim).write_bytes(b"")
    cached = CachedClips(sampler, write_cache(config, sampler, vae, load_text_encoder(TINY_TEXT, 16)))
    assert victim in capfd.readouterr().err
    steps = sampler.locate(0)[0] + len(sampler.epoch(0)[0])
    assert all(len(cached[step]["mean"]) == sampler.batch_size(cached[step]["bucket"]) for step in range(steps))


# ---- as a script ----

def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["vae.py", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        vae_module.main()
        sys.exit(0)
    return ended.value.code, capsys.readouterr()


def test_reconstructs_a_clip(tmp_path, monkeypatch, capsys):
    write_video(tmp_path / "clip.mp4", shapes_clip(3, 0)[0], 8)
    code, said = run(monkeypatch, capsys, tmp_path / "clip.mp4", "--vae", TINY_VAE, "--out", tmp_path / "pair.png")
    assert code == 0 and float(said.out.split("PSNR ")[1].split()[0]) > 30 and (tmp_path / "pair.png").is_file()


def test_makes_a_text_encoder(tmp_path, monkeypatch, capsys):
    write_shapes(tmp_path, 8)
    assert run(monkeypatch, capsys, "text", tmp_path / "meta.csv", "--out", tmp_path / "t5")[0] == 0
    assert load_text_encoder(str(tmp_path / "t5"), 8)(["a thing"])[0].shape == (1, 8, 64)


def test_errors_are_one_line(tmp_path, monkeypatch, capsys):
    for args, said in (((tmp_path / "no.mp4",), "no such file"), (("train",), "needs a meta.csv and --out"),
                       (("train", tmp_path / "meta.csv", "--out", tmp_path), "python data.py shapes")):
        code, output = run(monkeypatch, capsys, *args)
        assert code == 2 and said in output.err.splitlines()[-1]
