"""masks.py against the distributions measured on Open-Sora 1.1, and its properties for every length."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from masks import RECIPE, STRATEGIES, check_ratios, draw_mask, strategy_mask

ROOT = Path(__file__).parents[1]
DIST = json.loads((ROOT / "tests/golden/c_mask_generator.json").read_text())["dist"]


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


def run(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "masks.py", *args], cwd=ROOT, capture_output=True, encoding="utf-8")


def test_the_file_runs():
    lines = run("8").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(STRATEGIES)
    assert "░███████" in next(line for line in lines if line.startswith("mask_image_head "))
    wrong = run("0")
    assert wrong.returncode == 2 and "1 or more, got 0" in wrong.stderr
