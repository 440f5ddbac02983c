"""configs: what loads, what does not and what the error says."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs import RECIPE, Config, dump, load
from model import QUIRKS, STDiT, STDiTConfig

ROOT = Path(__file__).parents[1]
STAGES = ("image", "stage1_240p", "stage1_144p", "stage1", "stage2", "stage3")
GOOD = dict(vae="v", text_encoder="t", data="meta.csv", buckets={"144p": {16: (1.0, 4)}}, mask_ratios={"mask_no": 1.0},
            lr=1e-4, steps=10, out="runs/x")


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "configs").glob("[!_]*.py"))])
def test_shipped_configs_load_build_and_survive_a_dump(name, tmp_path):
    config = load(f"configs/{name}.py")
    with torch.device("meta"):
        assert STDiT(config.model).config == config.model
    (tmp_path / "config.py").write_text(dump(config))
    again = load(str(tmp_path / "config.py"))
    assert again == config
    assert dump(again) == dump(config)  # equal dictionaries may differ in order, their text may not


@pytest.mark.parametrize("stage", STAGES[3:])
def test_stages_have_upstreams_numbers(stage):
    golden = json.loads((ROOT / "tests/golden/d_buckets.json").read_text())["configs"][stage]
    config = load(stage)
    assert {r: {str(t): list(v) for t, v in lengths.items()} for r, lengths in config.buckets.items()} == golden
    assert (config.model, config.lr, config.grad_clip, config.world) == (STDiTConfig(), 2e-5, 1.0, 64)
    assert sum(config.mask_ratios.values()) == pytest.approx(1) and config.mask_ratios["mask_no"] == 0.75


def test_each_stage_starts_from_the_one_before():
    for earlier, later in zip(STAGES, STAGES[1:]):
        assert load(later).init == load(earlier).out
    finetune = load("finetune")                                     # of the published weights, as these are used to
    assert finetune.init == "hpcai-tech/OpenSora-STDiT-v2-stage3" and finetune.captions_cleaned and finetune.raw_fps
    assert all(getattr(finetune.model, name) for name in QUIRKS)
    assert [name for name in STAGES if load(name).init_optimizer] == ["stage3"]      # of stage 2, as upstream


def test_the_phases_of_stage_1_have_upstreams_numbers():
    phases = [load(name) for name in STAGES[1:4]]
    assert [config.steps for config in phases] == [24_000, 40_000, 17_000]
    assert [config.checkpointing for config in phases] == [1, 0, 0] and [p.speed for p in phases] == [True, True, False]
    assert [1 - config.mask_ratios["mask_no"] for config in phases] == pytest.approx([0.10, 0.10, 0.25])
    for config, most in zip(phases, ("240p", "144p")):
        left, share = 1.0, {}                                        # of large clips of 16 frames, by where they end
        for resolution in ("240p", "256", "144p"):
            share[resolution] = left * config.buckets[resolution][16][0]
            left -= share[resolution]
        assert share[most] > 0.7, share
        same = replace(config, buckets=phases[2].buckets, mask_ratios=RECIPE, speed=False, steps=17_000,
                       checkpointing=0, out=phases[2].out, init=phases[2].init)
        assert same == phases[2]


def test_overrides():
    config = load("stage1", ["--lr=1e-3", "--model.depth=4", "--world=1",
                             "--buckets={'256': {1: (0.5, 2), 16: (0, None)}}",
                             "--prompts=('a = b',)", "--out=runs/7", "--speed=True", "--grad_clip=2"])
    assert (config.lr, config.model.depth, config.world, config.out, config.speed) == (1e-3, 4, 1, "runs/7", True)
    assert config.buckets == {"256": {1: (0.5, 2), 16: (0, None)}} and config.prompts == ("a = b",)
    assert config.model.hidden_size == 1152 and config.grad_clip == 2
    assert load("stage1") == load("configs/stage1.py")  # nothing of the overrides stays behind


@pytest.mark.parametrize("text, message", [
    ("--learning_rate=1", "--learning_rate: there is no learning_rate, expected one of 'model', 'vae'"),
    ("--frame_intervall=1", "there is no frame_intervall, did you mean 'frame_interval'?"),
    ("--model.dept=4", "--model.dept: there is no model.dept, did you mean 'depth'?"),
    ("--lr.x=1", "there is no lr.x"),
    ("--lr=fast", "lr='fast' is of type str, expected float"),
    ("--steps=1.5", "steps=1.5 is of type float, expected int"),
    ("--steps=True", "steps=True is of type bool, expected int"),
    ("--speed=1", "speed=1 is of type int, expected bool"),
    ("--model.depth='4'", "model.depth='4' is of type str, expected int"),
    ("--betas=(0.9,)", r"betas=\(0.9,\) is of type tuple, expected tuple\[float, float\]"),
    ("--prompts=('a', 1)", r"expected tuple\[str, ...\]"),
    ("--model=4", "model=4 is of type int, expected STDiTConfig"),
    ("--lr=__import__('os').getcwd()", "lr=\"__import__.* is of type str"),  # literals only: nothing is run
    ("--lr=-1", "lr=-1: expected more than 0"),
    ("--lr=0", "lr=0: expected more than 0"),
    ("--sp=0", "sp=0: expected more than 0"),
    ("--skip_nonfinite=-1", "skip_nonfinite=-1: expected 0 or more"),
    ("--warmup_steps=-1", "warmup_steps=-1: expected 0 or more"),
    ("--ema_decay=1.0", "ema_decay=1.0: expected 0 or more and less than 1"),
    ("--prediction=x0", "prediction='x0': expected 'eps' or 'v'"),
    ("--dtype=fp16", "dtype='fp16': expected 'fp32' or 'bf16'"),
    ("--mask_ratios={'mask_no': 0.5}", "must sum to 1, got 0.5"),
    ("--buckets={'145p': {1: (1.0, 4)}}", "buckets: there is no resolution '145p', did you mean '144p'?"),
    ("--buckets={'144p': {1: (1.0, None)}}", r"buckets\['144p'\]\[1\] = \(1.0, None\): a bucket that keeps clips"),
    ("--buckets={'144p': {1: (0.1, 0)}}", "a bucket that keeps clips needs a batch size"),
    ("--buckets={'144p': {1: (1.5, 4)}}", "keep probability from 0 to 1"),
    ("--buckets={'144p': {0: (1.0, 4)}}", "1 frame or more"),
    ("--buckets={'144p': {1: 4}}", "buckets=.* is of type dict, expected dict"),
    ("--buckets={}", "buckets={}: keeps no clip at all, expected a keep probability above 0"),
    ("--buckets={'144p': {1: (0.0, 4), 16: (0.0, None)}}", "keeps no clip at all"),
    ("--buckets={'144p': {1: (1.0, 4)}, '240p': {}}", r"buckets\['240p'\] = {}: expected numbers of frames"),
    ("--buckets={'144p': {1: (1.0, -4)}}", "a bucket that keeps clips needs a batch size"),
    ("--world=0", "world=0: expected more than 0"),
    ("--grad_clip=1e999", "grad_clip=inf: expected more than 0, and finite"),     # a dump would read `inf`, a name
    ("--target_fps=1e999", "target_fps=inf: expected 0 or more, and finite"),
    ("--cfg_scale=1e999", "cfg_scale=inf: expected 0 or more, and finite"),
    ("--betas=(0.9,1.0)", r"betas=\(0.9, 1.0\): expected each 0 or more and less than 1"),
    ("--weight_decay=-0.1", "weight_decay=-0.1: expected 0 or more"),
    ("--seed=99999999999999999999", "seed=9+: expected an integer of 64 bits"),
    ("--data=()", r"data=\(\): expected a path"),
    ("--out=", "out='': expected a path"),
    ("--model.hidden_size=wide", "model.hidden_size='wide' is of type str, expected int"),
    ("--model.num_heads='4'", "model.num_heads='4' is of type str, expected int"),
    ("--model.depth=0", "must be 1 or more, got .*depth=0,"),
    ("--model.num_heads=0", "must be 1 or more, got .*num_heads=0,"),
    ("--model.patch_size=(1,0,2)", "must be 1 or more"),
    ("--model.model_max_length=0", "must be 1 or more"),
    ("lr=1", "override 'lr=1': expected --key=value"),
    ("--lr", "override '--lr': expected --key=value"),
])
def test_bad_overrides_say_why(text, message):
    with pytest.raises(ValueError, match=message):
        load("stage1", [text])


def test_an_optimizers_state_needs_a_run_that_has_it():
    with pytest.raises(ValueError, match="init_optimizer=True: expected False, or an init"):
        load("tiny", ["--init_optimizer=True"])


@pytest.mark.parametrize("change, message", [
    (dict(learning_rate=1.0), "bad.py: Config has no 'learning_rate'"),
    (dict(warmup=1), "bad.py: Config has no 'warmup', did you mean 'warmup_steps'?"),
    (dict(lr="1e-4"), "bad.py: lr='1e-4' is of type str, expected float"),
    (dict(lr=None), "bad.py: lr=None is of type NoneType"),
])
def test_bad_files_say_why(tmp_path, change, message):
    (tmp_path / "bad.py").write_text(f"from configs import Config\nconfig = Config(**{GOOD | change!r})\n")
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path / "bad.py"))


def test_other_bad_files(tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("from configs import Config\nconfig = Config(lr=1.0)\n")
    with pytest.raises(ValueError, match="bad.py: .*missing 7 required"):
        load(str(path))
    path.write_text("from model import STDiTConfig\nSTDiTConfig(heads=4)\n")
    with pytest.raises(ValueError, match="STDiTConfig has no 'heads', did you mean 'num_heads'?"):
        load(str(path))
    path.write_text("lr = 1.0\n")
    with pytest.raises(ValueError, match="expected a line `config = Config"):
        load(str(path))


def test_missing_file_names_those_there_are():
    with pytest.raises(FileNotFoundError, match="no config file stage9.py, there are: .*configs/stage1.py"):
        load("stage9.py")


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config(**GOOD).lr = 1.0


@pytest.mark.parametrize("text", ["# A heading\n```", "config = Confg()", "import no_such_module"])
def test_a_file_that_is_no_config_is_one_line(text, tmp_path):
    (tmp_path / "notes.md").write_text(text)
    with pytest.raises(ValueError, match=r"notes\.md: \w+Error: .* expected Python that ends in `config = Config"):
        load(str(tmp_path / "notes.md"))
