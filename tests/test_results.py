"""assets/results.md is what assets/results.py writes from the stored outputs, and these tell where they come from."""
import re
from pathlib import Path

import pytest

from assets import results

ROOT = Path(__file__).parents[1]
STORED = sorted((ROOT / "assets/results").glob("*.txt"))
PRIVATE = r"(?<![\w.])/(home|root|work|opt|usr|tmp|Users)\b"


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_a_stored_output_has_its_origin(path):
    header, output = path.read_text(encoding="utf-8").split("\n\n", 1)
    names = {line.split(": ")[0] for line in header.splitlines()}
    assert {"command", "machine", "commit", "date"} <= names
    assert output.strip()
    assert not re.search(PRIVATE, output), "a path of somebody's machine"
    assert "Traceback" not in output


def test_the_page_is_what_the_script_writes(monkeypatch):
    written = {}

    def keep(self, text, **how):
        written[self.name] = text

    monkeypatch.setattr("sys.argv", ["results.py"])
    monkeypatch.setattr(Path, "write_text", keep)
    results.main()
    page = (ROOT / "assets/results.md").read_text(encoding="utf-8")
    assert written == {"results.md": page}, "run python assets/results.py"
    for path in STORED:
        assert f"## {path.stem}" in page
