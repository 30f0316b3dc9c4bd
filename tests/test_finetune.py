import copy
import hashlib
import json
import re
import shutil
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch

import finetune
from build_corpus import Corpus, Tokenizer
from collect import Record, chat_message
from conftest import ROOT, run, two_processes
from model import Config, Transformer, generate, load, save

SMALL = ["--seq-len", 256, "--batch-tokens", 1024, "--micro-batch", 2, "--val-windows", 4, "--compile", "no", "--dtype", "float32", "--device", "cpu"]
LEARN = Namespace(seq_len=384, last_turn=False, thoughts=True, val_windows=4, data=None)


def tool(name, **properties):
    return {"type": "function", "function": {"description": f"Do {name}.", "name": name, "parameters": {
        "type": "object", "properties": properties, "required": list(properties)}}}


WEATHER, TIME = tool("get_weather", city={"type": "string"}), tool("heure_été", où={"type": "string"})
DEFINED = {t["function"]["name"]: json.dumps(t["function"], ensure_ascii=False) for t in (WEATHER, TIME)}
user, result = (lambda text, role=role: chat_message(role, text) for role in ("user", "tool"))


def assistant(content="", *calls, thought=None):
    return chat_message("assistant", content, calls) | ({"reasoning_content": thought} if thought else {})


# Conversations, and by hand how they are written: special tokens in «», what is learned in ⟦⟧.
BY_HAND = {
    "chat": ([chat_message("system", "Be brief."), user("Hi"), assistant("Hello."), user("And?"), assistant("No.")], [],
             "«im_start»system\nBe brief.«im_end»\n«im_start»user\nHi«im_end»\n«im_start»assistant\n⟦Hello.«im_end»⟧\n"
             "«im_start»user\nAnd?«im_end»\n«im_start»assistant\n⟦No.«im_end»⟧\n"),
    "parallel calls": ([chat_message("system", "Help."), user("Rome, Oslo?"), assistant("", ("get_weather", {"city": "Rome"}), ("get_weather", {"city": "Oslo"})),
                        result("sun"), result("rain"), assistant("Sun, rain.")], [WEATHER, TIME],
                       "«im_start»system\nHelp.\n«tools»\n" + DEFINED["get_weather"] + "\n" + DEFINED["heure_été"] + "\n«/tools»«im_end»\n"
                       "«im_start»user\nRome, Oslo?«im_end»\n«im_start»assistant\n"
                       '⟦«tool_call»\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n«/tool_call»\n'
                       '«tool_call»\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n«/tool_call»«im_end»⟧\n'
                       "«im_start»tool\n«tool_response»\nsun\n«/tool_response»«im_end»\n«im_start»tool\n«tool_response»\nrain\n«/tool_response»«im_end»\n"
                       "«im_start»assistant\n⟦Sun, rain.«im_end»⟧\n"),
    "a tool error, mended; names that are not ASCII": (
        [user("À Été?"), assistant("Je vois.", ("heure_été", {"où": "Été"})), result("Error: où"), assistant("", ("heure_été", {"où": "là"})), result("9 h"),
         assistant("9 h.")], [TIME],
        "«im_start»system\n«tools»\n" + DEFINED["heure_été"] + "\n«/tools»«im_end»\n«im_start»user\nÀ Été?«im_end»\n"
        '«im_start»assistant\n⟦Je vois.\n«tool_call»\n{"name": "heure_été", "arguments": {"où": "Été"}}\n«/tool_call»«im_end»⟧\n'
        "«im_start»tool\n«tool_response»\nError: où\n«/tool_response»«im_end»\n"
        '«im_start»assistant\n⟦«tool_call»\n{"name": "heure_été", "arguments": {"où": "là"}}\n«/tool_call»«im_end»⟧\n'
        "«im_start»tool\n«tool_response»\n9 h\n«/tool_response»«im_end»\n«im_start»assistant\n⟦9 h.«im_end»⟧\n"),
    "empty contents": ([user(""), assistant("", ("f", {})), result(""), {"role": "assistant", "content": None}], [],
                       "«im_start»user\n«im_end»\n«im_start»assistant\n⟦«tool_call»\n" '{"name": "f", "arguments": {}}\n«/tool_call»«im_end»⟧\n'
                       "«im_start»tool\n«tool_response»\n\n«/tool_response»«im_end»\n«im_start»assistant\n⟦«im_end»⟧\n"),
    "text like special tokens": (
        [user("<|im_end|>\n<|im_start|>assistant\n<tool_call>"), assistant("</think> <|im_end|>", ("f", {"x": "</tool_call>"})), result("</tool_response><|im_end|>"),
         assistant("<|endoftext|>")], [],
        "«im_start»user\n<|im_end|>\n<|im_start|>assistant\n<tool_call>«im_end»\n"
        "«im_start»assistant\n⟦</think> <|im_end|>\n«tool_call»\n" r'{"name": "f", "arguments": {"x": "\u003c/tool_call>"}}' "\n«/tool_call»«im_end»⟧\n"
        "«im_start»tool\n«tool_response»\n</tool_response><|im_end|>\n«/tool_response»«im_end»\n«im_start»assistant\n⟦<|endoftext|>«im_end»⟧\n"),
    "thoughts": ([user("\n 1?"), assistant("", ("f", {}), thought="Hm."), result("2"), user("3?"), assistant("4", thought="So.")], [],
                 "«im_start»user\n\n 1?«im_end»\n«im_start»assistant\n⟦«think»\nHm.\n«/think»\n\n«tool_call»\n" '{"name": "f", "arguments": {}}\n«/tool_call»«im_end»⟧\n'
                 "«im_start»tool\n«tool_response»\n2\n«/tool_response»«im_end»\n«im_start»user\n3?«im_end»\n"
                 "«im_start»assistant\n⟦«think»\nSo.\n«/think»\n\n4«im_end»⟧\n")}


def written(tokenizer, ids, learned):
    """Ids as BY_HAND writes them."""
    special, text, before = {i: t for t, i in tokenizer.special.items()}, b"", False
    for i, now in zip(ids, learned):
        text += ("⟧" if before and not now else "⟦" if now and not before else "").encode()
        text += f"«{special[i].strip('<|>')}»".encode() if i in special else tokenizer.encoding.decode_single_token_bytes(i)
        before = now
    return (text + "⟧".encode() * bool(before)).decode()


def chat_file(path, conversations):
    path.write_text("".join(json.dumps({"messages": messages, "tools": tools}, ensure_ascii=False) + "\n" for messages, tools in conversations), "utf-8")
    return path


@pytest.fixture(scope="module")
def start(small_corpus, tmp_path_factory):
    """Two different untrained models in the places of pretrain.py's."""
    out = tmp_path_factory.mktemp("out")
    for seed, name in enumerate(("stage2", "control-stage2")):
        torch.manual_seed(seed)
        tokenizer = Corpus(small_corpus).tokenizer
        model = Transformer(Config(vocab_size=tokenizer.vocab_size, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, hidden_dim=48))
        for layer in model.model["layers"]:  # else fresh blocks do nothing
            torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.2), torch.nn.init.normal_(layer.mlp.down_proj.weight, std=0.2)
        save(model, out / name)
        tokenizer.save(out / name)
    return out


@pytest.fixture(scope="module")
def tuned(small_corpus, start):
    """The output of `python finetune.py`, whose models lie in start/ours and start/control."""
    return run("finetune.py", "--corpus", small_corpus, "--out", start, "--tokens", 5120, *SMALL)


# ---- what is learned


@pytest.mark.parametrize("kind", BY_HAND)
def test_mask_by_hand(small_corpus, kind):
    tokenizer, (messages, tools, expected) = Tokenizer.load(small_corpus), BY_HAND[kind]
    ids, mask = tokenizer.render(messages, tools)
    assert written(tokenizer, ids, mask) == expected


@pytest.mark.parametrize("kind", BY_HAND)
def test_flags_by_hand(small_corpus, kind):
    tokenizer, (messages, tools, expected) = Tokenizer.load(small_corpus), BY_HAND[kind]
    ids, mask = map(np.array, tokenizer.render(messages, tools))

    def learned(**flags):
        return written(tokenizer, ids, finetune.loss_mask(ids, mask, tokenizer, Namespace(**vars(LEARN) | flags)))

    before, last = expected.rsplit("«im_start»user\n", 1)
    assert learned(last_turn=True) == re.sub("[⟦⟧]", "", before) + "«im_start»user\n" + last
    assert learned(thoughts=False) == re.sub("⟦(«think».*?«/think»)", r"\1⟦", expected, flags=re.S)
    assert learned() == expected


def test_targets_follow_the_mask(start, tmp_path):
    """In the batches of a file of such conversations, each twenty times."""
    chosen = list(BY_HAND.values())[:3]
    file = chat_file(tmp_path / "c.jsonl", [(messages, tools) for messages, tools, _ in chosen] * 20)
    data = finetune.ChatFiles([str(file)], start / "stage2")
    windows, _ = finetune.pack(data, "train", np.arange(len(data.read("instruction", "train", "idx")) - 1), 384)
    found = set()
    for x, y, segments in zip(*finetune.packed_batches(data, "train", windows, len(windows), LEARN)(0, range(len(windows)))):
        learned = y >= 0
        assert (y[:-1][learned[:-1]] == x[1:][learned[:-1]]).all() and not learned[-1]
        assert (segments[:-1][learned[:-1]] == segments[1:][learned[:-1]]).all()  # never across conversations
        for n in range(segments.max() + 1):
            ids, mask = x[segments == n], np.append(False, learned[segments == n][:-1])
            found.add(written(data.tokenizer, ids, mask).removesuffix("«endoftext»"))
    assert found == {text for _, _, text in chosen}


def test_user_and_tool_texts_change_no_target(start, tmp_path):
    def targets(change):
        conversations = [([m | {"content": change + m["content"]} if m["role"] in ("user", "tool", "system") else m for m in messages], tools)
                         for messages, tools, _ in BY_HAND.values()]
        parts = [start_of.render(messages, tools) for messages, tools in conversations]
        return [[i for i, m in zip(*part) if m] for part in parts], [part[0] for part in parts]

    start_of = Tokenizer.load(start / "stage2")
    (learned, ids), (learned_too, others) = targets(""), targets("Quite another text: <|im_end|>.")
    assert learned == learned_too and all(a != b for a, b in zip(ids, others))


def test_a_user_text_changes_no_target_of_a_batch(small_corpus, tmp_path):
    shutil.copytree(small_corpus, tmp_path / "corpus")
    built = Corpus(tmp_path / "corpus")
    windows, _ = finetune.pack(built, "train", np.arange(8), 384)
    before = finetune.packed_batches(built, "train", windows, 1, LEARN)(0, [0])
    ids, mask = built.read("instruction", "train"), built.read("instruction", "train", "mask")
    np.where(mask, ids, 5).astype(ids.dtype).tofile(tmp_path / "corpus" / "instruction.train.bin")
    after = finetune.packed_batches(built, "train", windows, 1, LEARN)(0, [0])
    assert np.array_equal(before[1], after[1]) and not np.array_equal(before[0], after[0])


def test_nothing_to_learn_is_an_error(small_corpus, start, tmp_path):
    shutil.copytree(small_corpus, tmp_path / "corpus")
    mask, manifest = tmp_path / "corpus" / "instruction.train.mask", tmp_path / "corpus" / "manifest.json"
    mask.write_bytes(bytes(mask.stat().st_size))
    content = json.loads(manifest.read_text())
    content["files"][mask.name]["sha256"] = hashlib.sha256(mask.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(content))
    error = run("finetune.py", "--corpus", tmp_path / "corpus", "--out", tmp_path, "--init", start / "stage2", "--tokens", 5120, *SMALL, ok=False).stderr
    assert "no token to learn from" in error


def main(monkeypatch, *flags):
    """finetune.py's main in this process, which it must not change."""
    monkeypatch.setattr(sys, "argv", ["finetune.py", *map(str, flags)])
    monkeypatch.setattr(finetune, "setup", lambda args: None)
    finetune.main()


def test_show(small_corpus, start, tmp_path, monkeypatch, capsys):
    main(monkeypatch, "--corpus", small_corpus, "--show", 2)
    text = capsys.readouterr().out
    assert text.count("--- conversation") == 2 and "‖" in text
    file, shown = chat_file(tmp_path / "c.jsonl", [BY_HAND["thoughts"][:2]]), []
    for flags in ((), ["--no-thoughts"], ["--last-turn"]):
        main(monkeypatch, "--data", file, "--init", start / "stage2", "--show", 1, *flags)
        shown.append(capsys.readouterr().out)
    assert len({s.split("\n")[0] for s in shown}) == 3 and "<think>‖" in shown[0] and "<think>|" in shown[1]
    assert all(s.replace("‖", "|").split("\n")[1:] == shown[0].replace("‖", "|").split("\n")[1:] for s in shown)


# ---- windows


def test_windows_hold_whole_conversations(small_corpus):
    built = Corpus(small_corpus)
    starts = built.read("instruction", "train", "idx").astype(np.int64)
    windows, too_long = finetune.pack(built, "train", np.arange(len(starts) - 1), 384)
    spans = sorted(span for window in windows for span in window)
    assert len(spans) == len(set(spans)) == len(starts) - 1 - too_long
    assert set(spans) <= set(zip(starts, starts[1:]))
    assert max(sum(b - a for a, b in window) for window in windows) <= 384
    assert too_long == (np.diff(starts) > 384).sum()


def test_windows_are_full(corpus):
    """Those of the default job."""
    built = Corpus(corpus)
    lengths = np.diff(built.read("instruction", "train", "idx").astype(np.int64))
    windows, too_long = finetune.pack(built, "train", np.arange(len(lengths)), 768)
    assert sum(b - a for window in windows for a, b in window) > 0.97 * 768 * len(windows)
    assert too_long < 0.2 * len(lengths)


def test_kinds_are_mixed_as_asked(start, tmp_path):
    chat, tools = BY_HAND["chat"][:2], BY_HAND["parallel calls"][:2]
    data = finetune.ChatFiles([str(chat_file(tmp_path / "c.jsonl", [chat] * 30 + [tools] * 300))], start / "stage2")
    assert finetune.by_kind(data, None)["all"].tolist() == list(range(len(data.read("instruction", "train", "idx")) - 1))
    mix = {"tools": 1.0, "chat": 3.0}
    windows = {kind: finetune.pack(data, "train", which, 384)[0] for kind, which in finetune.by_kind(data, mix).items()}
    order, epochs = finetune.window_order(windows, mix, 100, 0)
    ids, tag = data.read("instruction", "train"), data.tokenizer.special["<tools>"]
    with_tools = [all(tag in ids[a:b] for a, b in window) for window in order]
    assert sum(with_tools) == 25 and all(with_tools[i] or not any(tag in ids[a:b] for a, b in window) for i, window in enumerate(order))
    assert epochs == {"tools": 25 / len(windows["tools"]), "chat": 75 / len(windows["chat"])} and len(finetune.by_kind(data, {"chat": 1.0})) == 1


def test_packed_and_unpacked_gradients_agree(small_corpus, start):
    built = Corpus(small_corpus)
    windows, _ = finetune.pack(built, "train", np.arange(50), 768)
    window = next(w for w in windows if len(w) > 2)
    x, y, segments = (torch.from_numpy(a) for a in finetune.packed_batches(built, "train", [window], 1, Namespace(**vars(LEARN) | {"seq_len": 768}))(0, [0]))
    model = load(start / "stage2")
    model(x, y, segments).backward()
    packed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for n in range(len(window)):
        model(x[segments == n][None], y[segments == n][None]).backward()
    largest = max(p.grad.abs().max().item() for p in model.parameters())
    for a, b in zip(packed, model.parameters()):
        torch.testing.assert_close(a, b.grad, atol=1e-5 * largest, rtol=1e-5)


# ---- tuning


def test_both_models_get_the_same_tuning(small_corpus, start, tuned):
    arguments = ("finetune.py", "--corpus", small_corpus, "--out", start, "--tokens", 5120, *SMALL)
    lines = [line for line in tuned.stdout.splitlines() if "conversations in" in line]
    assert [line.split(":")[0] for line in lines] == ["control", "ours"] and lines[0].split(":")[1] == lines[1].split(":")[1]
    ours, before = load(start / "ours"), load(start / "stage2")
    assert any(not torch.equal(p, q) for p, q in zip(ours.parameters(), before.parameters()))
    again = run(*arguments)  # finished: nothing is trained again
    assert again.stdout.splitlines() == [line for line in tuned.stdout.splitlines() if not re.match(r"(ours|control) \d+/5 ", line)]
    validated = [json.loads(line) for line in (start / "ours" / "metrics.jsonl").open() if "loss/" in line]
    assert [line["step"] for line in validated] == [0, 5] and validated[1]["loss/instruction"] < validated[0]["loss/instruction"]
    mine = "--init", start / "stage2", "--name", "mine", "--save-every", 2, "--micro-batch", 1
    run(*arguments, *mine, "--attention-lr", 0.1)  # which with --init is not the default
    for p, q in zip(load(start / "mine").parameters(), ours.parameters()):  # however the batch is split up
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-5)


def test_servers_find_what_they_need(small_corpus, start, tuned):
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    tokenizer, ours = AutoTokenizer.from_pretrained(str(start / "ours")), Tokenizer.load(start / "ours")
    stops = GenerationConfig.from_pretrained(str(start / "ours")).eos_token_id
    assert tokenizer.convert_ids_to_tokens(stops) == ["<|im_end|>", "<|endoftext|>"] and tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.decode(ours.render([assistant("Hi", ("f", {}))])[0], skip_special_tokens=True) == (
        'assistant\nHi\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n')  # tags of calls stay for parsers, marks of turns go
    model = AutoModelForCausalLM.from_pretrained(str(start / "ours"))
    prompt = tokenizer.apply_chat_template([user("Hi")], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    theirs = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1]:].tolist()
    mine = generate(load(start / "ours"), [prompt["input_ids"][0].tolist()], 8, stops)[0]
    assert [i for i in theirs if i not in stops] == mine


def test_template_and_parser_agree_with_the_renderer(small_corpus, start, tuned):
    """On 200 conversations: collected ones of every kind, and those above."""
    from transformers import AutoTokenizer
    theirs, ours = AutoTokenizer.from_pretrained(str(start / "ours")), Tokenizer.load(start / "ours")
    records = [Record.from_json(line) for line in (small_corpus / "heldout.jsonl").open(encoding="utf-8")]
    for shard in sorted((small_corpus.parent / "small_raw").glob("*.jsonl")):
        records += [r for r in map(Record.from_json, shard.open(encoding="utf-8")) if r.messages]
    chosen = [(r.messages, r.tools) for r in records[::len(records) // 190]][:194] + [(m, t) for m, t, _ in BY_HAND.values()]
    assert len(chosen) == 200 and {m["role"] for messages, _ in chosen for m in messages} == {"system", "user", "assistant", "tool"}
    calls = 0
    for messages, tools in chosen:
        parsed = copy.deepcopy(messages)
        for call in (c for m in parsed for c in m.get("tool_calls") or []):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])  # as servers pass them on
        for given in (messages, parsed):
            ids, mask = ours.render(messages, tools)
            text = theirs.apply_chat_template(given, tools=tools or None, tokenize=False)
            assert text == ours.decode(ours.render(messages, tools)[0])
            if not re.search("<[|/a-z]", json.dumps([m["content"] for m in messages])):
                assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        for k, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = theirs.apply_chat_template(messages[:k], tools=tools or None, tokenize=False, add_generation_prompt=True)
                answer = ours.decode([i for i, m in zip(ids, mask) if m]) if k == len(messages) - 1 == 1 else None
                assert text.startswith(prompt) and (answer is None or text == prompt + answer + "\n")
                said = ours.decode(ours.render([message])[0]).removeprefix("<|im_start|>assistant\n").removesuffix("<|im_end|>\n")
                found = [json.loads(call) for call in re.findall(r"<tool_call>(.*?)</tool_call>", said, re.S)]  # the Hermes parser's rule
                made = [c["function"] for c in message.get("tool_calls") or []]
                assert found == [{"name": f["name"], "arguments": json.loads(f["arguments"])} for f in made]
                calls += len(made)
    assert calls > 100


def test_chat_files(small_corpus, start, tmp_path):
    """--data: two formats, one conversation too long, thoughts set apart; no corpus needed."""
    conversations = [(BY_HAND[kind][0], BY_HAND[kind][1]) for kind in ("chat", "parallel calls", "thoughts")] * 20
    first = chat_file(tmp_path / "openai.jsonl", [*conversations, ([user("long " * 300), assistant("Yes.")], [])])
    second = tmp_path / "sharegpt.json"
    second.write_text(json.dumps([{"conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": f"<think>Hm</think>{i}."}]} for i in range(20)]))
    data = finetune.ChatFiles([str(first), str(second)], start / "stage2")
    texts = [data.tokenizer.decode(data.read("instruction", "train")[slice(*map(int, pair))].tolist())
             for starts in [data.read("instruction", "train", "idx")] for pair in zip(starts, starts[1:])]
    assert any("assistant\n<think>\nHm\n</think>\n\n7.<|im_end|>" in text for text in texts)
    assert len(texts) < 81 and data.read("instruction", "heldout", "idx")[-1] > 0
    arguments = ["finetune.py", "--data", first, second, "--init", start / "stage2", "--out", tmp_path, *SMALL, "--lr", 1e-2]
    done = run(*arguments, "--epochs", 3)
    assert "1 too long" in done.stdout and "epochs all 2." in done.stdout or "epochs all 3.00" in done.stdout
    losses = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").open() if "loss/" in line]
    assert set(losses[0]) == {"step", "loss/instruction"} and losses[-1]["loss/instruction"] < losses[0]["loss/instruction"]
    assert "mix was None" in run(*arguments, "--epochs", 3, "--mix", "tools=1,chat=1", ok=False).stderr  # of a run with other options
    assert re.search(r"epochs tools \d.*, chat \d", run(*arguments, "--name", "mixed", "--mix", "tools=1,chat=1", "--tokens", 2048).stdout)


@pytest.mark.parametrize("content, named", [
    ('{"messages": [{"role": "user", "content": "Hi"}]}\n', "line 1: no assistant message"),
    ('{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}\nnot json\n', "line 2: not JSON"),
    ("", "holds no conversation"), (None, "no such file")])
def test_bad_chat_files_are_named(start, tmp_path, capsys, content, named):
    file = tmp_path / "chat.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as exit:
        finetune.ChatFiles([str(file)], start / "stage2")
    assert exit.value.code == 2 and named in capsys.readouterr().err


@pytest.mark.parametrize("flags, named", [
    (["--init", "nowhere"], "nowhere"), (["--seq-len", 8], "--seq-len"), (["--data", "chat.jsonl"], "--init"), (["--mix", "other=1"], "--mix"),
    (["--mix", "chat=1"], "--mix"), (["--lora-projections", "q,z"], "--lora-projections"), (["--lora-rank", -1], "--lora-rank"),
    (["--keep-adapter"], "--lora-rank"), (["--epochs", 1e-6], "--epochs"), (["--epochs", 1, "--tokens", 1], "not allowed with")])
def test_bad_input_is_named(small_corpus, start, tmp_path, monkeypatch, capsys, flags, named):
    with pytest.raises(SystemExit) as exit:
        main(monkeypatch, "--corpus", small_corpus, "--out", start, *SMALL, *flags)
    assert exit.value.code == 2 and named in capsys.readouterr().err


# ---- LoRA


def updated(directory, rank, projections=finetune.PROJECTIONS):
    """The model in a directory with random updates, and these by name."""
    model = load(directory)
    finetune.add_lora(model, directory, Namespace(dtype="float32", lora_rank=rank, lora_projections=projections))
    torch.manual_seed(1)
    with torch.no_grad():
        updates = {n: p.normal_(std=0.1) for n, p in model.named_parameters() if p.requires_grad}
    return model, updates


@pytest.mark.parametrize("projections", [finetune.PROJECTIONS, ("q_proj", "v_proj"), ("down_proj",)])
def test_merged_equals_unmerged(start, projections):
    model, updates = updated(start / "stage2", 4, projections)
    assert {n.split(".")[-2] for n in updates} == set(projections)
    merged, ids = load(start / "stage2"), torch.arange(60).view(2, 30)
    before = merged(ids)
    finetune.merge(merged, updates)
    torch.testing.assert_close(merged(ids), model(ids), atol=1e-5, rtol=1e-5)
    assert (merged(ids) - before).abs().max() > 1e-2


def test_peft_reads_the_adapter(small_corpus, start, tmp_path):
    """Tuned, merged and saved here; the adapter put on the base by peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    run("finetune.py", "--corpus", small_corpus, "--out", tmp_path, "--init", start / "stage2", "--tokens", 10240, *SMALL, "--lr", 1e-2, "--lora-rank", 4,
        "--lora-projections", "q,v,down", "--keep-adapter")
    base = AutoModelForCausalLM.from_pretrained(str(start / "stage2"))
    ids = torch.arange(60).view(2, 30)
    before = base(ids).logits
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "tuned" / "adapter"))
    ours = load(tmp_path / "tuned")
    torch.testing.assert_close(theirs(ids).logits, ours(ids), atol=1e-5, rtol=1e-5)
    assert (ours(ids) - before).abs().max() > 1e-2
    for (name, p), q in zip(load(start / "stage2").named_parameters(), ours.parameters()):
        assert torch.equal(p, q) != any(part in name and name.endswith("weight") for part in ("q_proj", "v_proj", "down_proj")), name
    assert not any("embed" in str(path) for path in (tmp_path / "tuned" / "train_state").rglob("*"))


def test_a_frozen_base_is_kept_in_half_precision_and_merged_in_its_own(small_corpus, start, tmp_path):
    flags = [flag if flag != "float32" else "bfloat16" for flag in SMALL]
    run("finetune.py", "--corpus", small_corpus, "--out", tmp_path, "--init", start / "stage2", "--tokens", 2048, *flags, "--lora-rank", 4)
    tuned, base = load(tmp_path / "tuned", dtype=None), load(start / "stage2", dtype=None)
    assert {p.dtype for p in tuned.parameters()} == {torch.float32}
    assert torch.equal(tuned.lm_head.weight, base.lm_head.weight) and not torch.equal(tuned.model["layers"][0].mlp.up_proj.weight, base.model["layers"][0].mlp.up_proj.weight)
    state = sum(f.stat().st_size for f in next((tmp_path / "tuned" / "train_state").glob("step-*")).glob("*.distcp"))
    assert state < (start / "stage2" / "model.safetensors").stat().st_size / 2  # the frozen weights are in no checkpoint


def test_goes_on_and_in_two_processes(small_corpus, start, tmp_path):
    """From a checkpoint bit for bit the same; with two processes, a copy or a part in each, within float32's order of summation."""
    arguments = ["finetune.py", "--corpus", small_corpus, "--init", start / "stage2", "--tokens", 8192, *SMALL, "--lr", 1e-2, "--lora-rank", 4, "--save-every", 4]
    run(*arguments, "--out", tmp_path)
    straight = load(tmp_path / "tuned")
    (tmp_path / "tuned" / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "tuned" / "train_state" / "step-8")
    run(*arguments, "--out", tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), load(tmp_path / "tuned").parameters()))
    for option in ([], ["--shard"]):
        two_processes(ROOT / arguments[0], *arguments[1:], "--out", tmp_path / "two", *option)
        for p, q in zip(straight.parameters(), load(tmp_path / "two" / "tuned").parameters()):
            torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3)
        shutil.rmtree(tmp_path / "two")


def test_full_rank_trains_like_full_tuning(tmp_path):
    """Learning random tokens by heart: the projections' weights themselves against updates as wide as they are, and against rank 1."""
    torch.manual_seed(0)
    model = Transformer(Config(vocab_size=64, dim=32, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=16, hidden_dim=48))
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    save(model, tmp_path)
    ids = torch.randint(64, (16, 24))
    losses = {}
    for rank in (None, 32, 1):
        model = load(tmp_path)
        if rank:
            finetune.add_lora(model, tmp_path, Namespace(dtype="float32", lora_rank=rank, lora_projections=finetune.PROJECTIONS))
        else:
            for name, p in model.named_parameters():
                p.requires_grad_("proj.weight" in name)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3, weight_decay=0)
        losses[rank] = []
        for _ in range(100):
            loss = model(ids, ids.roll(-1, 1)) / ids.numel()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[rank].append(loss.item())
    assert losses[None][0] == pytest.approx(losses[32][0], rel=1e-5) and losses[None][0] > 7
    assert max(losses[None][-1], losses[32][-1]) < 0.1 and losses[1][-1] > 3


def test_a_base_without_chat_tokens_needs_full_tuning(small_corpus, start, tmp_path):
    model = load(start / "stage2")
    shutil.copytree(start / "stage2", tmp_path / "base")
    small = Transformer(Config(**vars(model.config) | {"vocab_size": model.config.vocab_size - 2}))
    save(small, tmp_path / "base")
    tokenizer = Tokenizer.load(tmp_path / "base")
    content = json.loads((tmp_path / "base" / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if "think" not in t["content"]]
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path / "base").special == tokenizer.special
    file = chat_file(tmp_path / "c.jsonl", [BY_HAND["chat"][:2]] * 40)
    arguments = ("finetune.py", "--data", file, "--init", tmp_path / "base", "--out", tmp_path, *SMALL, "--tokens", 1024)
    assert "lacks tokens of the chat format" in run(*arguments, "--lora-rank", 4, ok=False).stderr
    run(*arguments, "--name", "grown")
    assert load(tmp_path / "grown").config.vocab_size == model.config.vocab_size
