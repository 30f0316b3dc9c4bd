"""Shared by the tests: running a script as a user does, and the default corpus, built once."""
import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # threads of several processes on the same cores wait for each other


# Importing torch takes three seconds. Scripts that do run in copies of a process that has done it once.
COPIES = multiprocessing.get_context("forkserver")
COPIES.set_forkserver_preload(["pytest", "filelock", "torch._dynamo", "torch.distributed.checkpoint"])


class Script:
    """`python SCRIPT ARGUMENTS` in a process of its own; the methods are those of subprocess.Popen."""

    def __init__(self, *command, env=os.environ):
        command, self.folder = list(map(str, command)), tempfile.TemporaryDirectory()
        files = [os.path.join(self.folder.name, name) for name in ("stdout", "stderr")]
        self.files = [open(file, "x+") for file in files]
        self.process = COPIES.Process(target=run_script, args=(command, dict(env), os.getcwd(), files))
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        """The exit status, None while it runs."""
        return self.process.exitcode

    def wait(self, timeout=300):
        """The exit status. Raises subprocess.TimeoutExpired, and kills it, after so many seconds."""
        self.process.join(timeout)
        if self.poll() is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.files[0].name, timeout, *self.output())
        return self.poll()

    def communicate(self, timeout=300):
        """What it wrote to standard output and to standard error, once it has ended."""
        self.returncode = self.wait(timeout)
        return self.output()

    def output(self):
        return [file.read() for file in self.files if not file.seek(0)]

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def terminate(self):
        os.kill(self.pid, signal.SIGTERM)


def two_processes(*command):
    """Run a script in two processes that know each other, as under torchrun; both must end well. Returns what the first printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [Script(*command, env=os.environ | group | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.output() for rank in ranks]
    return ranks[0].output()[0]


def run_script(command, environment, directory, files):
    """In the copy."""
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    sys.argv, sys.path[0] = command, os.path.dirname(command[0])
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def run(script, *args, ok=True, timeout=300):
    """Run a script of the project and return the finished process; with ok=False it must end with status 2 and no traceback."""
    if script in ("pretrain.py", "finetune.py", "evaluate.py"):
        done = Script(ROOT / script, *args)
        done.stdout, done.stderr = done.communicate(timeout)
    else:
        done = subprocess.run([sys.executable, ROOT / script, *map(str, args)], capture_output=True, text=True, timeout=timeout)
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


def pytest_collection_modifyitems(items):
    """The longest test first, so that at the end no process works on it alone."""
    items.sort(key=lambda item: "real_base" not in item.nodeid)
