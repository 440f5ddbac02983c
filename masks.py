"""Which frames of a clip are given and which are generated, in training and in sampling.

    python masks.py 16                                     draws every training strategy's masks of 16 latent frames
    python masks.py "0,0,0,0,8,0.3" --frames 16            draws which frame gets what in sampling
    python masks.py "0;0,1,0,-1,1" --reference-frames 16,1 the same, of references of 16 frames and of 1

Training.  In: the number of latent frames T, the share of each strategy, a torch.Generator.  Out: x_mask, bool [T],
True = noised.  A model that was trained with such masks continues a clip, connects two clips, animates an image and
closes a gap, with one and the same network: for a given frame it is conditioned on t = 0 (model.py).

Sampling.  In: groups such as "0,1,-4,0,4" (Given), the length of each reference.  Out: for every latent frame the
reference frame that it comes from, and how much of it is generated, 0 to 1.

The recipe and the strategy string are those of Open-Sora 1.1 (its report 02), https://github.com/hpcaitech/Open-Sora.
"""
import argparse
import difflib
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import torch


# ---------------------------------------------------------------- training
# The given frames are one ("image") or 1 to T // 4, each count as likely as the others ("quarter"); they are in one
# piece anywhere ("random"), at the start, at the end, or as many at both ends.  Kinds and shares are those of
# Open-Sora's stages: a quarter of the clips are masked.
RECIPE = {
    "mask_no": 0.75,
    "mask_quarter_random": 0.025, "mask_quarter_head": 0.025, "mask_quarter_tail": 0.025,
    "mask_quarter_head_tail": 0.05,
    "mask_image_random": 0.025, "mask_image_head": 0.025, "mask_image_tail": 0.025,
    "mask_image_head_tail": 0.05,
}
STRATEGIES = tuple(RECIPE)


def check_ratios(ratios: Mapping[str, float]) -> None:
    """Raises ValueError unless `ratios` maps known strategies to shares of clips that are 0 or more and sum to 1."""
    for name, ratio in ratios.items():
        if name not in STRATEGIES:
            close = difflib.get_close_matches(str(name), STRATEGIES, n=1, cutoff=0.3)
            meant = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"mask_ratios: unknown strategy {name!r}{meant} Expected some of {', '.join(STRATEGIES)}")
        if not isinstance(ratio, (int, float)) or not ratio >= 0:      # also catches nan
            raise ValueError(f"mask_ratios[{name!r}] = {ratio!r}: a share of clips must be 0 or more")
    total = sum(ratios.values())
    if abs(total - 1) > 1e-6:
        raise ValueError(f"mask_ratios must sum to 1, got {total:g}: add {1 - total:g} to mask_no")


def strategy_mask(name: str, T: int, generator: torch.Generator) -> torch.Tensor:
    """Returns a mask of one strategy, bool [T], True = noised.  At least one frame is noised, whatever T is."""
    x_mask = torch.ones(T, dtype=torch.bool)
    if name == "mask_no" or T == 1:                                    # the one frame of an image is generated
        return x_mask
    size, place = name.removeprefix("mask_").split("_", 1)
    most = max(1, T // 4) if size == "quarter" else 1                  # T = 2, 3 have no quarter: one frame
    given = int(torch.randint(1, most + 1, (), generator=generator))
    if place == "random":
        start = int(torch.randint(0, T - given + 1, (), generator=generator))
        x_mask[start : start + given] = False
    if place in ("head", "head_tail"):
        x_mask[:given] = False
    if place == "tail" or place == "head_tail" and T > 2:              # both ends of 2 frames would be all of them
        x_mask[T - given :] = False
    return x_mask


def draw_mask(T: int, ratios: Mapping[str, float], generator: torch.Generator) -> torch.Tensor:
    """Returns the x_mask of a clip, bool [T], True = noised, of a strategy that is drawn with the ratios' shares."""
    u = float(torch.rand((), generator=generator, dtype=torch.float64))
    for name, ratio in ratios.items():
        u -= ratio
        if u < 0:
            return strategy_mask(name, T, generator)
    return torch.ones(T, dtype=torch.bool)                             # shares that sum to 1 - 1e-7


# ---------------------------------------------------------------- sampling: the strategy string
@dataclass(frozen=True)
class Given:
    """A group: `length` frames of a reference from ref_start on become the clip's frames from target_start on.

    Latent frames are counted from 0; a negative reference or start counts from the end.  Raises ValueError."""
    segment: int = 0                # which clip of a long video
    reference: int = 0              # among the references given, then the segments already made
    ref_start: int = 0
    target_start: int = 0
    length: int = 1
    edit: float = 0.0               # 0: held as given; r: noised, then generated in the last r of the steps; 1: free

    def __post_init__(self):
        if self.segment < 0:
            raise ValueError(f"segment={self.segment}: expected 0, the first, or more")
        if self.length < 0:
            raise ValueError(f"length={self.length}: expected 0 frames or more")
        if not 0 <= self.edit <= 1:                                    # also catches nan
            raise ValueError(f"edit={self.edit}: expected 0 (held as given) to 1 (generated from noise alone)")


FIELDS = Given.__annotations__


def parse_strategy(text: str) -> list[Given]:
    """Returns the groups of "segment,reference,ref_start,target_start,length,edit;...", as in "0;0,1,0,-1,1".

    What a group leaves out at its end has Given's default.  "" holds no group, and a ";" at the end adds none.  Raises
    ValueError, which names group and field."""
    parts = [part.strip() for part in text.split(";")]
    if not parts[-1]:
        parts.pop()
    groups = []
    for number, part in enumerate(parts, 1):
        try:
            groups.append(parse_group(part))
        except ValueError as error:
            raise ValueError(f"mask strategy, group {number} of {len(parts)}, {part!r}: {error}") from None
    return groups


def parse_group(part: str) -> Given:
    values = part.split(",") if part else []
    if not 1 <= len(values) <= len(FIELDS):
        raise ValueError(f"{len(values) or 'no'} fields: expected 1 to {len(FIELDS)}, {','.join(FIELDS)}")
    numbers = []
    for (name, kind), value in zip(FIELDS.items(), values):
        try:
            numbers.append(kind(value))
        except ValueError:
            words = {int: "a whole number", float: "a number from 0 to 1"}[kind]
            raise ValueError(f"{name}={value.strip()!r}: expected {words}, as in 0,0,0,0,8,0.3") from None
    return Given(*numbers)


def format_strategy(groups: Sequence[Given]) -> str:
    """Returns the string that parse_strategy reads as these groups, with all six fields."""
    return ";".join(",".join(str(value).removesuffix(".0") for value in astuple(group)) for group in groups)


def place_groups(groups: Sequence[Given], segment: int, num_frames: int, lengths: Sequence[int]):
    """Yields (group, reference, its frames, the clip's frames) of a segment's groups, counted from 0; see frame_plan.

    As in the release, what is past an end is cut off, and a single frame of the reference serves all of the clip's.
    Raises ValueError if the lengths still differ."""
    for number, group in enumerate(groups, 1):
        if group.segment != segment:
            continue
        where = f"mask strategy, group {number} of {len(groups)}, '{format_strategy([group])}'"
        if not -len(lengths) <= group.reference < len(lengths):
            raise ValueError(f"{where}: reference={group.reference}, but there are {len(lengths)}: give more, or count "
                             "from 0, the first, or from -1, the last")
        ref_frames = lengths[group.reference]
        for name, count, owner in (("ref_start", ref_frames, "reference"), ("target_start", num_frames, "clip")):
            if getattr(group, name) < -count:
                raise ValueError(f"{where}: {name}={getattr(group, name)} is before the first of the {owner}'s {count} "
                                 f"frames: expected {-count} or more")
        taken = range(ref_frames)[group.ref_start :][: group.length]
        targets = range(num_frames)[group.target_start :][: group.length]
        if len(taken) not in (1, len(targets)):
            raise ValueError(f"{where}: length={group.length} is {len(taken)} of the reference's {ref_frames} frames "
                             f"but {len(targets)} of the clip's {num_frames}: expected as many, or a single one for "
                             "all; move ref_start or target_start, or shorten length")
        yield group, group.reference % len(lengths), taken, targets


def frame_plan(groups: Sequence[Given], segment: int, num_frames: int, lengths: Sequence[int]):
    """Returns (sources, strengths) of the T = num_frames latent frames of a segment.

    lengths    the frames of each reference
    sources    list of T: (reference, its frame), both counted from 0, or None
    strengths  float [T]: 0 = held as given, 1 = generated from noise alone (where the source is None); for r between
               them the last int(r * N) of N steps change the frame, in fp32: 0.29 of 100 steps are 29 (in fp64 28)
    Later groups override earlier ones.  A frame with edit = 1 is generated (the release starts it from the reference in
    place of noise).  Raises ValueError if a group does not fit."""
    sources = [None] * num_frames
    strengths = torch.ones(num_frames)
    for group, reference, taken, targets in place_groups(groups, segment, num_frames, lengths):
        for i, target in enumerate(targets):
            sources[target] = (reference, taken[i if len(taken) > 1 else 0]) if group.edit < 1 else None
            strengths[target] = group.edit
    return sources, strengths


# ---------------------------------------------------------------- sampling: what people ask for, as groups
# In training up to T // 4 frames are given at an end, so that a larger `keep` is untrained.  Lists of groups can be
# added, as in animate() + seamless(4).

def animate() -> list[Given]:
    """Returns the groups with which an image is the first frame."""
    return [Given()]


def extend_after(keep: int, segment: int = 0, reference: int = 0) -> list[Given]:
    """Returns the groups with which a clip's last `keep` frames come first; reference -1 is the segment before."""
    if keep < 1:
        raise ValueError(f"keep={keep}: expected 1 frame or more, as the result shares some with what is given")
    return [Given(segment, reference, ref_start=-keep, length=keep)]


def extend_before(keep: int, segment: int = 0, reference: int = 0) -> list[Given]:
    """Returns the groups with which a clip's first `keep` frames come last in a segment."""
    return [replace(after, ref_start=0, target_start=-keep) for after in extend_after(keep, segment, reference)]


def connect(keep: int = 1, segments: int = 1) -> list[Given]:
    """Returns the groups with which reference 0, the result and reference 1 play as one.

    A clip that is connected to itself becomes a loop."""
    return extend_after(keep, reference=0) + extend_before(keep, segment=segments - 1, reference=1)


def chain(keep: int, segments: int) -> list[Given]:
    """Returns the groups with which each segment starts with the last `keep` frames of the one before."""
    groups = []
    for segment in range(1, segments):
        groups += extend_after(keep, segment, reference=-1)
    return groups


def seamless(keep: int, segments: int = 2) -> list[Given]:
    """Returns the groups of a long video that loops, of segments * (T - keep) frames.

    Its last segment ends with the first `keep` frames of segment 0, which are left out when it is written.  If only one
    frame were repeated, the picture would close but not the motion."""
    if segments < 2:
        raise ValueError(f"seamless: segments={segments}: expected 2 or more, the last one leads back to the first")
    return chain(keep, segments) + extend_before(keep, segment=segments - 1, reference=1 - segments)


def edit(strength: float, num_frames: int) -> list[Given]:
    """Returns the groups with which a clip is changed by `strength`, 0 to 1."""
    return [Given(length=num_frames, edit=strength)]


def infill(start: int, stop: int, num_frames: int) -> list[Given]:
    """Returns the groups with which all of a clip is given but its frames start .. stop - 1."""
    if not 0 <= start < stop <= num_frames:
        raise ValueError(f"infill {start}:{stop}: expected START:STOP, 0 <= START < STOP <= {num_frames}, as in 4:12")
    before = Given(length=start)
    after = Given(ref_start=stop, target_start=stop, length=num_frames - stop)
    return [part for part in (before, after) if part.length]


# ---------------------------------------------------------------- pictures
def span(run):
    """Returns the ends of a range as text."""
    if not run:
        return "no frame"
    return f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0])


def draw_training(T: int) -> None:
    """Prints some masks of every strategy."""
    generator = torch.Generator().manual_seed(0)
    count = max(1, min(4, 80 // (T + 2)))
    print(f"masks of {T} latent frames: █ noised, to be generated   ░ given.  In brackets its share in the recipe")
    for name in STRATEGIES:
        masks = [strategy_mask(name, T, generator).tolist() for _ in range(count)]
        pictures = "  ".join("".join("░█"[noised] for noised in x_mask) for x_mask in masks)
        print(f"{name:23s} ({RECIPE[name]:5.1%})   {pictures}")


def draw_strategy(groups: Sequence[Given], num_frames: int, lengths: Sequence[int]) -> None:
    """Prints a line of frames per segment, and for each of its groups which frames come from where."""
    lines = ["█ generated   ▒ edited   ░ given as it is.  Lower lines override upper ones"]
    for segment in sorted({0, *(group.segment for group in groups)}):
        all_lengths = [*lengths, *[num_frames] * segment]               # the segments before are references, too
        _, strengths = frame_plan(groups, segment, num_frames, all_lengths)
        picture = "".join({0: "░", 1: "█"}.get(r, "▒") for r in strengths.tolist())
        lines.append(f"segment {segment}  {picture}")
        for group, reference, taken, targets in place_groups(groups, segment, num_frames, all_lengths):
            strength = f", strength {group.edit:g}" if group.edit else ""
            lines.append(f"{span(targets):>9s}  reference {reference}, {span(taken)}{strength}")
    print("\n".join(lines))


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="16", help="T latent frames, or a strategy (default: %(default)s)")
    sampling = parser.add_argument_group("of a strategy")
    sampling.add_argument("--frames", type=int, help="latent frames of the clip (default: 16)")
    sampling.add_argument("--reference-frames", help="of each reference, as in 16,1 (default: all as long as the clip)")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(encoding="utf-8")                           # Windows consoles default to a code page
    training = args.frames is None and re.fullmatch(r"-?\d+", args.what)
    try:
        T = int(args.what) if training else 16 if args.frames is None else args.frames
        if T < 1:
            raise ValueError(f"T is a number of latent frames, 1 or more, got {T}: python masks.py 16")
        if training:
            return draw_training(T)
        groups = parse_strategy(args.what)
        if args.reference_frames and not re.fullmatch(r"\d+(,\d+)*", args.reference_frames):
            raise ValueError(f"--reference-frames {args.reference_frames}: expected the frames of each, as in 16,1")
        count = max((max(group.reference + 1, -group.reference) for group in groups), default=0)
        lengths = [int(n) for n in args.reference_frames.split(",")] if args.reference_frames else [T] * count
        draw_strategy(groups, T, lengths)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
