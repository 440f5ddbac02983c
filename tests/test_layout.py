"""The frame: who imports whom (DESIGN.md), what is allowed in, and that a file called kernels.py disturbs nobody."""
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import data
import kernels

ROOT = Path(__file__).parents[1]
# Imports point one way: a file may import those of lower levels, by DESIGN.md 0 kernels, masks, data; 1 model, vae;
# 2 configs, curate; 3 sample; 4 train.
MAY_IMPORT = {
    "kernels": set(),
    "masks": set(),
    "data": set(),
    "model": {"kernels", "masks", "data"},
    "vae": {"kernels", "masks", "data"},
    "configs/__init__": {"kernels", "masks", "data", "model", "vae"},
    "curate": {"kernels", "masks", "data", "model", "vae"},
    "sample": {"kernels", "masks", "data", "model", "vae", "configs"},
    "train": {"kernels", "masks", "data", "model", "vae", "configs", "sample"},
}
OURS = {"kernels", "masks", "data", "model", "vae", "configs", "sample", "train", "curate"}
SCRIPTS = sorted(OURS - {"configs"})
PACKAGES = {"torch", "numpy", "einops", "av", "transformers", "diffusers", "tqdm", "pytest",
            "safetensors", "PIL", "huggingface_hub", "tokenizers"}
TOP_LEVEL = {f"{name}.py" for name in SCRIPTS} | {
    "configs", "tests", "assets", "README.md", "LICENSE", "requirements.txt", "pyproject.toml", ".gitignore", ".ci"}
CONFIGS = sorted(f"configs/{path.stem}" for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")


def parse(name):
    return ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))


def imports(tree):
    """Returns the packages and modules that code imports, wherever in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


def is_main(node):
    return isinstance(node, ast.If) or (isinstance(node, ast.FunctionDef) and node.name == "main")


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_point_one_way(name):
    """What only the script needs, its `main` may import."""
    library = ast.Module([node for node in parse(name).body if not is_main(node)], [])
    assert imports(library) & OURS <= MAY_IMPORT[name]


@pytest.mark.parametrize("name", [*MAY_IMPORT, *CONFIGS])
def test_only_known_packages_are_imported(name):
    """Nobody imports assets or tests."""
    assert imports(parse(name)) <= OURS | PACKAGES | set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "configs/plan"])
def test_configs_import_only_what_they_build(name):
    assert imports(parse(name)) <= {"configs"}


def test_top_level_is_the_frame():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in files.stdout.splitlines()} <= TOP_LEVEL


def opens_text_without_utf8(node):
    """Returns whether a call would take the system's encoding, which on Windows is a code page."""
    name = ast.unparse(node.func)
    words = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
    if name == "open" and any("b" in word for word in words if isinstance(word, str)):
        return False
    if name != "open" and not name.endswith((".read_text", ".write_text")):
        return False
    return "utf-8" not in words and "encoding" not in [keyword.arg for keyword in node.keywords]


@pytest.mark.parametrize("name", [*MAY_IMPORT, "assets/shapes"])
def test_text_is_utf8(name):
    calls = [node for node in ast.walk(parse(name)) if isinstance(node, ast.Call)]
    assert not [ast.unparse(node) for node in calls if opens_text_without_utf8(node)]


# ---- errors of users are one line ----

def test_an_error_is_one_line_with_status_2(capsys):
    with pytest.raises(SystemExit) as ended, data.one_line_errors(debug=False):
        raise ValueError("x=1: expected 2")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: x=1: expected 2\n"
    with pytest.raises(ValueError, match="x=1"), data.one_line_errors(debug=True):
        raise ValueError("x=1: expected 2")


def test_ctrl_c_ends_with_status_130(capsys):
    with pytest.raises(SystemExit) as ended, data.one_line_errors(debug=False):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("command, named", [
    ("sample --prompt=x --promt=y", "--promt"), ("curate run videos --ou=x", "--ou")])
def test_a_flag_that_does_not_exist_is_named(run_script, command, named):
    ended = run_script(*command.split())
    assert ended.status == 2
    assert named in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("command", [
    "assets.shapes FILE/x --num-clips=1",
    "sample --prompt x --steps 2 --sampler ddim --out FILE/x",
    "curate run RAW --out FILE/x",
])
def test_an_output_that_cannot_be_written_is_one_line(run_script, tmp_path, command):
    """FILE is a file where a folder is needed."""
    (tmp_path / "raw").mkdir()
    (tmp_path / "file").write_text("")
    words = command.replace("FILE", str(tmp_path / "file")).replace("RAW", str(tmp_path / "raw")).split()
    ended = run_script(*words)
    assert ended.status == 2
    assert str(tmp_path) in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.slow
def test_under_torchrun_our_words_come_last():
    """torchrun prints a report of its own after a process has failed; it ends with our message."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py",
               "configs/tiny.py", "--data=nowhere.csv"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0
    *_, last, rule = done.stderr.strip().splitlines()
    assert "error: no file nowhere.csv" in last
    assert set(rule) == {"="}


# ---- kernels is the name of a package that transformers looks for, too ----

def test_kernels_has_the_version_that_transformers_asks_for():
    assert isinstance(kernels.__version__, str)


@pytest.mark.slow
@pytest.mark.parametrize("with_package, first", [(False, "vae"), (True, "train")], ids=["plain", "package-installed"])
def test_libraries_load_beside_kernels_py(tmp_path, with_package, first):
    """transformers reads the version of a package named `kernels`; ours must not be taken for it."""
    if with_package:                                            # as pip would leave it
        info = tmp_path / "kernels-0.18.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    code = (f"import {first}; import kernels; from vae import hugging_face; hugging_face(); "
            "from transformers import AutoTokenizer, T5EncoderModel, T5Config; "
            "from diffusers import AutoencoderKL, DDPMScheduler; "
            "T5EncoderModel(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)); "
            "assert kernels.modulate and AutoTokenizer")
    env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"],
           "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
