"""Tests of the steps of curate.py that need a network.

The networks are small random models of the published classes, saved to folders.  Each step runs on a table of clips;
what it writes there is compared with calling transformers directly on the same frames.
"""
import contextlib
import csv
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import curate
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from data import read_window, write_video
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig, LlamaConfig,
                          LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PPOCRV5MobileDetConfig,
                          PPOCRV5MobileDetForObjectDetection, PreTrainedTokenizerFast)

ROOT = Path(__file__).parents[1]
WORDS = "a the red blue dog runs over grass . , describe this video user assistant : it is".split()
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
HEAD_LAYERS = (0, 2, 4, 6, 7)           # the linear layers of LAION's aesthetic predictor


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Makes torch use one thread, as curating processes do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- clips, tables and small models ----

def coloured_noise(num_frames, height, width, seed):
    """Returns uint8 [T H W 3]: smooth colours that change over time."""
    noise = torch.rand(num_frames, 3, height // 8, width // 8, generator=torch.Generator().manual_seed(seed))
    frames = F.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)
    return (frames * 255).byte().permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """The rows of a wide clip, a tall clip and an image without a text."""
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "wide.mp4", coloured_noise(20, 96, 160, seed=0), fps=8)
    write_video(folder / "tall.mp4", coloured_noise(11, 144, 80, seed=1), fps=8)
    Image.fromarray(coloured_noise(1, 120, 121, seed=2)[0]).save(folder / "image.png")
    return [{"path": str(folder / "wide.mp4"), "num_frames": "20", "text": "the red dog runs", "cmotion": "pan right"},
            {"path": str(folder / "tall.mp4"), "num_frames": "11", "text": " ".join(WORDS), "cmotion": ""},
            {"path": str(folder / "image.png"), "num_frames": "1", "text": "", "cmotion": ""}]


# The numbers of the frames that a step looks at: the first, middle and last, the middle, or four that are spread.
ENDS_AND_MIDDLE = ([0, 9, 19], [0, 5, 10], [0])
MIDDLE = ([9], [5], [0])
SPREAD = ([2, 7, 12, 17], [1, 4, 6, 9], [0])


def frames_of(row, numbers):
    """Returns frames of a clip as images."""
    frames = read_window(row["path"])[0].numpy()
    return [Image.fromarray(frames[number]) for number in numbers]


def write_rows(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def word_tokenizer(**special):
    """Returns a tokenizer whose tokens are the words of WORDS."""
    vocabulary = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    bos = special["bos_token"]
    eos = special["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, vocabulary[bos]), (eos, vocabulary[eos])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of 30 x 30 pixels, 8 tokens and features of width 24."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=8, pad_token_id=0, bos_token_id=2,
                          eos_token_id=3, **SMALL)
    vision = CLIPVisionConfig(image_size=30, patch_size=6, **SMALL)
    net = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24))
    folder = tmp_path_factory.mktemp("clip")
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_head(path, width):
    """Saves an aesthetic head that takes features of `width`; returns its tensors."""
    generator = torch.Generator().manual_seed(1)
    sizes = (width, 16, 8, 8, 4, 1)
    state = {}
    for layer, fan_in, fan_out in zip(HEAD_LAYERS, sizes, sizes[1:]):
        state[f"layers.{layer}.weight"] = torch.randn(fan_out, fan_in, generator=generator)
        state[f"layers.{layer}.bias"] = torch.randn(fan_out, generator=generator)
    torch.save(state, path)
    return state


@pytest.fixture(scope="module")
def ocr_folder(tmp_path_factory):
    """A text detector whose answers differ from place to place."""
    torch.manual_seed(0)
    net = PPOCRV5MobileDetForObjectDetection(PPOCRV5MobileDetConfig())
    for weight in net.parameters():
        if weight.ndim == 4:            # as it is initialised, the answer is 0.5 everywhere
            torch.nn.init.kaiming_normal_(weight)
    folder = tmp_path_factory.mktemp("ocr")
    net.save_pretrained(folder)
    return folder


LLAVA_TEMPLATE = ("<s>{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}{% if c['type'] == 'image' %}"
                  "<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
                  "{% if add_generation_prompt %}assistant :{% endif %}")


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    """A captioner that looks at 28 x 28 pixels and writes the words of WORDS."""
    tokenizer = word_tokenizer(pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                               image_token="<image>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vision = CLIPVisionConfig(image_size=28, patch_size=14, **SMALL)
    text = LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=2, eos_token_id=3, **SMALL)
    net = LlavaForConditionalGeneration(LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>")))
    net.generation_config.eos_token_id = 3
    net.generation_config.pad_token_id = 0
    torch.manual_seed(6)
    for weight in net.parameters():     # with smaller weights the answer does not depend on the frames
        torch.nn.init.normal_(weight, std=0.6)
    net.lm_head.weight.data[[0, 1, 2, 4]] = 0           # of the special tokens, only the end is written
    image_processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(image_processor, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                               chat_template=LLAVA_TEMPLATE, num_additional_image_tokens=1)
    folder = tmp_path_factory.mktemp("llava")
    net.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


PROMPT = "describe this video ."


def flags(clip_folder, head, ocr_folder, llava_folder):
    """Returns the flags of all networks."""
    return [f"--clip-model={clip_folder}", f"--aesthetic-head={head}", f"--ocr-model={ocr_folder}",
            f"--captioner={llava_folder}", f"--prompt={PROMPT}", "--max-new-tokens=12", "--workers=1"]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """The file of an aesthetic head that fits, and its tensors."""
    path = tmp_path_factory.mktemp("head") / "head.pth"
    return path, save_head(path, 24)


@pytest.fixture(scope="module")
def measured(clips, clip_folder, head, ocr_folder, llava_folder, tmp_path_factory):
    """The table of the clips after all steps; the captions came last, so that the match is that of the given texts."""
    table = tmp_path_factory.mktemp("table") / "own.csv"
    write_rows(table, clips)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        for step in ("aesthetic", "match", "ocr", "caption"):
            curate.main([step, str(table), *flags(clip_folder, head[0], ocr_folder, llava_folder)])
    return read_rows(table)


# ---- CLIP ----

@pytest.fixture(scope="module")
def clip_net(clip_folder):
    return CLIPModel.from_pretrained(clip_folder).eval()


@torch.no_grad()
def clip_features(net, images):
    """Returns unit features of images by transformers' own processor."""
    processor = CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    pixels = processor(images, return_tensors="pt")
    return F.normalize(net.get_image_features(**pixels).pooler_output, dim=-1)


def aesthetic_score(features, state):
    for layer in HEAD_LAYERS:
        features = features @ state[f"layers.{layer}.weight"].T + state[f"layers.{layer}.bias"]
    return features.mean().item()


def test_the_aesthetic_score_is_the_heads_answer_to_the_features_of_three_frames(clips, measured, clip_net, head):
    for clip, row, numbers in zip(clips, measured, ENDS_AND_MIDDLE, strict=True):
        expected = aesthetic_score(clip_features(clip_net, frames_of(clip, numbers)), head[1])
        assert float(row["aes"]) == pytest.approx(expected, abs=1e-3)
    assert len({row["aes"] for row in measured}) == 3


def test_pictures_of_any_shape_reach_clip_as_its_own_processor_makes_them(clip_folder, clip_net, head, tmp_path,
                                                                          run_script):
    rows = []
    for height, width in ((96, 160), (333, 128), (30, 30), (37, 300), (31, 30)):
        noise = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
        path = tmp_path / f"{height}x{width}.png"
        Image.fromarray(noise).save(path)
        rows.append({"path": str(path), "num_frames": "1"})
    write_rows(tmp_path / "own.csv", rows)
    ended = run_script("curate", "aesthetic", tmp_path / "own.csv", f"--clip-model={clip_folder}",
                       f"--aesthetic-head={head[0]}", "--workers=1")
    assert ended.status == 0
    for row in read_rows(tmp_path / "own.csv"):
        expected = aesthetic_score(clip_features(clip_net, [Image.open(row["path"])]), head[1])
        assert float(row["aes"]) == pytest.approx(expected, abs=1e-3), row["path"]


def test_match_is_the_cosine_of_the_clips_own_text_and_its_middle_frame(clips, measured, clip_folder, clip_net):
    """The second text is longer than the 8 tokens of this model."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(clip_folder)
    for clip, row, numbers in zip(clips[:2], measured, MIDDLE):
        tokens = tokenizer(clip["text"], return_tensors="pt", truncation=True, max_length=8)
        with torch.no_grad():
            text = clip_net.get_text_features(**tokens).pooler_output
        image = clip_features(clip_net, frames_of(clip, numbers))
        assert float(row["match"]) == pytest.approx(100 * F.cosine_similarity(text, image).item(), abs=1e-3)
    assert measured[2]["match"] == "", "there is nothing to match with"


def test_a_table_without_any_text_gets_no_match(clips, clip_folder, tmp_path, run_script):
    write_rows(tmp_path / "own.csv", clips[2:])
    assert run_script("curate", "match", tmp_path / "own.csv", f"--clip-model={clip_folder}").status == 0
    assert read_rows(tmp_path / "own.csv")[0]["match"] == ""


@pytest.mark.parametrize("content, named", [
    (None, "head.pth"), (b"", "head.pth"), (b"no torch file", "head.pth"), ({"weight": torch.ones(1)}, "head.pth"),
    ({f"layers.{i}.{kind}": torch.tensor(1.0) for i in HEAD_LAYERS for kind in ("weight", "bias")}, "head.pth"),
    ({f"layers.{i}.weight": 1.0 for i in HEAD_LAYERS}, "head.pth"), ("width 768", "768")],
    ids=["missing", "empty", "no torch file", "other tensors", "scalars", "no tensors", "another width"])
def test_an_aesthetic_head_that_cannot_be_used_is_one_line(content, named, clips, clip_folder, tmp_path, run_script):
    write_rows(tmp_path / "own.csv", clips)
    path = tmp_path / "head.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        torch.save(content, path)
    elif content:
        save_head(path, 768)
    ended = run_script("curate", "aesthetic", tmp_path / "own.csv", f"--clip-model={clip_folder}",
                       f"--aesthetic-head={path}")
    assert ended.status == 2 and named in ended.err.splitlines()[-1] and "Traceback" not in ended.err


# ---- all steps ----

@pytest.mark.parametrize("step", ["aesthetic", "match", "ocr", "caption"])
def test_a_model_that_cannot_be_had_is_one_line(step, clips, tmp_path, run_script):
    write_rows(tmp_path / "own.csv", clips)
    missing = tmp_path / "nothing"
    ended = run_script("curate", step, tmp_path / "own.csv", *flags(missing, missing, missing, missing))
    assert ended.status == 2 and "nothing" in ended.err.splitlines()[-1] and "Traceback" not in ended.err


def test_a_clip_that_lacks_frames_or_their_number_becomes_an_error_in_its_row(clips, ocr_folder, tmp_path, run_script):
    rows = [clips[2], clips[1] | {"num_frames": "12"}, clips[1] | {"num_frames": ""}]
    write_rows(tmp_path / "own.csv", rows)
    assert run_script("curate", "ocr", tmp_path / "own.csv", f"--ocr-model={ocr_folder}").status == 0
    good, short, unknown = read_rows(tmp_path / "own.csv")
    assert good["text_area"] and not good["error"]
    assert "tall.mp4" in short["error"] and "num_frames" in unknown["error"] and not short["text_area"]


RULES_OFF = [f"--{rule}=none" for rule in ("min-aesthetic", "min-match", "max-text-area", "min-flow", "max-shake",
                                           "min-sharpness", "max-repeats", "max-held")]


def test_a_run_with_networks_measures_captions_and_matches(clips, clip_folder, head, ocr_folder, llava_folder,
                                                           tmp_path, run_script):
    """The match is that of the caption which the captioner wrote, and a second run loads no model."""
    (tmp_path / "videos").mkdir()
    for name in ("tall.mp4", "image.png"):
        shutil.copy(Path(clips[0]["path"]).with_name(name), tmp_path / "videos")
    captioner = shutil.copytree(llava_folder, tmp_path / "captioner")
    command = ["curate", "run", tmp_path / "videos", "--out", tmp_path / "out", "--min-seconds=1", "--no-dedup",
               "--with", "match,aesthetic,caption,ocr", *RULES_OFF, *flags(clip_folder, head[0], ocr_folder, captioner)]
    ended = run_script(*command)
    assert ended.status == 0 and "not done" not in ended.err
    rows = read_rows(tmp_path / "out" / "meta.csv")
    assert [Path(row["path"]).name for row in rows][0] == "image.png" and len(rows) == 2
    image, video = rows
    for row in rows:
        assert all(row[column] for column in ("aes", "text_area", "match", "text", "brightness"))
    assert ("camera motion" in video["text"]) == bool(video["cmotion"]) and not image["flow"]
    write_rows(tmp_path / "out" / "own.csv", [row | {"match": ""} for row in rows])
    assert run_script("curate", "match", tmp_path / "out" / "own.csv", f"--clip-model={clip_folder}").status == 0
    for row, own in zip(rows, read_rows(tmp_path / "out" / "own.csv")):
        assert float(own["match"]) == pytest.approx(float(row["match"]), abs=1e-3)
    shutil.rmtree(captioner)
    again = run_script(*command)
    assert again.status == 0 and "not done" not in again.err
    assert read_rows(tmp_path / "out" / "meta.csv") == rows


def test_a_network_that_cannot_be_had_leaves_the_rest_of_a_run(clips, tmp_path, run_script):
    (tmp_path / "videos").mkdir()
    shutil.copy(clips[2]["path"], tmp_path / "videos")
    ended = run_script("curate", "run", tmp_path / "videos", "--out", tmp_path / "out", "--with=ocr",
                       "--ocr-model=nowhere", *RULES_OFF)
    assert ended.status == 0 and "ocr" in ended.err and "'nowhere'" in ended.err and "Traceback" not in ended.err
    assert len(read_rows(tmp_path / "out" / "meta.csv")) == 1


# ---- text detection ----

@torch.no_grad()
def text_probability(net, frames, scale):
    """Returns the least probability of text [N h w] of three looks at frames [N h w 3], as transformers sees them."""
    pixels = torch.from_numpy(np.stack([np.array(frame) for frame in frames])).permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]

    def detect(x):
        return net((x.flip(1) - mean) / std).last_hidden_state      # the channels are B G R
    size = pixels.shape[2:]
    scaled = F.interpolate(pixels, [side * scale for side in size], mode="bilinear")
    looks = torch.cat((detect(pixels), detect(1 - pixels), F.interpolate(detect(scaled), size, mode="bilinear")), 1)
    assert looks.std() > 1e-3
    return looks.amin(1)


def test_text_is_what_the_detector_sees_in_three_looks_at_the_frame_with_most_text(clips, measured, ocr_folder):
    """Frames are resized to the nearest multiple of 32: 144 x 80 and 120 x 121 are halfway or nearer to 128 x 64."""
    net = PPOCRV5MobileDetForObjectDetection.from_pretrained(ocr_folder).eval()
    sizes = ((96, 160), (128, 64), (128, 128))
    areas = []
    for clip, row, numbers, (height, width) in zip(clips, measured, ENDS_AND_MIDDLE, sizes, strict=True):
        frames = [frame.resize((width, height), Image.Resampling.BILINEAR) for frame in frames_of(clip, numbers)]
        is_text = text_probability(net, frames, scale=2) > 0.3
        area = is_text.float().mean((1, 2)).max().item()
        assert float(row["text_area"]) == pytest.approx(area, abs=1e-3)
        areas.append(area)
    assert max(areas) > 0.01


@pytest.mark.slow
@pytest.mark.skipif(not {"NANOSORA_MODELS", "NANOSORA_CLIPS"} <= os.environ.keys(),
                    reason="NANOSORA_MODELS and NANOSORA_CLIPS name no folders with ppocrv5_det and the clips")
@pytest.mark.parametrize("turn", [0, 1])
def test_the_published_detector_tells_titles_from_fur_and_lit_windows(turn, tmp_path, run_script):
    """Credits of 12 pixels are lost when they stand upright, and two frames on their side keep a patch of fur."""
    with_text = {"bbb_titles_text_720p24.mp4": [516], "bbb_credits_text_720p24.mp4": [0, 108] + [359] * (not turn),
                 "caminandes_title_text_960x540.mp4": [20, 49], "concert_multicam_176x144_vp9_60s.webm": [76, 303]}
    without = {"bbb_action_720p24.mp4": [0, 972], "bbb_multishot_720p24_audio.mp4": [853, 1395] * (not turn),
               "bbb_titles_text_720p24.mp4": [0, 425], "bbb_singleshot_720p25_audio.mp4": [7],
               "city_cc0_720x405_mpeg2.mpg": [80, 99], "derived_bbb_portrait_406x720.mp4": [8, 91],
               "derived_city_portrait_228x405_yuv444.mp4": [40]}
    rows = []
    for kind, names in (("text", with_text), ("none", without)):
        for name, numbers in names.items():
            for number in numbers:
                clip = str(Path(os.environ["NANOSORA_CLIPS"], name))
                frame = read_window(clip, 1, start=number)[0][0].numpy()
                path = tmp_path / f"{kind}-{name}-{number}.png"
                Image.fromarray(np.rot90(frame, turn)).save(path)
                rows.append({"path": path.name, "num_frames": "1"})
    write_rows(tmp_path / "own.csv", rows)
    detector = Path(os.environ["NANOSORA_MODELS"], "ppocrv5_det")
    assert run_script("curate", "ocr", tmp_path / "own.csv", f"--ocr-model={detector}").status == 0
    for row in read_rows(tmp_path / "own.csv"):
        area = float(row["text_area"])
        assert area > 0.004 if row["path"].startswith("text") else area < 0.002, (row["path"], area)


# ---- captions ----

@torch.no_grad()
def write_caption(net, processor, images, max_new_tokens):
    """Returns what the model writes about one clip by itself, without padding, token by token; and if it ended."""
    text = "<s>user : " + "<image> " * len(images) + PROMPT + " assistant :"
    inputs = processor(text=text, images=images, return_tensors="pt", add_special_tokens=False)
    ids = inputs.input_ids
    words = []
    for _ in range(max_new_tokens):
        word = net(input_ids=ids, pixel_values=inputs.pixel_values).logits[:, -1:].argmax(-1)
        if word == 3:
            return processor.tokenizer.decode(words, skip_special_tokens=True), True
        words.append(word.item())
        ids = torch.cat((ids, word), 1)
    return processor.tokenizer.decode(words, skip_special_tokens=True), False


def test_captions_are_what_the_model_writes_and_name_the_cameras_motion(clips, measured, llava_folder):
    """The three clips are padded to one batch; the image has one frame, the others four."""
    net = LlavaForConditionalGeneration.from_pretrained(llava_folder).eval()
    processor = LlavaProcessor.from_pretrained(llava_folder)
    texts = []
    for clip, row, numbers in zip(clips, measured, SPREAD, strict=True):
        text, ended = write_caption(net, processor, frames_of(clip, numbers), 12)
        motion = f" camera motion: {clip['cmotion']}." if clip["cmotion"] else ""
        assert row["text"] == curate.clean_answer(text, ended) + motion and text
        texts.append(text)
    assert len(set(texts)) == 3
    other, _ = write_caption(net, processor, frames_of(clips[0], [0, 5, 10, 15]), 12)
    assert other != texts[0], "the text depends on which frames are shown"


def test_captioners_that_cannot_work_here_are_one_line(clips, llava_folder, tmp_path, run_script, monkeypatch):
    write_rows(tmp_path / "own.csv", clips)
    folder = shutil.copytree(llava_folder, tmp_path / "no_template")
    (folder / "chat_template.jinja").unlink()
    ended = run_script("curate", "caption", tmp_path / "own.csv", f"--captioner={folder}")
    assert ended.status == 2 and "no_template" in ended.err and "chat template" in ended.err.splitlines()[-1]

    def needs_a_package(*_, **__):
        raise ImportError("Package `num2words` is required to run SmolVLM processor.\nInstall it")
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", needs_a_package)
    ended = run_script("curate", "caption", tmp_path / "own.csv", f"--captioner={folder}")
    assert ended.status == 2 and "num2words" in ended.err.splitlines()[-1]


@pytest.mark.parametrize("text, cleaned", [
    ("The video shows a man walking.", "A man walking."),
    ("In the video clip, we can see two cats.", "Two cats."),
    ("These four images depict a boat.", "A boat."),
    ("The video begins with a close-up of a hand.", "A close-up of a hand."),
    ("The video is a drone shot of a city.", "A drone shot of a city."),
    ("Sure! The video shows a man.", "A man."),
    ("Here is a description: The scene features a house.", "A house."),
    ("the video presents\n  snow.", "Snow."),
    ("The video game is old.", "The video game is old."),
    ("The image of a saint hangs on a wall.", "The image of a saint hangs on a wall."),
    ("The scene is lit by the sun.", "The scene is lit by the sun."),
    ("Scenes of a market. The video shows fish.", "Scenes of a market. The video shows fish."),
    ("An ice cream melts.", "An ice cream melts."),
    ("I love NY is written on a shirt.", "I love NY is written on a shirt."),
    ("A sorry dog looks up.", "A sorry dog looks up."),
    ("I'm sorry, I cannot help with that.", ""),
    ("I\N{RIGHT SINGLE QUOTATION MARK}m unable to see the video.", ""),
    ("As an AI language model, I do not watch videos.", ""),
    ("Unfortunately, I can't tell.", ""),
    ("I apologize, the frames are dark.", ""),
    ("", ""),
])
def test_words_about_the_video_are_taken_off_and_a_refusal_is_no_caption(text, cleaned):
    assert curate.clean_answer(text) == cleaned


@pytest.mark.parametrize("text, cleaned", [
    ("A dog runs. It wags its", "A dog runs."),
    ('He says "stop." Then he leaves the', 'He says "stop."'),
    ("It is 3.5 metres long and", "It is 3.5 metres long and"),
    ("A dog. A cat.", "A dog. A cat."),
])
def test_a_sentence_that_was_cut_off_is_dropped_unless_it_is_the_only_one(text, cleaned):
    assert curate.clean_answer(text, has_ended=False) == cleaned
    assert curate.clean_answer(text) == text


# ---- slow: two ranks ----

@pytest.mark.slow
def test_two_ranks_with_networks_make_the_table_of_one(clips, clip_folder, head, ocr_folder, llava_folder, tmp_path):
    tables = []
    for world in (1, 2):
        out = tmp_path / f"out{world}"
        command = [sys.executable, "curate.py", "run", Path(clips[0]["path"]).parent, "--out", out, "--min-seconds=1",
                   "--no-dedup", "--with=match,aesthetic,caption,ocr", *RULES_OFF,
                   *flags(clip_folder, head[0], ocr_folder, llava_folder)]
        ranks = []
        for rank in range(world):
            environment = os.environ | {"RANK": str(rank), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
            ranks.append(subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                          text=True, env=environment))
        for process in ranks:
            error = process.communicate(timeout=200)[1]
            assert process.returncode == 0 and "not done" not in error, error
        tables.append((out / "meta.csv").read_text())
    assert tables[0] == tables[1] and len(tables[0].splitlines()) == 4
