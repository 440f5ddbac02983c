"""Tests the shapes world (assets/shapes.py, `python -m assets.shapes`) and the reader that judges samples of it."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reader import check_vae, colorful, hue_between, obey, prompts, read_clip

import data
from assets import shapes

ROOT = Path(__file__).parents[1]
# The first clips of world 0, on which the shipped weights were trained.
CAPTIONS = ["a green triangle moves down", "a purple circle moves up", "a yellow triangle", "a green square moves left",
            "a blue square moves left"]
FRAMES = [(8, 64, 64, 3), (16, 64, 64, 3), (1, 64, 64, 3), (16, 64, 64, 3), (16, 64, 96, 3)]
PLACES = [24.614222068, 38.103339726, 22.349484962, 38.103339726, 53.031905542]     # of the first: side, start, end


@pytest.fixture(scope="module")
def clips():
    """The first 400 clips of world 0: (frames, caption, thing)."""
    return [shapes.shapes_clip(0, index) for index in range(400)]


@pytest.fixture(scope="module")
def moving(clips):
    """The first 12 of them that move."""
    return [clip for clip in clips if len(clip[0]) > 1][:12]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> Path:
    """A folder with the first 12 clips of world 0."""
    folder = tmp_path_factory.mktemp("rendered")
    shapes.write_shapes(folder, 12)
    return folder


# ---- the world ----

def test_a_clip_is_a_function_of_seed_and_index(clips):
    frames, caption, thing = shapes.shapes_clip(0, 17)
    assert np.array_equal(frames, clips[17][0])
    assert (caption, thing) == clips[17][1:]
    assert not np.array_equal(frames, clips[18][0])
    assert not np.array_equal(frames, shapes.shapes_clip(1, 17)[0])


def test_the_world_is_the_one_that_the_shipped_weights_know(clips):
    assert [caption for _, caption, _ in clips[:5]] == CAPTIONS
    assert [frames.shape for frames, *_ in clips[:5]] == FRAMES
    thing = clips[0][2]
    assert [thing.side, *thing.start, *thing.end] == pytest.approx(PLACES, rel=1e-6)


def test_the_world_is_as_rich_as_promised(clips):
    """60 of the 72 combinations occur, the others are kept for tests; a caption says what is seen."""
    assert {frames.shape[0] for frames, *_ in clips} == {1, 8, 16}
    assert {frames.shape[1:3] for frames, *_ in clips} == {(64, 64), (64, 96)}
    looks = {(thing.color, thing.shape, thing.direction) for *_, thing in clips}
    assert len(looks) == 60
    assert not any(shapes.held_out(*look) for look in looks)
    for frames, caption, thing in clips:
        motion = f" moves {thing.direction}" if len(frames) > 1 else ""
        assert caption == f"a {thing.color} {thing.shape}{motion}"


def test_shapes_have_equal_area_and_stay_inside(clips):
    for shape in shapes.SHAPES:
        assert shapes.coverage(shape, 24, 32, 32, 64, 64).sum() == pytest.approx(576, rel=0.03)
    for frames, _, thing in clips[:150]:
        height, width = frames.shape[1:3]
        for x, y in (thing.start, thing.end):
            area = shapes.coverage(thing.shape, thing.side, x, y, height, width).sum()
            assert area == pytest.approx(thing.side ** 2, rel=0.03)


def test_a_still_shows_the_middle_of_the_way(clips):
    _, _, thing = next(clip for clip in clips if len(clip[0]) == 1)
    frames = shapes.render(thing, shapes.BACKGROUNDS[0], 3, 64, 96)
    still = shapes.render(thing, shapes.BACKGROUNDS[0], 1, 64, 96)
    assert np.array_equal(still[0], frames[1])
    assert not np.array_equal(frames[0], frames[2])


def test_a_shape_is_far_more_colourful_than_its_background(clips):
    """So tests/reader.py tells them apart; light and shadow leave the hue."""
    for frames, _, thing in clips[:60]:
        frame = frames[0].astype(float)
        inside = colorful(frame) == 1
        alone = shapes.render(thing._replace(side=1.0), shapes.BACKGROUNDS[1], 1, *frame.shape[:2])[0].astype(float)
        assert inside.mean() == pytest.approx(thing.side ** 2 / inside.size, rel=0.25)
        assert hue_between(frame[inside].mean(0), shapes.COLORS[thing.color]) < 4
        assert np.ptp(frame[inside], axis=0).max() > 60                # it is shaded
        assert np.ptp(alone[:, 0], axis=0).min() > 40                  # and the background has a gradient


# ---- its files ----

def test_rendered_files_read_back(rendered, clips):
    meta = data.read_meta(str(rendered / "meta.csv"))
    assert len(meta) == 12
    kinds = set()
    for i in range(12):
        frames, caption, _ = clips[i]
        read = data.read_window(meta.path(i))[0].numpy()
        assert read.shape == frames.shape
        assert read.shape[:3] == tuple(meta[name][i] for name in ("num_frames", "height", "width"))
        assert meta["fps"][i] == (8 if len(frames) > 1 else 120)
        assert meta.text(i) == caption
        assert np.abs(read.astype(int) - frames).mean() < 1       # 4:2:0, with half the resolution of colour, gives 2.4
        kinds.add(Path(meta.path(i)).suffix)
    assert kinds == {".mp4", ".png"}


def test_rendered_files_are_the_same_each_time(rendered, tmp_path):
    shapes.write_shapes(tmp_path, 12)
    names = [path.name for path in rendered.iterdir() if path.suffix in (".mp4", ".png", ".csv")]
    assert len(names) == 13
    for name in names:
        assert (rendered / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_a_world_whose_rendering_was_stopped_has_no_table(tmp_path, monkeypatch):
    """The table of an earlier world does not stay beside the clips of another."""
    shapes.write_shapes(tmp_path, 4)
    render_clip = shapes.shapes_clip

    def stop_at_2(seed, index):
        if index == 2:
            raise KeyboardInterrupt
        return render_clip(seed, index)
    monkeypatch.setattr(shapes, "shapes_clip", stop_at_2)
    with pytest.raises(KeyboardInterrupt):
        shapes.write_shapes(tmp_path, 4, seed=1)
    assert not (tmp_path / "meta.csv").exists()
    monkeypatch.undo()
    shapes.write_shapes(tmp_path, 4, seed=1)
    assert len(data.read_meta(str(tmp_path / "meta.csv"))) == 4


# ---- python -m assets.shapes ----

def test_the_script_renders_a_world(run_script, tmp_path, rendered):
    ended = run_script("assets.shapes", tmp_path / "new", "--num-clips=3")
    assert ended.status == 0
    assert str(tmp_path / "new" / "meta.csv") in ended.out
    assert len(os.listdir(tmp_path / "new")) == 4
    first = "000000.mp4"
    assert (tmp_path / "new" / first).read_bytes() == (rendered / first).read_bytes()
    ended = run_script("assets.shapes", tmp_path / "other", "--num-clips=3", "--seed=1")
    assert ended.status == 0
    caption = (tmp_path / "other" / "meta.csv").read_text().splitlines()[1].split(",")[1]
    assert caption == shapes.shapes_clip(1, 0)[1]


@pytest.mark.parametrize("args, named", [
    ([], "FOLDER"),
    (["FOLDER", "--num-clips=0"], "--num-clips 0"),
    (["FOLDER", "--num-clips=many"], "many"),
    (["FOLDER", "--num_clips=3"], "--num_clips"),
    (["FILE", "--num-clips=3"], "note.txt")])
def test_a_mistake_on_the_command_line_is_one_error(run_script, tmp_path, args, named):
    (tmp_path / "note.txt").write_text("not a folder")
    places = {"FOLDER": tmp_path / "new", "FILE": tmp_path / "note.txt"}
    ended = run_script("assets.shapes", *[places.get(arg, arg) for arg in args])
    assert ended.status == 2
    assert "error: " in ended.err
    assert named in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.slow
def test_the_script_starts(tmp_path):
    command = [sys.executable, "-m", "assets.shapes", tmp_path / "new", "--num-clips=3"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 0, ended.stderr
    assert len(data.read_meta(str(tmp_path / "new" / "meta.csv"))) == 3


# ---- the reader ----

def looks_of(thing) -> tuple:
    return thing.color, thing.shape, thing.direction


def test_the_reader_reads_rendered_clips(moving):
    """It judges the shipped weights, so the truth must be read without a fault."""
    for frames, caption, thing in moving:
        seen = read_clip(frames)
        assert looks_of(seen) == looks_of(thing), caption
        assert seen.steady == 1
        assert np.abs(seen.centers[[0, -1]] - np.array([thing.start, thing.end])).max() < 1       # pixels


def test_the_reader_can_fail(moving):
    frames, _, thing = moving[0]
    assert read_clip(frames[::-1]).direction != thing.direction
    assert read_clip(frames[..., [1, 2, 0]]).color != thing.color
    assert looks_of(read_clip(np.zeros_like(frames))) == (None, None, None)


def test_the_reader_counts_what_obeys_a_prompt(moving):
    names = [looks_of(thing) for *_, thing in moving[:4]]
    videos = [frames for frames, *_ in moving[:4]]
    truth = obey(names, videos)
    assert [truth[part] for part in ("color", "shape", "direction", "all", "steady")] == [1] * 5
    backwards = obey(names, [frames[::-1] for frames in videos])
    assert (backwards["color"], backwards["direction"], backwards["all"]) == (1, 0, 0)


def test_a_third_of_the_prompts_are_combinations_never_seen():
    names = prompts(96)
    assert sum(shapes.held_out(*name) for name in names) == 32
    assert len(names) == 96
    assert prompts(96) == names
    assert len(set(prompts(36, seed=1))) == 36


@pytest.mark.slow
def test_the_reader_reads_decoded_latents():
    """What the shipped VAE makes of the truth must not be counted as a fault of the video model."""
    from vae import load_vae
    vae = load_vae(str(ROOT / "assets/tiny/vae"))
    right = []
    for index in range(160):
        frames, _, thing = shapes.shapes_clip(6, index)
        if len(frames) == 8:
            again = data.to_uint8(vae.decode(vae.encode(data.to_video(frames)[None]))[0])
            right.append(looks_of(read_clip(again)) == looks_of(thing))
    assert len(right) > 40
    assert np.mean(right) >= 0.99


@pytest.mark.slow
def test_the_shipped_vae_keeps_edges_crisp_and_colours_apart():
    """Colours that lie close together in latents slip from frame to frame while they are sampled."""
    from vae import load_vae
    scores = check_vae(load_vae(str(ROOT / "assets/tiny/vae")))
    assert scores["psnr"] >= 35 and scores["hue"] < 1 and scores["nearest"] > 1.2, scores


@pytest.mark.slow
def test_the_reader_reads_many_rendered_clips():
    right = []
    for index in range(200):
        frames, _, thing = shapes.shapes_clip(5, index)
        if len(frames) > 1:
            right.append(looks_of(read_clip(frames)) == looks_of(thing))
    assert len(right) > 100
    assert np.mean(right) >= 0.99
