"""masks.py against the distributions and the strategy strings of Open-Sora 1.1, and its properties for every length."""

import json
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
DIST = json.loads((ROOT / "tests/golden/c_mask_generator.json").read_text())["dist"]
STRINGS = json.loads((ROOT / "tests/golden/c_inference_parsing.json").read_text())


def bits(x_mask: torch.Tensor) -> str:
    return "".join("1" if noised else "0" for noised in x_mask.tolist())


@pytest.mark.parametrize("case", DIST)
def test_distribution_is_upstreams(case):
    """Total variation distance to 20,000 draws of upstream; between equal ones over k masks about sqrt(k / n)."""
    name, T = case.split("|T")
    generator, n = torch.Generator().manual_seed(1), 3000
    ours = Counter(bits(strategy_mask(name, int(T), generator)) for _ in range(n))
    theirs = DIST[case]
    assert set(ours) <= set(theirs), "a mask that upstream never draws"
    distance = sum(abs(ours[mask] / n - share) for mask, share in theirs.items()) / 2
    assert distance < 0.6 * (len(theirs) / n) ** 0.5 + 1e-3, distance


@pytest.mark.parametrize("name", STRATEGIES)
def test_properties_for_every_length(name):
    generator = torch.Generator().manual_seed(0)
    for T in range(1, 65):
        for _ in range(20):
            x_mask = strategy_mask(name, T, generator)
            given = bits(x_mask)
            assert x_mask.dtype == torch.bool and x_mask.shape == (T,)
            assert x_mask.any(), f"nothing left to generate: {given}"
            if name == "mask_no" or T == 1:
                assert x_mask.all()
                continue
            ends = 2 if name.endswith("head_tail") and T > 2 else 1
            most = max(1, T // 4) if "quarter" in name else 1
            count = T - int(x_mask.sum())
            assert count % ends == 0 and 1 <= count // ends <= most, given
            run = "0" * (count // ends)
            assert run in given, f"given frames are not in one piece: {given}"
            assert "head" not in name or given.startswith(run), given
            assert not (name.endswith("tail") and T > 2) or given.endswith(run), given


def test_random_reaches_every_place():
    generator = torch.Generator().manual_seed(0)
    starts = {bits(strategy_mask("mask_image_random", 5, generator)).index("0") for _ in range(200)}
    assert starts == {0, 1, 2, 3, 4}


def test_draw_mask_follows_the_ratios():
    generator, n = torch.Generator().manual_seed(0), 4000
    ratios = {"mask_image_head": 0.3, "mask_no": 0.5, "mask_image_tail": 0.2}
    drawn = Counter(bits(draw_mask(4, ratios, generator)) for _ in range(n))
    for mask, share in {"0111": 0.3, "1111": 0.5, "1110": 0.2}.items():
        assert abs(drawn[mask] / n - share) < 0.03, drawn


def test_draw_mask_is_a_function_of_its_generator():
    one, two = ([bits(draw_mask(16, RECIPE, torch.Generator().manual_seed(seed))) for seed in range(50)] for _ in "ab")
    assert one == two and len(set(one)) > 3


def test_shares_that_round_below_one_leave_nothing_undrawn():
    assert draw_mask(4, {"mask_image_head": 0.0}, torch.Generator()).all()


def test_check_ratios():
    check_ratios(RECIPE)
    check_ratios({"mask_no": 0.9999995, "mask_image_head": 0.0})
    assert abs(sum(RECIPE.values()) - 1) < 1e-9 and RECIPE["mask_image_head_tail"] == 0.05 and len(RECIPE) == 9
    for ratios, message in [
        ({"mask_no": 0.5}, "must sum to 1, got 0.5: add 0.5 to mask_no"),
        ({"mask_no": 1.2, "mask_image_head": -0.2}, "'mask_image_head'.* = -0.2"),
        ({"mask_no": float("nan")}, "nan"),
        ({"mask_quarter_heads": 1.0}, "did you mean 'mask_quarter_head'"),
        ({}, "got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_ratios(ratios)


# ---------------------------------------------------------------- the strategy string
# What upstream parses but cannot use: it crashes when it applies them. "" is no strategy here, and "0;" is "0".
UNUSABLE = {"a,b": "group 1 of 1, 'a,b': segment='a': expected a whole number"}
PARSED_BETTER = {"": [], "0;": [Given()]}


@pytest.mark.parametrize("case", STRINGS["process_mask_strategy"], ids=lambda case: case["inp"] or "empty")
def test_strings_parse_as_upstreams(case):
    text = case["inp"]
    if "error" in case:
        with pytest.raises(ValueError, match="7 fields: expected 1 to 6, segment,reference,ref_start"):
            parse_strategy(text)
    elif text in UNUSABLE:
        with pytest.raises(ValueError, match=UNUSABLE[text]):
            parse_strategy(text)
    elif text in PARSED_BETTER:
        assert parse_strategy(text) == PARSED_BETTER[text]
    else:
        theirs = [Given(*map(int, fields[:5]), float(fields[5])) for fields in case["out"]]
        assert parse_strategy(text) == theirs


REFUSED = {                                                            # upstream raises RuntimeError or ValueError
    "0,1,0,6,4": "length=4 is 4 of the reference's 4 frames but 2 of the clip's 8",
    "0,1,4,0,1": "length=1 is 0 of the reference's 4 frames but 1 of the clip's 8",
    "0,1,-5,0,4": "ref_start=-5 is before the first of the reference's 4 frames: expected -4 or more",
    "1.0,0": "group 1 of 1, '1.0,0': segment='1.0': expected a whole number",
}


@pytest.mark.parametrize("case", STRINGS["apply_mask_strategy"]["rows"], ids=lambda c: str(c["strategy"]) or "empty")
def test_plans_are_upstreams(case):
    """Three references of 1, 4 and 8 frames that hold 100 + i, 200 + i, 300 + i, put into a clip of 1000 + i."""
    text = case["strategy"]
    if text in REFUSED:
        assert "error" in case
        with pytest.raises(ValueError, match=REFUSED[text]):
            frame_plan(parse_strategy(text), case["loop_i"], 8, [1, 4, 8])
        return
    sources, strengths = frame_plan(parse_strategy(text or ""), case["loop_i"], 8, [1, 4, 8])
    # "" crashes upstream; here it is no strategy, which upstream spells None
    theirs = case.get("out") or STRINGS["apply_mask_strategy"]["rows"][0]["out"]
    assert strengths.dtype == torch.float32 and torch.equal(strengths, torch.tensor(theirs["mask"]))
    assert [1000 + i if s is None else 100 * (s[0] + 1) + s[1] for i, s in enumerate(sources)] == theirs["z"]


def slice_assign(groups, segment, T, lengths):
    """What the release computes, by tensors: clip[target] = reference[frames]. None where it raises."""
    clip, mask = torch.full((T,), -1), torch.ones(T)
    for g in groups:
        if g.segment == segment:
            start = g.ref_start + lengths[g.reference] if g.ref_start < 0 else g.ref_start
            target = g.target_start + T if g.target_start < 0 else g.target_start
            frames = 100 * (g.reference % len(lengths)) + torch.arange(lengths[g.reference])
            try:
                clip[target : target + g.length] = frames[start : start + g.length]
            except RuntimeError:
                return None
            mask[target : target + g.length] = g.edit
            clip[mask == 1] = -1
    return clip.tolist(), mask


def test_random_strategies_are_slice_assignments():
    """2,000 random strategies of up to four groups: where the release raises we do, elsewhere the plans are equal."""
    generator, raised = torch.Generator().manual_seed(0), 0
    draw = lambda low, high: int(torch.randint(low, high + 1, (), generator=generator))
    for _ in range(2000):
        T, lengths = draw(1, 12), [draw(1, 12) for _ in range(3)]
        groups = []
        for _ in range(draw(1, 4)):
            reference = draw(-3, 2)
            L = lengths[reference]
            length = draw(0, min(L, T)) if draw(0, 3) else draw(0, 12)
            groups.append(Given(draw(0, 1), reference, draw(-L, L - length if L > length else 0),
                                draw(-T, T - length if T > length else 0), length, draw(0, 4) / 4))
        assert parse_strategy(format_strategy(groups)) == groups
        theirs = slice_assign(groups, 0, T, lengths)
        if theirs is None:
            raised += 1
            with pytest.raises(ValueError, match="expected as many"):
                frame_plan(groups, 0, T, lengths)
            continue
        sources, strengths = frame_plan(groups, 0, T, lengths)
        assert [-1 if s is None else 100 * s[0] + s[1] for s in sources] == theirs[0], groups
        assert torch.equal(strengths, theirs[1]), groups
    assert 200 < raised < 1800, "the draws no longer reach both sides"


def test_strings_make_a_round_trip():
    for text in ("0,0,0,0,8,0.3", "0,0,0,0,1,0;2,-1,-8,0,8,1", "0,0,0,0,1,0.1234567890123", "0,0,0,0,1,1e-05"):
        assert format_strategy(parse_strategy(text)) == text
    assert parse_strategy(" 0 , 1;0 ;") == parse_strategy("0,1;0") == [Given(0, 1), Given()]
    assert parse_strategy("  ") == [] and format_strategy([]) == ""


def test_a_later_group_overrides_and_edit_1_frees():
    sources, strengths = frame_plan(parse_strategy("0,0,0,0,8,0.5;0,1,0,2,1;0,0,4,4,2,1"), 0, 8, [8, 1])
    assert strengths.tolist() == [0.5, 0.5, 0, 0.5, 1, 1, 0.5, 0.5]
    assert sources == [(0, 0), (0, 1), (1, 0), (0, 3), None, None, (0, 6), (0, 7)]


def test_strengths_count_steps_in_fp32():
    assert [int(frame_plan([Given(edit=r)], 0, 1, [1])[1] * 100) for r in (0.29, 0.57, 0.58)] == [29, 57, 58]
    assert int(0.29 * 100) == 28


@pytest.mark.parametrize("text, message", [
    ("0;;0", "group 2 of 3, '': no fields: expected 1 to 6, segment,"),
    (";", "group 1 of 1, '': no fields"),
    ("0;0,,3", "group 2 of 2, '0,,3': reference='': expected a whole number, as in"),
    ("0,0,0,0,8,x", "group 1 of 1, '0,0,0,0,8,x': edit='x': expected a number from 0 to 1"),
    ("0,0,0,0,8,1.5", r"group 1 of 1, .*: edit=1.5: expected 0 \(held as given\) to 1"),
    ("0,0,0,0,8,nan", "edit=nan: expected 0"),
    ("0;0,0,0,0,-8", "group 2 of 2, .*: length=-8: expected 0 frames or more"),
    ("0;0,2,0,0,1", "group 2 of 2, '0,2,0,0,1,0': reference=2, but there are 2: give more, or"),
    ("0;0,-3,0,0,1", "group 2 of 2, .*: reference=-3, but there are 2"),
    ("0,0,0,-17,1", "group 1 of 1, .*: target_start=-17 is before the first of the clip's 16 frames: expected -16 or"),
    ("0,0,9,0,8", "length=8 is 7 of the reference's 16 frames but 8 of the clip's 16: expected as many"),
])
def test_errors_name_group_and_field(text, message):
    with pytest.raises(ValueError, match="^mask strategy, .*" + message):
        frame_plan(parse_strategy(text), 0, 16, [16, 16])


# ---------------------------------------------------------------- the readable forms
def picture(groups, segment, T, lengths):
    """The reference of each frame, as a digit, "." where none; and the reference's frames."""
    sources, strengths = frame_plan(groups, segment, T, lengths)
    assert strengths.tolist() == [1.0 if s is None else 0.0 for s in sources]
    return "".join("." if s is None else str(s[0]) for s in sources), [s[1] for s in sources if s]


def test_forms_give_what_they_say():
    assert picture(masks.animate(), 0, 6, [1]) == ("0.....", [0])
    assert picture(masks.extend_after(2), 0, 6, [9]) == ("00....", [7, 8])
    assert picture(masks.extend_before(2), 0, 6, [9]) == ("....00", [0, 1])
    assert picture(masks.connect(), 0, 6, [1, 1]) == ("0....1", [0, 0])
    assert picture(masks.connect(2), 0, 6, [9, 7]) == ("00..11", [7, 8, 0, 1])
    assert picture(masks.infill(2, 4, 6), 0, 6, [6]) == ("00..00", [0, 1, 4, 5])
    assert picture(masks.infill(0, 4, 6), 0, 6, [6]) == ("....00", [4, 5])
    assert masks.infill(0, 4, 6) == [Given(0, 0, 4, 4, 2)]
    sources, strengths = frame_plan(masks.edit(0.4, 6), 0, 6, [6])
    assert sources == [(0, i) for i in range(6)] and torch.equal(strengths, torch.full((6,), 0.4))


def test_forms_as_strings():
    strings = {"animate": "0,0,0,0,1,0", "extend_after": "0,0,-4,0,4,0", "extend_before": "0,0,0,-4,4,0",
               "connect": "0,0,-4,0,4,0;0,1,0,-4,4,0", "seamless": "1,-1,-4,0,4,0;1,-1,0,-4,4,0",
               "edit": "0,0,0,0,16,0.4", "infill": "0,0,0,0,4,0;0,0,12,12,4,0"}
    args = {"animate": (), "edit": (0.4, 16), "infill": (4, 12, 16)}
    assert strings == {name: format_strategy(getattr(masks, name)(*args.get(name, (4,)))) for name in strings}


def test_a_seamless_video_ends_where_it_begins():
    """Frames numbered as written: each segment's overlap is skipped, and the end's copy of the beginning left out."""
    T, keep, segments = 8, 2, 3
    groups, made = masks.seamless(keep, segments), [[f"given {i}" for i in range(5)]]
    video = []
    for segment in range(segments):
        sources, _ = frame_plan(groups, segment, T, [len(clip) for clip in made])
        clip = [f"{segment}.{i}" if s is None else made[s[0]][s[1]] for i, s in enumerate(sources)]
        assert segment == 0 or clip[:keep] == made[-1][-keep:], "does not go on from the segment before"
        made.append(clip)
        video += clip[keep:] if segment else clip
    assert video[:keep] == video[-keep:] == ["0.0", "0.1"]
    assert len(video) == segments * (T - keep) + keep and len(set(video)) == segments * (T - keep)


@pytest.mark.parametrize("T", range(1, 65))
def test_forms_stay_inside_for_every_length(T):
    keep, L = max(1, T // 4), max(1, T // 2)
    for groups, segment, lengths in [
        (masks.animate(), 0, [1]), (masks.extend_after(keep), 0, [L]), (masks.extend_before(keep), 0, [L]),
        (masks.connect(keep), 0, [L, L]), (masks.edit(0.5, T), 0, [T]), (masks.infill(T // 2, T, T), 0, [T]),
        *((masks.seamless(keep, 3), i, [T] * i) for i in range(3)),
    ]:
        assert parse_strategy(format_strategy(groups)) == groups
        sources, strengths = frame_plan(groups, segment, T, lengths)
        assert len(sources) == T and strengths.shape == (T,)
        assert all(s is None or 0 <= s[0] < len(lengths) and 0 <= s[1] < lengths[s[0]] for s in sources)
        assert [s is None for s in sources] == (strengths == 1).tolist()
        assert T < 4 or (strengths > 0).any(), "nothing left to generate"


@pytest.mark.parametrize("form, message", [
    (lambda: masks.extend_after(0), "keep=0: expected 1 frame or more"),
    (lambda: masks.extend_before(-1), "keep=-1: expected 1 frame or more"),
    (lambda: masks.edit(1.5, 16), "edit=1.5: expected 0"),
    (lambda: masks.infill(12, 4, 16), "infill 12:4: expected START:STOP, 0 <= START < STOP <= 16, as in 4:12"),
    (lambda: masks.infill(4, 17, 16), "infill 4:17: expected START:STOP"),
    (lambda: masks.seamless(4, 1), "seamless: segments=1: expected 2 or more"),
])
def test_forms_refuse(form, message):
    with pytest.raises(ValueError, match=message):
        form()


# ---------------------------------------------------------------- the command line
def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "masks.py", *args], cwd=ROOT, capture_output=True, encoding="utf-8")


def test_the_file_runs():
    lines = run("8").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(STRATEGIES)
    assert "░███████" in next(line for line in lines if line.startswith("mask_image_head "))
    wrong = run("0")
    assert wrong.returncode == 2 and "1 or more, got 0" in wrong.stderr


@pytest.fixture
def drawn(monkeypatch, capsys):
    """The lines that masks.py prints below its legend, run in this process."""
    def drawn(*args):
        monkeypatch.setattr(sys, "argv", ["masks.py", *args])
        masks.main()
        return capsys.readouterr().out.splitlines()[1:]
    return drawn


def test_the_file_draws_a_strategy(drawn):
    assert drawn("0,0,0,0,8,0.3", "--frames", "16") == [
        "segment 0  ▒▒▒▒▒▒▒▒████████",
        "      0-7  reference 0, 0-7, strength 0.3",
    ]
    strategy = "0,0,0,0,4;2,0,-2,0,2;0,0,0,6,3,0.5;0,1,0,7,3;0,0,0,10,1;-1"
    assert drawn(strategy, "--frames=10", "--reference-frames=10,1") == [
        "segment -1  is never made",
        "        0  reference 0, 0",
        "segment 0  ░░░░██▒░░░",
        "      0-3  reference 0, 0-3",
        "      6-8  reference 0, 0-2, strength 0.5",
        "      7-9  reference 1, 0",
        " no frame  reference 0, 0",
        "segment 2  ░░████████",
        "      0-1  reference 0, 8-9",
    ]
    assert drawn("") == ["segment 0  " + 16 * "█"]
    assert drawn("0", "--frames", "4")[0] == "segment 0  ░███"       # without --frames this is T = 0


@pytest.mark.parametrize("args, message", [
    (("0,x",), "error: mask strategy, group 1 of 1, '0,x': reference='x': expected a whole number"),
    (("0,1", "--reference-frames", "16"), "reference=1, but there are 1"),
    (("0,1", "--reference-frames", "16;1"), "--reference-frames 16;1: expected the frames of each, as in 16,1"),
    (("0,1", "--frames", "0"), "1 or more, got 0"),
])
def test_the_file_refuses_in_one_line(args, message, drawn, capsys):
    with pytest.raises(SystemExit, match="^2$"):
        drawn(*args)
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
