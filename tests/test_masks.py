"""Tests masks.py against the distributions and strategy strings of Open-Sora 1.1, and its forms for every use."""
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import masks
from masks import (RECIPE, STRATEGIES, Given, check_ratios, draw_mask, format_strategy, frame_plan, parse_strategy,
                   strategy_mask)

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden"
MASKS = json.loads((GOLDEN / "c_mask_generator.json").read_text())["dist"]
STRINGS = json.loads((GOLDEN / "c_inference_parsing.json").read_text())


def bits(x_mask):
    """Returns a mask as text: "0" for a given frame, "1" for a noised one."""
    return "".join("1" if noised else "0" for noised in x_mask.tolist())


# ---------------------------------------------------------------- training masks

@pytest.mark.parametrize("name", STRATEGIES)
def test_masks_are_drawn_as_open_sora_draws_them(name):
    """Compares with 20,000 draws of Open-Sora by the total variation distance.

    Between equal distributions over k masks it is about sqrt(k / n) for n draws."""
    generator = torch.Generator().manual_seed(1)
    num_draws = 400
    for T in (4, 5, 7, 8, 16, 32):
        theirs = MASKS[f"{name}|T{T}"]
        ours = Counter(bits(strategy_mask(name, T, generator)) for _ in range(num_draws))
        assert set(ours) <= set(theirs), f"{T} frames: a mask that Open-Sora never draws"
        distance = sum(abs(ours[mask] / num_draws - share) for mask, share in theirs.items()) / 2
        assert distance < 0.6 * (len(theirs) / num_draws) ** 0.5 + 1e-2, f"{T} frames"


@pytest.mark.parametrize("name", STRATEGIES)
def test_masks_of_other_lengths_give_one_run_at_their_place(name):
    generator = torch.Generator().manual_seed(0)
    for T in (1, 2, 3, 4, 6, 9, 13, 64):
        for _ in range(5):
            x_mask = strategy_mask(name, T, generator)
            given = bits(x_mask)
            assert x_mask.dtype == torch.bool and x_mask.shape == (T,)
            assert "1" in given, "nothing is left to generate"
            if name == "mask_no" or T == 1:
                assert "0" not in given
                continue
            at_both_ends = name.endswith("head_tail") and T > 2
            run_length = given.count("0") // 2 if at_both_ends else given.count("0")
            longest = max(1, T // 4) if "quarter" in name else 1
            assert 1 <= run_length <= longest
            run = "0" * run_length
            if at_both_ends:
                assert given == run + "1" * (T - 2 * run_length) + run
            elif "head" in name:
                assert given == run + "1" * (T - run_length)
            elif "tail" in name:
                assert given == "1" * (T - run_length) + run
            else:
                assert run in given


def test_strategies_are_drawn_at_the_given_shares():
    generator = torch.Generator().manual_seed(0)
    ratios = {"mask_image_head": 0.3, "mask_no": 0.5, "mask_image_tail": 0.2}
    num_draws = 1000
    drawn = Counter(bits(draw_mask(4, ratios, generator)) for _ in range(num_draws))
    for mask, share in {"0111": 0.3, "1111": 0.5, "1110": 0.2}.items():
        assert drawn[mask] / num_draws == pytest.approx(share, abs=0.05)


def test_a_mask_depends_only_on_its_generator():
    def draw_all():
        return [bits(draw_mask(16, RECIPE, torch.Generator().manual_seed(seed))) for seed in range(50)]
    masks_drawn = draw_all()
    assert draw_all() == masks_drawn
    assert len(set(masks_drawn)) > 3


def test_shares_that_round_to_less_than_one_leave_the_clip_unmasked():
    assert draw_mask(4, {"mask_image_head": 0.0}, torch.Generator()).all()


def test_the_recipe_masks_a_quarter_of_the_clips():
    check_ratios(RECIPE)
    assert set(RECIPE) == set(STRATEGIES)
    assert RECIPE["mask_no"] == 0.75 and RECIPE["mask_image_head_tail"] == 0.05 and RECIPE["mask_quarter_head"] == 0.025
    check_ratios({"mask_no": 0.9999995, "mask_image_head": 0.0})


@pytest.mark.parametrize("ratios, message", [
    ({"mask_no": 0.5}, "sum to 1, got 0.5"),
    ({"mask_no": 1.2, "mask_image_head": -0.2}, "'mask_image_head'.*-0.2"),
    ({"mask_no": float("nan")}, "'mask_no'.*nan"),
    ({"mask_quarter_heads": 1.0}, "'mask_quarter_heads'.*'mask_quarter_head'"),
    ({}, "sum to 1, got 0"),
])
def test_wrong_ratios_are_errors_that_name_the_strategy(ratios, message):
    with pytest.raises(ValueError, match=message):
        check_ratios(ratios)


# ---------------------------------------------------------------- strategy strings

# Open-Sora parses "a,b", then crashes when it uses it. "" is no strategy here, and a ";" at the end adds no group.
UNUSABLE = {"a,b": "'a,b'.*segment='a'"}
PARSED_BETTER = {"": [], "0;": [Given()]}


@pytest.mark.parametrize("case", STRINGS["process_mask_strategy"], ids=lambda case: case["inp"] or "empty")
def test_strings_are_parsed_as_open_sora_parses_them(case):
    text = case["inp"]
    if "error" in case:
        with pytest.raises(ValueError, match="7 fields"):
            parse_strategy(text)
    elif text in UNUSABLE:
        with pytest.raises(ValueError, match=UNUSABLE[text]):
            parse_strategy(text)
    elif text in PARSED_BETTER:
        assert parse_strategy(text) == PARSED_BETTER[text]
    else:
        assert parse_strategy(text) == [Given(*map(int, group[:5]), float(group[5])) for group in case["out"]]


REFUSED = {                                                             # Open-Sora raises RuntimeError or ValueError
    "0,1,0,6,4": "length=4 is 4 of the reference's 4 frames but 2 of the clip's 8",
    "0,1,4,0,1": "length=1 is 0 of the reference's 4 frames but 1 of the clip's 8",
    "0,1,-5,0,4": "ref_start=-5.*reference's 4",
    "1.0,0": "'1.0,0'.*segment='1.0'",
    "-1,0": "segment=-1",               # Open-Sora never makes that segment, and says nothing
}


@pytest.mark.parametrize("case", STRINGS["apply_mask_strategy"]["rows"], ids=lambda c: str(c["strategy"]) or "empty")
def test_references_are_placed_as_open_sora_places_them(case):
    """Puts references of 1, 4 and 8 frames, holding 100 + i, 200 + i and 300 + i, into a clip of 1000 + i."""
    text = case["strategy"]
    if text in REFUSED:
        assert "error" in case or text == "-1,0"
        with pytest.raises(ValueError, match=REFUSED[text]):
            frame_plan(parse_strategy(text), case["loop_i"], 8, [1, 4, 8])
        return
    sources, strengths = frame_plan(parse_strategy(text or ""), case["loop_i"], 8, [1, 4, 8])
    theirs = case.get("out")
    if theirs is None:                  # "" crashes Open-Sora; here it means no strategy, as None does there
        assert text == ""
        theirs = STRINGS["apply_mask_strategy"]["rows"][0]["out"]
    clip = [1000 + i if source is None else 100 * (source[0] + 1) + source[1] for i, source in enumerate(sources)]
    assert clip == theirs["z"]
    assert strengths.dtype == torch.float32
    assert torch.equal(strengths, torch.tensor(theirs["mask"]))


def assign_slices(groups, T, lengths):
    """Returns what Open-Sora computes for segment 0, clip[target] = reference[frames]; None where it raises."""
    clip = torch.full((T,), -1)
    strengths = torch.ones(T)
    for group in groups:
        if group.segment != 0:
            continue
        start = group.ref_start
        if start < 0:
            start += lengths[group.reference]
        target = group.target_start
        if target < 0:
            target += T
        reference = 100 * (group.reference % len(lengths)) + torch.arange(lengths[group.reference])
        try:
            clip[target:target + group.length] = reference[start:start + group.length]
        except RuntimeError:
            return None
        strengths[target:target + group.length] = group.edit
        clip[strengths == 1] = -1
    return clip, strengths


def random_strategy(rng, T, lengths):
    """Returns one to four groups, most of which fit."""
    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=rng))
    groups = []
    for _ in range(draw(1, 4)):
        reference = draw(-3, 2)
        ref_frames = lengths[reference]
        length = draw(0, min(ref_frames, T)) if draw(0, 3) else draw(0, 12)
        ref_start = draw(-ref_frames, max(0, ref_frames - length))
        target_start = draw(-T, max(0, T - length))
        groups.append(Given(draw(0, 1), reference, ref_start, target_start, length, draw(0, 4) / 4))
    return groups


@pytest.mark.parametrize("seed, num_cases", [(0, 40), pytest.param(1, 400, marks=pytest.mark.slow)])
def test_random_strategies_are_slice_assignments(seed, num_cases):
    rng = torch.Generator().manual_seed(seed)
    num_refused = 0
    for _ in range(num_cases):
        T, *lengths = torch.randint(1, 13, (4,), generator=rng).tolist()
        groups = random_strategy(rng, T, lengths)
        assert parse_strategy(format_strategy(groups)) == groups
        expected = assign_slices(groups, T, lengths)
        if expected is None:
            num_refused += 1
            with pytest.raises(ValueError, match="mask strategy, group"):
                frame_plan(groups, 0, T, lengths)
            continue
        sources, strengths = frame_plan(groups, 0, T, lengths)
        clip = [-1 if source is None else 100 * source[0] + source[1] for source in sources]
        assert clip == expected[0].tolist(), groups
        assert torch.equal(strengths, expected[1]), groups
    assert 0.1 < num_refused / num_cases < 0.9, "the draws no longer reach both sides"


def test_strings_make_a_round_trip():
    for text in ("0,0,0,0,8,0.3", "0,0,0,0,1,0;2,-1,-8,0,8,1", "0,0,0,0,1,0.1234567890123", "0,0,0,0,1,1e-05"):
        assert format_strategy(parse_strategy(text)) == text
    assert parse_strategy(" 0 , 1;0 ;") == [Given(0, 1), Given()]
    assert parse_strategy("  ") == []
    assert format_strategy([]) == ""


def test_a_later_group_overrides_and_edit_1_frees_a_frame():
    sources, strengths = frame_plan(parse_strategy("0,0,0,0,8,0.5;0,1,0,2,1;0,0,4,4,2,1"), 0, 8, [8, 1])
    assert strengths.tolist() == [0.5, 0.5, 0, 0.5, 1, 1, 0.5, 0.5]
    assert sources == [(0, 0), (0, 1), (1, 0), (0, 3), None, None, (0, 6), (0, 7)]


def test_strengths_count_steps_in_fp32():
    """0.29 of 100 steps are 29 in fp32, as in Open-Sora; in fp64 they are 28."""
    for edit, steps in ((0.29, 29), (0.57, 57), (0.58, 58)):
        _, strengths = frame_plan([Given(edit=edit)], 0, 1, [1])
        assert int(strengths[0] * 100) == steps


@pytest.mark.parametrize("text, message", [
    ("0;;0", "group 2 of 3.*no fields"),
    (";", "group 1 of 1.*no fields"),
    ("0;0,,3", "group 2 of 2, '0,,3'.*reference=''"),
    ("0,0,0,0,8,x", "group 1 of 1.*edit='x'"),
    ("0,0,0,0,8,1.5", "group 1 of 1.*edit=1.5"),
    ("0,0,0,0,8,nan", "edit=nan"),
    ("0;0,0,0,0,-8", "group 2 of 2.*length=-8"),
    ("0;0,2,0,0,1", "group 2 of 2.*reference=2,.* 2"),
    ("0;0,-3,0,0,1", "group 2 of 2.*reference=-3,.* 2"),
    ("0,0,0,-17,1", "group 1 of 1.*target_start=-17.*16"),
    ("0,0,9,0,8", "length=8 is 7 of the reference's 16 frames but 8 of the clip's 16"),
])
def test_errors_name_the_group_and_the_field(text, message):
    with pytest.raises(ValueError, match=message):
        frame_plan(parse_strategy(text), 0, 16, [16, 16])


# ---------------------------------------------------------------- what people ask for, as groups

FORMS = [       # a form of a clip of 6 frames, its string, the frames of each reference, the sources of its segment 0
    (masks.animate(), "0,0,0,0,1,0", [1], "00 .. .. .. .. .."),
    (masks.extend_after(2), "0,0,-2,0,2,0", [9], "07 08 .. .. .. .."),
    (masks.extend_before(2), "0,0,0,-2,2,0", [9], ".. .. .. .. 00 01"),
    (masks.connect(), "0,0,-1,0,1,0;0,1,0,-1,1,0", [1, 1], "00 .. .. .. .. 10"),
    (masks.connect(2), "0,0,-2,0,2,0;0,1,0,-2,2,0", [9, 7], "07 08 .. .. 10 11"),
    (masks.edit(0.4, 6), "0,0,0,0,6,0.4", [6], "00 01 02 03 04 05"),
    (masks.infill(2, 4, 6), "0,0,0,0,2,0;0,0,4,4,2,0", [6], "00 01 .. .. 04 05"),
    (masks.infill(0, 4, 6), "0,0,4,4,2,0", [6], ".. .. .. .. 04 05"),
    (masks.animate() + masks.extend_before(1), "0,0,0,0,1,0;0,0,0,-1,1,0", [1], "00 .. .. .. .. 00"),
]


@pytest.mark.parametrize("groups, text, lengths, picture", FORMS, ids=[row[1] for row in FORMS])
def test_a_form_gives_the_frames_that_it_promises(groups, text, lengths, picture):
    """Reads each frame's source as two digits, its reference and the frame there; ".." is a generated frame."""
    assert format_strategy(groups) == text
    assert parse_strategy(text) == groups
    sources, strengths = frame_plan(groups, 0, 6, lengths)
    assert [".." if source is None else f"{source[0]}{source[1]}" for source in sources] == picture.split()
    edit = 0.4 if "0.4" in text else 0.0
    assert torch.equal(strengths, torch.tensor([1.0 if source is None else edit for source in sources]))


def test_a_seamless_video_ends_where_it_begins():
    """Writes a video of numbered frames: each segment skips its overlap with the one before."""
    T = 8
    keep = 2
    num_segments = 3
    groups = masks.seamless(keep, num_segments)
    assert parse_strategy(format_strategy(groups)) == groups
    clips = [[f"given {i}" for i in range(5)]]
    video = []
    for segment in range(num_segments):
        sources, _ = frame_plan(groups, segment, T, [len(clip) for clip in clips])
        clip = []
        for i, source in enumerate(sources):
            clip.append(f"{segment}.{i}" if source is None else clips[source[0]][source[1]])
        if segment > 0:
            assert clip[:keep] == clips[-1][-keep:], "does not continue the segment before"
        clips.append(clip)
        video += clip[keep:] if segment > 0 else clip
    assert video[:keep] == video[-keep:] == ["0.0", "0.1"]
    assert len(video) == num_segments * (T - keep) + keep
    assert len(set(video)) == num_segments * (T - keep)


@pytest.mark.parametrize("form, args, message", [
    (masks.extend_after, (0,), "keep=0"),
    (masks.extend_before, (-1,), "keep=-1"),
    (masks.edit, (1.5, 16), "edit=1.5"),
    (masks.infill, (12, 4, 16), "infill 12:4.*16"),
    (masks.infill, (4, 17, 16), "infill 4:17.*16"),
    (masks.seamless, (4, 1), "segments=1"),
])
def test_a_form_refuses_what_cannot_be(form, args, message):
    with pytest.raises(ValueError, match=message):
        form(*args)


# ---------------------------------------------------------------- the command line

def test_the_script_draws_every_training_strategy(run_script):
    ended = run_script("masks", "8")
    assert ended.status == 0
    pictures = {name: re.search(rf"^{name} .*?([░█]{{8}})", ended.out, re.M)[1] for name in STRATEGIES}
    assert pictures["mask_no"] == "████████"
    assert pictures["mask_image_head"] == "░███████"
    assert pictures["mask_image_tail"] == "███████░"


@pytest.mark.parametrize("args, pictures", [
    (("0,0,0,0,8,0.3", "--frames=16"), ["▒▒▒▒▒▒▒▒████████"]),
    (("0,0,0,0,4;2,0,-2,0,2;0,0,0,6,3,0.5;0,1,0,7,3", "--frames=10", "--reference-frames=10,1"),
     ["░░░░██▒░░░", "░░████████"]),
    (("",), [16 * "█"]),
    (("0", "--frames", "4"), ["░███"]),                                 # without --frames, "0" is a number of frames
])
def test_the_script_draws_a_strategy(run_script, args, pictures):
    ended = run_script("masks", *args)
    assert ended.status == 0
    assert re.findall("[░▒█]{2,}", ended.out) == pictures


@pytest.mark.parametrize("args, message", [
    (("0",), "got 0"),
    (("0,x",), "'0,x': reference='x'"),
    (("0,1", "--reference-frames", "16"), "reference=1,.* 1"),
    (("0,1", "--reference-frames", "16;1"), "--reference-frames 16;1"),
    (("0,1", "--frames", "0"), "got 0"),
])
def test_a_mistake_is_one_line(run_script, args, message):
    ended = run_script("masks", *args)
    assert ended.status == 2
    assert len(ended.err.splitlines()) == 1
    assert re.search(message, ended.err)


@pytest.mark.slow
def test_the_file_is_a_script():
    ended = subprocess.run([sys.executable, "masks.py", "0"], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert ended.returncode == 2
    assert "got 0" in ended.stderr


def test_segments_before_are_drawn_as_references(capsys):
    """As sample.py counts them: of segment 1, reference 1 is segment 0 if one is given."""
    masks.main(["1,1,-4,0,4", "--reference-frames", "16"])
    out = capsys.readouterr().out
    assert "segment 1  ░░░░████████████" in out
    masks.main(["1,-1,-4,0,4", "--reference-frames", "16,1"])
    assert "reference 2, 12-15" in capsys.readouterr().out
