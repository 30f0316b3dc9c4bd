import argparse
import copy
import functools
import gzip
import inspect
import json
import random
import re
import signal
import subprocess
import sys
import time

import pytest

import collect
from conftest import ROOT, run


DATA = ROOT.parent / "shared" / "data"
PACKAGES = ("python:mpmath,requests", "synthesize:python")


def read(directory):
    return [json.loads(line) for shard in sorted(directory.glob("*.jsonl")) for line in shard.open(encoding="utf-8")]


def package_of(tmp_path, **modules):
    """An importable package on disk, as collect.py sees one."""
    root = tmp_path / "pkg"
    root.mkdir()
    (root / "__init__.py").write_text("")
    for name, source in modules.items():
        (root / f"{name}.py").write_text(source)
    return collect.describe_package("pkg", "1.0", "MIT", "", ["pkg"], [tmp_path], [])


def test_what_is_stale_is_of_that_source_alone(tmp_path):
    names = ["python.foo-12345678.jsonl", "python.foo-bar-12345678.jsonl", "python.foo-0abcdef0.jsonl"]
    for name in names:
        (tmp_path / name).touch()
    collect.remove_stale(tmp_path, ["python.foo-"], {"python.foo-0abcdef0.jsonl": None})
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])


def test_fingerprints_know_all_of_a_pattern():
    first, second = (argparse.Namespace(license=None, only_license=re.compile("x" * 250 + end), exclude_license=None) for end in "ab")
    assert collect.fingerprint(first) != collect.fingerprint(second) and collect.fingerprint(first) == collect.fingerprint(first)


def test_the_license_that_a_text_is_and_not_one_that_it_names(tmp_path):
    (tmp_path / "COPYING").write_text("GNU GENERAL PUBLIC LICENSE\n  Version 2, June 1991\n... the GNU Lesser General Public License instead.")
    assert collect.nearby_license(tmp_path, tmp_path) == "GPL-2.0"


def test_a_package_named_like_a_script_here(tmp_path, monkeypatch):
    """The child imports the installed package, and a broken link in it costs nothing."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "evaluate").mkdir()
    (tmp_path / "evaluate" / "__init__.py").write_text(GOOD)
    (tmp_path / "evaluate" / "lock.py").symlink_to(tmp_path / "gone")
    package = collect.describe_package("evaluate", "1.0", "MIT", "", ["evaluate"], [tmp_path], [])
    assert [path.name for path, *_ in package.files] == ["__init__.py"]
    objects, rejected = collect.introspect(package, 30)[:2]
    assert [api["name"] for api in collect.name_apis(objects, package).values()] == ["evaluate.double"] and not rejected


GOOD = 'def double(x: int, times: int = 2) -> int:\n    """Multiply a number by two, or more.\n\n    >>> double(4)\n    8\n    """\n'


def test_a_bad_module_costs_itself_alone(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    package = package_of(
        tmp_path, a_good=GOOD, b_hangs="import time\ntime.sleep(60)", c_exits="import sys\nsys.exit(3)",
        d_dies="import os\nos._exit(7)", e_crashes="import ctypes\nctypes.string_at(0)",
        f_prints="import os\nprint('noise')\nos.write(1, b'more noise')\n" + GOOD.replace("double", "triple"),
        g_raises="raise RuntimeError('no')", h_warns="import warnings\nwarnings.warn('old')\n" + GOOD.replace("double", "quad"),
        i_reads="input()", j_writes="open('left_behind', 'w')\n" + GOOD.replace("double", "fifth"),
        k_opens="import webbrowser, tkinter\nwebbrowser.open('http://127.0.0.1')\ntkinter.Tk()")
    started = time.time()
    objects, rejected = collect.introspect(package, 2.0)
    names = {api["name"] for api in collect.name_apis(objects, package).values()}
    assert names == {"pkg.a_good.double", "pkg.f_prints.triple", "pkg.h_warns.quad", "pkg.j_writes.fifth"}
    reasons = dict(rejected)
    assert set(reasons) == {f"pkg.{m}" for m in ("b_hangs", "c_exits", "d_dies", "e_crashes", "g_raises", "i_reads", "k_opens")}
    assert reasons["pkg.b_hangs"] == "over 2.0 s" and "7" in reasons["pkg.d_dies"] and "SystemExit" in reasons["pkg.c_exits"]
    assert time.time() - started < 20 and "noise" not in capfd.readouterr().out
    assert not (ROOT / "left_behind").exists()


def test_one_api_once_under_its_public_name(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    package = package_of(
        tmp_path, _impl=GOOD + 'class _Base:\n    def go(self, n=1):\n        """Go n steps onward."""\n',
        api="from pkg._impl import double, _Base\n"
            'class Walker(_Base):\n    """Walks along a path."""\nclass Runner(_Base):\n    """Runs along a path."""\n')
    (tmp_path / "pkg" / "__init__.py").write_text("from pkg._impl import double\n")
    objects, _ = collect.introspect(package, 5.0)
    assert [a["name"] for a in collect.distinct(collect.name_apis(objects, package))] == \
        ["pkg.api.Runner", "pkg.api.Runner.go", "pkg.api.Walker", "pkg.double"]


def test_environment_and_paths_stay_private(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SOME_API_KEY", "sk-secret")
    package = package_of(tmp_path, m="import os, sys\ndef run(env=dict(os.environ), python=sys.executable, home=os.path.expanduser('~')):\n"
                         '    """Run something somewhere."""\n')
    objects, _ = collect.introspect(package, 5.0)
    [document] = collect.api_documents(collect.name_apis(objects, package), package)
    assert "PYTHONHASHSEED" in document.text and "/usr" in document.text
    for private in ("sk-secret", sys.prefix, str(ROOT)):
        assert private not in document.text


def test_documents_and_trajectories(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    source = '''
def half(x: float, *, exact: bool = False):
    """Divide a number by two.

    First the simple case.

    >>> half(4.0)
    2.0

    Then an error, after a step of preparation.

    >>> y = "a"
    >>> half(y)
    Traceback (most recent call last):
        ...
    TypeError: not a number
    """
'''
    package = package_of(tmp_path, m=source)
    objects, _ = collect.introspect(package, 5.0)
    apis = collect.name_apis(objects, package)
    [document] = collect.api_documents(apis, package)
    assert document.text.startswith("pkg.m.half(x: float, *, exact: bool = False)\n\nDivide a number by two.")
    assert "license: MIT" in document.text and document.apis == ["pkg.m.half"]
    [trajectory] = collect.trajectories(apis, package)
    assert [m["role"] for m in trajectory.messages] == 2 * ["user", "assistant", "tool", "assistant"]
    called = [c["function"] for m in trajectory.messages for c in m.get("tool_calls", [])]
    assert called[0] == {"name": "pkg.m.half", "arguments": '{"x": 4.0}'}  # literal arguments: the API itself is the tool
    assert called[1] == {
        "name": "python",
        "arguments": json.dumps({"code": 'from pkg.m import half\ny = "a"\nhalf(y)'}),
    }
    assert "4.0" in trajectory.messages[0]["content"] and "2.0" in trajectory.messages[3]["content"]
    assert trajectory.messages[4]["content"] == "Then an error, after a step of preparation."
    assert trajectory.messages[6]["content"].endswith("TypeError: not a number")
    assert trajectory.messages[7]["content"] == "That fails: TypeError: not a number"
    assert {t["function"]["name"] for t in trajectory.tools} == {"python", "pkg.m.half"}
    half = next(t["function"] for t in trajectory.tools if t["function"]["name"] == "pkg.m.half")
    assert half["parameters"] == {"type": "object", "required": ["x"],
                                  "properties": {"x": {"type": "number"}, "exact": {"type": "boolean", "default": False}}}


EXAMPLES = '''
def push(n: int):
    """Put a number on the stack.

    >>> push(3)
    >>> push(n=4)
    >>> top()
    4
    """

def top():
    """Return the number on the top.

    >>> data = [1, 2]
    >>> total(data)
    3
    >>> found = total(values=[1, 2, 3])
    >>> found
    6
    >>> print(math.floor(total([0.5])))
    0
    >>> total([6
    7
    """

def total(values, start=0):
    """Add numbers up.

    >>> import math
    >>> double(total([3, 4]))
    14
    >>> total([10000, 20000])
    30000
    >>> double(30000)
    60000
    """

def double(x):
    """Multiply a number by two."""
'''


METHODS = '''
class Strange:
    """Something whose attributes have no truth value.""" 

    def __call__(self):
        pass

    @property
    def __name__(self):
        return self

    def __bool__(self):
        raise TypeError("neither true nor false")


col = Strange()


class Words:
    """Some words, kept as they come."""

    def __init__(self, words):
        self.words = words

    @property
    def upper(self) -> "Words":
        return Words([w.upper() for w in self.words])

    def first(self, n=1):
        """Show the first n words.

        >>> from pkg.m import col, Words
        >>> words = Words(['a', 'b'])
        >>> words.first(n=2)
        ['a', 'b']
        >>> words.upper.first()
        ['A']
        >>> Words(["c"]).first()
        ['c']
        >>> other = col()
        >>> words = Words(["d", "e", other])
        >>> words.first()
        ['d']
        >>> words.first(n=2)
        ['d', 'e']
        """
        return self.words[:n]

    broken = col

    def add(self, word):
        """Add a word to the end.

        >>> from pkg.m import Words
        >>> words = Words(['a'])
        >>> words.add('b')
        2
        >>> unused = 3
        >>> words.words
        ['a', 'b']
        """
        self.words.append(word)
        return len(self.words)
'''


def test_code_takes_along_what_it_needs():
    """Names that a statement without a result reads are kept with it; what is spare waits, what is
    overwritten goes.
    """
    def step(code, binds=None):
        return {"code": code, "binds": binds, "call": None, "on": None}

    before = [step("old = 1", "old"), step("G = [0]", "G"), step("n = 3", "n"), step("old = 2", "old"),
              step("put(G, weight=n)"), step("later = 4", "later")]
    run, later = collect.parted(step("show(old)"), before)
    assert [s["code"] for s in run] == ["G = [0]", "n = 3", "old = 2", "put(G, weight=n)", "show(old)"]
    assert [s["code"] for s in later] == ["later = 4"]


def test_methods_are_told_their_object(tmp_path, monkeypatch):
    """A method is a tool of its own where its object has a name in the Python session, or an expression that
    stands alone; code that comes later has what changed the object.
    """
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    package = package_of(tmp_path, m=METHODS)
    objects, _ = collect.introspect(package, 5.0)
    apis = collect.name_apis(objects, package)
    records = {t.id.rpartition(".")[2]: t for t in collect.trajectories(apis, package)}
    calls = {name: [(c["function"]["name"], json.loads(c["function"]["arguments"]))
                    for m in t.messages for c in m.get("tool_calls", [])] for name, t in records.items()}
    assert calls["first"] == [
        ("pkg.m.Words.first", {"object": "pkg.m.Words(['a', 'b'])", "n": 2}),
        ("python", {"code": "from pkg.m import col, Words\nwords = Words(['a', 'b'])\nwords.upper.first()"}),
        ("pkg.m.Words.first", {"object": "pkg.m.Words(['c'])"}),
        ("python", {"code": "other = col()\nwords = Words([\"d\", \"e\", other])\nwords.first()"}),
        ("pkg.m.Words.first", {"object": "words", "n": 2}),
    ]
    assert calls["add"] == [
        ("pkg.m.Words.add", {"object": "pkg.m.Words(['a'])", "word": "b"}),
        ("python", {"code": "from pkg.m import Words\nwords = Words(['a'])\nwords.add('b')\nwords.words"}),
    ]
    [tool] = [t["function"] for t in records["add"].tools if t["function"]["name"] != "python"]
    assert tool["parameters"]["required"] == ["object", "word"]
    methods = [t for t in collect.package_tools(apis, package) if t.name.endswith(("first", "add"))]
    assert len(methods) == 2 and not any(t.usable for t in methods)


def test_what_examples_call(tmp_path, monkeypatch):
    """By name with literals or names for such; effects without an output are kept, imports added, broken
    steps left out.
    """
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    package = package_of(tmp_path, m=EXAMPLES)
    objects, _ = collect.introspect(package, 5.0)
    apis = collect.name_apis(objects, package)
    trajectories = {
        t.id.rpartition(".")[2]: [
            (c["function"]["name"], json.loads(c["function"]["arguments"]))
            for m in t.messages
            for c in m.get("tool_calls", [])
        ]
        for t in collect.trajectories(apis, package)
    }
    assert trajectories["push"] == [("pkg.m.push", {"n": 3}), ("pkg.m.push", {"n": 4}), ("pkg.m.top", {})]
    *named, (python, code) = trajectories["top"]
    assert named == [("pkg.m.total", {"values": [1, 2]}), ("pkg.m.total", {"values": [1, 2, 3]})]
    assert python == "python" and code == {"code": "from pkg.m import total\nimport math\n"
                                           "print(math.floor(total([0.5])))"}
    tools = {t.name: t for t in collect.package_tools(apis, package)}
    assert ({"values": [1, 2, 3]}, "6") in tools["pkg.m.total"].examples
    assert tools["pkg.m.double"].examples == [({"x": 30000}, "60000")]
    assert [second for _, second in tools["pkg.m.total"].chains] == [("pkg.m.double", {"x": 30000}, "60000")]


@pytest.mark.parametrize("stated, schema", [
    ("int", {"type": "integer"}), ("Optional[str]", {"type": "string"}), ("float | None", {"type": "number"}),
    ("array_like", {"type": "array"}), ("list of int", {"type": "array", "items": {"type": "integer"}}),
    ("{'C', 'F'}, optional", {"type": "string", "enum": ["C", "F"]}), ("Literal['a', 'b']", {"type": "string", "enum": ["a", "b"]}),
    ("dict[str, int]", {"type": "object"}),
    ("int or list[str]", {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}]}),
    ("str | bool", {"type": ["string", "boolean"]}),
    ("int, a positive number", {"type": "integer"}), ("T.Any | int", {}),
    ("Callable[[int], str]", {}), ("Tensor", {"type": "array"}), ("Printer", {}), ("", {})])
def test_type_schema(stated, schema):
    assert collect.type_schema(stated) == schema


def test_signature_from_documentation():
    signature = collect.find_signature(None, "add(input, other, *, alpha=1, out=None) -> Tensor\n\nAdds other to input.")
    assert str(signature) == "(input, other, *, alpha=1, out=None)"
    assert str(collect.find_signature(None, "add(input[, other]) -> Tensor\n\nAdds.")) == "(input, other=...)"
    assert [p.kind for p in signature.parameters.values()].count(inspect.Parameter.KEYWORD_ONLY) == 2


def test_conversations_of_the_default(raw):
    """Every call names a tool at hand, fits its schema and is said; none is of an exception; the shares are
    those asked for.
    """
    conversations = [r for r in read(raw) if r["domain"] == "instruction"]
    tools = {t.name: t for path in (raw / "tools").glob("python.*") for t in collect.read_tools(path)}
    figures, kinds = collect.Counter(), collect.Counter(r["id"].split(":")[2] for r in conversations)
    for record in conversations:
        collect.count_calls(record, figures)
        schemas = {t["function"]["name"]: t["function"]["parameters"] for t in record["tools"]}
        kind, messages = record["id"].split(":")[2], record["messages"]
        for i, call in ((i, c["function"]) for i, m in enumerate(messages) for c in m.get("tool_calls", [])):
            arguments = json.loads(call["arguments"])
            assert collect.fits(arguments, schemas[call["name"]]), record["id"]
            said = "\n".join(m["content"] for m in messages[:i])
            for value in arguments.values():
                shown = (
                    value
                    if isinstance(value, str)
                    else "None" if value is None else json.dumps(value, ensure_ascii=False)
                )
                assert kind == "chain" or shown in said or json.dumps(value, ensure_ascii=False) in said, (
                    record["id"],
                    value,
                )
        assert all(tools[name].usable for name in record["apis"])
    assert len(conversations) >= 12_000 and len({json.dumps(r["messages"]) for r in conversations}) == len(
        conversations
    )
    calls = [figures["instruction", "arguments", n] for n in range(4)]
    assert calls[0] <= 0.25 * sum(calls) and calls[2] + calls[3] >= 0.35 * sum(calls)
    assert figures["instruction", "copied"] <= 0.15 * len(conversations)
    assert figures["instruction", "near"] >= 0.5 * figures["instruction", "others"]
    assert kinds.keys() == collect.KINDS.keys() and kinds["chain"] >= 50 and kinds["error"] >= 200
    for exception in ("builtins.ValueError", "requests.HTTPError", "sympy.polys.polyerrors.PolynomialError"):
        assert exception not in tools or not tools[exception].usable


def test_parameters_and_trajectories_of_the_default(raw):
    """Shares that the documentation of an installation reaches."""
    tools = [t for path in (raw / "tools").glob("python.*") for t in collect.read_tools(path)]
    parameters = [p for t in tools for p in t.parameters["properties"].values()]
    assert (
        sum(bool({"type", "anyOf", "enum"} & p.keys()) for p in parameters) >= 0.7 * len(parameters) > 30_000
    )
    figures = collect.Counter()
    for record in read(raw):
        if record["domain"] == "trajectory":
            collect.count_calls(record, figures)
            assert record["messages"][-1]["role"] == "assistant" and record["messages"][-1]["content"]
    assert figures["trajectory", "by name"] >= figures["trajectory"] / 3
    assert figures["trajectory", "empty"] <= 0.15 * figures["trajectory", "results"]


def test_default_environment(raw):
    """The counts the README speaks of, and ids that are unique."""
    records = read(raw)
    ids = [r["id"] for r in records]
    assert len(ids) == len(set(ids))
    documented = [r for r in records if r["domain"] == "api_doc" and len(r["apis"]) == 1]
    assert len(documented) > 20_000 and len({r["apis"][0] for r in documented}) == len(documented)
    assert (
        sum(m["role"] == "tool" for r in records if r["domain"] == "trajectory" for m in r["messages"])
        > 20_000
    )
    names = {r["apis"][0] for r in documented}
    assert {"json.dumps", "numpy.roll", "torch.nn.Linear", "sympy.sin", "torch.Tensor.abs", "textwrap.shorten"} <= names
    assert all(r["license"] for r in records)
    assert any("Traceback" in m["content"] for r in records if r["domain"] == "trajectory" for m in r["messages"] if m["role"] == "tool")


def test_killed_and_run_again_gives_the_same(small_raw, tmp_path):
    command = [sys.executable, str(ROOT / "collect.py"), "--out", str(tmp_path), "--code-mb", "0.2", *PACKAGES]
    for seconds in (0.3, 1.0):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("*.jsonl")} == {p.name: p.read_bytes() for p in small_raw.glob("*.jsonl")}


def test_upgraded_package_replaces_the_old(small_raw, tmp_path):
    for path in small_raw.glob("*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "python.mpmath-01234567.jsonl").write_text("")
    run("collect.py", "--out", tmp_path, *PACKAGES, "--code-mb", 0.2, "--workers", 1)
    assert {p.name for p in tmp_path.glob("*.jsonl")} == {p.name for p in small_raw.glob("*.jsonl")}


def test_seed_changes_the_conversations_alone(small_raw, tmp_path):
    for path in small_raw.glob("*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    run("collect.py", "--out", tmp_path, *PACKAGES, "--code-mb", 0.2, "--seed", 1)
    old, new = ({p.name for p in d.glob("*.jsonl")} for d in (small_raw, tmp_path))
    assert (
        len(old & new) == 2 and len(new - old) == len(old - new) == 3
    )  # the cards and two files of conversations


def test_unknown_package_is_named(tmp_path):
    assert "no_such_package" in run("collect.py", "--out", tmp_path, "python:no_such_package", ok=False).stderr


@pytest.mark.parametrize("line", ["", "[]", "{", '{"id": "a"}', '{"id": 1, "domain": "text", "source": "", "license": "", "apis": [], "text": ""}',
                                  '{"id": "a", "domain": "song", "source": "", "license": "", "apis": [], "text": ""}',
                                  '{"id": "a", "domain": "trajectory", "source": "", "license": "", "apis": [], "text": "x"}',
                                  '{"id": "a", "domain": "text", "source": "", "license": "", "apis": [], "text": "", "more": 1}'])
def test_bad_record(line):
    with pytest.raises(ValueError):
        collect.Record.from_json(line)


def test_record_round_trip():
    record = collect.Record("a", "text", "s", "MIT", [], "ü\n\u2028")
    assert collect.Record.from_json(record.to_json()) == record


@pytest.mark.parametrize("module", ["collect", "build_corpus", "evaluate"])
def test_examples_in_docstrings(module):
    import doctest
    assert doctest.testmod(__import__(module)).failed == 0


# ----------------------------------------------------------------------------------------------------------------------
# Files: specifications, code, prose

SPEC = {
    "openapi": "3.1.0", "info": {"title": "Pet Store", "version": "1.2", "license": {"name": "MIT"}},
    "paths": {"/pets/{id}": {
        "parameters": [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}, {"$ref": "#/components/parameters/Lang"}],
        "get": {"operationId": "pets/get-one", "summary": "Get one pet by its <b>id</b>.", "description": "See below.",
                "parameters": [{"name": "id", "in": "path", "required": True, "description": "The number", "schema": {"type": "integer"}}],
                "responses": {"200": {"description": "A pet", "content": {"text/xml": {}, "application/json": {"schema": {"$ref": "#/components/schemas/Pet"}}}},
                              "404": {"description": "No such pet"}}},
        "put": {"requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Pet"}}}}},
        "post": {"requestBody": {"content": {"application/json": {"schema": {"properties": {"id": {"type": "string"}}}}}}}}},
    "components": {
        "parameters": {"Lang": {"name": "lang", "in": "query", "schema": {"enum": ["en", "de"]}}},
        "schemas": {"Named": {"properties": {"name": {"type": "string"}}, "required": ["name"]},
                    "Pet": {"allOf": [{"$ref": "#/components/schemas/Named"}, {"properties": {
                        "parent": {"$ref": "#/components/schemas/Pet"}, "tags": {"type": "array", "items": {"type": "string"}},
                        "size": {"oneOf": [{"type": "integer"}, {"type": "string"}]}}}]}}}}

DISCOVERY = {"kind": "discovery#restDescription", "name": "drive", "schemas": {"File": {"type": "object", "properties": {
    "title": {"type": "string"}, "up": {"$ref": "File"}}}}, "resources": {"files": {"resources": {"deep": {"methods": {"copy": {
        "id": "drive.files.copy", "httpMethod": "POST", "path": "files/{fileId}", "description": "Copies a file.", "response": {"$ref": "File"},
        "parameters": {"fileId": {"type": "string", "required": True}, "tag": {"type": "string", "repeated": True}}, "request": {"$ref": "File"}}}}}}}}
BOTOCORE = {"metadata": {"serviceId": "S3", "serviceFullName": "Storage"}, "operations": {"Get": {
    "http": {"method": "GET", "requestUri": "/x"}, "input": {"shape": "In"}, "documentation": "<p>Gets the keys.</p><p>All of them.</p>"}}, "shapes": {
    "In": {"type": "structure", "required": ["Keys"], "members": {"Keys": {"shape": "Keys", "documentation": "<p>Which.</p>"}, "Tree": {"shape": "Tree"}}},
    "Keys": {"type": "list", "member": {"shape": "Text"}}, "Text": {"type": "string"}, "Tree": {"type": "map", "value": {"shape": "Tree"}}}}


def operations(tmp_path, spec, reader=None, name="spec.json"):
    """{API name: (record, tool definition)} of one specification."""
    path = tmp_path / name
    path.write_text(spec if isinstance(spec, str) else json.dumps(spec))
    records = list((reader or collect.openapi_records)(path, name, "unknown", None))
    return {r.apis[0]: (r, json.loads(r.text.rsplit("\n\n", 2)[1])) for r in records if isinstance(r, collect.Record)}


def test_openapi_3(tmp_path):
    found = operations(tmp_path, SPEC)
    assert set(found) == {"Pet_Store.pets_get_one", "Pet_Store.put_pets_id", "Pet_Store.post_pets_id"}
    record, tool = found["Pet_Store.pets_get_one"]
    assert record.license == "MIT" and record.text.startswith("Pet_Store.pets_get_one: GET /pets/{id}\n\nGet one pet by its id.\n\nSee below.")
    assert "404: No such pet" in record.text and "Package: Pet Store 1.2, license: MIT" in record.text
    assert tool["description"] == "Get one pet by its id." and tool["parameters"] == {
        "type": "object", "required": ["id"], "properties": {"id": {"type": "integer", "description": "The number"}, "lang": {"enum": ["en", "de"]}}}
    pet = {"type": "object", "required": ["name"], "properties": {
        "name": {"type": "string"}, "parent": {"type": "object", "description": "Pet, as above"},
        "tags": {"type": "array", "items": {"type": "string"}}, "size": {"anyOf": [{"type": "integer"}, {"type": "string"}]}}}
    assert tool["returns"] == pet
    assert found["Pet_Store.put_pets_id"][1]["parameters"]["properties"] == {"id": {"type": "string"}, "lang": {"enum": ["en", "de"]}, **pet["properties"]}
    assert found["Pet_Store.put_pets_id"][1]["parameters"]["required"] == ["id", "name"]
    clash = found["Pet_Store.post_pets_id"][1]["parameters"]  # the body has an `id` too
    assert set(clash["properties"]) == {"id", "lang", "body"} and clash["required"] == ["id"]


def test_openapi_2(tmp_path):
    [(record, tool)] = operations(tmp_path, {"swagger": "2.0", "info": {"title": "Old"}, "definitions": {"A/b": {"type": "object", "properties": {"x": {"type": "number"}}}}, "paths": {
        "/do": {"post": {"parameters": [{"name": "n", "in": "query", "type": "integer", "required": True},
                                        {"name": "what", "in": "body", "required": True, "schema": {"$ref": "#/definitions/A~1b"}}],
                         "responses": {"default": {"description": "", "schema": {"type": "array", "items": {"type": "string"}}}}}}}}).values()
    assert record.apis == ["Old.post_do"] and tool["description"] == "POST /do"
    assert tool["parameters"] == {"type": "object", "properties": {"n": {"type": "integer"}, "x": {"type": "number"}}, "required": ["n"]}
    assert tool["returns"] == {"type": "array", "items": {"type": "string"}}


def test_discovery(tmp_path):
    [(record, tool)] = operations(tmp_path, DISCOVERY, collect.discovery_records).values()
    assert record.apis == ["drive.files.copy"] and tool["parameters"]["required"] == ["fileId"]
    assert tool["parameters"]["properties"] == {
        "fileId": {"type": "string"}, "tag": {"type": "array", "items": {"type": "string"}}, "title": {"type": "string"},
        "up": {"type": "object", "description": "File, as above"}}


def test_botocore(tmp_path):
    [(record, tool)] = operations(tmp_path, BOTOCORE, collect.botocore_records).values()
    assert record.text.startswith("s3.Get: GET /x\n\nGets the keys.\n\nAll of them.\n\n") and tool["parameters"] == {
        "type": "object", "required": ["Keys"], "properties": {
            "Keys": {"type": "array", "description": "Which.", "items": {"type": "string"}},
            "Tree": {"type": "object", "additionalProperties": {"type": "object", "description": "Tree, as above"}}}}


def test_commands(tmp_path):
    page = "# git add\n\n> Adds changes to the index.\n> More information: <https://git-scm.com>.\n\n- Add a file:\n\n`git add {{path/to/file}}`\n"
    (tmp_path / "linux").mkdir()
    [(record, tool)] = operations(tmp_path, page, collect.command_records, "linux/git-add.md").values()
    assert record.apis == ["commands.linux.git_add"] and tool["description"] == "Adds changes to the index."
    assert "More information: <https://git-scm.com>." in record.text and "Add a file:\ngit add {{path/to/file}}" in record.text
    assert operations(tmp_path, json.dumps({"source": "pages/osx/a.md", "text": page.replace("git add", "say")}), collect.command_records, "pages.jsonl").keys() == {"commands.osx.say"}


@pytest.mark.parametrize("spec, reason", [
    ("{", "cannot be parsed"), ("[]", "not an object"), ("[" * 100_000, "nested too deep"), ('{"openapi": "3.0.0"', "cannot be parsed"),
    ("{}", "not an OpenAPI"), ('{"openapi": "4.0"}', "not an OpenAPI"), ('{"openapi": "3.0.0", "paths": []}', "not an OpenAPI")])
def test_what_is_no_specification(tmp_path, spec, reason):
    with pytest.raises(ValueError, match=reason):
        operations(tmp_path, spec)


def test_a_packed_specification_may_not_grow_beyond_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "MAX_SPEC", 10**6)
    (tmp_path / "good.json.gz").write_bytes(gzip.compress(json.dumps(SPEC).encode()))
    assert len(list(collect.openapi_records(tmp_path / "good.json.gz", "good", "MIT", None))) == 3
    (tmp_path / "bomb.json.gz").write_bytes(gzip.compress(b" " * 10**7))
    (tmp_path / "cut.json.gz").write_bytes(gzip.compress(json.dumps(SPEC).encode())[:200])
    for name in ("bomb", "cut"):
        with pytest.raises(ValueError, match="over 1 MB" if name == "bomb" else "ended before"):
            list(collect.openapi_records(tmp_path / f"{name}.json.gz", name, "MIT", None))


def test_yaml_names_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ValueError, match="pip install pyyaml"):
        operations(tmp_path, "openapi: 3.0.0", name="spec.yaml")


def test_references_without_end(tmp_path):
    """A chain of 10,000, a ring, a reference to itself, and schemas whose expansion would have 8^50 nodes."""
    schemas = {f"c{i}": {"$ref": f"#/components/schemas/c{i + 1}"} for i in range(10_000)} | {"c10000": {"type": "string"}}
    schemas |= {"a": {"$ref": "#/components/schemas/b"}, "b": {"$ref": "#/components/schemas/a"}, "s": {"items": {"$ref": "#/components/schemas/s"}}}
    schemas |= {f"w{i}": {"properties": {f"p{k}": {"$ref": f"#/components/schemas/w{i + 1}"} for k in range(8)}} for i in range(50)}
    body = {"properties": {name: {"$ref": f"#/components/schemas/{name}"} for name in ("c0", "a", "s", "w0")}}
    spec = {"openapi": "3.0.0", "info": {"title": "t"}, "components": {"schemas": schemas}, "paths": {
        "/": {"post": {"requestBody": {"content": {"application/json": {"schema": body}}}}}}}
    started = time.time()
    [(record, tool)] = operations(tmp_path, spec).values()
    assert set(tool["parameters"]["properties"]) == {"c0", "a", "s", "w0"} and len(record.text) < 300_000 and time.time() - started < 5


@pytest.mark.parametrize("spec, reader", [(SPEC, "openapi_records"), (DISCOVERY, "discovery_records"), (BOTOCORE, "botocore_records")])
def test_nonsense_in_specifications(tmp_path, spec, reader):
    """Any part of a specification replaced by anything else: no error but ValueError, and no endless loop."""
    rng, junk = random.Random(0), [None, 0, "x", "", [], {}, [None], {"$ref": 1}, {"$ref": "#/paths"}, {"$ref": "other.yaml#/x"}, True, [[]]]
    read = 0
    for _ in range(400):
        broken = node = copy.deepcopy(spec)
        for _ in range(rng.randrange(1, 9)):
            if not isinstance(node, (dict, list)) or not node:
                break
            key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
            parent, node = node, node[key]
        parent[key] = rng.choice(junk)
        try:
            read += bool(operations(tmp_path, broken, getattr(collect, reader)))
        except ValueError:
            pass
    assert read > 200


def test_code_and_text(tmp_path):
    tree = tmp_path / "tree"
    (tree / "sub" / ".git").mkdir(parents=True)
    code = "# SPDX-License-Identifier: BSD-2-Clause\n" + "x = 1  # a line of code\n" * 20
    files = {"good.py": code, "sub/plain.go": code.split("\n", 1)[1], "min.js": "x" * 5000, "gen.rs": "// Code generated by tool. DO NOT EDIT.\n" + code,
             "zero.c": code + "\0", "sub/.git/hidden.py": code, "LICENSE": "Permission is hereby granted, free of charge, to any person",
             "sub/COPYING": "Apache License\n   Version 2.0, January 2004"}
    for name, text in files.items():
        (tree / name).write_text(text)
    prose = tmp_path / "prose"
    prose.mkdir()
    (prose / "a.md").write_text("# Title\n\n" + "A sentence of prose. " * 20)
    (prose / "b.html").write_text("<h1>Title</h1><script>bad()</script><p>" + "A sentence of prose. " * 20)
    (prose / "c.jsonl").write_text(json.dumps({"text": "Words. " * 50, "license": "ODC-BY"}) + "\nnot json\n" + json.dumps({"text": "short"}) + "\n")
    out = tmp_path / "out"
    run("collect.py", "--out", out, f"code:{tree}", f"text:{prose}")
    records = {r["id"]: r for r in read(out)}
    assert {i: r["license"] for i, r in records.items()} == {
        "code:tree/good.py": "BSD-2-Clause", "code:tree/sub/plain.go": "Apache-2.0", "text:prose/a.md": "unknown", "text:prose/b.html": "unknown",
        "text:prose/c.jsonl:1": "ODC-BY"}
    assert records["code:tree/good.py"]["text"] == code and "bad()" not in records["text:prose/b.html"]["text"]
    rejected = {r["file"]: r["reason"] for r in read(out / "rejected")}
    assert "minified" in rejected["tree/min.js"] and rejected["tree/gen.rs"] == "generated" and rejected["tree/zero.c"] == "binary"
    assert {r["line"] for r in read(out / "rejected") if r["file"] == "text:prose/c.jsonl"} == {2, 3}


def test_what_is_new_is_added_and_what_is_gone_removed(tmp_path):
    specs, out = tmp_path / "specs", tmp_path / "out"
    specs.mkdir()
    for i in range(8):
        (specs / f"s{i}.json").write_text(json.dumps(SPEC | {"info": {"title": f"Store {i}"}}))
    run("collect.py", "--out", out, f"openapi:{specs}")
    first = {p.name: p.stat().st_mtime_ns for p in out.glob("*.jsonl")}
    assert len(read(out)) == 24
    (specs / "s3.json").unlink()
    (specs / "s8.json").write_text(json.dumps(SPEC))
    (specs / "s9.json").write_text("{")
    run("collect.py", "--out", out, f"openapi:{specs}")
    assert {r["source"] for r in read(out)} == {f"openapi:specs/s{i}.json" for i in (0, 1, 2, 4, 5, 6, 7, 8)}
    assert [(r["file"], r["reason"][:16]) for r in read(out / "rejected")] == [("specs/s9.json", "cannot be parsed")]
    kept = {p.name: p.stat().st_mtime_ns for p in out.glob("*.jsonl")}
    assert len(first.items() & kept.items()) >= 5 and not list(out.glob("*.tmp"))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(SPEC))
    run("collect.py", "--out", out, f"openapi:{other}")  # another source leaves the first alone
    assert len(read(out)) == 27


def test_any_number_of_workers_and_ranks_writes_the_same(tmp_path, monkeypatch):
    specs = tmp_path / "specs"
    specs.mkdir()
    for i in range(12):
        (specs / f"s{i}.json").write_text(json.dumps(SPEC | {"info": {"title": f"Store {i}"}}))
    run("collect.py", "--out", tmp_path / "one", "--workers", 1, f"openapi:{specs}")
    run("collect.py", "--out", tmp_path / "three", "--workers", 3, f"openapi:{specs}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    run("collect.py", "--out", tmp_path / "ranks", f"openapi:{specs}")
    assert 0 < len(read(tmp_path / "ranks")) < 36
    monkeypatch.setenv("RANK", "0")
    run("collect.py", "--out", tmp_path / "ranks", f"openapi:{specs}")
    one, three, ranks = ({p.name: p.read_bytes() for p in (tmp_path / d).glob("*.jsonl")} for d in ("one", "three", "ranks"))
    assert one == three == ranks and len(read(tmp_path / "one")) == 36


def test_licenses_are_filtered(tmp_path):
    path = tmp_path / "spec.json"
    path.write_text(json.dumps(SPEC))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(SPEC | {"info": {"title": "Other"}}))
    sources = f"openapi:{path}", f"openapi:{other}"
    for options, kept in (((), {"MIT", "unknown"}), (("--license", "BSD"), {"MIT", "BSD"}), (("--only-license", "^mit$"), {"MIT"}), (("--exclude-license", "mit"), {"unknown"})):
        run("collect.py", "--out", tmp_path / "out", *sources, *options)
        assert {r["license"] for r in read(tmp_path / "out")} == kept, options
    assert len(read(tmp_path / "out" / "rejected")) == 3


@pytest.mark.parametrize("arguments, named", [
    (["song:x"], "song: no such source"), (["openapi:/no/such/place"], "/no/such/place"), (["chat:"], "chat:PATH"), (["crawl:file:///etc"], "not an http"),
    (["hf:name"], "hf:OWNER/NAME"), (["synthesize:python"], "no packages collected"), (["--only-license", "(", "python"], "--only-license"),
    (["--kinds", "other=1"], "--kinds")])
def test_bad_input_is_named(tmp_path, arguments, named):
    assert named in run("collect.py", "--out", tmp_path, *arguments, ok=False).stderr


def test_an_interrupt_ends_it_at_once(tmp_path):
    command = [sys.executable, str(ROOT / "collect.py"), "--out", str(tmp_path), "python:torch", "--workers", "2"]
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore Ctrl-C
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    time.sleep(4)
    process.send_signal(signal.SIGINT)
    assert "goes on from here" in process.communicate(timeout=15)[1] and process.returncode == 130


@pytest.mark.skipif(not DATA.exists(), reason="the data shared among the developers is not here")
def test_real_specifications(tmp_path):
    docs = DATA / "docs"
    run("collect.py", "--out", tmp_path, f"openapi:{docs / 'openapi_vendor'}", f"openapi:{docs / 'openapi_apis_guru'}",
        f"discovery:{docs / 'google_discovery'}", f"commands:{docs / 'tldr_pages_en.jsonl'}", "--license", "as stated")
    records, rejected = read(tmp_path), read(tmp_path / "rejected")
    assert len(records) == 2415 + 348 + 3713 and not rejected
    assert len({r["id"] for r in records}) == len(records)
    names = {r["apis"][0]: r for r in records}
    assert json.loads(names["Spotify_Web_API_with_fixes_and_improvements_from_sonallux.get_an_album"]["text"].rsplit("\n\n", 2)[1])["parameters"]["required"] == ["id"]
    assert {"licensing.licenseAssignments.patch", "commands.common.git_annex"} <= set(names)


def get(parameters=(), responses=None, **operation):
    """A specification of one operation."""
    return {"openapi": "3.0.0", "info": {"title": "T", "version": "1"}, "paths": {"/a/{id}": {"post": {
        "operationId": "a", "parameters": list(parameters), "responses": responses or {}, **operation}}}}


def schema_of_body(tmp_path, schema, kind="application/json"):
    spec = get(requestBody={"required": True, "content": {
        "application/x-www-form-urlencoded": {"schema": {"properties": {"form": {"type": "string"}}}}, kind: {"schema": schema}}})
    return operations(tmp_path, spec)["T.a"][1]["parameters"]


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "application/vnd.api+json"])
def test_json_is_preferred(kind, tmp_path):
    assert [*schema_of_body(tmp_path, {"properties": {"a": {"type": "string"}}}, kind)["properties"]] == ["a"]


def test_what_is_read_only_is_not_asked_for(tmp_path):
    """And what is write-only does not come back."""
    pet = {"type": "object", "required": ["id", "name"], "properties": {
        "id": {"type": "integer", "readOnly": True}, "name": {"type": "string"}, "secret": {"type": "string", "writeOnly": True}}}
    for schema in (pet, {"allOf": [pet]}):
        body = schema_of_body(tmp_path, schema)
        assert [*body["properties"]] == ["name", "secret"] and body["required"] == ["name"]
    answer = {"200": {"description": "ok", "content": {"application/json": {"schema": pet}}}}
    assert [*operations(tmp_path, get(responses=answer))["T.a"][1]["returns"]["properties"]] == ["id", "name"]


@pytest.mark.parametrize("schema", [
    {"properties": {"kind": {"type": "string"}}, "oneOf": [{"properties": {"card": {}}}, {"properties": {"iban": {}}}]},
    {"allOf": [{"properties": {"kind": {"type": "string"}}}, {"anyOf": [{"properties": {"card": {}}}, {"properties": {"iban": {}}}]}]}])
def test_alternatives_beside_properties_are_kept(schema, tmp_path):
    body = schema_of_body(tmp_path, schema)["properties"]["body"]
    assert [*body["properties"]] == ["kind"] and [[*choice["properties"]] for choice in body["anyOf"]] == [["card"], ["iban"]]


def test_parameters_of_one_name_and_of_headers(tmp_path):
    """Those of the path are required whatever is stated; Accept, Content-Type and Authorization are none."""
    stated = [{"name": "id", "in": "query", "schema": {"type": "string"}}, {"name": "id", "in": "path", "schema": {"type": "integer"}},
              {"name": "content-type", "in": "header", "schema": {"type": "string"}}, {"name": "X-Key", "in": "header", "schema": {}}]
    parameters = operations(tmp_path, get(stated))["T.a"][1]["parameters"]
    assert parameters["properties"] == {"id": {"type": "integer"}, "id_query": {"type": "string"}, "X-Key": {}}
    assert parameters["required"] == ["id"]


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_json_has_not_are_left_out(value, tmp_path):
    text = json.dumps(get([{"name": "x", "in": "query", "schema": {"type": "number", "default": 7}}])).replace("7", value)
    assert operations(tmp_path, text)["T.a"][1]["parameters"]["properties"]["x"] == {"type": "number"}


def test_a_specification_in_many_files(tmp_path):
    """References are relative to the file that they stand in; none leads out of the directory, and what is missing is said."""
    (tmp_path / "api" / "pets").mkdir(parents=True)
    (tmp_path / "secret.json").write_text('{"type": "string", "description": "PRIVATE"}')
    (tmp_path / "api" / "pets" / "get.json").write_text(json.dumps({"operationId": "pet", "parameters": [{"$ref": "../id.json#/Id"}],
        "requestBody": {"content": {"application/json": {"schema": {"properties": {
            "pet": {"$ref": "#/Pet"}, "out": {"$ref": "../../secret.json"}}}}}}, "Pet": {"type": "string", "maxLength": 9}}))
    (tmp_path / "api" / "id.json").write_text('{"Id": {"name": "id", "in": "path", "schema": {"type": "integer"}}}')
    spec = get() | {"paths": {"/pets/{id}": {"get": {"$ref": "pets/get.json"}}}}
    path = tmp_path / "api" / "spec.json"
    path.write_text(json.dumps(spec))
    record, rejected = collect.openapi_records(path, "spec.json", "unknown", None)
    parameters = json.loads(record.text.rsplit("\n\n", 2)[1])["parameters"]
    assert parameters["properties"] == {"id": {"type": "integer"}, "pet": {"type": "string", "maxLength": 9}, "out": {}}
    assert parameters["required"] == ["id"] and rejected["line"] == "../secret.json" and "PRIVATE" not in record.text


def test_yaml_is_read_as_openapi_means_it(tmp_path):
    pytest.importorskip("yaml")
    text = """openapi: 3.0.0
info: {title: T, version: 2022-01-16}
paths: {/a: {get: {operationId: a, responses: {200: {description: ok}}, parameters: [
  {name: no, in: query, schema: {type: string, default: 2020-01-01}}, {name: at, in: query, schema: {type: string, default: 12:30:45}},
  {name: country, in: query, schema: {enum: [SE, NO, 010]}}, {name: n, in: query, schema: {type: number, maximum: .inf, default: 1.5}}]}}}
"""
    properties = operations(tmp_path, text, name="spec.yaml")["T.a"][1]["parameters"]["properties"]
    assert properties["no"]["default"] == "2020-01-01" and properties["at"]["default"] == "12:30:45"
    assert properties["country"]["enum"] == ["SE", "NO", "010"] and properties["n"] == {"type": "number", "maximum": ".inf", "default": 1.5}


MCP_TOOL = {"name": "get_weather", "description": "Get the weather of a city. Now.", "inputSchema": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}


@pytest.mark.parametrize("listing, server", [
    ({"jsonrpc": "2.0", "id": 1, "result": {"tools": [MCP_TOOL]}}, "sky"), ([MCP_TOOL], "sky"),
    ({"servers": [{"name": "Sky", "tools": [MCP_TOOL, MCP_TOOL]}]}, "Sky"),
    ({"metadata": {"server_name": "Sky", "answer": {"tools": [MCP_TOOL]}, "crawled": {"name": "Sky", "tools": [MCP_TOOL]}}}, "Sky")])
def test_tools_of_mcp_servers(listing, server, tmp_path):
    """A record and a tool for synthesis of each, once; openapi: reads such a file too."""
    path = tmp_path / "sky.json"
    path.write_text(json.dumps(listing))
    for reader in (collect.mcp_records, collect.openapi_records if isinstance(listing, dict) else collect.mcp_records):
        record, tool = reader(path, "sky.json", "MIT", None)
        assert record.apis == [tool.name] == [f"{server}.get_weather"] and tool.parameters == MCP_TOOL["inputSchema"]
        assert tool.description == "Get the weather of a city." and json.loads(record.text.rsplit("\n\n", 2)[1])["name"] == tool.name


def test_mcp_tools_without_a_schema_and_none_at_all(tmp_path):
    path = tmp_path / "tools.json"
    path.write_text(json.dumps([{"name": "token", "description": "Get it.", "annotations": {"title": "Token"}},
                                {"name": "build", "arguments": [{"name": "branch", "type": "string", "desc": "Which"}]}]))
    records = [r for r in collect.mcp_records(path, "ci/tools.json", "MIT", None) if isinstance(r, collect.Record)]
    schemas = {r.apis[0]: json.loads(r.text.rsplit("\n\n", 2)[1])["parameters"]["properties"] for r in records}
    assert schemas == {"ci.token": {}, "ci.build": {"branch": {"type": "string", "description": "Which"}}}
    path.write_text('{"dependencies": [{"name": "left-pad", "version": "1"}]}')
    with pytest.raises(ValueError, match="no list of tools"):
        list(collect.mcp_records(path, "package.json", "MIT", None))


def test_skills(tmp_path):
    folder = tmp_path / "skills" / "pdf"
    folder.mkdir(parents=True)
    (folder / "SKILL.md").write_text("---\nname: pdf\ndescription: Fill in PDF forms.\n---\n\n# PDF\n\nRun scripts/fill.py.\n")
    (folder / "fill.py").write_text("print('filled')\n")
    (tmp_path / "skills" / "SKILL.md").write_text("# Not one\n")
    run("collect.py", f"skills:{tmp_path / 'skills'}", "--out", tmp_path / "out")
    [record] = [json.loads(line) for path in (tmp_path / "out").glob("*.jsonl") for line in path.open()]
    assert record["text"].startswith("pdf: Fill in PDF forms.\n\n# PDF") and "fill.py:\n\n```\nprint('filled')" in record["text"]
    [rejected] = [json.loads(line) for path in (tmp_path / "out" / "rejected").glob("*.jsonl") for line in path.open()]
    assert "not of the form expected" in rejected["reason"]


def test_a_link_that_leads_out_is_not_read(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "secret.txt").write_text("PRIVATE words that nobody should see. " * 20)
    (tmp_path / "d" / "notes.txt").symlink_to("../secret.txt")
    (tmp_path / "d" / "a.txt").write_text("Words that anybody may see, as many as it takes. " * 20)
    run("collect.py", f"text:{tmp_path / 'd'}", "--out", tmp_path / "out")
    text = "".join(path.read_text() for path in (tmp_path / "out").glob("*.jsonl"))
    assert "anybody" in text and "PRIVATE" not in text


def test_an_unusable_out_and_options_without_sense(tmp_path):
    """One line and status 2 each."""
    (tmp_path / "file").write_text("")
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "busy").mkdir()
    held = open(tmp_path / "busy" / ".lock.0", "w")
    fcntl.flock(held, fcntl.LOCK_EX)
    for options, said in ((["--out", tmp_path / "file"], "--out"), (["--out", tmp_path / "busy"], "another collect.py is at work"),
                          (["--workers", "0"], "not above 0"), (["--rate", "0"], "not above 0"), (["--timeout", "-1"], "not above 0")):
        ended = subprocess.run([sys.executable, ROOT / "collect.py", "python:tqdm", *options], capture_output=True, text=True, cwd=tmp_path)
        assert ended.returncode == 2 and said in ended.stderr and "Traceback" not in ended.stderr


@pytest.mark.parametrize("module, kept", [
    ("import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'{}\\n')\n    except OSError: pass\n" + GOOD, True),
    ("import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(40)\n    os._exit(0)\nos._exit(1)\n", False),
    ("import os\nos.fork()\n" + GOOD, True)], ids=["forged", "hang", "twin"])
def test_a_module_that_forks_or_writes_costs_only_itself(module, kept, tmp_path, monkeypatch):
    """To every descriptor; a child of it that holds the pipe open; two of it that go on."""
    (tmp_path / "fx").mkdir()
    (tmp_path / "fx" / "__init__.py").write_text(module)
    (tmp_path / "fx" / "second.py").write_text(GOOD.replace("double", "triple"))
    (tmp_path / "fx" / "third.py").write_text(GOOD.replace("double", "fourfold"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    package = collect.Package("fx", "1", "MIT", "", [], ["fx", "fx.second", "fx.third"], 0)
    started = time.time()
    objects, rejected = collect.introspect(package, 3)
    found = {o["key"].split(":")[0] for o in objects}
    assert found | {name for name, _ in rejected} == {"fx", "fx.second", "fx.third"} and time.time() - started < 20
    assert ("fx" in found) == kept
