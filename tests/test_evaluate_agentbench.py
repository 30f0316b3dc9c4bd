"""The suites agentbench-db and agentbench-os: the official rules on the official data, and what a model's SQL and shell cannot reach."""
import doctest
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

import evaluate
from evaluate import Answer

DATA = ROOT.parent / "shared" / "data" / "benchmarks" / "agentbench"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"no AgentBench files in {DATA}")


def sandbox_works():
    try:
        evaluate.Sandbox().close()
        return True
    except (OSError, evaluate.SandboxEnded):
        return False


needs_sandbox = pytest.mark.skipif(not shutil.which("bwrap") or not sandbox_works(), reason="bubblewrap is not here, or may not make a sandbox")


def options(**changed):
    return SimpleNamespace(**({"data": DATA, "mode": "native", "limit": None} | changed))


def play(episode, *answers):
    """The record of an episode, and how often it asked. It gets these answers, the last again and again, or what they say to what it asks."""
    asked = next(episode)
    try:
        for n in range(30):
            answer = answers[min(n, len(answers) - 1)]
            asked = episode.send(answer(asked) if callable(answer) else answer)
    except StopIteration as end:
        return end.value, n + 1
    raise AssertionError("it goes on for more than 30 rounds")


def verdict(*args):
    return play(*args)[0]["verdict"]


def call(name, **arguments):
    return Answer("Let me see.", [(name, arguments)])


def sql(text, mode="native"):
    return call("execute_sql", query=text) if mode == "native" else Answer(f"Think.\nAction: Operation\n```sql\n{text}\n```")


def commit(values, mode="native"):
    return call("commit_final_answer", answers=values) if mode == "native" else Answer(f"Action: Answer\nFinal Answer: {json.dumps(values)}")


def db_items(modification, mode="native"):
    """[(item, function that begins its episode)]"""
    found = [(begin.args[0], begin) for _, begin in evaluate.agentbench_db(options(mode=mode))]
    return [(item, begin) for item, begin in found if (item["type"][0] in evaluate.MODIFICATIONS) == modification]


def test_examples_in_docstrings():
    for function in (evaluate.read_db_action, evaluate.to_sqlite, evaluate.same_values, evaluate.read_os_action):
        (example,) = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs=vars(evaluate))
        assert example.examples and not doctest.DocTestRunner().run(example).failed


@needs_data
@pytest.mark.parametrize("mode", ["native", "prompt"])
def test_gold_modifications_reproduce_the_official_hash(mode):
    """A column's type, an empty value, the collation, a backslash or the cut at 1,024 characters other than MySQL's give other hashes."""
    items = db_items(True, mode)
    right = sum(verdict(begin(), sql(item["label"][0], mode), commit(["done"], mode)) == "right" for item, begin in items)
    assert len(items) == 140 and right >= 0.98 * 140


@needs_data
@pytest.mark.parametrize("spoil", [None, "DELETE FROM {t} WHERE rowid = 1", "UPDATE {t} SET {c} = {c} || '.' WHERE rowid = 2", "DROP TABLE {t}",
                                   "INSERT INTO {t} SELECT * FROM {t} LIMIT 1", "DELETE FROM {t}", "ALTER TABLE {t} RENAME COLUMN {c} TO other"])
def test_other_tables_than_the_gold_one_are_wrong(spoil):
    """The gold modification and one more, or none at all."""
    for item, begin in db_items(True):
        table, column = (evaluate.quote(n) for n in (item["table"]["table_name"], item["table"]["table_info"]["columns"][0]["name"]))
        answers = [sql(item["label"][0]), sql(spoil.format(t=table, c=column))] if spoil else []
        assert verdict(begin(), *answers, commit(["done"])) == "wrong", item["description"]


@pytest.mark.parametrize("rows", [170, 171])
def test_a_hash_is_taken_of_rows_in_any_order_and_cut_as_mysql_cuts(rows):
    """171 hashes of 5 characters and the commas between them are 1,025 characters."""
    table = {"table_name": "t", "table_info": {"columns": [{"name": "a"}, {"name": "b"}], "rows": [[str(i), None] for i in range(rows)]}}
    text = ",".join(sorted(hashlib.md5(str(i).encode()).hexdigest()[:5] for i in range(rows)))
    expected = {hashlib.md5(part.encode()).hexdigest() for part in (text, text[:1024])}
    assert evaluate.table_hashes(evaluate.open_table(table), table) == expected and len(expected) == rows - 169


@needs_data
def test_every_label_is_right_in_any_order_and_planted_answers_are_wrong():
    """A rule that is too strict fails labels; one that is too lax passes numbers off by one, a part of a list, or other items' labels."""
    items = db_items(False)
    values = [evaluate.compared_values(item["label"]) for item, _ in items]
    for (item, begin), own in zip(items, values):
        label = item["label"]
        for good in (label, label[::-1], [f" {v} " for v in label], json.dumps(label), str(label), str([(v,) for v in label])):
            assert verdict(begin(), commit(good)) == "right", (label, good)
        number = own[0].replace(".", "", 1).isdigit()
        others = [v for v in values if v != own and not (number and v[0].replace(".", "", 1).isdigit() and float(v[0]) == float(own[0]))]
        off = str(float(own[0]) + 1) if number else label[0] + "s"
        nothing = [""] * (not number or float(own[0]) != 0)  # which stands for 0, officially
        for bad in [[], [*label, "42.5"], [off, *label[1:]], [label[0] + " or so"], *others, *nothing] + [label[1:]] * (len(label) > 1):
            record, _ = play(begin(), commit(bad))
            assert record["verdict"] == "wrong" and set(record["scores"].values()) == {0.0}, (label, bad)


@pytest.mark.parametrize("answer,label,same", [
    (["12%"], ["12"], True), (["1,174"], ["1174.0"], True), (["3.149"], ["3.14"], True), (["3.16"], ["3.14"], False), (None, ["none"], True),
    (["null"], ["0"], True), (["1", "2"], ["2.0", "1.0"], True), (["1", "1"], ["1"], False), (["1", "1", "2"], ["1", "2", "2"], False),
    (["a", "a", "b"], ["b", "a"], True), (["a"], ["A"], False), ("Berlin", ["Berlin"], True), ("[Berlin, Rom]", ["Rom", "Berlin"], True),
    ("[('a',), ('b',)]", ["a", "b"], True), ([5], ["5.0"], True), (["'a'"], ["a"], True), ("[" * 5000, ["a"], False), ("[1+1]", ["2"], False)])
def test_answers_are_compared_by_the_official_rules(answer, label, same):
    assert evaluate.same_values(answer, label) is same


def test_an_answer_is_data(tmp_path):
    """The original evaluates the text of an answer as Python."""
    assert not evaluate.same_values(f"[open({str(tmp_path / 'canary')!r}, 'w')]", ["1"])
    assert not list(tmp_path.iterdir())


COLUMNS = [{"name": "Name"}, {"name": "Size (km2)"}]
TABLE = {"table_name": "Big Cities", "table_info": {"columns": COLUMNS, "rows": [["Montréal", 431], ["Köln", None]]}}
ITEM = {"type": ["other"], "table": TABLE, "label": ["431"], "description": "How big is Montreal?", "add_description": ""}


@pytest.mark.parametrize("statement", [
    "ATTACH '{f}' AS f", "VACUUM INTO '{f}'", "PRAGMA database_list", "SELECT * FROM pragma_database_list", "SELECT load_extension('{f}')",
    "CREATE VIRTUAL TABLE v USING fts5(a)", "SELECT writefile('{f}', 'a')", "CREATE TRIGGER g AFTER INSERT ON `Big Cities` BEGIN SELECT 1; END"])
def test_sql_reaches_nothing_but_the_table(statement, tmp_path):
    assert evaluate.run_sql(evaluate.open_table(TABLE), statement.format(f=tmp_path / "f")).startswith("Error")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tail,error", [("SELECT count(*) FROM c", evaluate.sqlite3.OperationalError),
                                        ("SELECT hex(zeroblob(20000)) || x FROM c ORDER BY 1", MemoryError)])
def test_endless_and_greedy_sql_is_stopped(tail, error):
    """Without limits such a statement takes all the time, or all the memory, that there is."""
    database, started = evaluate.open_table(TABLE), time.time()
    endless = f"WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) {tail}"
    with pytest.raises(error):
        list(evaluate.execute(database, endless, seconds=0.5 if tail.endswith("c") else 15))
    assert time.time() - started < 15
    assert len(evaluate.run_sql(database, endless.replace(tail, "SELECT x FROM c"))) == 811  # a long result is cut, and read no further
    assert evaluate.run_sql(database, "SELECT count(*) FROM `Big Cities`") == "[(2,)]"
    fails_later = "SELECT printf('%0500d', x), CASE WHEN x > 5 THEN abs(-9223372036854775808) END FROM c"
    assert evaluate.run_sql(database, endless.replace(tail, fails_later)).endswith("[TRUNCATED]")


def test_sql_as_mysql_has_it():
    database = evaluate.open_table(TABLE)
    assert evaluate.run_sql(database, 'SELECT `Size (km2)` FROM `Big Cities` WHERE Name = "MONTREAL"') == "[('431',)]"
    assert evaluate.run_sql(database, r"SELECT 'it\'s', 'a\nb', 'c''d'") == repr([("it's", "a\nb", "c'd")])
    assert evaluate.run_sql(database, "CREATE TABLE 2nd_try (1a TEXT)") == "[]"
    assert evaluate.run_sql(database, "SELECT 1e2, 0x1F, 1.5e1") == "[(100.0, 31, 15.0)]"
    for broken in ("SELEC 1", "SELECT 1; SELECT 2", "SELECT 'a\0b'", "SELECT '\ud800'", "SELECT CAST(x'ff' AS TEXT)"):
        assert evaluate.run_sql(database, broken).startswith("Error: ")


def test_rounds_with_a_database():
    """Errors go back to the model; 15 rounds, in the mode prompt an answer after them; what is no answer counts as what it is."""
    seen = []
    right = [sql("SELECT none"), lambda asked: seen.extend(asked[0]) or sql("SELECT `Size (km2)` FROM `Big Cities`"), commit(["431"])]
    record, _ = play(evaluate.db_episode(ITEM, "", "native"), *right)
    assert record["verdict"] == "right" and record["scores"] == {"SELECT": 1.0, "other": 1.0} and len(record["calls"]) == 3
    assert [m["role"] for m in seen] == ["system", "user", "assistant", "tool"] and "no such column" in seen[-1]["content"]
    for mode, rounds in (("native", 15), ("prompt", 16)):
        record, asked = play(evaluate.db_episode(ITEM, "dev: ", mode), sql("SELECT 1", mode))
        assert (record["verdict"], asked, record["scores"]) == ("wrong", rounds, {"dev: SELECT": 0.0, "dev: other": 0.0})
        assert verdict(evaluate.db_episode(ITEM, "", mode), *[sql("SELECT 1", mode)] * (rounds - 1), commit(["431"], mode)) == "right"
        for answer, expected in ((Answer("", error="timeout"), "error"), (Answer("abc", []), "unparseable")):
            assert verdict(evaluate.db_episode(ITEM, "", mode), answer) == expected
    for answer, expected in ((Answer("<tool_call>{"), "unparseable"), (Answer("I do not know.", []), "abstained"),
                             (Answer("I do not", [], False), "unparseable"), (call("commit_final_answer"), "wrong"), (call("rm", path="/"), "wrong")):
        assert verdict(evaluate.db_episode(ITEM, "", "native"), answer) == expected


@needs_data
@needs_sandbox
def test_examples_pass_in_the_sandbox_and_empty_answers_do_not():
    """What a sandbox lacks shows in the examples: users, tools, places to write to, processes that go on; a lax check, in empty answers."""
    items = [(begin.args[0], begin) for _, begin in evaluate.agentbench_os(options())]

    def commits(task, answer):  # a question has a first check that is the example
        return call("answer_action", answer=answer) if task["match"] or len(task["check"]) > 1 else call("finish_action", thought=answer)

    def gold(task, begin):
        run = call("bash_action", script="{ " + task["example"][0][1] + "\n} 2> /dev/null")
        return verdict(begin(), run, lambda asked: commits(task, asked[0][-1]["content"].partition("\n\n")[2]))

    with ThreadPoolExecutor(2) as pool:
        golds = list(pool.map(lambda item: gold(*item), [item for item in items if item[0]["example"]]))
        empty = list(pool.map(lambda item: verdict(item[1](), commits(item[0], "")), items))
    assert len(golds) == 41 and golds.count("right") >= 0.95 * 41
    assert len(empty) == 52 and "right" not in empty


@needs_sandbox
def test_a_shell_goes_on_between_rounds():
    """Its directory, variables, files and processes are still there, even after a script that exits; a check has a fresh process instead."""
    sandbox = evaluate.Sandbox()
    try:
        assert sandbox.run("cd /tmp; x=3; (while sleep 0.05; do echo . >> /root/log; done) &") == (0, "")
        assert sandbox.run("echo $x $PWD; printf end") == (0, "3 /tmp\nend")
        assert sandbox.run("false")[0] == 1 and sandbox.run("if")[0] == 2 and sandbox.run("cat")[1] == ""  # there is no input to wait for
        assert sandbox.run("exit 0")[0] == 1  # no status, so no success
        assert sandbox.run("whoami; touch /usr/new /usr/bin/new /etc/new /home/new && chmod u+s /usr/bin/find") == (0, "root\n")
        assert sandbox.run("until test -s /root/log; do sleep 0.01; done") == (0, "")
        assert sandbox.run("set -e; false")[0] == 1 and sandbox.run("PATH=/nowhere; x=it\\'s; echo $x")[1] == "it's\n"
        assert sandbox.run_apart(("bash", 'echo "$1$x" >&2; echo "$1-$2"; pwd; exit 7'), "a b", "$(c)") == (7, "a b-$(c)\n/root\n")
    finally:
        sandbox.close()


ESCAPES = {  # a script, and what it puts out in the end, or why it ends the sandbox
    "environment": ("cat /proc/[0-9]*/environ /proc/[0-9]*/cmdline | tr '\\0' '\\n'; env; echo done", "done"),
    "reading": ("cat {secret} {root}/evaluate.py /mnt/etc/shadow; ls /proc/[0-9]*/root{root} {root} && echo esc''aped; echo done", "done"),
    "writing": ("echo a > {secret}; mkdir -p {place}; echo a > {place}/planted; rm {secret}; mknod sda b 8 0 && echo esc''aped; echo done", "done"),
    "network": ("echo a > /dev/tcp/127.0.0.1/{port} && echo esc''aped; echo done", "done"),
    "namespaces": ("unshare -U true && echo esc''aped; mount -t tmpfs none /opt && echo esc''aped; echo 9 > /proc/sys/user/max_user_namespaces; "
                   "unshare -U true && echo esc''aped; echo done", "done"),
    "limits": ("ulimit -u 1000000 && echo esc''aped; ulimit -v unlimited && echo esc''aped; echo c > /proc/sysrq-trigger; echo done", "done"),
    "disk": ("touch /dev/f && echo esc''aped; for f in /root/f /usr/f /dev/shm/f; do head -c 2G /dev/zero > $f; wc -c < $f; done 2> /dev/null | "
             "awk '$1 > 135000000 {{print \"esc\" \"aped\"}}'; echo done", "done"),
    "files": ("cd /tmp; python3 -c 'i = 0\nwhile True: open(str(i), \"w\"); i += 1' 2>&1 | tail -n 1", "No space left"),
    "processes": ("echo 'import subprocess\nfor n in range(400):\n try: subprocess.Popen([\"sleep\", \"9\"], user=2000 + n % 40)\n "
                  "except OSError: pass' > /tmp/p; python3 /tmp/p; set -- /proc/[0-9]*; [ $# -gt 70 ] && echo esc''aped; echo done", "done"),
    "memory of one": ("python3 -c 'a = [bytearray(1 << 20) for _ in range(4000)]' 2>&1; echo done", "MemoryError"),
    "memory of many": ("for i in 1 2 3 4 5 6; do python3 -c 'a = b\"x\" * (300 << 20); import time; time.sleep(9)' & done; wait",
                       "it took too much memory"),
    "fork bomb": (":(){{ :|:& }};:; sleep 9", "its time was up"),
    "output": ("yes", "it put out too much"),
    "killing": ("kill -9 {pid}; kill -9 -1; kill -9 $PPID; sleep 9", "it ended"),
    "time": ("setsid nohup sleep {pid}.77 > /dev/null 2>&1 & sleep 9", "its time was up")}


def gone(text):
    """Whether soon no process of the host has a text in its command."""
    for _ in range(100):
        with_text = 0
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                with_text += text.encode() in path.read_bytes()
            except OSError:  # it ended just now
                pass
        if not with_text:
            return True
        time.sleep(0.05)


@needs_sandbox
@pytest.mark.parametrize("kind", ESCAPES)
def test_nothing_gets_out_of_the_sandbox(kind, tmp_path, monkeypatch):
    """Each within bounded time, and with nothing left on the host."""
    monkeypatch.setenv("CANARY", "a canary, escaped")
    secret = tmp_path / "secret"
    secret.write_text("a canary, escaped")
    secret.chmod(0o666)
    script, expected = ESCAPES[kind]
    with socket.create_server(("127.0.0.1", 0)) as server:
        script = script.format(secret=secret, root=ROOT, place=tmp_path, port=server.getsockname()[1], pid=os.getpid())
        sandbox, started = evaluate.Sandbox(), time.time()
        try:
            output = sandbox.run(script, seconds=1 if expected == "its time was up" else 15)[1]
        except evaluate.SandboxEnded as error:
            output = str(error)
        assert expected in output and "escaped" not in output, output
        assert time.time() - started < 16
        sandbox.close()
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    assert secret.read_text() == "a canary, escaped" and [p.name for p in tmp_path.iterdir()] == ["secret"] and gone(f"{os.getpid()}.77")


TRUE = "printf '#!/bin/bash --\\nexit 0\\n'"  # a program that has always succeeded
LIBRARY = "head -c 9 /usr/bin/true > /tmp/l.so"
FORGERIES = {  # what a model may try, lest `test -e /root/needed && grep -q . /root/needed` says what is so
    "a function": "eval() { true; }; test() { true; }; grep() { true; }; export -f eval test grep",
    "a trap": "trap 'true' DEBUG ERR EXIT; shopt -s extdebug; trap 'exit 0' EXIT",
    "an alias": "shopt -s expand_aliases; alias test=true grep=true eval=true '(=true'",
    "a variable": "export BASH_ENV=/tmp/e ENV=/tmp/e; echo 'exit 0' > /tmp/e; cp /tmp/e /root/.bashrc; cp /tmp/e /etc/profile",
    "PATH": "mkdir /tmp/p; " + TRUE + " > /tmp/p/grep; chmod +x /tmp/p/grep; export PATH=/tmp/p:$PATH; hash -r",
    "LD_PRELOAD": LIBRARY + "; export LD_PRELOAD=/tmp/l.so; exec bash --login",
    "ld.so.preload": LIBRARY + "; echo /tmp/l.so > /etc/ld.so.preload",
    "a directory in the place of another": LIBRARY + "; cp -r /etc /e; mv /etc /old; mv /e /etc; echo /tmp/l.so > /etc/ld.so.preload",
    "a cache of libraries": "mkdir /tmp/l; cp /usr/lib/*/libc.so.6 /tmp/l; echo /tmp/l > /etc/ld.so.conf; ldconfig; echo a >> /etc/ld.so.cache",
    "a replaced sh": "rm -f /bin/sh; " + TRUE + " > /bin/sh; chmod +x /bin/sh",
    "a replaced bash": TRUE + " > /tmp/b; chmod +x /tmp/b; mv /tmp/b /bin/bash",
    "a replaced env": TRUE + " > /tmp/b; chmod +x /tmp/b; cp --remove-destination /tmp/b /usr/bin/env",
    "another bin": "cp -r /usr/bin /tmp/b 2> /dev/null; rm /bin; ln -s /tmp/b /bin",
    "a program before another": TRUE + " > /usr/local/bin/grep; chmod +x /usr/local/bin/grep",
    "a program that is gone": "rm /usr/bin/grep", "a program that cannot be run": "chmod 0 /usr/bin/grep",
    "a program as a directory": "rm /usr/bin/grep; mkdir /usr/bin/grep",
    "an alternative": "ln -sf /tmp/a /etc/alternatives/awk",
    "a library": "cp /usr/lib/*/libc.so.6 /usr/lib/libselinux.so.1",
    "its processes": "timeout 2 python3 -c 'import ctypes, glob, os\nfor p in glob.glob(\"/proc/[0-9]*\"):\n  for f in glob.glob(p + \"/fd/*\"):\n"
                     "    try: os.readlink(f).startswith(\"pipe\") and os.write(os.open(f, os.O_WRONLY), b\"exit 0\\n\" * 9)\n    except OSError: pass\n"
                     "  ctypes.CDLL(None).ptrace(16, int(p[6:]), 0, 0)'",
    "a process that waits": "(while :; do grep -lsa needed$ /proc/[0-9]*/cmdline | grep -v self && echo a > /root/needed; done) > /dev/null 2>&1 &",
    "a fork bomb that waits": "for i in 1 2 3 4; do (while :; do (: > /tmp/x$i) ; pgrep -f '^bash -c test' && echo a > /root/needed; done) > /dev/null 2>&1 & done"}
NEEDED = {"description": "Write to /root/needed.", "init": [], "start": [], "match": None, "example": [],
          "check": [("bash", "test -e /root/needed && grep -q . /root/needed")]}


@needs_sandbox
@pytest.mark.parametrize("kind", FORGERIES)
def test_no_check_is_forged(kind):
    """Checks run in a process of their own, that nothing disturbs, with the host's programs."""
    finish = call("finish_action", thought="done")
    assert verdict(evaluate.os_episode(NEEDED, "", "native"), call("bash_action", script=FORGERIES[kind]), finish) == "wrong"


def test_what_waits_in_the_kernel_is_stopped_too(monkeypatch):
    """It would go on once it need not wait any more, beside the checks."""
    sandbox, stopped = evaluate.Sandbox.__new__(evaluate.Sandbox), []
    sandbox.first, sandbox.trusted = 1, {1, 4}
    monkeypatch.setattr(evaluate, "processes", lambda pid: {1: ("S", 0), 2: ("D", 0), 3: ("T", 0), 4: ("S", 0)})
    monkeypatch.setattr(evaluate.os, "kill", lambda pid, _: stopped.append(pid))
    monkeypatch.setattr(sandbox, "is_changed", lambda: False)
    sandbox.settle()
    assert {*stopped} == {2, 3}


@needs_sandbox
def test_a_script_that_is_too_long_ends_the_sandbox_at_once():
    sandbox, started = evaluate.Sandbox(), time.time()
    with pytest.raises(evaluate.SandboxEnded, match="too long"):
        sandbox.run("true " + "x" * 70_000)
    assert time.time() - started < 5


@needs_sandbox
def test_a_check_sees_what_was_done():
    """New programs, and files and processes of all kinds, are in no check's way; Python's start files are not read."""
    done = ("echo a > /root/needed; echo a > /usr/stock.log; echo 'echo hello' > /usr/local/bin/hello; chmod +x /usr/local/bin/hello; "
            "python3 -c 'import json, decimal'; chmod u+s /usr/bin/find; sleep 97 & mkdir -p ~/.local/lib; useradd -m jack; echo a > /usr/share/new")
    checks = [*NEEDED["check"], ("bash", "hello | grep -q hello && pgrep sleep && ls -l /usr/bin/find | grep -q rws"),
              ("python", "import sys, os; sys.exit(not os.path.exists('/usr/stock.log') or sys.flags.isolated != 1)")]
    episode = evaluate.os_episode(NEEDED | {"check": checks}, "", "native")
    record, _ = play(episode, call("bash_action", script=done), call("finish_action", thought="done"))
    assert record["verdict"] == "right", record


@needs_sandbox
def test_memory_outside_of_processes_is_refused():
    """Files in memory and System V segments, which stay when no process maps them."""
    sandbox = evaluate.Sandbox()
    try:
        calls = "python3 -c 'import ctypes, os\nprint(ctypes.CDLL(None).shmget(0, 4096, 0o1600))\nos.memfd_create(\"a\")' 2>&1"
        status, output = sandbox.run(calls)
        assert status == 1 and "-1\n" in output and "Operation not permitted" in output
    finally:
        sandbox.close()


EXAMPLE = ("bash", "echo 5")
TASK = {"description": "How many?", "init": [], "start": [], "match": None, "check": [EXAMPLE, "integer-match.py"], "example": [EXAMPLE]}
RUN, RIGHT = call("bash_action", script="seq 1000"), call("answer_action", answer=" 5\n")


@needs_sandbox
@pytest.mark.parametrize("mode,answers,expected,rounds", [
    ("native", [Answer("", RUN.calls + RIGHT.calls), RIGHT], "right", 2),  # only the first call of a turn counts
    ("native", [RUN], "wrong", 8), ("native", [call("answer_action", answer="five")], "wrong", 1), ("prompt", [Answer("Act: finish")], "wrong", 1),
    ("native", [Answer("abc", [])], "unparseable", 8), ("prompt", [Answer("abc")], "unparseable", 1), ("native", [Answer("", error="s")], "error", 1),
    ("prompt", [Answer("Act: bash\n\n```bash\necho 5\n```"), Answer("Think: so.\nAct: answer(5)")], "right", 2),
    ("native", [call("bash_action", script="kill -9 $PPID; sleep 9")], "wrong", 1)])
def test_rounds_with_a_shell(mode, answers, expected, rounds):
    record, asked = play(evaluate.os_episode(TASK, "accuracy", mode), *answers)
    assert (record["verdict"], asked, record["scores"]) == (expected, rounds, {"accuracy": float(expected == "right")})


@needs_sandbox
def test_outputs_are_cut_and_answers_matched_as_officially():
    seen = []
    assert verdict(evaluate.os_episode(TASK, "", "native"), RUN, lambda asked: seen.append(asked[0][-1]) or RIGHT) == "right"
    assert seen[0]["role"] == "tool" and len(seen[0]["content"]) < 860 and "[cut" in seen[0]["content"]
    matches = (({"answer": "5", "strip": True}, "right"), ({"answer": "5"}, "wrong"), ({"regex": "^5"}, "wrong"), ({"regex": "5"}, "right"))
    for match, expected in matches:
        assert verdict(evaluate.os_episode(TASK | {"match": match, "check": []}, "", "native"), RIGHT) == expected
    assert evaluate.size_of("1.5 KB") == 1536 and evaluate.size_of("300") == 300 and evaluate.size_of("2G") == 2 << 30


@needs_sandbox
def test_an_episode_that_is_given_up_leaves_no_sandbox():
    episode = evaluate.os_episode(TASK | {"init": [("bash", f"sleep {os.getpid()}.88 > /dev/null &")]}, "", "native")
    next(episode)
    episode.close()
    assert gone(f"{os.getpid()}.88")


@needs_sandbox
def test_no_sandbox_outlives_its_owner():
    """Where evaluate.py is killed, what a model has started must not go on."""
    mark = f"{os.getpid()}.99"
    source = f"import evaluate, time; s = evaluate.Sandbox(); s.run('setsid sleep {mark} > /dev/null & sleep 1'); print(s.process.pid, flush=True); time.sleep(60)"
    owner = subprocess.Popen([sys.executable, "-c", source], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    sandbox = owner.stdout.readline().strip()
    assert subprocess.run(["pgrep", "-f", f"^sleep {mark}"], stdout=subprocess.DEVNULL).returncode == 0
    owner.kill()
    owner.wait()
    assert gone(mark) and (time.sleep(2) or not Path("/proc", sandbox).exists())


@needs_sandbox
def test_items_that_lack_a_file_are_left_out_and_said_to_be(tmp_path, capsys):
    """A script named by file is taken from the original's folder scripts, where that is there."""
    place, evaluation = tmp_path / "os_interaction" / "1", {"evaluation": {"match": "x"}}
    place.mkdir(parents=True)
    needs_file = {"description": "a", "create": {"local": "default", "init": {"file": "init/a.sh"}}} | evaluation
    needs_network = {"description": "b", "start": "apt-get update"} | evaluation
    (place / "a.json").write_text(json.dumps([needs_file, {"description": "c"} | evaluation, needs_network]))
    assert [name for name, _ in evaluate.agentbench_os(options(data=tmp_path))] == ["std-001-a-1"]
    assert "1 items that need init/a.sh, 1 items that need the network" in capsys.readouterr().out
    script = tmp_path / "os_interaction" / "scripts" / "1" / "init" / "a.sh"
    script.parent.mkdir(parents=True)
    script.write_text("exit 3")
    with pytest.raises(StopIteration) as end:
        next(dict(evaluate.agentbench_os(options(data=tmp_path)))["std-001-a-0"]())
    assert end.value.value["verdict"] == "error"


def test_without_a_sandbox_there_is_no_shell(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as stop:
        evaluate.agentbench_os(options())
    assert stop.value.code == 2 and "apt-get install bubblewrap" in capsys.readouterr().err
