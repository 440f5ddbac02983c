"""The shipped weights obey, and go on from frames given: pytest -m slow (minutes).  The README states these figures."""
import numpy as np
import pytest

from assets.shapes import COLORS, DIRECTIONS, shapes_clip
from data import to_uint8, to_video
from masks import connect, edit, extend_after, extend_before
from reader import Judge, prompts, read_clip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def judge():
    return Judge("assets/tiny", steps=100)


def test_prompts_are_obeyed(judge):
    scores, _ = judge.prompts(96)
    print(scores)
    assert scores["color"] >= 0.95 and scores["all"] >= 0.95, scores


def test_a_given_first_frame_comes_back_and_goes_on(judge):
    scores, _ = judge.going_on(48, given=1)
    print(scores)
    assert scores["psnr"] >= 30 and scores["direction"] >= 0.95, scores


def test_two_given_frames_go_on_along_their_way(judge):
    scores, _ = judge.going_on(48, given=2)
    print(scores)
    assert scores["centroid"] < scores["still"] / 3, scores


# ---------------------------------------------------------------- what is given in other ways; 20 dpm steps
@pytest.fixture(scope="module")
def quick():
    return Judge("assets/tiny", steps=20, sampler="dpm")


def square_clips(num_frames, count):
    """Rendered clips of 32 x 32 that training never saw: uint8 [T H W 3] each, and their captions."""
    clips = (shapes_clip(77, i) for i in range(10 ** 6))
    fit = ((frames, text) for frames, text, _ in clips if frames.shape[:3] == (num_frames, 32, 32))
    return map(list, zip(*(next(fit) for _ in range(count))))


def distance(a, b):
    """Between the objects of two lists of clips, in pixels: [B T], nan where one shows none."""
    centers = lambda clips: np.array([read_clip(clip).centers for clip in clips])
    return np.linalg.norm(centers(a) - centers(b), axis=-1)


def test_a_clip_is_extended_by_8_frames_both_ways(quick):
    """Half of a clip of 16 frames is given, 4 frames of it are kept; the other half is known."""
    clips, texts = square_clips(16, 16)
    ahead = quick.sample(texts, num_frames=12, references=[[c[:8]] for c in clips], strategies=[extend_after(4)] * 16)
    back = quick.sample(texts, num_frames=12, references=[[c[8:]] for c in clips], strategies=[extend_before(4)] * 16)
    errors = distance(ahead, [c[4:] for c in clips])[:, 4:], distance(back, [c[:12] for c in clips])[:, :8]
    still = np.mean(distance([c[8:] for c in clips], [c[[7] * 8] for c in clips]))
    print([np.nanmean(error) for error in errors], still)
    assert max(np.nanmean(error) for error in errors) < min(2, still / 2)
    assert max(np.nanmean(errors[0][:, 0]), np.nanmean(errors[1][:, -1])) < 1, "the frame beside the given ones"


def test_two_frames_are_connected(quick):
    clips, texts = square_clips(8, 16)
    videos = quick.sample(texts, references=[[c[:1], c[-1:]] for c in clips], strategies=[connect()] * 16)
    error = distance(videos, clips)
    print(np.nanmean(error[:, 1:-1]), np.nanmax(error))
    assert np.nanmean(error[:, 1:-1]) < 1


def test_editing_changes_as_much_as_it_is_told(quick):
    """Another colour is asked for: at 0 the clip comes back, at 1 it is forgotten, and 0.5 stands between."""
    clips, texts = square_clips(8, 16)
    colors = [next(c for c in COLORS if c != text.split()[1]) for text in texts]
    texts = [f"a {color} {text.split(' ', 2)[2]}" for color, text in zip(colors, texts)]
    again = [to_uint8(quick.vae.decode(quick.vae.encode(to_video(c)[None]))[0]) for c in clips]
    edited = {r: quick.sample(texts, references=[[c] for c in clips], strategies=[edit(r, 8)] * 16)
              for r in (0.0, 0.5, 1.0)}
    place = {r: np.nanmean(distance(videos, clips)) for r, videos in edited.items()}
    right = {r: np.mean([read_clip(v).color == c for v, c in zip(videos, colors)]) for r, videos in edited.items()}
    print(place, right)
    assert np.abs(edited[0.0].astype(int) - again).max() <= 1 and right[0.0] == 0 and right[1.0] >= 0.9
    assert (edited[1.0] == quick.sample(texts)).all()
    assert place[0.0] < 0.5 and 0.5 < place[0.5] < place[1.0] and right[0.5] >= 0.7


def test_three_segments_there_and_back_without_a_jump(quick):
    """The prompt changes direction in each segment.  Jump: how far the last frame shared is from where the speed of the
    new ones puts it."""
    T, K, back = 8, 2, dict(right="left", left="right", up="down", down="up")
    names = prompts(16, seed=3)
    texts = ["|0|a {0} {1} moves {2}|1|a {0} {1} moves {3}|2|a {0} {1} moves {2}".format(*n, back[n[2]]) for n in names]
    videos = quick.sample(texts, segments=3, overlap=K)
    assert videos.shape[1] == 3 * (T - K) + K
    centers = np.array([read_clip(video).centers for video in videos])
    ends = [0, T - 1, 2 * T - K - 1, 3 * T - 2 * K - 1]
    ways = [[np.dot(c[b] - c[a], DIRECTIONS[d]) > 1 for a, b, d in zip(ends, ends[1:], (way, back[way], way))]
            for (_, _, way), c in zip(names, centers)]
    jump = np.linalg.norm([centers[:, s] - (2 * centers[:, s + 1] - centers[:, s + 2]) for s in ends[1:3]], axis=-1)
    looks = [read_clip(v)[:2] == (color, shape) for v, (color, shape, _) in zip(videos, names)]
    print(np.mean(ways, axis=0), np.nanmean(jump), np.nanmax(jump), np.mean(looks))
    assert np.nanmean(jump) < 2 and np.mean(ways) >= 0.95 and np.mean(looks) >= 0.9
