import json

import numpy as np
import pytest

import evaluate
from build_corpus import Tokenizer
from collect import Record, chat_message

TOOLS = [{"name": "roll", "parameters": {"type": "object", "required": ["shift"], "properties": {
    "shift": {"type": "integer"}, "scale": {"type": "number"}, "mode": {"type": "string", "enum": ["wrap", "clip"]}}}},
    {"name": "roll.back", "parameters": {"type": "object", "required": [], "properties": {
        "names": {"type": "array", "items": {"type": "string"}}, "deep": {"type": "boolean"}, "extra": {}, "table": {"type": "object"}}}}]
SCHEMAS = {t["name"]: t["parameters"] for t in TOOLS}


@pytest.mark.parametrize("calls, gold, right", [
    ([("roll", {"shift": 3})], [("roll", {"shift": 3})], True),
    ([("roll", {"shift": 4})], [("roll", {"shift": 3})], False),
    ([("roll", {"shift": "3"})], [("roll", {"shift": 3})], False),
    ([("roll", {"shift": True})], [("roll", {"shift": 1})], False),
    ([("roll", {"shift": 3.0})], [("roll", {"shift": 3})], False),
    ([("roll", {"shift": 1, "scale": 2})], [("roll", {"shift": 1, "scale": 2.0})], True),  # an integer for a number
    ([("roll", {"shift": 1, "scale": True})], [("roll", {"shift": 1, "scale": 1.0})], False),
    ([("roll", {"shift": 3, "scale": 1.0})], [("roll", {"shift": 3})], False),
    ([("roll", {})], [("roll", {"shift": 3})], False),
    ([("Roll", {"shift": 3})], [("roll", {"shift": 3})], False),
    ([("roll", {"shift": 3})] * 2, [("roll", {"shift": 3})], False),
    ([], [("roll", {"shift": 3})], False),
    ([("roll.back", {}), ("roll", {"shift": 1})], [("roll", {"shift": 1}), ("roll.back", {})], True),  # any order
    ([("roll", {"shift": 1}), ("roll", {"shift": 1})], [("roll", {"shift": 1}), ("roll", {"shift": 2})], False),
    ([("roll.back", {"names": ["a", "b"]})], [("roll.back", {"names": ["b", "a"]})], False),
    ([("roll.back", {"table": {"a": [1]}})], [("roll.back", {"table": {"a": [1]}})], True),
    ([("roll.back", {"table": {"a": [1.0]}})], [("roll.back", {"table": {"a": [1]}})], False)])
def test_check_call(calls, gold, right):
    assert evaluate.check_call(TOOLS, calls, gold) is right


@pytest.mark.parametrize("output, calls", [
    ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', [("f", {})]),
    ('I see.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "g", "arguments": {"a": [1]}}\n</tool_call>',
     [("f", {}), ("g", {"a": [1]})]),
    ("None of the tools fits.", []), ("", []), ("<tool_call>", None), ('<tool_call>\n{"name": "f"}\n</tool_call>', None),
    ('<tool_call>\n{"name": "f", "arguments": "{}"}\n</tool_call>', None), ("<tool_call>\n[1]\n</tool_call>", None),
    ('<tool_call>\n__import__("os")\n</tool_call>', None), ('<tool_call>\n' + "[" * 100_000 + "\n</tool_call>", None),
    ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><tool_call>', None)])
def test_parse_calls(output, calls):
    assert evaluate.parse_calls(output) == calls


def record(calls=None):
    answer = chat_message("assistant", "" if calls else "No tool fits.", calls)
    return Record("i", "instruction", "s", "MIT", [], messages=[chat_message("user", "Roll."), answer],
                  tools=[{"type": "function", "function": t} for t in TOOLS])


@pytest.mark.parametrize("calls, output, verdict", [
    ([("roll", {"shift": 1})], '<tool_call>\n{"name": "roll", "arguments": {"shift": 1}}\n</tool_call>', "right"),
    ([("roll", {"shift": 1})], '<tool_call>\n{"name": "roll", "arguments": {"shift": 2}}\n</tool_call>', "wrong"),
    ([("roll", {"shift": 1})], "I cannot.", "abstained"), ([("roll", {"shift": 1})], "<tool_call>\nroll", "unparseable"),
    (None, "No tool fits.", "right"), (None, "", "unparseable"), (None, "</tool_call> <tools>", "unparseable"),  # garbage is no refusal
    (None, '<tool_call>\n{"name": "roll", "arguments": {"shift": 1}}\n</tool_call>', "wrong")])
def test_verdicts(calls, output, verdict):
    item = evaluate.judge(record(calls), "prompt", output)
    assert item["verdict"] == verdict in evaluate.VERDICTS
    scores = item["scores"]
    assert scores["a call or clean words"] == (verdict != "unparseable") and scores["stops by itself"]
    assert all(score == (verdict == "right") for name, score in scores.items() if name.startswith("right"))
    assert (scores["name"], scores["name and arguments"]) == (verdict in ("right", "wrong"), verdict == "right") if calls else "name" not in scores


def conversation(*messages):
    """Kinds are told by what stands before the answer, and by what it asks for."""
    return Record("i", "instruction", "s", "MIT", [], messages=list(messages), tools=[{"type": "function", "function": t} for t in TOOLS])


@pytest.mark.parametrize("before, answer, output, kind, verdict", [
    ([chat_message("user", "Roll.")], chat_message("assistant", "What should `shift` be?"), "Please tell me shift.", "asks what is missing", "right"),
    ([chat_message("user", "Roll.")], chat_message("assistant", "What should `shift` be?"), "I cannot.", "asks what is missing", "wrong"),
    ([chat_message("user", "Roll."), chat_message("assistant", "What should `shift` be?"), chat_message("user", "1")],
     chat_message("assistant", "", [("roll", {"shift": 1})]), '<tool_call>\n{"name": "roll", "arguments": {"shift": 1}}\n</tool_call>', "calls once told", "right"),
    ([chat_message("user", "Roll."), chat_message("assistant", "", [("roll", {"shift": 1})]), chat_message("tool", "Error: use 2")],
     chat_message("assistant", "", [("roll", {"shift": 2})]), '<tool_call>\n{"name": "roll", "arguments": {"shift": 1}}\n</tool_call>', "mended after an error", "wrong"),
    ([chat_message("user", "Cook.")], chat_message("assistant", "No tool fits."), "None of them.", "no tool fits", "right")])
def test_kinds_of_items(before, answer, output, kind, verdict):
    item = evaluate.judge(conversation(*before, answer), "prompt", output)
    assert item["verdict"] == verdict and item["scores"][f"right: {kind}"] == (verdict == "right")


LEGAL = ['<tool_call>\n{"name": "roll", "arguments": {"shift": -12, "scale": 1.5e-3, "mode": "clip"}}\n</tool_call>',
         '<tool_call>\n{"name": "roll", "arguments": {"scale": 2, "shift": 0}}\n</tool_call>\n<tool_call>\n{"name": "roll.back", "arguments": {}}\n</tool_call>',
         '<tool_call>\n{"name": "roll.back", "arguments": {"names": ["a\\n\\u00e9\\"", "日本"], "deep": false, "extra": [null, {"a": 1}], "table": {"k": []}}}\n</tool_call>',
         '<tool_call>\n{"name": "roll.back", "arguments": {"names": [], "table": {}}}\n</tool_call>']
ILLEGAL = ['<tool_call>\n{"name": "rol"', '<tool_call>\n{"name": "roll", "arguments": {}', '<tool_call>\n{"name": "roll", "arguments": {"shift": 1.',
           '<tool_call>\n{"name": "roll", "arguments": {"shift": tr', '<tool_call>\n{"name": "roll", "arguments": {"other', '<tool_call> {',
           '<tool_call>\n{"name": "roll", "arguments": {"shift": 1, "shift', '<tool_call>\n{"name": "roll", "arguments": {"shift": 1, "mode": "x',
           '<tool_call>\n{"name": "roll.back", "arguments": {"names": [1', '<tool_call>\n{"name": "roll.back", "arguments": {"deep": "',
           LEGAL[0] + " and", LEGAL[0] + "\n\n"]


def test_an_answer_cut_off_is_no_refusal():
    assert evaluate.judge(record(None), "prompt", "No tool fits.", ended=False)["verdict"] == "unparseable"


@pytest.mark.parametrize("text", LEGAL)
def test_every_beginning_of_a_legal_call_is_legal(text):
    for n in range(len("<tool_call>"), len(text)):
        assert evaluate.Constraint.legal(text[:n], SCHEMAS, finished=False), text[:n]
        assert not evaluate.Constraint.legal(text[:n], SCHEMAS, finished=True) or text[:n].endswith("</tool_call>")
    assert evaluate.Constraint.legal(text, SCHEMAS, finished=True)


@pytest.mark.parametrize("text", ILLEGAL)
def test_what_no_legal_call_begins_with_is_illegal(text):
    assert not evaluate.Constraint.legal(text, SCHEMAS, finished=False)


def test_constraint_picks_the_likeliest_legal_token():
    import torch
    tokenizer = Tokenizer({bytes([b]): b for b in range(256)})
    constraint = evaluate.Constraint(tokenizer, [[{"function": t} for t in TOOLS]])
    rng, ids = torch.Generator().manual_seed(0), [tokenizer.special["<tool_call>"]]
    for _ in range(400):  # whatever a model wants, what comes out parses
        logits = torch.randn(tokenizer.vocab_size, generator=rng)
        for close in b'}"]':
            logits[close] += 3  # lest values never end
        logits[tokenizer.im_end] += 3  # nor calls
        ids.append(constraint(0, ids, logits))
        if ids[-1] == tokenizer.im_end:
            break
    calls = evaluate.parse_calls(tokenizer.decode(ids[:-1]))
    assert calls and all(name in SCHEMAS and set(SCHEMAS[name]["required"]) <= set(arguments) for name, arguments in calls)
    favourite = torch.zeros(tokenizer.vocab_size)
    favourite[ord("h")] = 1
    assert constraint(0, [], favourite) == ord("h")  # words are free
    tokenizer = Tokenizer({bytes([b]): b for b in range(256)})
    only = evaluate.Constraint(tokenizer, [[{"function": {"name": "日本", "parameters": {}}}]])
    ids = [tokenizer.special["<tool_call>"]]
    while ids[-1] != tokenizer.im_end:  # one legal call alone: found though each token is a part of a character
        ids.append(only(0, ids, -torch.arange(tokenizer.vocab_size).float().roll(tokenizer.im_end)))  # im_end is the favourite
        assert len(ids) < 99
    assert evaluate.parse_calls(tokenizer.decode(ids[:-1]))[0] == ("日本", {})


def test_bootstrap_interval_covers():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        low, high = evaluate.bootstrap(rng.normal(0.3, 1, 100), resamples=400)
        hits += low < 0.3 < high
    assert 0.9 <= hits / 200 <= 0.99


def test_differences_are_paired():
    base = np.random.default_rng(0).normal(size=300)
    results = evaluate.summarise_scores({("s", "m"): {"a": list(base), "b": list(base + 0.01)}}, ["a", "b"])
    comparison = next(r for r in results if r.get("baseline") == "a")
    assert comparison["model"] == "b" and comparison["n"] == 300
    assert 0 < comparison["difference_low"] <= comparison["difference"] <= comparison["difference_high"] < 0.02
    assert json.loads(json.dumps(results)) == results
