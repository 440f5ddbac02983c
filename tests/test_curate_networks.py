"""The steps of curate.py that need a network: small random models of the published classes, saved and loaded by folder,
against calling transformers directly on the same frames."""
import base64
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import curate as M
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data import UnreadableClip, read_window, write_video
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig, LlamaConfig,
                          LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor, PPOCRV5MobileDetConfig,
                          PPOCRV5MobileDetForObjectDetection, PreTrainedTokenizerFast)

WORDS = "a the red blue dog runs over grass . , describe this video user assistant : it is".split()


def footage(T=20, H=96, W=160, seed=0):
    """Coloured noise, smooth in space, that changes over time."""
    x = torch.rand(T, 3, H // 8, W // 8, generator=torch.Generator().manual_seed(seed))
    x = F.interpolate(x, (H, W), mode="bicubic").clamp(0, 1)
    return (x * 255).byte().permute(0, 2, 3, 1).numpy()


def row_of(path, **columns):
    count = len(read_window(str(path))[0])
    return {"path": str(path), "num_frames": str(count), "text": "", "cmotion": ""} | columns


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "wide.mp4", footage(), fps=8)
    write_video(folder / "tall.mp4", footage(11, 144, 80, seed=1), fps=8)
    Image.fromarray(footage(1, 120, 121, seed=2)[0]).save(folder / "image.png")
    return [row_of(folder / name, text=text) for name, text in
            (("wide.mp4", "the red dog runs"), ("tall.mp4", "a blue grass ."), ("image.png", ""))]


def word_tokenizer(**special):
    vocab = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    bos, eos = special["bos_token"], special["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, vocab[bos]), (eos, vocab[eos])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    torch.manual_seed(0)
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    tokenizer = word_tokenizer(pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    text = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=8, pad_token_id=0, bos_token_id=2,
                          eos_token_id=3, **small)
    vision = CLIPVisionConfig(image_size=30, patch_size=6, **small)
    net = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=24))
    folder = tmp_path_factory.mktemp("clip")
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_head(path, width):
    generator = torch.Generator().manual_seed(1)
    sizes = width, 16, 8, 8, 4, 1
    state = {f"layers.{i}.{kind}": torch.randn(*shape, generator=generator)
             for i, a, b in zip(M.HEAD_LAYERS, sizes, sizes[1:])
             for kind, shape in (("weight", (b, a)), ("bias", (b,)))}
    torch.save(state, path)
    return state


def run(step, rows, options):
    step = M.STEPS[step]
    return step.load(options, "cpu")(rows, [step.prepare(row, options) for row in rows])


# ---- CLIP ----

@pytest.mark.parametrize("size", [(96, 160), (333, 128), (224, 224), (37, 300), (720, 1280), (225, 224)])
def test_clip_pixels_are_those_of_its_image_processor(size, monkeypatch):
    monkeypatch.setattr(M, "clip_size", lambda name: 224)
    frame = footage(1, *size)[0] if min(size) >= 96 else np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    theirs = CLIPImageProcessor()(Image.fromarray(frame), return_tensors="np")["pixel_values"][0]
    ours = M.clip_pixels(frame, None)
    assert ours.shape == (224, 224, 3) and ours.dtype == np.uint8
    ours = (ours / 255 - M.CLIP_MEAN) / M.CLIP_STD
    assert np.abs(ours.transpose(2, 0, 1) - theirs).max() < 1e-5


def clip_directly(folder, row, places):
    """Unit image features by transformers' own processor."""
    net = CLIPModel.from_pretrained(folder).eval()
    frames = [Image.fromarray(read_window(row["path"])[0][i].numpy()) for i in places]
    processor = CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    with torch.no_grad():
        return net, F.normalize(net.get_image_features(**processor(frames, return_tensors="pt")).pooler_output, dim=-1)


def test_aesthetic_is_the_head_on_clip_features(clips, clip_folder, tmp_path):
    state = save_head(tmp_path / "head.pth", 24)
    options = Namespace(clip_model=str(clip_folder), aesthetic_head=str(tmp_path / "head.pth"))
    for row, found, places in zip(clips, run("aesthetic", clips, options), ([0, 9, 19], [0, 5, 10], [0])):
        _, features = clip_directly(clip_folder, row, places)
        score = features
        for i in M.HEAD_LAYERS:
            score = score @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
        assert found["aes"] == pytest.approx(score.mean().item(), abs=1e-4)
        vector = np.frombuffer(base64.b64decode(found["features"]), np.float16).astype(float)
        assert vector == pytest.approx(F.normalize(features.mean(0), dim=0).numpy(), abs=1e-3)


def test_aesthetic_heads_that_do_not_fit_are_said(clip_folder, tmp_path):
    options = Namespace(clip_model=str(clip_folder), aesthetic_head=str(tmp_path / "head.pth"))
    with pytest.raises(FileNotFoundError, match="improved-aesthetic-predictor"):
        M.load_aesthetic(options, "cpu")
    save_head(tmp_path / "head.pth", 768)
    with pytest.raises(ValueError, match="width 768.* gives 24"):
        M.load_aesthetic(options, "cpu")
    for content in (b"", b"no torch file", None):
        torch.save([print], tmp_path / "head.pth") if content is None else (tmp_path / "head.pth").write_bytes(content)
        with pytest.raises(ValueError, match="holds no tensors"):
            M.load_aesthetic(options, "cpu")


def test_match_is_the_cosine_with_the_middle_frame(clips, clip_folder):
    tall = clips[1] | {"text": " ".join(WORDS)}  # longer than the 8 tokens of this model
    found = run("match", [clips[0], clips[2], tall], Namespace(clip_model=str(clip_folder)))
    assert found[1] == {"match": ""}
    for row, got, middle in ((clips[0], found[0], 9), (tall, found[2], 5)):
        net, image = clip_directly(clip_folder, row, [middle])
        tokenizer = PreTrainedTokenizerFast.from_pretrained(clip_folder)
        tokens = tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=8)
        with torch.no_grad():
            text = net.get_text_features(**tokens).pooler_output
        assert got["match"] == pytest.approx(100 * F.cosine_similarity(text, image).item(), abs=1e-3)
    assert run("match", [clips[2]], Namespace(clip_model=str(clip_folder))) == [{"match": ""}]


@pytest.mark.parametrize("step", ["aesthetic", "match", "ocr", "caption"])
def test_a_model_that_cannot_be_had_is_one_sentence(step, tmp_path):
    missing = str(tmp_path / "nothing")
    options = Namespace(clip_model=missing, aesthetic_head=missing, ocr_model=missing, captioner=missing,
                        prompt="", max_new_tokens=1)
    with pytest.raises((FileNotFoundError, ValueError), match="nothing") as caught:
        M.STEPS[step].load(options, "cpu")
    assert "\n" not in str(caught.value)


def test_frames_that_are_not_there(tmp_path):
    write_video(tmp_path / "a.mp4", footage(5))
    with pytest.raises(UnreadableClip):
        M.prepare_ocr({"path": str(tmp_path / "a.mp4"), "num_frames": "9"}, None)


# ---- text detection ----

def flood(mask):
    """The pixels of each component, by the book."""
    todo, found = set(zip(*np.nonzero(mask))), []
    while todo:
        stack, part = [todo.pop()], set()
        while stack:
            y, x = stack.pop()
            part.add((y, x))
            near = {(y + j, x + i) for j in (-1, 0, 1) for i in (-1, 0, 1)} & todo
            todo -= near
            stack += near
        found.append(frozenset(part))
    return set(found)


def test_components_are_those_of_a_flood_fill():
    noise = torch.rand(6, 40, 56, generator=torch.Generator().manual_seed(0))
    masks = noise < torch.linspace(0.1, 0.6, 6)[:, None, None]
    spiral = torch.zeros(1, 40, 56, dtype=torch.bool)
    for k in range(0, 18, 4):
        spiral[0, k, k:56 - k] = spiral[0, k:40 - k, 55 - k] = spiral[0, 39 - k, k:56 - k] = True
        spiral[0, k + 4:40 - k, k] = spiral[0, k + 4, k:k + 5] = True
    for mask, label in zip(torch.cat((masks, spiral)), M.components(torch.cat((masks, spiral)))):
        ours = {frozenset(zip(*np.nonzero(label.numpy() == k))) for k in label.unique().tolist() if k >= 0}
        assert ours == flood(mask.numpy()) and ((label >= 0) == mask).all()
    assert (M.components(torch.zeros(1, 4, 4, dtype=torch.bool)) == -1).all()


@pytest.mark.parametrize("angle", [0, 30, 45, 90])
def test_a_box_is_measured_at_any_angle(angle):
    """Against DB's unclipping of the same rectangle: area * 1.5 / perimeter on each side."""
    picture = Image.new("L", (256, 256))
    ImageDraw.Draw(picture).rectangle((68, 118, 187, 137), fill=230)  # 120 x 20
    probability = torch.from_numpy(np.array(picture.rotate(angle))).float()[None] / 255
    (area, count), = M.text_boxes(probability)
    grown = 2 * 1.5 * 120 * 20 / (2 * (120 + 20))
    assert count == 1 and area * 256 ** 2 == pytest.approx((120 + grown) * (20 + grown), rel=0.04)


def test_boxes_are_counted_per_frame_and_weak_or_tiny_ones_are_not():
    probability = torch.zeros(4, 64, 96)
    probability[1, 10:20, 10:60] = 0.9
    probability[1, 30:40, 10:60] = 0.9
    probability[1, 50:60, 10:60] = 0.5   # too weak
    probability[1, 5:7, 80:82] = 0.9     # a speck
    probability[3] = 0.9
    (a0, n0), (a1, n1), (a2, n2), (a3, n3) = M.text_boxes(probability)
    assert (n0, n1, n2, n3) == (0, 2, 0, 1) and a0 == a2 == 0 and a3 == 1
    assert a1 == pytest.approx(2 * (50 + 12.5) * (10 + 12.5) / (64 * 96), rel=1e-3)  # grown by 1.5 * 500 / 60


@pytest.fixture(scope="module")
def ocr_folder(tmp_path_factory):
    torch.manual_seed(0)
    net = PPOCRV5MobileDetForObjectDetection(PPOCRV5MobileDetConfig())
    for weight in net.parameters():
        if weight.ndim == 4:  # as it is made it answers 0.5 everywhere
            torch.nn.init.kaiming_normal_(weight)
    folder = tmp_path_factory.mktemp("ocr")
    net.save_pretrained(folder)
    return folder


def test_ocr_sees_what_transformers_sees(clips, ocr_folder):
    """96 x 160 as it is; 144 x 80, 4.5 and 2.5 times 32, and 120 x 121 at the nearest even multiples.  Three looks:
    as it is, as a negative, and enlarged twice as small frames are."""
    options = Namespace(ocr_model=str(ocr_folder))
    assert all(set(columns) == {"text_area", "ocr"} for columns in run("ocr", clips, options))
    net = PPOCRV5MobileDetForObjectDetection.from_pretrained(ocr_folder).eval()

    def directly(x):
        x = ((x[..., ::-1] / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)).transpose(0, 3, 1, 2)
        with torch.no_grad():
            return net(torch.from_numpy(x).float()).last_hidden_state
    for row, places, size in zip(clips, ([0, 9, 19], [0, 5, 10], [0]), ((96, 160), (128, 64), (128, 128))):
        frames = [Image.fromarray(read_window(row["path"])[0][place].numpy()) for place in places]
        x = np.stack([np.array(frame.resize(size[::-1], Image.Resampling.BILINEAR)) for frame in frames])
        assert (M.prepare_ocr(row, options) == x).all()
        large = F.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2).float(), [2 * n for n in size], mode="bilinear")
        large = F.interpolate(directly(large.permute(0, 2, 3, 1).numpy()), size, mode="bilinear")
        looks = torch.stack([directly(x), directly(255 - x), large])[:, :, 0]
        assert looks.std() > 1e-3 and (looks[0].amax((1, 2)) > M.TEXT).all()
        with torch.inference_mode():
            assert torch.allclose(M.text_probability(net, torch.from_numpy(x)), looks.amin(0), atol=1e-4)


def test_ocr_takes_the_frame_with_most_text_and_batches_by_size(monkeypatch):
    """Brightness stands for probability."""
    monkeypatch.setattr(M, "text_probability", lambda net, x: x[..., 0].float() / 255)
    one, two = np.zeros((3, 64, 96, 3), np.uint8), np.zeros((2, 96, 64, 3), np.uint8)
    one[1, 10:20, 10:60] = one[2, 10:14, 10:20] = one[2, 30:34, 10:20] = two[0, 40:60, 10:50] = 230
    found = M.ocr(None, [{}] * 3, [one, two, one[:1]])
    assert [columns["ocr"] for columns in found] == [1, 1, 0]
    assert found[0]["text_area"] == M.text_boxes(torch.from_numpy(one[1:2, ..., 0] / 255))[0][0]


# ---- captions ----

LLAVA_TEMPLATE = ("<s>{% for m in messages %}{{ m['role'] }} : {% for c in m['content'] %}{% if c['type'] == 'image' %}"
                  "<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}"
                  "{% if add_generation_prompt %}assistant :{% endif %}")


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    torch.manual_seed(3)
    special = dict(pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>", image_token="<image>")
    tokenizer = word_tokenizer(**special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    small = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = LlavaConfig(vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **small), text_config=LlamaConfig(
                             vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=2, eos_token_id=3, **small),
                         image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    net = LlavaForConditionalGeneration(config)
    net.generation_config.eos_token_id, net.generation_config.pad_token_id = 3, 0
    for weight in net.parameters():  # small random weights say one word for ever
        torch.nn.init.normal_(weight, std=0.3)
    net.lm_head.weight.data[[0, 1, 2, 4]] = 0  # no special word but the end is written
    processor = LlavaProcessor(CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
                               tokenizer, patch_size=14, vision_feature_select_strategy="default",
                               chat_template=LLAVA_TEMPLATE, num_additional_image_tokens=1)
    folder = tmp_path_factory.mktemp("llava")
    net.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def caption_directly(folder, row, places, prompt, new):
    """One clip by itself, without padding, token by token."""
    net = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor = LlavaProcessor.from_pretrained(folder)
    frames = [Image.fromarray(read_window(row["path"])[0][i].numpy()) for i in places]
    text = "<s>user : " + "<image> " * len(frames) + prompt + " assistant :"
    inputs = processor(text=text, images=frames, return_tensors="pt", add_special_tokens=False)
    ids, words = inputs.input_ids, []
    assert ids.shape[1] == 1 + 2 + 4 * len(frames) + len(prompt.split()) + 2
    for _ in range(new):
        with torch.no_grad():
            word = net(input_ids=ids, pixel_values=inputs.pixel_values).logits[:, -1:].argmax(-1)
        if word == 3:
            break
        words.append(word.item())
        ids = torch.cat((ids, word), 1)
    return processor.tokenizer.decode(words, skip_special_tokens=True)


def test_captions_are_what_the_model_writes(clips, llava_folder):
    options = Namespace(captioner=str(llava_folder), max_new_tokens=12,
                        prompt="describe this video .")
    work = M.load_caption(options, "cpu")
    answers, = work.args
    prepared = [M.prepare_caption(row, options) for row in clips]
    assert [len(frames) for frames in prepared] == [4, 4, 1]  # padded on the left in one batch with the image
    said = answers(prepared)
    texts = [caption_directly(llava_folder, row, places, options.prompt, 12)
             for row, places in zip(clips, ([2, 7, 12, 17], [1, 4, 6, 9], [0]))]
    assert [text for text, _ in said] == texts and len(set(texts)) > 1 and all(texts)
    rows = [clips[0] | {"cmotion": "pan right"}, *clips[1:]]
    assert work(rows, prepared) == [{"text": M.clean(text, ended) + end} for (text, ended), end in
                                    zip(said, (" camera motion: pan right.", "", ""))]


def test_captioners_that_cannot_work_here_are_one_sentence(llava_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(llava_folder, tmp_path / "no_template")
    (folder / "chat_template.jinja").unlink()
    options = Namespace(captioner=str(folder), prompt="", max_new_tokens=1)
    with pytest.raises(ValueError, match="has no chat template"):
        M.load_caption(options, "cpu")

    def needs_a_package(*_, **__):
        raise ImportError("Package `num2words` is required to run SmolVLM processor.\nInstall it")
    monkeypatch.setattr(M.AutoProcessor, "from_pretrained", needs_a_package)
    with pytest.raises(ValueError, match="cannot be built here: Package `num2words` is required") as caught:
        M.load_caption(options, "cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text, cleaned", [
    ("The video shows a man walking.", "A man walking."),
    ("In this video, a dog runs.", "A dog runs."),
    ("In the video clip, we can see two cats.", "Two cats."),
    ("The image depicts the sea.", "The sea."),
    ("The frames show a boat.", "A boat."),
    ("These four images depict a boat.", "A boat."),
    ("The video begins with a close-up of a hand.", "A close-up of a hand."),
    ("The video is a drone shot of a city.", "A drone shot of a city."),
    ("Sure! The video shows a man.", "A man."),
    ("Here is a description: The scene features a house.", "A house."),
    ("the video presents\n  snow.", "Snow."),
    ("The video game is old.", "The video game is old."),       # and what is none
    ("In the video game arcade, boys play.", "In the video game arcade, boys play."),
    ("The image of a saint hangs on a wall.", "The image of a saint hangs on a wall."),
    ("A man shows a video.", "A man shows a video."),
    ("The scene is lit by the sun.", "The scene is lit by the sun."),
    ("Scenes of a market. The video shows fish.", "Scenes of a market. The video shows fish."),
    ("", ""),
])
def test_words_about_the_video_are_taken_off(text, cleaned):
    assert M.clean(text) == cleaned


@pytest.mark.parametrize("text, cleaned", [
    ("A dog runs. It wags its", "A dog runs."),
    ('He says "stop." Then he leaves the', 'He says "stop."'),
    ("It is 3.5 metres long and", "It is 3.5 metres long and"),  # the only sentence stays
    ("A dog. A cat.", "A dog. A cat."),
])
def test_a_sentence_that_was_cut_off_is_dropped(text, cleaned):
    assert M.clean(text, ended=False) == cleaned and M.clean(text) == text


def test_refusals_give_no_caption_and_are_said(capsys):
    row = {"path": "a.mp4", "cmotion": "static"}
    texts_of = lambda texts: [columns["text"] for columns in
                              M.caption(lambda clips: [(text, True) for text in texts], [row] * len(texts), None)]
    refusals = ["I'm sorry, I cannot help with that.", "I’m unable to see the video.", "I cannot describe people.",
                "As an AI language model, I do not watch videos.", "Sorry, but no.", "Unfortunately, I can't tell.",
                "I apologize, the frames are dark.", "I am not able to view images."]
    assert texts_of([*refusals, "A dog."]) == [""] * len(refusals) + ["A dog. camera motion: static."]
    assert capsys.readouterr().err.startswith("8 of 9 clips get no caption, the model said \"I'm sorry")
    texts = ["An ice cream melts.", "I love NY is written on a shirt.", "A sorry dog looks up."]
    assert texts_of(texts) == [f"{text} camera motion: static." for text in texts]
    row["cmotion"] = ""
    assert texts_of(["A dog.", ""]) == ["A dog.", ""] and not capsys.readouterr().err


# ---- the real detector on real footage ----

@pytest.mark.skipif(not {"NANOSORA_MODELS", "NANOSORA_CLIPS"} <= os.environ.keys(),
                    reason="NANOSORA_MODELS and NANOSORA_CLIPS name no folders with ppocrv5_det and the clips")
@pytest.mark.parametrize("turn", [0, 1])
def test_text_area_on_real_footage(turn):
    """Frames seen to have text, credits and titles, and seen to have none: fur, petals, leaves, lit windows.

    Credits in letters of 12 pixels of 720 are lost when they stand upright: the half-sized look misses them;
    frames 853 and 1395 on their side keep a patch of fur of 0.013 and 0.009."""
    net = M.net_of(M.AutoModelForObjectDetection, str(Path(os.environ["NANOSORA_MODELS"]) / "ppocrv5_det"), "cpu")
    seen = {True: {"bbb_titles_text_720p24.mp4": [516], "bbb_credits_text_720p24.mp4": [0, 108] + [359] * (not turn),
                   "caminandes_title_text_960x540.mp4": [20, 49], "concert_multicam_176x144_vp9_60s.webm": [76, 303]},
            False: {"bbb_action_720p24.mp4": [0, 972], "bbb_multishot_720p24_audio.mp4": [853, 1395] * (not turn),
                    "bbb_titles_text_720p24.mp4": [0, 425], "bbb_singleshot_720p25_audio.mp4": [7],
                    "city_cc0_720x405_mpeg2.mpg": [80, 99], "derived_bbb_portrait_406x720.mp4": [8, 91],
                    "derived_city_portrait_228x405_yuv444.mp4": [40]}}
    for text, clips in seen.items():
        for name, places in clips.items():
            frames = M.read_frames({"path": str(Path(os.environ["NANOSORA_CLIPS"]) / name)}, places)
            prepared = [M.fitted([np.rot90(frame, turn)], M.OCR_SIDE, 32) for frame in frames]
            for place, columns in zip(places, M.ocr(net, frames, prepared)):
                assert columns["text_area"] > 0.01 if text else columns["text_area"] < 0.002, (name, place, columns)


# ---- all of them, as a user starts them ----

def test_a_run_with_all_networks(clips, clip_folder, ocr_folder, llava_folder, tmp_path):
    """Two ranks, one after the other; then a second run that has nothing left to do, not even to load."""
    head = {}
    for i, a, b in zip(M.HEAD_LAYERS, (24, 32, 16, 8, 4), (32, 16, 8, 4, 1)):
        head |= {f"layers.{i}.weight": torch.randn(b, a), f"layers.{i}.bias": torch.randn(b)}
    torch.save(head, tmp_path / "head.pth")
    out = tmp_path / "out"
    command = [sys.executable, "curate.py", "run", str(Path(clips[0]["path"]).parent), "--out", str(out),
               "--with", "match,aesthetic,caption,ocr", f"--clip-model={clip_folder}", f"--ocr-model={ocr_folder}",
               f"--aesthetic-head={tmp_path / 'head.pth'}", f"--captioner={llava_folder}", "--max-new-tokens=4",
               "--prompt=describe", "--min-seconds=1", "--workers=1",
               "--no-dedup",  # to random weights all pictures are alike
               *(f"--{rule}=none" for rule in ("min-aesthetic", "min-match", "max-text-area", "min-flow", "max-uniform",
                                               "min-sharpness", "max-repeats", "max-held"))]
    ranks = [subprocess.Popen(command, cwd=Path(M.__file__).parent, stderr=subprocess.PIPE, text=True, env=os.environ |
                              {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}) for rank in (1, 0)]
    for process in ranks:
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 0 and "not done" not in error, error
    rows = {Path(row["source"]).name: row for row in M.read_table(out / "meta.csv")}
    assert rows.keys() == {"wide.mp4", "tall.mp4", "image.png"} and "features" not in rows["wide.mp4"]
    for name, row in rows.items():
        assert all(row[column] for column in ("aes", "ocr", "text_area")) and bool(row["match"]) == bool(row["text"])
        assert bool(row["flow"]) == (name != "image.png") and bool(row["cmotion"]) == ("camera motion" in row["text"])
    shutil.rmtree(llava_folder)
    again = subprocess.run(command, cwd=Path(M.__file__).parent, capture_output=True, text=True)
    assert again.returncode == 0 and "not done" not in again.stderr
    assert {Path(row["source"]).name: row for row in M.read_table(out / "meta.csv")} == rows
