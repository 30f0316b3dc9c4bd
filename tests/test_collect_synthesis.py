import itertools
import json
import threading
import time
from argparse import Namespace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import collect
from conftest import run

KEY = "sk-not-to-be-kept"
SOURCE = '''
import pathlib, typing
pathlib.Path("executed").touch()

def scale(x: int, unit: typing.Literal["m", "km"] = "m", /, *rest: float, exact=False, **more) -> list[float]:
    """Scale a length. At once."""
    return [x]

class Box:
    @functools.cache
    def put(self, items: list[int], label=pathlib.Path("a")):
        pass
    @staticmethod
    def make(n): ...
    @property
    def size(self): ...
    @size.setter
    def size(self, n): ...
    def _hidden(self): ...

try:
    async def first(): """Go first."""
except ImportError:
    def first(self): """Go first of all."""
def _private(): ...
'''


def api(name="pkg.m.f", code="def f(n: int, names=()): ...", **properties):
    properties = properties or {"n": {"type": "integer"}, "mode": {"type": "string", "enum": ["a", "b"]},
                                "names": {"type": "array", "items": {"type": "string"}},
                                "r": {"type": "number"}}
    return collect.SourceTool(
        name, "Do it.", {"type": "object", "properties": properties, "required": ["n"]}, "Do it.", "synthesize:pkg/m.py",
        "MIT", usable=True, examples=[({"n": 5}, "25")], file="pkg/m.py", signature="(n: int)", code=code)


def answer(name, *calls, **changes):
    return {"documentation": "Does it well.\n\nRaises nothing.\n", "conversations": [
        {"request": "Do it.", "calls": [{"name": name, "arguments": a}]} for a in calls or [{"n": 1}]]} | changes


def name_in(body):
    return body["messages"][0]["content"].split("\nname: ")[1].split("\n")[0]


def reply(content, tokens=100):
    content = content if isinstance(content, str) else json.dumps(content)
    return 200, {}, json.dumps({"choices": [{"message": {"content": content}}]} | ({"usage": {"total_tokens": tokens}} if tokens else {}))


@pytest.fixture
def endpoint(tmp_path, monkeypatch):
    """A local endpoint: `play` (request body -> status, headers, text) answers; `seen` keeps (path, headers,
    body).
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), None)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, self.headers, body))
            status, headers, text = state.play(body)
            try:
                self.send_response(status)
                for header in headers.items():
                    self.send_header(*header)
                self.end_headers()
                for piece in [text] if isinstance(text, str) else text:
                    self.wfile.write(piece.encode())
                    self.wfile.flush()
            except OSError:  # the client has left
                pass

        def log_message(self, *_):
            pass

    seen, server.RequestHandlerClass = [], Handler
    state = Namespace(seen=seen, play=lambda body: reply(answer(name_in(body))), args=Namespace(
        llm_url=f"http://127.0.0.1:{server.server_port}/v1/", llm_model="m", llm_parallel=1, llm_budget=10**6,
        llm_cache=tmp_path / "cache", llm_timeout=5))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(collect, "LLM_BACKOFF", 0.01)
    yield state
    server.shutdown()
    server.server_close()


def synthesise(endpoint, *apis, **changes):
    """(records, rejections) of the APIs."""
    found = list(collect.llm_synthesise(apis, Namespace(**(vars(endpoint.args) | changes))))
    return [f for f in found if isinstance(f, collect.Record)], [f for f in found if isinstance(f, dict)]


def test_source_is_read_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.py").write_text(SOURCE)
    apis = {a.name: a for a in collect.source_apis(tmp_path / "m.py", "pkg/m.py", "MIT")}
    assert not (tmp_path / "executed").exists()
    assert sorted(apis) == ["pkg.m.Box.make", "pkg.m.Box.put", "pkg.m.first", "pkg.m.scale"]
    scale, put = apis["pkg.m.scale"], apis["pkg.m.Box.put"]
    assert scale.signature == "(x: int, unit: typing.Literal['m', 'km']='m', /, *rest: float, exact=False, **more) -> list[float]"
    assert scale.parameters == {"type": "object", "required": ["x"], "properties": {
        "x": {"type": "integer"}, "unit": {"type": "string", "enum": ["m", "km"], "default": "m"},
        "rest": {"type": "array", "items": {"type": "number"}}, "exact": {"type": "boolean", "default": False}}}
    assert scale.description == "Scale a length." and (scale.source, scale.license) == ("synthesize:pkg/m.py", "MIT")
    assert put.signature == "(items: list[int], label=pathlib.Path('a'))" and put.description == ""  # without self
    assert put.code == '@functools.cache\ndef put(self, items: list[int], label=pathlib.Path("a")):\n    pass'
    assert apis["pkg.m.first"].description == "Go first of all." and apis["pkg.m.first"].signature == "(self)"


@pytest.mark.parametrize("source", [b"def f(:", b"\xff\xfe", b"x = '\0'", b"# coding: none", b"# coding: hex", b"def f(a, a): pass",
                                    b"(" * 10**5, b"def f(a=" + b"-" * 2500 + b"1): pass", b"#" * 2 * 10**6 + b"\n"],
                         ids=range(9))
def test_a_bad_source_file_is_one_rejection(tmp_path, source):
    (tmp_path / "__init__.py").write_bytes(source)
    [found] = collect.source_apis(tmp_path / "__init__.py", "pkg/__init__.py", "MIT")
    assert set(found) == {"file", "line", "reason"} and found["file"] == "pkg/__init__.py" and found["reason"]


def test_odd_source_files(tmp_path):
    """Form feeds are no line breaks to Python, __init__ is no part of a name, sources have encodings,
    docstrings long gaps.
    """
    (tmp_path / "a.py").write_bytes("# coding: latin-1\r\n\fx = 'é'\r\ndef f(n):\r\n    'a{}b'\r\n"
                                    .format("\\n" * 30000).encode("latin-1"))
    started = time.time()
    for name, full in [("pkg/__init__.py", "pkg.f"), ("__init__.py", "f"), ("a b/c.py", "a_b.c.f")]:
        [found] = collect.source_apis(tmp_path / "a.py", name, "MIT")
        assert found.name == full and found.code.startswith("def f(n):\n    'a") and time.time() - started < 3


def test_records_of_a_right_answer(endpoint, tmp_path):
    two = {"request": " Twice. ", "calls": [{"name": "pkg.m.f", "arguments": {"n": n}} for n in (1, 2)]}
    right = answer("pkg.m.f", {"n": 3, "names": ["é"]})
    right["conversations"].append(two)
    endpoint.play = lambda body: reply(f"<think>{{}}</think>Here:\n```json\n{json.dumps(right)}\n```\nDone }}")
    records, rejected = synthesise(endpoint, api())
    assert [r.id for r in records] == ["api_doc:synthesised:pkg.m.f"] + [f"instruction:synthesised:pkg.m.f:{i}" for i in (0, 1)]
    assert not rejected and {(r.source, r.license, *r.apis) for r in records} == {("synthesize:pkg/m.py", "MIT", "pkg.m.f")}
    assert records[0].text.startswith("pkg.m.f(n: int)\n\nDoes it well.\n\nRaises nothing.\n\n{")
    tool = json.loads(records[0].text.rsplit("\n\n", 2)[1])
    assert tool["parameters"] == api().parameters and tool["description"] == "Do it."
    assert records[2].tools == [{"type": "function", "function": {k: tool[k] for k in ("description", "name", "parameters")}}]
    user, assistant = records[2].messages
    assert user == {"role": "user", "content": "Twice."}
    assert [c["function"]["arguments"] for c in assistant["tool_calls"]] == ['{"n": 1}', '{"n": 2}']
    [(path, _, body)] = endpoint.seen
    assert '\narguments: [{"n": 5}]\n' in body["messages"][0]["content"]  # what the documentation shows
    assert path == "/v1/chat/completions" and (body["model"], body["temperature"]) == ("m", 0)
    assert api().code in body["messages"][0]["content"]


def test_fits_by_itself():
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}, "any": {}}, "required": ["a"]}
    assert collect.fits({"a": [], "any": None}, schema) and collect.fits({"a": [1]}, schema)
    assert not any(collect.fits(value, schema) for value in ({"a": [], "x": 1}, {"any": 1}, {"a": [True]}, {"a": [[1]]}, [], None))


def test_what_does_not_fit_is_dropped_and_the_rest_kept(endpoint):
    bad = [{"n": True}, {}, {"n": 1, "x": 2}, {"n": 1.5}, {"n": "1"}, {"n": 1, "mode": "c"}, {"n": 1, "names": ["a", 1]},
           {"n": 1, "r": float("nan")}, {"n": 1, "names": "a"}, [1], None, '{"n": 1}']
    mixed = answer("pkg.m.f", {"n": 1}, *bad)
    call = {"name": "pkg.m.f", "arguments": {"n": 1}}
    mixed["conversations"] += [{"request": request, "calls": calls} for request, calls in [
        (" ", [call]), (1, [call]), ("a", []), ("a", ["f"]), ("a", call), ("a", [call | {"name": "os.remove"}]), ("a", [call, {}])]]
    mixed["conversations"] += [{"request": "a"}, 7, [], None]
    endpoint.play = lambda body: reply(mixed)
    records, rejected = synthesise(endpoint, api())
    assert [r.id for r in records] == ["api_doc:synthesised:pkg.m.f", "instruction:synthesised:pkg.m.f:0"]
    assert [int(r["reason"].split()[1]) for r in rejected] == list(range(1, len(mixed["conversations"])))
    assert {(r["file"], r["line"]) for r in rejected} == {("pkg/m.py", "pkg.m.f")}


@pytest.mark.parametrize("content, kept", ids=range(12), argvalues=[
    ("", 0), ("no braces", 0), ("{", 0), ('{"a": ' * 5000, 0), ("[" * 9**5, 0), ("{}", 0), ('{"documentation": ["a"]}', 0), (None, 0),
    (answer("f", documentation=" "), 0), (answer("pkg.m.f", documentation="\n"), 1), (answer("f", conversations={}), 1),
    (answer("pkg.m.f", documentation="Lone \ud800."), 2)])
def test_odd_answers(endpoint, content, kept):
    null = 200, {}, '{"choices": [{"message": {"content": null}}]}'
    endpoint.play = lambda body: null if content is None else reply(content)
    records, rejected = synthesise(endpoint, api())
    assert len(records) == kept and bool(rejected) == (kept < 2)
    assert synthesise(endpoint, api()) == (records, rejected) and len(endpoint.seen) == 1  # a bad answer is not paid twice


def test_order_and_count_of_requests(endpoint):
    """The same records for 1 and 4 at once, in input order, though the first answers come last."""
    busy, most = set(), []

    def play(body):
        name = name_in(body)
        busy.add(name)
        most.append(len(busy))
        time.sleep(0.1 if name.endswith("0") else 0.01)
        busy.discard(name)
        return reply(answer(name))

    endpoint.play = play
    apis = [api(f"pkg.m.f{i}") for i in range(24)]
    apis.insert(5, {"file": "x.py", "line": 1, "reason": "passed on"})
    one = list(collect.llm_synthesise(apis, endpoint.args))
    endpoint.args.llm_parallel, endpoint.args.llm_cache = 4, endpoint.args.llm_cache / "other"
    assert max(most) == 1 and list(collect.llm_synthesise(iter(apis), endpoint.args)) == one and 1 < max(most) <= 4
    assert one[10] == apis[5] and [r.apis[0] for r in one[:10:2]] == [f"pkg.m.f{i}" for i in range(5)]
    endless = (api(f"pkg.m.f{i}") for i in itertools.count())  # must be taken as it is needed
    assert next(collect.llm_synthesise(endless, endpoint.args)) == one[0] and int(next(endless).name[7:]) <= 32


@pytest.mark.parametrize("status, headers, text, tries", [
    (200, {}, "<html>Sorry</html>", 1), (200, {}, '{"error": "x"}', 1),
    (200, {}, '{"choices": [{"message": {"content": ["a"]}}]}', 1),
    (200, {}, "[" * 9**5, 1), (401, {}, KEY, 1), (404, {}, "", 1),
    (302, {"Location": "/v1/chat/completions"}, "", 1), (500, {}, "<html>", 5), (429, {"Retry-After": "soon"}, "", 5)],
    ids=range(9))
def test_failures_are_bounded_and_the_rest_goes_on(endpoint, monkeypatch, status, headers, text, tries):
    monkeypatch.setattr(collect, "LLM_FAILURES", 2)  # in a row, which these are not
    endpoint.play = lambda body: (status, headers, text) if name_in(body)[-1] in "13" else reply(answer(name_in(body)))
    records, rejected = synthesise(endpoint, *(api(f"pkg.m.f{i}") for i in range(5)))
    assert [r.apis[0] for r in records[::2]] == ["pkg.m.f0", "pkg.m.f2", "pkg.m.f4"] and len(endpoint.seen) == 3 + 2 * tries
    assert [r["line"] for r in rejected] == ["pkg.m.f1", "pkg.m.f3"] and len(list(endpoint.args.llm_cache.iterdir())) == 3
    assert all(r["reason"].startswith("endpoint: ") and KEY not in r["reason"] for r in rejected)


def test_storm_ends_and_its_wishes_are_respected(endpoint, monkeypatch):
    waits, answers = [], iter([(429, {"Retry-After": "7"}, ""), (503, {"Retry-After": "9" * 8}, ""), (500, {}, "")])
    monkeypatch.setattr(collect.time, "sleep", waits.append)
    endpoint.play = lambda body: next(answers, None) or reply(answer(name_in(body)))
    records, rejected = synthesise(endpoint, api(), llm_timeout=20)
    assert len(records) == 2 and not rejected and [w for w in waits if w > 1e-6] == [7, 60, 0.04]


def test_a_dead_endpoint_is_given_up(endpoint, monkeypatch):
    monkeypatch.setattr(collect, "LLM_BACKOFF", 0)
    records, rejected = synthesise(endpoint, *(api(f"pkg.m.f{i}") for i in range(50)), llm_url="http://127.0.0.1:1/v1")
    reasons = [r["reason"] for r in rejected]
    assert not records and all("ConnectionRefusedError" in reason for reason in reasons[:10])
    assert reasons[10:] == 40 * ["not asked: the budget of tokens is spent, or 10 requests failed in a row"]


def test_slow_server(endpoint, monkeypatch):
    """One that is silent, one that sends a byte now and then for ever."""
    monkeypatch.setattr(collect, "LLM_RETRIES", 1)
    drip = (time.sleep(0.02) or " " for _ in range(10**6))
    endpoint.play = lambda body: time.sleep(1) or (200, {}, "") if name_in(body).endswith("0") else (200, {}, drip)
    started = time.time()
    records, rejected = synthesise(endpoint, api("pkg.m.f0"), api("pkg.m.f1"), llm_timeout=0.2, llm_parallel=2)
    assert not records and len(rejected) == 2 and time.time() - started < 5


def test_killed_run_resumes(endpoint):
    apis = [api(f"pkg.m.f{i}") for i in range(6)]
    found = collect.llm_synthesise(apis, endpoint.args)
    first = [next(found) for _ in range(5)]
    found.close()
    asked = [name_in(body) for *_, body in endpoint.seen]
    assert asked == [f"pkg.m.f{i}" for i in range(len(asked))] and 3 <= len(asked) < 6  # what was not begun is not asked
    next(endpoint.args.llm_cache.iterdir()).write_text('"half an ans')  # as after a loss of power
    records, _ = synthesise(endpoint, *apis)
    assert records[:5] == first and len(records) == 12 and len(endpoint.seen) == 6 + 1
    assert synthesise(endpoint, *apis, llm_url="http://127.0.0.1:1")[0] == records and len(endpoint.seen) == 7
    synthesise(endpoint, apis[0], llm_model="other")
    assert len(endpoint.seen) == 8 and not list(endpoint.args.llm_cache.glob("*.tmp"))


@pytest.mark.parametrize("tokens, requests", [(100, 3), (250, 1), (None, 1), ("many", 1), (-100, 1)])
def test_budget(endpoint, tokens, requests):
    """Counted by the server, or guessed from the characters, some 500 tokens; what is in the cache is
    free.
    """
    endpoint.play = lambda body: reply(answer(name_in(body)), tokens)
    apis = [api(f"pkg.m.f{i}") for i in range(8)]
    for done in (requests, 2 * requests):
        records, rejected = synthesise(endpoint, *apis, llm_budget=250)
        assert len(endpoint.seen) == done and len(records) == 2 * done and len(rejected) == 8 - done
    assert all(r["reason"].startswith("not asked: the budget of tokens is spent") for r in rejected)
    assert len(synthesise(endpoint, *apis, llm_budget=0)[0]) == 4 * requests and len(endpoint.seen) == done


def test_key_is_sent_only_when_set_and_kept_nowhere(endpoint, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    records, _ = synthesise(endpoint, api("pkg.m.f0"))
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    records += synthesise(endpoint, api("pkg.m.f1"))[0]
    assert [headers["Authorization"] for _, headers, _ in endpoint.seen] == [None, f"Bearer {KEY}"]
    kept = [f.read_text() for f in endpoint.args.llm_cache.iterdir()] + [r.to_json() for r in records]
    assert len(kept) == 6 and KEY not in "".join(kept)
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nx")  # no header can hold it: an error whose message shows it
    assert KEY not in str(synthesise(endpoint, api("pkg.m.f2")))


def test_by_templates_without_an_endpoint(tmp_path):
    source = tmp_path / "src"
    source.mkdir()
    (source / "m.py").write_text(SOURCE)
    (source / "bad.py").write_text("def f(:")
    run("collect.py", "--out", tmp_path / "out", f"synthesize:{source}", "--kinds", "single=1,parallel=1")
    records = [collect.Record.from_json(line) for shard in (tmp_path / "out").glob("*.jsonl") for line in shard.open()]
    assert [r.apis for r in records if r.domain == "api_doc"] == [["src.m.first"], ["src.m.scale"]][::-1]
    calls = [c["function"] for r in records if r.domain == "instruction" for c in r.messages[-1].get("tool_calls", [])]
    assert {c["name"] for c in calls} <= {"m.first", "m.scale"} and calls
    assert {r.id.split(":")[2] for r in records if r.domain == "instruction"} <= {"single", "parallel"}
    [rejected] = [json.loads(line) for log in (tmp_path / "out" / "rejected").iterdir() for line in log.open()]
    assert rejected["file"] == "src/bad.py" and rejected["line"] == 1 and "SyntaxError" in rejected["reason"]
    assert not (tmp_path / "executed").exists()


def tool(name, required=("count",), **changes):
    """A Tool of which requests can be made."""
    words = name.rpartition(".")[2].replace("_", " ")
    properties = {
        "count": {"type": "integer", "description": "Number of boxes."},
        "mode": {"type": "string", "enum": ["fast", "safe"]},
        "names": {"type": "array", "items": {"type": "string"}, "description": "Names of the people."},
        "ratio": {"type": "number", "nullable": True},
        "limit": {"type": "integer", "default": 20, "description": "Most boxes at once."},
    }
    schema = {"type": "object", "properties": properties, "required": [*required]}
    about = "Count the birds near {} lake {}." if ".n." in name else "Send the box called {} to {}."
    return collect.Tool(
        **{
            "name": name,
            "description": about.format(words, "at its own place"),
            "parameters": schema,
            "documentation": about.format(words, "every day"),
            "source": "s",
            "license": "MIT",
        }
        | changes
    )


def test_a_file_that_is_elsewhere_and_nothing_to_mend():
    rng, properties = collect.random.Random(0), {"path": {"type": "string"}}
    reader = tool("pkg.m.read", description="Read a table.", parameters={"properties": properties})
    failed, message, mended = collect.mend(reader, {"path": "data/a.csv"}, rng)
    assert (failed, mended) == ({"path": "data/a.csv"}, {"path": "data/a_v2.csv"})
    assert "FileNotFoundError" in message and mended["path"] in message
    assert collect.mend(reader, {"path": "a"}, rng) == (None, None, None)


KINDS = {"multiple": 4, "single": 2, "parallel": 1, "irrelevant": 1, "missing": 1, "error": 1}
SPELLED = ["ash", "birch", "cedar", "elm", "fir", "hazel", "larch", "maple", "oak", "pine", "rowan", "yew"]


def test_kinds_of_conversations():
    """Each has the form of its kind, in the shares asked for; every call fits its schema; a question names
    what the request lacks.
    """
    names = [f"pkg.{m}.{a}_{b}" for m in "mn" for a in SPELLED for b in SPELLED]
    tools = [tool(name, ["count"] if i % 2 else []) for i, name in enumerate(names)]
    tools += [tool("pkg.m.unfit", usable=False)]
    records = list(collect.synthesise(tools, 0, KINDS))
    assert [r.to_json() for r in collect.synthesise(tools, 0, KINDS)] == [r.to_json() for r in records]
    assert (
        len({r.id for r in records})
        == len({json.dumps(r.messages) for r in records})
        == len(records)
        > 3 * len(names)
    )
    counts, roles, shown = collect.Counter(), collect.defaultdict(set), collect.defaultdict(set)
    schemas = {t.name[4:]: t.parameters for t in tools}
    for r in records:
        kind, offered = r.id.split(":")[2], [t["function"]["name"] for t in r.tools]
        counts[kind] += 1
        roles[kind].add(" ".join(m["role"] + "*" * len(m.get("tool_calls", ())) for m in r.messages))
        calls = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for m in r.messages for c in m.get("tool_calls", ())]
        assert all(name in offered and collect.fits(arguments, schemas[name]) for name, arguments in calls)
        request, answer = r.messages[0]["content"], r.messages[1]["content"]
        assert not any(collect.common_run(request, t["function"]["description"]) for t in r.tools)
        assert len(offered) in {"multiple": range(2, 6), "single": [1], "irrelevant": range(1, 4)}.get(
            kind, range(1, 5)
        )
        assert r.apis[0] == r.id.split(":")[3] and {f"pkg.{name}" for name in offered} == {
            *r.apis[kind == "irrelevant" :]
        }
        shown[r.apis[0]].add(collect.re.sub(r"[\d\W]+|fast|safe", " ", request))
        for _, arguments in calls[:1]:
            assert (
                kind == "missing"
                or str(arguments.get("count", "")) in request
                and arguments.get("mode", "") in request
            )
        if kind == "missing":
            assert collect.re.findall("`(.*)`", answer) == ["count"] and "number of boxes" not in request
            assert len(r.messages) == 2 or json.dumps(calls[0][1]["count"]) in r.messages[2]["content"]
        if kind == "error":
            (first, before), (second, after), message = *calls, r.messages[2]["content"]
            [changed] = before.keys() - after.keys()  # what the request says holds for both calls
            assert first == second and before == after | {changed: before[changed]}
            assert before[changed] == schemas[first]["properties"][changed]["default"]
            assert changed in message and json.dumps(before[changed]) in message
    assert roles == {
        "multiple": {"user assistant*"},
        "single": {"user assistant*"},
        "parallel": {"user assistant**"},
        "irrelevant": {"user assistant"},
        "missing": {"user assistant", "user assistant user assistant*"},
        "error": {"user assistant* tool assistant*"},
    }
    assert (
        counts["multiple"]
        > counts["single"]
        > max(counts[k] for k in ("parallel", "irrelevant", "missing", "error"))
    )
    assert min(counts.values()) > 50 and sum(map(len, shown.values())) > 3 * len(
        names
    )  # several shapes a function
    only = collect.Counter(
        r.id.split(":")[2] for r in collect.synthesise(tools, 0, {"single": 1.0, "missing": 3.0})
    )
    assert only.keys() == {"single", "missing"}


def test_conversations_on_what_examples_show():
    """A call of the documentation has its result and an answer; a chain gives the result of one call to
    another.
    """
    add = tool("pkg.m.add_boxes", examples=[({"count": 7, "mode": "safe"}, "1234567")])
    add.chains = [
        (("pkg.m.add_boxes", {"count": 7}, "1234567"), ("pkg.m.sort_boxes", {"count": 1234567}, "'sorted'"))
    ]
    records = list(collect.synthesise([add, tool("pkg.m.sort_boxes")], 0, {"single": 1.0, "chain": 1.0}))
    shown, chain = records[0].messages, next(r.messages for r in records if ":chain:" in r.id)
    assert [m["role"] for m in shown] == ["user", "assistant", "tool", "assistant"] and shown[2][
        "content"
    ] == "1234567"
    assert (
        json.loads(shown[1]["tool_calls"][0]["function"]["arguments"]) == {"count": 7, "mode": "safe"}
        and "1234567" in shown[3]["content"]
    )
    assert [m["role"] for m in chain] == ["user", *2 * ["assistant", "tool"], "assistant"]
    assert "the result" in chain[0]["content"] and "1234567" not in chain[0]["content"]
    assert json.loads(chain[3]["tool_calls"][0]["function"]["arguments"]) == {"count": 1234567}


@pytest.mark.parametrize("documentation, name, purposes", [
    ("Compute the mean of data.", "mean", [("do", "compute the mean of data")]),
    ("Return the harmonic mean of data.", "harmonic_mean",
     [("give", "the harmonic mean of data"), ("give", "the harmonic mean")]),
    ("Return True if n is a prime number.", "isprime", [("check", "n is a prime number")]),
    ("Raised when a value is wrong.", "wrong", []),
    ("An element of a domain.", "domain", [("give", "an element of a domain")]),
    ("Wrapper around the system call.", "call", []), ("See numpy.ndarray.", "array", []), ("", "f", []),
    ("Recursively delete a directory tree.", "rmtree", [("do", "recursively delete a directory tree")]),
    ("Number of groups of order n.", "groups", [("give", "the number of groups of order n")]),
    ("Do that which this object needs.", "need", []), ("Return the sum over the given axis.", "add", [])])
def test_purposes(documentation, name, purposes):
    assert [*collect.find_purposes(name, documentation, False)] == purposes


def test_values_follow_name_type_and_description():
    """Of a person's kind, and within what the schema and the words say."""
    properties = {
        "path": {"type": "string", "description": "Directory to list."},
        "url": {"type": "string"},
        "start_date": {"type": "string"},
        "scale": {"type": "array", "items": {"type": "number"}, "description": "Must be positive."},
        "matrix": {"type": "array", "items": {"type": "array", "items": {"type": "number"}}},
        "data": {"type": "object"},
        "level": {"type": "integer", "default": 3, "description": "How deep."},
        "verbose_log": {"type": "boolean", "default": False},
        "how": {"type": "string", "enum": ["a", "b"], "default": "a"},
        "text": {"type": "string"},
        "temperature": {"type": "number"},
    }
    made, schema = collect.defaultdict(list), {
        "type": "object",
        "properties": properties,
        "required": [*properties],
    }
    for seed in range(200):
        arguments = collect.random_arguments(tool("pkg.m.f", parameters=schema), collect.random.Random(seed))
        assert collect.fits(arguments, schema)
        for name, value in arguments.items():
            made[name].append(value)
    assert all("/" in v and not v.endswith((".csv", ".json")) for v in made["path"]) and all(
        "://" in v for v in made["url"]
    )
    assert all(v[:2] in ("19", "20") for v in made["start_date"]) and all(min(v) > 0 for v in made["scale"])
    assert all(len(row) == len(v) for v in made["matrix"] for row in v) and all(made["data"])
    assert 3 not in made["level"] and set(made["verbose_log"]) == {True} and set(made["how"]) == {"b"}
    assert any(" " in v for v in made["text"]) and any(type(v) is float for v in made["temperature"])
    assert not collect.choices(
        tool("pkg.m.f", parameters={"properties": {"cb": {}, "g": {"type": "object", "title": "Graph"}}}), "g"
    )


def test_calls_in_the_examples_of_a_source_file(tmp_path):
    (tmp_path / "m.py").write_text(
        'def area(width, height=1):\n    """Area of a field.\n\n    >>> area(3, height=4)\n    12\n'
        '    >>> area(x)\n    1\n    >>> print(area(2.5))\n    2.5\n    >>> area(1\n    """\n'
    )
    [found] = collect.source_apis(tmp_path / "m.py", "m.py", "MIT")
    assert (
        found.examples == [({"width": 3, "height": 4}, "12"), ({"width": 2.5}, "2.5")] and found.usable
    )


def test_tools_are_named_by_their_last_two_parts():
    """Unless two of them would then have one name. Where they come from, `apis` still tells: the called ones
    first, then the others.
    """
    tools = [tool(name) for name in ("pkg.m.send_one", "pkg.m.send_all", "other.m.send_one")]
    for chosen, names in ((tools[:2], {"m.send_one", "m.send_all"}), (tools, {t.name for t in tools})):
        for r in collect.synthesise(chosen, 0, {"multiple": 1.0}):
            offered = {t["function"]["name"] for t in r.tools}
            assert offered in ({*r.apis}, {name.partition(".")[2] for name in r.apis}) and len(
                offered
            ) == len(r.apis)
            assert offered <= names or len(offered) < len(chosen)
            assert r.apis[0].endswith(r.messages[-1]["tool_calls"][0]["function"]["name"])


def test_a_model_from_the_command_line(endpoint, tmp_path):
    source = tmp_path / "m.py"
    source.write_text("def f(n: int): pass\ndef g(n: int): pass\n")
    endpoint.play = lambda body: reply(answer(name_in(body)))
    options = "--llm-url", endpoint.args.llm_url, "--llm-model", "big", "--llm-parallel", 2, "--llm-timeout", 9
    run("collect.py", "--out", tmp_path / "out", f"synthesize:{source}", *options, "--llm-budget", 150)
    records = [json.loads(line) for shard in (tmp_path / "out").glob("*.jsonl") for line in shard.open()]
    assert sorted(r["id"] for r in records) == sorted(f"{kind}:synthesised:m.{f}{end}" for f in "fg" for kind, end in (("api_doc", ""), ("instruction", ":0")))
    assert {body["model"] for _, _, body in endpoint.seen} == {"big"}
    run("collect.py", "--out", tmp_path / "out", f"synthesize:{source}", *options, "--llm-budget", 1)  # another budget: done anew, from the cache
    assert len(endpoint.seen) == 2
    run("collect.py", "--out", tmp_path / "new", f"synthesize:{source}", *options, "--llm-budget", 1, "--llm-parallel", 1)
    [rejected] = [json.loads(line) for log in (tmp_path / "new" / "rejected").iterdir() for line in log.open()]
    assert len(endpoint.seen) == 3 and "budget" in rejected["reason"]


AWKWARD = r"""
def number_lines(text: str, start: int = 1):
    '''Number the lines of a text from a first number on.

    Args:
        text: The text whose lines to number.
        start: The first number, a positive integer.
    '''

def read_report(path: str, key: str | int = 0):
    '''Read one sheet of a workbook file.

    Args:
        path: The workbook file.
        key: Name or index of the sheet.
    '''

def draw_samples(n: int, λ: float = 0.5):
    '''Draw random samples from a population of sheep.

    Args:
        n: How many samples to draw.
        λ: The mean of the samples.
    '''

def split_path(text: str, sep='/'):
    '''Split a path into its parts.

    Args:
        text: The path to split.
        sep ('/' or '\\'): What to split at.
    '''
"""


def test_awkward_parameters_cost_nothing(tmp_path):
    """The default is the only value, or of another type than the value; a Greek name; a lone backslash."""
    (tmp_path / "awkward.py").write_text(AWKWARD, encoding="utf-8")
    run("collect.py", "--out", tmp_path / "out", f"synthesize:{tmp_path / 'awkward.py'}")
    lines = [line for shard in (tmp_path / "out").glob("*.jsonl") for line in shard.open(encoding="utf-8")]
    records = [collect.Record.from_json(line) for line in lines]
    names = {name.rpartition(".")[2] for r in records if r.domain == "api_doc" for name in r.apis}
    assert names == {"number_lines", "read_report", "draw_samples", "split_path"}
    made = {name.rpartition(".")[2] for r in records if r.domain == "instruction" for name in r.apis}
    assert {"number_lines", "draw_samples", "split_path"} <= made
