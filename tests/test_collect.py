import inspect
import json
import signal
import subprocess
import sys
import time

import pytest

import collect
from conftest import ROOT, run


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


GOOD = 'def double(x: int, times: int = 2) -> int:\n    """Multiply a number by two, or more.\n\n    >>> double(4)\n    8\n    """\n'


class Bar:
    update = staticmethod(lambda: None)


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
    objects, rejected = collect.introspect(package, 2.0, Bar)
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
    objects, _ = collect.introspect(package, 5.0, Bar)
    assert [a["name"] for a in collect.distinct(collect.name_apis(objects, package))] == \
        ["pkg.api.Runner", "pkg.api.Runner.go", "pkg.api.Walker", "pkg.double"]


def test_environment_and_paths_stay_private(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("SOME_API_KEY", "sk-secret")
    package = package_of(tmp_path, m="import os, sys\ndef run(env=dict(os.environ), python=sys.executable, home=os.path.expanduser('~')):\n"
                         '    """Run something somewhere."""\n')
    objects, _ = collect.introspect(package, 5.0, Bar)
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
    objects, _ = collect.introspect(package, 5.0, Bar)
    apis = collect.name_apis(objects, package)
    [document] = collect.api_documents(apis, package)
    assert document.text.startswith("pkg.m.half(x: float, *, exact: bool = False)\n\nDivide a number by two.")
    assert "license: MIT" in document.text and document.apis == ["pkg.m.half"]
    [trajectory] = collect.trajectories(apis, package)
    assert [m["role"] for m in trajectory.messages] == ["user", "assistant", "tool", "user", "assistant", "tool", "assistant", "tool"]
    called = [c["function"] for m in trajectory.messages for c in m.get("tool_calls", [])]
    assert called[0] == {"name": "pkg.m.half", "arguments": '{"x": 4.0}'}  # literal arguments: the API itself is the tool
    assert called[1] == {"name": "python", "arguments": json.dumps({"code": 'y = "a"'})}
    assert called[2]["name"] == "python"
    assert trajectory.messages[3]["content"] == "Then an error, after a step of preparation."
    assert trajectory.messages[-1]["content"].endswith("TypeError: not a number")
    assert {t["function"]["name"] for t in trajectory.tools} == {"python", "pkg.m.half"}
    half = next(t["function"] for t in trajectory.tools if t["function"]["name"] == "pkg.m.half")
    assert half["parameters"] == {"type": "object", "required": ["x"],
                                  "properties": {"x": {"type": "number"}, "exact": {"type": "boolean", "default": False}}}


@pytest.mark.parametrize("stated, schema", [
    ("int", {"type": "integer"}), ("Optional[str]", {"type": "string"}), ("float | None", {"type": "number"}),
    ("array_like", {"type": "array"}), ("list of int", {"type": "array", "items": {"type": "integer"}}),
    ("{'C', 'F'}, optional", {"type": "string", "enum": ["C", "F"]}), ("Literal['a', 'b']", {"type": "string", "enum": ["a", "b"]}),
    ("dict[str, int]", {"type": "object"}), ("Callable[[int], str]", {}), ("Tensor", {"type": "array"}), ("Printer", {}), ("", {})])
def test_type_schema(stated, schema):
    assert collect.type_schema(stated) == schema


def test_signature_from_documentation():
    signature = collect.find_signature(None, "add(input, other, *, alpha=1, out=None) -> Tensor\n\nAdds other to input.")
    assert str(signature) == "(input, other, *, alpha=1, out=None)"
    assert collect.find_signature(None, "add(input[, other]) -> Tensor\n\nAdds.") is None
    assert [p.kind for p in signature.parameters.values()].count(inspect.Parameter.KEYWORD_ONLY) == 2


def test_arguments_fit_their_schema(raw):
    """Every synthesised call names a tool at hand, gives all it requires, and nothing of another type."""
    python = {"integer": (int,), "number": (int, float), "string": (str,), "boolean": (bool,), "array": (list,), "object": (dict,)}
    kinds, distinct = set(), set()
    for record in read(raw):
        if record["domain"] != "instruction":
            continue
        tools = {t["function"]["name"]: t["function"]["parameters"] for t in record["tools"]}
        calls = record["messages"][-1].get("tool_calls", [])
        kinds.add((len(tools) > 1, len(calls)))
        if not calls:
            assert record["messages"][-1]["content"] and record["apis"][0] not in tools
        for call in calls:
            arguments = json.loads(call["function"]["arguments"])
            schema = tools[call["function"]["name"]]
            assert set(schema["required"]) <= set(arguments) <= set(schema["properties"])
            for name, value in arguments.items():
                assert type(value) in python[schema["properties"][name]["type"]], (record["id"], name, value)
                assert value in schema["properties"][name].get("enum", [value])
                assert json.dumps(value, ensure_ascii=False) in record["messages"][0]["content"]  # the request says it
            distinct.add(call["function"]["arguments"])
    assert {(False, 1), (True, 1), (True, 2), (True, 0)} <= kinds and len(distinct) > 5000


def test_default_environment(raw):
    """The counts the README speaks of, and ids that are unique."""
    records = read(raw)
    ids = [r["id"] for r in records]
    assert len(ids) == len(set(ids))
    documented = [r for r in records if r["domain"] == "api_doc" and len(r["apis"]) == 1]
    assert len(documented) > 20_000 and len({r["apis"][0] for r in documented}) == len(documented)
    assert sum(m["role"] == "tool" for r in records if r["domain"] == "trajectory" for m in r["messages"]) > 40_000
    names = {r["apis"][0] for r in documented}
    assert {"json.dumps", "numpy.roll", "torch.nn.Linear", "sympy.sin", "torch.Tensor.abs", "textwrap.shorten"} <= names
    assert all(r["license"] for r in records)
    assert any("Traceback" in m["content"] for r in records if r["domain"] == "trajectory" for m in r["messages"] if m["role"] == "tool")


def test_killed_and_run_again_gives_the_same(small_raw, tmp_path):
    command = [sys.executable, str(ROOT / "collect.py"), "--out", str(tmp_path), "--packages", "mpmath,requests", "--code-mb", "0.2"]
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
    (tmp_path / "python.mpmath-0.0.1.jsonl").write_text("")
    run("collect.py", "--out", tmp_path, "--packages", "mpmath,requests", "--workers", 1, "--timeout", 9, "--seed", 0)
    assert {p.name for p in tmp_path.glob("*.jsonl")} == {p.name for p in small_raw.glob("*.jsonl")}


def test_seed_changes_the_conversations_alone(small_raw, tmp_path):
    for path in small_raw.glob("*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    run("collect.py", "--out", tmp_path, "--packages", "mpmath,requests", "--seed", 1)
    old, new = ({p.name for p in d.glob("*.jsonl")} for d in (small_raw, tmp_path))
    assert len(old & new) == 2 and len(new - old) == 1


def test_unknown_package_is_named(tmp_path):
    assert "no_such_package" in run("collect.py", "--out", tmp_path, "--packages", "no_such_package", ok=False).stderr


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
