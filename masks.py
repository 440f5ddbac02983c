"""Which frames of a clip are given and which are generated.

In: the number of latent frames T, the share of each strategy, a torch.Generator.  Out: x_mask, bool [T], True = noised.
A model that trained with such masks continues a clip, connects two clips, animates an image and closes a gap, and it
does so with its one network: a given frame is simply told t = 0 (model.py).

Run:  python masks.py [T]      draws every strategy's masks, given frames light and noised frames dark
Source: the recipe of Open-Sora 1.1 (its report 02): https://github.com/hpcaitech/Open-Sora
"""

import argparse
import difflib
import sys
from collections.abc import Mapping

import torch

# Where the given frames are: anywhere in one piece, at the start, at the end, at both ends. How many: one ("image"), or
# 1 to T // 4, all counts alike ("quarter"); at both ends the same number twice.
PLACES = ("random", "head", "tail", "head_tail")
STRATEGIES = ("mask_no", *(f"mask_{size}_{place}" for size in ("quarter", "image") for place in PLACES))
RECIPE = {name: 0.75 if name == "mask_no" else 0.05 if name.endswith("head_tail") else 0.025 for name in STRATEGIES}


def check_ratios(ratios: Mapping[str, float]) -> None:
    """Raises ValueError unless `ratios` maps known strategies to shares of clips that are >= 0 and sum to 1."""
    for name, ratio in ratios.items():
        if name not in STRATEGIES:
            close = difflib.get_close_matches(name, STRATEGIES, n=1, cutoff=0.3)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"mask_ratios: unknown strategy {name!r}{meant} There are: {', '.join(STRATEGIES)}")
        if not ratio >= 0:                                             # also catches nan
            raise ValueError(f"mask_ratios[{name!r}] = {ratio}: a share of clips must be 0 or more")
    total = sum(ratios.values())
    if abs(total - 1) > 1e-6:
        raise ValueError(f"mask_ratios must sum to 1, got {total:g}: add {1 - total:g} to mask_no")


def strategy_mask(name: str, T: int, generator: torch.Generator) -> torch.Tensor:
    """One mask of one strategy, bool [T], True = noised. At least one frame is noised, whatever T is."""
    x_mask = torch.ones(T, dtype=torch.bool)
    if name == "mask_no" or T == 1:                                    # a still image has no frame to spare
        return x_mask
    size, place = name.removeprefix("mask_").split("_", 1)
    most = max(1, T // 4) if size == "quarter" else 1                  # T = 2, 3 have no quarter: one frame
    given = int(torch.randint(1, most + 1, (), generator=generator))
    if place == "random":
        start = int(torch.randint(0, T - given + 1, (), generator=generator))
        x_mask[start : start + given] = False
    if place in ("head", "head_tail"):
        x_mask[:given] = False
    if place == "tail" or place == "head_tail" and T > 2:              # both ends of T = 2 would leave nothing to do
        x_mask[T - given :] = False
    return x_mask


def draw_mask(T: int, ratios: Mapping[str, float], generator: torch.Generator) -> torch.Tensor:
    """One clip's x_mask, bool [T], True = noised: strategy `name` with probability ratios[name] (see check_ratios)."""
    u = float(torch.rand((), generator=generator, dtype=torch.float64))
    for name, ratio in ratios.items():
        u -= ratio
        if u < 0:
            return strategy_mask(name, T, generator)
    return torch.ones(T, dtype=torch.bool)                             # shares that sum to 1 - 1e-7


def main() -> None:
    parser = argparse.ArgumentParser(description="Draws the masks of each training strategy.")
    parser.add_argument("T", type=int, nargs="?", default=16, help="latent frames, 1 or more")
    T = parser.parse_args().T
    if T < 1:
        parser.error(f"T is a number of latent frames, 1 or more, got {T}: python masks.py 16")
    sys.stdout.reconfigure(encoding="utf-8")                           # Windows consoles default to a code page
    generator = torch.Generator().manual_seed(0)
    print(f"masks of {T} latent frames: █ noised, to be generated   ░ given.  In brackets the recipe's share of clips.")
    for name in STRATEGIES:
        masks = [strategy_mask(name, T, generator) for _ in range(max(1, min(4, 80 // (T + 2))))]
        pictures = ["".join("█" if noised else "░" for noised in x_mask.tolist()) for x_mask in masks]
        print(f"{name:23s} ({RECIPE[name]:5.1%})   {'  '.join(pictures)}")


if __name__ == "__main__":
    from masks import main; main()
