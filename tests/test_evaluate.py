import argparse
import contextlib
import json
import re
import shutil
import threading
import time
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

import evaluate
import model as transformer
from build_corpus import Tokenizer
from collect import Record, chat_message
from conftest import ROOT, run
from evaluate import Answer

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
    ([("roll.back", {"table": {"a": [2]}})], [("roll.back", {"table": {"a": [1]}})], False)])
def test_recorded_calls_are_compared_as_bfcl_does(calls, gold, right):
    found = evaluate.check_call(TOOLS, calls, evaluate.as_gold(TOOLS, gold))
    assert found[0] is right and (right or found[1])


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


def record(answer, *before):
    messages = [*(before or [chat_message("user", "Roll.")]), answer]
    return Record("i", "instruction", "s", "MIT", [], messages=messages, tools=[{"type": "function", "function": t} for t in TOOLS])


def answered(text, ended=True):
    return Answer(text, evaluate.parse_calls(text), ended)


ROLL = '<tool_call>\n{"name": "roll", "arguments": {"shift": %d}}\n</tool_call>'


@pytest.mark.parametrize("calls, output, verdict", [
    ([("roll", {"shift": 1})], ROLL % 1, "right"), ([("roll", {"shift": 1})], ROLL % 2, "wrong"),
    ([("roll", {"shift": 1})], "I cannot do that.", "abstained"), ([("roll", {"shift": 1})], "<tool_call>\nroll", "unparseable"),
    (None, "No tool fits.", "right"), (None, "", "unparseable"), (None, "</tool_call> <tools>", "unparseable"),  # garbage is no refusal
    (None, "abc", "unparseable"), (None, "1 2 3 4", "unparseable"), (None, ROLL % 1, "wrong")])
def test_verdicts(calls, output, verdict):
    item = evaluate.judge(record(chat_message("assistant", "" if calls else "No tool fits.", calls)), answered(output))
    assert item["verdict"] == verdict in evaluate.VERDICTS and ("failure" in item) == (verdict != "right")
    scores = item["scores"]
    assert scores["a call or clean words"] == (verdict != "unparseable") and scores["stops by itself"]
    assert all(score == (verdict == "right") for name, score in scores.items() if name.startswith("right"))
    if calls:
        assert (scores["name"], scores["name and arguments"]) == (
            verdict in ("right", "wrong"),
            verdict == "right",
        )
        assert (
            scores["arguments: one"] == scores["name and arguments"] == scores["right: one of several tools"]
        )
    else:
        assert not scores.keys() & {"name", "name and arguments", "arguments: none"}


@pytest.mark.parametrize("before, answer, output, kind, verdict", [
    ([chat_message("user", "Roll.")], chat_message("assistant", "What should `shift` be?"), "Please tell me shift.", "asks what is missing", "right"),
    ([chat_message("user", "Roll.")], chat_message("assistant", "What should `shift` be?"), "I cannot do it.", "asks what is missing", "wrong"),
    ([chat_message("user", "Roll."), chat_message("assistant", "What should `shift` be?"), chat_message("user", "1")],
     chat_message("assistant", "", [("roll", {"shift": 1})]), ROLL % 1, "calls once told", "right"),
    ([chat_message("user", "Roll."), chat_message("assistant", "", [("roll", {"shift": 1})]), chat_message("tool", "Error: use 2")],
     chat_message("assistant", "", [("roll", {"shift": 2})]), ROLL % 1, "mended after an error", "wrong"),
    ([chat_message("user", "Go back, then roll by the result."), chat_message("assistant", "", [("roll.back", {})]),
      chat_message("tool", "2")],
     chat_message("assistant", "", [("roll", {"shift": 2})]), ROLL % 2, "uses a result", "right"),
    ([chat_message("user", "Roll.")], chat_message("assistant", "What should `shift` be?"),
     "No tool is shifty.", "asks what is missing", "wrong"),
    ([chat_message("user", "Cook.")], chat_message("assistant", "`roll` cannot cook."), "None of them fits.",
     "no tool fits", "right"),
    ([chat_message("user", "Cook.")], chat_message("assistant", "No tool fits."), "None of them fits.", "no tool fits", "right")])
def test_kinds_of_items(before, answer, output, kind, verdict):
    item = evaluate.judge(record(answer, *before), answered(output))
    assert item["verdict"] == verdict and item["scores"][f"right: {kind}"] == (verdict == "right")


@pytest.mark.parametrize("calls, count", [
    ([("roll.back", {})], "none"), ([("roll", {"shift": 1})], "one"), ([("roll", {"shift": 1, "scale": 2})], "two"),
    ([("roll.back", {}), ("roll", {"shift": 1, "scale": 2, "mode": "clip"})], "three and more")])
def test_calls_are_counted_by_their_arguments(calls, count):
    written = "\n".join(
        f'<tool_call>\n{json.dumps({"name": n, "arguments": a})}\n</tool_call>' for n, a in calls
    )
    for output, right in ((written, 1.0), ("I cannot do it.", 0.0)):
        scores = evaluate.judge(record(chat_message("assistant", "", calls)), answered(output))["scores"]
        assert [m for m in scores if m.startswith("arguments")] == [f"arguments: {count}"] and scores[
            f"arguments: {count}"
        ] == right
        assert scores.get("name and arguments") == (None if count == "none" else right)


VALUES = [  # (schema, values that have it, values that have not)
    ({"type": "integer", "nullable": True}, [None, -3, 0], ["a", 1.5, True]),
    ({"type": ["string", "number"]}, ["a b", -2.5, 7], [None, [1], True]),
    ({"anyOf": [{"type": "string", "enum": ["auto"]}, {"type": "array", "items": {"type": "integer"}}],
      "nullable": True},
     ["auto", [], [1, -2], None], ["other", [1.5], {}]),
    ({"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
     [[[1, 2.5], [-3]], []], [[1], "[[1]]"]),
    ({"type": "array", "items": {"type": "number"}}, [[0.5, 1], [2, -0.5], []], [[True, 1], ["1"]]),
    ({"type": "array", "items": {"type": "string", "nullable": True}}, [["a", None], [None]], [[1]]),
    ({"type": "array", "items": {"anyOf": [{"type": "integer"}, {"type": "number"}]}},
     [[1.5, -2e-07]], [["a"]]),
    ({"type": "string"}, ["", "a-b"], [1, None]),
    ({"type": "object", "title": "Frame"}, [{"a": {"b": [1, None]}}, {}], [[], "a"]),
    ({"enum": [1, "two", None, False]}, [1, "two", None, False], [2, "three", True]),
    ({"type": ["integer", "array"], "items": {"type": "integer"}}, [12, [1, 2]], ["12", [True]]),
    ({"type": "number"}, [-0.25, 1e-05, 3], ["3", None]), ({"type": "boolean"}, [True, False], [1, "true"]),
    ({}, [None, {"a": [1, "b"]}, -1.5, "é", [[True]]], [])]


@pytest.mark.parametrize("schema, legal, illegal", VALUES)
def test_values_within_their_schema(schema, legal, illegal):
    """Constrained decoding takes each beginning of a value that fits, and no other value; a recorded call is
    right against itself alone.
    """
    tools = [{"name": "f", "parameters": {"type": "object", "properties": {"x": schema}, "required": ["x"]}}]
    schemas, call = {
        "f": tools[0]["parameters"]
    }, '<tool_call>\n{"name": "f", "arguments": {"x": %s}}\n</tool_call>'
    for value in legal:
        text = call % json.dumps(value, ensure_ascii=False)
        assert all(
            evaluate.Constraint.legal(text[:n], schemas, finished=False)
            for n in range(len("<tool_call>"), len(text))
        )
        assert evaluate.Constraint.legal(text, schemas, finished=True)
        said = Record(
            "i",
            "instruction",
            "s",
            "MIT",
            [],
            messages=[chat_message("user", "Do it."), chat_message("assistant", "", [("f", {"x": value})])],
            tools=[{"type": "function", "function": t} for t in tools],
        )
        assert evaluate.judge(said, answered(text))["verdict"] == "right"
        for other in [v for v in [*legal, *illegal, "something else"] if json.dumps(v) != json.dumps(value)]:
            assert (
                evaluate.judge(said, answered(call % json.dumps(other, ensure_ascii=False)))["verdict"]
                == "wrong"
            ), (value, other)
    for value in illegal:
        assert not evaluate.Constraint.legal(
            call % json.dumps(value, ensure_ascii=False), schemas, finished=True
        )


INNER = {"type": "object", "properties": {"k": {"type": "string", "enum": ["a", "b"]}, "n": {"type": "integer"}},
         "required": ["k"]}
NODE = {"$defs": {"N": {"type": "object", "properties": {"v": {"const": 1}, "next": {"anyOf": [
    {"$ref": "#/$defs/N"}, {"type": "null"}]}}, "required": ["v", "next"]}}, "$ref": "#/$defs/N"}
NESTED = [  # (schema, values that have it, values that have not)
    (INNER, [{"k": "a"}, {"n": 1, "k": "b"}], [{}, {"k": "z"}, {"k": 5}, {"k": "a", "n": "1"}, {"k": "a", "other": 1}]),
    ({"type": "array", "items": INNER}, [[], [{"k": "a"}, {"k": "b"}]], [[{}], [{"k": "a"}, {}]]),
    ({"type": "object", "properties": {"in": INNER}}, [{}, {"in": {"k": "a"}}], [{"in": {}}]),
    (INNER | {"additionalProperties": {"type": "integer"}}, [{"k": "a", "m": 2}, {"m": 2, "k": "a"}],
     [{"m": 2}, {"k": "a", "m": "2"}]),
    ({"type": "object", "additionalProperties": {"type": "integer"}}, [{}, {"a": 1, "b": 2}], [{"a": "1"}]),
    ({"type": "object", "required": ["a"], "additionalProperties": {"type": "integer"}}, [{"a": 1}], [{"a": "1"}]),
    ({"$defs": {"N": {"type": "integer"}}, "$ref": "#/$defs/N", "enum": [1, 2]}, [1, 2], [3]),
    ({"type": "object", "required": ["a"]}, [{"a": [1], "b": None}], [{}, {"b": 1}]),
    ({"type": "object", "properties": {"é \"": {"type": "null"}}}, [{"é \"": None}], [{"é \"": 1}]),
    ({"type": "number"}, [1, -2.5, 0], ["1", None]), ({"const": "only"}, ["only"], [None, "on"]), ({"const": None}, [None], ["a"]),
    ({"type": ["integer", "null"]}, [1, None], ["text"]),
    ({"type": ["object", "null"], "properties": {"a": {"type": "integer"}}}, [None, {"a": 1}], [{"a": "1"}]),
    ({"oneOf": [{"type": "integer"}, INNER]}, [1, {"k": "a"}], [{}, "a"]),
    (NODE, [{"v": 1, "next": None}, {"v": 1, "next": {"v": 1, "next": None}}], [{"v": 1, "next": {}}, {"v": 2, "next": None}])]


@pytest.mark.parametrize("schema, legal, illegal", NESTED, ids=range(len(NESTED)))
def test_schemas_within_schemas(schema, legal, illegal):
    """Constrained decoding keeps to them at any depth, in arguments as in a text that is one value."""
    outer = {"type": "object", "properties": {"x": schema}, "required": ["x"], "$defs": schema.get("$defs", {})}
    for root in (schema, outer):
        read = evaluate.read_schema(root)
        for value, right in [*((v, True) for v in legal), *((v, False) for v in illegal)]:
            value = value if root is schema else {"x": value}
            text = json.dumps(value, ensure_ascii=False)
            call = '<tool_call>\n{"name": "f", "arguments": ' + text + "}\n</tool_call>"
            if root is not schema:
                assert evaluate.Constraint.legal(call, {"f": read}, finished=True) is right, value
            if right:
                assert all(evaluate.may_become(text.encode()[:n], False, {}, read) for n in range(len(text.encode())))
            assert evaluate.may_become(text.encode(), True, {}, read) is right


INTEGERS, NUMBERS = ({"type": "array", "items": {"type": kind}} for kind in ("integer", "number"))


@pytest.mark.parametrize("schema, value, other, right", [
    ({"type": "number"}, 2.0, 2, True), ({"type": "number"}, 2, 2.0, True), ({}, 2.0, 2, True),
    ({"type": ["string", "number"]}, 2.0, 2, True),
    ({"anyOf": [{"type": "number"}, NUMBERS]}, [2.0], [2], True), (NUMBERS, [0.5, 2], [0.5, 2.0], True),
    (NUMBERS, [2.0, 1.0], [2, 1], True), (NUMBERS, [1.0], [True], False),
    ({"type": "integer"}, 3, 3.0, False), ({"type": ["integer", "null"]}, 3, 3.0, False),
    ({"anyOf": [{"type": "integer"}, INTEGERS]}, 3, 3.0, False), (INTEGERS, [3], [3.0], False)])
def test_an_integer_counts_as_a_float(schema, value, other, right):
    """Wherever a schema allows floats; in two calls at once, the recorded ones are right in any order."""
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"x": schema}, "required": []}}
    calls = [("f", {"x": value}), ("f", {})]
    said = record(chat_message("assistant", "", calls))
    said.tools = [{"type": "function", "function": tool}]
    judge = lambda *made: evaluate.judge(said, Answer("", list(made)))["verdict"] == "right"
    assert judge(*calls) and judge(*reversed(calls)) and not judge(calls[1], calls[1])
    assert judge(("f", {"x": other}), ("f", {})) is right


def test_an_empty_text_must_be_given():
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}
    gold = evaluate.as_gold([tool], [("f", {"x": ""})])
    right = lambda arguments: evaluate.check_call([tool], [("f", arguments)], gold)[0]
    assert right({"x": ""}) and not right({}) and not right({"x": "a"})


def test_the_last_call_is_what_is_asked_for(tmp_path):
    """Of a conversation that goes on after its calls, and of one whose second call takes the result of the
    first.
    """
    call = lambda shift: chat_message("assistant", "", [("roll", {"shift": shift})])
    chats = [
        [
            chat_message("user", "Roll."),
            call(1),
            chat_message("tool", "5"),
            chat_message("assistant", "It is 5."),
        ],
        [
            chat_message("user", "Roll."),
            call(1),
            chat_message("tool", "5"),
            call(5),
            chat_message("tool", "9"),
            chat_message("assistant", "9."),
        ],
        [chat_message("user", "Sing."), chat_message("assistant", "No tool fits.")],
    ]
    records = [
        Record(
            str(i),
            "instruction",
            "s",
            "MIT",
            ["pkg.roll"],
            messages=m,
            tools=[{"type": "function", "function": t} for t in TOOLS],
        )
        for i, m in enumerate(chats)
    ]
    (tmp_path / "heldout.jsonl").write_text("".join(r.to_json() + "\n" for r in records))
    (tmp_path / "heldout_apis.json").write_text('["pkg.roll"]')
    corpus = argparse.Namespace(directory=tmp_path, tokenizer=Tokenizer({bytes([b]): b for b in range(256)}))
    found = {
        r.id: r.messages for r in evaluate.conversations(corpus, argparse.Namespace(seq_len=9999, limit=None))
    }
    assert found == {"0": chats[0][:2], "1": chats[1][:4], "2": chats[2]}


def test_an_answer_cut_off_is_no_refusal():
    assert evaluate.judge(record(chat_message("assistant", "No tool fits.")), answered("No tool fits.", ended=False))["verdict"] == "unparseable"


def test_a_failed_request_stays_in_the_denominator():
    item = evaluate.judge(record(chat_message("assistant", "", [("roll", {"shift": 1})])), Answer("", None, False, "timed out after 60 s"))
    assert item["verdict"] == "error" and item["failure"] == "timed out after N s" and set(item["scores"].values()) == {0}
    assert item["scores"].keys() >= {
        "name",
        "name and arguments",
        "right: one of several tools",
        "a call or clean words",
    }


LEGAL = ['<tool_call>\n{"name": "roll", "arguments": {"shift": -12, "scale": 1.5e-3, "mode": "clip"}}\n</tool_call>',
         '<tool_call>\n{"name": "roll", "arguments": {"scale": 2, "shift": 0}}\n</tool_call>\n<tool_call>\n{"name": "roll.back", "arguments": {}}\n</tool_call>',
         '<tool_call>\n{"name": "roll.back", "arguments": {"names": ["a\\n\\u00e9\\"", "日本"], "deep": false, "extra": [null, {"a": 1}], "table": {"k": []}}}\n</tool_call>',
         '<tool_call>\n{"name": "roll.back", "arguments": {"names": [], "table": {}}}\n</tool_call>']
ILLEGAL = ['<tool_call>\n{"name": "rol"', '<tool_call>\n{"name": "roll", "arguments": {}', '<tool_call>\n{"name": "roll", "arguments": {"shift": 1.',
           '<tool_call>\n{"name": "roll", "arguments": {"shift": tr', '<tool_call>\n{"name": "roll", "arguments": {"other', '<tool_call> {',
           '<tool_call>\n{"name": "roll", "arguments": {"shift": 1, "shift', '<tool_call>\n{"name": "roll", "arguments": {"shift": 1, "mode": "x',
           '<tool_call>\n{"name": "roll.back", "arguments": {"names": [1', '<tool_call>\n{"name": "roll.back", "arguments": {"deep": "',
           LEGAL[0] + " and", LEGAL[0] + "\n\n"]


@pytest.mark.parametrize("text", LEGAL)
def test_every_beginning_of_a_legal_call_is_legal(text):
    for n in range(len("<tool_call>"), len(text)):
        assert evaluate.Constraint.legal(text[:n], SCHEMAS, finished=False), text[:n]
        assert not evaluate.Constraint.legal(text[:n], SCHEMAS, finished=True) or text[:n].endswith("</tool_call>")
    assert evaluate.Constraint.legal(text, SCHEMAS, finished=True)


@pytest.mark.parametrize("text", ILLEGAL)
def test_what_no_legal_call_begins_with_is_illegal(text):
    assert not evaluate.Constraint.legal(text, SCHEMAS, finished=False)


def test_names_that_json_writes_in_several_ways():
    call = '<tool_call>\n{"name": %s, "arguments": {"x": {%s}}}\n</tool_call>'
    inner = evaluate.read_schema({"properties": {"é": {"const": 1}}, "type": "object", "additionalProperties": True})
    for name, key, legal in (('"a\\"b"', '"\\u00e9": 1', True), ('"a\\"b"', '"\\u00e9": 2', False), ('"a"b"', "", False)):
        assert evaluate.Constraint.legal(call % (name, key), {'a"b': {"properties": {"x": inner}}}, finished=True) is legal


def test_brackets_without_end_are_illegal():
    """Deeper than Python reads, but nothing is raised."""
    text = '<tool_call>\n{"name": "roll.back", "arguments": {"extra": '
    assert evaluate.Constraint.legal(text + "[" * 50, SCHEMAS, finished=False)
    assert not evaluate.Constraint.legal(text + "[" * 3000, SCHEMAS, finished=False)


def test_a_byte_that_no_text_holds_is_illegal():
    """Nor does it end a value, or a call."""
    assert evaluate.may_become(b"true", False, {}, {"type": "boolean"})
    assert not evaluate.may_become(b"true\xff", False, {}, {"type": "boolean"})
    assert not evaluate.may_become(LEGAL[0].encode() + b"\xff", False, SCHEMAS)


def test_ids_that_stand_for_nothing():
    """Of a vocabulary that is padded: they give no text, and constrained decoding does not pick them."""
    tokenizer = Tokenizer({bytes([b]): b for b in range(256)})
    beyond = tokenizer.vocab_size + 3
    assert tokenizer.decode([ord("a"), beyond, ord("b")]) == "ab"
    logits = torch.zeros(beyond + 1)
    logits[beyond], logits[ord("h")] = 9, 1
    assert evaluate.Constraint(tokenizer, [[]])(0, [], logits) == ord("h")


def test_a_foreign_chat_template_is_recognised(tmp_path):
    assert not evaluate.other_template(tmp_path)
    Tokenizer({bytes([b]): b for b in range(256)}).save(tmp_path)
    assert not evaluate.other_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert evaluate.other_template(tmp_path)


def test_constraint_picks_the_likeliest_legal_token():
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
        found = evaluate.interval("", evaluate.resample(rng.normal(0.3, 1, (100, 1)), rng, resamples=400)[:, 0])
        hits += found["low"] < 0.3 < found["high"]
    assert 0.9 <= hits / 200 <= 0.99


def items(values, metric="m"):
    return [{"id": str(i), "scores": {metric: value}, "verdict": "right" if value > 0 else "wrong"} for i, value in enumerate(values)]


def test_differences_to_the_first_model_are_paired():
    base = np.random.default_rng(0).normal(size=300)
    results = evaluate.summarise("s", {"a": items(base), "b": items(base + 0.01)}, ["a", "b"])
    assert json.loads(json.dumps(results)) == results and "baseline" not in results[0]
    assert (results[1]["model"], results[1]["baseline"], results[1]["n"]) == ("b", "a", 300)
    assert 0 < results[1]["difference_low"] <= results[1]["difference"] <= results[1]["difference_high"] < 0.02
    assert sum(results[0]["verdicts"].values()) == pytest.approx(1)


@pytest.mark.filterwarnings("error")
def test_scores_are_drawn_without_curves_of_training(tmp_path):
    """A model that was not trained here has none: their part of the figure is left out without a warning."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    row = {"model": "m", "suite": "s", "metric": "x", "n": 2, "score": 0.5, "low": 0.4, "high": 0.6}
    evaluate.draw([row], ["m"], ["http://localhost:1/v1"], tmp_path, pyplot)
    assert (tmp_path / "report.png").stat().st_size > 1000 and len(pyplot.gcf().axes) == 1
    pyplot.close("all")


def test_totals_of_unlike_items_are_drawn_apart(monkeypatch):
    """Two parts of as many items in the same order: drawn together, their mean would vary as much as each."""
    monkeypatch.setitem(evaluate.TOTALS, "s", {"mean": ("x", "y")})
    found = [{"id": f"{m}{i}", "scores": {m: float(i % 2)}} for m in "xy" for i in range(400)]
    results = {r["metric"]: r["high"] - r["low"] for r in evaluate.summarise("s", {"a": found}, ["a"])}
    assert results["mean"] == pytest.approx(results["x"] / 2 ** 0.5, rel=0.1)


def test_totals_are_formulas_of_means(monkeypatch):
    """A total's interval comes from the same draws as its parts', and a total whose parts were not all
    measured is left out.
    """
    monkeypatch.setitem(evaluate.TOTALS, "s", {"half": ("x", "y"), "all": frozenset("xy"), "other": ("x", "z")})
    found = [{"id": f"{m}{i}", "scores": {m: float(i % 4 == 0) if m == "x" else 1.0}} for m, n in (("x", 100), ("y", 300)) for i in range(n)]
    results = {r["metric"]: r for r in evaluate.summarise("s", {"a": found}, ["a"])}
    assert results.keys() == {"x", "y", "half", "all"} and results["half"]["n"] == results["all"]["n"] == 400 and results["x"]["n"] == 100
    assert [results[total]["score"] for total in ("half", "all")] == pytest.approx([0.625, 0.8125])
    assert results["half"]["high"] - results["half"]["low"] == pytest.approx((results["x"]["high"] - results["x"]["low"]) / 2)


def test_the_table_is_markdown_with_a_row_a_model():
    results = evaluate.summarise("s", {"a": items([0, 1, 0, 1] * 20), "b": items([1] * 80)}, ["a", "b"])
    lines = evaluate.table("s", results, ["a", "b"]).splitlines()
    assert len({len(line) for line in lines[2:]}) == 1 and lines[0] == "### s" and "minus a, 95% interval" in lines[2]
    assert re.search(r"\| b +\| 1.000 .*\+0.500 \[\+0.\d+, \+0.\d+\] \* .*100%", lines[-1])
    results = evaluate.summarise("s", {"a": items([0]), "b": items([1])}, ["a", "b"])
    assert "*" not in evaluate.table("s", results, ["a", "b"])  # one item tells nothing


REFERENCE = {"model": "B-1", "suite": "s", "metric": "m", "score": 0.25, "source": "leaderboard,\n2025"}


def test_published_scores_stand_beside_measured_ones(tmp_path, capsys):
    """Marked, without interval or difference; a metric that was not measured has rows of its own."""
    path, more = tmp_path / "r.json", {"metric": "of | theirs", "model": "C\x1b[0m"}
    path.write_text(json.dumps([REFERENCE | more, REFERENCE, REFERENCE | {"suite": "other"}]))
    published = evaluate.read_reference(str(path), ["s-constrained"])
    assert capsys.readouterr().out == f"--reference {path}: left out other, which is not measured\n"
    for suite in ("s", "s-constrained"):
        results = evaluate.summarise(suite, {"a": items([0, 1] * 40), "b": items([1] * 80)}, ["a", "b"])
        lines = evaluate.table(suite, results, ["a", "b"], published).splitlines()[4:]
        cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        assert [row[:4] for row in cells] == [
            ["m", "80", "a", "0.500"], ["", "", "b", "1.000"], ["", "", "B-1 (published: leaderboard, 2025)", "0.250"],
            ["of / theirs", "", "C\\x1b[0m (published: leaderboard, 2025)", "0.250"]]
        assert not any("".join(row[4:]) for row in cells[2:]) and len({len(line) for line in lines}) == 1
    assert evaluate.read_reference(None, ["s"]) == []


@pytest.mark.parametrize("content, why", [
    ("{", "not a JSON list"), ("{}", "not a JSON list"), ("[3]", "entry 1: it needs model"), (json.dumps([REFERENCE, REFERENCE | {"source": None}]), "entry 2: it needs"),
    *[(json.dumps([REFERENCE | {"score": score}]), "entry 1: the score is a share") for score in (25, "0.3", None, True, float("nan"))]])
def test_references_that_cannot_be_read(tmp_path, capsys, content, why):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(SystemExit, match="^2$"):
        evaluate.read_reference(str(tmp_path / "r.json"), ["s"])
    assert why in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Episodes and their files


def guess(messages, tools=None):
    """An episode of two rounds: the model must repeat what it said, and then is scored."""
    first = yield messages, tools
    second = yield [*messages, evaluate.turn(first), chat_message("user", "Again.")], tools
    likelihoods = yield [("a", "b"), ("a", "c")]
    return {"verdict": "right" if first.text == second.text else "wrong", "scores": {"m": float(sum(likelihoods))}}


class Parrot:
    """What main() needs of a model: it says the first message again, and counts what it is asked at once."""
    group, workers, identity = 4, 1, ["parrot"]

    def __init__(self):
        self.rounds = []

    def reply(self, requests, **options):
        self.rounds.append(len(requests))
        return [Answer(r[0][0]["content"], []) if isinstance(r, tuple) else [1.0] * len(r) for r in requests]


def episodes(n):
    return [(str(i), partial(guess, [chat_message("user", f"word {i}")])) for i in range(n)]


def test_a_group_of_episodes_goes_on_together():
    parrot = Parrot()
    records = evaluate.play(episodes(3), parrot.reply)
    assert parrot.rounds == [3, 3, 3] and [r["id"] for r in records] == ["0", "1", "2"]
    assert all(r["verdict"] == "right" and r["scores"] == {"m": 2.0} for r in records) and records[1]["prompt"][0][0]["content"] == "word 1"


def test_finished_items_are_kept(tmp_path):
    """Stopped in its third group, a suite goes on there; a last line that was cut off, and items of another
    model, count for nothing.
    """
    class Tired(Parrot):
        def reply(self, requests, **options):
            if len(self.rounds) == 6:
                raise KeyboardInterrupt
            return super().reply(requests, **options)

    args = evaluate_args()
    with pytest.raises(KeyboardInterrupt):
        evaluate.play_all("s", episodes(14), Tired(), ["one"], tmp_path, args)
    part = tmp_path / "s.part0.jsonl"
    assert len(part.read_text().splitlines()) == 9
    part.write_text(part.read_text()[:-9])
    parrot = Parrot()
    found = evaluate.play_all("s", episodes(14), parrot, ["one"], tmp_path, args)
    assert parrot.rounds == [4] * 6 + [2] * 3 and [item["id"] for item in found] == [str(i) for i in range(14)]  # the group with the cut line again
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.jsonl"] and found == evaluate.play_all("s", episodes(14), None, ["one"], tmp_path, args)
    parrot = Parrot()
    evaluate.play_all("s", episodes(14), parrot, ["another"], tmp_path, args)
    assert sum(parrot.rounds) == 42


def test_a_slow_item_does_not_keep_others_from_the_disk(tmp_path):
    class Slow(Parrot):
        group, workers = 1, 2

        def reply(self, requests, **options):
            if requests[0] and "word 0" in str(requests[0]):  # waits until all others are on disk
                limit = time.time() + 60
                while len((tmp_path / "s.part0.jsonl").read_text().splitlines()) < 1 + 5 and time.time() < limit:
                    time.sleep(0.01)
                assert time.time() < limit
            return super().reply(requests, **options)

    found = evaluate.play_all("s", episodes(6), Slow(), ["one"], tmp_path, evaluate_args())
    assert [item["id"] for item in found] == [str(i) for i in range(6)]


def test_items_are_of_a_checkpoint_and_its_tokenizer(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "other")
    first = evaluate.Local(checkpoint, None, evaluate_args()).identity
    assert first == evaluate.Local(tmp_path / "other", None, evaluate_args()).identity
    for name in ("tokenizer.json", "config.json"):
        path = tmp_path / "other" / name
        path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
        changed = evaluate.Local(tmp_path / "other", None, evaluate_args()).identity
        assert changed != first
        first = changed


def test_ranks_share_out_the_groups(tmp_path, monkeypatch):
    """Rank 1's part is there before rank 0 begins; together they are what one process finds."""
    alone = evaluate.play_all("s", episodes(14), Parrot(), ["one"], tmp_path / "alone", evaluate_args())
    monkeypatch.setenv("WORLD_SIZE", "2")
    sizes = []
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        parrot = Parrot()
        found = evaluate.play_all("s", episodes(14), parrot, ["one"], tmp_path / "shared", evaluate_args())
        sizes.append(sum(parrot.rounds[::3]))
    assert sizes == [6, 8] and found == alone
    assert (tmp_path / "alone" / "s.jsonl").read_bytes() == (tmp_path / "shared" / "s.jsonl").read_bytes()


# ----------------------------------------------------------------------------------------------------------------------
# Suites


def test_log_likelihoods_are_those_of_the_logits(checkpoint):
    """Pairs that share what is read are read once; what does not fit the window is None."""
    model = evaluate.Local(checkpoint, None, evaluate_args(batch_size=2))
    ids = torch.randint(256, (40,)).tolist()
    pairs = [(ids[:5], ids[5:9]), (ids[:30], ids[30:31]), (ids[:30], [7]), ("some words", " more"), ([1] * 300, [2])]
    found = model.score(pairs)
    for (context, continuation), likelihood in zip(pairs[:4], found):
        a, b = (p if isinstance(p, list) else model.tokenizer.encode(p) for p in (context, continuation))
        with torch.inference_mode():
            expected = model.model(torch.tensor([a + b[:-1]])).log_softmax(-1)[0, len(a) - 1:].gather(1, torch.tensor(b)[:, None]).sum()
        assert likelihood == pytest.approx(expected.item(), abs=1e-4)
    assert found[4] is None


def test_a_prompt_too_long_is_an_error_of_its_own(checkpoint):
    model = evaluate.Local(checkpoint, None, evaluate_args())
    short, long = model.reply([([chat_message("user", "Hi")], None), ([chat_message("user", "x" * 300)], None)], max_tokens=8)
    assert short.error is None and len(short.text) and "a window of 256" in long.error


MMLU = {"dev": [["Which is a colour?", "red", "ten", "ran", "of", "A"]] * 5, "test": [["Which is a number?", "red", "ten", "ran", "of", "B"]] * 6}


def test_mmlu_from_its_own_files(checkpoint, tmp_path):
    """Five examples do not fit this model's window: there are as many as do, and every question is
    answered.
    """
    for split, rows in MMLU.items():
        (tmp_path / f"word_kinds_{split}.csv").write_text("\n".join(",".join(row) for row in rows))
    model = evaluate.Local(checkpoint, None, evaluate_args())
    records = evaluate.play(evaluate.mmlu(evaluate_args(data=tmp_path)), partial(model.reply, max_tokens=8))
    assert len(records) == 6 and all(0 < r["shots"] < 5 and r["verdict"] in ("right", "wrong") for r in records)
    letters = ["ABCD"[np.argmax(r["log_likelihoods"])] for r in records]
    assert [r["scores"]["accuracy"] for r in records] == [float(letter == "B") for letter in letters]


API_INFO = """description = "Says who is there."
input_parameters = {'room': {'type': 'int', 'description': 'Its number.'}}
output_parameters = {'names': {'type': 'list'}}"""


def bank(tmp_path):
    (tmp_path / "all_apis.csv").write_text("id,类名,api_info\n1,WhoIsThere,\"" + API_INFO.replace('"', '""') + '"\n')
    found = {"name": "WhoIsThere", "description": "d", "input_parameters": {"room": {"type": "int"}}}
    turns = [{"role": "User", "text": "Who is in room 7?"}, {"role": "AI", "text": "I look."},
             {"role": "API", "api_name": "ToolSearcher", "param_dict": {"keywords": "who"}, "result": {"output": found, "exception": None}},
             {"role": "API", "api_name": "WhoIsThere", "param_dict": {"room": 7}, "result": {"output": None, "exception": "nobody"}}]
    (tmp_path / "WhoIsThere-level-2-1.jsonl").write_text("\n".join(map(json.dumps, turns)))
    return evaluate.api_bank(evaluate_args(data=tmp_path))


@pytest.mark.parametrize("arguments, right", [({"room": 7}, True), ({"room": "7"}, False), ({"room": 7, "floor": 1}, False), ({}, False)])
def test_api_bank_is_exact_match(tmp_path, arguments, right):
    (_, search), (_, call) = bank(tmp_path)
    messages, tools = next(search())
    assert [t["function"]["name"] for t in tools] == ["ToolSearcher"] and [m["role"] for m in messages] == ["user", "assistant"]
    episode = call()
    messages, tools = next(episode)
    assert [t["function"]["name"] for t in tools] == ["ToolSearcher", "WhoIsThere"] and messages[-1]["role"] == "tool"
    assert tools[1]["function"]["parameters"]["properties"]["room"]["type"] == "integer"
    with pytest.raises(StopIteration) as end:
        episode.send(Answer("...", [("WhoIsThere", arguments)]))
    assert end.value.value["scores"] == dict.fromkeys(("exact match", "exact match: level 2"), float(right))
    assert end.value.value["verdict"] == ("right" if right else "wrong")


@pytest.mark.parametrize("text", ["[WhoIsThere(room=b'7')]", "[WhoIsThere(room=7j)]", "[WhoIsThere(room={(1, 2): 3})]", "[WhoIsThere(room={1: 2, 'a': 3})]"])
def test_values_that_json_does_not_know_end_nothing(tmp_path, text):
    """In the mode prompt a model may write any Python literal; the item is wrong, and its record can be
    written.
    """
    bank(tmp_path)
    _, (_, call) = evaluate.api_bank(evaluate_args(data=tmp_path, mode="prompt"))
    (record,) = evaluate.play([("i", call)], lambda requests: [Answer(text)] * len(requests))
    assert record["verdict"] == "wrong" and record["failure"] == "wrong arguments" and "WhoIsThere" in json.dumps(record)


def test_windows_longer_than_the_model_are_refused(small_corpus, tmp_path):
    tokenizer = Tokenizer.load(small_corpus)
    transformer.save(transformer.Transformer(transformer.Config(vocab_size=tokenizer.vocab_size, dim=64, n_layers=1, n_heads=1, n_kv_heads=1,
                                                                hidden_dim=64, max_seq_len=128)), tmp_path)
    tokenizer.save(tmp_path)
    done = run("evaluate.py", "--model", tmp_path, "--corpus", small_corpus, "--out", tmp_path, ok=False)
    assert "--seq-len 768 is more than the 128 positions" in done.stderr


def evaluate_args(**given):
    return argparse.Namespace(**{"limit": None, "mode": "native", "batch_size": 4, "max_tokens": 16, "device": "cpu", "constrained": False} | given)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of random weights and 256 positions, with a tokenizer of bytes."""
    directory, tokenizer = tmp_path_factory.mktemp("model"), Tokenizer({bytes([b]): b for b in range(256)})
    torch.manual_seed(0)
    transformer.save(transformer.Transformer(transformer.Config(vocab_size=tokenizer.vocab_size, dim=64, n_layers=2, n_heads=1, n_kv_heads=1,
                                                                hidden_dim=96, max_seq_len=256)), directory)
    tokenizer.save(directory)
    return str(directory)


# ----------------------------------------------------------------------------------------------------------------------
# The whole script, with an endpoint as its model

DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"no benchmarks in {DATA}")


@pytest.fixture(scope="module")
def abc():
    """An endpoint that answers "abc" to everything; it counts the requests."""
    asked = Counter()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            asked[self.path] += 1
            choice = {"message": {"role": "assistant", "content": "abc"}, "finish_reason": "stop"}
            answer = json.dumps({"choices": [choice]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1#abc", asked
    server.shutdown()
    server.server_close()


@needs_data
@pytest.mark.parametrize("mode", ["native", "prompt"])
def test_a_model_that_always_says_abc(abc, mode, tmp_path):
    """Nothing is right by it but, officially, what should not be answered by a call; and that counts as
    unparseable.
    """
    url, asked = abc
    command = ["evaluate.py", "--model", url, "--suite", "bfcl", "agentbench-db", "api-bank", "--data", DATA, "--out", tmp_path, "--limit", 40,
               "--mode", mode]
    table = run(*command).stdout
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    for r in results:
        official = r["metric"] in ("v2", "v3", "live_irrelevance", "irrelevance")
        assert (r["score"] > 0) == official and r["verdicts"]["right"] == 0 and r["verdicts"]["unparseable"] == 1, r
    assert {r["metric"] for r in results} >= {"non-live", "live", "live_relevance", "SELECT", "overall", "exact match"}
    assert "### agentbench-db" in table and "neither a call nor words" in (tmp_path / "eval" / "report.md").read_text()
    before = sum(asked.values())
    assert run(*command).stdout.splitlines()[:20] == table.splitlines()[:20] and sum(asked.values()) == before  # every item is kept


@needs_data
@pytest.mark.parametrize("mode", ["native", "prompt"])
def test_api_bank_with_gold(mode):
    """Every dialogue of the benchmark is read, and what was called is right."""
    def reply(requests):
        call = next(golds)
        return [Answer(f"[{evaluate.show([call])[0]}]", [call])]

    files = [DATA / "benchmarks" / "api_bank" / f"api_bank_{name}.jsonl" for name in ("level1_2_given_desc", "level2_toolsearcher")]
    turns = [t for file in files for line in file.read_text().splitlines() for t in json.loads(line)["turns"]]
    golds = iter([(t["api_name"], t["param_dict"]) for t in turns if t["role"] == "API"])
    records = [evaluate.play([episode], reply)[0] for episode in evaluate.api_bank(evaluate_args(data=DATA, mode=mode))]
    assert len(records) == 508
    assert [r["id"] for r in records if r["verdict"] != "right"] == []


def test_two_at_once_and_published_scores(checkpoint, tmp_path):
    """A second copy says that the first is at work; after a killed one nothing is in the way."""
    (tmp_path / "mmlu_val.jsonl").write_text("".join(json.dumps({
        "subject": "s", "question": f"q{i}", "choices": list("abcd"), "answer": "A"}) + "\n" for i in range(9)))
    command = ["evaluate.py", "--model", checkpoint, "--suite", "mmlu", "--data", tmp_path, "--out", tmp_path]
    with contextlib.closing(evaluate.claim(tmp_path, "eval")):
        done = run(*command, ok=False)
        assert done.stderr == f"error: another evaluate.py is at work in {tmp_path / 'eval'}\n" and not done.stdout
    (tmp_path / "r.json").write_text(json.dumps([REFERENCE | {"suite": "mmlu", "metric": "accuracy"}]))
    shown = run(*command, "--reference", tmp_path / "r.json").stdout
    assert "B-1 (published: leaderboard, 2025)" in shown and "B-1 (published: " in (tmp_path / "eval" / "report.md").read_text()
    assert [r["model"] for r in json.loads((tmp_path / "eval" / "results.json").read_text())] == [evaluate.name_model(checkpoint, [checkpoint])]
    (tmp_path / "file").touch()
    refused = run(*command[:-1], tmp_path / "file", ok=False)
    assert refused.stderr == f"error: --out {tmp_path / 'file'}: Not a directory\n"


def test_a_model_that_is_not_there(tmp_path, monkeypatch, capsys):
    (tmp_path / "mmlu_val.jsonl").write_text('{"subject": "s", "question": "q", "choices": ["a", "b", "c", "d"], "answer": "A"}\n')
    assert "nowhere/config.json: no such file" in run("evaluate.py", "--model", "nowhere", "--suite", "mmlu", "--data", tmp_path, "--out", tmp_path, ok=False).stderr
    refused = run("evaluate.py", "--model", "http://127.0.0.1:1/v1#m", "--suite", "mmlu", "--data", tmp_path, ok=False)
    assert "--suite mmlu needs a checkpoint directory" in refused.stderr
    monkeypatch.setattr(evaluate.Endpoint, "backoff", 0.01)
    with pytest.raises(SystemExit, match="^2$"):
        evaluate.Endpoint("http://127.0.0.1:1/v1", argparse.Namespace(parallel=1))
    assert "--model http://127.0.0.1:1/v1: " in capsys.readouterr().err
    assert "--mode prompt" in run("evaluate.py", "--suite", "bfcl", "--mode", "prompt", "--constrained", ok=False).stderr
    assert "there is no BFCL_v4_simple_python.json" in run("evaluate.py", "--suite", "bfcl", "--data", tmp_path, ok=False).stderr
    (tmp_path / "mmlu_val.jsonl").write_text("{\n")
    assert "mmlu_val.jsonl, line 1: not JSON" in run("evaluate.py", "--suite", "mmlu", "--data", tmp_path, ok=False).stderr
