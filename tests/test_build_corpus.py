import argparse
import ast
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict

import numpy as np
import pytest

import build_corpus
from build_corpus import SPECIAL_TOKENS, Corpus, Tokenizer, train_bpe
from collect import Record, chat_message
from conftest import ROOT, run

TEXTS = ["", "a", "Hello, world! It's 12345.67\n\n\tdef f(x):\n        return x  \n", "naïve café 日本語 🙂 \u200b\u00a0 é", "<|im_end|><tool_call>",
         "{\"name\": \"numpy.roll\", \"arguments\": {\"shift\": -3}}", "  \r\n \n\n   x", "a" * 300, "\x00\x01\ufffd", "ǅ Ⅷ ٣ ½"]


@pytest.fixture(scope="module")
def small(small_raw, tmp_path_factory):
    path = tmp_path_factory.mktemp("small_corpus")
    run("build_corpus.py", "--raw", small_raw, "--out", path, "--vocab-size", 1024, "--heldout", 0.1, "--fold", 0)
    return path


def record(name, domain="text", text="Some text here, of a length that a document should have.", apis=(), **more):
    return Record(name, domain, "test", "MIT", list(apis), text, **more)


def write_raw(directory, records):
    directory.mkdir(exist_ok=True)
    (directory / "records.jsonl").write_text("".join(r.to_json() + "\n" for r in records), encoding="utf-8")


# ---- tokenizer


def test_round_trip_and_special_text_is_ordinary(small):
    tokenizer = Tokenizer.load(small)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and max(ids, default=0) < tokenizer.vocab_size - len(SPECIAL_TOKENS)


def test_hugging_face_tokenizer_gives_the_same_ids(small, small_raw):
    from tokenizers import Tokenizer as Reference
    ours, reference = Tokenizer.load(small), Reference.from_file(str(small / "tokenizer.json"))
    reference.encode_special_tokens = True  # text is text, as with ours
    lines = [line for shard in small_raw.glob("*.jsonl") for line in shard.open(encoding="utf-8")][:300]
    for text in TEXTS + lines:
        if any(t in text for t in SPECIAL_TOKENS[3:]):  # the tags of tools are tokens that servers print, and so find in text
            continue
        assert reference.encode(text).ids == ours.encode(text)
        assert reference.decode(ours.encode(text), skip_special_tokens=False) == text


def test_special_ids_agree_with_hugging_face(small):
    from transformers import AutoTokenizer
    ours, theirs = Tokenizer.load(small), AutoTokenizer.from_pretrained(str(small))
    assert theirs.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == [ours.special[t] for t in SPECIAL_TOKENS]
    assert len(theirs) == ours.vocab_size and theirs.eos_token_id == ours.im_end


def test_bpe_against_the_reference_trainer():
    """The same merges as `tokenizers` on the same words. Both break ties towards the pair of lower ids."""
    from tokenizers import Tokenizer as Reference, models, pre_tokenizers, trainers
    rng = random.Random(0)
    stems = ["".join(rng.choices("abcdeft", k=rng.randrange(2, 9))) for _ in range(300)]
    text = " ".join(rng.choices(stems, k=20_000))
    reference = Reference(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    alphabet = sorted(set(text) - {" "})
    reference.train_from_iterator([text], trainers.BpeTrainer(vocab_size=len(alphabet) + 200, show_progress=False))
    theirs = [tuple(m) for m in json.loads(reference.to_str())["model"]["merges"]]
    words = build_corpus.Counter(w.encode() for w in text.split(" "))
    ranks = train_bpe(words, 256 + 200)
    ours = [tuple(h.decode() for h in build_corpus.halves(t, ranks)) for t in sorted(ranks, key=ranks.get)[256:]]
    assert ours == theirs


def test_the_trainer_splits_as_tiktoken_does():
    """The trainer's words are the encoder's: with every whole word in the vocabulary each word is one token."""
    import regex
    splitter = regex.compile(build_corpus.PATTERN)
    for text in TEXTS:
        words = splitter.findall(text)
        assert "".join(words) == text
        ranks = {bytes([b]): b for b in range(256)}
        for word in dict.fromkeys(w.encode() for w in words):
            for n in range(2, len(word) + 1):
                ranks.setdefault(word[:n], len(ranks))
        assert [t.decode() for t in map(Tokenizer(ranks).encoding.decode_single_token_bytes, Tokenizer(ranks).encode(text))] == words


def test_names_are_cut_alike_in_definitions_and_calls(small):
    tokenizer = Tokenizer.load(small)
    name = tokenizer.encode('"name": "')
    assert len(name) == 1
    for text in ('{"description": "Ends so.", "name": "mpmath.zeta", "parameters": {', '<tool_call>\n{"name": "mpmath.zeta", "arguments": {'):
        ids = tokenizer.encode(text)
        at = ids.index(name[0]) + 1
        assert ids[at:at + len(tokenizer.encode("mpmath.zeta"))] == tokenizer.encode("mpmath.zeta")


STYLES = {  # name: (pre-tokenizer, normalizer, added tokens) of a tokenizer.json
    "gpt2": ({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}, None, ["<|endoftext|>"]),
    "smollm": ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]}, None, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]),
    "qwen": ({"type": "Sequence", "pretokenizers": [{"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex":
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}]}, {"type": "NFC"},
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]),
    "llama3": ({"type": "Sequence", "pretokenizers": [{"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex":
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}]}, None,
        ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{i}|>" for i in range(5))]),
}


@pytest.fixture(scope="module", params=STYLES)
def base(request, small_raw, tmp_path_factory):
    """A directory with a tokenizer.json as a downloaded model has it, trained by tokenizers."""
    from tokenizers import AddedToken, Tokenizer as Reference, decoders, models, pre_tokenizers, trainers
    pre, normalizer, added = STYLES[request.param]
    theirs = Reference(models.BPE())
    theirs.pre_tokenizer, theirs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    texts = [json.loads(line).get("text") or "" for shard in small_raw.glob("*.jsonl") for line in shard.open(encoding="utf-8")]
    theirs.train_from_iterator(texts[:400], trainers.BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    content = json.loads(theirs.to_str()) | {"pre_tokenizer": pre, "normalizer": normalizer}
    directory = tmp_path_factory.mktemp(request.param)
    theirs = Reference.from_str(json.dumps(content))
    theirs.add_special_tokens([AddedToken(t, special=True) for t in added])
    theirs.save(str(directory / "tokenizer.json"))
    return directory


def test_a_base_models_tokenizer(base, tmp_path):
    """Loaded, and saved and loaded by transformers, it gives the ids that tokenizers gives."""
    from tokenizers import Tokenizer as Reference
    from transformers import AutoTokenizer
    theirs, ours = Reference.from_file(str(base / "tokenizer.json")), Tokenizer.load(base)
    ours.save(tmp_path)
    saved, again = AutoTokenizer.from_pretrained(str(tmp_path)), Tokenizer.load(tmp_path)
    rng = random.Random(0)
    alphabet = "aZé e\u0301 \n\r\t'st1234567890  ._-{}\"日\u00a0\u200b🙂ﬁ½Ⅷ\x00"
    texts = [t for t in TEXTS if "<|" not in t] + ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(2000)]
    for text in texts:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == again.encode(text) == saved.encode(text, add_special_tokens=False) == expected, text
    for token, i in ours.special.items():
        assert saved.convert_tokens_to_ids(token) == i
    assert ours.special == again.special and set(SPECIAL_TOKENS) - set(ours.special) <= {"<|endoftext|>"}
    for messages, tools in [(CHAT[2:], TOOLS), (CHAT[2:], None)]:
        assert saved.apply_chat_template(messages, tools=tools, tokenize=False) == ours.decode(ours.render(messages, tools)[0])


@pytest.mark.parametrize("normalizers", [[], [{"type": "NFC"}]], ids=["none", "one"])
def test_a_sequence_of_at_most_one_normalizer(small, tmp_path, normalizers):
    content = json.loads((small / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).normal_form == (normalizers[0]["type"] if normalizers else None)


def test_a_vocabulary_that_lacks_bytes_or_has_added_words(small_raw, tmp_path):
    """SmolLM2's lacks 21 bytes, GPT-NeoX's has runs of spaces: the ids are those of tokenizers, also when saved."""
    from tokenizers import AddedToken, Tokenizer as Reference, decoders, models, pre_tokenizers, trainers
    theirs = Reference(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    lines = [line for shard in sorted(small_raw.glob("*.jsonl")) for line in shard.open(encoding="utf-8")][:400]
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet() if c not in "ĄĆĵõò"]  # 4, 6, 0x9d, 0xf5, 0xf2
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False,
                                  special_tokens=["<|endoftext|>"])
    theirs.train_from_iterator([json.loads(line).get("text") or "" for line in lines], trainer)
    content = json.loads(theirs.to_str())
    vocab = content["model"]["vocab"]
    lost = {c for c in "ĄĆĵõ" if c in vocab}
    assert not {"Ą", "Ć"} & vocab.keys() and len(lost) < 3
    theirs.add_tokens([AddedToken(" " * n, normalized=False, special=False) for n in (2, 4)])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path)
    (tmp_path / "again").mkdir()
    ours.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    rng = random.Random(0)
    texts = ["a\x04b", "\x06", "x \x04\x06 y", "def f():\n        return 1", "it\x04's  12\x06 3", ""]
    texts += ["".join(rng.choices("ab \n\x04\x06é日'1.", k=rng.randrange(30))) for _ in range(500)]
    for text in texts:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == again.encode(text) == expected, text
    assert ours.decode(ours.encode("a\x04b")) == "ab"
    (tmp_path / "raw").mkdir()
    story = " ".join(f"On day {n} the river rose by {n} feet\U00080000 and fell again." for n in range(1, 30))
    record = Record("text:river", "text", "test", "MIT", [], story)
    (tmp_path / "raw" / "river.jsonl").write_text(record.to_json() + "\n", encoding="utf-8")
    arguments = ["--raw", tmp_path / "raw", "--tokenizer", tmp_path / "again", "--out", tmp_path / "corpus"]
    told, kept = run("build_corpus.py", *arguments).stdout, Corpus(tmp_path / "corpus").manifest["lost_bytes"]
    assert (f"lost {kept} bytes" in told) == (kept > 0) and kept == 29
    for fused in (True, False):  # an unknown token, as SmolLM2's has in a GGUF
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        content["model"] |= {"unk_token": "<|endoftext|>", "fuse_unk": fused, "byte_fallback": True}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        ours, theirs = Tokenizer.load(tmp_path), Reference.from_file(str(tmp_path / "tokenizer.json"))
        for text in texts:
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text
    assert ours.fingerprint() != again.fingerprint()
    content["model"]["unk_token"] = "<nowhere>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        Tokenizer.load(tmp_path)
    theirs = Reference.from_file(str(tmp_path / "again" / "tokenizer.json"))
    theirs.add_tokens([AddedToken("<|fim|>", normalized=False, special=False, rstrip=True)])
    theirs.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(SystemExit):  # whose white space, the token's or that of the runs?
        Tokenizer.load(tmp_path)


CUTS = {  # patterns by which others cut text, one after the other; the last two leave a part of the text out
    "letters, then the rest": [r"\s?\p{L}+", r"[^\s\p{L}]+|\s+"],
    "as DeepSeek's": [r"\p{N}{1,3}", "[一-龥]+", r"[!-/:-~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"],
    "as DeepSeek Coder's": ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥]+", r"\p{N}"],
    "one with a group": [r"( ?\p{L}+)"],
}


def random_texts(alphabet, n=1500):
    rng = random.Random(0)
    return TEXTS + ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(n)]


@pytest.mark.parametrize("cuts", CUTS)
def test_text_that_is_cut_several_times_or_in_part(small, tmp_path, cuts):
    from tokenizers import Tokenizer as Reference
    content = json.loads((small / "tokenizer.json").read_text())
    steps = [{"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": cut}} for cut in CUTS[cuts]]
    content["pre_tokenizer"]["pretokenizers"][:-1] = steps
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours, theirs = Tokenizer.load(tmp_path), Reference.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for text in random_texts("aZé \n\r\t'st1234 ._-{}日本🙂"):
        if "<tool_call>" not in text:
            assert ours.encode(text) == theirs.encode(text).ids, text
    assert not ours.same_as(Tokenizer.load(small))
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    assert ours.same_as(Tokenizer.load(tmp_path / "saved"))


def test_added_tokens_are_found_before_text_is_normalised(small, tmp_path):
    """A mark that would go into the token's last sign stays outside; white space is what tokenizers takes for it."""
    from tokenizers import AddedToken, Tokenizer as Reference, normalizers
    theirs = Reference.from_file(str(small / "tokenizer.json"))
    theirs.normalizer = normalizers.NFC()
    theirs.add_tokens([AddedToken("<fim>", normalized=False), AddedToken("<left>", normalized=False, lstrip=True),
                       AddedToken("<right>", normalized=False, rstrip=True), AddedToken("<Word>", normalized=False, single_word=True)])
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours, rng = Tokenizer.load(tmp_path), random.Random(0)
    for _ in range(2000):
        parts = ["<fim>", "<left>", "<right>", "<Word>", "\u0338", " ", "  ", "\n", "\x1c", "\u200d", "e", "\u0301", "²"]
        text = "".join(rng.choices(parts, k=rng.randrange(8)))
        assert ours.encode(text) == theirs.encode(text).ids, ascii(text)
    started = time.time()
    assert ours.decode(ours.encode(" " * 300_000)) == " " * 300_000 and time.time() - started < 10


def test_a_reserved_token_that_the_vocabulary_holds_too(small, tmp_path):
    """The chat tokens that take its place keep their ids when tokenizers and transformers read what is saved."""
    from tokenizers import Tokenizer as Reference
    from transformers import AutoTokenizer
    content = json.loads((small / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        if token["content"] in ("<|im_start|>", "<tools>"):
            token |= {"content": f"<|reserved_{token['id']}|>", "special": True}
        content["model"]["vocab"][token["content"]] = token["id"]
    del content["model"]["type"]  # as in old files
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    ours = Tokenizer.load(tmp_path)
    ours.save(tmp_path)
    assert ours.special == Tokenizer.load(small).special
    for theirs in (Reference.from_file(str(tmp_path / "tokenizer.json")), AutoTokenizer.from_pretrained(str(tmp_path))):
        assert {token: i for token, i in theirs.get_vocab().items() if token in ours.special} == ours.special


def test_missing_tokens_take_reserved_places_first(base):
    theirs = json.loads((base / "tokenizer.json").read_text())
    before = {t["content"]: t["id"] for t in theirs["added_tokens"]}
    after = Tokenizer.load(base).special
    reserved = [i for t, i in before.items() if "reserved" in t]
    new = [after[t] for t in SPECIAL_TOKENS if t in after and t not in before]
    assert all(after[t] == i for t, i in before.items() if "reserved" not in t)
    first = max(*before.values(), *theirs["model"]["vocab"].values()) + 1
    assert new == [*reserved, *range(first, first + len(new) - len(reserved))]


@pytest.mark.parametrize("change, named", [
    ({"model": {"type": "Unigram", "vocab": []}}, "model.type Unigram"), ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer {'type': 'Metaspace'}"),
    ({"normalizer": {"type": "Lowercase"}}, "normalizer {'type': 'Lowercase'}"), ({"added_tokens": None}, ""), ({"pre_tokenizer": None}, "pre_tokenizer None"),
    ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "add_prefix_space"),
    ({"pre_tokenizer": {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": "x"}}}, "pre_tokenizer {'type': 'Split'"),
    ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, "use_regex"),
    ({"model": {"type": "BPE", "vocab": {"▁a": 0}, "merges": [], "byte_fallback": True}}, "model.vocab has '▁'"),
    ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}, "model.vocab without all of ASCII")], ids=str)
def test_other_tokenizers_are_refused(small, tmp_path, capsys, change, named):
    content = json.loads((small / "tokenizer.json").read_text()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        Tokenizer.load(tmp_path)
    told = capsys.readouterr().err
    assert str(tmp_path / "tokenizer.json") in told and named in told and told.count("\n") == 1


def test_bytes_that_fall_back_to_tokens_of_their_own_are_refused():
    vocabulary = {symbol: i for i, symbol in enumerate(build_corpus.byte_symbols())} | {"<0x00>": 256}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    assert len(build_corpus.read_vocabulary(model, set())) == 257
    with pytest.raises(ValueError, match="byte_fallback"):
        build_corpus.read_vocabulary(model | {"byte_fallback": True}, set())


@pytest.mark.parametrize("unit", ["a", " ", "^", "\n", "日", "ab1", "a^", "\t x"])
def test_endless_runs_are_cut_and_come_back(small, unit):
    """A million letters, spaces or signs without a break: tiktoken alone runs out of stack on some."""
    tokenizer, text = Tokenizer.load(small), "Before. " + unit * (1_000_000 // len(unit)) + " after."
    assert all(len(run) <= build_corpus.LONGEST_RUN for part in tokenizer.parts(text) for run in re.findall(r"\s+|\S+", part))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and np.array_equal(tokenizer.encode_to_numpy(text), ids)


def test_cuts_are_safe_where_they_can_be(base):
    tokenizer = Tokenizer.load(base)
    text = "".join(random.Random(0).choices(["word", ".", "/x", "12", "=", "'s", "é"], k=60_000))
    assert len(tokenizer.parts(text)) > 2 and tokenizer.encode(text) == tokenizer.encoding.encode_ordinary(tokenizer.normalised(text))
    assert len(tokenizer.parts("some words " * 10_000)) == 1


def test_llamas_tokenizer_model(small, tmp_path):
    """As Meta ships it: ranks, and 256 special tokens that its code adds, of which the chat format takes reserved ones."""
    (tmp_path / "tokenizer.model").write_bytes((small / "tokenizer.tiktoken").read_bytes())
    ours, end = Tokenizer.find(str(tmp_path)), len(Tokenizer.load(small).ranks)
    assert ours.vocab_size == end + 256 and ours.special["<|begin_of_text|>"] == end and ours.special["<|eot_id|>"] == end + 9
    assert ours.special["<|im_start|>"] == end + 2 and ours.special["<|end_of_text|>"] == ours.end_of_text == end + 1
    assert Tokenizer.find(str(tmp_path / "tokenizer.model")).same_as(ours)
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    assert Tokenizer.find(str(tmp_path / "saved" / "tokenizer.json")).same_as(ours)
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    write_raw(tmp_path, [record("a")])
    assert "SentencePiece" in run("build_corpus.py", "--raw", tmp_path, "--out", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer.model", ok=False).stderr


def test_a_name_that_tiktoken_knows(small, tmp_path, monkeypatch):
    """A plug-in of tiktoken's own kind stands for those that are downloaded; of these, without a network, the message says where to put the file."""
    (tmp_path / "tiktoken_ext").mkdir()
    (tmp_path / "tiktoken_ext" / "mine.py").write_text(f"""
from tiktoken.load import load_tiktoken_bpe
def mine():
    return {{"name": "mine", "pat_str": {build_corpus.GPT2_PATTERN!r}, "mergeable_ranks": load_tiktoken_bpe({str(small / "tokenizer.tiktoken")!r}),
            "special_tokens": {{"<|endoftext|>": 1500}}}}
ENCODING_CONSTRUCTORS = {{"mine": mine}}
""")
    (tmp_path / "raw").mkdir()
    write_raw(tmp_path / "raw", [record("a", text="Some text, of which there is not much, but enough for a document.")])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run("build_corpus.py", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--tokenizer", "mine")
    assert Corpus(tmp_path / "out").tokenizer.special["<|endoftext|>"] == 1500 and Corpus(tmp_path / "out").tokenizer.special["<|im_start|>"] == 1501
    for variable in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    started = time.time()
    error = run("build_corpus.py", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--tokenizer", "cl100k_base", ok=False).stderr
    assert time.time() - started < 20 and "9b5ad71b2ce5302211f9c61530b329a4922fc6a4" in error and "TIKTOKEN_CACHE_DIR" in error


# ---- chat format


CHAT = [chat_message("system", "Be brief."), chat_message("user", "Roll <|im_end|> it."),
        chat_message("assistant", "Yes.", [("a.b", {"x": 1}), ("c", {})]), chat_message("tool", "ok"), chat_message("assistant", "Done <tool_call>")]
TOOLS = [{"type": "function", "function": {"name": "a.b", "description": "é", "parameters": {"type": "object", "properties": {}}}}]


def test_render_as_written_by_hand(small):
    tokenizer = Tokenizer.load(small)
    ids, mask = tokenizer.render(CHAT, TOOLS)
    assert tokenizer.decode(ids) == (
        '<|im_start|>system\nBe brief.\n<tools>\n{"description": "é", "name": "a.b", "parameters": {"type": "object", "properties": {}}}\n'
        "</tools><|im_end|>\n<|im_start|>user\nRoll <|im_end|> it.<|im_end|>\n<|im_start|>assistant\nYes.\n<tool_call>\n"
        '{"name": "a.b", "arguments": {"x": 1}}\n</tool_call>\n<tool_call>\n{"name": "c", "arguments": {}}\n</tool_call><|im_end|>\n'
        "<|im_start|>tool\n<tool_response>\nok\n</tool_response><|im_end|>\n<|im_start|>assistant\nDone <tool_call><|im_end|>\n")
    learned = tokenizer.decode([i for i, m in zip(ids, mask) if m])
    assert learned == ('Yes.\n<tool_call>\n{"name": "a.b", "arguments": {"x": 1}}\n</tool_call>\n<tool_call>\n{"name": "c", "arguments": {}}\n'
                       "</tool_call><|im_end|>Done <tool_call><|im_end|>")
    assert ids.count(tokenizer.im_end) == 5 and ids.count(tokenizer.special["<tool_call>"]) == 2  # those in text are text
    start, _ = tokenizer.render(CHAT[:2], TOOLS, answer=True)
    assert ids[:len(start)] == start


def test_chat_template_writes_what_render_writes(small):
    from transformers import AutoTokenizer
    theirs, ours = AutoTokenizer.from_pretrained(str(small)), Tokenizer.load(small)
    for messages, tools in [(CHAT, TOOLS), (CHAT[1:], TOOLS), (CHAT, None), (CHAT[1:2], TOOLS)]:
        for answer in (False, True):
            text = theirs.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=answer)
            assert text == ours.decode(ours.render(messages, tools, answer)[0])


# ---- split


def test_no_held_out_name_in_a_train_bin(corpus):
    """Of the default corpus, decoded: not in documentation, trajectories or conversations."""
    built = Corpus(corpus)
    heldout = json.loads((corpus / "heldout_apis.json").read_text())
    assert len(heldout) > 500
    for domain in ("api_doc", "trajectory", "instruction"):
        text = built.tokenizer.decode(built.read(domain, "train"))
        words = "\n".join(set(re.findall(r"[\w.]+", text)))  # a name is part of one of these, if it occurs
        assert len(text) > 1e6 and [name for name in heldout if name in words] == []
        assert len(built.documents(domain, "heldout")) > 200


def test_same_side_whatever_else_is_there(small, corpus):
    side = {a: build_corpus.in_fold(a, 0.08, 1) for a in json.loads((small / "heldout_apis.json").read_text()) if a.startswith("mpmath.")}
    default = set(json.loads((corpus / "heldout_apis.json").read_text()))
    assert len(side) > 20 and any(side.values()) and all((a in default) == held for a, held in side.items())


def test_folds_share_out_all_names():
    names = [f"pkg.f{i}" for i in range(2000)]
    folds = [{n for n in names if build_corpus.in_fold(n, 0.1, fold)} for fold in range(10)]
    assert set.union(*folds) == set(names) and sum(map(len, folds)) == len(names) and min(map(len, folds)) > 150
    assert folds[3] == {n for n in names if build_corpus.in_fold(n, 0.1, 13)}


def test_another_fold_holds_out_other_apis(small, small_raw, tmp_path):
    run("build_corpus.py", "--raw", small_raw, "--out", tmp_path, "--heldout", 0.1, "--fold", 1)
    first, second = (set(json.loads((d / "heldout_apis.json").read_text())) for d in (tmp_path, small))
    assert len(first) > 20 and len(second) > 20 and not first & second


def test_mentions():
    mentions = build_corpus.mention_finder(["a.b", "numpy.add", "x.y.z"])
    for text in ("numpy.add", "(numpy.add)", "xnumpy.add.reduce", "see `a.b`.", "a.bc", 'e\nx.y.z'):
        assert mentions(text), text
    for text in ("", "numpy.ad", "a. b", "x.y", "numpy add", "y.z"):
        assert not mentions(text), text
    assert not build_corpus.mention_finder([])("a.b")
    assert build_corpus.mention_finder(["github.create-issue"])("call github.create-issue now")
    started = time.time()
    assert not mentions("a" * 300_000) and time.time() - started < 2


def test_records_of_another_form_are_named(tmp_path):
    chat = lambda **message: record("c", "instruction", None, messages=[{"role": "user", "content": "Hello"}, message])
    call = lambda arguments: {"type": "function", "function": {"name": "f", "arguments": arguments}}
    ill = [chat(role="user", content=[{"type": "text", "text": "a part"}]), chat(content="of no role"),
           chat(role="assistant", content="", tool_calls=[call({"a": True})]), chat(role="assistant", content="", tool_calls=[call("[1]")]),
           record("t", "instruction", None, messages=[], tools=[{"name": "flat"}]), record("a", "api_doc", apis=[1])]
    write_raw(tmp_path / "raw", [*ill, *(record(f"t{i}", text=f"The text number {i}, of a length that a document should have.") for i in range(3))])
    done = run("build_corpus.py", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--vocab-size", 300)
    assert [line.split(":")[1] for line in done.stderr.splitlines() if "left out" in line] == list("123456")
    (tmp_path / "out" / "text.train.bin").unlink()
    assert "is up to date" not in run("build_corpus.py", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--vocab-size", 300).stdout
    assert "is up to date" in run("build_corpus.py", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--vocab-size", 300).stdout


def test_many_bad_lines_take_no_longer_each(tmp_path):
    write_raw(tmp_path / "raw", [record("a")])
    with open(tmp_path / "raw" / "records.jsonl", "a") as file:
        file.write("x" * 60 + "\n" + ("-eyJ" * 20 + "\n") * 30_000)
    rejected, started = [], time.time()
    shard = tmp_path / "raw" / "records.jsonl"
    [piece] = build_corpus.find_pieces({shard: ""}, False)
    assert len(list(build_corpus.read_records(piece, rejected))) == 1 and rejected[-1]["id"] == "records.jsonl:30002"
    build_corpus.scrub("-eyJ" * 40_000, Counter())
    assert time.time() - started < 8


def test_a_tool_with_a_short_name_is_known_by_its_qualified_one():
    divide = build_corpus.Split(["pkg.m.Held"], 0, {})
    split = lambda *apis: divide(0, Record("a", "instruction", "test", "MIT", list(apis), messages=[chat_message("user", "m.Held")], tools=[]), "instruction")
    assert split("pkg.m.f", "pkg.m.g") == "train" and split("pkg.m.f", "pkg.m.Held") == "heldout" and split("pkg.m.f", "pkg.m.Held.method") is None


# ---- bins


def test_bins_decode_to_the_kept_records(small, small_raw):
    """Each document is a cleaned record's text, or its conversation, to the last character; nothing is there twice, and what is missing is counted."""
    built = Corpus(small)
    records = [Record.from_json(line) for shard in small_raw.glob("*.jsonl") for line in shard.open(encoding="utf-8")]
    cleaned = {d: Counter() for d in build_corpus.DOMAINS}
    for r in records:
        r = build_corpus.clean(r, Counter())
        cleaned[r.domain][r.text if r.text is not None else built.tokenizer.decode(built.tokenizer.render(r.messages, r.tools)[0])] += 1
    total = 0
    for domain in build_corpus.DOMAINS:
        for split in build_corpus.SPLITS:
            documents = built.documents(domain, split)
            total += len(documents)
            assert sum(map(len, documents)) == len(built.read(domain, split)) == built.manifest["files"][f"{domain}.{split}.bin"]["tokens"] > 0
            for ids in documents:
                assert ids[-1] == built.tokenizer.end_of_text and (ids[:-1] != built.tokenizer.end_of_text).all()
                cleaned[domain].subtract([built.tokenizer.decode(ids[:-1])])
    assert min(n for counts in cleaned.values() for n in counts.values()) == 0
    assert total == len(records) - sum(built.manifest["dropped"].values())
    mask, ids = built.read("instruction", "train", "mask"), built.read("instruction", "train")
    assert len(mask) == len(ids) and set(np.unique(mask)) == {0, 1}
    documents, starts = built.documents("instruction", "train"), built.read("instruction", "train", "idx").astype(int)
    for ids, start in list(zip(documents, starts))[::50]:
        turn = re.search(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", built.tokenizer.decode(ids), re.S)[1]
        assert built.tokenizer.decode(ids[mask[start:start + len(ids)] == 1]).startswith(turn)


SMALL = ("--vocab-size", 1024, "--heldout", 0.1, "--fold", 0)


def assert_same_corpus(first, second):
    for path in first.iterdir():
        if path.suffix in (".bin", ".idx", ".mask", ".tiktoken") or path.name in ("heldout_apis.json", "heldout.jsonl", "rejected.jsonl"):
            assert path.read_bytes() == (second / path.name).read_bytes(), path.name


@pytest.mark.parametrize("workers, ranks", [(1, 1), (5, 1), (1, 2)])
def test_same_bins_for_any_number_of_workers_and_ranks_and_any_order(small, small_raw, tmp_path, workers, ranks):
    raw = tmp_path / "raw"
    lines = [line for shard in small_raw.glob("*.jsonl") for line in shard.open(encoding="utf-8")]
    random.Random(workers).shuffle(lines)
    raw.mkdir()
    for part in range(3):
        (raw / f"{part}.jsonl").write_text("".join(lines[part::3]), encoding="utf-8")
    command = [sys.executable, str(ROOT / "build_corpus.py"), "--raw", raw, "--out", tmp_path / "out", *SMALL, "--workers", workers]
    processes = [subprocess.Popen([*map(str, command)], env=os.environ | {"RANK": str(rank), "WORLD_SIZE": str(ranks)}) for rank in range(ranks)]
    assert [process.wait(timeout=120) for process in processes] == [0] * ranks
    assert_same_corpus(small, tmp_path / "out")


def test_killed_at_any_moment_it_goes_on(small, small_raw, tmp_path):
    command = [sys.executable, str(ROOT / "build_corpus.py"), "--raw", small_raw, "--out", tmp_path / "out", *SMALL, "--workers", 1]
    rng, killed = random.Random(0), 0
    while killed < 10:
        process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, start_new_session=True)
        time.sleep(rng.uniform(0.3, 2))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        else:  # it came to its end: from the beginning again
            shutil.rmtree(tmp_path / "out")
    run(*command[1:])
    assert_same_corpus(small, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_only_what_changed_is_done_again(small_raw, tmp_path):
    """A new shard is worked on, the others are not; another size of the vocabulary leaves what was cleaned and compared."""
    raw, out = tmp_path / "raw", tmp_path / "out"
    shutil.copytree(small_raw, raw)

    def build(*options):
        before = {p.name: p.stat().st_mtime_ns for p in (out / "work").glob("*")} if out.exists() else {}
        run("build_corpus.py", "--raw", raw, "--out", out, *options)
        after = {p.name: p.stat().st_mtime_ns for p in (out / "work").glob("*")}
        made = {name for name in after if name not in before or before[name] != after[name]}
        return {kind: sum(name.endswith(kind) for name in made) for kind in (".jsonl", ".pairs.npy", ".tiktoken", ".tokens.npy")}, after

    first, files = build("--vocab-size", 512)
    shards = len(list(raw.glob("*.jsonl")))
    assert first == {".jsonl": shards, ".pairs.npy": 1, ".tiktoken": 1, ".tokens.npy": shards}
    assert build("--vocab-size", 600)[0] == {".jsonl": 0, ".pairs.npy": 0, ".tiktoken": 1, ".tokens.npy": shards}
    assert build("--vocab-size", 600, "--near-duplicates", 0)[0] | {".tokens.npy": 0} == {".jsonl": 0, ".pairs.npy": 1, ".tiktoken": 1, ".tokens.npy": 0}
    write_raw(raw, [record("new", text="A text that was not there before, and is long enough to stay.")])
    made, after = build("--vocab-size", 600, "--near-duplicates", 0)
    assert made[".jsonl"] == 1 and len(after) < 2 * len(files)  # what no corpus needs any more is gone
    assert "up to date" in run("build_corpus.py", "--raw", raw, "--out", out, "--vocab-size", 600, "--near-duplicates", 0).stdout


def test_a_conversation_that_has_a_text_too_counts_as_one(tmp_path):
    turns = [{"role": "user", "content": "Which way?"}, {"role": "assistant", "content": "That way."}]
    write_raw(tmp_path / "raw", [record("both", "instruction", messages=turns)])
    run("build_corpus.py", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--vocab-size", 300)
    corpus = Corpus(tmp_path / "out")
    for split in ("train", "heldout"):
        assert len(corpus.read("instruction", split, "mask")) == len(corpus.read("instruction", split))
        assert not corpus.read("instruction", split, "mask").any()


def test_of_millions_of_rejected_documents_few_are_held(tmp_path):
    documents = build_corpus.Documents([], tmp_path)
    for i in range(250_000):
        documents.reject({"reason": "rare" if i % 25_000 == 0 else "common", "id": str(i)})
    assert documents.reasons == {"rare": 10, "common": 249_990} and len(documents.examples) <= 100_000
    lowest = sorted((str(i) for i in range(250_000) if i % 25_000), key=build_corpus.unit_hash)[:build_corpus.MAX_REJECTED]
    sample = build_corpus.sample_of(documents.examples)
    assert [e["id"] for e in sample if e["reason"] == "common"] == lowest and len(sample) == len(lowest) + 10


def test_duplicates_and_bad_lines_are_counted(tmp_path):
    same = "The same text, of a length that a document should have."
    write_raw(tmp_path / "raw", [record("b", text=same.upper()), record("a", text=same), record("c", text="Another text, which says what the first one does not.")])
    with open(tmp_path / "raw" / "records.jsonl", "a") as file:
        file.write("{not json\n")
    done = run("build_corpus.py", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--vocab-size", 267)
    assert "records.jsonl:4: left out" in done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["dropped"] == {"not a record": 1, "duplicate": 1}
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").open()]
    assert {"reason": "duplicate", "id": "b", "of": "a"} in rejected


# ---- near duplicates


def words_jaccard(a, b):
    """By the definition, on Python's strings: runs of five words, the last ones shorter."""
    def runs(text):
        words = re.findall(r"[a-z0-9\x80-\xff]+", text.lower().encode().decode("latin-1"))
        return {tuple(words[i:i + build_corpus.SHINGLE]) for i in range(max(1, len(words)))}
    a, b = runs(a), runs(b)
    return len(a & b) / len(a | b)


def edited(text, rng, share):
    """The text with a share of its words replaced, in one place, as copies on the web differ."""
    words = text.split(" ")
    at, length = rng.randrange(len(words)), max(1, int(share * len(words)))
    return " ".join(words[:at] + [f"w{rng.randrange(10**6)}" for _ in words[at:at + length]] + words[at + length:])


def through_files(directory, texts, threshold=0.8, workers=1, name=lambda i, text: f"{i:06}"):
    """The documents that hold the texts as the script works on them, duplicates dropped; their positions as ids or those
    that `name` gives."""
    directory.mkdir(exist_ok=True)
    write_raw(directory / "raw", [record(name(i, text), "api_doc", text) for i, text in enumerate(texts)])
    args = argparse.Namespace(workers=workers, near_duplicates=threshold)
    shard = directory / "raw" / "records.jsonl"
    pieces = build_corpus.find_pieces({shard: build_corpus.sha256(shard)}, False)
    (directory / "work").mkdir()
    documents = build_corpus.clean_all(pieces, directory / "work", workers)
    build_corpus.drop_duplicates(documents, args)
    return documents


@pytest.fixture(scope="module")
def real_texts(raw):
    """20,000 real documents, many of them alike in something, edited copies of a part of them among them."""
    rng, texts = random.Random(0), []
    for shard in sorted(raw.glob("*.jsonl")):
        texts += [r["text"][:600] for r in map(json.loads, shard.open(encoding="utf-8")) if r["domain"] in ("api_doc", "text")]
    texts = rng.sample(texts, 18_000)
    texts += [edited(t, rng, share) for t in rng.sample(texts, 1000) for share in (0.01, 0.08)]
    return rng.sample(texts, len(texts))


@pytest.fixture(scope="module")
def real(real_texts, tmp_path_factory):
    return through_files(tmp_path_factory.mktemp("real"), real_texts, workers=2)


def test_shingles_are_the_same_alone_and_together(real_texts):
    texts = [*real_texts[:100], "", "...", "one", "One!", "ü ö", "Ü Ö."]
    hashes, starts = build_corpus.shingle_hashes(texts)
    for text, a, b in zip(texts, starts, starts[1:]):
        assert np.array_equal(build_corpus.shingle_hashes([text])[0], hashes[a:b])
    sets = [set(hashes[a:b].tolist()) for a, b in zip(starts, starts[1:])]
    for i, j in ((i, j) for i in range(len(texts)) for j in range(i)):
        if max(len(texts[i]), len(texts[j])) < 400 or not (i + j) % 7:
            assert len(sets[i] & sets[j]) / len(sets[i] | sets[j]) == words_jaccard(texts[i], texts[j])


def test_minhash_estimates_jaccard():
    words = [f"w{i}" for i in range(2000)]
    for shared in (0, 500, 1000, 1500, 1900, 2000):
        a, b = " ".join(words), " ".join(words[:shared] + [f"v{i}" for i in range(2000 - shared)])
        signatures, exact = build_corpus.minhash(*build_corpus.shingle_hashes([a, b])), words_jaccard(a, b)
        assert abs((signatures[0] == signatures[1]).mean() - exact) <= 4 * (exact * (1 - exact) / signatures.shape[1]) ** 0.5


def similar_pairs(texts, threshold):
    """All pairs of at least this Jaccard similarity, without hashing bands: sets ordered by rarity can only be so alike if they
    share one of their first elements (prefix filtering, Chaudhuri et al. 2006), and then are compared in full."""
    hashes, starts = build_corpus.shingle_hashes(texts)
    _, codes, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    sets = [set(codes[a:b].tolist()) for a, b in zip(starts, starts[1:])]
    having, pairs = defaultdict(list), set()
    for i, members in enumerate(sets):
        rare = sorted(members, key=lambda c: (counts[c], c))[:len(members) - math.ceil(threshold * len(members)) + 1]
        for j in {j for c in rare for j in having[c]}:
            if len(members & sets[j]) >= threshold * len(members | sets[j]):
                pairs.add((j, i))
        for c in rare:
            having[c].append(i)
    return pairs


def test_near_duplicates_against_brute_force(real):
    """Of the pairs of similarity 0.8 and more 95% lose a member, no text is dropped for one less similar, and a copy is always kept."""
    documents = real
    assert len(documents) > 19_500
    texts = [documents[i].text for i in range(len(documents))]
    duplicates = {dropped["id"] for dropped in documents.examples if dropped["reason"] == "duplicate"}
    for j in np.flatnonzero(~documents.kept):
        i = documents.copy_of[j]
        assert words_jaccard(texts[i], texts[j]) >= 0.8
        assert documents.name(j) in duplicates or documents.kept[i] and (-len(texts[i]), documents[i].id) < (-len(texts[j]), documents[j].id)
    pairs = similar_pairs(texts, 0.8)
    found = sum(not (documents.kept[i] and documents.kept[j]) for i, j in pairs)
    assert len(pairs) > 1500 and found >= 0.95 * len(pairs)


def test_near_duplicates_do_not_depend_on_order_pieces_or_workers(real_texts, tmp_path, monkeypatch):
    def kept(name, texts, **options):
        by_text = lambda i, text: hashlib.sha256(text.encode()).hexdigest()  # of two of one length the id decides
        documents = through_files(tmp_path / name, texts, name=by_text, **options)
        return {documents[i].text for i in np.flatnonzero(documents.kept)}, len(documents.pieces)
    texts = real_texts[:3000]
    first, _ = kept("a", texts)
    monkeypatch.setattr(build_corpus, "PIECE", 100_000)
    second, pieces = kept("b", random.Random(1).sample(texts, len(texts)), workers=2)
    assert pieces > 5 and first == second and len(first) < len(texts)


def test_the_split_is_closed_under_near_duplication(tmp_path):
    """A document is held out if a copy that was dropped for it documents a held-out API."""
    body = " ".join(f"word{i}" for i in range(100))
    names = [f"pkg.f{i}" for i in range(100)]
    heldout = next(n for n in names if build_corpus.in_fold(n, 0.1, 0))
    open_ = next(n for n in names if not build_corpus.in_fold(n, 0.1, 0))
    write_raw(tmp_path / "raw", [record("short", "api_doc", body, [heldout]), record("long", "api_doc", body + " end", [open_]),
                                 record("other", "api_doc", "something else, about which nothing else is said", [open_])])
    for flag, documents in ((0.8, (1, 1)), (0, (2, 1))):
        run("build_corpus.py", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--vocab-size", 300, "--heldout", 0.1, "--fold", 0, "--near-duplicates", flag)
        files = Corpus(tmp_path / "out").manifest["files"]
        assert (files["api_doc.train.bin"]["documents"], files["api_doc.heldout.bin"]["documents"]) == documents


def test_a_held_out_api_reaches_all_that_resembles_its_document(tmp_path):
    """The middle one is dropped for the long one and resembles the short one too, which the long one does not."""
    words = [f"word{i}" for i in range(400)]
    names = [f"pkg.f{i}" for i in range(100)]
    heldout = next(n for n in names if build_corpus.in_fold(n, 0.1, 0))
    texts = {name: " ".join(words[:n]) for name, n in (("long", 400), ("middle", 350), ("short", 305))}
    assert words_jaccard(texts["long"], texts["middle"]) > 0.8 < words_jaccard(texts["middle"], texts["short"])
    assert words_jaccard(texts["long"], texts["short"]) < 0.75
    write_raw(tmp_path / "raw", [record("long", "api_doc", texts["long"]), record("middle", "api_doc", texts["middle"], [heldout]),
                                 record("short", "api_doc", texts["short"]),
                                 record("other", "api_doc", "something else, about which nothing else is said")])
    run("build_corpus.py", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--vocab-size", 300, "--heldout", 0.1, "--fold", 0)
    files = Corpus(tmp_path / "out").manifest["files"]
    assert (files["api_doc.train.bin"]["documents"], files["api_doc.heldout.bin"]["documents"]) == (1, 2)


def test_near_duplicates_are_dropped_and_counted(tmp_path):
    text = " ".join(f"word{i}" for i in range(100)) + " "
    records = [record(f"t{i}", text=text + f"Number {i} of those.") for i in range(30)] + [record("other", text="Words of another kind, and as many of them as a document has.")]
    write_raw(tmp_path / "raw", records)
    kept = {}
    for flag in (0, 0.8):
        done = run("build_corpus.py", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--vocab-size", 300, "--near-duplicates", flag)
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        kept[flag] = sum(manifest["files"][f"text.{split}.bin"]["documents"] for split in ("train", "heldout"))
    assert kept == {0: 31, 0.8: 2} and manifest["dropped"]["near duplicate"] == 29 and "29: near duplicate" in done.stdout


# ---- cleaning


@pytest.mark.parametrize("text, after", [
    ("cafe\u0301 \u1e9b\u0323", "café ẛ̣"), ("a\x00b\x1b[0mc\u200bd\ufeffe\u00adf\u202eg", "ab[0mcdefg"), ("می\u200cخواهم 👩\u200d💻", "می\u200cخواهم 👩\u200d💻"),
    ("line\r\nnext\ttab\n", "line\nnext\ttab\n"), ("cafÃ© â€œquotedâ€\x9d itâ€™s Â© ðŸ™‚", "café “quoted” it’s © 🙂"), ("NÃO ÂNGULO DÂ’ALI", "NÃO ÂNGULO DÂ’ALI"),
    ("lone \ud800 half", "lone \ufffd half"), ("mail john.doe+x@mail.host.org now", "mail <EMAIL> now"), ("user@example.com a@b c@localhost @decorator", None),
    ("key AKIAABCDEFGHIJKLMNOP, not AKIAIOSFODNN7EXAMPLE", "key <AWS_KEY>, not AKIAIOSFODNN7EXAMPLE"), ("ghp_" + "a1B2" * 9, "<GITHUB_TOKEN>"),
    ("AIza" + "x" * 35, "<GOOGLE_KEY>"), ("xoxb-1234567890-abcdefghijkl", "<SLACK_TOKEN>"), ("sk-" + "a1" * 20, "<API_KEY>"), ("task-force sk-learn disk_live", None),
    ("hf_" + "aB3" * 11, "<HF_TOKEN>"), ("eyJ" + "a" * 20 + ".eyJ" + "b" * 20 + "." + "c" * 30, "<JWT>"), ("postgres://me:hunter22@db.host/x", "postgres://<PASSWORD>@db.host/x"),
    ("-----BEGIN RSA PRIVATE KEY-----\n" + "MIIE" * 40 + "\n-----END RSA PRIVATE KEY-----", "<PRIVATE_KEY>"), ("https://host:80/a@b", None)])
def test_scrub(text, after):
    counts = Counter()
    assert build_corpus.scrub(text, counts) == (text if after is None else after)
    assert counts == Counter(re.findall("<([A-Z_]+)>", after or ""))


def test_secrets_are_masked_in_conversations_and_their_arguments_stay_json(tmp_path):
    given = {"to": "jane@corp.org", "lines": ["a\njoe@corp.org", 1, None], "é": "ü"}
    r = Record("c", "instruction", "t", "MIT", [], messages=[chat_message("user", "Write to jane@corp.org"), chat_message("assistant", calls=[("send", given)])], tools=[])
    before = r.to_json()
    counts = Counter()
    build_corpus.clean(r, counts)
    assert json.loads(r.messages[1]["tool_calls"][0]["function"]["arguments"]) == {"to": "<EMAIL>", "lines": ["a\n<EMAIL>", 1, None], "é": "ü"}
    assert r.messages[0]["content"] == "Write to <EMAIL>" and counts == {"EMAIL": 3}
    untouched = Record.from_json(before.replace("@corp", " corp"))
    assert build_corpus.clean(Record.from_json(untouched.to_json()), counts) == untouched


WORDS = [f"word{i}" for i in range(400)]


@pytest.mark.parametrize("domain, text, reason", [
    ("text", "Too short.", "characters"), ("text", " ".join(WORDS), None), ("code", "x = 1", "characters"), ("text", "one line of a menu, as they are\n" * 9, "repeated lines"),
    ("code", "    value = function(other, value)\n" * 9 + "\n".join(WORDS), None), ("text", "buy this now at once " * 30, "repeated runs"), ("text", "+-" * 100 + " ".join(WORDS[:20]), "symbols"),
    ("code", "x=1;" * 2000 + "\n" + " ".join(WORDS), "repeated runs"), ("code", ";".join(f"v{i}=f(v{i + 1})" for i in range(2000)), "line length"), ("text", "\n".join(["— — —", *WORDS]), None)])
def test_limits(domain, text, reason):
    measured = build_corpus.measure(text, build_corpus.shingle_hashes([text])[0])
    assert set(measured) == set(build_corpus.LIMITS)
    assert build_corpus.outside_limits(record("x", domain, text), measured) == reason


def test_boilerplate_goes_from_prose_alone():
    text = "Skip to main content\nThe tutorial begins.\n© 2024 Some Company, Inc. All rights reserved.\nIt uses cookies to bake.\nWe use cookies to improve your visit\nback to top"
    counts = Counter()
    assert build_corpus.clean(record("x", "text", text), counts).text == "The tutorial begins.\nIt uses cookies to bake.\n" and counts == {"lines of boilerplate": 4}
    assert build_corpus.clean(record("x", "code", text), counts).text == text


# ---- decontamination

QUESTION = "Find the area of a triangle with a base of 10 units and a height of 5 units, please, and show the steps."
BENCHMARK = [{"id": "a", "question": [[{"role": "user", "content": QUESTION}]]},
             {"id": "b", "ground_truth": [{"area": {"base": [10], "unit": ["cm", ""], "style": [["bold"]]}}]},
             {"id": "c", "ground_truth": ["cd(folder='docs')", "pwd()"], "counted": "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15"}]


def conversation(name, *calls):
    return Record(name, "instruction", "test", "MIT", [c[0] for c in calls], messages=[
        chat_message("user", f"Do {name}."), chat_message("assistant", calls=calls)], tools=[])


@pytest.mark.parametrize("name, text, file", [
    ("exact", f"An aside. {QUESTION} And more.", "t.json"), ("other marks", QUESTION.upper().replace(" ", "\n- "), "t.json"),
    ("twelve words", " ".join(QUESTION.split()[:12]), None), ("two words changed", QUESTION.replace("triangle", "square").replace("height", "side"), None),
    ("counting", "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15", None), ("nothing", "", None)])
def test_shared_words(tmp_path, name, text, file):
    (tmp_path / "t.json").write_text("".join(json.dumps(item) + "\n" for item in BENCHMARK))
    found = build_corpus.Benchmarks([tmp_path / "t.json"]).match(text, None)
    assert (found and found[1]) == file and (not found or len(found[0].split()) == 13)


@pytest.mark.parametrize("call, shared", [
    (("area", {"base": 10, "style": ["bold"]}), True), (("area", {"unit": "cm", "style": ["bold"], "base": 10}), True),
    (("area", {"base": 11, "style": ["bold"]}), False), (("area", {"base": 10}), False), (("area", {"base": 10, "style": ["bold"], "more": 1}), False),
    (("volume", {"base": 10, "style": ["bold"]}), False), (("cd", {"folder": "docs"}), True), (("pwd", {}), False)])
def test_shared_calls(tmp_path, call, shared):
    (tmp_path / "t.json").write_text("".join(json.dumps(item) + "\n" for item in BENCHMARK))
    record = conversation("r", ("other", {"x": 1}), call)
    assert bool(build_corpus.Benchmarks([tmp_path / "t.json"]).match("", record.messages)) == shared


def test_contaminated_documents_are_dropped_and_reported(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "t.json").write_text("".join(json.dumps(item) + "\n" for item in BENCHMARK))
    write_raw(tmp_path / "raw", [record("clean"), record("dirty", text=QUESTION), conversation("call", ("cd", {"folder": "docs"})), conversation("fine", ("cd", {"folder": "x"}))])
    options = "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--vocab-size", 300
    run("build_corpus.py", *options, "--benchmarks", tmp_path / "tests")
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").open()]
    assert {r["id"]: (r["match"][:13], r["file"]) for r in rejected} == {"dirty": ("find the area", "t.json"), "call": ('cd({"folder":', "a call")}
    assert "up to date" not in run("build_corpus.py", *options).stdout


# ---- retrieval


@pytest.fixture(scope="module")
def seed_and_pool(raw, tmp_path_factory):
    """Directories of records: documentation and tool use; and code without its docstrings and comments, among it documentation of another
    package, which should be found."""
    seed, code, documentation = [], [], []
    for shard in sorted(raw.glob("*.jsonl")):
        for r in map(Record.from_json, shard.open(encoding="utf-8")):
            if r.domain == "code":
                code.append(r)
            elif "networkx" not in shard.name and r.domain in ("api_doc", "trajectory", "instruction"):
                seed.append(r)
            elif r.domain == "api_doc" and not r.id.startswith("api_doc:index"):
                documentation.append(record("planted:" + r.id, "text", r.text.split("\n\n{")[0]))
    rng, pool = random.Random(0), []
    for r in rng.sample(code, 400):
        try:
            tree = ast.parse(r.text)
        except SyntaxError:
            continue
        for node in ast.walk(tree):
            if isinstance(getattr(node, "body", None), list):
                node.body = [n for n in node.body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))] or [ast.Pass()]
        text = ast.unparse(tree)
        pool += [record(f"{r.id}:{at}", "code", text[at:at + 1500]) for at in range(0, min(len(text), 15_000), 1500)]
    directories = [tmp_path_factory.mktemp(name) for name in ("seed", "pool")]
    write_raw(directories[0], rng.sample(seed, 5000))
    write_raw(directories[1], rng.sample(pool, 1400) + rng.sample(documentation, 200))
    return directories


@pytest.fixture(scope="module")
def retrieved(seed_and_pool, tmp_path_factory):
    seed, pool = seed_and_pool
    out = tmp_path_factory.mktemp("retrieved")
    return out, run("build_corpus.py", "--raw", seed, "--pool", pool, "--out", out, *SMALL, "--retrieve", 0.1).stdout


def test_what_is_like_the_seed_is_found(retrieved, seed_and_pool):
    (out, printed), (_, pool) = retrieved, seed_and_pool
    built = Corpus(out)
    records = [json.loads(line) for line in (pool / "records.jsonl").open(encoding="utf-8")]
    planted = sum(r["id"].startswith("planted") for r in records) / len(records)
    figures = built.manifest["retrieval"]
    taken = [built.tokenizer.decode(d[:-1]) for d in built.documents("retrieved", "train")]
    by_text = {build_corpus.clean(Record(**r), Counter()).text: r["id"] for r in records}
    found = sum(by_text[t].startswith("planted") for t in taken) / len(taken)
    assert 0.05 < planted < 0.3 and found > 3 * planted
    assert figures["f1"] > 0.85 and figures["precision"] > 0.85 and figures["recall"] > 0.8 and figures["calibration_error"] < 0.1
    assert "precision 0." in printed and "F1 0." in printed
    scores = built.read("retrieved", "train", "score")
    assert len(scores) == len(taken) and scores.min() >= figures["least"] - 1e-6 and abs(figures["taken"] - 0.1 * figures["pool"]) < 1
    assert built.manifest["stages"]["wide"] == [*built.manifest["stages"]["seed"], "retrieved.train.bin"]
    heldout = json.loads((out / "heldout_apis.json").read_text())
    assert not [name for name in heldout if any(name in t for t in taken)]


def test_a_threshold_decides_in_place_of_a_share(retrieved, seed_and_pool, tmp_path):
    seed, pool = seed_and_pool
    shutil.copytree(retrieved[0], tmp_path / "out")
    run("build_corpus.py", "--raw", seed, "--pool", pool, "--out", tmp_path / "out", *SMALL, "--retrieve-above", 0.9)
    manifest = Corpus(tmp_path / "out").manifest
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").open(encoding="utf-8")]
    assert manifest["retrieval"]["least"] >= 0.9
    assert all(r["probability"] < 0.9 for r in rejected if r["reason"] == "not of the seed's kind")
    assert manifest["dropped"]["not of the seed's kind"] == manifest["retrieval"]["pool"] - manifest["retrieval"]["taken"]
    assert "retrieved 0 of" in run("build_corpus.py", "--raw", seed, "--pool", pool, "--out", tmp_path / "out", *SMALL, "--retrieve-above", 1).stdout


def test_an_encoder_in_place_of_the_classifier(small_raw, small, seed_and_pool, tmp_path):
    import torch
    import model
    torch.manual_seed(0)
    tokenizer = Tokenizer.load(small)
    model.save(model.Transformer(model.Config(vocab_size=tokenizer.vocab_size, dim=64, n_layers=1, n_heads=1, n_kv_heads=1, hidden_dim=64)), tmp_path / "encoder")
    tokenizer.save(tmp_path / "encoder")
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "part.jsonl").write_text("".join((seed_and_pool[1] / "records.jsonl").open(encoding="utf-8").readlines()[:400]), encoding="utf-8")
    run("build_corpus.py", "--raw", small_raw, "--pool", tmp_path / "pool", "--out", tmp_path / "out", *SMALL, "--encoder", tmp_path / "encoder")
    figures = Corpus(tmp_path / "out").manifest["retrieval"]
    assert figures["f1"] > 0.7 and 30 <= figures["taken"] <= 40  # even random weights tell documentation from the rest by its words


def test_too_small_a_pool_is_named(small_raw, tmp_path):
    write_raw(tmp_path / "pool", [record("a")])
    assert "--pool" in run("build_corpus.py", "--raw", small_raw, "--pool", tmp_path / "pool", "--out", tmp_path / "out", ok=False).stderr


def test_show(retrieved):
    out, _ = retrieved
    printed = run("build_corpus.py", "--out", out, "--show", 7).stdout
    headers = [line for line in printed.splitlines() if line.startswith("--- ")]
    assert [h.split()[1].strip(",") for h in headers] == [
        *(f"{d}.train" for d in ("api_doc", "trajectory", "instruction", "retrieved")), *(f"{d}.heldout" for d in ("api_doc", "trajectory", "instruction"))]
    assert "learned" in headers[2] and "probability 0." in headers[3] and "symbols 0." in headers[0]
    body = printed.split(headers[2])[1].split(headers[3])[0]
    assert "<|im_start|>|" in body and "<tool_call>‖" in body and "<|im_end|>‖" in body


def test_tampered_corpus_is_refused(small, tmp_path):
    shutil.copytree(small, tmp_path / "corpus")
    with open(tmp_path / "corpus" / "code.train.bin", "r+b") as file:
        file.write(b"\x07")
    with pytest.raises(ValueError, match="code.train.bin"):
        Corpus(tmp_path / "corpus")
    for name in ("heldout.jsonl", "heldout_apis.json", "tokenizer.json", "tokenizer_config.json", "instruction.train.mask", "api_doc.heldout.idx"):
        whole = (small / name).read_bytes()
        for changed in (bytes([whole[0] ^ 1]) + whole[1:], whole[:-1]):  # a flipped bit, a lost byte
            shutil.copytree(small, tmp_path / "corpus", dirs_exist_ok=True)
            (tmp_path / "corpus" / name).write_bytes(changed)
            with pytest.raises(ValueError, match=name):
                Corpus(tmp_path / "corpus")
    (tmp_path / "corpus" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="build_corpus.py"):
        Corpus(tmp_path / "corpus")


def test_a_corpus_is_hashed_once_a_machine(small, tmp_path, monkeypatch):
    shutil.copytree(small, tmp_path / "corpus")
    hashed, sha256 = [], build_corpus.sha256
    monkeypatch.setattr(build_corpus, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    for expected in (True, False):
        Corpus(tmp_path / "corpus")
        assert ("code.train.bin" in hashed) == expected
        hashed.clear()
    path = tmp_path / "corpus" / "text.train.bin"
    path.write_bytes(path.read_bytes())  # written anew: hashed anew, and it alone
    Corpus(tmp_path / "corpus")
    assert hashed == ["manifest.json", "text.train.bin"]
    [notes] = (tmp_path / "corpus").glob(".checked-*")
    notes.write_text("[")
    Corpus(tmp_path / "corpus")
    (tmp_path / "corpus" / "code.train.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="code.train.bin"):
        Corpus(tmp_path / "corpus")


@pytest.mark.parametrize("arguments, named", [
    ((), "collect.py"), (("--heldout", 2), "--heldout"), (("--near-duplicates", 8), "--near-duplicates"), (("--retrieve", 2), "--retrieve"), (("--show", 1), "manifest.json"), (("--workers", 0), "--workers"), (("--pool", "/no/such"), "/no/such"),
    (("--tokenizer", "/no/such"), "/no/such"), (("--vocab-size", 9), "--vocab-size"),
    (("--benchmarks", "/no/such"), "--benchmarks")])
def test_bad_input_is_named(tmp_path, arguments, named):
    if arguments and arguments[0] in ("--pool", "--tokenizer"):
        write_raw(tmp_path, [record("a")])
    assert named in run("build_corpus.py", "--raw", tmp_path, "--out", tmp_path / "out", *arguments, ok=False).stderr
