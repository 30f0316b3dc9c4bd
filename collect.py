"""Step 1 of 6: collect what an agent model learns from.

In:   the Python environment this script runs in. It holds real API documentation (every public callable's docstring
      and signature), real tool use (doctest examples with their real outputs), source code, and prose.
Out:  data/raw/python.<package>-<version>.jsonl, one record a line (class Record), of five domains (and data/raw/rejected,
      the modules that could not be read, with the reason):
        api_doc      one API: qualified name, signature, JSON Schema of its parameters, documentation
        trajectory   one docstring's examples as a conversation: request, call, real output, next call ...
        code, text   source files; language reference topics, package descriptions, module documentation
        instruction  function-calling conversations synthesised from the API documentation, for tuning and testing

Laptop:        python collect.py
Some packages: python collect.py --packages numpy,torch
More machines: not needed; a few minutes on two cores document an environment of 20,000 APIs.

Foreign modules are imported in child processes under a time limit: one that hangs, exits, prints or opens a window costs
only itself. Docstrings are parsed, never run. A package already collected is skipped; delete its file to redo it.
The corpus design follows Hephaestus-Forge (arXiv 2502.06589, section 3).
"""
import argparse
import ast
import dataclasses
import doctest
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import threading
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

DOMAINS = ("api_doc", "trajectory", "code", "text", "instruction")


def main():
    args = parse_args()
    started = time.time()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob("*.tmp"):  # left by a killed run
        stale.unlink()
    packages = find_packages()
    if args.packages:
        wanted = args.packages.split(",")
        missing = sorted(set(wanted) - {p.name for p in packages})
        if missing:
            fail(f"--packages: {', '.join(missing)}: not installed here (known: {', '.join(p.name for p in packages)})")
        packages = [p for p in packages if p.name in wanted]

    # Largest first, so that the last worker does not end alone with torch.
    pending = sorted((p for p in packages if not (out / p.filename).exists()), key=lambda p: (-p.size, p.name))
    bar = tqdm(total=sum(len(p.modules) for p in pending), desc="modules", disable=None)
    with ThreadPoolExecutor(args.workers) as pool:
        for package in [pool.submit(collect_package, p, out, args, bar) for p in pending]:
            package.result()
    bar.close()

    shards = [out / p.filename for p in sorted(packages, key=lambda p: p.name)]
    conversations = out / f"python.instructions-{fingerprint(shards, args.seed)}.jsonl"
    if not conversations.exists():
        apis = [api for shard in shards for api in read_apis(shard)]
        write_records(conversations, [*indexes(apis, args.seed), *synthesise(apis, args.seed)])
    for old in set(out.glob("python.*.jsonl")) - {*shards, conversations}:  # of a package since removed or upgraded
        old.unlink()
    report([*shards, conversations], out, time.time() - started)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--out", default="data/raw", help="directory for the records")
    parser.add_argument("--packages", default="", metavar="A,B", help="only these packages; 'stdlib' is the standard "
                        "library (default: it and every installed package)")
    parser.add_argument("--code-mb", type=float, default=4.0, help="source code kept from each package, in MB; files are "
                        "chosen by a hash of their path")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds one module may take to import and describe")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="child processes at a time")
    parser.add_argument("--seed", type=int, default=0, help="seed of the synthesised conversations")
    return parser.parse_args()


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The module docstring as it stands, and every default beside its flag."""


def run_main(main):
    """Run a script's main; Ctrl-C ends it with a line instead of a traceback."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(print("\nstopped; the same command goes on from here", file=sys.stderr) or 130)


def fail(message):
    """Print one clear line and exit with status 2: for bad input, which is the user's to mend."""
    sys.exit(print(f"error: {message}", file=sys.stderr) or 2)


# ----------------------------------------------------------------------------------------------------------------------
# Records


@dataclasses.dataclass
class Record:
    """One line of data/raw/*.jsonl. Holds either `text` or `messages` (with `tools`), by its domain.

    `messages` and `tools` are in the OpenAI chat format; `function.arguments` of a call is a JSON string.
    """
    id: str
    domain: str
    source: str
    license: str
    apis: list          # qualified names of the APIs it documents or calls
    text: str = None
    messages: list = None
    tools: list = None
    url: str = None

    def to_json(self):
        return json.dumps({k: v for k, v in vars(self).items() if v is not None}, ensure_ascii=False)

    @classmethod
    def from_json(cls, line):
        """Parse and check one line. Raises ValueError with the reason if it is not a record."""
        try:
            record = cls(**json.loads(line))
        except (TypeError, RecursionError) as error:
            raise ValueError(f"not a record: {error}") from None
        if record.domain not in DOMAINS:
            raise ValueError(f"unknown domain {record.domain!r} (known: {', '.join(DOMAINS)})")
        chat = record.domain in ("trajectory", "instruction")
        if not isinstance(record.messages if chat else record.text, list if chat else str):
            raise ValueError(f"domain {record.domain!r} needs {'`messages`, a list' if chat else '`text`, a string'}")
        if not isinstance(record.id, str) or not isinstance(record.apis, list):
            raise ValueError("`id` must be a string and `apis` a list")
        return record


def write_records(path, records):
    """Write records as JSON lines; the file appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", errors="replace") as file:
        file.writelines(record.to_json() + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def unit_hash(name):
    """A number in [0, 1) that depends on the name alone.

    It orders the APIs at random but for ever in the same way: build_corpus.py holds out those under a threshold,
    and synthesise() draws the tools of one conversation from neighbours, which so fall on the same side.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48


def chat_message(role, content="", calls=None):
    """An OpenAI chat message; `calls` is a list of (function name, arguments)."""
    message = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = [{"id": f"call_{i}", "type": "function", "function": {
            "name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}} for i, (name, arguments) in enumerate(calls)]
    return message


# ----------------------------------------------------------------------------------------------------------------------
# Packages: what is installed, found without importing any of it


@dataclasses.dataclass
class Package:
    """What find_packages() knows of a distribution before anything of it is imported."""
    name: str           # of the distribution; "stdlib" for the standard library
    version: str
    license: str
    description: str
    files: list         # source files, as (path, dotted name, whether public)
    modules: list       # public modules to import
    size: int           # bytes of source

    @property
    def filename(self):
        return f"python.{self.name}-{self.version}.jsonl"


def find_packages():
    """The standard library and every installed distribution that brings modules."""
    version = ".".join(map(str, sys.version_info[:3]))
    top_level = sorted(n for n in sys.stdlib_module_names if not n.startswith("_") and n not in ("this", "antigravity", "test"))
    roots = [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("stdlib")) / "lib-dynload"]
    packages = [describe_package("stdlib", version, "PSF-2.0", "", top_level, roots, top_level)]
    owners = {}
    for module, names in importlib.metadata.packages_distributions().items():
        if module.isidentifier() and not module.startswith("_") and module not in sys.stdlib_module_names:
            owners.setdefault(min(names), []).append(module)
    for name, modules in sorted(owners.items()):
        dist = importlib.metadata.distribution(name)
        description = dist.metadata.get_payload() or dist.metadata.get("Description") or ""
        packages.append(describe_package(name.lower(), dist.version, license_of(dist.metadata), description, sorted(modules),
                                         [Path(dist.locate_file(""))], []))
    return packages


def license_of(metadata):
    """SPDX expression if stated, else the classifiers' names, else the first line of the License field."""
    classifiers = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier", []) if c.startswith("License")]
    stated = metadata.get("License-Expression") or " AND ".join(classifiers) or metadata.get("License") or "unknown"
    return stated.strip().split("\n")[0][:80]


def describe_package(name, version, license, description, top_level, roots, builtin_modules):
    """List the source files and public modules that lie under the top-level names in the roots."""
    files, modules = [], set(builtin_modules)
    for root in roots:
        for module in top_level:
            paths = sorted((root / module).rglob("*")) if (root / module).is_dir() else sorted(root.glob(module + ".*"))
            for path in paths:
                if path.suffix not in (".py", ".so", ".pyd"):
                    continue
                parts = list(path.relative_to(root).parts)
                parts[-1] = parts[-1].split(".")[0]
                if parts[-1] == "__init__":
                    parts.pop()
                public = all(p.isidentifier() and not re.match(r"_|tests?$|test_|.*_tests?$|conftest$|setup$", p) for p in parts)
                if path.suffix == ".py":
                    files.append((path, ".".join(parts), public))
                if public:
                    modules.add(".".join(parts))
    size = sum(path.stat().st_size for path, *_ in files)
    return Package(name, version, license, description, files, sorted(modules), size)


# ----------------------------------------------------------------------------------------------------------------------
# The child process: imports modules and describes their public callables


def child():
    """Answer module names on standard input with one JSON line each on (a private copy of) standard output."""
    reply = os.fdopen(os.dup(1), "w", encoding="utf-8", errors="replace")
    null = os.open(os.devnull, os.O_RDWR)
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    for descriptor in (0, 1, 2):  # what modules print, or ask, goes nowhere
        os.dup2(null, descriptor)
    warnings.simplefilter("ignore")
    seen = set()
    for line in requests:
        answer = describe_module(line.strip(), seen)
        reply.write(stable(json.dumps(answer)) + "\n")
        reply.flush()


def describe_module(name, seen):
    """Public callables of one module: {"objects": [...], "error": reason or None}. Describes each object once."""
    try:
        module = importlib.import_module(name)
        names = getattr(module, "__all__", None) or [n for n in vars(module) if not n.startswith("_")]
        objects = [(n, getattr(module, n, None)) for n in sorted(set(n for n in names if isinstance(n, str)))]
    except BaseException as error:  # sys.exit() at import included
        return {"objects": [], "error": f"{type(error).__name__}: {error}"[:200]}
    described = []
    for public_name, obj in objects:
        try:
            described += describe_object(obj, module, public_name, seen)
        except Exception:  # an object that breaks under inspection has no usable documentation
            continue
    return {"objects": described, "error": None}


def describe_object(obj, module, public_name, seen):
    """A callable and, of a class, its documented methods, or nothing if it belongs to another package."""
    home = getattr(obj, "__module__", None) or module.__name__
    if inspect.ismodule(obj) or not callable(obj) or not belongs(home, module.__name__):
        return []
    key = f"{home}:{getattr(obj, '__qualname__', None) or getattr(obj, '__name__', public_name)}"
    path = f"{module.__name__}.{public_name}"
    if key in seen:
        return [{"key": key, "path": path}]
    doc = vars(obj).get("__doc__") if inspect.isclass(obj) else getattr(obj, "__doc__", None)
    described = [describe_callable(obj, key, doc, module) | {"path": path}]
    seen.add(key)
    for name, member in sorted(members(obj).items()) if inspect.isclass(obj) else []:
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        if not name.startswith("_") and callable(function) and not inspect.isclass(function):
            described.append(describe_callable(function, f"{key}.{name}", getattr(function, "__doc__", None), module,
                                               bound=not isinstance(member, staticmethod)) | {"of": key, "name": name})
    return described


def members(cls):
    """What a class defines itself or takes from private bases, such as torch.Tensor from torch._C.TensorBase."""
    private = [b for b in cls.__mro__[1:] if re.search(r"(^|\.)_", f"{b.__module__}.{b.__name__}")]
    return {name: member for base in [*reversed(private), cls] for name, member in vars(base).items()}


def belongs(home, module_name):
    """Whether an object whose __module__ is `home` is part of the package that `module_name` is in."""
    top, home_top = module_name.split(".")[0], home.split(".")[0]
    return top == home_top or (top in sys.stdlib_module_names and home_top in sys.stdlib_module_names)


def describe_callable(obj, key, doc, module, bound=False):
    """Documentation, signature, schema and examples of one callable; bound leaves out self or cls."""
    doc = inspect.cleandoc(doc).strip() if isinstance(doc, str) else ""
    signature = find_signature(obj, doc)
    parameters = list(signature.parameters.values()) if signature else []
    if bound and parameters and parameters[0].name in ("self", "cls"):
        parameters = parameters[1:]
    return {"key": key, "doc": doc, "home": key.split(":")[0],
            "signature": str(signature.replace(parameters=parameters)) if signature else "(...)",
            "parameters": json_schema(parameters, doc), "sessions": sessions(doc, obj, module)}


def stable(text):
    """Without what differs from run to run and from user to user: memory addresses, and where Python is installed."""
    for place in (sys.prefix, sys.base_prefix, os.getcwd()):
        text = text.replace(place, "/usr") if len(place) > 4 else text
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def find_signature(obj, doc):
    """From introspection or, for compiled functions, from the first lines of the documentation."""
    try:
        return inspect.signature(obj)
    except (ValueError, TypeError):
        pass
    found = re.match(r"\s*[\w.]*\w\((.*?)\)\s*(->.*)?$", doc.split("\n\n")[0].replace("\n", " "))
    if not found:
        return None
    try:
        definition = ast.parse(f"def f({found[1]}): pass").body[0].args
    except SyntaxError:
        return None
    P, empty = inspect.Parameter, inspect.Parameter.empty

    def parameter(arg, kind, default):
        try:
            value = empty if default is None else ast.literal_eval(default)
        except ValueError:
            value = Opaque(ast.unparse(default))
        return P(arg.arg, kind, default=value, annotation=ast.unparse(arg.annotation) if arg.annotation else empty)

    positional = definition.posonlyargs + definition.args
    defaults = [None] * (len(positional) - len(definition.defaults)) + definition.defaults
    found = [parameter(a, P.POSITIONAL_OR_KEYWORD, d) for a, d in zip(positional, defaults)]
    found += [parameter(definition.vararg, P.VAR_POSITIONAL, None)] if definition.vararg else []
    found += [parameter(a, P.KEYWORD_ONLY, d) for a, d in zip(definition.kwonlyargs, definition.kw_defaults)]
    return inspect.Signature(found)


class Opaque(str):
    """A default value known only by its source text."""
    __repr__ = str.__str__


# ----------------------------------------------------------------------------------------------------------------------
# Signatures to JSON Schema

JSON_TYPES = [  # the first word that matches an annotation or a docstring's type decides
    ("boolean", r"bool|boolean"), ("array", r"list|tuple|sequence|iterable|array|array_like|ndarray|tensor|set|iterator"),
    ("object", r"dict|mapping|dictionary"), ("integer", r"int|integer|ints|size|symint"),
    ("number", r"float|double|number|scalar|real|numeric"), ("string", r"str|string|path|pathlike|bytes|text|filename")]
PYTHON_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", tuple: "array", dict: "object"}


def json_schema(parameters, doc):
    """JSON Schema of a parameter list: types from annotations, else defaults, else the docstring; {} where unknown."""
    properties, required = {}, []
    for p in parameters:
        if p.kind == p.VAR_KEYWORD:
            continue
        stated = "" if p.annotation is p.empty else getattr(p.annotation, "__name__", None) or str(p.annotation)
        default = None if p.default is p.empty else p.default
        entry = type_schema(stated) or ({"type": PYTHON_TYPES[type(default)]} if type(default) in PYTHON_TYPES else {}) \
            or type_schema(documented_type(p.name, doc))
        if p.kind == p.VAR_POSITIONAL:
            entry = {"type": "array", "items": entry} if entry else {"type": "array"}
        elif p.default is p.empty:
            required.append(p.name)
        elif type(default) in (bool, int, str) or (type(default) is float and default == default and abs(default) < 1e300):
            entry["default"] = default
        properties[p.name] = entry
    return {"type": "object", "properties": properties, "required": required}


def type_schema(stated):
    """
    >>> type_schema("Optional[int]"), type_schema("{'C', 'F'}, optional"), type_schema("list[str]"), type_schema("Callable")
    ({'type': 'integer'}, {'type': 'string', 'enum': ['C', 'F']}, {'type': 'array', 'items': {'type': 'string'}}, {})
    """
    choices = re.match(r"(?:typing\.)?(?:Literal\[|\{)((?:\s*(['\"])[\w+ .-]*\2\s*,?)+)[\]}]", stated)
    if choices:
        return {"type": "string", "enum": re.findall(r"['\"]([^'\"]*)['\"]", choices[1])}
    if re.search(r"callable|\bfunction\b|\bobject\b", stated, re.I):
        return {}
    found = [(m.start(), -m.end(), kind) for kind, words in JSON_TYPES
             for m in [re.search(rf"\b(?:{words})\b", stated.replace("_", " ") if kind != "array" else stated, re.I)] if m]
    if not found:
        return {}
    start, _, kind = min(found)
    if kind == "array":
        inner = type_schema(stated[start:].partition("[")[2] or re.sub(r"^\w+( of)?", "", stated[start:]))
        return {"type": "array", "items": inner} if inner else {"type": "array"}
    return {"type": kind}


def documented_type(name, doc):
    """The type that a docstring states for a parameter, in numpy, Google or Sphinx style, or ''."""
    name = re.escape(name)
    found = (re.search(rf"^\s*(?:\w+, )*{name}(?:, \w+)*\s*:\s*(.+)$", doc, re.M)
             or re.search(rf"^\s*{name}\s*\(([^)]*)\)\s*:", doc, re.M) or re.search(rf":param (\w+) {name}:", doc)
             or re.search(rf":type {name}:\s*(.+)", doc))
    return found[1][:80] if found else ""


# ----------------------------------------------------------------------------------------------------------------------
# Doctest examples to steps


def sessions(doc, obj, module):
    """The examples of one docstring, in order: [prose, [{"code", "output", "keys", "call"}, ...]], ...

    `keys` identify the APIs a step calls. `call` is (key, arguments) when the step is one call with literal arguments,
    which can be shown as a call of that very tool. Names are looked up, no code is run.
    """
    if ">>>" not in doc:
        return []
    try:
        parts = doctest.DocTestParser().parse(doc)
    except ValueError:
        return []
    names = {"np": "numpy", "plt": "matplotlib.pyplot", "pd": "pandas", "nx": "networkx"}
    found, prose = [], ""
    for part in parts:
        if isinstance(part, str):
            prose += part
            continue
        code = re.sub(r"\s*# ?doctest:.*", "", part.source).rstrip()
        if prose.strip() or not found:
            found.append([prose, []])
            prose = ""
        try:
            tree = ast.parse(code)
        except SyntaxError:
            tree = ast.Module([], [])
        names |= imported_names(tree)
        calls = {ast.unparse(n.func): n for n in ast.walk(tree) if isinstance(n, ast.Call)}
        targets = {text: look_up(text, names, obj, module) for text in calls}
        call = None
        if len(tree.body) == 1 and isinstance(tree.body[0], ast.Expr) and isinstance(tree.body[0].value, ast.Call):
            node = tree.body[0].value
            target = targets[ast.unparse(node.func)]
            call = target and literal_call(target, node)
        output = part.want.replace("<BLANKLINE>", "").rstrip()
        found[-1][1].append({"code": code, "output": output, "call": call,
                             "keys": sorted({api_key(t) for t in targets.values() if t is not None})})
    return found


def imported_names(tree):
    """Names bound by import statements, as dotted paths: `from a import b as c` binds c to a.b."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def look_up(text, names, obj, module):
    """The callable that a dotted name in an example stands for, or None. Only already imported modules are searched."""
    if not re.fullmatch(r"[\w.]+", text):
        return None
    parts = text.split(".")
    parts[:1] = names.get(parts[0], parts[0]).split(".")
    if len(parts) == 1 and parts[0] == getattr(obj, "__name__", None):
        return obj
    for split in range(len(parts) - 1, -1, -1):
        found = sys.modules.get(".".join(parts[:split])) if split else module
        for part in parts[split:]:
            found = inspect.getattr_static(found, part, None) if inspect.isclass(found) else getattr(found, part, None)
        if callable(found) and getattr(found, "__name__", None):
            return found
    return None


def api_key(obj):
    """Where an object was defined, which identifies it under whatever name it is reached."""
    return f"{getattr(obj, '__module__', None)}:{getattr(obj, '__qualname__', None) or obj.__name__}"


def literal_call(target, node):
    """(key, arguments by name) of a call whose arguments are all JSON literals, else None."""
    try:
        values = [ast.literal_eval(a) for a in node.args]
        keywords = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
        signature = inspect.signature(target)
        bound = signature.bind(*values, **keywords).arguments
        if any(signature.parameters[name].kind in (2, 4) for name in bound):  # *args, **kwargs have no single name
            return None
        json.dumps(bound, allow_nan=False)
        return [api_key(target), bound]
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return None


# ----------------------------------------------------------------------------------------------------------------------
# The parent: one package to records


def collect_package(package, out, args, bar):
    """Introspect one package and write its records."""
    objects, rejected = introspect(package, args.timeout, bar)
    apis = name_apis(objects, package)
    records = [*api_documents(apis, package), *trajectories(apis, package), *code_files(package, args.code_mb),
               *prose(package)]
    log = out / "rejected" / f"{package.name}.jsonl"
    log.parent.mkdir(exist_ok=True)
    log.write_text("".join(json.dumps({"module": module, "reason": reason}) + "\n" for module, reason in rejected))
    write_records(out / package.filename, records)


def introspect(package, timeout, bar):
    """Ask child processes about each module. A child that dies or is too slow is replaced; its module is lost."""
    objects, rejected, process = [], [], None
    # Little of the user's environment goes along: some modules have defaults that show it, and it may hold secrets.
    environment = {k: v for k, v in os.environ.items() if k in ("PYTHONPATH", "LD_LIBRARY_PATH", "SYSTEMROOT")} | {
        "PATH": os.defpath, "PYTHONHASHSEED": "0", "MPLBACKEND": "Agg", "BROWSER": "true", "QT_QPA_PLATFORM": "offscreen",
        "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    with tempfile.TemporaryDirectory() as scratch:
        environment["HOME"] = scratch
        for module in package.modules:
            if process is None or process.poll() is not None:
                process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--child"], stdin=subprocess.PIPE,
                                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=scratch, env=environment,
                                           text=True, encoding="utf-8", start_new_session=True)
            timer = threading.Timer(timeout, process.kill)
            timer.start()
            try:
                process.stdin.write(module + "\n")
                process.stdin.flush()
                answer = json.loads(process.stdout.readline())
                objects += answer["objects"]
                if answer["error"]:
                    rejected.append((module, answer["error"]))
            except (OSError, json.JSONDecodeError):
                expired = not timer.is_alive()
                process.kill()
                process.wait()
                rejected.append((module, f"over {timeout} s" if expired else f"exited with status {process.returncode}"))
            timer.cancel()
            bar.update()
        if process:
            process.kill()
            process.wait()
    return objects, rejected


def name_apis(objects, package):
    """Give each object its public name: the shortest path it is reachable by, in the module it comes from if possible.

    Returns {key: description with "name", "summary", "tool"} for what is documented.
    """
    paths, described = {}, {}
    for o in objects:
        if "path" in o:
            paths.setdefault(o["key"], set()).add(o["path"])
        if "doc" in o:
            described.setdefault(o["key"], o)

    def rank(path, home):
        parent = path.rpartition(".")[0]
        own = home == parent or home.startswith(parent + ".") or home.lstrip("_") == parent
        return path.count("."), not own, len(path), path

    best = {key: min(found, key=lambda p: rank(p, key.split(":")[0])) for key, found in paths.items()}
    names = {key: best.get(key) or f"{best[o['of']]}.{o['name']}" for key, o in described.items()
             if key in best or o.get("of") in best}
    apis, taken = {}, {}
    for key in sorted(names, key=lambda k: rank(names[k], described[k]["home"])):
        o, name, summary = described[key], names[key], summarise(described[key]["doc"])
        if len(summary) < 12:
            continue
        # One API under several classes (torch.Tensor.abs, torch.IntTensor.abs, ...) has one documentation: keep the first.
        api = taken.setdefault((name.rpartition(".")[2], o["doc"], o["signature"]), o)
        if api is o:
            tool = {"description": summary, "name": name, "parameters": o["parameters"]}
            api |= {"name": name, "summary": summary, "tool": {"type": "function", "function": tool}}
        apis[key] = api
    return apis


def distinct(apis):
    """Each API once, by name: several keys may stand for the same one."""
    return sorted({api["name"]: api for api in apis.values()}.values(), key=lambda a: a["name"])


def summarise(doc):
    """The first sentence of a docstring, on one line, without the signature that compiled functions put there.

    >>> summarise("add(a, b) -> int\\n\\nAdd two numbers, i.e.\\nsum them. More.")
    'Add two numbers, i.e. sum them.'
    """
    paragraphs = [re.sub(r"\s+", " ", p).strip() for p in doc.split("\n\n")]
    paragraphs = [p for p in paragraphs if p and not re.match(r"[\w.]+\(.*\)", p) and not re.match(r"[.=~*-]{2,}", p)]
    first = re.split(r"(?<=[a-z)`'\"\]][.!?]) (?=[A-Z`])", paragraphs[0])[0] if paragraphs else ""
    first = re.sub(r":\w+:`~?([^`]*)`|`{1,2}([^`]*)`{1,2}", lambda m: m[1] or m[2] or "", first)
    return textwrap.shorten(first, 120, placeholder=" ...")


def api_documents(apis, package):
    """One document an API: how it is called, what it does, and the tool definition an agent would be given."""
    for api in distinct(apis):
        tool = json.dumps(api["tool"]["function"], ensure_ascii=False)
        text = f"{api['name']}{api['signature']}\n\n{api['doc']}\n\n{tool}\n\nPackage: {package.name} {package.version}, license: {package.license}"
        yield Record(f"api_doc:{api['name']}", "api_doc", f"python:{package.name}", package.license, [api["name"]], text)


PYTHON_TOOL = {"type": "function", "function": {
    "description": "Run Python code and return what it prints.", "name": "python",
    "parameters": {"type": "object", "properties": {"code": {"type": "string"}}, "required": ["code"]}}}


def trajectories(apis, package):
    """One conversation a docstring: prose asks, a call of the API itself or of a Python tool acts, real output answers."""
    for api in distinct(apis):
        tools, messages, called, feedback = {}, [], {api["name"]}, False
        for i, (text, steps) in enumerate(api["sessions"]):
            request = last_paragraph(text, api["summary"])
            if i == 0:
                request = f"{api['name']}: {api['summary']} {request}".strip()
            messages.append(chat_message("user", request or "Go on."))
            for step in steps:
                known = [apis[k] for k in step["keys"] if k in apis]
                called.update(a["name"] for a in known)
                key, arguments = step["call"] or (None, None)
                if key in apis and set(arguments) <= set(apis[key]["parameters"]["properties"]):
                    tool, arguments = apis[key]["tool"], arguments
                else:
                    tool, arguments = PYTHON_TOOL, {"code": step["code"]}
                tools[tool["function"]["name"]] = tool
                messages.append(chat_message("assistant", calls=[(tool["function"]["name"], arguments)]))
                messages.append(chat_message("tool", step["output"]))
                feedback = feedback or bool(step["output"])
        if feedback:
            yield Record(f"trajectory:{api['name']}", "trajectory", f"python:{package.name}", package.license,
                         sorted(called), messages=messages, tools=list(tools.values()))


def last_paragraph(text, summary):
    """The prose just before an example, without headings, parameter lists and the summary itself, or ''."""
    paragraphs = [re.sub(r"\s+", " ", p).strip() for p in re.split(r"\n\s*\n", text)]
    paragraphs = [p for p in paragraphs if len(p) > 15 and summarise(p) != summary
                  and not re.search(r"-{4,}|={4,}|\(.*\) ?->|^(\w+ )?(args|arguments|parameters|returns|inputs?|raises)\b|:param", p, re.I)]
    return paragraphs[-1][:500] if paragraphs else ""


def code_files(package, limit_mb):
    """Source files, chosen by a hash of their path until the limit is reached. Generated and test files are left out."""
    budget = limit_mb * 1e6
    for path, module, public in sorted(package.files, key=lambda f: unit_hash(f[1])):
        if not public or budget <= 0 or not 200 < path.stat().st_size < 100_000:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if max(map(len, text.split("\n"))) > 1000:
            continue
        budget -= len(text)
        yield Record(f"code:{module}", "code", f"python:{package.name}", package.license, [], text)


def prose(package):
    """Package description, module documentation, long comments and, in the standard library, the language reference's topics."""
    texts = {f"text:{package.name}": package.description}
    if package.name == "stdlib":
        topics = importlib.import_module("pydoc_data.topics").topics
        texts |= {f"text:topic:{name}": topic for name, topic in topics.items()}
    for path, module, _ in package.files:
        source = path.read_text(encoding="utf-8", errors="replace")
        docstring = re.match(r'(?:[ \t]*(?:#[^\n]*)?\n)*[rRuU]?"""(.*?)"""', source, re.S)
        texts[f"text:{module}"] = inspect.cleandoc(docstring[1]) if docstring else ""
        for found in re.finditer(r"(?:^[ \t]*#.*\n){6,}", source, re.M):
            comment = re.sub(r"^[ \t]*#+ ?", "", found[0], flags=re.M)
            if len(re.findall(r"[^\w\s.,;:'\"`()-]", comment)) < 0.02 * len(comment):  # prose, not code switched off
                texts[f"text:{module}:{found.start()}"] = comment
    for name, text in sorted(texts.items()):
        if len(text) >= 200:
            yield Record(name, "text", f"python:{package.name}", package.license, [], text)


# ----------------------------------------------------------------------------------------------------------------------
# Function-calling conversations from documentation

REQUESTS = ["{d} {a}", "{a} {d}", "Please do this for me. {d} {a}", "I need the following: {d} {a}", "Task: {d} {a}",
            "Here is what I want. {d} {a}", "Can you help? {d} {a}", "My goal: {d} {a}", "Next step: {d} {a}"]
ARGUMENTS = ["{p} is {v}", "{p} = {v}", "set {p} to {v}", "use {v} for {p}", "{v} as {p}", "let {p} be {v}", "{p}: {v}"]
REFUSALS = ["None of the given tools can do this.", "I have no tool for that request.",
            "The tools at hand do not cover this, so I make no call.", "No available function fits this request."]


def read_apis(shard):
    """The tool definitions in a shard's api_doc records, with their source."""
    with open(shard, encoding="utf-8") as lines:
        for line in lines:
            record = Record.from_json(line)
            if record.domain == "api_doc" and len(record.apis) == 1:
                yield json.loads(record.text.rsplit("\n\n", 2)[-2]) | {"source": record.source, "license": record.license}


def indexes(apis, seed, sizes=(4, 5, 6)):
    """Reference cards: a few APIs listed by name, then by purpose. To read one is to look names up by what they do.

    Every API is on one card of each size. Neighbours in hash order share a card, so that held-out APIs, which are
    neighbours too, spoil few others.
    """
    apis = sorted((a for a in apis if not a["description"].startswith("See ")), key=lambda a: unit_hash(a["name"]))
    for size, i in ((size, i) for size in sizes for i in range(0, len(apis), size)):
        card = list({a["description"]: a for a in apis[i:i + size]}.values())
        rng = random.Random(f"{seed} {size} {card[0]['name']}")
        listed = [json.dumps({"description": a["description"], "name": a["name"]}, ensure_ascii=False) for a in card]
        asked = [f"{a['description']}\n" + json.dumps({"name": a["name"]}) for a in rng.sample(card, len(card))]
        yield Record(f"api_doc:index:{size}:{card[0]['name']}", "api_doc", "python:index", " AND ".join(sorted({a["license"] for a in card})),
                     sorted(a["name"] for a in card), "APIs by name\n" + "\n".join(listed) + "\n\nAPIs by purpose\n" + "\n".join(asked))


def synthesise(apis, seed):
    """Two conversations an API that can be called with JSON arguments: one with several tools to choose from, and one of
    single, parallel (two calls at once) or irrelevant (no tool fits). Yields Records.

    The kinds are those of the Berkeley Function-Calling Leaderboard. Nothing here knows which APIs are held out.
    """
    usable = sorted((a for a in apis if can_call(a)), key=lambda a: unit_hash(a["name"]))
    words = sorted({w for a in apis for w in re.findall(r"\b[a-z]{3,12}\b", a["description"])})
    for i, api in enumerate(usable):
        neighbours = [a for a in usable[max(0, i - 12):i + 13] if a["description"] != api["description"]]
        for kind in ("multiple", "other"):
            rng = random.Random(f"{seed} {kind} {api['name']}")
            kind = kind if kind == "multiple" else rng.choice(["single", "single", "parallel", "irrelevant"])
            others = rng.sample(neighbours, min(len(neighbours), 1 if kind == "parallel" else 3))
            tools = {"single": [api], "irrelevant": others}.get(kind, [api, *others])
            rng.shuffle(tools)
            targets = [api] if kind != "parallel" else [api, rng.choice(tools)]
            calls = [(t["name"], random_arguments(t["parameters"], rng, words)) for t in targets]
            asked = " Also: ".join(ask(t["description"], arguments, rng) for t, (_, arguments) in zip(targets, calls))
            answer = chat_message("assistant", calls=calls) if kind != "irrelevant" else \
                chat_message("assistant", rng.choice(REFUSALS))
            definitions = [{"type": "function", "function": {k: t[k] for k in ("description", "name", "parameters")}} for t in tools]
            yield Record(f"instruction:{kind}:{api['name']}", "instruction", api["source"], api["license"],
                         sorted({t["name"] for t in [api, *targets]}), messages=[chat_message("user", asked), answer],
                         tools=definitions)


def can_call(api):
    """Whether it is described in itself, short enough for a small model's window, and every required type is known."""
    properties, required = api["parameters"]["properties"], api["parameters"]["required"]
    return not api["description"].startswith("See ") and len(properties) <= 4 and all("type" in properties[p] for p in required)


def ask(description, arguments, rng):
    """A request in words that holds all that the call needs."""
    phrases = [rng.choice(ARGUMENTS).format(p=p, v=json.dumps(v, ensure_ascii=False)) for p, v in arguments.items()]
    stated = ", ".join(phrases)
    return rng.choice(REQUESTS).format(d=description.rstrip(".") + ".", a=stated + "." if stated else "").strip()


def random_arguments(schema, rng, words):
    """Arguments by the schema: every required parameter, and each optional one of known type with probability 0.3."""
    return {name: random_value(entry, rng, words) for name, entry in schema["properties"].items()
            if "type" in entry and (name in schema["required"] or rng.random() < 0.3)}


def random_value(entry, rng, words):
    """A value of the type that a JSON Schema entry states, one of its enum if it has one."""
    if entry.get("enum"):
        return rng.choice(entry["enum"])
    match entry["type"]:
        case "boolean":
            return rng.random() < 0.5
        case "integer":
            return rng.choice([rng.randrange(10), rng.randrange(100), rng.randrange(-50, 5000), 2 ** rng.randrange(11)])
        case "number":
            return rng.choice([round(rng.uniform(-10, 10), 2), round(rng.uniform(0, 1), 3), float(rng.randrange(1000))])
        case "string":
            a, b = rng.choice(words), rng.choice(words)
            return rng.choice([a, f"{a} {b}", f"{a}_{b}", f"{a}.{rng.choice(['txt', 'csv', 'json', 'py'])}", f"/{a}/{b}",
                               a.title(), f"{a}{rng.randrange(100)}"])
        case "array":
            items = entry.get("items") or {"type": rng.choice(["integer", "integer", "number", "string"])}
            return [random_value(items, rng, words) for _ in range(rng.randrange(1, 5))] if items.get("type") else []
        case "object":
            return {rng.choice(words): rng.randrange(100) for _ in range(rng.randrange(1, 3))}


# ----------------------------------------------------------------------------------------------------------------------


def fingerprint(shards, seed):
    """Identifies the inputs of the synthesis, so that it is redone when and only when they change."""
    digest = hashlib.sha256(str(seed).encode())
    for shard in shards:
        digest.update(f"{shard.name} {shard.stat().st_size}".encode())
    return digest.hexdigest()[:8]


def report(shards, out, seconds):
    records, characters, steps, documented = Counter(), Counter(), 0, 0
    for shard in shards:
        with open(shard, encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                records[record["domain"]] += 1
                documented += record["domain"] == "api_doc" and len(record["apis"]) == 1
                characters[record["domain"]] += len(line)
                if record["domain"] == "trajectory":
                    steps += sum(m["role"] == "tool" for m in record["messages"])
    rejected = sum(len(log.read_text().splitlines()) for log in (out / "rejected").glob("*.jsonl"))
    print(f"{'domain':<12} {'records':>8} {'MB':>7}")
    for domain in DOMAINS:
        print(f"{domain:<12} {records[domain]:>8,} {characters[domain] / 1e6:>7.1f}")
    print(f"{documented:,} APIs documented, {steps:,} tool calls with their real outputs, from {len(shards) - 1} packages "
          f"in {seconds:.0f} s; {rejected} modules could not be read (reasons in {out}/rejected)")


if __name__ == "__main__":
    child() if sys.argv[1:] == ["--child"] else run_main(main)
