"""README.md tells the truth: links, line numbers, commands; assets/README.zh-CN.md says the same in Chinese.

`python tests/test_readme.py fix` writes anew the line ranges of links that name a function,
[`loss_of`](train.py#L1-L2), the column `lines` of tables, and how many of these lines such links quote in all:
[2 of their 26 lines](#the-tour).
"""
import ast
import contextlib
import importlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "assets" / "README.zh-CN.md"
READMES = [path for path in (ENGLISH, CHINESE) if path.is_file()]
FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.M | re.S)
PICTURE = re.compile(r"!\[([^\[\]]*)\]\(([^)\s]+)[^)]*\)")
LINK = re.compile(r"\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^)\s]+)[^)\n]*\)")
TAG = re.compile(r"""\b(src|srcset|href)\s*=\s*["']([^"']+)["']""")
LINES = re.compile(r"L(\d*)(?:-L(\d*))?$")                              # as in train.py#L10-L30; fix fills in a bare #L
LINES_COLUMN = {"lines", "行数"}
QUOTED = re.compile(r"(\[[^][\d]*)(\d[\d,]*)([^][\d]+)(\d[\d,]*)([^][\d]*\]\(#)")     # [2 of their 26 lines](#the-tour)
NUMBER = re.compile(r"\d+(?:,\d{3}(?!\d))*(?:\.\d+)?")


# ---- reading Markdown ----

def prose(text):
    """Without code: what stands in fences or backticks is no link and no heading."""
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", lambda code: re.sub(r"[][<>=]", "_", code[0]), FENCE.sub("", text))


def blocks(text):
    """The insides of fenced code."""
    return ["\n".join(fence[0].splitlines()[1:-1]) for fence in FENCE.finditer(text)]


def pictures(text):
    text = prose(text)
    return [target for _, target in PICTURE.findall(text)] + [
        target.split()[0] for kind, target in TAG.findall(text) if kind != "href"]


def links(text):
    """(words, target) of each."""
    text = prose(text)
    return LINK.findall(PICTURE.sub("", text)) + [("", target) for kind, target in TAG.findall(text) if kind == "href"]


def headings(text):
    """(level, words) of each."""
    found = re.findall(r"^(#{1,6})[ \t]+(.+?)[ \t#]*$", FENCE.sub("", text), re.M)
    return [(len(marks), words) for marks, words in found]


def anchors(text):
    """As GitHub makes them: letters of any script, lower case, digits, - and _ stay, blanks become -, twins get -1."""
    found, seen = set(re.findall(r"""\b(?:id|name)=["']([^"']+)["']""", FENCE.sub("", text))), Counter()
    for _, words in headings(text):
        words = LINK.sub(r"\1", PICTURE.sub("", words))
        slug = re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def tables(text):
    """(number of the heading's line, rows of cells); the row of --- is left out, but counted."""
    lines, start = text.splitlines(), 0
    while start < len(lines):
        end = start
        while end < len(lines) and lines[end].lstrip().startswith("|"):
            end += 1
        if end - start > 2:
            yield start, [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines[start:end]]
        start = max(end, start + 1)


# ---- what a link or a row should say ----

@cache
def defs(path):
    """{name, or Class.name: (first, last) line}; of two defs with one name the first."""
    found, tree = {}, ast.parse(path.read_text(encoding="utf-8"))

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                for name in (prefix + child.name, child.name):
                    found.setdefault(name, (child.lineno, child.end_lineno))
                visit(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix)
            else:
                visit(child, prefix)
    visit(tree, "")
    return found


def named(words):
    """The function that the words of a link name: `loss_of`, `loss_of()`, `Trainer.step`; else None."""
    name = re.fullmatch(r"`([A-Za-z_][\w.]*)(?:\(\))?`", words.strip())
    return name[1] if name and not re.search(r"\.(py|md|json)$", name[1]) else None


def place(readme, target):
    """The file, the part behind #."""
    path, _, anchor = target.partition("#")
    return (ROOT / path[1:] if path[:1] == "/" else (readme.parent / path).resolve()) if path else readme, anchor


def wrong_link(readme, text, words, target):
    """What is wrong with it, or None."""
    if re.match(r"[a-z]+:", target):                                    # https:, mailto:
        return None
    path, anchor = place(readme, target)
    if path != readme and not path.exists():
        return f"{target}: there is no such file"
    if not anchor:
        return None
    if path.suffix == ".md":
        there = anchors(text if path == readme else path.read_text(encoding="utf-8"))
        return None if anchor in there else f"{target}: no heading of {path.name} makes this anchor"
    if not (numbers := LINES.fullmatch(anchor)):
        return f"{target}: expected #L10 or #L10-L30"
    count = len(path.read_text(encoding="utf-8").splitlines())
    start, end = int(numbers[1] or 0), int(numbers[2] or numbers[1] or 0)
    if not 1 <= start <= end <= count:
        return f"{target}: {path.name} has lines 1 to {count}; run python tests/test_readme.py fix"
    if path.suffix == ".py" and (name := named(words)):
        if name not in defs(path):
            return f"[{words}]({target}): {path.name} defines no {name}; words that name none go without backticks"
        first, last = defs(path)[name]
        if start != first or end > last:
            return f"[{words}]({target}): {name} is L{first}-L{last}; run python tests/test_readme.py fix"
    return None


def count_lines(cell):
    """The lines of each file that a cell of a table names; of a folder, of its .py together."""
    found = []
    for name in re.findall(r"[\w/]+\.py|\b\w+/(?![\w.])", LINK.sub(r"\1", cell)):
        path = ROOT / name
        if path.exists():
            files = [path] if path.is_file() else sorted(path.glob("*.py"))
            found.append(sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files))
    return found


def lines_columns(text):
    """(line, column, what the cell in column `lines` says, what it should): a number a file, in a last row the sum."""
    for start, (heading, _, *rows) in tables(text):
        if column := [i for i, cell in enumerate(heading) if cell.lower() in LINES_COLUMN]:
            total = 0
            for i, row in enumerate(rows, start + 2):
                counts = count_lines(row[0])
                total += sum(counts)
                if counts or re.search(r"\d", row[column[0]]):
                    yield i, column[0], row[column[0]], ", ".join(f"{n:,}" for n in counts or [total])


def quoted(readme, text):
    """What QUOTED should say: the lines of .py in the ranges of links, each counted once; all lines of the tables."""
    found = set()
    for _, target in links(text):
        path, anchor = place(readme, target)
        if ":" not in target and path.suffix == ".py" and (numbers := LINES.fullmatch(anchor)) and numbers[1]:
            found |= {(path, i) for i in range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1)}
    counted = [rows for _, (heading, _, *rows) in tables(text) if LINES_COLUMN & {cell.lower() for cell in heading}]
    return len(found), sum(n for rows in counted for row in rows for n in count_lines(row[0]))


def fixed(readme, text):
    """text with true line ranges and line counts.  A range that begins and ends within its function stays."""
    def range_of(link):
        words, target = link.groups()[1:]
        if target is None:                                              # code
            return link[0]
        path, anchor = place(readme, target)
        if named(words) and path.suffix == ".py" and path.is_file() and LINES.fullmatch(anchor):
            if wrong_link(readme, text, words, target) and named(words) in defs(path):
                first, last = defs(path)[named(words)]
                return link[0].replace(target, f"{target.partition('#')[0]}#L{first}-L{last}")
        return link[0]
    lines = re.sub(f"{FENCE.pattern}|{LINK.pattern}", range_of, text, flags=re.M | re.S).splitlines()
    for i, column, _, should in lines_columns("\n".join(lines)):
        cells = lines[i].strip().strip("|").split("|")
        cells[column] = f" {should} "
        lines[i] = f"|{'|'.join(cells)}|"
    text = "\n".join(lines) + "\n" * text.endswith("\n")
    few, all_of_them = quoted(readme, text)
    return QUOTED.sub(rf"\g<1>{few:,}\g<3>{all_of_them:,}\g<5>", text)


def figures(text):
    """How often each number is said: not in code blocks, link targets and pictures."""
    text = PICTURE.sub("", FENCE.sub("", text))
    text = re.sub(r"<[^>]+>", "", LINK.sub(r"\1", text))
    return Counter(number.replace(",", "") for number in NUMBER.findall(text))


def differences(english, chinese):
    """Where the Chinese README is not the English one."""
    found, base = [], lambda targets: Counter(Path(target).name for target in targets)
    if [level for level, _ in headings(english)] != [level for level, _ in headings(chinese)]:
        found.append(f"headings: {headings(english)} and {headings(chinese)}")
    pairs = zip(blocks(english), blocks(chinese))
    found += [f"code block {i}:\n{a}\nand\n{b}" for i, (a, b) in enumerate(pairs) if a != b]
    if len(blocks(english)) != len(blocks(chinese)):
        found.append(f"{len(blocks(english))} and {len(blocks(chinese))} code blocks")
    for kind, a, b in (("numbers", figures(english), figures(chinese)),
                       ("pictures", base(pictures(english)), base(pictures(chinese)))):
        if a != b:
            found.append(f"{kind}: only in English {dict(a - b)}, only in Chinese {dict(b - a)}")
    return found


# ---- commands ----

def commands(text, inline=False):
    """[[word ...]] of each python and torchrun command in code blocks; inline: those in backticks too."""
    code = "\n".join(blocks(text)).replace("\\\n", " ").splitlines()
    code += re.findall(r"`((?:python|torchrun) [^`]+)`", FENCE.sub("", text)) if inline else []
    for line in code:
        for part in re.split(r"\s&&\s", line.removeprefix("$ ")):
            part = re.sub(r"^(\w+=\S+\s+)+", "", part.strip())          # VARIABLE=value before it
            if re.match(r"(python|torchrun) .*\.py\b", part):
                yield shlex.split(part, comments=True)


@cache
def known_flags(script):
    """Of its --help; where it does not read its arguments with argparse, those that its source compares with."""
    source = (ROOT / script).read_text(encoding="utf-8")
    said = " ".join(re.findall(r"""["'](--[\w-]+)""", source))
    if "Parser(" in source and "/" not in script:
        module, argv, out = importlib.import_module(Path(script).stem), sys.argv, io.StringIO()
        sys.argv = [script, "--help"]
        try:
            with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
                module.main()
        finally:
            sys.argv = argv
        said = out.getvalue()
    flags = set(re.findall(r"--[\w-]+", said)) | {"--help"}
    if re.search(r"--field=value", said, re.I):
        import configs
        flags |= {f"--{field.name}" for field in fields(configs.Config)}
    return flags


def wrong_command(words):
    """What is wrong with it, or None."""
    at = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script, arguments = words[at], words[at + 1:]
    for name in [script, *(word for word in arguments if re.match(r"(configs|assets|tests)/", word))]:
        if not (ROOT / name).exists():
            return f"{' '.join(words)}: there is no {name}"
    flags = [re.match(r"--[\w-]+", word)[0] for word in arguments if re.match(r"--\w", word)]
    unknown = [flag for flag in flags if flag not in known_flags(script)]
    return f"{' '.join(words)}: {script} knows no {', '.join(unknown)}" if unknown else None


# ---- the READMEs ----

@pytest.fixture(params=READMES, ids=lambda path: path.name)
def readme(request):
    return request.param, request.param.read_text(encoding="utf-8")


def test_links_lead_somewhere(readme):
    path, text = readme
    wrong = [wrong_link(path, text, words, target) for words, target in links(text)]
    wrong += [wrong_link(path, text, "", target.partition("#")[0]) for target in pictures(text)]
    assert links(text) and not [*filter(None, wrong)]


def test_line_counts_are_true(readme):
    rows = list(lines_columns(readme[1]))
    if not rows:
        pytest.skip(f"no table of {readme[0].name} has a column `lines` yet")
    assert not [f"line {i + 1}: {said} instead of {should}" for i, _, said, should in rows if said != should]


def test_an_evening_is_what_the_tour_quotes(readme):
    """The first paragraph says how many lines that is: some hundreds."""
    path, text = readme
    (found,) = QUOTED.finditer(text)
    few, all_of_them = quoted(path, text)
    assert (found[2], found[4]) == (f"{few:,}", f"{all_of_them:,}"), "run python tests/test_readme.py fix"
    assert found.start() < text.index("![") and 400 < few < 800 and few < all_of_them


def test_commands_name_what_is_there(readme):
    found = [*commands(readme[1], inline=True)]
    assert len(found) > 5 and not [*filter(None, map(wrong_command, found))]


def test_both_languages_say_the_same():
    if not CHINESE.is_file():
        pytest.skip("there is no assets/README.zh-CN.md yet")
    found = differences(ENGLISH.read_text(encoding="utf-8"), CHINESE.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


# ---- README's commands, run at small size ----

# What to add to a command that matches, so that it takes seconds.  What none matches is not run.
SMALL = {
    r"sample\.py --prompt \"a red circle moves right\"": "--steps 3",
    r"sample\.py --ckpt runs/\w+ --prompt .*": "--steps 3",
    r"sample\.py --prompt .* data/shapes/.*": "--steps 3",                  # frames that are given
    r"data\.py shapes data/shapes": "--num-clips=300",
    r"data\.py data/shapes/meta\.csv configs/tiny\.py": "--buckets={'32':{8:(1.0,2)}}",
    r"train\.py configs/tiny\.py": "--steps=2 --sample_every=0 --buckets={'32':{8:(1.0,2)}}",
    r"train\.py configs/tiny\.py --data=data/mine/meta\.csv .*": "--steps=1 --buckets={'32':{8:(1.0,1)}}",
    r"train\.py configs/stage\d\w*\.py --print": "",
    r"train\.py configs/finetune\.py --plan .*": "",
    r"vae\.py data/shapes/000000\.mp4 .*": "",
    r"masks\.py.*": "",
    r"model\.py": "",
    r"curate\.py run videos/ --out data/mine": "--workers 1",
    r"curate\.py report data/mine": "",
}
MAKES = {"data/shapes": "data.py shapes data/shapes", "runs/tiny": "train.py configs/tiny.py",
         "data/mine": "curate.py run videos/ --out data/mine"}


def small_commands():
    """Each once, in README's order: the command as it stands there, what is added."""
    found = {}
    for words in commands(ENGLISH.read_text(encoding="utf-8"), inline=True):
        command = " ".join(f'"{word}"' if " " in word or "," in word else word for word in words[1:])
        for pattern, extra in SMALL.items():
            if words[0] == "python" and re.fullmatch(pattern, command):
                found.setdefault(command, extra)
    return list(found.items())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A copy of the project with raw videos in it; run(command) runs what the command needs before it, once."""
    from data import write_video
    from test_assets import pan
    folder, done = tmp_path_factory.mktemp("readme"), {}
    for name in [*ROOT.glob("*.py"), ROOT / "configs", ROOT / "assets" / "tiny"]:
        copy = shutil.copytree if name.is_dir() else shutil.copy
        copy(name, folder / name.relative_to(ROOT))
    (folder / "videos").mkdir()
    for seed in (0, 1):
        write_video(folder / "videos" / f"{seed}.mp4", pan(seed, 60))
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}

    def run(command, extra):
        for needed, by in MAKES.items():
            if needed in command and command != by and by not in done:
                run(by, next(extra for pattern, extra in SMALL.items() if re.fullmatch(pattern, by)))
        if command not in done:
            ran = subprocess.run([sys.executable, *shlex.split(command), *extra.split()], cwd=folder, env=env,
                                 capture_output=True, encoding="utf-8")
            assert ran.returncode == 0, f"{command} {extra}\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"
            done[command] = ran.stdout
        return folder, done[command]
    return run


@pytest.mark.parametrize("command, extra", small_commands())
def test_a_command_does_what_it_says(world, command, extra):
    folder, said = world(command, extra)
    assert said.strip()
    for name in re.findall(r"^(samples/\S+\.(?:png|mp4))", said, re.M):
        assert (folder / name).stat().st_size > 100
    if " --out " in command:
        assert (folder / shlex.split(command.partition(" --out ")[2])[0]).exists()


def test_the_first_result_is_among_them(world):
    """Sampling, the shapes, training and sampling from that: README may say it in other words, but has to say it."""
    found = "\n".join(command for command, _ in small_commands())
    for start in ("sample.py --prompt", "data.py shapes", "train.py configs/tiny.py", "sample.py --ckpt runs/tiny"):
        assert start in found, f"no command of README.md that is run here begins with {start}"


# ---- the checkers, seen to fail ----

SOURCE = """import os


class Trainer:
    @property
    def step(self):
        return 1


def loss_of(x):
    y = x
    return y
"""
HEADINGS = "# Twice\n\n## 两个 names：`x`\n\n```\n# not a heading [x](gone)\n```\n\n# Twice\n\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """(readme, its text) in a project of one file; README's checkers look there."""
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    (tmp_path / "train.py").write_text(SOURCE)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.py").write_text("a = 1\nb = 2\n")
    return tmp_path / "README.md"


@pytest.mark.parametrize("link, ok", [
    ("[`loss_of`](train.py#L10-L12)", True), ("[`loss_of`](train.py#L10-L11)", True),
    ("[`loss_of`](train.py#L10)", True), ("[`loss_of()`](train.py#L9-L12)", False),
    ("[`loss_of`](train.py#L10-L13)", False), ("[`loss`](train.py#L1)", False),
    ("[x](#not-a-heading-xgone)", False), ('`<img src="gone.png">`', True), ("[`loss_of()`](train.py#L10-L12)", True),
    ("[`Trainer.step`](train.py#L6-L7)", True), ("[`step`](train.py#L6-L7)", True), ("[`Trainer`](train.py#L5)", False),
    ("[the import](train.py#L1)", True), ("[the import](train.py#L1-L13)", False), ("[x](train.py#L)", False),
    ("[`train.py`](train.py)", True), ("[x](gone.py)", False), ("[x](https://example.com/gone.py)", True),
    ("[x](#两个-namesx)", True), ("[x](#twice-1)", True), ("[x](#twice-2)", False), ("![x](gone.png)", False),
    ("`[x](gone.py)`", True), ('<img src="gone.png">', False), ("[![x](gone.png)](train.py)", False)])
def test_a_link_is_checked(project, link, ok):
    text = HEADINGS + link
    wrong = [wrong_link(project, text, words, target) for words, target in links(text)]
    wrong += [wrong_link(project, text, "", target) for target in pictures(text)]
    assert not any(wrong) if ok else any(wrong), wrong


def test_anchors_are_githubs():
    assert anchors("# 从视频到数据集：`curate.py`，一步一步\n## What it costs, by the plan\n## A_b  C-d!\n") == {
        "从视频到数据集curatepy一步一步", "what-it-costs-by-the-plan", "a_b--c-d"}


TABLE = """| file | lines | one concern |
| --- | --- | --- |
| [train.py](train.py) | {} | the loop |
| `configs/`, train.py | {} | recipes |
| all | {} | |
"""


def test_line_counts_are_checked_and_fixed(project):
    wrong = TABLE.format(11, "2, 1", 1)
    assert [(said, should) for _, _, said, should in lines_columns(wrong)] == [
        ("11", "12"), ("2, 1", "2, 12"), ("1", "26")]
    assert fixed(project, wrong) == TABLE.format(12, "2, 12", 26) == fixed(project, TABLE.format(12, "2, 12", 26))


def test_ranges_are_fixed(project):
    text = ("[`loss_of`](train.py#L) [`loss_of`](train.py#L10-L11) [`Trainer.step`](train.py#L99-L120) "
            "[words](train.py#L2) [`gone`](train.py#L3)\n```\n[`loss_of`](train.py#L1)\n```\n")
    assert fixed(project, text) == text.replace("py#L)", "py#L10-L12)", 1).replace("L99-L120", "L6-L7")


def test_quoted_lines_are_counted_once_and_fixed(project):
    text = ("[9 of {} lines](#the-tour) [`loss_of`](train.py#L) [its end](train.py#L11-L12) [`step`](train.py#L6-L7) "
            "[train.py](train.py) [an address](https://x.org/y.py#L1-L9)\n\n") + TABLE.format(12, "2, 12", 26)
    assert fixed(project, text.format("1,000")).startswith("[5 of 26 lines](#the-tour) [`loss_of`](train.py#L10-L12)")
    assert fixed(project, fixed(project, text)) == fixed(project, text)


def test_commands_are_checked():
    text = """```
pip install x && python train.py configs/tiny.py --lr=1 --print   # why
$ X=1 torchrun --nproc-per-node 8 sample.py \\
  --seed 1 --sedd 2
python train.py configs/gone.py
python gone.py
```
`python masks.py "0;0,1" --frame 1`
"""
    assert [*map(wrong_command, commands(text, inline=True))] == [
        None, "torchrun --nproc-per-node 8 sample.py --seed 1 --sedd 2: sample.py knows no --sedd",
        "python train.py configs/gone.py: there is no configs/gone.py", "python gone.py: there is no gone.py",
        "python masks.py 0;0,1 --frame 1: masks.py knows no --frame"]


def test_languages_are_compared():
    english = "# A\n1,088 lines, [2](x#L3) `4`\n```\npython 5\n```\n## B\n![7](a/b.png)\n"
    assert not differences(english, "# 甲\n共 1088 行，`4`，[2](../x#L9)\n```\npython 5\n```\n## 乙\n![](b.png)\n")
    for old, new in (("## B", "# B"), ("1,088", "1,089"), ("python 5", "python 6"), ("b.png", "c.png"), ("`4`", "4 4")):
        assert len(differences(english, english.replace(old, new))) == 1, old


if __name__ == "__main__":
    if sys.argv[1:] != ["fix"]:
        sys.exit("usage: python tests/test_readme.py fix")
    for path in READMES:
        path.write_text(fixed(path, path.read_text(encoding="utf-8")), encoding="utf-8", newline="\n")
