"""Shared by the tests: running a script as a user does, and the default corpus, built once."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # threads of several processes on the same cores wait for each other


def run(script, *args, ok=True, timeout=300):
    """Run a script of the project and return the finished process; with ok=False it must end with status 2 and no traceback."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, args)], capture_output=True, text=True, timeout=timeout)
    if ok:
        assert done.returncode == 0, done.stdout + done.stderr
    else:
        assert done.returncode == 2 and "Traceback" not in done.stderr, (done.returncode, done.stdout, done.stderr)
    return done


def made_once(tmp_path_factory, name, make):
    """The directory that make(directory) fills, once for all of pytest's processes; they only read it."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent
    with FileLock(place / f"{name}.lock"):
        if not (place / f"{name}.made").exists():
            make(place / name)
            (place / f"{name}.made").touch()
    return place / name


@pytest.fixture(scope="session")
def raw(tmp_path_factory):
    """data/raw as `python collect.py` writes it where nothing but our requirements is installed, the small packages left out."""
    return made_once(tmp_path_factory, "raw", lambda out: run("collect.py", "python:stdlib,torch,numpy,sympy,networkx,mpmath", "synthesize:python", "--out", out))


@pytest.fixture(scope="session")
def corpus(raw, tmp_path_factory):
    """data/corpus of those records, as `python build_corpus.py` writes it."""
    return made_once(tmp_path_factory, "corpus", lambda out: run("build_corpus.py", "--raw", raw, "--out", out))


@pytest.fixture(scope="session")
def small_raw(tmp_path_factory):
    """Records of two small packages."""
    return made_once(tmp_path_factory, "small_raw", lambda out: run("collect.py", "--code-mb", 0.2, "python:mpmath,requests", "synthesize:python", "--out", out))


@pytest.fixture(scope="session")
def small_corpus(small_raw, tmp_path_factory):
    """Of these, some 120,000 tokens of code and 7,000 of text."""
    return made_once(tmp_path_factory, "small_corpus", lambda out: run("build_corpus.py", "--raw", small_raw, "--out", out))
