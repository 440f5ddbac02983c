"""The frame: who imports whom (DESIGN.md), how each file ends, and that a file called kernels.py disturbs nobody."""
import ast
import importlib
import io
import os
import re
import signal
import statistics
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import data

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "kernels": set(), "masks": set(), "data": set(),
    "model": {"kernels"}, "vae": {"data"}, "curate": {"data", "vae"}, "configs/__init__": {"model", "data", "masks"},
    "sample": {"kernels", "masks", "data", "model", "vae", "configs"},
    "train": {"kernels", "masks", "data", "model", "vae", "configs", "sample"},
}
MOST_LINES = {"curate": 1721, "kernels": 1198, "data": 1185, "train": 985, "sample": 856, "model": 790, "vae": 721,
              "configs/__init__": 401, "masks": 279}
OURS = {"kernels", "masks", "data", "model", "vae", "configs", "sample", "train", "curate"}
PACKAGES = {"torch", "numpy", "einops", "av", "transformers", "diffusers", "tqdm", "pytest",
            "safetensors", "PIL", "huggingface_hub", "tokenizers"}


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_obey_the_graph(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    is_main = lambda node: isinstance(node, ast.If) or (isinstance(node, ast.FunctionDef) and node.name == "main")
    found = set(imports(ast.Module([node for node in tree.body if not is_main(node)], [])))
    assert found & OURS <= MAY_IMPORT[name]
    assert set(imports(tree)) <= OURS | PACKAGES | set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", [n for n in MAY_IMPORT if "/" not in n])
def test_a_script_is_not_there_twice(name):
    """Run as __main__ a file imports itself by name, so that its classes exist once."""
    last = (ROOT / f"{name}.py").read_text().rstrip().splitlines()[-2:]
    assert last == ['if __name__ == "__main__":', f"    from {name} import main; main()"]


@pytest.mark.parametrize("name", [f"configs/{p.name}" for p in sorted((ROOT / "configs").glob("[!_]*.py"))])
def test_configs_import_only_what_they_build(name):
    assert set(imports(ast.parse((ROOT / name).read_text()))) <= {"configs"}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_file_is_read_in_an_evening(name):
    """What holds today: who makes a file longer says so here."""
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    lines, tree = text.splitlines(), ast.parse(text)
    lengths = [node.end_lineno - node.lineno + 1 for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert len(lines) <= MOST_LINES[name], f"{name}.py has {len(lines)} lines"
    assert statistics.median(lengths) <= 12 and max(lengths) <= 80
    assert not [i for i, line in enumerate(lines, 1) if len(line) > 120]
    assert ast.get_docstring(tree), f"{name}.py begins without what it does"


def share_of_words(source):
    """Lines with a comment or in a docstring, over the lines that are not blank; C++'s // in strings counts, too."""
    lines, found = source.splitlines(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            found.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            found.add(token.start[0])
        elif token.type == tokenize.STRING and '"""' in token.string:
            code = enumerate(token.string.splitlines(), token.start[0])
            found.update(i for i, line in code if re.search("(?<!:)//", line))
    return len(found) / sum(bool(line.strip()) for line in lines)


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_third_to_a_fifth_is_words(name):
    """What the code we admire has (nanoGPT, DiT, gpt-fast): less leaves a stranger alone, more hides the code."""
    share = share_of_words((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    most = 2 / 5 if name == "configs/__init__" else 1 / 3     # where each field says what it is, and in what unit
    assert 1 / 5 <= share <= most, f"{share:.1%} of {name}.py are comments and docstrings"


def test_words_are_counted():
    source = '''"""Of a file,

    in two lines and a blank one."""
CODE = """#include <x>  // C++
int a;  // too
"""
URL = "http://x"   # after code


def f():
    "of a function"
    return "#"
'''
    assert share_of_words(source) == 7 / 9


SCRIPTS = ["data", "vae", "masks", "kernels", "model", "sample", "train", "curate"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_while_it_imports_shows_no_traceback(name):
    with subprocess.Popen([sys.executable, "-X", "importtime", f"{name}.py"], cwd=ROOT, stderr=subprocess.PIPE,
                          text=True) as process:
        while "torch" not in process.stderr.readline():         # a part of it is there
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert "Traceback" not in process.stderr.read()
    assert process.returncode == -signal.SIGINT


@pytest.mark.parametrize("words, near", [
    ("sample --promt=x", "did you mean --prompt?"), ("curate run --ou=x", "did you mean --out?"),
    ("vae train --zzz", "--help shows what is")])
def test_unknown_flags_are_named_before_what_is_missing(words, near, monkeypatch, capsys):
    name, *words = words.split()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(name).main()
    assert capsys.readouterr().err == f"error: there is no {words[-1].split('=')[0]}, {near}\n"


def test_errors_of_other_ranks_wait_and_name_them(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(data.time, "sleep", waited.append)
    for rank, said in (("0", "error: x\n"), ("3", "error: rank 3: x\n")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="2"), data.one_line_errors(debug=False):
            raise ValueError("x")
        assert capsys.readouterr().err == said
    assert waited == [10]
    for rank, said in (("0", "\nstopped; again\n"), ("3", "")):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match="130"), data.one_line_errors(False, "; again"):
            raise KeyboardInterrupt
        assert capsys.readouterr().err == said
    with pytest.raises(ValueError, match="x"), data.one_line_errors(debug=True):
        raise ValueError("x")


def text_calls(tree):
    """Of open, read_text and write_text, those that would take the system's encoding: on Windows a code page."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name, words = ast.unparse(node.func), [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        opens = name == "open" and not any("b" in word for word in words)
        told = "utf-8" in words or "encoding" in [keyword.arg for keyword in node.keywords]
        if (opens or name.endswith((".read_text", ".write_text"))) and not told:
            yield ast.unparse(node)


@pytest.mark.parametrize("name", [*SCRIPTS, "configs/__init__"])
def test_text_is_utf8(name):
    assert not list(text_calls(ast.parse((ROOT / f"{name}.py").read_text("utf-8"))))


@pytest.mark.parametrize("command", [
    "data.py shapes FILE/x", "sample.py --prompt x --steps 2 --sampler ddim --out FILE/x",
    "vae.py text data.csv --out FILE/x", "curate.py run assets --out FILE/x"])
def test_where_nothing_can_be_written_that_is_one_line(command, tmp_path):
    (tmp_path / "FILE").write_text("")
    (tmp_path / "data.csv").write_text("path,text,num_frames,height,width,fps\na.png,a,1,8,8,\n")
    words = [str(tmp_path / word) if word.startswith(("FILE", "data.csv")) else word for word in command.split()]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "error: " in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_top_level_is_the_frame():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    allowed = {f"{name}.py" for name in OURS - {"configs"}} | {
        "configs", "tests", "assets", "README.md", "LICENSE", "requirements.txt", "pyproject.toml", ".gitignore", ".ci"}
    assert {line.split("/")[0] for line in files.stdout.splitlines()} <= allowed


@pytest.mark.parametrize("with_package, first", [(False, "vae"), (True, "train")], ids=["plain", "package-installed"])
def test_libraries_load_beside_kernels_py(tmp_path, with_package, first):
    """transformers looks for a package named `kernels` and reads its version; ours must not be taken for it."""
    if with_package:                                              # as pip would leave it
        info = tmp_path / "kernels-0.18.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    code = (f"import {first}; import kernels; "
            "from transformers import AutoTokenizer, T5EncoderModel, T5Config; "
            "from diffusers import AutoencoderKL, DDPMScheduler; "
            "T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)); "
            "assert kernels.modulate and AutoTokenizer")
    env = {"PYTHONPATH": f"{ROOT}:{tmp_path}", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
