"""Tests vae.py: the networks against diffusers and transformers, cleaned captions, and the cache of both networks."""
import copy
import csv
import gc
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, T5Config, T5EncoderModel

import vae as vae_module
from assets.shapes import shapes_clip
from assets.tiny.make import make_text_encoder
from configs import Config, dump
from data import (BucketSampler, ClipDataset, UnreadableClip, batches, bucket_list, reachable, read_meta, to_video,
                  window_number, write_video)
from masks import RECIPE
from model import TINY
from vae import clean_caption, load_text_encoder, load_tokenizer, load_vae, psnr, remember, write_cache

ROOT = Path(__file__).parents[1]
TINY_VAE = str(ROOT / "assets/tiny/vae")
TINY_TEXT = str(ROOT / "assets/tiny/text_encoder")


@pytest.fixture(scope="module")
def vae():
    return load_vae(TINY_VAE)


@pytest.fixture(scope="module")
def text_encoder():
    return load_text_encoder(TINY_TEXT, 16)


@pytest.fixture(scope="module")
def video():
    """Returns two different clips of two frames, [2 3 2 32 48]."""
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 2, 4, 6, 3), np.uint8))
    return to_video(frames.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3))


# ---------------------------------------------------------------- pixels and latents

@pytest.mark.parametrize("patch", [1, 4])
def test_frames_are_encoded_and_decoded_one_by_one_as_diffusers_does(video, tmp_path, patch):
    """Stable Diffusion's network takes pixels, the shipped one patches of 4 x 4 pixels as channels."""
    folder = TINY_VAE
    if patch == 1:
        folder = str(tmp_path)
        AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                      block_out_channels=(8,) * 4, norm_num_groups=4).save_pretrained(folder)
    vae = load_vae(folder)
    net = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    scale = net.config.scaling_factor
    mean, std = vae.moments(video)
    assert mean.shape == std.shape == (2, vae.channels, 2, 4, 6)
    assert vae.down == 8
    decoded = vae.decode(mean)
    assert decoded.shape == video.shape
    with torch.no_grad():
        for t in range(2):
            patches = rearrange(video[:, :, t], "b c (h p) (w q) -> b (c p q) h w", p=patch, q=patch)
            posterior = net.encode(patches).latent_dist
            torch.testing.assert_close(mean[:, :, t], posterior.mean * scale, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(std[:, :, t], posterior.std * scale, rtol=1e-4, atol=1e-5)
            expected = rearrange(net.decode(posterior.mean).sample.clamp(-1, 1), "b (c p q) h w -> b c (h p) (w q)",
                                 p=patch, q=patch)
            torch.testing.assert_close(decoded[:, :, t], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(vae.encode(video), mean)


def test_frames_in_small_groups_give_the_same(vae, video, monkeypatch):
    z = vae.encode(video)
    decoded = vae.decode(z)
    monkeypatch.setattr(vae_module, "PIXELS_AT_ONCE", 3 * 32 * 48)      # three of the four frames
    torch.testing.assert_close(vae.encode(video), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(z), decoded, rtol=1e-4, atol=1e-4)


def test_the_shipped_vae_reconstructs_clips_that_it_never_saw(vae):
    """Viewers, and tests/reader.py, need about 30 dB."""
    for index in range(4):
        video = to_video(shapes_clip(99, index)[0])[None, :, :4]
        assert psnr(vae.decode(vae.encode(video)), video) > 28


def test_psnr_is_that_of_its_definition():
    """Values in -1..1 have a range of 2, so that an error of 0.2 everywhere is 20 dB."""
    assert psnr(torch.zeros(5), torch.full((5,), 0.2)) == pytest.approx(20, abs=1e-4)


def test_sizes_are_floored_to_latent_cells(vae):
    assert vae.encode(torch.zeros(1, 3, 1, 42, 55)).shape[-2:] == (5, 6)


def test_a_wrong_shape_or_a_missing_folder_is_named(vae, tmp_path):
    with pytest.raises(ValueError, match=r"video.*\[1, 4, 2, 8, 8\]"):
        vae.encode(torch.zeros(1, 4, 2, 8, 8))
    missing = str(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=f"AutoencoderKL.*{missing}"):
        load_vae(missing)
    with pytest.raises(FileNotFoundError, match=f"T5EncoderModel.*{missing}"):
        load_text_encoder(missing, 8)


# ---------------------------------------------------------------- captions and embeddings

def test_captions_are_encoded_as_transformers_does(text_encoder):
    captions = ["a red circle moves right", "a cyan square"]
    y, y_mask = text_encoder(captions)
    net = T5EncoderModel.from_pretrained(TINY_TEXT, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY_TEXT)
    assert y.shape == (2, 16, 64)
    assert y_mask.sum(1).tolist() == [6, 4]                             # words and </s>
    for row, mask, caption in zip(y, y_mask, captions):
        with torch.no_grad():                                           # alone, so without padding
            expected = net(**tokenizer(caption, return_tensors="pt")).last_hidden_state[0]
        torch.testing.assert_close(row[mask], expected, rtol=1e-4, atol=1e-5)


def test_unknown_words_are_named(capsys):
    encoder = load_text_encoder(TINY_TEXT, 16)
    assert encoder.unknown("a red dog moves sideways") == ["dog", "sideways"]
    encoder(["a red dog moves sideways", "a red circle"])
    assert re.search("warning: .*text_encoder does not know: dog, sideways$", capsys.readouterr().err.strip())


def test_warnings_of_captions_end(capsys):
    """A data set of another language would have one for each of its captions."""
    encoder = load_text_encoder(TINY_TEXT, 16)
    for i in range(200):
        encoder([f"a dog{i}"])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == vae_module.MAX_WARNINGS + 1
    assert "no more are shown" in lines[-1]


def test_captions_that_are_cut_are_counted():
    encoder = load_text_encoder(TINY_TEXT, 6)
    y, y_mask = encoder(["a red circle", "a red circle moves right", "a red circle moves right and left"])
    assert y_mask.sum(1).tolist() == [4, 6, 6]
    assert encoder.num_cut == 1
    assert encoder.lengths(["a red circle", "a red circle moves right and left"]) == [4, 8]


def test_captions_are_cleaned_as_open_sora_cleans_them():
    """Open-Sora cleans twice where the second pass finds something that the first laid bare."""
    pairs = json.loads((ROOT / "tests/golden/e_clean_caption.json").read_text())["rows"]
    assert len(pairs) == 29
    expected = [pair.get("twice", pair["once"]) for pair in pairs]
    assert [clean_caption(pair["inp"]) for pair in pairs] == expected


def test_captions_with_the_marks_of_two_packages_are_cleaned_as_with_these():
    """The pairs were made by the cleaner with ftfy 6.2.0 and bs4 4.12.3, which the code does without."""
    pairs = json.loads((ROOT / "tests/golden/e_clean_caption_more.json").read_text())["rows"]
    assert len(pairs) > 100
    assert [clean_caption(pair["inp"]) for pair in pairs] == [pair["twice"] for pair in pairs]


@pytest.mark.parametrize("text, expected", [
    ("a #123 and #12345 but #1234", "a and but 1234"),
    ("1girl in h264, mp4", "1girl in"),
    ("a dog, ", "a dog"),
    ("a red circle moves right, then it stops. it's 3.5 m wide: a well-known one!", None),
])
def test_other_captions_are_cleaned_as_open_sora_was_seen_to(text, expected):
    assert clean_caption(text) == (text if expected is None else expected)


def test_a_text_encoder_cleans_captions_when_asked(text_encoder):
    clean = load_text_encoder(TINY_TEXT, 16, clean=True)
    messy = "A (red)/(circle)"
    for ours, expected in zip(clean([messy]), text_encoder(["a red circle"])):
        assert torch.equal(ours, expected)
    assert not torch.equal(text_encoder([messy])[0], clean([messy])[0])
    assert clean.unknown(messy) == []
    assert clean.lengths([messy]) == [4] and text_encoder.lengths([messy]) == [3]


T5_JSON = ROOT.parent / "shared/models/t5_tokenizer/tokenizer.json"


@pytest.fixture
def small_t5(tmp_path):
    """Returns the folder of a small network with the vocabulary of T5's and, as DeepFloyd's, no tokenizer.json."""
    config = T5Config(vocab_size=32128, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    (tmp_path / "t5" / "spiece.model").write_bytes(b"SentencePiece's file, which is not read")
    return tmp_path / "t5"


def pretend_the_hub_has(file, monkeypatch):
    """Makes downloads of google-t5/t5-base's tokenizer.json return a file, and all others fail."""
    def download(name, wanted):
        if file and (name, wanted) == ("google-t5/t5-base", "tokenizer.json"):
            return str(file)
        raise OSError("no connection")
    monkeypatch.setattr(vae_module, "hf_hub_download", download)


def make_t5_tokenizer(path):
    """Writes a tokenizer.json with T5's special tokens and some words."""
    make_text_encoder(["a", "red", "circle"], path.parent / "made")
    shutil.copy(path.parent / "made" / "tokenizer.json", path)
    return path


def test_a_network_with_t5s_vocabulary_gets_t5s_tokenizer(small_t5, tmp_path, monkeypatch, capsys):
    """So the published weights need no flag; the user learns of it."""
    pretend_the_hub_has(make_t5_tokenizer(tmp_path / "tokenizer.json"), monkeypatch)
    encoder = load_text_encoder(str(small_t5), 8)
    assert "google-t5/t5-base" in capsys.readouterr().err
    y, y_mask = encoder(["a red circle", "a"])
    assert y.shape == (2, 8, 8)
    assert y_mask.sum(1).tolist() == [4, 2]


def test_where_t5s_tokenizer_cannot_be_had_its_place_is_named(small_t5, monkeypatch):
    pretend_the_hub_has(None, monkeypatch)
    with pytest.raises(FileNotFoundError, match=f"tokenizer.json.*google-t5/t5-base.*{small_t5}"):
        load_text_encoder(str(small_t5), 8)


@pytest.mark.skipif(not T5_JSON.is_file(), reason="needs T5's tokenizer.json")
def test_t5s_own_tokenizer(small_t5):
    """Its tokenizer.json alone does not say which tokens are padding and end."""
    shutil.copy(T5_JSON, small_t5)
    encoder = load_text_encoder(str(small_t5), 8)
    assert len(encoder.tokenizer) == 32100
    tokens = encoder.tokenizer("a red circle", padding="max_length", max_length=6)
    assert tokens.input_ids == [3, 9, 1131, 8196, 1, 0]
    assert tokens.attention_mask == [1, 1, 1, 1, 1, 0]
    assert encoder.lengths(["red dog"]) == [3]
    assert encoder.unknown("a 漢 dog") == ["漢"]


@pytest.mark.parametrize("content, named", [
    (b"{", "cannot be read as a tokenizer"),
    (b"", "cannot be read as a tokenizer"),
    (b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}', "no entry </s>"),
])
def test_a_tokenizer_json_that_is_none_is_named(tmp_path, content, named):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"tokenizer.json.*{named}"):
        load_tokenizer(str(tmp_path), 100)


def test_remembered_captions_need_no_network():
    """The 9 GiB of T5-XXL are free again before the video model is loaded."""
    encoder = load_text_encoder(TINY_TEXT, 16)
    captions = ["a red circle moves right", "a blue square"]
    expected = [encoder([caption]) for caption in captions]
    net = weakref.ref(encoder.net)
    given = [encoder]
    del encoder
    remembered = remember(given.pop, [*captions, captions[0]])
    gc.collect()
    assert net() is None
    y, y_mask = remembered([captions[1], captions[0]])
    for i, (y_alone, mask_alone) in enumerate(reversed(expected)):
        assert torch.equal(y_mask[i], mask_alone[0])
        assert torch.equal(y[i][y_mask[i]], y_alone[0][y_mask[i]])
        assert not y[i][~y_mask[i]].any()


def test_embeddings_are_kept_in_a_folder(text_encoder, tmp_path):
    num_loaded = 0

    def load():
        nonlocal num_loaded
        num_loaded += 1
        return text_encoder

    first = remember(load, ["a red circle"], tmp_path / "texts", "key")(["a red circle"])
    again = remember(load, ["a red circle"], tmp_path / "texts", "key")(["a red circle"])
    assert num_loaded == 1
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    remember(load, ["a red circle"], tmp_path / "texts", "another key")
    remember(load, ["a red circle", "a blue square"], tmp_path / "texts", "key")
    assert num_loaded == 3


def test_a_kept_embedding_that_is_damaged_is_made_again(text_encoder, tmp_path):
    expected, _ = remember(lambda: text_encoder, ["a red circle"], tmp_path)(["a red circle"])
    (file,) = tmp_path.rglob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:50])
    y, _ = remember(lambda: text_encoder, ["a red circle"], tmp_path)(["a red circle"])
    assert torch.equal(y, expected)
    assert file.read_bytes() == whole


# ---------------------------------------------------------------- nothing that a library makes up

def without(folder, source, part):
    """Returns a copy of a network's folder in which a part is missing or damaged."""
    shutil.copytree(source, folder)
    (weights,) = folder.glob("*.safetensors")
    if part == "a file cut short":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif part == "no weights":
        weights.unlink()
    elif (folder / part).is_file():
        (folder / part).unlink()
    else:
        tensors = load_file(weights)
        del tensors[part]
        save_file(tensors, weights, {"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("part, named", [
    ("tokenizer.json", "tokenizer.json"),
    ("config.json", "T5EncoderModel"),
    ("no weights", "T5EncoderModel"),
    ("a file cut short", "T5EncoderModel"),
    ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "encoder.block.0.layer.1.DenseReluDense.wi.weight"),
    ("shared.weight", "embed_tokens.weight"),           # another name of the same tensor
])
def test_a_text_encoder_that_is_not_whole_is_refused(tmp_path, part, named):
    """Otherwise every word is unknown, or its weights are random numbers, and training would end well."""
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(named)):
        load_text_encoder(without(tmp_path / "t5", TINY_TEXT, part), 16)


@pytest.mark.parametrize("part, named", [
    ("config.json", "AutoencoderKL"),
    ("no weights", "AutoencoderKL"),
    ("a file cut short", "AutoencoderKL"),
    ("decoder.conv_out.weight", "decoder.conv_out.weight"),
    ("encoder.conv_in.bias", "encoder.conv_in.bias"),
])
def test_a_vae_that_is_not_whole_is_refused(tmp_path, part, named):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(named)):
        load_vae(without(tmp_path / "vae", TINY_VAE, part))


def test_a_tokenizer_of_another_network_is_refused(tmp_path):
    folder = without(tmp_path / "t5", TINY_TEXT, "tokenizer.json")
    make_text_encoder([f"word{i}" for i in range(60)], tmp_path / "other")
    shutil.copy(tmp_path / "other" / "tokenizer.json", folder)
    with pytest.raises(ValueError, match="64 entries.* 19"):
        load_text_encoder(folder, 16)


@pytest.mark.parametrize("script, arguments", [
    ("sample", ["--prompt=a red circle", "--steps=1", "--sampler=ddim", "--text-encoder="]),
    ("train", ["configs/tiny.py", "--text_encoder="]),
    ("vae", ["cache", "configs/tiny.py", "--text_encoder="]),
])
def test_scripts_refuse_a_text_encoder_without_its_tokenizer(clips, tmp_path, run_script, script, arguments):
    folder = without(tmp_path / "t5", TINY_TEXT, "tokenizer.json")
    arguments = [*arguments[:-1], arguments[-1] + folder, f"--out={tmp_path / 'out'}"]
    if script != "sample":
        arguments += [f"--data={clips / 'meta.csv'}", f"--cache={tmp_path / 'cache'}",
                      "--buckets={'64': {8: (1.0, 1)}}"]
    ended = run_script(script, *arguments)
    assert ended.status == 2
    assert "error: " in ended.err and "tokenizer.json" in ended.err


# ---------------------------------------------------------------- the cache

@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Returns a folder of a still, three clips of 8 frames, one of 16, and a larger one of twice the frame rate.

    A frame's colours say which clip and which moment it is from."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    rows = []

    def add(name, caption, T, H, W, fps):
        blocks = rng.integers(0, 256, (T, H // 16, W // 16, 3), np.uint8)
        frames = blocks.repeat(16, axis=1).repeat(16, axis=2)
        if name.endswith(".png"):
            Image.fromarray(frames[0]).save(folder / name)
        else:
            write_video(folder / name, frames, fps)
        rows.append((name, caption, T, H, W, fps))

    add("still.png", "a red circle", 1, 64, 64, 120)
    add("short0.mp4", "a red circle moves right", 8, 64, 64, 8)
    add("short1.mp4", "a blue square moves left", 8, 64, 64, 8)
    add("short2.mp4", "a red circle moves right", 8, 64, 96, 8)
    add("long.mp4", "a cyan square moves up", 16, 64, 64, 8)
    add("large.mp4", "a green triangle moves right and up", 18, 144, 256, 16)
    with open(folder / "meta.csv", "w", newline="") as f:
        csv.writer(f).writerows([("path", "text", "num_frames", "height", "width", "fps"), *rows])
    return folder


def config_of(clips, folder):
    """Returns a config of a folder of clips whose cache is in folder."""
    return Config(model=TINY, vae=TINY_VAE, text_encoder=TINY_TEXT, data=str(clips / "meta.csv"),
                  buckets={"144p": {8: (0.5, 1)}, "64": {1: (1.0, 2), 8: (1.0, 2)}}, windows=2, num_workers=0,
                  cache=str(folder / "cache"), mask_ratios=RECIPE, lr=1e-3, steps=1, dtype="fp32",
                  out="-")


@pytest.fixture
def config(clips, tmp_path):
    """Returns a config of clips of its own."""
    shutil.copytree(clips, tmp_path / "clips")
    return config_of(tmp_path / "clips", tmp_path)


@pytest.fixture
def small(config):
    """Returns a config of clips of its own with one bucket, that of 64 x 64 pixels and 8 frames."""
    meta = Path(config.data)
    lines = meta.read_text().splitlines()
    meta.write_text("\n".join(line for line in lines if not line.startswith(("still", "short2", "large"))))
    return replace(config, buckets={"64": {8: (1.0, 2)}})


@pytest.fixture
def write(vae, text_encoder):
    """Returns a function that writes the cache of a config with the tiny networks and returns a reader of it."""
    def write(config, vae=vae, text_encoder=text_encoder):
        return write_cache(read_meta(config.data), config, vae, text_encoder)
    return write


@pytest.fixture(scope="module")
def written(clips, tmp_path_factory, vae, text_encoder):
    """Returns a config and a reader of its cache, which tests share and do not change."""
    config = config_of(clips, tmp_path_factory.mktemp("written"))
    return config, write_cache(read_meta(config.data), config, vae, text_encoder)


def saved_files(config):
    """Returns {path within the cache: (time of change, bytes)} of its files of latents and captions."""
    folder = Path(config.cache)
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "bad_clips.csv"]
    return {str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def contents(config):
    return {name: data for name, (_, data) in saved_files(config).items()}


def clips_in_buckets(config):
    """Returns (clip, bucket) of everything that the cache has to hold."""
    buckets = bucket_list(config.buckets)
    pairs = []
    for number, clips in reachable(read_meta(config.data), config).items():
        pairs += [(int(clip), buckets[number]) for clip in clips]
    return pairs


def encode_clip(config, vae, text_encoder, clip, bucket, step, slot):
    """Returns what a cache has to give, encoded from the clip's file."""
    item = ClipDataset(read_meta(config.data), config).read(clip, bucket, step, slot)
    mean, std = vae.moments(to_video(item["video"])[None])
    y, y_mask = text_encoder([item["text"]])
    return {"mean": mean[0], "std": std[0], "y": y[0] * y_mask[0][:, None], "y_mask": y_mask[0]}


def assert_same(cached, expected):
    for name, value in expected.items():
        torch.testing.assert_close(cached[name], value, rtol=1e-5, atol=1e-5)


def test_training_reads_the_same_from_the_cache_as_from_the_clips(written, vae, text_encoder):
    """Reads every clip in every bucket that it can reach, at both of its windows."""
    config, cached = written
    pairs = clips_in_buckets(config)
    assert len(pairs) == 7              # the larger clip is in two buckets
    for clip, bucket in pairs:
        slots = {window_number(config, bucket, 7, slot): slot for slot in range(20)}
        assert len(slots) == (1 if bucket.num_frames == 1 else 2)
        for slot in slots.values():
            expected = encode_clip(config, vae, text_encoder, clip, bucket, 7, slot)
            assert_same(cached.read(clip, bucket, 7, slot), expected)


def test_the_windows_of_a_long_clip_differ(written):
    config, cached = written
    (clip,) = [clip for clip in range(6) if cached.meta.path(clip).endswith("long.mp4")]
    bucket = next(bucket for other, bucket in clips_in_buckets(config) if other == clip)
    windows = [window_number(config, bucket, 7, slot) for slot in range(6)]
    assert set(windows) == {0, 1}
    means = [cached.read(clip, bucket, 7, slot)["mean"] for slot in range(6)]
    for window, mean in zip(windows, means):
        assert torch.equal(mean, means[0]) == (window == windows[0])


def test_a_reader_can_be_sent_to_other_processes(written):
    """Its pickle holds neither rows nor latents, and a read leaves no file open."""
    config, cached = written
    assert len(pickle.dumps(cached)) < len(pickle.dumps((cached.meta, config))) + 1000
    again = pickle.loads(pickle.dumps(cached))
    clip, bucket = clips_in_buckets(config)[0]
    num_open = len(os.listdir("/proc/self/fd"))
    assert_same(again.read(clip, bucket, 0, 0), cached.read(clip, bucket, 0, 0))
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_the_cache_in_bf16_is_that_of_networks_in_bf16(small, write):
    write(small)
    in_fp32 = saved_files(small)
    half = replace(small, dtype="bf16")
    vae = load_vae(TINY_VAE, torch.bfloat16)
    text_encoder = load_text_encoder(TINY_TEXT, 16, torch.bfloat16)
    cached = write(half, vae, text_encoder)
    both = saved_files(half)
    new = [data for name, (_, data) in both.items() if name not in in_fp32]
    old = [data for _, data in in_fp32.values()]
    assert sum(map(len, new)) == pytest.approx(sum(map(len, old)) / 2, rel=0.05)
    clip, bucket = clips_in_buckets(half)[0]
    ours = cached.read(clip, bucket, 0, 0)
    expected = encode_clip(half, vae, text_encoder, clip, bucket, 0, 0)
    for name in ("mean", "std", "y"):
        assert ours[name].dtype == torch.float32
        torch.testing.assert_close(ours[name], expected[name], rtol=0.01, atol=1e-3)


# What changes, and which files are then written besides those that are there.
CHANGES = [
    ("nothing", set()),
    ("other batch, seed and buckets", {"latents"}),
    ("caption", {"captions"}),
    ("clip's time", {"latents"}),
    ("clip's size", {"latents"}),
    ("clip's fps", set()),
    ("windows", {"latents"}),
    ("frame_interval", {"latents"}),
    ("vae", {"latents"}),
    ("scale of the vae", {"latents"}),
    ("text encoder", {"captions"}),
    ("tokenizer", {"captions"}),
    ("max_length", {"captions"}),
    ("cleaning", {"captions"}),
    ("holdout", set()),
    ("other csv of the clips", {"latents"}),
    ("file elsewhere", set()),
]


@pytest.mark.parametrize("change, kinds", CHANGES, ids=[row[0] for row in CHANGES])
def test_only_what_depends_on_a_change_is_written_again(small, write, vae, text_encoder, change, kinds):
    write(small)
    before = saved_files(small)
    meta = Path(small.data)
    clip = meta.with_name("short0.mp4")
    time_of_change = clip.stat().st_mtime_ns
    config = small
    if change == "other batch, seed and buckets":
        config = replace(config, buckets={"64": {8: (0.7, 1), 16: (0.5, 1)}}, seed=3)
    elif change == "caption":
        meta.write_text(meta.read_text().replace("a red circle moves right", "a red circle moves left"))
    elif change == "clip's time":
        os.utime(clip, ns=(time_of_change, time_of_change + 10**9))
    elif change == "clip's size":
        clip.write_bytes(clip.read_bytes() + bytes(8))
        os.utime(clip, ns=(time_of_change, time_of_change))
    elif change == "clip's fps":        # which the network is conditioned on, but windows do not depend on
        meta.write_text(meta.read_text().replace(",16,64,64,8", ",16,64,64,16"))
    elif change == "windows":
        config = replace(config, windows=3)
    elif change == "frame_interval":
        config = replace(config, frame_interval=2)
        meta.write_text(meta.read_text().replace(",8,64,64,8", ",16,64,64,8"))
    elif change == "vae":
        vae = copy.deepcopy(vae)
        vae.net.encoder.conv_in.weight.add_(0.01)
    elif change == "scale of the vae":
        vae = copy.copy(vae)
        vae.scale *= 2
    elif change == "text encoder":
        text_encoder = copy.deepcopy(text_encoder)
        text_encoder.net.shared.weight.add_(0.01)
    elif change == "tokenizer":
        text_encoder = copy.deepcopy(text_encoder)
        text_encoder.tokenizer.add_tokens(["sideways"])
    elif change == "max_length":
        text_encoder = load_text_encoder(TINY_TEXT, 5)
    elif change == "cleaning":
        text_encoder = load_text_encoder(TINY_TEXT, 16, clean=True)
    elif change == "holdout":           # some of the three clips are then for validation
        config = replace(config, holdout=0.2)
    elif change == "other csv of the clips":                            # a clip's path in its csv places its windows
        header, *rows = meta.read_text().splitlines()
        other = meta.parents[1] / "meta.csv"
        other.write_text("\n".join([header, *(f"clips/{row}" for row in rows)]))
        config = replace(config, data=str(other))
    elif change == "file elsewhere":
        meta.with_name("notes.txt").write_text("a file that no row names")
        meta.with_name("short2.mp4").write_bytes(b"a clip that no row names")
    write(config, vae, text_encoder)
    now = saved_files(config)
    new = {name.split("/")[0] for name in now.keys() - before.keys()}
    assert new == kinds
    for name, held in before.items():
        assert now[name] == held


def test_a_cache_that_is_there_is_not_written_again(small, write):
    write(small)
    before = saved_files(small)
    write(small)
    assert saved_files(small) == before


def test_a_write_that_is_stopped_is_continued(small, write, tmp_path, monkeypatch):
    """Stops as a power cut would, when half of the third file is on the disk; later one of the files gets lost."""
    undisturbed = replace(small, cache=str(tmp_path / "undisturbed"))
    write(undisturbed)
    fsync = os.fsync
    num_files = 0

    def cut_the_power(file):
        nonlocal num_files
        num_files += 1
        if num_files == 3:
            number = file if isinstance(file, int) else file.fileno()
            os.truncate(number, os.fstat(number).st_size // 2)
            raise KeyboardInterrupt
        fsync(file)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", cut_the_power)
        write(small)
    before = saved_files(small)
    assert before and len(before) < len(saved_files(undisturbed))
    write(small)
    assert contents(small) == contents(undisturbed)
    now = saved_files(small)
    for name, held in before.items():
        assert now[name] == held
    for name in now:
        (Path(small.cache) / name).unlink()
        write(small)
        assert contents(small) == contents(undisturbed)


@pytest.mark.slow
def test_a_killed_script_is_continued(config, tmp_path, monkeypatch):
    """Kills `vae.py cache` when 0, 2 and 4 files are there; what it left in between is not taken for whole."""
    undisturbed = replace(config, cache=str(tmp_path / "undisturbed"))
    for name, each in (("killed", config), ("undisturbed", undisturbed)):
        (tmp_path / f"{name}.py").write_text(dump(each))
    command = [sys.executable, "vae.py", "cache"]
    quiet = dict(cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                 stderr=subprocess.DEVNULL)
    assert subprocess.run([*command, tmp_path / "undisturbed.py"], **quiet).returncode == 0
    folder = Path(config.cache)
    for num_files in (0, 2, 4):
        with subprocess.Popen([*command, tmp_path / "killed.py"], **quiet) as script:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and script.poll() is None:
                if folder.is_dir() and len(list(folder.rglob("*.safetensors"))) >= num_files:
                    break
                time.sleep(0.001)
            script.send_signal(signal.SIGKILL)
    assert subprocess.run([*command, tmp_path / "killed.py"], **quiet).returncode == 0
    left = {name: data for name, data in contents(config).items() if not name.endswith(".part")}
    assert left == contents(undisturbed)


def test_each_rank_writes_its_share(small, write, vae, text_encoder, tmp_path, monkeypatch):
    whole = replace(small, cache=str(tmp_path / "whole"))
    write(whole)

    def gather(everyones, mine, group):
        everyones[:] = [mine, {}]

    monkeypatch.setattr(vae_module.dist, "all_gather_object", gather)
    num_files = []
    for rank in range(2):
        write_cache(read_meta(small.data), small, vae, text_encoder, rank, 2)
        num_files.append(len(contents(small)))
    assert contents(small) == contents(whole)
    assert num_files[1] - num_files[0] == num_files[1] // 2


@pytest.mark.slow
def test_two_processes_write_what_one_does(config, write, tmp_path):
    """Two ranks of torchrun, each with a reading process.  The order of sums depends on the number of threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    write(config)
    torch.set_num_threads(num_threads)
    two = replace(config, cache=str(tmp_path / "two"), num_workers=1)
    (tmp_path / "config.py").write_text(dump(two))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(ROOT / "vae.py"), "cache", str(tmp_path / "config.py")], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("have to be written") == 1                 # only rank 0 prints
    assert contents(two) == contents(config)


@pytest.mark.slow
def test_reading_processes_give_the_same_batches(config, write):
    """One process reads clips when the cache is written, and the cache when it is trained from."""
    one = replace(config, num_workers=1)
    cached = write(one)
    sampler = BucketSampler(cached.meta, config)
    alone = write(config)
    for ours, expected in zip(batches(sampler, cached, 0, 4), batches(sampler, alone, 0, 4), strict=True):
        for name in ("mean", "std", "y", "y_mask", "slots", "fps"):
            assert torch.equal(ours[name], expected[name])


# ---------------------------------------------------------------- clips that cannot be read, and other errors

def test_an_unreadable_clip_is_reported_and_left_out(config, write, vae, text_encoder, capfd):
    """Training replaces a clip that raises UnreadableClip; one that has been mended is written later."""
    config = replace(config, buckets={"64": {1: (1.0, 2), 8: (1.0, 2)}})
    victim = Path(config.data).with_name("short0.mp4")
    whole = victim.read_bytes()
    victim.write_bytes(whole[:100])
    cached = write(config)
    assert capfd.readouterr().err.count(f"{victim}: ") == 1
    header, *rows = csv.reader((Path(config.cache) / "bad_clips.csv").open())
    assert header == ["path", "reason"]
    assert [row[0] for row in rows] == [str(victim)]
    num_missing = 0
    for clip, bucket in clips_in_buckets(config):
        if cached.meta.path(clip) == str(victim):
            num_missing += 1
            missing = (clip, bucket)
            with pytest.raises(UnreadableClip, match="short0.mp4"):
                cached.read(clip, bucket, 0, 0)
        else:
            expected = encode_clip(config, vae, text_encoder, clip, bucket, 0, 0)
            assert_same(cached.read(clip, bucket, 0, 0), expected)
    assert num_missing == 1
    victim.write_bytes(whole)
    cached = write(config)
    assert not (Path(config.cache) / "bad_clips.csv").exists()
    assert_same(cached.read(*missing, 0, 0), encode_clip(config, vae, text_encoder, *missing, 0, 0))


def test_too_many_unreadable_clips_are_an_error(config, write):
    rows = [f"gone{i}.png,a red circle,1,64,64,120" for i in range(300)]
    Path(config.data).write_text("\n".join(["path,text,num_frames,height,width,fps", *rows]))
    with pytest.raises(ValueError, match="max_bad=0.05"):
        write(config)


def test_a_table_without_a_clip_for_any_bucket_is_an_error(small, write):
    with pytest.raises(ValueError, match=f"{small.data}.*bucket"):
        write(replace(small, buckets={"1080p": {64: (1.0, 1)}}))


def test_a_clip_that_changes_while_it_is_read_is_not_in_the_cache(small, write, vae, monkeypatch):
    """What was read belongs to the file as it was; nobody asks for that any more."""
    clip = Path(small.data).with_name("short0.mp4")
    read = vae_module.read_clip

    def read_and_change(path, *args):
        window = read(path, *args)
        if path == str(clip):
            clip.write_bytes(b"another")
        return window

    with monkeypatch.context() as patched:
        patched.setattr(vae_module, "read_clip", read_and_change)
        cached = write(small)
    for number, bucket in clips_in_buckets(small):
        if cached.meta.path(number) == str(clip):
            with pytest.raises(UnreadableClip, match="not in the cache"):
                cached.read(number, bucket, 0, 0)
        else:
            cached.read(number, bucket, 0, 0)


def test_a_cache_file_that_was_cut_short_is_named(small, write):
    """The clip is replaced as others that cannot be read; without that file the next start writes it again."""
    cached = write(small)
    clip, bucket = clips_in_buckets(small)[0]
    for file in (cached.latents_file(clip, bucket, window_number(small, bucket, 0, 0)),
                 cached.caption_file(cached.meta.text(clip))):
        whole = file.read_bytes()
        file.write_bytes(whole[:-10])
        with pytest.raises(UnreadableClip, match=f"{file}.*delete"):
            cached.read(clip, bucket, 0, 0)
        file.unlink()
        write(small)
        assert file.read_bytes() == whole


def test_where_meta_csv_is_wrong_the_cache_follows_the_file(small, write):
    """As training from pixels does."""
    meta = Path(small.data)
    meta.write_text(meta.read_text().replace(",8,64,64,8", ",8,64,64,30"))
    cached = write(small)
    pixels = ClipDataset(cached.meta, small)
    for clip, bucket in clips_in_buckets(small):
        assert cached.read(clip, bucket, 0, 0)["fps"] == pixels.read(clip, bucket, 0, 0)["fps"] == 8


def test_a_disk_without_room_is_an_error_before_anything_is_written(small, write, tmp_path, monkeypatch):
    whole = replace(small, cache=str(tmp_path / "whole"))
    write(whole)
    needed = sum(len(data) for data in contents(whole).values())
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(0.8 * needed)))
    with pytest.raises(ValueError, match=rf"{small.cache} has 0\.\d MB free"):
        write(small)
    assert not saved_files(small)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(1.1 * needed)))
    write(small)


# ---------------------------------------------------------------- the command line

def test_the_script_writes_a_cache(run_script, small, write, tmp_path):
    """Its networks clean captions where the config says so."""
    small = replace(small, model=replace(small.model, as_released=True))
    (tmp_path / "config.py").write_text(dump(small))
    ended = run_script("vae", "cache", tmp_path / "config.py", "--windows=3", "--seed=7")
    assert ended.status == 0
    assert "9 windows and 3 captions, of which 12 " in ended.out
    before = saved_files(small)
    write(replace(small, windows=3), text_encoder=load_text_encoder(TINY_TEXT, TINY.model_max_length, clean=True))
    assert saved_files(small) == before


def test_the_script_warns_of_captions_that_are_cut(run_script, small, tmp_path):
    Path(small.data).write_text(Path(small.data).read_text().replace("circle moves right", "circle and a red circle"))
    small = replace(small, model=replace(TINY, model_max_length=6))
    (tmp_path / "config.py").write_text(dump(small))
    ended = run_script("vae", "cache", tmp_path / "config.py")
    assert re.search(r"cut at 6 of its \d+ tokens: a red circle and a red circle", ended.err)


def test_a_disk_that_fills_is_one_line_and_leaves_nothing_half_written(run_script, small, tmp_path):
    (tmp_path / "config.py").write_text(dump(small))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9999, limits[1]))
    try:
        ended = run_script("vae", "cache", tmp_path / "config.py")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert ended.status == 2
    assert re.search(rf"error: {small.cache}/\S+: ", ended.err)
    assert not saved_files(small)


def test_the_script_reconstructs_a_clip(run_script, tmp_path):
    frames = next(frames for frames in (shapes_clip(3, i)[0] for i in range(20)) if len(frames) == 8)
    write_video(tmp_path / "clip.mp4", frames, 8)
    ended = run_script("vae", tmp_path / "clip.mp4", "--vae", TINY_VAE, "--num-frames=3",
                       "--out", tmp_path / "pair.png")
    assert ended.status == 0
    assert "3 frames of 64x" in ended.out
    assert float(ended.out.split("PSNR ")[1].split()[0]) > 28
    assert Image.open(tmp_path / "pair.png").height >= 64               # the clip above, its reconstruction below


def test_ctrl_c_is_no_error(run_script, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt
    monkeypatch.setattr(vae_module, "load_vae", stop)
    ended = run_script("vae", "cache", "configs/tiny.py")
    assert ended.status == 130
    assert "stopped" in ended.err and "Traceback" not in ended.err


@pytest.mark.parametrize("args, message", [
    (("no.mp4",), "no.mp4"),
    (("thin.png",), r"\[1, 3, 1, 40, 0\]"),
    (("a.mp4", "--hep"), "--hep"),
    (("a.mp4", "--num-frames=0"), "--num-frames.*'0'"),
    (("cache",), "CONFIG"),
    (("cache", "nowhere.py"), "nowhere.py"),
    (("cache", "tiny", "--cache="), "cache=''"),
    (("cache", "tiny", "--vae=/no/such/vae"), "'/no/such/vae'"),
    (("cache", "tiny", "--windows=0"), "windows=0"),
    (("cache", "tiny", "--windos=1"), "windos.*'windows'"),
])
def test_a_mistake_is_one_line(run_script, tmp_path, monkeypatch, args, message):
    Image.new("RGB", (5, 40)).save(tmp_path / "thin.png")
    first = str(tmp_path / args[0]) if args[0].endswith("png") else args[0]
    ended = run_script("vae", first, *args[1:])
    assert ended.status == 2
    assert re.search(rf"error: .*{message}", ended.err)
    assert "Traceback" not in ended.err
    assert "Traceback" not in ended.err
