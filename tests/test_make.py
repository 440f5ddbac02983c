"""Tests assets/tiny/make.py: the small autoencoder and text encoder that stand in for Stable Diffusion's and T5."""
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from assets.shapes import shapes_clip, write_shapes
from assets.tiny.make import fit_vae, make_text_encoder
from data import to_video
from vae import load_text_encoder, load_vae, psnr

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Returns the meta.csv of a folder of 6 clips of the shapes world."""
    folder = tmp_path_factory.mktemp("clips")
    write_shapes(folder, 6)
    return folder / "meta.csv"


# ---------------------------------------------------------------- the autoencoder

def square_frames(num_clips):
    """Returns the frames uint8 [N 64 64 3] of those of the first clips that are not wide."""
    clips = [shapes_clip(0, index)[0] for index in range(num_clips)]
    return torch.from_numpy(np.concatenate([frames for frames in clips if frames.shape[2] == 64]))


def test_a_fitted_vae_learns_and_scales_its_latents(tmp_path):
    frames = square_frames(12)
    early = fit_vae([frames], steps=2, batch=8, widths=(8, 8))
    late = fit_vae([frames], steps=40, batch=8, widths=(8, 8))
    video = to_video(frames[:16])[None]
    quality = []
    for name, net in (("early", early), ("late", late)):
        net.save_pretrained(tmp_path / name)
        vae = load_vae(str(tmp_path / name))
        z = vae.encode(video)
        quality.append(psnr(vae.decode(z), video))
    assert quality[1] > quality[0] + 2
    assert z.std().item() == pytest.approx(1, abs=0.3)


# ---------------------------------------------------------------- the text encoder

def test_a_word_is_nearly_the_same_in_any_caption(tmp_path):
    make_text_encoder(["a red circle moves right", "a blue square"], tmp_path)
    y, y_mask = load_text_encoder(tmp_path, 8)(["a red circle moves right", "a red square"])
    assert y.shape == (2, 8, 64)
    assert y_mask.sum(1).tolist() == [6, 4]
    similarity = torch.nn.functional.cosine_similarity(y[0, :, None], y[1, None], dim=-1)
    assert similarity[1, 1] > 0.9       # red and red
    assert similarity[2, 2] < 0.5       # circle and square


# ---------------------------------------------------------------- the command line

def weights(folder):
    """Returns a network's weights as bytes."""
    (file,) = Path(folder).glob("*.safetensors")
    return file.read_bytes()


def test_the_script_makes_a_text_encoder_of_a_seed(run_script, clips, tmp_path):
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        assert run_script("assets.tiny.make", "text", clips, "--out", tmp_path / name, f"--seed={seed}").status == 0
    assert weights(tmp_path / "one") == weights(tmp_path / "again") != weights(tmp_path / "other")
    captions = [line.split(",")[1] for line in clips.read_text().splitlines()[1:]]
    encoder = load_text_encoder(str(tmp_path / "one"), 8)
    assert all(encoder.unknown(caption) == [] for caption in captions)
    assert encoder.unknown("a dog") == ["dog"]


def test_the_script_fits_a_vae(run_script, clips, tmp_path):
    """Takes one step on the first three clips of a list, of which the first is missing, as is the last of the list."""
    listed = clips.with_name("one_missing.csv")
    header, *rows = clips.read_text().splitlines()
    listed.write_text("\n".join([header, "first.mp4,a thing,8,64,64,8", *rows, "last.mp4,a thing,8,64,64,8"]))
    ended = run_script("assets.tiny.make", "vae", listed, "--out", tmp_path, "--steps=1", "--batch=2", "--num-clips=3")
    assert ended.status == 0
    assert "first.mp4" in ended.err and "last.mp4" not in ended.err
    vae = load_vae(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert vae.scale == config["scaling_factor"] != 0.18215             # diffusers' default
    assert vae.down == 8


@pytest.mark.parametrize("args, message", [
    (("text",), "META"),
    (("trian", "meta.csv", "--out=x"), "trian"),
    (("text", "meta.csv"), "--out"),
    (("text", "nowhere.csv", "--out=x"), "nowhere.csv"),
    (("vae", "meta.csv", "--out=x", "--stps=3"), "--stps"),
    (("vae", "meta.csv", "--out=x", "--batch=0"), "--batch.*'0'"),
    (("vae", "gone.csv", "--out=x"), "gone.csv.*could be read"),
])
def test_a_mistake_is_named(run_script, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (32, 32)).save("still.png")
    Path("meta.csv").write_text("path,text,num_frames,height,width,fps\nstill.png,a thing,1,32,32,120\n")
    Path("gone.csv").write_text("path,text,num_frames,height,width,fps\ngone.png,a thing,1,32,32,120\n")
    ended = run_script("assets.tiny.make", *args)
    assert ended.status == 2
    assert re.search(message, ended.err)
    assert not Path("x").exists()


@pytest.mark.slow
def test_the_file_is_a_script(clips, tmp_path):
    command = [sys.executable, "-m", "assets.tiny.make", "text", clips, "--out", tmp_path]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    assert load_text_encoder(str(tmp_path), 8)(["a thing"])[0].shape == (1, 8, 64)
