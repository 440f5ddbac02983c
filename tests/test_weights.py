"""Measures whether the shipped weights obey, and continue given frames: pytest -m slow.  The README has the figures."""
import numpy as np
import pytest

from assets.shapes import COLORS, DIRECTIONS, shapes_clip
from data import to_uint8, to_video
from masks import connect, edit, extend_after, extend_before
from reader import Judge, prompts, read_clip

pytestmark = pytest.mark.slow

NUM_CLIPS = 16
OPPOSITE = {"right": "left", "left": "right", "up": "down", "down": "up"}


# ---------------------------------------------------------------- the release's sampler, 100 steps
@pytest.fixture(scope="module")
def judge():
    return Judge("assets/tiny", steps=100)


def test_prompts_are_obeyed(judge):
    scores, _ = judge.prompts(36)
    assert scores["color"] >= 0.95 and scores["all"] >= 0.95, scores


def test_a_given_first_frame_comes_back_and_moves_as_the_prompt_says(judge):
    scores, _ = judge.going_on(16, given=1)
    assert scores["psnr"] >= 30 and scores["direction"] >= 0.9, scores


# ---------------------------------------------------------------- other given frames, 20 steps of dpm
@pytest.fixture(scope="module")
def quick():
    return Judge("assets/tiny", steps=20, sampler="dpm")


def square_clips(num_frames):
    """Returns rendered clips of 64 x 64 that training never saw, uint8 [T H W 3] each, and their captions."""
    clips = []
    texts = []
    index = 0
    while len(clips) < NUM_CLIPS:
        frames, text, _ = shapes_clip(77, index)
        index += 1
        if frames.shape[:3] == (num_frames, 64, 64):
            clips.append(frames)
            texts.append(text)
    return clips, texts


def centers(clips):
    """Returns where the objects of clips are, in pixels [B T 2]; nan in frames without one."""
    return np.array([read_clip(clip).centers for clip in clips])


def distance(clips_a, clips_b):
    """Returns how far apart the objects of two lists of clips are, in pixels [B T]."""
    return np.linalg.norm(centers(clips_a) - centers(clips_b), axis=-1)


def test_an_object_continues_along_the_way_of_two_given_frames(quick):
    scores, _ = quick.going_on(NUM_CLIPS, given=2)
    assert scores["centroid"] < scores["still"] / 3, scores


def test_a_clip_is_extended_by_8_frames_both_ways(quick):
    """Half of a clip of 16 frames is given, 4 frames of it are kept, and the other half is known."""
    clips, texts = square_clips(16)
    after = quick.sample(texts, num_frames=12, references=[[clip[:8]] for clip in clips],
                         strategies=[extend_after(4)] * NUM_CLIPS)
    before = quick.sample(texts, num_frames=12, references=[[clip[8:]] for clip in clips],
                          strategies=[extend_before(4)] * NUM_CLIPS)
    error_after = distance(after, [clip[4:] for clip in clips])[:, 4:]
    error_before = distance(before, [clip[:12] for clip in clips])[:, :8]
    still = np.mean(distance([clip[8:] for clip in clips], [clip[[7] * 8] for clip in clips]))
    for error, next_to_the_given in ((error_after, 0), (error_before, -1)):
        assert np.nanmean(error) < min(4, still / 2)
        assert np.nanmean(error[:, next_to_the_given]) < 2


def test_two_frames_are_connected(quick):
    clips, texts = square_clips(8)
    videos = quick.sample(texts, references=[[clip[:1], clip[-1:]] for clip in clips],
                          strategies=[connect()] * NUM_CLIPS)
    assert np.nanmean(distance(videos, clips)[:, 1:-1]) < 2


def test_editing_changes_as_much_as_its_strength(quick):
    """Another colour is asked for: at 0 the clip comes back, at 1 it is forgotten, and 0.5 is between."""
    clips, texts = square_clips(8)
    colors = []
    edits = []
    for text in texts:
        _, color, rest = text.split(" ", 2)
        colors.append(next(other for other in COLORS if other != color))
        edits.append(f"a {colors[-1]} {rest}")
    references = [[clip] for clip in clips]
    edited, moved, recolored = {}, {}, {}
    for strength in (0.0, 0.5, 1.0):
        videos = quick.sample(edits, references=references, strategies=[edit(strength, 8)] * NUM_CLIPS)
        edited[strength] = videos
        moved[strength] = np.nanmean(distance(videos, clips))
        recolored[strength] = np.mean([read_clip(video).color == color for video, color in zip(videos, colors)])
    reconstructed = [to_uint8(quick.vae.decode(quick.vae.encode(to_video(clip)[None]))[0]) for clip in clips]
    assert np.abs(edited[0.0].astype(int) - reconstructed).max() <= 1
    assert (edited[1.0] == quick.sample(edits)).all()
    assert recolored[0.0] == 0 and recolored[0.5] >= 0.7 and recolored[1.0] >= 0.9, recolored
    assert moved[0.0] < 1 < moved[0.5] < moved[1.0], moved


def test_three_segments_move_there_and_back_without_a_jump(quick):
    """The prompt changes direction in each segment.  A jump is how far the last shared frame is from where the speed of
    the new ones puts it."""
    T, K = 8, 2
    names = prompts(NUM_CLIPS, seed=3)
    texts = []
    for color, shape, way in names:
        thing = f"a {color} {shape} moves"
        texts.append(f"|0|{thing} {way}|1|{thing} {OPPOSITE[way]}|2|{thing} {way}")
    videos = quick.sample(texts, segments=3, overlap=K)
    assert videos.shape[1] == 3 * (T - K) + K
    places = centers(videos)
    ends = [0, T - 1, 2 * T - K - 1, 3 * T - 2 * K - 1]
    obeyed = []
    for (_, _, way), place in zip(names, places):
        for segment, direction in enumerate((way, OPPOSITE[way], way)):
            moved = place[ends[segment + 1]] - place[ends[segment]]
            obeyed.append(np.dot(moved, DIRECTIONS[direction]) > 2)
    jumps = []
    for end in ends[1:3]:
        expected = 2 * places[:, end + 1] - places[:, end + 2]
        jumps.append(np.linalg.norm(places[:, end] - expected, axis=-1))
    appearance = [read_clip(video)[:2] == name[:2] for video, name in zip(videos, names)]
    assert np.nanmean(jumps) < 4
    assert np.mean(obeyed) >= 0.95
    assert np.mean(appearance) >= 0.9
