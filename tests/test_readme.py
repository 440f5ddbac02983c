"""README.md and assets/README.zh-CN.md: links lead somewhere, commands exist and run, both languages have the same."""
import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

import configs
from data import write_video
from test_assets import pan

ROOT = Path(__file__).parents[1]
ENGLISH = ROOT / "README.md"
CHINESE = ROOT / "assets/README.zh-CN.md"
EACH_README = pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=lambda path: path.name)
FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.M | re.S)
INLINE_CODE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
PICTURE = re.compile(r"!\[[^\[\]]*\]\(([^)\s]+)[^)]*\)")
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)[^)\n]*\)")
TAG = re.compile(r"""\b(?:src|srcset|href)\s*=\s*["']([^"'\s]+)""")


def read(path):
    return path.read_text(encoding="utf-8")


# ---- links ----

def without_code(text):
    """Returns the text in which brackets of code are no links."""
    text = FENCE.sub("", text)
    return INLINE_CODE.sub(lambda code: re.sub(r"[][<>=]", "_", code[0]), text)


def targets(text):
    """Returns where the links and pictures of a text lead."""
    text = without_code(text)
    words_are_out = PICTURE.sub("", text)
    links = [target for _, target in LINK.findall(words_are_out)]
    return PICTURE.findall(text) + links + TAG.findall(text)


def headings(text):
    """Returns (level, words) of each heading."""
    found = re.findall(r"^(#{1,6})[ \t]+(.+?)[ \t#]*$", FENCE.sub("", text), re.M)
    return [(len(marks), words) for marks, words in found]


def anchors(text):
    """Returns the anchors that GitHub makes: lower case, blanks become -, of twins the second one gets -1."""
    found = set(re.findall(r"""\b(?:id|name)=["']([^"']+)["']""", FENCE.sub("", text)))
    seen = Counter()
    for _, words in headings(text):
        words = LINK.sub(r"\1", PICTURE.sub("", words))
        slug = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


@EACH_README
def test_links_lead_somewhere(readme):
    found = targets(read(readme))
    assert found
    for target in found:
        if re.match(r"[a-z]+:", target):                                # https:, mailto:
            continue
        name, _, anchor = target.partition("#")
        file = (readme.parent / name).resolve() if name else readme
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(read(file)), target


# ---- commands ----

def command_lines(text):
    """Returns the python and torchrun commands of a text, as lists of words: in code blocks, backticks and <code>."""
    lines = []
    for fence in FENCE.finditer(text):
        lines += fence[0].replace("\\\n", " ").splitlines()
    rest = FENCE.sub("", text)
    lines += re.findall(r"`((?:python|torchrun) [^`]+)`", rest)
    lines += re.findall(r"<code>((?:python|torchrun) [^<]+)</code>", rest)
    found = []
    for line in lines:
        for part in re.split(r"\s&&\s", line.removeprefix("$ ")):
            part = re.sub(r"^(\w+=\S+\s+)+", "", part.strip())          # VARIABLE=value before it
            if re.match(r"(python|torchrun) .*(\.py\b|-m )", part):
                found.append(shlex.split(part, comments=True))
    return found


def script_of(words):
    """Returns (the module that a command runs, its arguments): "assets.shapes", "tests.bench_data", "train"."""
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    return words[at].removesuffix(".py").replace("/", "."), words[at + 1:]


@cache
def known_flags(module, command=None):
    """Returns the flags of a script, with those of a subcommand: what its --help shows.

    A script without a parser is not started; its source has the flags that it compares with."""
    source = read(ROOT / f"{module.replace('.', '/')}.py")
    shown = " ".join(re.findall(r"""["'](--[\w-]+)""", source))
    if "Parser(" in source:
        shown = shown_help(module, "--help")
        if command:
            shown += shown_help(module, command, "--help")
    flags = set(re.findall(r"--[a-zA-Z][\w-]*", shown)) | {"--help"}
    if "configs.load(" in source and "overrides" in source:
        flags |= {f"--{field.name}" for field in fields(configs.Config)}
    return flags


def shown_help(module, *arguments):
    """Returns what a script prints when started with these arguments, and nothing where they are an error."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr("sys.argv", [module, *arguments])
        with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            importlib.import_module(module.removeprefix("tests.")).main()
    return printed.getvalue()


def wrong_command(words):
    """Returns what a command names that does not exist, or None."""
    module, arguments = script_of(words)
    for name in [f"{module.replace('.', '/')}.py", *arguments]:
        is_ours = name == f"{module.replace('.', '/')}.py" or re.match(r"(configs|assets|tests)/", name)
        if is_ours and not (ROOT / name).exists():
            return f"{shlex.join(words)}: no {name}"
    subcommand = arguments[0] if module == "curate" or "cache" in arguments else None
    for word in arguments:
        flag = re.match(r"--[a-zA-Z][\w-]*", word)
        if flag and flag[0] not in known_flags(module, subcommand):
            return f"{shlex.join(words)}: {module} has no {flag[0]}"
    return None


@EACH_README
def test_commands_name_what_exists(readme):
    found = command_lines(read(readme))
    assert len(found) > 5
    assert [wrong for wrong in map(wrong_command, found) if wrong] == []


# ---- code shown in place ----

def code_blocks(text):
    """Returns the blocks of Python in a text, without their fences."""
    return [fence[0].partition("\n")[2].removesuffix("```") for fence in FENCE.finditer(text)
            if fence[0].startswith("```python")]


def is_usage(block):
    """Returns whether a block shows how our code is called, rather than our code."""
    return re.match(r"from \w+ import ", block)


@EACH_README
def test_shown_code_stands_in_the_sources(readme):
    """Whole lines, only indented otherwise."""
    sources = [f"\n{read(path)}" for path in (*ROOT.glob("*.py"), *ROOT.glob("configs/*.py"))]
    blocks = [block for block in code_blocks(read(readme)) if not is_usage(block)]
    assert len(blocks) >= 8
    for block in blocks:
        indented = [textwrap.indent(block, " " * width) for width in range(0, 17, 4)]
        assert any(f"\n{text}" in source for text in indented for source in sources), block


@pytest.mark.slow
def test_shown_usage_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = [block for block in code_blocks(read(ENGLISH)) if is_usage(block)]
    assert blocks
    for block in blocks:
        exec(block, {})


# ---- two languages ----

def test_both_languages_have_the_same_headings():
    assert [level for level, _ in headings(read(ENGLISH))] == [level for level, _ in headings(read(CHINESE))]


def test_both_languages_have_the_same_commands_code_and_pictures():
    assert command_lines(read(ENGLISH)) == command_lines(read(CHINESE))
    assert code_blocks(read(ENGLISH)) == code_blocks(read(CHINESE))
    english = [Path(target).name for target in PICTURE.findall(without_code(read(ENGLISH)))]
    chinese = [Path(target).name for target in PICTURE.findall(without_code(read(CHINESE)))]
    assert sorted(english) == sorted(chinese)


# ---- README's commands, run at small size ----

# What to add to a command that matches, so that it takes seconds.  What none matches is not run.
SMALL = {
    r"sample\.py --prompt .*": "--steps 3",
    r"sample\.py --prompts prompts\.txt": "--steps 3",
    r"sample\.py --ckpt runs/\w+ --prompt .*": "--steps 3",
    r"-m assets\.shapes data/shapes": "--num-clips=300",
    r"-m configs\.plan configs/stage2\.py .*": "",
    r"data\.py data/shapes/meta\.csv configs/tiny\.py": "--buckets={'64':{8:(1.0,2)}}",
    r"train\.py configs/tiny\.py": "--steps=2 --sample_every=0 --buckets={'64':{8:(1.0,2)}}",
    r"train\.py configs/tiny\.py --prediction=eps .*": "--sample_every=0 --buckets={'64':{8:(1.0,2)}}",
    r"train\.py configs/tiny\.py --data=data/mine/meta\.csv .*": "--steps=1 --buckets={'64':{8:(1.0,1)}}",
    r"train\.py configs/stage1\.py --print": "",
    r"vae\.py data/shapes/000000\.mp4 .*": "",
    r"masks\.py.*": "",
    r"model\.py": "",
    r"curate\.py run videos/ --out data/mine": "--workers 1",
    r"curate\.py cut videos/ --out data/cut": "--workers 1",
    r"curate\.py filter data/mine .*": "",
}
MAKES = {"data/shapes": "-m assets.shapes data/shapes", "runs/tiny": "train.py configs/tiny.py",
         "data/mine": "curate.py run videos/ --out data/mine",
         "samples/00-a-red-circle-moves-right.mp4": 'sample.py --prompt "a red circle moves right"',
         "samples/00-a-green-circle.png": 'sample.py --prompt "a green circle" --num-frames 1'}


def added_to(command):
    """Returns what makes a command small, or None."""
    for pattern, extra in SMALL.items():
        if re.fullmatch(pattern, command):
            return extra
    return None


def small_commands():
    """Returns the commands of README.md that are run here, each once, in its order."""
    found = []
    for words in command_lines(read(ENGLISH)):
        command = " ".join(f'"{word}"' if " " in word or "," in word else word for word in words[1:])
        if words[0] == "python" and added_to(command) is not None and command not in found:
            found.append(command)
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A function that runs a command in a copy of the project with raw videos; what the command needs is run before."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ROOT.glob("*.py"):
        shutil.copy(name, folder)
    for name in ("configs", "assets"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "videos").mkdir()
    (folder / "prompts.txt").write_text('a green circle moves up {"num_frames": 4, "seeds": [0, 1]}\n')
    for seed in (0, 1):
        write_video(folder / "videos" / f"{seed}.mp4", pan(seed, 60))
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    printed = {}

    def run(command):
        for needed, by in MAKES.items():
            if needed in command and command != by and by not in printed:
                run(by)
        if command not in printed:
            words = shlex.split(command) + added_to(command).split()
            done = subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True, encoding="utf-8")
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            printed[command] = done.stdout
        return folder, printed[command]
    return run


@pytest.mark.slow
@pytest.mark.parametrize("command", small_commands())
def test_a_command_runs(project, command):
    """It prints something, and what it says that it has written exists."""
    folder, printed = project(command)
    assert printed.strip()
    for name in re.findall(r"^(samples/\S+\.(?:png|mp4))", printed, re.M):
        assert (folder / name).stat().st_size > 100
    if " --out " in command:
        out = shlex.split(command.partition(" --out ")[2])[0]
        assert (folder / out).exists()


def test_the_first_results_are_among_them():
    """Sampling, the shapes, training and sampling from that."""
    found = small_commands()
    for start in ("sample.py --prompt", "-m assets.shapes", "train.py configs/tiny.py", "sample.py --ckpt runs/tiny"):
        assert any(command.startswith(start) for command in found), f"README.md has no command {start}"
