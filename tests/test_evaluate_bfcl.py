"""The scorer of BFCL against the official one (pip install --no-deps bfcl-eval==2026.3.23 mpmath), and hostile answers against ours."""
import importlib
import inspect
import itertools
import json
import random
import sys
import types

import pytest

import evaluate
from conftest import ROOT

DATA = ROOT.parent / "shared" / "data" / "benchmarks" / "bfcl_v4"
pytestmark = pytest.mark.skipif(not DATA.exists(), reason="needs the questions and answers of BFCL in ../shared/data")
AST = [c for c in evaluate.SINGLE_TURN if not c.endswith("relevance")]
NATIVE, PROMPT = (types.SimpleNamespace(data=DATA, mode=mode, limit=None) for mode in ("native", "prompt"))


def items(category):
    """[(entry, gold or None)]"""
    def read(path):
        return [json.loads(line) for line in path.read_text().splitlines()]

    name = f"BFCL_v4_{category}.json"
    gold = {} if category.endswith("relevance") else {row["id"]: row["ground_truth"] for row in read(DATA / "possible_answer" / name)}
    return [(entry, gold.get(entry["id"])) for entry in read(DATA / name)]


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """The official checker and decoder, without what they import of model handlers."""
    pytest.importorskip("bfcl_eval", reason="needs the official package: pip install --no-deps bfcl-eval==2026.3.23 mpmath")

    class AnyModel(dict):
        def __missing__(self, key):
            return types.SimpleNamespace(underscore_to_dot=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BFCL_PROJECT_ROOT", str(tmp_path_factory.mktemp("bfcl")))
        for name, attributes in {"constants.model_config": {"MODEL_CONFIG_MAPPING": AnyModel()},
                                 "model_handler.parser.java_parser": {"parse_java_function_call": None},
                                 "model_handler.parser.js_parser": {"parse_javascript_function_call": None}}.items():
            patch.setitem(sys.modules, f"bfcl_eval.{name}", types.SimpleNamespace(**attributes))
        names = ("retry", "retry_if_exception_message", "retry_if_exception_type", "wait_random_exponential")
        patch.setitem(sys.modules, "tenacity", types.SimpleNamespace(**dict.fromkeys(names)))
        check = importlib.import_module("bfcl_eval.eval_checker.ast_eval.ast_checker").ast_checker
        languages = importlib.import_module("bfcl_eval.constants.enums").Language
        decode = importlib.import_module("bfcl_eval.model_handler.utils").default_decode_ast_prompting

    def right(functions, calls, gold, category):
        language = languages(evaluate.LANGUAGES.get(category, "python"))
        return check(functions, [{name: arguments} for name, arguments in calls], gold, language, category, "m")["valid"]

    return types.SimpleNamespace(right=right, decode=decode)


# ----------------------------------------------------------------------------------------------------------------------
# Answers made from golds, and those with one thing changed


def source(value, kind, language, inner=None):
    """A value as the source text that stands for it in Java or JavaScript."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"{value}{'L' * (kind == 'long')}{'f' * (kind == 'float' and language == 'java')}{'n' * (kind == 'Bigint')}"
    if isinstance(value, dict):
        texts = {k: json.dumps(v) if isinstance(v, str) and language == "java" else source(v, None, language) for k, v in value.items()}
        if language == "javascript":
            return f"{{{', '.join(f'{k}: {text}' for k, text in texts.items())}}}"
        return f"new HashMap<String, Object>() {{{{ {''.join(f'put(%s, %s); ' % (json.dumps(k), text) for k, text in texts.items())}}}}}"
    if isinstance(value, list):
        bare = kind == "Array" and inner == "String"  # BFCL keeps the quotes of an array's elements, its golds have none
        texts = ", ".join(json.dumps(v) if isinstance(v, str) and not bare else source(v, inner, language) for v in value)
        if language == "javascript":
            return f"[{texts}]"
        return f"new ArrayList<>(Arrays.asList({texts}))" if kind == "ArrayList" else f"new Object[]{{{texts}}}"
    return value


def first(options):
    return next((o for o in options if o != ""), "")


def gold_answer(entry, gold, category):
    """The calls that give the first acceptable values."""
    language, calls = evaluate.LANGUAGES.get(category, "python"), []
    for name, parameters in ((name, parameters) for call in gold for name, parameters in call.items()):
        schemas, arguments = next(f for f in entry["function"] if f["name"] == name)["parameters"]["properties"], {}
        for p, options in parameters.items():
            if p in schemas and options != [""]:
                value, items = first(options), schemas[p].get("items", {}).get("type")
                value = {k: first(o) for k, o in value.items()} if isinstance(value, dict) else value
                value = [{k: first(o) for k, o in v.items()} for v in value] if items == "dict" else value
                arguments[p] = value if language == "python" else source(value, schemas[p]["type"], language, items)
        calls.append((name, arguments))
    return calls


SOURCES = ["new int[]{1, 2}", "[1, 'a']", "{}", "{a: 1, 'b': [2]}", "true", "5", "-5L", "1.5f", "null", "new HashMap<>()", "new ArrayList<>()", "'x'",
           "5n", "[[1, 2], [3]]", "-1e3", "new Array(1, 2)", 'new ArrayList<String>() {{ add("a"); add("b"); }}',
           "[[1],\n [2]]", "new Object[]{1.5f, 2L, 3}", "", 5, None, True, ["x"]]


def changed(value, language):
    """Other values in the place of one; some of them mean the same."""
    if language != "python":
        return [value + "L", value[:-1], f'"{value}"', f"'{value}'", value.upper(), value + " ", value.replace('"', ""), value.replace(", ", ","),
                *SOURCES]
    if isinstance(value, dict):
        return [*({k: v for k, v in value.items() if k != gone} for gone in value), value | {"extra": 1}, {}, [value], str(value),
                *(value | {k: other} for k, v in value.items() for other in changed(v, language)[:5])]
    if isinstance(value, (list, tuple)):
        rest, value = value[1:], list(value)
        return [value[::-1], [], value[:-1], value * 2, tuple(value), [value], value + [None], [str(v) for v in value], "x", [{}],
                *([other, *rest] for v in value[:1] for other in changed(v, language))]
    if isinstance(value, str):
        return [value.upper(), value + ".", value.replace(" ", "_"), value.replace("'", '"'), value + "x", "", 1, None, [value], {"a": value},
                value.encode()]
    if value is None:
        return ["None", 0, False, ""]
    return [value + 1, -value, True, False, 1, 0, 1.0, float(value), int(value), str(value), value + 0.5, None, [value], 10**400, complex(value)]


def mutations(calls, language, draw):
    """Calls like these with one thing changed."""
    for i, (name, arguments) in enumerate(calls):
        others = [[], [(name, arguments)] * 2, [(name + "_", arguments)], [("", {})], [(name, {})], [(name, arguments | {"extra": 1})],
                  [(name, arguments | {None: "x"})], [(name, dict(zip(arguments, list(arguments.values())[::-1])))]]
        for p, value in arguments.items():
            others += [[(name, {k: v for k, v in arguments.items() if k != p})], [(name, {k + "s" * (k == p): v for k, v in arguments.items()})]]
            others += [[(name, arguments | {p: v})] for v in draw.sample(changed(value, language), 4 if language == "python" else 20)]
        yield from (calls[:i] + other + calls[i + 1:] for other in others)
    yield from (calls[::-1], draw.sample(calls, len(calls)), calls * 2, [])


def text_of(calls):
    return f"[{', '.join(evaluate.show(calls))}]"


# ----------------------------------------------------------------------------------------------------------------------
# Against the official package

# Golds that contradict their own schema, and 2 lists of mixed types in Java; with quotes, 8 arrays of Java strings would be wrong, too.
WRONG_GOLDS = {"live_simple": 2, "live_multiple": 3, "simple_java": 2}


@pytest.mark.parametrize("category", AST)
def test_golds(official, category):
    wrong = 0
    for entry, gold in items(category):
        calls = gold_answer(entry, gold, category)
        right, kind = evaluate.check_call(entry["function"], calls, gold, evaluate.LANGUAGES.get(category, "python"))
        assert right == (kind is None) == official.right(entry["function"], calls, gold, category), entry["id"]
        wrong += not right
    assert wrong == WRONG_GOLDS.get(category, 0)


def test_changed_answers(official):
    """The same verdict with one thing changed, whatever it is: True for 1, 1.0 for an integer, an argument too many, another order..."""
    draw, seen, right, breaks = random.Random(0), 0, 0, 0
    for category in AST:
        language = evaluate.LANGUAGES.get(category, "python")
        for entry, gold in items(category):
            for calls in mutations(gold_answer(entry, gold, category), language, draw):
                ours, kind = evaluate.check_call(entry["function"], calls, gold, language)
                try:
                    expected = official.right(entry["function"], calls, gold, category)
                except Exception:
                    expected, breaks = False, breaks + 1  # wrong, we say
                assert ours == expected, (entry["id"], calls, kind)
                seen, right = seen + 1, right + ours
    assert seen > 80_000 and 0.1 * seen < right < 0.5 * seen and breaks < 0.01 * seen


def test_random_schemas(official):
    """The same verdict where type, gold and value have little to do with each other."""
    draw, seen, right = random.Random(2), 0, 0

    def value(depth=0):
        kind = draw.random() if depth < 2 else 1
        if kind < 0.2:
            return [value(depth + 1) for _ in range(draw.randrange(3))]
        if kind < 0.4:
            return {k: value(depth + 1) for k in draw.sample("kl", draw.randrange(3))}
        return draw.choice(["", 1, 0, True, 1.0, 2.5, "a", "A ^b", "Ab", None])

    def gold_value():
        parts = [{k: [value(1) for _ in range(2)] for k in draw.sample("kl", draw.randrange(3))} for _ in range(draw.randrange(3))]
        return draw.choice([value(), parts, *parts])

    def given(gold):
        if isinstance(gold, dict):
            return {k: draw.choice(options) if isinstance(options, list) and options else options for k, options in gold.items()}
        return [given(v) for v in gold] if isinstance(gold, list) and draw.random() < 0.7 else gold

    for _ in range(30_000):
        schema = {"type": draw.choice(["string", "integer", "float", "boolean", "array", "array", "tuple", "dict", "any"])}
        schema["items"] = {"type": draw.choice(["string", "integer", "float", "dict", "array"])}
        tools = [{"name": "f", "parameters": {"properties": {"a": schema}, "required": []}}]
        options = [gold_value() for _ in range(draw.randrange(1, 4))]
        calls = [("f", {"a": given(draw.choice(options)) if draw.random() < 0.8 else value()})]
        try:
            expected = official.right(tools, calls, [{"f": {"a": options}}], "simple")
        except Exception:
            continue  # such a gold breaks it
        assert evaluate.check_call(tools, calls, [{"f": {"a": options}}])[0] == expected, (schema, options, calls)
        seen, right = seen + 1, right + expected
    assert seen > 25_000 and right > 2_000


PIECES = ["new ", "int", "String", "[]", "{", "}", "{{", "}}", "(", ")", "ArrayList", "HashMap", "<>", "<String>", "<a, b>", "Arrays.asList(",
          'put("k", ', "add(", ");", ",", ", ", "1", "-2", "5L", "1.5f", "2e3", "1.5", '"a"', "'b'", "true", "null", "[", "]", "[[", "]]",
          "Array(", ": ", "a:", "\n", "n", '"', "'", "x"]
BEGINNINGS = ["", "new int[]{", "new ArrayList<>(Arrays.asList(", "new ArrayList<String>() {{ ", 'new HashMap<a, b>() {{ put("k", ', "[", "[[", "{",
              "{a: ", "new Array(", "new Array(["]


@pytest.mark.parametrize("language, kinds", [("java", "byte integer float double long boolean char Array ArrayList HashMap String any"),
                                             ("javascript", "String integer float Bigint Boolean dict array any")], ids=["java", "javascript"])
def test_random_sources(official, language, kinds):
    """The same value of any text that looks a little like one."""
    prefix = {"java": "java", "javascript": "js"}[language]
    theirs = vars(importlib.import_module(f"bfcl_eval.eval_checker.ast_eval.type_convertor.{prefix}_type_converter"))[f"{prefix}_type_converter"]
    ours, draw, converted = vars(evaluate)[f"{language}_value"], random.Random(3), 0
    some = [(draw.choice(BEGINNINGS) + "".join(draw.choices(PIECES, k=draw.randrange(9))), draw.choice(kinds.split()),
             draw.choice([None, *kinds.split()])) for _ in range(20_000)]
    for text, kind, inner in itertools.chain(some, itertools.product([t for t in SOURCES if isinstance(t, str)], kinds.split(), [None])):
        try:
            expected = theirs(text, kind, inner)
        except ValueError:
            continue  # "5n\n" as a Bigint
        assert repr(ours(text, kind, inner)) == repr(expected), (text, kind, inner)
        converted += expected != text
    assert converted > 300


TEXTS = ["", "[]", "abc", "f(a=1)", "```[f(a=1)]```", "'[f(a=1)]'", "[f(a=-1, b=+1, c=not True)]", "[f(a=...)]", "[f(a=g(b=1), c=g(1))]",
         "[f(a=x.y)]",
         "[f(a=x[1:2])]", "[f(**{'a': 1})]", "[f(1, a=2)]", "[f(a=lambda: 1)]", "[f(a={1, 2})]", "[f(a=b'x', b=1j)]",
         "[f(a=5 / 100 * 2**3 - 7 // 2)]", "[f(a={[]: 1})]", "[f(a=1)](b=2)", "f()(a=1)", "[1]", "{f(a=1)}", "(f(a=1), g())", "f(a=1), g(b=2)",
         "[f(a=1/0)]", "[f(a=1, a=2)]",
         "f(a=f'{x}')", "[f(a=(1, 2))]", '[{"name": "f", "arguments": {}}]', "I cannot (yet).", "python\n[f(a=1)]", "[f(a='\\d')]",
         "[f(a=None, b=name)]", "f(a=1", "[f(a=-x)]"]


@pytest.mark.filterwarnings("ignore:invalid escape")
def test_decoding(official):
    """Texts, whole and cut off, are decoded to the same calls or are none in both."""
    draw, texts, found = random.Random(1), list(TEXTS), 0
    for category in set(AST) - set(evaluate.LANGUAGES):
        for text in (text_of(gold_answer(entry, gold, category)) for entry, gold in items(category)):
            texts += [text, text[1:-1], text[:draw.randrange(len(text))], text[draw.randrange(len(text)):], text.replace("(", "(\n", 1), text + "."]
    for text in texts:
        try:
            expected = [call for calls in official.decode(text) for call in calls.items()]
        except Exception:
            expected = None
        assert evaluate.parse_python_calls(text) == expected, text
        found += expected is not None
    assert 0.3 * len(texts) < found < 0.8 * len(texts)


@pytest.mark.parametrize("text", ["[f(a='x' + 'y')]", "[f(a=[1] * 2)]", "[f(a=len('abc') + 1)]", "[f(a=1 << 2)]", "[f(a=2**2000)]"])
def test_nothing_is_evaluated(text):
    """Where we differ from the original decoder: it calls eval() on what stands about an operator."""
    assert evaluate.parse_python_calls(text) is None


@pytest.mark.parametrize("text, calls", [
    ('[A.f(a="x", b=\'c\', c=-5L, d=new int[]{1, 2})]', [("A.f", {"a": "x", "b": "c", "c": "-5L", "d": "new int[]{1, 2}"})]),
    ("f(a=x.y(1, 2), b=true);", [("f", {"a": "x.y(1, 2)", "b": "true"})]), ("f()", [("f", {})]), ("f(a='it\\'s')", [("f", {"a": "it\\'s"})]),
    ("f(a={x: 1, 'y': [1, 2]}, b=(x) => x > 1, c=`t${1}`)", [("f", {"a": "{x: 1, 'y': [1, 2]}", "b": "(x) => x > 1", "c": "`t${1}`"})]),
    ('f("x", y, a=1)', [("f", {None: "y", "a": "1"})]), ("f(1, a=2)", [("f", {"a": "2"})]), ("f(a=1), g()", [("f", {"a": "1"}), ("g", {})]),
    ("f(a=new HashMap<K, V>() {{ put(1, 2); }})", [("f", {"a": "new HashMap<K, V>() {{ put(1, 2); }}"})]), ("", []), ("[]", []), ("f", None),
    ("f(a=1, a=2)", None), ("f(a=(1)", None), ("f(a=1]", None), ("f(a='x)", None), ("f(a=1,)", None), ("new F(a=1)", None), ("No.", None)])
def test_source_calls(text, calls):
    assert evaluate.parse_source_calls(text) == calls


@pytest.mark.parametrize("convert, text, kind, value", [
    ("javascript_value", "[" + "[1]," * 5000, "array", ["[1"]), ("java_value", "new HashMap<>() {" + " " * 20_000, "HashMap", {}),
    ("java_value", "new ArrayList<>() {{" + " " * 20_000, "ArrayList", [])], ids=["arrays", "hash map", "list"])
def test_repetition_takes_no_time(convert, text, kind, value):
    """The original patterns take 2**n or n**4 steps here, and a model that repeats itself writes just this."""
    assert vars(evaluate)[convert](text, kind) == value


# ----------------------------------------------------------------------------------------------------------------------
# Episodes


def play(episode, reply):
    """The record of an episode, each of whose requests is answered by `reply`."""
    episode, answer = episode(), None
    while True:
        try:
            answer = reply(*episode.send(answer))
        except StopIteration as end:
            return end.value


def answer_once(category, entry, gold, args, text, calls=(), **more):
    answer = evaluate.Answer(text, list(calls) if args.mode == "native" else [], **more)
    record = play(lambda: evaluate.single_turn(entry, gold, category, args), lambda messages, tools: answer)
    json.dumps(record)
    return record


@pytest.mark.parametrize("args", [NATIVE, PROMPT], ids=["native", "prompt"])
def test_gold_scores_all(args):
    """An endpoint that answers with gold: 100% where gold itself does."""
    def quoted(v):
        return json.dumps(v, ensure_ascii=False) if v[:3] != "new" and v[:1] not in "[{`" else v

    for category in evaluate.SINGLE_TURN:
        wrong = 0
        for entry, gold in items(category):
            calls = gold_answer(entry, gold, category) if gold else [] if category.endswith("irrelevance") else [("f", {})]
            text = text_of(calls) if calls else "No function fits this."
            if category in evaluate.LANGUAGES:
                text = ", ".join(f"{name}({', '.join(f'{k}={quoted(v)}' for k, v in arguments.items())})" for name, arguments in calls)
            record = answer_once(category, entry, gold, args, text, calls)
            assert record["verdict"] == ("right" if record["scores"][category] else "wrong")
            wrong += not record["scores"][category]
        assert wrong == WRONG_GOLDS.get(category, 0), category


def test_tools():
    """Types are JSON Schema's; Java's parameters are strings."""
    entry, gold = items("simple_java")[1]
    messages, (tool,) = next(evaluate.single_turn(entry, gold, "simple_java", NATIVE))
    parameters = tool["function"]["parameters"]
    assert parameters["type"] == "object" and "HashMap" in parameters["properties"]["params"]["description"]
    assert {p["type"] for p in parameters["properties"].values()} == {"string"} and messages == entry["question"][0]
    for category in set(evaluate.SINGLE_TURN) - set(evaluate.LANGUAGES):
        for entry, gold in items(category):
            tools = json.dumps(next(evaluate.single_turn(entry, gold, category, NATIVE))[1])
            assert not any(f'"type": "{kind}"' in tools for kind in ("dict", "float", "tuple", "any"))
    messages, tools = next(evaluate.single_turn(*items("simple_python")[0], "simple_python", PROMPT))
    assert tools is None and [m["role"] for m in messages] == ["system", "user"] and '"name": "calculate_triangle_area"' in messages[0]["content"]


@pytest.mark.parametrize("args", [NATIVE, PROMPT], ids=["native", "prompt"])
@pytest.mark.parametrize("text, ended, verdict", [
    ("abc", True, "unparseable"), ("", True, "unparseable"), ("a a a a a a", True, "unparseable"), ("I have no function", False, "unparseable"),
    ("</tool_call> <tools> one two three", True, "unparseable"), ('{"name": "f", "arguments": {"x"', True, "unparseable"),
    ("get_weather(city='Paris', now", True, "unparseable"), ("I would call f(city='Paris') now", True, "unparseable"), ("[]", True, "abstained"),
    ("I have no function(s) for that.", True, "abstained"), ("没有合适的函数", True, "abstained"),
    ("<think>f(a=1)?</think>No function fits this.", True, "abstained")])
def test_verdicts_without_calls(args, text, ended, verdict):
    """Garbage must not look like a wise refusal, though officially it scores as one."""
    for category in ("simple_python", "simple_java", "live_relevance", "irrelevance"):
        refused = category == "irrelevance"
        record = answer_once(category, *items(category)[0], args, text, ended=ended)
        assert "city" not in text or args is NATIVE or record["failure"] == "no call that can be read"
        assert record["verdict"] == ("right" if refused and verdict == "abstained" else verdict) and record["scores"] == {category: float(refused)}
        record = answer_once(category, *items(category)[0], args, text, error="timeout")
        assert record["verdict"] == "error" and record["scores"] == {category: 0.0}


HOSTILE = ["__import__('os').system('touch canary')", "[f(a=open('canary', 'w'))]", "[f(a=1 + open('canary', 'w').write('x'))]", "{0.__class__}",
           "import os; os.system('touch canary')", "f(a=f'{open(\"canary\", \"w\")}')", "f(a=9**9**9**9)", f"[f(a={'*'.join(['10**999'] * 9)})]",
           "%s%n{}", "\x00", "[f(a='\ud800')]", "\ud800", "1" * 10_000, f"f(a={'9' * 5000})", "f(a='" + "\\" * 1001, "new HashMap<" * 500,
           "(" * 100_000, "[" * 100_000, "-" * 100_000 + "1", "f(a=" * 3000, f"f(a={'[' * 150}{']' * 150})", f"a{'.b' * 50_000}()",
           f"f(a={'1+' * 20_000}1)", f"f(a={'not ' * 5000}1)"]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_canaries(text, tmp_path, monkeypatch):
    """What a model writes is never run, never raises, and never is a refusal."""
    monkeypatch.chdir(tmp_path)
    deep = json.loads("[" * 900 + "]" * 900)
    for category in ("simple_python", "simple_java", "simple_javascript", "parallel", "irrelevance"):
        assert answer_once(category, *items(category)[0], PROMPT, text)["verdict"] in ("wrong", "unparseable")
        assert answer_once(category, *items(category)[0], NATIVE, text, [("f", {"a": deep, text: text})])["verdict"] == "wrong"
    for language, kind in itertools.product(("python", "java", "javascript"), (*evaluate.TYPES, "no such type")):
        tools = [{"name": "f", "parameters": {"properties": {"a": {"type": kind}}}}]
        assert not evaluate.check_call(tools, [("f", {"a": text[:5000]})], [{"f": {"a": ["x"]}}], language)[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("schema", [{}, True, None, [], {"type": None}, {"type": ["integer", "null"]}, {"type": {}}, {"type": "x", "items": []},
                                    {"type": "array"}, {"type": "array", "items": True}, {"type": "array", "items": {"type": "object"}}], ids=str)
def test_any_schema(schema):
    """JSON Schemas of other APIs, which BFCL's checker cannot read: none of them raises, and the gold itself is right."""
    for value in (1, 1.5, "a", True, None, [], [1, "a"], [[1]], {}, {"a": [1], "b": {"c": {}}}, [{"a": 1}]):
        for parameters in ({"properties": {"a": schema}}, {"properties": {"a": schema}, "required": ["a"]}, {}, None):
            tools = [{"name": "f", "parameters": parameters}]
            gold = evaluate.as_gold(tools, [("f", {"a": value})])
            assert not evaluate.check_call(tools, [("f", {"a": "other"})], gold)[0]
            right, kind = evaluate.check_call(tools, [("f", {"a": value})], gold)
            if "object" not in str(schema) or value not in ([1, "a"], [[1]]):  # lists of other than objects
                assert (right, kind) == ((True, None) if parameters else (False, "unexpected parameter"))


# ----------------------------------------------------------------------------------------------------------------------
# Multi-turn


@pytest.fixture(scope="module")
def conversations(official):
    """[(category, entry, gold, episode, gold calls of each turn)]"""
    pytest.importorskip("mpmath", reason="needs mpmath, as the simulated mathematics does")
    episodes, found = dict(evaluate.bfcl(NATIVE)), []
    for category, (entry, gold) in ((category, item) for category in evaluate.MULTI_TURN for item in items(category)):
        methods = evaluate.World(entry).methods
        turns = [[(name, dict(zip(inspect.signature(methods[name]).parameters, positional)) | arguments)
                  for name, arguments, positional in map(evaluate.gold_call, texts)] for texts in gold]
        found.append((category, entry, gold, episodes[entry["id"]], turns))
    return found


def follow(turns, prompted=False):
    """Makes each turn's calls in one step, then ends the turn."""
    answers = iter([answer for calls in turns for answer in [evaluate.Answer(text_of(calls), [] if prompted else calls)] * bool(calls)
                    + [evaluate.Answer("All done now.", [])]])
    return lambda messages, tools: next(answers)


def test_multi_turn_golds(conversations):
    for category, entry, gold, episode, turns in conversations:
        before = json.dumps(turns)
        record = play(episode, follow(turns))
        assert json.dumps(turns) == before  # an API may keep and change what it is given
        assert record["verdict"] == "right" and record["scores"] == {category: 1.0}, entry["id"]
    assert len(conversations) == 800
    long, short = (len(evaluate.World(c[1]).call("find", {})) for c in (conversations[-200], conversations[0]))
    assert long > 5 * short


def test_multi_turn_changed(conversations):
    """A call dropped, an argument changed, a call too many, a turn's calls reversed: the official verdict."""
    official = importlib.import_module("bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker").multi_turn_checker
    extra = [("mkdir", {"dir_name": "new"}), ("lockDoors", {"unlock": True, "door": ["driver"]}), ("add", {"a": 1, "b": 2}), ("no_such", {})]
    draw, seen = random.Random(0), []
    for n, (category, entry, gold, episode, turns) in enumerate(draw.sample(conversations, 160)):
        turns = [list(calls) for calls in turns]
        calls = draw.choice([calls for calls in turns if calls])
        i = draw.randrange(len(calls))
        name, arguments = calls[i]
        other = {k: v + "x" if isinstance(v, str) else v for k, v in arguments.items()} or {"x": 1}
        if [] in turns and n % 2:
            turns[turns.index([])] = [turns[turns.index([]) + 1].pop(0)]  # too early, while nothing should be done
        else:
            before, after = calls[:i], calls[i + 1:]
            more = draw.choice([*extra, calls[i]])
            calls[:] = [before + after, [*before, (name, other), *after], [*before, more, *calls[i:]], calls[::-1]][n // 2 % 4]
        expected = official([[evaluate.show(calls)] if calls else [] for calls in turns], gold, entry, category, f"m{n}")["valid"]
        record = play(episode, follow(turns))
        assert (record["verdict"] == "right") is expected, (entry["id"], record)
        seen.append(expected)
    assert 20 < sum(seen) < 140
    entry, gold = conversations[0][1], [["pwd()", "pwd()"]]  # twice wanted, once done
    assert not official([[["pwd()"]]], gold, entry, "multi_turn_base", "once")["valid"]
    docs = {"GorillaFileSystem": [], "TwitterAPI": []}
    assert play(lambda: evaluate.multi_turn(docs, entry, gold, "multi_turn_base", NATIVE), follow([[("pwd", {})]]))["failure"] == "wrong result"


def test_multi_turn_ends(conversations):
    """A turn without a call fails; the 21st step of a turn is one too many; an endpoint's failure is an error."""
    episode, turns = conversations[0][3:]
    for answer, verdict in (("abc", "unparseable"), ("I will not do this.", "abstained")):
        assert play(episode, lambda messages, tools: evaluate.Answer(answer, []))["verdict"] == verdict
    assert play(episode, lambda messages, tools: evaluate.Answer("", None, error="timeout"))["verdict"] == "error"
    for steps, failure in ((20, "neither a call nor words"), (21, "too many steps")):
        answers = iter([evaluate.Answer("", [("ls", {})])] * (steps - len(turns[0])) + [evaluate.Answer("", [call]) for call in turns[0]])
        record = play(episode, lambda messages, tools: next(answers, evaluate.Answer("", [])))
        assert len(record["calls"][0]) == steps and record["failure"] == failure


@pytest.mark.parametrize("name, arguments", [
    ("__init__", {}), ("_load_scenario", {"scenario": {}}), ("__class__", {}), ("os.system", {"command": "ls"}), ("", {}),
    ("power", {"base": 9, "exponent": 10**9}), ("multiply", {"a": "x", "b": 10**12}), ("square_root", {"number": 2, "precision": 10**9}),
    ("add", {"a": 1, "b": 2, "c": 3})])
def test_only_public_methods_are_called(conversations, name, arguments):
    world = evaluate.World(next(c[1] for c in conversations if "MathAPI" in c[1]["involved_classes"]))
    assert world.call(name, arguments).startswith("Error during execution: ") and world.call("add", {"a": 1, "b": 2}) == '{"result": 3}'


@pytest.mark.parametrize("args", [NATIVE, PROMPT], ids=["native", "prompt"])
def test_withheld_functions(conversations, args):
    """The functions of miss_func are told of in their turn, not before."""
    category, entry, gold, _, turns = next(c for c in conversations if c[0] == "multi_turn_miss_func")
    ((at, names),) = entry["missed_function"].items()
    reply, seen = follow(turns, args is PROMPT), []

    def look(messages, tools):
        text = messages[0]["content"] + json.dumps(tools)
        seen.append(all(f'"name": "{name}"' in text for name in names))
        return reply(messages, tools)

    assert play(dict(evaluate.bfcl(args))[entry["id"]], look)["verdict"] == "right"
    before = sum(1 + bool(calls) for calls in turns[:int(at)])
    assert seen == [False] * before + [True] * (len(seen) - before)


def test_totals():
    """Live counts items, non-live categories; what was not measured has no total."""
    scores = {"simple_python": (400, 1), "simple_java": (100, 0), "simple_javascript": (50, 0), "multiple": (200, 1), "parallel": (200, 0),
              "parallel_multiple": (200, 0), "live_simple": (3, 1), "live_multiple": (5, 0), "live_parallel": (1, 0),
              "live_parallel_multiple": (1, 0), "irrelevance": (2, 1), "live_irrelevance": (8, 1), "live_relevance": (2, 0),
              **{c: (2, c == "multi_turn_base") for c in evaluate.MULTI_TURN}}
    found = {"bfcl": [{"id": f"{c}{i}", "scores": {c: float(score)}} for c, (n, score) in scores.items() for i in range(n)]}
    results = {r["metric"]: r["score"] for r in evaluate.summarise("bfcl", found, ["bfcl"])}
    totals = {"non-live": 1 / 3, "live": 0.3, "multi-turn": 0.25, "overall": (1 / 3 + 0.3 + 0.25) / 3, "v3": ((1 / 3 + 1 + 1) / 5 + 11 / 20 + 0.25) / 3,
              "v2": (2 / 3 + 1 / 2 + 1) / 6}
    assert {name: results[name] for name in evaluate.BFCL_TOTALS} == pytest.approx(totals)
    del found["bfcl"][-1]["scores"]["multi_turn_long_context"], found["bfcl"][-2]["scores"]["multi_turn_long_context"]
    assert {r["metric"] for r in evaluate.summarise("bfcl", found, ["bfcl"])} >= {"non-live", "live", "v2"} and "v3" not in {
        r["metric"] for r in evaluate.summarise("bfcl", found, ["bfcl"])}
