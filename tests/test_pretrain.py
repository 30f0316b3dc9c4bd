import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import model as transformer
import pretrain
from build_corpus import Corpus
from conftest import ROOT, run
from model import load, read_safetensors

SMALL = ["--seq-len", 64, "--batch-tokens", 512, "--micro-batch", 4, "--val-windows", 8, "--compile", "no", "--dtype", "float32", "--device", "cpu"]
SHORT = ["--base-tokens", 5120, "--stage1-tokens", 5120, "--stage2-tokens", 5120, *SMALL]


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    run("pretrain.py", "--corpus", corpus, "--out", out, *SHORT)
    return out


def weights(run_directory):
    return dict(read_safetensors(run_directory / "model.safetensors"))


def equal(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_runs_metrics_and_checkpoints(trained, corpus):
    for name in ("base", "stage1", "stage2", "control-stage1", "control-stage2"):
        lines = [json.loads(line) for line in (trained / name / "metrics.jsonl").open()]
        assert lines[0]["step"] == 0 and {f"loss/{d}" for d in pretrain.VALIDATED} <= lines[0].keys()
        assert lines[-1]["step"] == 10 and lines[-2]["tokens"] == 5120 and {"loss", "lr", "grad_norm", "tokens_per_second"} <= lines[-2].keys()
        assert load(trained / name).config.vocab_size == Corpus(corpus).tokenizer.vocab_size
        assert (trained / name / "tokenizer.json").exists() and (trained / name / "generation_config.json").exists()
    first, last = ([json.loads(line) for line in (trained / "base" / "metrics.jsonl").open()][i]["loss/code"] for i in (0, -1))
    assert last < first  # it learns
    ours, control = ([json.loads(line) for line in (trained / d / "metrics.jsonl").open()][-1]["loss/api_doc"] for d in ("stage2", "control-stage2"))
    assert ours < control


def test_transformers_loads_a_run(trained):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained(str(trained / "stage2"), dtype=torch.float32)
    ids = torch.tensor([AutoTokenizer.from_pretrained(str(trained / "stage2"))("import numpy").input_ids])
    torch.testing.assert_close(model(ids).logits, load(trained / "stage2")(ids), atol=1e-4, rtol=1e-4)


def test_killed_run_goes_on_bit_for_bit(trained, corpus, tmp_path):
    """kill -9 in the middle of a stage, twice; then weights and losses are those of the unbroken run."""
    command = [sys.executable, str(ROOT / "pretrain.py"), "--corpus", str(corpus), "--out", str(tmp_path), "--save-every", "1", *map(str, SHORT)]
    for stage in ("base", "stage2"):
        state = tmp_path / stage / "train_state" / "state.pt"
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 120
        while not state.exists() and time.time() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert state.exists() and not (tmp_path / stage / "model.safetensors").exists()
    subprocess.run(command, check=True, capture_output=True)
    for name in ("base", "stage1", "stage2", "control-stage1", "control-stage2"):
        assert equal(trained / name, tmp_path / name), name
        ours, theirs = ([{k: v for k, v in json.loads(line).items() if k not in ("tokens_per_second", "data_wait")}
                         for line in (d / name / "metrics.jsonl").open()] for d in (trained, tmp_path))
        assert ours == theirs, name


def test_two_processes_train_what_one_trains(corpus, tmp_path):
    """With accumulation; three steps, since Adam turns the rounding in vanishing gradients into whole steps, which then grow."""
    arguments = ["--corpus", str(corpus), "--no-control", *map(str, SMALL), "--micro-batch", "2", "--base-tokens", "1536", "--stage1-tokens", "512",
                 "--stage2-tokens", "512"]
    run("pretrain.py", *arguments, "--out", tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master-port=29517", str(ROOT / "pretrain.py"), *arguments,
               "--out", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "two" / "control-stage1").exists()
    one, two = weights(tmp_path / "one" / "base"), weights(tmp_path / "two" / "base")
    for name in one:
        assert (two[name] - one[name]).norm() <= 1e-2 * one[name].norm() + 1e-4, name
    for stage in ("base", "stage1", "stage2"):
        one, two = ([json.loads(line) for line in (tmp_path / d / stage / "metrics.jsonl").open()] for d in ("one", "two"))
        for a, b in zip(one, two, strict=True):
            for key in ("loss", "grad_norm", "loss/code", "loss/api_doc"):  # the norm shows a wrong scale, which Adam would hide
                assert a.get(key) == pytest.approx(b.get(key), rel=2e-3), (stage, a["step"], key)


def test_other_options_are_refused_by_name(trained, corpus):
    message = run("pretrain.py", "--corpus", corpus, "--out", trained, *SHORT, "--lr", 0.5, ok=False).stderr
    assert "lr was 0.0015, now 0.5" in message


def test_init_takes_a_checkpoint_and_trains_no_base(trained, corpus, tmp_path):
    shutil.copytree(trained / "base", tmp_path / "downloaded", ignore=shutil.ignore_patterns("train_state", "metrics.jsonl"))
    run("pretrain.py", "--corpus", corpus, "--out", tmp_path / "out", "--init", tmp_path / "downloaded", *SHORT, "--no-control")
    assert not (tmp_path / "out" / "base").exists()
    assert equal(trained / "stage2", tmp_path / "out" / "stage2")


def test_a_downloaded_base_with_its_own_tokenizer(small_raw, trained, corpus, tmp_path):
    """A transformers model without our chat tokens: the corpus takes its tokenizer, the model grows, transformers loads the result."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    base, cut = tmp_path / "base", pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    tokenizer.train_from_iterator(["def f(x): return x"], trainers.BpeTrainer(vocab_size=260, initial_alphabet=cut.alphabet(), show_progress=False))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    size = tokenizer.get_vocab_size()
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(base)
    tokenizer.save(str(base / "tokenizer.json"))
    run("build_corpus.py", "--raw", small_raw, "--out", tmp_path / "corpus", "--tokenizer", base, "--heldout", 0.1)
    run("pretrain.py", "--corpus", tmp_path / "corpus", "--out", tmp_path / "out", "--init", base, *SHORT, "--stage1-tokens", 512, "--stage2-tokens", 512,
        "--no-control")
    grown = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "stage2")
    assert type(grown).__name__ == "LlamaForCausalLM" and grown.config.vocab_size == size + 8
    message = run("pretrain.py", "--corpus", corpus, "--out", tmp_path / "out2", "--init", base, *SHORT, ok=False).stderr
    assert "its tokenizer is not the corpus's" in message and f"--tokenizer {base}" in message


@pytest.mark.parametrize("size", [1000, 3000])
def test_another_vocabulary_is_refused(size, corpus, tmp_path):
    transformer.save(transformer.Transformer(transformer.Config(vocab_size=size)), tmp_path / "base")
    message = run("pretrain.py", "--corpus", corpus, "--out", tmp_path / "out", "--init", tmp_path / "base", *SHORT, ok=False).stderr
    assert f"vocabulary of {size}, but the corpus has 2048" in message


def test_activation_checkpointing_trains_the_same(trained, corpus, tmp_path):
    run("pretrain.py", "--corpus", corpus, "--out", tmp_path, *SHORT, "--stage1-tokens", 512, "--stage2-tokens", 512, "--no-control", "--activation-checkpointing")
    assert equal(trained / "base", tmp_path / "base")


def test_seed_preset_mix_and_decay_matter(trained, corpus, tmp_path):
    for option in (["--seed", 1], ["--weight-decay", 0.9], ["--mix", "0:1:0"], ["--attention-lr", 1], ["--practice", 0.5]):
        out = tmp_path / option[0]
        run("pretrain.py", "--corpus", corpus, "--out", out, *SHORT, "--stage1-tokens", 512, "--stage2-tokens", 512, "--no-control", *option)
        assert not equal(trained / "base", out / "base")
    process = subprocess.Popen([sys.executable, str(ROOT / "pretrain.py"), "--corpus", str(corpus), "--out", str(tmp_path / "124m"), *map(str, SHORT),
                                "--preset", "124m", "--base-tokens", "1"])
    while not (tmp_path / "124m" / "base" / "model.safetensors").exists() and process.poll() is None:
        time.sleep(0.1)
    process.kill()  # the later stages are as large
    assert load(tmp_path / "124m" / "base").config.n_layers == 12


@pytest.mark.parametrize("arguments, named", [
    (["--corpus", "nowhere"], "nowhere"), (["--init", "nowhere"], "nowhere"), (["--mix", "1:2"], "--mix"), (["--seq-len", 1024], "--batch-tokens"),
    (["--seq-len", 10**7, "--batch-tokens", 10**7], "no window"),
    (["--preset", "huge"], "huge")])
def test_bad_input_is_named(corpus, tmp_path, arguments, named):
    assert named in run("pretrain.py", "--corpus", corpus, "--out", tmp_path, *SHORT, *arguments, ok=False).stderr


# ---- data order


class FakeCorpus:
    """Domains of unique tokens: token i of a domain is i."""
    directory = "fake"
    sizes = {"code": 1001, "text": 10_001}

    def read(self, domain, split, suffix="bin"):
        return np.arange(self.sizes[domain], dtype=np.uint32) + 10**6 * (domain == "text")


def test_windows_without_replacement_and_exact_shares():
    get_batch, epochs = pretrain.window_batches(FakeCorpus(), {"code": 0.5, "text": 0.5}, 200, 10, 10, [0])
    starts = [row[0] for step in range(20) for row in get_batch(step)[0]]
    code, text = [s for s in starts if s < 10**6], [s for s in starts if s >= 10**6]
    assert sorted(code) == list(range(0, 1000, 10)) and len(text) == len(set(text)) == 100  # code: one epoch, each window once
    assert epochs == {"code": 1.0, "text": 0.1}
    ids, targets = get_batch(3)
    assert (targets[:, :-1] == ids[:, 1:]).all() and (targets[:, -1] == ids[:, -1] + 1).all()


def test_second_epoch_is_whole_and_in_another_order():
    get_batch, epochs = pretrain.window_batches(FakeCorpus(), {"code": 1.0, "text": 0.0}, 200, 10, 100, [0])
    first, second = ([row[0] for row in get_batch(step)[0]] for step in (0, 1))
    assert sorted(first) == sorted(second) and first != second and epochs == {"code": 2.0}


def test_a_batch_is_a_function_of_seed_and_step():
    batches = [pretrain.window_batches(FakeCorpus(), {"code": 1, "text": 2}, 100, 10, 10, [seed])[0] for seed in (0, 0, 1)]
    batches[0](1)  # history does not matter
    assert all(np.array_equal(a, b) for a, b in zip(batches[0](7), batches[1](7)))
    assert not np.array_equal(batches[0](7)[0], batches[2](7)[0])


def test_copying_practice():
    plain, practised = (pretrain.window_batches(FakeCorpus(), {"text": 1}, 100, 100, 100, [0], share)[0](0)[0] for share in (0, 0.3))
    changed = [row for row, (a, b) in enumerate(zip(plain, practised)) if not np.array_equal(a, b)]
    assert 15 <= len(changed) <= 45
    for row in changed:  # of the window's own tokens, many more than once, and where one stands again what follows is often the same
        ids = practised[row].tolist()
        assert set(ids) <= {*plain[row].tolist(), plain[row][-1] + 1}
        again = [ids[:i].index(x) for i, x in enumerate(ids) if x in ids[:i] and i + 1 < len(ids)]
        follows = [ids[ids.index(x) + 1] == ids[i + 1] for i, x in enumerate(ids[:-1]) if x in ids[:i]]
        assert len(again) > 20 and np.mean(follows) > 0.5


@pytest.mark.parametrize("preset, copies", [({}, True), ({"tie_embeddings": True}, False), ({"n_layers": 1}, False), ({"model_type": "llama"}, False),
                                            ({"n_heads": 6, "n_kv_heads": 3}, False)])
def test_an_untrained_model_copies(preset, copies):
    """On random tokens that repeat at random distances it is nearly always right, and a model of another shape is left as it was."""
    torch.manual_seed(0)
    model = transformer.Transformer(transformer.Config(**preset))
    before = {n: p.clone() for n, p in model.named_parameters()}
    pretrain.wire_copying_heads(model)
    ids = torch.stack([torch.randint(2048, (int(n),)).repeat(49)[:385] for n in torch.randint(8, 192, (16,))])
    right = (model(ids[:, :-1]).argmax(-1) == ids[:, 1:])[:, 192:].float().mean().item()
    assert right > 0.95 if copies else right < 0.05 and all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_learning_rate():
    rates = [pretrain.learning_rate(s, 100, 1.0) for s in range(100)]
    assert rates[0] == 0.2 and rates[4] == 1.0 == max(rates) and 0.1 < rates[-1] < 0.102 and rates[5:] == sorted(rates[5:], reverse=True)


def test_compiled_runs_in_bfloat16_are_equal(corpus, tmp_path):
    """Without torch's deterministic algorithms the compiled gradient of the embedding differs from run to run."""
    for name in ("first", "second"):
        run("pretrain.py", "--corpus", corpus, "--out", tmp_path / name, *SHORT, "--base-tokens", 10240, "--stage1-tokens", 512, "--stage2-tokens", 512,
            "--no-control", "--dtype", "bfloat16", "--compile", "auto")
    assert equal(tmp_path / "first" / "base", tmp_path / "second" / "base")
    args = argparse.Namespace(device="cpu", dtype="auto", compile="auto", batch_tokens=2, seq_len=1)
    pretrain.setup(args)
    assert args.dtype in ("float32", "bfloat16") and args.compile in ("yes", "no")
    assert re.fullmatch(r"(yes|no)", args.compile)
