import argparse
import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import torch

import finetune
from build_corpus import Corpus
from conftest import run
from model import Config, Transformer, load, save

SMALL = ["--seq-len", 256, "--batch-tokens", 1024, "--micro-batch", 2, "--val-windows", 4, "--compile", "no", "--dtype", "float32", "--device", "cpu"]


@pytest.fixture(scope="module")
def start(corpus, tmp_path_factory):
    """Two different untrained models in the places of pretrain.py's."""
    out = tmp_path_factory.mktemp("out")
    for seed, name in enumerate(("stage2", "control-stage2")):
        torch.manual_seed(seed)
        save(Transformer(Config(vocab_size=Corpus(corpus).tokenizer.vocab_size, dim=32, n_layers=1, n_heads=1, n_kv_heads=1, head_dim=32,
                                hidden_dim=32)), out / name)
    return out


def test_both_models_get_the_same_tuning(corpus, start):
    arguments = ("finetune.py", "--corpus", corpus, "--out", start, "--tokens", 5120, *SMALL)
    done = run(*arguments)
    lines = [line for line in done.stdout.splitlines() if "conversations in" in line]
    assert [line.split(":")[0] for line in lines] == ["control", "ours"] and lines[0].split(":")[1] == lines[1].split(":")[1]
    ours, before = load(start / "ours"), load(start / "stage2")
    assert any(not torch.equal(p, q) for p, q in zip(ours.parameters(), before.parameters()))
    again = run(*arguments)  # finished: nothing is trained again
    assert again.stdout.splitlines() == [line for line in done.stdout.splitlines() if not re.match(r"(ours|control) \d+/5 ", line)]
    run("finetune.py", "--corpus", corpus, "--out", start, "--tokens", 5120, *SMALL, "--init", start / "stage2", "--name", "mine", "--save-every", 2)
    assert all(torch.equal(p, q) for p, q in zip(load(start / "mine").parameters(), ours.parameters()))


def test_windows_hold_whole_conversations(corpus):
    built = Corpus(corpus)
    windows, too_long = finetune.pack(built, 384)
    starts = built.read("instruction", "train", "idx").astype(np.int64)
    spans = sorted(span for window in windows for span in window)
    assert len(spans) == len(set(spans)) == len(starts) - 1 - too_long
    assert set(spans) <= set(zip(starts, starts[1:]))
    assert max(sum(b - a for a, b in window) for window in windows) <= 384
    assert too_long == (np.diff(starts) > 384).sum()


def test_only_what_the_assistant_writes_is_learned(corpus):
    built = Corpus(corpus)
    windows, _ = finetune.pack(built, 384)
    get_batch = finetune.packed_batches(built, windows, 4, 8, 384, 0)
    decode = built.tokenizer.decode
    for step in range(4):
        for x, y, segments in zip(*get_batch(step, range(8))):
            learned = y >= 0
            assert (y[:-1][learned[:-1]] == x[1:][learned[:-1]]).all()
            assert (segments[:-1][learned[:-1]] == segments[1:][learned[:-1]]).all()  # never across conversations
            for n in range(segments.max() + 1):
                ids, targets = x[segments == n], y[segments == n]
                text, answer = decode(ids), decode(targets[targets >= 0])
                assert text.startswith("<|im_start|>") and text.endswith("<|im_end|>\n<|endoftext|>")
                assert text.split("<|im_start|>assistant\n")[1] == answer + "\n<|endoftext|>"


def test_a_user_text_changes_no_target(corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "corpus")
    built = Corpus(tmp_path / "corpus")
    windows, _ = finetune.pack(built, 384)
    before = finetune.packed_batches(built, windows, 1, 8, 384, 0)(0, range(8))
    ids, mask = built.read("instruction", "train"), built.read("instruction", "train", "mask")
    changed = np.where(mask, ids, 5).astype(ids.dtype)
    changed.tofile(tmp_path / "corpus" / "instruction.train.bin")
    after = finetune.packed_batches(built, windows, 1, 8, 384, 0)(0, range(8))
    assert np.array_equal(before[1], after[1]) and not np.array_equal(before[0], after[0])


def test_nothing_to_learn_is_an_error(corpus, start, tmp_path):
    shutil.copytree(corpus, tmp_path / "corpus")
    mask, manifest = tmp_path / "corpus" / "instruction.train.mask", tmp_path / "corpus" / "manifest.json"
    mask.write_bytes(bytes(mask.stat().st_size))
    content = json.loads(manifest.read_text())
    content["files"][mask.name]["sha256"] = hashlib.sha256(mask.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))
    error = run("finetune.py", "--corpus", tmp_path / "corpus", "--out", tmp_path, "--init", start / "stage2", "--tokens", 5120, *SMALL, ok=False).stderr
    assert "no token to learn from" in error


def test_packed_and_unpacked_gradients_agree(corpus):
    built = Corpus(corpus)
    windows, _ = finetune.pack(built, 384)
    window = next(w for w in windows if len(w) > 1)
    x, y, segments = (torch.from_numpy(a) for a in finetune.packed_batches(built, [window], 1, 1, 384, 0)(0, [0]))
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=built.tokenizer.vocab_size, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, hidden_dim=32))
    model(x, y, segments).backward()
    packed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for n in range(len(window)):
        model(x[segments == n][None], y[segments == n][None]).backward()
    largest = max(p.grad.abs().max().item() for p in model.parameters())
    for a, b in zip(packed, model.parameters()):
        torch.testing.assert_close(a, b.grad, atol=1e-5 * largest, rtol=1e-5)


def test_bad_input_is_named(corpus, start, tmp_path):
    assert "nowhere" in run("finetune.py", "--corpus", corpus, "--out", tmp_path, "--init", "nowhere", *SMALL, ok=False).stderr
    assert "--seq-len" in run("finetune.py", "--corpus", corpus, "--out", start, *SMALL, "--seq-len", 8, ok=False).stderr
    assert isinstance(finetune.number("1e6"), int) and argparse
