import re

from conftest import ROOT


def test_the_two_commands():
    """What .ci/run runs: the demonstration, then the tests."""
    first, second = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)[:2]
    for script in ("collect.py", "build_corpus.py", "pretrain.py", "finetune.py", "evaluate.py"):
        assert f"python {script}" in first
    assert "pip install -r requirements.txt" in first and "tests/requirements.txt" in second and "pytest" in second


def test_every_requirement_is_pinned():
    lines = [line for f in ("requirements.txt", "tests/requirements.txt") for line in (ROOT / f).read_text().split()]
    assert lines and all("==" in line for line in lines)
    assert {line.split("==")[0] for line in (ROOT / "requirements.txt").read_text().split()} == {"torch", "tiktoken", "numpy", "requests", "tqdm"}
