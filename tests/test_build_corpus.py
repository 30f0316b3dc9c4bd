import itertools
import json
import random
import re
import shutil
from collections import Counter

import numpy as np
import pytest

import build_corpus
from build_corpus import SPECIAL_TOKENS, Corpus, Tokenizer, train_bpe
from collect import Record, chat_message
from conftest import run

TEXTS = ["", "a", "Hello, world! It's 12345.67\n\n\tdef f(x):\n        return x  \n", "naïve café 日本語 🙂 \u200b\u00a0 é", "<|im_end|><tool_call>",
         "{\"name\": \"numpy.roll\", \"arguments\": {\"shift\": -3}}", "  \r\n \n\n   x", "a" * 300, "\x00\x01\ufffd", "ǅ Ⅷ ٣ ½"]


@pytest.fixture(scope="module")
def small(small_raw, tmp_path_factory):
    path = tmp_path_factory.mktemp("small_corpus")
    run("build_corpus.py", "--raw", small_raw, "--out", path, "--vocab-size", 1024, "--heldout", 0.1, "--fold", 0)
    return path


def record(name, domain="text", text="some text here", apis=(), **more):
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


def test_python_pattern_splits_as_tiktoken_does():
    """The trainer's words are the encoder's: with every whole word in the vocabulary each word is one token."""
    import re
    splitter = re.compile(build_corpus.python_pattern(build_corpus.PATTERN))
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


def test_missing_tokens_take_reserved_places_first(base):
    theirs = json.loads((base / "tokenizer.json").read_text())
    before = {t["content"]: t["id"] for t in theirs["added_tokens"]}
    after = Tokenizer.load(base).special
    reserved = [i for t, i in before.items() if "reserved" in t]
    new = [after[t] for t in SPECIAL_TOKENS if t in after and t not in before]
    assert all(after[t] == i for t, i in before.items() if "reserved" not in t)
    first = max(*before.values(), *theirs["model"]["vocab"].values()) + 1
    assert new == [*reserved, *range(first, first + len(new) - len(reserved))]


@pytest.mark.parametrize("change", [
    {"model": {"type": "Unigram", "vocab": []}}, {"pre_tokenizer": {"type": "Metaspace"}}, {"normalizer": {"type": "Lowercase"}}, {"added_tokens": None},
    {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}}])
def test_other_tokenizers_are_refused(small, tmp_path, change):
    content = json.loads((small / "tokenizer.json").read_text()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit):
        Tokenizer.load(tmp_path)


# ---- chat format


CHAT = [chat_message("system", "Be brief."), chat_message("user", "Roll <|im_end|> it."),
        chat_message("assistant", "Yes.", [("a.b", {"x": 1}), ("c", {})]), chat_message("tool", "ok"), chat_message("assistant", "Done <tool_call>")]
TOOLS = [{"type": "function", "function": {"name": "a.b", "description": "é", "parameters": {"type": "object", "properties": {}}}}]


def test_render_as_written_by_hand(small):
    tokenizer = Tokenizer.load(small)
    ids, mask = tokenizer.render(CHAT, TOOLS)
    assert tokenizer.decode(ids) == (
        '<|im_start|>system\nBe brief.\n<tools>\n{"name": "a.b", "description": "é", "parameters": {"type": "object", "properties": {}}}\n'
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
        assert len(text) > 1e6 and [name for name in heldout if name in text] == []
        assert len(built.documents(domain, "heldout")) > 200


def test_same_side_whatever_else_is_there(small, corpus):
    side = {a: build_corpus.in_fold(a, 0.04, 1) for a in json.loads((small / "heldout_apis.json").read_text()) if a.startswith("mpmath.")}
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


# ---- bins


def test_bins_decode_to_the_kept_records(small, small_raw):
    built = Corpus(small)
    kept = {d: 0 for d in build_corpus.DOMAINS}
    texts = {" ".join(json.loads(line).get("text", "").split()) for shard in small_raw.glob("*.jsonl") for line in shard.open(encoding="utf-8")}
    for domain in build_corpus.DOMAINS:
        for split in build_corpus.SPLITS:
            documents = built.documents(domain, split)
            kept[domain] += len(documents)
            assert sum(map(len, documents)) == len(built.read(domain, split)) == built.manifest["files"][f"{domain}.{split}.bin"]["tokens"]
            for ids in documents:
                assert ids[-1] == built.tokenizer.end_of_text and (ids[:-1] != built.tokenizer.end_of_text).all()
                if domain in ("api_doc", "code", "text"):
                    assert " ".join(built.tokenizer.decode(ids[:-1]).split()) in texts
    assert min(kept.values()) > 0
    mask, ids = built.read("instruction", "train", "mask"), built.read("instruction", "train")
    assert len(mask) == len(ids) and set(np.unique(mask)) == {0, 1}


def test_same_bins_for_any_number_of_workers_and_any_order(small, small_raw, tmp_path):
    raw = tmp_path / "raw"
    lines = [line for shard in small_raw.glob("*.jsonl") for line in shard.open(encoding="utf-8")]
    random.Random(0).shuffle(lines)
    raw.mkdir()
    (raw / "all.jsonl").write_text("".join(lines), encoding="utf-8")
    run("build_corpus.py", "--raw", raw, "--out", tmp_path / "out", "--vocab-size", 1024, "--heldout", 0.1, "--fold", 0, "--workers", 1)
    for path in small.iterdir():
        if path.suffix in (".bin", ".idx", ".mask", ".tiktoken"):
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_duplicates_and_bad_lines_are_counted(tmp_path):
    write_raw(tmp_path / "raw", [record("b", text="Same  text"), record("a", text="same text"), record("c", text="other")])
    with open(tmp_path / "raw" / "records.jsonl", "a") as file:
        file.write("{not json\n")
    done = run("build_corpus.py", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--vocab-size", 265)
    assert "records.jsonl:4: left out" in done.stderr
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["dropped"] == {"not a record": 1, "duplicate": 1}
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").open()]
    assert {"reason": "duplicate", "id": "b"} in rejected


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


@pytest.fixture(scope="module")
def documents(raw):
    """Real documents, most of them alike in something, and edited copies of a part of them."""
    rng, texts = random.Random(0), []
    for shard in sorted(raw.glob("*.jsonl")):
        texts += [r["text"][:600] for r in map(json.loads, shard.open(encoding="utf-8")) if r["domain"] in ("api_doc", "text")][:600]
    copies = [edited(t, rng, share) for t in rng.sample(texts, 300) for share in (0.01, 0.08)]
    return texts + copies + ["", "...", "one", "One!", "ü ö", "Ü Ö."]


def test_shingles_are_the_same_alone_and_together(documents):
    texts = documents[::40] + documents[-6:]
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
        signatures, exact = build_corpus.minhash([a, b]), words_jaccard(a, b)
        assert abs((signatures[0] == signatures[1]).mean() - exact) <= 4 * (exact * (1 - exact) / signatures.shape[1]) ** 0.5


def test_near_duplicates_against_brute_force(documents):
    """Of the pairs of similarity 0.8 and more 95% lose a member, no text is dropped for one less similar, and a copy is always kept."""
    ids = [str(i) for i in range(len(documents))]
    dropped = build_corpus.near_duplicates(documents, ids, 0.8)
    for j, i in dropped.items():
        assert words_jaccard(documents[i], documents[j]) >= 0.8 and i not in dropped
        assert (-len(documents[i]), ids[i]) < (-len(documents[j]), ids[j])
    hashes, starts = build_corpus.shingle_hashes(documents)
    owner = np.repeat(np.arange(len(documents)), np.diff(starts))
    shared, sizes = Counter(), Counter()
    pairs = np.unique(np.stack([hashes, owner.astype(np.uint64)], 1), axis=0)
    for _, group in itertools.groupby(pairs.tolist(), lambda pair: pair[0]):
        members = [int(i) for _, i in group]
        sizes.update(members)
        shared.update(itertools.combinations(members, 2) if len(members) < 100 else ())  # boilerplate makes no pair similar
    similar = [(i, j) for (i, j), n in shared.items() if n / (sizes[i] + sizes[j] - n) >= 0.8]
    assert len(similar) > 300 and sum(i in dropped or j in dropped for i, j in similar) >= 0.95 * len(similar)


def test_near_duplicates_do_not_depend_on_order_or_workers(documents):
    def kept(texts, **options):
        dropped = build_corpus.near_duplicates(texts, texts, 0.8, **options)
        return {t for i, t in enumerate(texts) if i not in dropped}
    texts = sorted(set(documents))
    shuffled = random.Random(1).sample(texts, len(texts))
    assert kept(texts) == kept(shuffled) == kept(texts[::-1], workers=2) != set(texts)


def test_near_duplicates_are_dropped_and_counted(tmp_path):
    text = " ".join(f"word{i}" for i in range(100)) + " "
    records = [record(f"t{i}", text=text + f"Number {i}.") for i in range(30)] + [record("other", text="Words of another kind. " * 9)]
    write_raw(tmp_path / "raw", records)
    kept = {}
    for flag in (0, 0.8):
        done = run("build_corpus.py", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--vocab-size", 300, "--near-duplicates", flag)
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        kept[flag] = sum(manifest["files"][f"text.{split}.bin"]["documents"] for split in ("train", "heldout"))
    assert kept == {0: 31, 0.8: 2} and manifest["dropped"]["near duplicate"] == 29 and "29: near duplicate" in done.stdout


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


def test_finished_build_is_not_redone_and_a_changed_one_is(small_raw, tmp_path):
    raw = tmp_path / "raw"
    shutil.copytree(small_raw, raw)
    arguments = ("build_corpus.py", "--raw", raw, "--out", tmp_path / "out", "--vocab-size", 512)
    run(*arguments)
    assert "up to date" in run(*arguments).stdout
    write_raw(raw, [record("new", text="a text that was not there")])
    assert "up to date" not in run(*arguments).stdout


def test_tampered_corpus_is_refused(small, tmp_path):
    shutil.copytree(small, tmp_path / "corpus")
    with open(tmp_path / "corpus" / "code.train.bin", "r+b") as file:
        file.write(b"\x07")
    with pytest.raises(ValueError, match="code.train.bin"):
        Corpus(tmp_path / "corpus")
    (tmp_path / "corpus" / "manifest.json").unlink()
    with pytest.raises(ValueError, match="build_corpus.py"):
        Corpus(tmp_path / "corpus")


@pytest.mark.parametrize("arguments, named", [
    ((), "collect.py"), (("--heldout", 2), "--heldout"), (("--near-duplicates", 8), "--near-duplicates"), (("--vocab-size", 9), "--vocab-size"),
    (("--benchmarks", "/no/such"), "--benchmarks")])
def test_bad_input_is_named(tmp_path, arguments, named):
    assert named in run("build_corpus.py", "--raw", tmp_path, "--out", tmp_path / "out", *arguments, ok=False).stderr
