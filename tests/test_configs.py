"""Tests configs: which configs load, what a dump holds, and what the error says of one that does not load."""
import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest

from configs import RECIPE, Config, dump, load
from model import STDiTConfig

ROOT = Path(__file__).parents[1]
STAGES = ("image", "stage1_240p", "stage1_144p", "stage1", "stage2", "stage3")
GOOD = dict(vae="v", text_encoder="t", data="meta.csv", buckets={"144p": {16: (1.0, 4)}}, mask_ratios={"mask_no": 1.0},
            lr=1e-4, steps=10, out="runs/x")


# ---------------------------------------------------------------- what loads

@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "configs").glob("[!_]*.py"))
                                  if path.stem != "plan"])
def test_a_shipped_config_loads_and_survives_a_dump(name, tmp_path):
    config = load(f"configs/{name}.py")
    assert isinstance(config, Config)
    (tmp_path / "config.py").write_text(dump(config))
    again = load(str(tmp_path / "config.py"))
    assert again == config
    assert list(again.buckets) == list(config.buckets)                  # equal dictionaries may differ in order
    assert list(again.mask_ratios) == list(config.mask_ratios)


def changed(value):
    """Returns a value of the same type that differs from `value`."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.25
    if isinstance(value, str):
        return value + "/other 'name'"
    if isinstance(value, tuple):
        return tuple(changed(item) for item in value)
    raise TypeError(value)


def test_a_dump_holds_every_field(tmp_path):
    """Changes each field by itself where it can be changed so, and the others by hand."""
    by_hand = {"model": STDiTConfig(depth=3), "buckets": {"240p": {1: (0.5, 2), 16: (0, None)}},
               "mask_ratios": {"mask_no": 0.5, "mask_image_head": 0.5}, "prediction": "v", "sampler": "ddim",
               "dtype": "fp32", "prompts": ("a = b", "it's \"quoted\"\n")}
    values = {}
    for field in dataclasses.fields(Config):
        base = GOOD.get(field.name, field.default)
        values[field.name] = by_hand[field.name] if field.name in by_hand else changed(base)
    config = Config(**values)
    (tmp_path / "config.py").write_text(dump(config))
    again = load(str(tmp_path / "config.py"))
    for name in values:
        assert getattr(again, name) == getattr(config, name), name


@pytest.mark.parametrize("stage", STAGES[3:])
def test_a_stage_has_the_numbers_of_open_sora(stage):
    golden = json.loads((ROOT / "tests/golden/d_buckets.json").read_text())["configs"][stage]
    config = load(stage)
    buckets = json.loads(json.dumps(config.buckets))                    # with text for keys and lists, as there
    assert buckets == golden
    assert config.model == STDiTConfig()
    assert (config.lr, config.grad_clip, config.world) == (2e-5, 1.0, 64)
    assert config.mask_ratios == RECIPE and RECIPE["mask_no"] == 0.75


def test_each_stage_starts_from_the_one_before():
    configs = [load(name) for name in STAGES]
    for earlier, later in zip(configs, configs[1:]):
        assert later.init == earlier.out
    assert [config.init_optimizer for config in configs] == [False] * 5 + [True]
    finetune = load("finetune")                                         # uses the published weights as trained
    assert finetune.init == "hpcai-tech/OpenSora-STDiT-v2-stage3"
    assert finetune.model.as_released


def test_the_phases_of_stage_1_have_the_numbers_of_open_sora():
    phases = [load(name) for name in STAGES[1:4]]
    assert [config.steps for config in phases] == [24_000, 40_000, 17_000]
    assert [config.speed for config in phases] == [True, True, False]
    assert [1 - config.mask_ratios["mask_no"] for config in phases] == pytest.approx([0.10, 0.10, 0.25])
    last = phases[2]
    for config in phases[:2]:           # they differ in these fields only
        assert config == replace(last, buckets=config.buckets, mask_ratios=config.mask_ratios, speed=True,
                                 steps=config.steps, checkpointing=config.checkpointing, out=config.out,
                                 init=config.init)


def test_the_first_phases_train_mostly_at_their_resolution():
    """Follows large clips of 16 frames: a bucket keeps a share of those that the larger ones have left."""
    for name, resolution in (("stage1_240p", "240p"), ("stage1_144p", "144p")):
        config = load(name)
        left = 1.0
        shares = {}
        for level in ("240p", "256", "144p"):
            shares[level] = left * config.buckets[level][16][0]
            left -= shares[level]
        assert shares[resolution] > 0.7, shares


def test_overrides_replace_single_fields():
    config = load("stage1", ["--lr=1e-3", "--model.depth=4", "--world=1", "--prompts=('a = b',)", "--out=runs/7",
                             "--buckets={'256': {1: (0.5, 2), 16: (0, None)}}", "--speed=True", "--grad_clip=2"])
    stage1 = load("stage1")
    expected = replace(stage1, lr=1e-3, model=replace(stage1.model, depth=4), world=1, prompts=("a = b",), out="runs/7",
                       buckets={"256": {1: (0.5, 2), 16: (0, None)}}, speed=True, grad_clip=2)
    assert config == expected
    assert config.model.depth == 4 and config.model.hidden_size == 1152
    assert stage1 == load("configs/stage1.py") != config                # nothing of the overrides stays behind


def test_a_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config(**GOOD).lr = 1.0


# ---------------------------------------------------------------- what does not

@pytest.mark.parametrize("text, message", [
    ("--learning_rate=1", "learning_rate"),
    ("--frame_intervall=1", "frame_intervall.*'frame_interval'"),
    ("--model.dept=4", "model.dept.*'depth'"),
    ("--lr.x=1", "lr.x"),
    ("--lr=fast", "lr='fast'.*float"),
    ("--steps=1.5", "steps=1.5.*int"),
    ("--steps=True", "steps=True.*int"),
    ("--speed=1", "speed=1.*bool"),
    ("--prompts=('a', 1)", "prompts="),
    ("--model=4", "model=4.*STDiTConfig"),
    ("--buckets={240: {16: (1.0, 4)}}", "buckets.*240"),
    ("--buckets={[]: 1}", "buckets"),
    ("--mask_ratios={1: 1.0}", "mask_ratios.*1"),
    ("--mask_ratios={'mask_no': 'a'}", "mask_ratios.*'a'"),
    ("--data=(1, 2)", r"data=\(1, 2\)"),
    ("--model.patch_size=(1, 2)", r"patch_size.*\(1, 2\)"),
    ("--lr=__import__('os').getcwd()", "lr=.*__import__"),              # an override is a literal: nothing is run
    ("--model.depth='4'", "model.depth='4'.*int"),
    ("--model.depth=0", "depth=0"),
    ("--model.num_heads=0", "num_heads=0"),
    ("--model.patch_size=(1,0,2)", r"patch_size=\(1, 0, 2\)"),
    ("--model.model_max_length=0", "model_max_length=0"),
    ("--lr=-1", "lr=-1"),
    ("--lr=0", "lr=0"),
    ("--sp=0", "sp=0"),
    ("--world=0", "world=0"),
    ("--warmup_steps=-1", "warmup_steps=-1"),
    ("--weight_decay=-0.1", "weight_decay=-0.1"),
    ("--ema_decay=1.0", "ema_decay=1.0"),
    ("--prediction=x0", "prediction='x0'.*'eps'.*'v'"),
    ("--dtype=fp16", "dtype='fp16'.*'fp32'.*'bf16'"),
    ("--holdout=1.5", "holdout=1.5"),
    ("--validate_every=5", "validate_every=5.*holdout"),
    ("--windows=-1", "windows=-1"),
    ("--windows=0", "windows=0.*cache"),                                # the tiny config has a cache
    ("--init_optimizer=True", "init_optimizer=True.*init"),
    ("--mask_ratios={'mask_no': 0.5}", "mask_ratios.*0.5"),
    ("--grad_clip=1e999", "grad_clip=inf"),                             # a dump would hold `inf`, a name
    ("--cfg_scale=1e999", "cfg_scale=inf"),
    ("--seed=99999999999999999999", "seed=9+"),
    ("--data=()", r"data=\(\)"),
    ("--out=", "out=''"),
    ("--buckets={}", "buckets={}"),
    ("--buckets={'145p': {1: (1.0, 4)}}", "buckets.*'145p'.*'144p'"),
    ("--buckets={'144p': {1: (1.0, None)}}", r"buckets\['144p'\]\[1\].*None"),
    ("--buckets={'144p': {1: (0.1, 0)}}", r"buckets\['144p'\]\[1\].*0\)"),
    ("--buckets={'144p': {1: (1.0, -4)}}", r"buckets\['144p'\]\[1\].*-4\)"),
    ("--buckets={'144p': {1: (1.5, 4)}}", r"buckets\['144p'\]\[1\].*1.5"),
    ("--buckets={'144p': {0: (1.0, 4)}}", r"buckets\['144p'\]\[0\]"),
    ("--buckets={'144p': {1: 4}}", "buckets.*4"),
    ("--buckets={'144p': {1: (0.0, 4), 16: (0.0, None)}}", "buckets=.*no clip"),
    ("--buckets={'144p': {1: (1.0, 4)}, '240p': {}}", r"buckets\['240p'\]"),
    ("lr=1", "'lr=1'.*--key=value"),
    ("--lr", "'--lr'.*--key=value"),
])
def test_a_wrong_override_is_an_error_that_names_the_field(text, message):
    with pytest.raises(ValueError, match=message):
        load("tiny", [text])


@pytest.mark.parametrize("source, message", [
    (f"from configs import Config\nconfig = Config(**{GOOD | {'learning_rate': 1.0}!r})", "'learning_rate'"),
    (f"from configs import Config\nconfig = Config(**{GOOD | {'warmup': 1}!r})", "'warmup'.*'warmup_steps'"),
    (f"from configs import Config\nconfig = Config(**{GOOD | {'lr': '1e-4'}!r})", "lr='1e-4'.*float"),
    (f"from configs import Config\nconfig = Config(**{GOOD | {'lr': None}!r})", "lr=None.*float"),
    ("from configs import Config\nconfig = Config(lr=1.0)", "'vae'.*'steps'"),
    ("from model import STDiTConfig\nSTDiTConfig(heads=4)", "'heads'.*'num_heads'"),
    ("lr = 1.0", "config = Config"),
    ("# A heading\n```", "SyntaxError"),
    ("config = Confg()", "Confg"),
    ("import no_such_module", "no_such_module"),
])
def test_a_file_that_is_no_config_is_named(tmp_path, source, message):
    (tmp_path / "bad.py").write_text(source)
    with pytest.raises(ValueError, match=rf"bad\.py: .*{message}"):
        load(str(tmp_path / "bad.py"))


def test_a_missing_file_is_an_error_that_lists_the_shipped_ones():
    with pytest.raises(FileNotFoundError, match="stage9.py.*configs/stage1.py"):
        load("stage9.py")
