"""Shared by the tests: running a script as a user does, and the default corpus, built once."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


def run(script, *args, ok=True, timeout=300):
    """Run a script of the project and return the finished process; with ok=False it must end with status 2 and no traceback."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], capture_output=True, text=True, timeout=timeout)
    if ok:
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert done.returncode == 2 and "Traceback" not in done.stderr, (done.returncode, done.stdout, done.stderr)
    return done


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """data/raw as `python collect.py` writes it where nothing but our requirements is installed, the small packages left out."""
    path = tmp_path_factory.mktemp("raw")
    run("collect.py", "--out", path, "python:stdlib,torch,numpy,sympy,networkx,mpmath", "synthesize:python")
    return path


@pytest.fixture(scope="session")
def corpus(raw, tmp_path_factory):
    """data/corpus of those records, as `python build_corpus.py` writes it."""
    path = tmp_path_factory.mktemp("corpus")
    run("build_corpus.py", "--raw", raw, "--out", path)
    return path


@pytest.fixture(scope="session")
def small_raw(tmp_path_factory):
    """Records of two small packages."""
    path = tmp_path_factory.mktemp("small_raw")
    run("collect.py", "--out", path, "--code-mb", 0.2, "python:mpmath,requests", "synthesize:python")
    return path
