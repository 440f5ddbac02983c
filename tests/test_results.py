"""assets/results.md shows what is stored in assets/results, and that tells where it comes from."""
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from assets import results                                              # noqa: E402

STORED = sorted((ROOT / "assets" / "results").glob("*.txt"))


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_a_stored_output_has_its_origin(path):
    header, output = path.read_text(encoding="utf-8").split("\n\n", 1)
    fields = [line.split(": ")[0] for line in header.splitlines()]
    assert fields[:4] == ["command", "machine", "commit", "date"] and fields[4:] in ([], ["note"]) and output.strip()
    assert not re.search(r"(?<![\w.])/(home|root|work|opt|usr|tmp|Users)\b|Traceback|Warning", output), "private"


def test_the_page_shows_what_is_stored(monkeypatch):
    said = {}
    monkeypatch.setattr(sys, "argv", ["results.py"])
    monkeypatch.setattr(Path, "write_text", lambda self, text, **how: said.update({self.name: text}))
    results.main()
    assert said == {"results.md": (ROOT / "assets" / "results.md").read_text(encoding="utf-8")}, (
        "run python assets/results.py")
    assert [line[3:] for line in said["results.md"].splitlines() if line.startswith("## ")] == [p.stem for p in STORED]


def test_aligned_columns_become_a_table():
    rows = [f"{a:<17}{b:<10}{c:>7}{d:>10}{e:>6}{f:>7}" for a, b, c, d, e, f in (
        ("clips x size and", "dtype", "bare ms", "fast", "GB/s", "of all"),
        ("6 x 16x18", "float32", "1.5", "[1 2]", "1.5", "12%"),
        ("17 x 16x180", "bf16", "11.5", "[10 22]", "12.5", "2%"))]
    assert results.markdown("\n".join(["a word before", "", *rows])) == """```
a word before
```

| clips x size and | dtype | bare ms | fast | GB/s | of all |
| --- | --- | --- | --- | --- | --- |
| 6 x 16x18 | float32 | 1.5 | [1 2] | 1.5 | 12% |
| 17 x 16x180 | bf16 | 11.5 | [10 22] | 12.5 | 2% |"""
    assert results.markdown("| a |\n| --- |\n| 1 |") == "| a |\n| --- |\n| 1 |"


def test_bandwidth_is_passes_over_time():
    """2 passes over 2 x 5 x 100 tokens of 1152 values of 2 bytes in 3 ms / 3 launches."""
    lines = [f"   3.000 ms   3x void {name}(bf16 const*)" for name in results.PASSES]
    table = results.bandwidth("\n".join(["block 2x5x100 plain=False: wall", *lines]), 4.608)
    assert table.splitlines()[2] == "| `modulate_forward<bf16, 1152>` | 1.000 | 2 | 5 | 100% |"


def test_a_command_is_run_and_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "STORE", tmp_path)
    monkeypatch.setitem(results.COMMANDS, "hello", f"python -c \"print('1 s  {ROOT.as_posix()}/data.py')\"")
    monkeypatch.setattr(sys, "argv", ["results.py", "run", "hello"])
    results.main()
    header, output = next(tmp_path.glob("*-hello.txt")).read_text().split("\n\n")
    assert output == "1 s  data.py\n"
    for line in (r"machine: .+\d+ cores; torch \d.*", r"commit: .+", r"date: \d{4}-\d\d-\d\d"):
        assert re.search(f"^{line}$", header, re.M), line
    monkeypatch.setitem(results.COMMANDS, "hello", "python -c \"raise SystemExit(3)\"")
    with pytest.raises(SystemExit, match="exit status 3, nothing stored"):
        results.main()
    monkeypatch.setattr(sys, "argv", ["results.py", "run", "nothing"])
    with pytest.raises(SystemExit, match="usage: .*kernels"):
        results.main()
