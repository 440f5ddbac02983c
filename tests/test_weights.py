"""The shipped weights obey, and go on from frames given: pytest -m slow (minutes).  The README states these figures."""
import pytest

from reader import Judge

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
