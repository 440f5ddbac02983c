"""vae.py: the networks against diffusers and transformers called directly; the cache; the small networks it makes."""
import base64
import csv
import gc
import json
import multiprocessing
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from tokenizers import Tokenizer
from transformers import AutoTokenizer, T5Config, T5EncoderModel

import data
import vae as vae_module
from assets.shapes import shapes_clip, write_shapes
from assets.tiny.make import fit_vae, make_text_encoder
from configs import Config, dump
from data import (BucketSampler, ClipDataset, UnreadableClip, batches, bucket_list, reachable, read_meta, read_window,
                  to_video, window_number, write_video)
from masks import RECIPE
from model import TINY, LiveBytes
from vae import (CachedClips, clean_caption, from_sentencepiece, load_text_encoder, load_tokenizer, load_vae,
                 psnr, remember, write_cache)

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
    monkeypatch.setattr(vae_module, "PIXELS_AT_ONCE", 3 * 32 * 32)
    torch.testing.assert_close(vae.encode(video), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vae.decode(z), again, rtol=1e-4, atol=1e-4)


def test_the_decoder_of_the_plan_is_the_released_one():
    """DECODER_BYTES against live tensors of an autoencoder of sd-vae-ft-ema's shape."""
    net = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
                        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(84e6, rel=0.01)
    z = torch.randn(1, 4, 16, 16)
    with torch.no_grad(), LiveBytes([*net.parameters(), *net.buffers(), z]) as memory:
        net.decode(z)
    assert memory.peak / 128 ** 2 == pytest.approx(vae_module.DECODER_BYTES, rel=0.1)


def test_moments_are_those_of_diffusers_draws(vae, video):
    mean, std = vae.moments(video[:, :, :1])
    with torch.no_grad():
        posterior = vae.net.encode(video[:, :, 0]).latent_dist
    draws = torch.stack([posterior.sample(torch.Generator().manual_seed(i)) * vae.scale for i in range(1600)])
    assert not torch.equal(draws[0], draws[1])
    assert ((draws - mean[:, :, 0]) / std[:, :, 0]).std().item() == pytest.approx(1, abs=0.02)


def test_shipped_vae_reconstructs_clips_it_never_saw(vae):
    """A viewer, and tests/reader.py, need about 30 dB.  It was fitted on H.264: colours softer at edges than these."""
    videos = (to_video(shapes_clip(99, i)[0])[None] for i in range(30))
    quality = [psnr(vae.decode(vae.encode(v)), v) for v in videos]
    assert np.median(quality) > 31 and min(quality) > 28


def test_sizes_are_floored_to_cells(vae):
    assert vae.encode(torch.zeros(1, 3, 1, 42, 55)).shape[-2:] == (5, 6)      # as upstream's 426 pixels are 53 cells


def test_wrong_shape_and_missing_folder(vae, tmp_path):
    with pytest.raises(ValueError, match=r"video must be \[B 3 T H W\] with .*, got \[1, 4, 2, 8, 8\]"):
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


PAIRS = json.loads((ROOT / "tests/golden/e_clean_caption.json").read_text())["rows"]


@pytest.mark.parametrize("pair", PAIRS, ids=range(len(PAIRS)))
def test_captions_are_cleaned_as_upstreams(pair):
    assert clean_caption(pair["inp"]) == pair.get("twice", pair["once"])


def test_what_else_upstream_was_seen_to_clean():
    """FACTS.md 34."""
    seen = {"a #123 and #12345 but #1234": "a and but 1234", "1girl in h264, mp4": "1girl in", "a dog, ": "a dog"}
    assert {text: clean_caption(text) for text in seen} == seen
    plain = "a red circle moves right, then it stops. it's 3.5 m wide: a well-known one!"
    assert clean_caption(plain) == plain


def test_a_text_encoder_cleans_where_told():
    messy, plain, clean = "A red (circle)", load_text_encoder(TINY_TEXT, 8), load_text_encoder(TINY_TEXT, 8, clean=True)
    assert all(map(torch.equal, clean([messy]), plain(["a red circle"])))
    assert clean.unknown(messy) == [] and plain.unknown(messy) == ["A", "(circle)"]
    assert clean.lengths(["a (red)/(circle)"]) == [4] and plain.lengths(["a (red)/(circle)"]) == [3]


def field(number, value):
    """A protobuf field: bytes, a float or a small int."""
    def varint(n):
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)
    kind = {bytes: 2, float: 5, int: 0}[type(value)]
    payload = {2: lambda: varint(len(value)) + value, 5: lambda: struct.pack("<f", value), 0: lambda: varint(value)}
    return varint(number << 3 | kind) + payload[kind]()


def spiece(vocabulary, charsmap=None):
    """The bytes of a spiece.model, all of whose pieces also have a type; the trainer's part is not empty."""
    pieces = [field(1, piece.encode()) + field(2, score) + field(3, 1) for piece, score in vocabulary]
    normalizer = field(1, b"nmt_nfkc") + field(2, charsmap) + field(3, 1) if charsmap else field(1, b"identity")
    trainer = field(1, b"corpus.txt") + field(4, 32000) + field(10, 0.9995)
    return b"".join(field(1, piece) for piece in pieces) + field(2, trainer) + field(3, normalizer)


SMALL = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a", -3.0), ("▁red", -5.0), ("▁re", -6.5),
         ("d", -4.0), ("▁circle", -8.0), ("s", -3.5)]


def test_a_folder_with_a_sentencepiece_file_only(tmp_path):
    """As DeepFloyd/t5-v1_1-xxl: no tokenizer.json."""
    config = T5Config(vocab_size=128, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path)
    (tmp_path / "spiece.model").write_bytes(spiece(SMALL))
    settings = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    encoder = load_text_encoder(str(tmp_path), 6)
    assert encoder.tokenizer(["a  red circles ", ""], padding="max_length", max_length=6).input_ids == [
        [4, 5, 8, 9, 1, 0], [1, 0, 0, 0, 0, 0]]
    y, y_mask = encoder(["a red circle"])
    assert y.shape == (1, 6, 8) and y_mask.tolist() == [[True] * 4 + [False] * 2]
    assert encoder.unknown("a zebra red") == ["zebra"] and len(encoder.tokenizer) == len(SMALL) + 100
    with pytest.raises(ValueError, match="spiece.model: expected T5's pieces"):
        from_sentencepiece(spiece(SMALL)[:-3])
    with pytest.raises(ValueError, match="expected T5's pieces.*<pad>"):
        from_sentencepiece(spiece(SMALL[1:]))


CAPTIONS = [
    "a red circle moves right", "", ".", "A busy street, at night: neon signs; 3 cars & 2 buses!",
    "naïve café, ﬁne … Ｆｕｌｌ width １２３ ½ №5 ﷺ", "日本語 と 한국어 и русский", "emoji 😀🎬 and\nnew\tlines",
    "don't — “quote” ‘it’", "50% off (today) [new]", "supercalifragilisticexpialidocious antidisestablishmentarianism",
    "x" * 300, "1234567890 3.14159 1e-5 16:9 4K", "e\u0301 a\u0308 \u200bzero \u00a0width \ufeff.",
    "<extra_id_0> and </s>", "  spaces   everywhere", " ".join(map(str, range(400))),
    "waves roll onto a beach at sunset, " * 40]


@pytest.mark.skipif(not os.environ.get("NANOSORA_MODELS"), reason="needs NANOSORA_MODELS, a folder with t5_tokenizer/")
def test_t5s_pieces_give_t5s_tokens(tmp_path):
    """All 32,000 pieces, as SentencePiece writes them, give the numbers that tokenizer.json gives."""
    source = Path(os.environ["NANOSORA_MODELS"]) / "t5_tokenizer/tokenizer.json"
    written, theirs = json.loads(source.read_text()), Tokenizer.from_file(str(source))
    charsmap = base64.b64decode(written["normalizer"]["normalizers"][0]["precompiled_charsmap"])
    for name in ("json", "spiece"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text('{"model_type": "t5"}')
    shutil.copy(source, tmp_path / "json")
    (tmp_path / "spiece/spiece.model").write_bytes(spiece(written["model"]["vocab"][:32000], charsmap))
    ours, auto = load_tokenizer(tmp_path / "spiece"), AutoTokenizer.from_pretrained(tmp_path / "json")
    assert ours.get_vocab() == theirs.get_vocab()
    assert (ours.pad_token_id, ours.eos_token_id, ours.unk_token_id) == (0, 1, 2)
    for caption in (*CAPTIONS, *(pair["inp"] or "" for pair in PAIRS)):
        assert ours(caption, verbose=False).input_ids == auto(caption, verbose=False).input_ids, caption
        if "</s>" not in caption:                                             # else it splits the text, as spaces do
            assert ours(caption.rstrip(), verbose=False).input_ids == theirs.encode(caption.rstrip()).ids, caption
    cut = dict(max_length=200, padding="max_length", truncation=True)
    assert ours(CAPTIONS, **cut).input_ids == auto(CAPTIONS, **cut).input_ids


def test_remembered_captions_need_no_network():
    encoder = load_text_encoder(TINY_TEXT, 16)
    captions, net = ["a red circle moves right", "a blue square"], weakref.ref(encoder.net)
    expected = [encoder([caption]) for caption in captions]
    given = [encoder]
    again = remember(given.pop, [*captions, captions[0]])
    del encoder
    gc.collect()
    assert net() is None
    y, y_mask = again([captions[1], captions[0]])
    for row, mask, (y_alone, mask_alone) in zip(y, y_mask, reversed(expected)):
        assert torch.equal(mask, mask_alone[0]) and torch.equal(row[mask], y_alone[0][mask]) and not row[~mask].any()


def test_embeddings_are_kept(tmp_path):
    loaded = []

    def load():
        loaded.append(load_text_encoder(TINY_TEXT, 16))
        return loaded[-1]

    first = remember(load, ["a red circle"], tmp_path / "texts", "key")(["a red circle"])
    again = remember(load, ["a red circle"], tmp_path / "texts", "key")(["a red circle"])
    assert len(loaded) == 1 and all(map(torch.equal, first, again))
    assert [file.suffix for file in (tmp_path / "texts").iterdir()] == [".safetensors"]     # nothing half-written
    remember(load, ["a red circle"], tmp_path / "texts", "another key")
    remember(load, ["a red circle", "a blue square"], tmp_path / "texts", "key")
    assert len(loaded) == 3 and len(list((tmp_path / "texts").iterdir())) == 3


# ---- the small VAE ----

def test_fit_vae_learns(tmp_path):
    frames = torch.from_numpy(square_frames(0, 40))
    early, late = (fit_vae([frames], steps=n, batch=16, widths=(8, 8, 8, 16)) for n in (2, 60))
    late.save_pretrained(tmp_path)
    video, loaded = to_video(frames[:16])[None], load_vae(str(tmp_path))
    images = video[0].transpose(0, 1)                                         # [N 3 H W]
    assert psnr(loaded.decode(loaded.encode(video)), video) > psnr(early(images).sample, images) + 3
    assert loaded.encode(video).std().item() == pytest.approx(1, abs=0.3)


# ---- the cache ----

@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of 24 of the world's clips, stills, 8 and 16 frames, and 2 larger ones of twice the frame rate."""
    folder = tmp_path_factory.mktemp("clips")
    write_shapes(folder, 24)
    rows = []
    for i in range(2):
        frames = np.random.default_rng(i).integers(0, 256, (18, 9, 16, 3), np.uint8)
        write_video(folder / f"large{i}.mp4", frames.repeat(16, axis=1).repeat(16, axis=2), 16)
        rows.append(f"large{i}.mp4,a red circle moves fast,18,144,256,16\n")
    with open(folder / "meta.csv", "a") as f:
        f.writelines(rows)
    return folder


@pytest.fixture
def config(clips, tmp_path, monkeypatch):
    """Of a folder of its own; two windows; with shards of 3 clips of 8 frames."""
    shutil.copytree(clips, tmp_path / "clips")
    monkeypatch.setattr(vae_module, "SHARD_BYTES", 100_000)
    return Config(model=TINY, vae=TINY_VAE, text_encoder=TINY_TEXT, data=str(tmp_path / "clips/meta.csv"),
                  buckets={"144p": {8: (0.5, 1)}, "32": {1: (1.0, 2), 8: (1.0, 2)}}, target_fps=8.0, windows=2,
                  num_workers=0, cache=str(tmp_path / "cache"), mask_ratios=RECIPE, lr=1e-3, steps=1,
                  dtype="fp32", out="-")


@pytest.fixture(scope="module")
def text_encoder():
    return load_text_encoder(TINY_TEXT, 16)


@pytest.fixture
def write(vae, text_encoder):
    """write(config, ...) -> index"""
    return lambda config, vae=vae, **more: write_cache(read_meta(config.data), config, vae, text_encoder, **more)


def shards(config):
    """{name: (time of change, bytes)} of a cache's files that hold latents or embeddings."""
    files = [file for file in Path(config.cache).iterdir() if not file.name.startswith(("index", "bad", "."))]
    return {file.name: (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


def contents(config):
    return {name: held for name, (_, held) in shards(config).items()}


def every_clip(config, meta):
    """(clip, bucket) of all that the cache is to hold."""
    buckets = bucket_list(config.buckets)
    return [(int(clip), buckets[number]) for number, clips in reachable(meta, config).items() for clip in clips]


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-5)


def encoded(config, vae, text_encoder, clip, bucket, step, slot):
    """What CachedClips is to give, from the clip's file and the networks."""
    item = ClipDataset(read_meta(config.data), config).read(clip, bucket, step, slot)
    mean, std = vae.moments(to_video(item["video"])[None])
    y, y_mask = text_encoder([item["text"]])
    return {"mean": mean[0], "std": std[0], "y": y[0] * y_mask[0][:, None], "y_mask": y_mask[0], "decoded": 0}


def test_cache_holds_what_the_networks_give(config, write, vae, text_encoder):
    """Every clip in every bucket that it can reach, with a keep probability of 0.5 two; both windows."""
    meta = read_meta(config.data)
    cached = CachedClips(meta, config, write(config))
    where = every_clip(config, meta)
    assert len(where) == 28 and len({clip for clip, _ in where}) == 26 and len({bucket for _, bucket in where}) == 5
    for clip, bucket in where:
        for slot in range(3):
            assert_same(cached.read(clip, bucket, 7, slot), encoded(config, vae, text_encoder, clip, bucket, 7, slot))


def test_windows_are_the_slots(config, write):
    meta = read_meta(config.data)
    cached, clip = CachedClips(meta, config, write(config)), int(np.flatnonzero(meta["num_frames"] == 16)[0])
    bucket = next(bucket for c, bucket in every_clip(config, meta) if c == clip)
    window = [window_number(config, bucket, 3, slot) for slot in range(20)]
    means = [cached.read(clip, bucket, 3, slot)["mean"] for slot in range(20)]
    for i in range(20):
        assert torch.equal(means[i], means[0]) == (window[i] == window[0])
    assert set(window) == {0, 1}


def test_cache_in_bf16(config, write, text_encoder):
    """Half the size, computed in bf16, and told apart from that in fp32."""
    config = replace(config, buckets={"32": {1: (1.0, 2)}})
    write(config)
    before, meta = contents(config), read_meta(config.data)
    config = replace(config, dtype="bf16")
    nets = load_vae(TINY_VAE, torch.bfloat16), load_text_encoder(TINY_TEXT, 16, torch.bfloat16)
    cached = CachedClips(meta, config, write_cache(meta, config, *nets))
    half = {name: held for name, held in contents(config).items() if name not in before}
    assert sum(map(len, half.values())) == pytest.approx(sum(map(len, before.values())) / 2, rel=0.05)
    clip, bucket = every_clip(config, meta)[0]
    ours, theirs = cached.read(clip, bucket, 0, 0), encoded(config, *nets, clip, bucket, 0, 0)
    assert ours["mean"].dtype == ours["y"].dtype == torch.float32
    for name in ("mean", "std", "y"):
        torch.testing.assert_close(ours[name], theirs[name], rtol=0.01, atol=1e-3)


def test_cache_is_written_once(config, write, monkeypatch):
    index = write(config)
    before = shards(config)
    looked = []
    monkeypatch.setattr(vae_module, "stamp", lambda path, stamp=vae_module.stamp: looked.append(path) or stamp(path))
    assert write(config) == index and not looked
    assert write(config, recheck=True) == index and len(looked) > 26
    assert shards(config) == before


def test_a_killed_run_goes_on(config, write, monkeypatch):
    """Killed in its fourth shard, which stays behind half written; then one that was whole is lost."""
    index = write(config)
    undisturbed, config = contents(config) | {index.name: index.read_bytes()}, replace(config, cache=config.cache + "2")
    save, saved = vae_module.save_file, []

    def killed(tensors, path, note):
        saved.append(path)
        if len(saved) == 4:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        save(tensors, path, note)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(vae_module, "save_file", killed)
        write(config)
    assert len(list(Path(config.cache).glob("*.safetensors"))) == 3 and not list(Path(config.cache).glob("index*"))
    before = shards(config)
    again = write(config)
    now = shards(config)
    assert contents(config) | {again.name: again.read_bytes()} == undisturbed
    assert all(now[name] == held for name, held in before.items() if name in now)
    lost = Path(config.cache) / next(iter(now))
    lost.unlink()
    assert write(config) == again and contents(config) | {again.name: again.read_bytes()} == undisturbed


def test_two_processes_write_what_one_does(config, write, tmp_path, monkeypatch):
    monkeypatch.undo()                                                        # SHARD_BYTES, as in the others
    index, two = write(config), replace(config, cache=str(tmp_path / "two"), num_workers=1)
    (tmp_path / "config.py").write_text(dump(two))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(ROOT / "vae.py"), "cache", str(tmp_path / "config.py")], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    clips, captions = sum(len(ids) for ids in reachable(read_meta(config.data), config).values()), 24
    written, planned = max((int(a), int(b)) for a, b in re.findall(r" (\d+)/(\d+) ", done.stderr))
    assert 0 < written == planned < clips + captions                          # rank 0's share
    assert done.stdout.count("files to write") == done.stdout.count("captions were cut") == 1
    assert contents(two) == contents(config) and (tmp_path / "two" / index.name).read_bytes() == index.read_bytes()


def test_a_file_that_does_not_fit_is_an_oserror(tmp_path):
    """safetensors raises an error of its own, which main() would show with its traceback."""
    code = ("import resource, signal, sys, torch; from pathlib import Path; from vae import write_whole\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9999, 9999))\n"
            "try:\n    write_whole(Path(sys.argv[1]), {'z': torch.zeros(9999)}, {})\n"
            "except OSError as error:\n    print(error)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "z.safetensors")], capture_output=True, text=True,
                          cwd=Path(vae_module.__file__).parent)
    assert "z.safetensors: " in done.stdout, done.stderr
    assert not (tmp_path / "z.safetensors").exists()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_cache_is_written_and_read_by_other_processes(config, write, method, monkeypatch):
    """A pickle holds no rows, and a read leaves no file open."""
    monkeypatch.setattr(data, "multiprocessing", multiprocessing.get_context(method))
    meta, one = read_meta(config.data), replace(config, num_workers=1)
    cached = CachedClips(meta, config, write(one))
    sampler, many = BucketSampler(meta, config), CachedClips(meta, one, cached.index)
    for ours, theirs in zip(batches(sampler, cached, 0, 6), batches(sampler, many, 0, 6), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ("mean", "std", "y", "y_mask", "slots", "fps"))
    again, (clip, bucket) = pickle.loads(pickle.dumps(cached)), every_clip(config, meta)[0]
    assert_same(again.read(clip, bucket, 0, 0), cached.read(clip, bucket, 0, 0))
    assert len(pickle.dumps(cached)) < len(pickle.dumps((meta, config))) + 1000
    if sys.platform == "linux":
        files = os.listdir("/proc/self/fd")
        cached.read(clip, bucket, 0, 0)
        assert len(os.listdir("/proc/self/fd")) == len(files)


def test_stages_share_a_folder(config, write):
    """A bucket of two configs is there once, with other batch sizes, seeds and buckets beside it."""
    write(replace(config, buckets={"32": {8: (1.0, 2)}}))
    before = shards(config)
    write(replace(config, buckets={"32": {1: (0.5, 2), 8: (0.7, 1)}}, seed=3))
    now = shards(config)
    assert {name: now[name] for name in before} == before
    assert {name.split("-")[1] for name in now.keys() - before.keys()} == {"1"} | {
        name.split("-")[1] for name in now if name.startswith("text")} - {name.split("-")[1] for name in before}


CHANGES = {     # what changes -> kinds of files that are written anew, of "text" and "32"; whether the csv tells
    "caption": ({"text"}, True), "clip": ({"32"}, False), "rendered": ({"32"}, True), "fps": ({"32"}, True),
    "vae": ({"32"}, True), "scale": ({"32"}, True), "windows": ({"32"}, True), "text_encoder": ({"text"}, True),
    "tokenizer": ({"text"}, True), "max_length": ({"text"}, True), "target_fps": ({"32", "text"}, True),
    "holdout": ({"32", "text"}, True), "elsewhere": ({"32"}, True), "clean": ({"text"}, True)}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(config, write, change):
    """Only what hangs on them is written anew."""
    config = replace(config, buckets={"32": {8: (1.0, 2)}})
    index, before = write(config), shards(config)
    csv, vae, text_encoder = Path(config.data), load_vae(TINY_VAE), load_text_encoder(TINY_TEXT, 16)
    clip = next(csv.parent.glob("*[0-9].mp4"))
    if change == "caption":
        csv.write_text(csv.read_text().replace("moves right", "moves quickly"))
    if change in ("clip", "rendered"):
        clip.write_bytes(clip.read_bytes() + bytes(8))
    if change == "rendered":
        os.utime(csv, ns=(0, 0))
    if change == "fps":                                                       # the stride of clips with 16 frames
        csv.write_text(csv.read_text().replace(",16,32,32,8", ",16,32,32,16"))
    if change == "vae":
        vae.net.encoder.conv_in.weight.add_(0.01)
    if change == "scale":
        vae.scale *= 2
    if change == "windows":
        config = replace(config, windows=3)
    if change == "text_encoder":
        text_encoder.net.shared.weight.add_(0.01)
    if change == "tokenizer":
        text_encoder.tokenizer.add_tokens(["sideways"])
    if change == "clean":
        text_encoder.clean = clean_caption
    if change == "max_length":
        text_encoder.max_length = 5
    if change == "target_fps":
        config = replace(config, target_fps=4.0)
    if change == "holdout":
        config = replace(config, holdout=0.5)
    if change == "elsewhere":                                                 # clips' names in it place their windows
        config = replace(config, data=str(csv.parents[1] / "meta.csv"))
        Path(config.data).write_text(re.sub("(?m)^(?=.*mp4|.*png)", "clips/", csv.read_text()))
    kinds, told = CHANGES[change]
    assert (write_cache(read_meta(config.data), config, vae, text_encoder) != index) == told
    write_cache(read_meta(config.data), config, vae, text_encoder, recheck=True)
    now = shards(config)
    assert {name.split("-")[0] for name in now.keys() - before.keys()} == kinds
    assert {name: now[name] for name in before} == before


# ---- clips that cannot be read ----

@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_clips_are_left_out(config, write, vae, text_encoder, capfd, num_workers):
    """One of two buckets; it is named once, and its shards' other clips are found."""
    config = replace(config, num_workers=num_workers)
    victim = Path(config.data).with_name("large0.mp4")
    victim.write_bytes(b"")
    meta = read_meta(config.data)
    cached = CachedClips(meta, config, write(config))
    assert capfd.readouterr().err.count(f"{victim}: ") == 1
    (header, row) = csv.reader(open(Path(config.cache) / "bad_clips.csv"))
    assert header == ["path", "reason"] and row[0] == str(victim) and row[1].startswith(f"{victim}: ")
    missing = [clip for clip, _ in every_clip(config, meta) if meta.path(clip) == str(victim)]
    assert len(missing) == 2
    for clip, bucket in every_clip(config, meta):
        if clip in missing:
            with pytest.raises(UnreadableClip, match="large0.mp4: is not in the cache"):
                cached.read(clip, bucket, 0, 0)
        else:
            assert_same(cached.read(clip, bucket, 0, 0), encoded(config, vae, text_encoder, clip, bucket, 0, 0))
    write(config, recheck=True)                                               # of shards that were there, too
    assert len(list(csv.reader(open(Path(config.cache) / "bad_clips.csv")))) == 2
    shutil.copy(victim.with_name("large1.mp4"), victim)
    cached = CachedClips(meta, config, write(config, recheck=True))
    assert cached.read(missing[0], bucket_list(config.buckets)[0]._replace(ar="0.56"), 0, 0)["mean"].any()


def test_a_bucket_of_unreadable_clips_is_an_error(config, write):
    for victim in Path(config.data).parent.glob("large*.mp4"):
        victim.write_bytes(b"")
    with pytest.raises(ValueError, match=f"bucket 144p-8-0.56 could be read: .*{config.cache}/bad_clips.csv"):
        write(config)
    assert len((Path(config.cache) / "bad_clips.csv").read_text().splitlines()) == 3


def test_too_many_unreadable_clips_are_an_error(config, write, tmp_path):
    write_shapes(tmp_path / "many", 240)
    config = replace(config, data=str(tmp_path / "many/meta.csv"), buckets={"32": {1: (1.0, 2), 8: (1.0, 2)}})
    for victim in sorted((tmp_path / "many").glob("*.png"))[::5]:
        victim.unlink()
    with pytest.raises(ValueError, match="more than max_bad=0.05 of them"):
        write(config)
    write(replace(config, max_bad=0.2))


def test_files_that_change_while_they_are_read_are_an_error(config, write, vae, monkeypatch):
    clip = next(Path(config.data).parent.glob("*[0-9].mp4"))
    moments = vae.moments
    monkeypatch.setattr(vae, "moments", lambda video: clip.write_bytes(b"gone") and moments(video))
    with pytest.raises(ValueError, match="files changed while they were read"):
        write(config)


# ---- what it says ----

def test_cut_captions_are_counted(config, vae, capsys):
    text_encoder = load_text_encoder(TINY_TEXT, 6)                            # "a red circle moves right" and </s>
    assert text_encoder(["a red circle", "a red circle moves right", "a red circle moves right now"]) and (
        text_encoder.cut == 1)
    config = replace(config, buckets={"32": {8: (1.0, 2)}}, model=replace(TINY, model_max_length=6))
    csv = Path(config.data)
    csv.write_text(csv.read_text().replace("moves fast", "moves very fast"))
    meta = read_meta(config.data)
    for recheck in (False, True):                                             # made now, or there
        cached = CachedClips(meta, config, write_cache(meta, config, vae, text_encoder, recheck=recheck))
        assert ": 1 captions were cut at 6 tokens, 0 clips could not be read\n" in capsys.readouterr().out
    clip, bucket = every_clip(config, meta)[-1]
    assert cached.read(clip, bucket, 0, 0)["y_mask"].sum() == 6


def test_the_size_is_announced(config, write, tmp_path, capsys):
    write_shapes(tmp_path / "many", 240)
    config = replace(config, data=str(tmp_path / "many/meta.csv"), buckets={"32": {1: (1.0, 2), 8: (1.0, 2)}})
    pattern = r"240 clips, (\d+) windows in 4 buckets, (\d+) captions; (\d+) of (\d+) files to write, ([\d.]+) MB of"
    write(config)
    said = re.search(pattern, capsys.readouterr().out)
    meta = read_meta(config.data)
    still, texts = int((meta["num_frames"] == 1).sum()), {meta.text(clip) for clip in range(len(meta))}
    assert [int(said[i]) for i in (1, 2)] == [still + 2 * (240 - still), len(texts)]
    assert int(said[3]) == int(said[4]) == len(shards(config))
    assert float(said[5]) == pytest.approx(sum(map(len, contents(config).values())) / 1e6, rel=0.05)
    captions = list(Path(config.cache).glob("text*"))                         # padded they take 2.5 times as much
    size = sum(file.stat().st_size for file in captions)
    for file in captions:
        file.unlink()
    write(config)
    said = re.search(pattern, capsys.readouterr().out)
    assert int(said[3]) == len(captions) and float(said[5]) == pytest.approx(size / 1e6, abs=0.06)


def test_too_small_a_disk_is_an_error(config, write, monkeypatch):
    full = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full._replace(free=300_000))
    with pytest.raises(ValueError, match=r"cache has 0.3 MB free, expected \d.\d MB"):
        write(config)
    assert not shards(config)


# ---- as a script ----

def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["vae.py", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        vae_module.main()
        sys.exit(0)
    return ended.value.code, capsys.readouterr()


def test_unknown_options_are_named(monkeypatch, capsys):
    for args, said in ((("train", "meta.csv", "--stps=3"), "there is no --stps, did you mean --steps?"),
                       (("--hep",), "there is no --hep, did you mean --help?"),
                       (("train", "meta.csv", "--batch=0"),
                        "argument --batch: expected a whole number, 1 or more, got '0'")):
        code, output = run(monkeypatch, capsys, *args)
        assert code == 2 and output.err == f"error: {said}\n"


def test_reconstructs_a_clip(tmp_path, monkeypatch, capsys):
    write_video(tmp_path / "clip.mp4", shapes_clip(3, 0)[0], 8)
    code, said = run(monkeypatch, capsys, tmp_path / "clip.mp4", "--vae", TINY_VAE, "--out", tmp_path / "pair.png")
    assert code == 0 and float(said.out.split("PSNR ")[1].split()[0]) > 30 and (tmp_path / "pair.png").is_file()


def test_of_a_film_no_more_is_read_than_is_shown(tmp_path, monkeypatch, capsys):
    asked, path = [], tmp_path / "clip.mp4"
    write_video(path, square_frames(3, 20)[:8], 8)
    read = lambda path, num_frames, start: asked.append(num_frames) or read_window(path, num_frames, start=start)
    monkeypatch.setattr(vae_module, "read_window", read)
    for words, many in ((), 8), (("--num-frames", 3), 3):
        assert f"{many} frames of 32x32" in run(monkeypatch, capsys, path, "--vae", TINY_VAE, *words)[1].out
    assert asked == [8, 3]


def test_ctrl_c_says_what_was_stopped(config, monkeypatch, capsys):
    """Of a cache what is whole stays; a second start goes on (see above)."""
    (path := Path(config.cache).with_name("config.py")).write_text(dump(config))
    def stop(*args, **settings):
        raise KeyboardInterrupt
    monkeypatch.setattr(vae_module, "write_cache", stop)
    monkeypatch.setattr(vae_module, "reconstruct", stop)
    for args, said in (("cache", path), "; the same command goes on from what is whole"), (("a.mp4",), ""):
        code, output = run(monkeypatch, capsys, *args)
        assert code == 130 and output.err == f"\nstopped{said}\n"


def test_makes_a_text_encoder(tmp_path, monkeypatch, capsys):
    write_shapes(tmp_path, 8)
    assert run(monkeypatch, capsys, "text", tmp_path / "meta.csv", "--out", tmp_path / "t5")[0] == 0
    assert load_text_encoder(str(tmp_path / "t5"), 8)(["a thing"])[0].shape == (1, 8, 64)


def test_writes_a_cache(config, write, monkeypatch, capsys):
    path = Path(config.cache).with_name("config.py")
    path.write_text(dump(config))
    code, said = run(monkeypatch, capsys, "cache", path, "--windows=3", "--seed=7", "--debug")
    assert code == 0 and "26 clips, 72 windows in 5 buckets" in said.out
    write(replace(config, windows=3))
    assert not capsys.readouterr().out                                        # it was there


def test_errors_are_one_line(tmp_path, monkeypatch, capsys):
    Image.new("RGB", (5, 40)).save(tmp_path / "thin.png")
    for args, said in (((tmp_path / "no.mp4",), "no such file"), (("train",), "train: expected python vae.py CLIP | t"),
                       (("text", tmp_path / "meta.csv"), "meta.csv: expected python vae.py CLIP | train META --out"),
                       (("trian", "meta.csv", "--out", tmp_path), "trian meta.csv: expected python vae.py CLIP | tr"),
                       ((tmp_path / "thin.png",), "with H and W 8 or more, got [1, 3, 1, 40, 0]"),
                       (("train", tmp_path / "meta.csv", "--out", tmp_path), "python data.py shapes"),
                       (("cache",), "cache: expected python vae.py CLIP"),
                       (("cache", "nowhere.py"), "no config file nowhere.py"),
                       (("cache", "configs/tiny.py", "--cache="), "cache='': expected a folder"),
                       (("cache", "configs/tiny.py", "--vae=/no/such/vae"), "AutoencoderKL '/no/such/vae' is neither"),
                       (("cache", "configs/tiny.py", "--windows=0"), "windows=0: expected 1 or more"),
                       (("cache", "configs/tiny.py", "--windos=1"), "did you mean 'windows'")):
        code, output = run(monkeypatch, capsys, *args)
        assert code == 2 and output.err.startswith("error: ") and said in output.err.splitlines()[-1]
