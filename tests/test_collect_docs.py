"""What docstrings and annotations say of parameters, beside docstring_parser and numpydoc."""
import ast
import contextlib
import enum
import importlib
import inspect
import json
import os
import re
import signal
import sys
import time
import types
import typing
import warnings
from argparse import Namespace

import pytest

import collect

STYLES = {
    "numpy": """Join things.

        Parameters
        ----------
        a, b : int
            Numbers to
            join.
        how : {'left', 'right'}, default 'left'
            The way.
        names : list of str, optional
            Names: as given.
        data : array_like
        fn : callable
            Called for each.
        *rest : float
            More numbers.
        **options
            Ignored.

        Returns
        -------
        c : str
            Not a parameter.

        Raises
        ------
        ValueError
            If a is wrong.
        """,
    "google": """Join things.

        Args:
            a (int): Numbers to
                join.
            b (int): Numbers to join.
            how (str): The way. One of 'left' or 'right'. Defaults to 'left'.
            names (list[str], optional): Names: as given.
            data (array-like): Data.
            fn (Callable[[int], str]): Called for each.
            *rest (float): More numbers.

        Returns:
            c: Not a parameter.

        Raises:
            ValueError: If a is wrong.
        """,
    "sphinx": """Join things.

        :param int a: Numbers to
            join.
        :param b: Numbers to join.
        :type b: int
        :param how: The way, either 'left' or 'right'.
        :type how: str
        :param list[str] names: Names: as given.
        :param fn: Called for each.
        :type fn: callable
        :param rest: More numbers.
        :type rest: float
        :returns: c, not a parameter.
        :raises ValueError: If a is wrong.
        """,
    "epytext": """Join things.

        @param a: Numbers to join.
        @type a: int
        @param b: Numbers to join.
        @type b: int
        @param how: The way, either 'left' or 'right'.
        @type how: str
        @param names: Names: as given.
        @type names: list of str
        @return: c, not a parameter.
        @raise ValueError: If a is wrong.
        """,
    "plain": """Join things.

        a -- Numbers to join.
        b -- Numbers to join.
        'how' -- The way, either 'left' or 'right'.
        * names - Names: as given.

        ValueError -- is raised if a is wrong.
        """}


def join(a, b, how="left", names=(), data=None, fn=None, *rest, **options):
    pass


def schema_of(function, doc, module=None):
    return collect.json_schema(inspect.signature(function).parameters.values(), inspect.cleandoc(doc), module)


@pytest.mark.parametrize("style", STYLES)
def test_styles(style):
    schema = schema_of(join, STYLES[style])
    properties, typed = schema["properties"], style != "plain"
    number = {"type": "integer"} if typed else {}
    assert schema["required"] == ["a", "b"]
    assert {k: properties["a"][k] for k in number} == number and properties["a"] == properties["b"]
    assert properties["a"]["description"] == "Numbers to join."
    assert (properties["how"]["type"], properties["how"]["default"]) == ("string", "left")
    assert properties["how"]["enum"] == ["left", "right"] and properties["how"]["description"].startswith("The way")
    assert properties["names"]["description"] == "Names: as given."
    assert properties["names"].get("items") == ({"type": "string"} if typed else None)
    if style in ("numpy", "google"):
        assert properties["data"]["type"] == "array"
        assert properties["rest"] == {"type": "array", "items": {"type": "number"}, "description": "More numbers."}
    if style in ("numpy", "google", "sphinx"):
        assert properties["fn"] == {"description": "Called for each."}  # a function is no JSON value
    assert not {"c", "ValueError", "Returns", "Raises"} & properties.keys()


def test_keywords_by_their_documented_names():
    def plot(x, **kwargs):
        pass
    schema = schema_of(plot, "Plot.\n\nArgs:\n    x (list): Values.\n    color (str): Of the line.\n    width (int): In px.")
    assert [*schema["properties"]] == ["x", "color", "width"] and schema["required"] == ["x"]
    assert schema["properties"]["color"] == {"type": "string", "description": "Of the line."}


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


UserId = typing.NewType("UserId", int)
ANNOTATIONS = [
    (typing.Optional[int], "Optional[int]", {"type": "integer", "nullable": True}),
    (int | None, "int | None", {"type": "integer", "nullable": True}),
    (typing.Literal["a", "b"], "Literal['a', 'b']", {"type": "string", "enum": ["a", "b"]}),
    (typing.Annotated[str, "A note."], "Annotated[str, 'A note.']", {"type": "string"}),
    (typing.List[int], "List[int]", {"type": "array", "items": {"type": "integer"}}),
    (list[list[float]], "list[list[float]]", {"type": "array", "items": {"type": "array", "items": {"type": "number"}}}),
    (dict[str, int], "dict[str, int]", {"type": "object"}),
    (frozenset[int], "frozenset[int]", {"type": "array", "items": {"type": "integer"}}),
    (typing.Sequence[str], "Sequence[str]", {"type": "array", "items": {"type": "string"}}),
    (typing.Union[str, bool], "Union[str, bool]", {"type": ["string", "boolean"]}),
    (typing.Union[str, list[int]], "str | list[int]",
     {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]}),
    (re.Pattern, "re.Pattern", {"type": "string"}), (typing.IO[str], "IO[str]", {"type": "object", "title": "IO"}),
    (Colour, "Colour", {"type": "string", "enum": ["red", "blue"]}), (UserId, "UserId", {"type": "integer"}),
    (typing.Callable[[int], str], "Callable[[int], str]", {}), (typing.Any, "Any", {})]


@pytest.mark.parametrize("annotation, text, expected", ANNOTATIONS, ids=lambda value: str(value)[:20])
def test_annotations_are_read_as_their_strings(annotation, text, expected):
    """Every alternative is held. A description in Annotated counts."""
    import sys
    for stated in (annotation, text):
        parameter = inspect.Parameter("p", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=stated)
        [schema] = collect.json_schema([parameter], "", sys.modules[__name__])["properties"].values()
        if typing.get_origin(annotation) is typing.Annotated:
            assert schema.pop("description") == "A note."
        assert schema == expected, stated


def test_what_counts_more():
    """The documented type before a guess from the default; no default that contradicts the type; optional ones, and self, are
    not required."""
    def f(self, count=None, ratio=1, flag="no", out=None, size=3):
        pass
    schema = schema_of(f, "F.\n\nParameters\n----------\ncount : int\nratio : float\nflag : bool\n    Whether.\n"
                          "out : ndarray, optional\nsize : int or tuple of int")
    assert [*schema["properties"]] == ["count", "ratio", "flag", "out", "size"] and schema["required"] == []
    assert schema["properties"]["count"] == {"type": "integer"}
    assert schema["properties"]["ratio"] == {"type": "number", "default": 1}
    assert schema["properties"]["flag"] == {"type": "boolean", "description": "Whether."}
    assert schema["properties"]["size"]["default"] == 3
    assert schema["properties"]["size"]["anyOf"] == [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]
    assert str(collect.find_signature(None, "f(a[, b[, c=1]])\n\nDo it.")) == "(a, b=..., c=1)"


MODULE = '''
import abc, enum, functools, warnings

class Wrong(ValueError):
    """Raised when something is wrong."""

class Kind(enum.Enum):
    """Kinds of things."""
    A = 1

class BaseThing(abc.ABC):
    """What all things have."""
    @abc.abstractmethod
    def go(self): ...

def old(x: int):
    """Do it in the old way.

    .. deprecated:: 1.2
    """

def new(x: int):
    """Do it in the new way."""

class Box:
    """A box of things."""
    def put(self, x: int):
        """Put a thing into the box."""
    @classmethod
    def from_text(cls, text: str):
        """Make a box from its text."""
    @staticmethod
    def largest(n: int):
        """Return the largest box of n."""
'''


def test_what_no_one_would_call(tmp_path, monkeypatch):
    """It is documented all the same."""
    (tmp_path / "unfitting.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    objects = collect.describe_module("unfitting", {})["objects"]
    found = {o["key"].partition(":")[2]: o["unfit"] for o in objects}
    assert found.keys() >= {"Wrong", "Kind", "BaseThing", "old", "new", "Box.put", "Box.from_text", "Box.largest"}
    assert not any(found[name] for name in ("new", "Box", "Box.from_text", "Box.largest"))
    assert all(found[name] for name in ("Wrong", "Kind", "BaseThing", "BaseThing.go", "old", "Box.put"))


def documented_functions(package, most=250):
    """Public callables of an installed package with docstrings of some length, spread evenly: [(name, object)]."""
    module, found = importlib.import_module(package), {}
    parts = [module, *(m for n in ("linalg", "fft", "random", "nn", "nn.functional", "algorithms", "signal.windows")
                       if (m := getattr(module, n.split(".")[0], None)) and inspect.ismodule(m))]
    for part in parts:
        for name in sorted(n for n in dir(part) if not n.startswith("_")):
            with warnings.catch_warnings(action="ignore"):
                obj = getattr(part, name, None)
            doc = getattr(obj, "__doc__", None)
            if callable(obj) and isinstance(doc, str) and len(doc) > 200 and collect.find_signature(obj, ""):
                found.setdefault(id(obj), (f"{part.__name__}.{name}", obj))
    found = sorted(found.values(), key=lambda pair: pair[0])
    return found[::max(1, len(found) // most)]


def by_numpydoc(doc):
    numpydoc = pytest.importorskip("numpydoc.docscrape")
    with warnings.catch_warnings(action="ignore"):
        parsed = numpydoc.NumpyDocString(doc)
    entries = [*parsed["Parameters"], *parsed["Other Parameters"]]
    return {name.strip(" *"): " ".join(e.desc) for e in entries for name in e.name.split(",") if e.desc}


def by_docstring_parser(doc):
    parser = pytest.importorskip("docstring_parser")
    return {p.arg_name.strip(" *"): p.description for p in parser.parse(doc).params
            if p.description and p.args[0] in ("param", "parameter", "arg", "argument", "key", "keyword")}


def words(text):
    return re.findall(r"[^\W_]+", text.lower())


@pytest.mark.parametrize("package, reference", [
    ("numpy", by_numpydoc), ("networkx", by_numpydoc), ("sympy", by_numpydoc), ("torch", by_docstring_parser),
    ("requests", by_docstring_parser), ("transformers.utils", by_docstring_parser)])
def test_beside_the_reference(package, reference):
    """Nearly all parameters that a reference finds described are, in the same words."""
    pytest.importorskip(package)
    total, found, same, missed = 0, 0, 0, []
    for name, obj in documented_functions(package):
        doc = collect.documentation(obj)
        try:
            expected = reference(doc)
        except Exception:  # the references refuse some docstrings
            continue
        parameters = list(collect.find_signature(obj, doc).parameters.values())
        properties = collect.json_schema(parameters, doc)["properties"]
        for parameter, description in expected.items():
            if parameter not in properties or not words(description):
                continue
            ours = properties[parameter].get("description", "")
            total += 1
            found += bool(ours)
            same += bool(ours) and words(ours)[:4] == words(collect.shorten(description))[:4]
            if not ours:
                missed.append((name, parameter, description[:60]))
    assert total >= 30 and found >= 0.95 * total, (total, found, missed[:10])
    assert same >= 0.95 * found, (found, same)


@pytest.mark.parametrize("doc", [
    "", "Args:", "Parameters\n----------", "Args:\n" * 1000, "a: b\n" * 100_000, "a : int\n    " * 20_000,
    "\t" * 50_000 + "a: b", "Args:\n" + "    " * 10_000 + "x: y", "x" * 200_000, "Args:\n    a (" + "(" * 50_000 + "): b",
    ":param " * 50_000, "a, " * 50_000 + ": int", "Args:\n    a (int): one of " + "'a', " * 50_000,
    "Parameters\n----------\na : {" + "'x', " * 50_000 + "}", "Args:\n    \U0001f600: x\n    é (int): y"], ids=range(15))
def test_hostile_docstrings_take_bounded_time(doc):
    started = time.time()
    parameters = inspect.signature(join).parameters.values()
    json.dumps(collect.json_schema(parameters, doc))
    assert time.time() - started < 5


SPEC = {
    "openapi": "3.0.0", "info": {"title": "Shop", "version": "1"}, "paths": {"/orders": {"post": {
        "operationId": "order", "summary": "Place an order.", "responses": {},
        "parameters": [{"name": "speed", "in": "query", "description": "How fast it goes.",
                        "schema": {"type": "string", "enum": ["slow", "fast"], "default": "slow"}},
                       {"name": "by", "in": "query", "schema": {"type": "string", "format": "date-time"}}],
        "requestBody": {"content": {"application/json": {"schema": {"type": "object", "required": ["item"], "properties": {
            "item": {"type": "object", "description": "What to send.", "properties": {
                "count": {"type": "integer", "minimum": 1, "maximum": 9, "description": "How many of them."}}}}}}}}}}}}


def test_web_specifications_keep_what_is_said_of_parameters(tmp_path):
    path = tmp_path / "shop.json"
    path.write_text(json.dumps(SPEC))
    [record] = collect.openapi_records(path, "shop.json", "MIT", Namespace())
    properties = json.loads(record.text.rsplit("\n\n", 2)[1])["parameters"]["properties"]
    assert properties["speed"] == {"type": "string", "enum": ["slow", "fast"], "default": "slow", "description": "How fast it goes."}
    assert properties["by"] == {"type": "string", "format": "date-time"}
    assert properties["item"]["description"] == "What to send."
    assert properties["item"]["properties"]["count"] == {
        "type": "integer", "minimum": 1, "maximum": 9, "description": "How many of them."}


# What is right, by hand, in each style. In a plain list there are no types but for those guessed.
HAND = {
    "x": {"type": "integer", "description": "Where it is, which may be negative as well."},
    "y": {"type": "integer", "description": "How high: up."},
    "mode": {"type": "string", "enum": ["fast", "slow"], "default": "fast", "description": "How to move."},
    "names": {"type": "array", "items": {"type": "string"}, "description": "What they are called."},
    "data": {"type": "array", "description": "What is moved."},
    "key": {"description": "Gives the order."},
    "limit": {"type": "integer", "default": 5, "nullable": True,
              "description": "The most steps. Defaults to 5."},
    "args": {"type": "array", "items": {"type": "number"}, "description": "Further points."}}
BOTH = "Where they are, which may be negative as well."
BY_HAND = {
    "numpy": ("""Move a point.

        Parameters
        ----------
        x, y : int
            Where they are, which may be
            negative as well.

            A second paragraph: of x.
        mode : {'fast', 'slow'}
            How to move.
        names : list of str, optional
            What they are called.
        data : array_like
            What is moved.
        key : callable
            Gives the order.
        limit : int or None
            The most steps. Defaults to 5.
        *args : float
            Further points.
        **kwargs
            Passed on.

        Returns
        -------
        x : str
            Not the parameter.
        total : int
            The sum.

        Raises
        ------
        KeyError
            If it is not there.
        """, HAND | {name: {"type": "integer", "description": BOTH} for name in "xy"}),
    "google": ("""Move a point.

        Args:
            x (int): Where it is, which may be
                negative as well.
            y (int): How high: up.
            mode ({'fast', 'slow'}): How to move.
            names (list of str, optional): What they are called.
            data (array_like): What is moved.
            key (callable): Gives the order.
            limit (int or None): The most steps. Defaults to 5.
            *args (float): Further points.
            **kwargs: Passed on.

        Returns:
            total (int): The sum.

        Raises:
            KeyError: If it is not there.
        """, HAND),
    "sphinx": (r"""Move a point.

        :param int x: Where it is, which may be
            negative as well.
        :param y: How high: up.
        :type y: int
        :param mode: How to move.
        :type mode: {'fast', 'slow'}
        :param names: What they are called.
        :type names: list of str, optional
        :param array_like data: What is moved.
        :param callable key: Gives the order.
        :param limit: The most steps. Defaults to 5.
        :type limit: int or None
        :param float \*args: Further points.
        :param kwargs: Passed on.
        :returns: The sum.
        :rtype: int
        :raises KeyError: If it is not there.
        """, HAND),
    "epytext": ("""Move a point.

        @param x: Where it is, which may be
            negative as well.
        @type x: C{int}
        @param y: How high: up.
        @type y: int
        @param mode: How to move.
        @type mode: {'fast', 'slow'}
        @param names: What they are called.
        @type names: list of str, optional
        @param data: What is moved.
        @type data: array_like
        @param key: Gives the order.
        @type key: callable
        @param limit: The most steps. Defaults to 5.
        @type limit: C{int} or C{None}
        @param args: Further points.
        @type args: float
        @return: The sum.
        @rtype: int
        @raise KeyError: If it is not there.
        """, HAND),
    "plain": ("""Move a point.

        Keyword arguments:
        x, y -- Where they are, which may be
                negative as well.
        mode -- How to move (default 'fast').
        data -- What is moved.
        key -- Gives the order.
        limit -- The most steps. Defaults to 5.

        KeyError -- is raised if it is not there.
        """, {"x": {"description": BOTH}, "y": {"description": BOTH},
              "mode": {"type": "string", "default": "fast", "description": "How to move (default 'fast')."},
              "data": {"description": "What is moved."}, "key": {"description": "Gives the order."},
              "limit": {"type": "integer", "default": 5, "description": "The most steps. Defaults to 5."}})}


def move(x, y, mode="fast", names=None, data=None, key=None, limit=None, *args, **kwargs):
    pass


@pytest.mark.parametrize("style", BY_HAND)
def test_whole_schemas_by_hand(style):
    doc, expected = BY_HAND[style]
    schema = schema_of(move, doc)
    assert schema["type"] == "object" and schema["required"] == ["x", "y"]
    named = {name: entry for name, entry in schema["properties"].items() if name in expected}
    assert named == expected
    undocumented = {"names", "args"} if style == "plain" else set()
    assert schema["properties"].keys() == expected.keys() | undocumented


def documented(doc, *names):
    """Of each of the named parameters, what is said of it."""
    found = collect.documented_parameters(inspect.cleandoc(doc), set(names))
    return {name: found.get(name, collect.Documented()).description for name in names}


@pytest.mark.parametrize("doc, expected", [
    ("Go.\n\nArgs:\n    a: In.\n\nReturns:\n    b: Out.\n\nRaises:\n    c: Never.",
     {"a": "In.", "b": "", "c": ""}),
    ("Go.\n\nParameters\n----------\na : int\n    In.\n\n"
     "Returns\n-------\na : str\n    Out.\nb : str\n    Out.",
     {"a": "In.", "b": ""}),
    ("Go.\n\n:param a: In.\n:returns: b: out.\n:raises c: Never.", {"a": "In.", "b": "", "c": ""})],
    ids=["google", "numpy", "sphinx"])
def test_other_sections_do_not_leak(doc, expected):
    assert documented(doc, *expected) == expected


@pytest.mark.parametrize("below", [
    "        - b: a way\n        - more: a way\n", "\n        Note: it is short.\n"],
    ids=["list", "paragraph"])
def test_what_is_indented_below_a_parameter_is_none(below):
    doc = f"Go.\n\nArgs:\n    a: The first.\n{below}    b: The other."
    found = collect.documented_parameters(doc, {"a", "b"})
    assert found.keys() == {"a", "b"} and found["b"].description == "The other."


@pytest.mark.parametrize("doc, expected", [
    # boto3.s3.inject:copy, polars.functions.lazy:rolling_corr, torch.Tensor.unfold
    ("Copy.\n\nExample::\n\n    source = {\n        'Key': 'mykey'\n    }\n\n"
     ":param Key: The name of the key.",
     {"Key": "The name of the key."}),
    ("Roll.\n\nIt needs the\n`window - 1` elements before it.\n\n"
     "Parameters\n----------\nwindow\n    The length.",
     {"window": "The length."}),
    ("Unfold.\n\nOf what size the\ndimension :attr:`dimension` is.\n\n"
     "Args:\n    dimension (int): Where to unfold.",
     {"dimension": "Where to unfold."})], ids=["boto3", "polars", "torch"])
def test_sections_count_more_than_what_looks_like_an_entry(doc, expected):
    assert documented(doc, *expected) == expected


def test_entries_named_as_headings_are():
    """sympy.plot documents args; the entries after it count too."""
    doc = "Plot.\n\nParameters\n==========\n\nargs :\n    What to plot.\n\ntitle : str\n    Of the plot."
    assert documented(doc, "args", "title") == {"args": "What to plot.", "title": "Of the plot."}


@pytest.mark.parametrize("doc", [
    "Join.\n\nParameters\n----------\n\\*parts : str\n    What to join.",
    "Join.\n\nArgs:\n    \\*parts (str): What to join."],
    ids=["numpy", "google"])
def test_a_star_may_be_escaped(doc):
    """numpy.ndarray.item and torch.broadcast_shapes write it so."""
    assert documented(doc, "parts") == {"parts": "What to join."}


@pytest.mark.parametrize("doc", [
    "Shine.\n\nParameters\n----------\nλ : float\n    The wavelength.",
    "Shine.\n\nArgs:\n    λ (float): The wavelength."],
    ids=["numpy", "google"])
def test_names_are_those_of_python(doc):
    assert documented(doc, "λ") == {"λ": "The wavelength."}


def test_what_stands_in_angle_brackets_is_no_markup():
    """click, pandas and polars write so of streams, of tags and of what takes a name's place."""
    def read(a):
        pass
    for said in ("Reads from `<stdin>`, not a file.", "Classes of the ``<table>`` tag."):
        schema = schema_of(read, f"Read.\n\nArgs:\n    a (str): {said}")
        assert schema["properties"]["a"]["description"] == said


def test_long_descriptions_are_cut_after_a_word():
    def read(a):
        pass
    schema = schema_of(read, "Read.\n\nArgs:\n    a (str): " + "word " * 100)
    description = schema["properties"]["a"]["description"]
    assert re.fullmatch(r"(word )+\.\.\.", description) and 150 < len(description) <= 204


def alone(annotation, default=inspect.Parameter.empty, doc=""):
    """The schema of a parameter p by itself, whose names are those of this file."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameter = inspect.Parameter("p", kind, annotation=annotation, default=default)
    return collect.json_schema([parameter], doc, sys.modules[__name__])["properties"]["p"]


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Access(enum.IntFlag):
    READ = 1
    WRITE = 2


WORDS = [f"word number {i}" for i in range(80)]


ARRAY, INTEGERS = {"type": "array"}, {"type": "array", "items": {"type": "integer"}}
MORE_ANNOTATIONS = [
    (typing.Optional[typing.Literal["a", "b"]], "Optional[Literal['a', 'b']]",
     {"type": "string", "enum": ["a", "b"], "nullable": True}),
    (typing.Literal["a,b", "c|d"], "Literal['a,b', 'c|d']", {"type": "string", "enum": ["a,b", "c|d"]}),
    (typing.Literal[1, "a"], "Literal[1, 'a']", {"enum": [1, "a"]}),
    (typing.Literal["a", None], "Literal['a', None]", {"type": "string", "enum": ["a"], "nullable": True}),
    (typing.Union[int, str, None], "Union[int, str, None]",
     {"type": ["integer", "string"], "nullable": True}),
    (typing.Union[int, float], "int | float", {"type": "number"}),
    (typing.Optional[typing.List[str]], "typing.Optional[typing.List[str]]",
     {"type": "array", "items": {"type": "string"}, "nullable": True}),
    (tuple[int, ...], "tuple[int, ...]", INTEGERS), (tuple[int, str], "tuple[int, str]", ARRAY),
    (set[int], "set[int]", INTEGERS), (list[UserId], "list[UserId]", INTEGERS),
    (list[dict[str, int]], "list[dict[str, int]]", {"type": "array", "items": {"type": "object"}}),
    (list[typing.Optional[int]], "list[Optional[int]]", INTEGERS),  # an item may be null, the list not
    (typing.Optional[Colour], "Optional[Colour]",
     {"type": "string", "enum": ["red", "blue"], "nullable": True}),
    (Level, "Level", {"type": "integer", "enum": [1, 2]}),
    (Access, "Access", {"type": "integer"}),  # its members may be joined
    (typing.TypeVar("T", bound=int), "int", {"type": "integer"}),
    (typing.Union[int, typing.Any], "Union[int, Any]", {}),
    (typing.Union[Namespace, typing.Any], "Namespace | Any", {}),
    (typing.Literal["None", "by default"], "Literal['None', 'by default']",
     {"type": "string", "enum": ["None", "by default"]}),
    (typing.Literal["it's", 'a "b"'], """Literal["it's", 'a "b"']""",
     {"type": "string", "enum": ["it's", 'a "b"']}),
    (typing.Union[typing.Literal["a"], "Namespace"], "Literal['a'] | 'Namespace'",
     {"anyOf": [{"type": "string", "enum": ["a"]}, {"type": "object", "title": "Namespace"}]}),
    (typing.Literal[*WORDS], f"Literal[{', '.join(map(repr, WORDS))}]", {"type": "string", "enum": WORDS}),
    (list[typing.Literal["a", "b"]], "list[Literal['a', 'b']]",
     {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}}),
    (typing.Optional[Namespace], "Optional[Namespace]",
     {"type": "object", "title": "Namespace", "nullable": True}),
    (typing.Type[int], "Type[int]", {}), (typing.Optional[typing.Callable], "Optional[Callable]", {}),
    (typing.ForwardRef("list[int]"), "list[int]", INTEGERS),
    (int, "'int'", {"type": "integer"})]  # quoted, under `from __future__ import annotations`


@pytest.mark.parametrize("annotation, text, expected", MORE_ANNOTATIONS,
                         ids=[text for _, text, _ in MORE_ANNOTATIONS])
def test_more_annotations_are_read_as_their_strings(annotation, text, expected):
    assert alone(annotation) == expected
    assert alone(text) == expected


@pytest.mark.parametrize("text", ["Annotated[int | str, Doc('A note.')]", "Annotated['int | str', 'A note.']"])
def test_a_note_and_all_alternatives_in_a_text(text):
    assert alone(text) == {"type": ["integer", "string"], "description": "A note."}


def test_a_value_that_a_text_only_names_is_not_known():
    assert alone("Literal[Colour.RED]") == {}


@pytest.mark.parametrize("annotation, default, kept", [
    ("int", True, False), ("bool", 1, False), ("bool", 0, False), ("str", 1, False), ("dict", [], False),
    ("Literal['a', 'b']", "c", False), ("float", float("inf"), False), ("float", float("nan"), False),
    ("Literal['a', 'b']", "b", True), ("float", 1, True), ("Optional[str]", "x", True),
    ("ssl.SSLContext | str | bool", True, True)])
def test_a_default_never_contradicts_the_type(annotation, default, kept):
    schema = alone(annotation, default)
    assert schema.get("default", "none") == (default if kept else "none")
    assert {k: v for k, v in schema.items() if k != "default"} == alone(annotation)


@pytest.mark.parametrize("stated, schema", [
    ("sympy.physics.vector.Point", {}), ("torch.fx.node.Node", {}),
    ("bool or list of (label,type) tuples", {"type": ["boolean", "array"]})])
def test_a_class_is_known_by_its_last_name(stated, schema):
    assert collect.type_schema(stated) == schema


def test_what_is_quoted_in_an_annotation_is_a_type_and_no_value():
    either = {"anyOf": [{"type": "object", "title": "Target"}, {"type": "string"}]}
    assert alone("Union['Target', str]") == alone("'Target' | str") == either


@pytest.mark.parametrize("stated, schema", [
    ("array_like, 1 dimension, nonnegative ints", {"type": "array"}),
    ("slice, int, array-like of ints or bools", {"type": ["integer", "array"]}),
    ("Iterable[tuple[str, Any]]", {"type": "array", "items": {"type": "array"}}),
    ("Literal['default', 'left'] | Same", {"anyOf": [
        {"type": "string", "enum": ["default", "left"]}, {"type": "object", "title": "Same"}]}),
    ("Printer", {}), ("Callable | str", {"type": "string"}),
    ("list of {'a', 'b'}", {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}}),
    ("array-like of {-1, 1}", {"type": "array", "items": {"type": "integer", "enum": [-1, 1]}}),
    ("dict of {str: int}", {"type": "object"}), ("{'a': int}", {"type": "object"}),
    ("dict or a set of 2 or 3 tuples", {"type": ["object", "array"]}),
    ("pair of floats", {"type": "array", "items": {"type": "number"}}),
    ("int tuple", INTEGERS), ("int sequence", INTEGERS), ("ndarray, dtype=float", ARRAY),
    ("bool array_like", {"type": "array", "items": {"type": "boolean"}}),
    ("one of 'a', 'b', 'c'", {"type": "string", "enum": ["a", "b", "c"]}),
    ("either 'a' or 'b'", {"type": "string", "enum": ["a", "b"]}),
    ("'a' (default), 'b'", {"type": "string", "enum": ["a", "b"]}),
    ("int (or str)", {"type": ["integer", "string"]}),
    ("int (default 3) or str", {"type": ["integer", "string"]}),
    ("int, number of clusters", {"type": "integer"}), ("str, the name of the array", {"type": "string"}),
    ("{0, False, True}", {"enum": [0, False, True]}), ("str or Any", {}), ("('DM', 'GE')", {"type": "string", "enum": ["DM", "GE"]}),
    ("NetworkX graph or list of nodes", {"anyOf": [{"type": "object", "title": "Graph"}, ARRAY]}),
    ("[None | scalar | sequence]", {"type": ["number", "array"]}), ("list of integer pairs", {"type": "array", "items": INTEGERS}),
    (":py:class:`~.Expr` or list of :py:class:`~.Expr`", {"anyOf": [{"type": "string"}, {"type": "array", "items": {
        "type": "string"}}]}), (f"Union[{'int, ' * 2000}str]", {})])
def test_alternatives_are_neither_lost_nor_made_up(stated, schema):
    assert collect.type_schema(stated) == schema


@pytest.mark.parametrize("said, default", [
    ("default=0.80 if x is given, else 1", None), ("The default is 3, unless x is given.", None),
    ("Defaults to 3.", 3), ("Series: default is 'index'. DataFrame: default is 'columns'.", None), ("Default: True on Windows", None)])
def test_a_default_under_a_condition_is_none(said, default):
    assert collect.default_in_words(said) == default


@pytest.mark.parametrize("said", [
    "Defaults to 1,000.", "default 1/3", "Defaults to 2**31", "default: 2 * n", "Default 2020-01-01", "default: 50%",
    "Overrides the default 'utf-8' encoding."])
def test_what_only_begins_as_a_value_is_no_default(said):
    assert collect.default_in_words(said) is None


@pytest.mark.parametrize("doc", [
    "Args:\n    a (int): The first.\n        Returns:\n        nothing.\n    b: Other.",
    "Parameters\n----------\na : int\n    The first.\n\n    Notes:\n    nothing.\nb\n    Other."])
def test_a_heading_in_a_description_ends_no_section(doc):
    found = collect.documented_parameters(doc)
    assert [*found] == ["a", "b"] and found["b"].description == "Other."


def test_a_literal_block_describes_no_parameters():
    doc = "Write it so::\n\n    a: 1\n    b: 2\n\nb: The second."
    assert collect.documented_parameters(doc, {"a", "b"}) == {"b": collect.Documented("", "The second.")}


@pytest.mark.parametrize("doc, expected", [
    ("Args:\n    z (dict(str, list(int))): What.", {"z": collect.Documented("dict(str, list(int))", "What.")}),
    (":param x.y: Not one.\n:param int z: One.", {"z": collect.Documented("int", "One.")})])
def test_entries_with_brackets_and_dots(doc, expected):
    assert collect.documented_parameters(doc) == expected


@pytest.mark.parametrize("doc, sentence", [
    ("add(a, b) -> int\n  Adds two numbers.", "Adds two numbers."),
    ("Lambda(x, f(x)) represents a function.\n\nMore.", "Lambda(x, f(x)) represents a function."),
    ("repeat(object) -> create an iterator which returns it.", "create an iterator which returns it."),
    ("f(x, **k)\n\nExplanation\n===========\n\nAdds one.", "Adds one."),
    ("Returns\n=======\n\nsample : list\n    A sample.", ""),
    ("f(*args)\nOverloaded function.\n\n1. f(self: m.A) -> None\n\n2. f(self: m.B) -> None", ""),
    ("Sorted lists\n------------\n\nMore on them.", "Sorted lists"),
    (":returns: a flag that says so", ""), (">>> f(1)\n1\n\nAdds one.", "Adds one."),
    (":param x: a number", ""), ("Args:\n    x: a number", ""),
    ("undo [count]\n\nTakes steps back.", "Takes steps back."),
    ("Adds one\n:param x: a number", "Adds one"), ("Adds one\nArgs:\n    x: a number", "Adds one"),
    ("Checks this\n- and that", "Checks this"), ("Any of:\n\n- a\n- b\n\nMore.", "Any of: - a - b"),
    ("The root, that is\n\n.. math :: \\sqrt{x}\n\nMore.", "The root, that is \\sqrt{x}"),
    ("A :py:class:`~a.b.C` or `~a.b.D`, or ~x.", "A C or D, or ~x.")])
def test_what_is_no_prose_is_no_summary(doc, sentence):
    assert collect.summarise(doc) == sentence


def test_what_is_documented_comes_before_a_guess():
    """From the default, or from the name."""
    numpy = "Go.\n\nParameters\n----------\np : {}\n    Tolerance."
    number = {"type": "number", "default": 0}
    for name, kind in (("p", "number"), ("timeout", "number"), ("depth", "integer"), ("n", "integer")):
        assert collect.parameter_schema(name, "", collect.Documented(), 0) == number | {"type": kind}
    untold = [collect.parameter_schema(n, "", collect.Documented()) for n in ("host", "port", "node")]
    assert untold == [{"type": "string"}, {"type": "integer"}, {}]
    assert alone(inspect.Parameter.empty, 0, numpy.format("float")) == {
        "type": "number", "default": 0, "description": "Tolerance."}
    assert alone("str", doc=numpy.format("int"))["type"] == "string"  # an annotation comes first
    assert alone("str | list[str]", "") == {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}], "default": ""}


@pytest.mark.parametrize("first, names, required", [
    ("f(a[, b])", ["a", "b"], ["a"]), ("f(a[, b, c])", ["a", "b", "c"], ["a"]),
    ("f(a, b=None[, c])", ["a", "b", "c"], ["a"]),
    ("f(a: int, b: str = 'x') -> bool", ["a", "b"], ["a"]),
    ("m.f(a, /, b, *, c=1)", ["a", "b", "c"], ["a", "b"]),
    ("f() -> int", [], [])])
def test_required_by_the_first_line_of_the_documentation(first, names, required):
    """Where introspection shows no more than (...)."""
    def hidden(*args, **kwargs):
        pass
    for obj in (None, hidden):
        parameters = collect.find_signature(obj, f"{first}\n\nDo it.").parameters.values()
        schema = collect.json_schema(parameters, "")
        assert [*schema["properties"]] == names and schema["required"] == required


def sampled(package, reference, most=100):
    """Every k-th of the functions that the reference finds parameters of: [(name, object, {name: what})]."""
    found = []
    for name, obj in documented_functions(package, 10_000):
        try:
            expected = reference(collect.documentation(obj))
        except Exception:  # the references refuse some docstrings
            continue
        pairs = {part.strip(" *\\"): said
                 for key, said in expected.items() if words(said) for part in key.split(",")}
        found += [(name, obj, pairs)] * bool(pairs)
    return found[::-(-len(found) // most)]


@pytest.mark.parametrize("doc", [
    "Go.\n\nParameters\n----------\na : int\n    A.\nb : int, optional\n    B.",
    ":param a: A.\n:type b: int, optional",
    "Go.\n\nArgs:\n    a (int): A.\n    b (int, optional): B."], ids=["numpy", "sphinx", "google"])
def test_what_is_documented_as_optional_is_not_required(doc):
    """As out is, where a signature shows no default. Optional[int] says that it may be null, not that."""
    assert schema_of(lambda a, b: None, doc)["required"] == ["a"]
    nullable = doc.replace("int, optional", "Optional[int]")
    assert schema_of(lambda a, b: None, nullable)["required"] == ["a", "b"]


@pytest.mark.parametrize("package, reference, least", [
    ("numpy", by_numpydoc, 200), ("numpy", by_docstring_parser, 200), ("networkx", by_numpydoc, 100),
    ("networkx", by_docstring_parser, 100), ("sympy", by_numpydoc, 100), ("torch", by_docstring_parser, 200)])
def test_descriptions_begin_as_those_of_the_reference(package, reference, least):
    """What `**` takes up is in the schema only where it was found: so each name that the reference has for it
    counts.
    """
    pytest.importorskip(package)
    total, found, same, missed, others = 0, 0, 0, [], []
    for name, obj, expected in sampled(package, reference):
        doc = collect.documentation(obj)
        parameters = list(collect.find_signature(obj, doc).parameters.values())
        stars = [p.name for p in parameters if p.kind == p.VAR_KEYWORD]
        named = {p.name for p in parameters} - {*stars}
        properties = collect.json_schema(parameters, doc)["properties"]
        for parameter, said in expected.items():
            taken = stars and parameter.isidentifier() and parameter not in (*stars, "optional", "required")
            if parameter not in named and not taken:  # numpydoc finds two names in "name: int, optional"
                continue
            ours = properties.get(parameter, {}).get("description", "")
            start = words(ours)[:-1] if ours.endswith("...") else words(ours)
            total, found = total + 1, found + bool(ours)
            if not ours:
                missed.append((name, parameter, said[:60]))
            elif start == words(said)[:len(start)]:
                same += 1
            else:
                others.append((name, parameter, ours[:60], said[:60]))
    assert total >= least
    assert found >= 0.95 * total, (found, total, missed[:10])
    assert same >= 0.95 * found, (same, found, others[:10])


@contextlib.contextmanager
def within(seconds):
    """TimeoutError where it takes longer, so that what explodes does not hang the tests."""
    def late(*_):
        raise TimeoutError(f"over {seconds} s")
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("make", [
    lambda n: ":param " + "a" * n, lambda n: ":param " + " " * n + "!", lambda n: ":param a" + " " * n + "!",
    lambda n: "Args:\n    how: one of 'a'" + " " * n + "!",
    lambda n: "Args:\n    how: default" + " " * n + "!",
    lambda n: "Args:\n    how (" + "A" * n + "): b", lambda n: "*" * n + "Args" + "*" * n,
    lambda n: "x\n---\n" * (n // 6), lambda n: "Parameters\n----------\n" + "a :\n\n" * (n // 5),
    lambda n: "Args:\n" + "\u2028\x00\xa0é: ü\n" * (n // 8),
    lambda n: "\n".join(" " * i + "a: b" for i in range(int((2 * n) ** 0.5))),
    lambda n: "Args:\n" + "\n".join("\t" * i + "a: b" for i in range(int((n / 4) ** 0.5)))],
    ids="name spaces spaces-after choices default type stars rules blanks unicode steps tabs".split())
def test_time_grows_with_the_length_and_not_its_square(make):
    """100,000 characters take a fraction of a second; their square would take minutes."""
    doc = make(100_000)
    with within(3):
        collect.documented_parameters(doc, {"a", "how"})
        json.dumps(collect.json_schema(inspect.signature(join).parameters.values(), doc))


def test_a_megabyte_of_entries():
    with within(15):
        assert collect.documented_parameters("a: b\n" * 200_000, {"a"}) == {"a": collect.Documented("", "b")}


@pytest.mark.parametrize("line", [".\n", "\n", " \n"], ids=["dots", "blanks", "spaces"])
def test_unfit_takes_bounded_time(line):
    def f():
        pass
    f.__doc__ = "Do it.\n" + line * 50_000 + "x"
    with within(3):
        assert collect.unfit(f, "m:f") == ""


UNFIT = '''
import enum, typing, warnings

class Careful(UserWarning):
    """Warns of something."""

class Flags(enum.IntFlag):
    """Flags of things."""
    A = 1

class Proto(typing.Protocol):
    """What readers have."""

class Parent:
    """This is the base class of all readers."""

class Basement:
    """A room below the house."""

def capitals(x: int):
    """DEPRECATED: Do it in the old way."""

def since(x: int):
    """Deprecated since 1.0, use new."""

def test_it():
    """Test it."""

def latest(n: int):
    """Get the latest contest."""

def warn(n: int):
    """Warn about deprecated features."""

def one_parameter(x: int, y: int = 0):
    """Do it.

    Parameters
    ----------
    x : int
        A number.
    y : int
        Another.

        .. deprecated:: 1.2
            y is deprecated, and will go.
    """
'''


def test_more_of_what_no_one_would_call(tmp_path, monkeypatch):
    """A function of which one parameter is deprecated is not: pandas.concat is such."""
    (tmp_path / "more_unfitting.py").write_text(UNFIT)
    monkeypatch.syspath_prepend(tmp_path)
    objects = collect.describe_module("more_unfitting", {})["objects"]
    assert all(o["doc"] for o in objects)
    found = {o["key"].partition(":")[2]: o["unfit"] for o in objects}
    fit = {"Basement", "latest", "warn", "one_parameter"}
    assert {name for name, reason in found.items() if not reason} == fit
    assert found.keys() == fit | {"Careful", "Flags", "Proto", "Parent", "capitals", "since", "test_it"}


def test_web_parameters_keep_limits_and_what_is_required(tmp_path):
    operation = {
        "operationId": "find", "summary": "Find orders.", "responses": {},
        "parameters": [
            {"name": "size", "in": "query", "description": "How many.",
             "schema": {"type": "integer", "minimum": 1, "maximum": 50, "default": 10}},
            {"name": "since", "in": "query", "required": True, "description": "From when on.",
             "schema": {"type": "string", "format": "date-time"}},
            {"name": "kinds", "in": "query",
             "schema": {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}}}],
        "requestBody": {"required": True, "content": {"application/json": {"schema": {
            "type": "object", "required": ["buyer"], "properties": {"buyer": {
                "type": "object", "description": "Who buys.", "required": ["name"], "properties": {
                    "name": {"type": "string", "description": "As on the card."},
                    "born": {"type": "string", "format": "date", "description": "The day of birth."}}}}}}}}}
    path = tmp_path / "find.json"
    path.write_text(json.dumps({"openapi": "3.0.0", "info": {"title": "Shop", "version": "1"},
                                "paths": {"/find": {"post": operation}}}))
    [record] = collect.openapi_records(path, "find.json", "MIT", Namespace())
    schema = json.loads(record.text.rsplit("\n\n", 2)[1])["parameters"]
    assert sorted(schema["required"]) == ["buyer", "since"]
    assert schema["properties"]["size"] == {
        "type": "integer", "minimum": 1, "maximum": 50, "default": 10, "description": "How many."}
    assert schema["properties"]["since"] == {
        "type": "string", "format": "date-time", "description": "From when on."}
    assert schema["properties"]["kinds"] == {"type": "array", "items": {"type": "string", "enum": ["a", "b"]}}
    buyer = schema["properties"]["buyer"]
    assert buyer["description"] == "Who buys." and buyer["required"] == ["name"]
    assert buyer["properties"] == {
        "name": {"type": "string", "description": "As on the card."},
        "born": {"type": "string", "format": "date", "description": "The day of birth."}}


def test_a_summary_is_no_admonition():
    """As pydantic's, whose documentation begins with a link."""
    doc = ('!!! abstract "Usage Documentation"\n    [Models](../concepts/models.md)\n\n'
           "A base class for creating models.")
    assert collect.summarise(doc) == "A base class for creating models."


def test_a_method_that_is_overridden_is_not_the_base_s():
    class _Base:
        def run(self, a: int): ...

    class Public(_Base):
        def run(self, b: str): ...

    class Further(Public): ...

    assert collect.members(Public)["run"] is Public.run and "run" not in collect.members(Further)


@pytest.mark.parametrize("annotation, said", [
    ("str | list[str]", "Which ones. Each must be 'a' or 'b'."),
    ("Literal['a', 'b', 'c']", "Use either 'a' or 'b'.")])
def test_values_in_prose_do_not_narrow_what_is_stated(annotation, said):
    schema = collect.parameter_schema("x", annotation, collect.Documented("", said))
    assert {k: v for k, v in schema.items() if k != "description"} == collect.type_schema(annotation)


def test_what_breaks_under_inspection_costs_only_itself(tmp_path, monkeypatch):
    """A name that cannot be imported costs no module, an attribute that raises no class."""
    (tmp_path / "lazily.py").write_text('''
__all__ = ["missing", "Holder", "add"]
def __getattr__(name):
    raise ImportError(name)
class Odd:
    @property
    def __class__(self):
        raise RuntimeError
class Holder:
    """Holds one."""
    odd = Odd()
    def get(self):
        """Get it."""
def add(a: int, b: int):
    """Add two numbers."""
''')
    monkeypatch.syspath_prepend(tmp_path)
    found = collect.describe_module("lazily", {})
    assert [o["key"] for o in found["objects"]] == ["lazily:Holder", "lazily:Holder.get", "lazily:add"]


def test_self_of_a_plain_function_is_no_argument():
    def run_it(self, x):
        """Run it.

        >>> run_it("a", 1)
        >>> run_it(2)
        """
    [[_, steps]] = collect.sessions(run_it.__doc__, run_it, types.SimpleNamespace(run_it=run_it, __name__="m"))
    assert [step["call"] and step["call"][1] for step in steps] == [None, {"x": 2}]


@pytest.mark.parametrize("read", [
    lambda n: collect.default_in_words("default " + "1." * n), lambda n: collect.last_paragraph("(" * n, ""),
    lambda n: collect.find_signature(len, "f(a" + "[,a" * n + "]" * n + ")"),
    lambda n: collect.sessions(">>> f(1)" + " " * n + "!\n", len, types),
    lambda n: collect.type_schema("Union[" * n), lambda n: collect.may_be_none("[" * n)],
    ids="default paragraph signature session type none".split())
def test_reading_takes_bounded_time(read):
    with within(3):
        read(100_000)


def test_definition_lists_and_bullets_without_a_heading():
    """As the standard library's (Argument Clinic) and httpx's."""
    doc = "Compress.\n\n  data\n    Bytes to compress.\n  level\n    From 0 to 9\n    or -1.\n\nlevel\n"
    found = collect.documented_parameters(doc, {"data", "level"})
    assert {name: said.description for name, said in found.items()} == {
        "data": "Bytes to compress.", "level": "From 0 to 9 or -1."}
    doc = "**Parameters:**\n\n* **url** - URL for the\nnew request.\n* **body** - Text.\n\nReturns nothing."
    found = collect.documented_parameters(doc, {"url", "body"})
    assert {name: said.description for name, said in found.items()} == {"url": "URL for the new request.", "body": "Text."}


def test_what_is_stated_in_words_narrows_a_plain_text_alone():
    said = collect.Documented("{'inner', 'outer'}", "How.")
    assert collect.parameter_schema("how", "str", said, "inner")["enum"] == ["inner", "outer"]
    assert "enum" not in collect.parameter_schema("how", "str", said, "left")  # the default shows that there are more
    assert "enum" not in collect.parameter_schema("how", "Any", collect.Documented("", "One of 'a' or 'b'."))
    assert collect.parameter_schema("axis", "int", said)["type"] == "integer"
    said = collect.Documented("{'face', 'none'} or color", "")
    assert "anyOf" in collect.parameter_schema("edges", "Literal['face', 'none'] | Color", said)


def test_what_is_required_has_no_default():
    def cluster(p, q=2):
        pass
    schema = schema_of(cluster, "Args:\n    p (int): Power. Defaults to 2.\n    q (int): Other.")
    assert "default" not in schema["properties"]["p"] and schema["properties"]["q"]["default"] == 2


def test_names_that_are_imported_for_types_alone(tmp_path, monkeypatch):
    """They are looked up where the package has them; a class of that name is none of them."""
    files = {"__init__": "", "_typing": "import typing\nSort = typing.Literal['up', 'down']\n", "frames": "class Frame: pass\n",
             "other": "Frame = int | None\n", "use": "from __future__ import annotations\n"
             "def order(by: Sort, frame: Frame):\n    'Order it.'\n"}
    (tmp_path / "sorter").mkdir()
    for name, text in files.items():
        (tmp_path / "sorter" / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("_typing", "frames", "other"):
        importlib.import_module(f"sorter.{name}")
    [order] = collect.describe_module("sorter.use", {})["objects"]
    assert order["parameters"]["properties"] == {
        "by": {"type": "string", "enum": ["up", "down"]}, "frame": {"type": "object", "title": "Frame"}}


@pytest.mark.parametrize("description, schema", [
    ("article number or message id", {}), ("filename string or file object to write to", {"type": "string"}),
    ("The window. Can be a single number or a tuple `(kW,)`", {"type": ["number", "array"]}),
    ("a real or complex square matrix", {}), ("an integer or None", {"type": "integer"}),
    ("the name of the file", {"type": "string"})])
def test_a_guess_from_words_says_nothing_where_an_alternative_is_unknown(description, schema):
    found = collect.parameter_schema("p", "", collect.Documented("", description))
    assert {k: v for k, v in found.items() if k != "description"} == schema


def test_numpy_s_entries_without_a_heading():
    doc = ("Shuffle.\n\nseed : integer, random_state, or None\n    State of the generator.\n"
           "hosts : List of names of all machines\n    of the network.\n")
    found = collect.documented_parameters(doc, {"seed", "hosts"})
    assert found["seed"] == collect.Documented("integer, random_state, or None", "State of the generator.")
    assert found["hosts"].description == "List of names of all machines of the network."


def test_what_the_documentation_lists_comes_before_an_alias():
    said = collect.Documented("{0 or 'index', 1 or 'columns', None}, default 0", "Axis.")
    assert collect.parameter_schema("axis", "int", said)["enum"] == [0, "index", 1, "columns"]
    assert "enum" not in collect.parameter_schema("axis", "int", said, 2)
    doc = "Read.\n\nParameters\n----------\nvalues : str, list of str,\n    optional\n    More texts.\n"
    assert collect.documented_parameters(doc)["values"] == collect.Documented("str, list of str, optional", "More texts.")
    doc = "Cut.\n\nParameters\n----------\nhow : {'a',\n       'b'}, default='a'\n    How to cut.\nn : int,\n    Times.\n"
    assert collect.documented_parameters(doc)["how"] == collect.Documented("{'a', 'b'}, default='a'", "How to cut.")
    assert collect.documented_parameters(doc)["n"].description == "Times."
    assert collect.type_schema("instance of FreeGroupElement or string")["anyOf"][0]["title"] == "FreeGroupElement"


@pytest.mark.parametrize("doc, said", [
    ("Returns a field, i.e. `Q`. More.", "Returns a field, i.e. Q."),
    ("r.index(value) -> integer -- return index of value.\nRaise ValueError if absent.", "return index of value."),
    ("Multiplies a :ref:`COO matrix <sparse-docs>` by 2.", "Multiplies a COO matrix by 2."),
    ("We have:\nx(float) ------------- conv1d ---", "")])
def test_what_a_first_sentence_is(doc, said):
    assert collect.summarise(doc) == said


def test_joint_entries_and_prose_of_several_types():
    doc = "Args:\n    stdin, stdout and stderr: Handles of files.\n"
    assert {*collect.documented_parameters(doc)} == {"stdin", "stdout", "stderr"}
    said = collect.Documented("", "A string, or a sequence of program arguments.")
    assert collect.parameter_schema("p", "", said)["type"] == ["string", "array"]
    assert "type" not in collect.parameter_schema("p", "", collect.Documented("Medium or sympifiable", "What is left."))
    assert "type" not in collect.parameter_schema("p", "", collect.Documented("", "Alias of text."))


def test_a_list_in_a_summary_is_whole_or_left_out():
    doc = "Check the following conditions:\n\n- Size is 3\n- The last dimensions\n  are w and h\n- It is{}\n"
    assert collect.summarise(doc.format(" so")).endswith("Size is 3 - The last dimensions are w and h - It is so")
    for more in (" so" * 99, " so. Or not."):
        assert collect.summarise(doc.format(more)) == "Check the following conditions:"


def test_a_signature_is_shown_without_notes_and_long_defaults():
    def key(name: typing.Annotated[str, "Header\n name."], environ=os.environ, page="x" * 999):
        """Make a key."""
    found = collect.describe_callable(key, "Make a key.", sys.modules[__name__])
    assert found["signature"] == "(name: str, environ=os.environ, page=...)"
    assert "default" not in found["parameters"]["properties"]["page"]
    assert found["parameters"]["properties"]["name"]["description"] == "Header name."


@pytest.mark.parametrize("call, arguments", [
    ("f('1 2', kind=int)", None), ("f([1], dtype=int)", {"lines": [1], "dtype": "int"}), ("f(zeros(3))", None),
    ("f(np.zeros(3))", {"lines": [0.0, 0.0, 0.0]}), ("f(zeros(2, 1))", {"lines": [[0.0], [0.0]]})])
def test_arguments_of_examples_that_are_no_literals(call, arguments):
    signature = inspect.signature(lambda lines, kind=None, dtype=None: None)
    if arguments is None:
        with pytest.raises(ValueError):
            collect.bind_literals(signature, ast.parse(call, mode="eval").body, {})
    else:
        assert collect.bind_literals(signature, ast.parse(call, mode="eval").body, {}) == arguments


@pytest.mark.parametrize("said, annotation, schema", [
    ("{0, 1, ..., n-1}", "int", {"type": "integer"}), ("{'a', 'b'}", "Literal['a', 'b', 'c']", {
        "type": "string", "enum": ["a", "b", "c"]}),
    ("{0, 1}", "bool", {"type": "boolean"}), ("{'a', 'b'}", "list[str]", {"type": "array", "items": {"type": "string"}})])
def test_a_list_of_values_says_nothing_against_the_annotation(said, annotation, schema):
    assert collect.parameter_schema("k", annotation, collect.Documented(said, "")) == schema


@pytest.mark.parametrize("entry, said", [
    ("mode : str\n    optional mode of operation.", ("str", "optional mode of operation.")),
    ("n : int\n    or a list, if the caller has one.", ("int", "or a list, if the caller has one.")),
    ("fill : scalar\n    default fill value", ("scalar", "default fill value")),
    ("x : {'(', '['}\n    What opens; the other is ')'.", ("{'(', '['}", "What opens; the other is ')'.")),
    ("x : float in (0, 1]\n    a) given, or b) made up", ("float in (0, 1]", "a) given, or b) made up"))])
def test_a_description_is_no_part_of_the_type(entry, said):
    [found] = collect.documented_parameters(f"Do.\n\nParameters\n----------\n{entry}\n").values()
    assert found == collect.Documented(*said)


@pytest.mark.parametrize("description, kind", [
    ("Whether keys can be integers or strings.", "boolean"), ("Size of rows. The values can be floats or strings.", "integer"),
    ("Called for each; its result can be a string or a list.", None)])
def test_what_else_can_be_is_not_the_parameter(description, kind):
    assert collect.parameter_schema("p", "", collect.Documented("", description)).get("type") == kind


def test_odd_types_and_defaults_of_equal_values():
    for stated in ("Figure, required", "Figure or none", "instance of Foo or subclass"):
        assert "title" in collect.parameter_schema("p", "", collect.Documented(stated, "What."))
    for text in ("str, default 'mean'. Defaults to \"mean\".", "default 1.0. Default is 1.", "default True (default: true)"):
        assert collect.default_in_words(text) in ("mean", 1, True)
    assert collect.summarise("sub(x, y) -> x - y\n\nSubtract y from x and return it.") == "Subtract y from x and return it."
    assert collect.answer(" " * 300 + "x", None).startswith("The result is:")


@pytest.mark.parametrize("doc", ["a" + "  and  a" * 60 + "!", ":type x: a\n    " + "\\'" * 50_000,
                                 "Parameters\n----------\nx : {\n    " + "a." * 50_000 + "}\n    d."])
def test_joint_names_and_types_take_bounded_time(doc):
    began = time.process_time()
    for name, said in collect.documented_parameters(doc, {"a"}).items():
        collect.parameter_schema(name, "", said)
    assert time.process_time() - began < 5


def described(tmp_path, spec, name="spec.json"):
    """{API: tool definition} of a specification, as text or not, and what was rejected."""
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(spec if isinstance(spec, str) else json.dumps(spec))
    found = list(collect.openapi_records(path, name, "MIT", Namespace()))
    tools = {r.apis[0]: json.loads(r.text.rsplit("\n\n", 2)[1]) for r in found if not isinstance(r, dict)}
    return tools, [r for r in found if isinstance(r, dict)]


def posting(schema, **more):
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    operation = {"operationId": "a", "requestBody": body, "responses": {}}
    return {"openapi": "3.1.0", "info": {"title": "T", "version": "1"}, "paths": {"/a": {"post": operation}}, **more}


BASE = {"Base": {"type": "object", "properties": {"id": {"type": "string"}, "name": {"type": "string"}}},
        "Order": {"type": "string", "description": "Either way.", "enum": ["up", "down"]}}


@pytest.mark.parametrize("schema, expected", [
    ({"allOf": [{"$ref": "#/Base"}, {"required": ["name"]}]}, {"properties": BASE["Base"]["properties"], "required": ["name"]}),
    ({"allOf": [{"$ref": "#/Base"}, {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n", "id"]}]},
     {"properties": BASE["Base"]["properties"] | {"n": {"type": "integer"}}, "required": ["id", "n"]}),
    ({"properties": {"by": {"$ref": "#/Order", "default": "up"}, "to": {"$ref": "#/Order", "description": "Whither."}}},
     {"properties": {"by": BASE["Order"] | {"default": "up"}, "to": BASE["Order"] | {"description": "Whither."}}, "required": []}),
    ({"properties": {"id": {"$ref": "#/Order", "readOnly": True}, "at": {"type": "any"}, "doc": {"type": "file"}}},
     {"properties": {"at": {}, "doc": {"type": "string", "format": "binary"}}, "required": []}),
    (BASE["Base"] | {"anyOf": [{"required": ["id"]}, {"required": ["name"]}]},
     {"properties": {"body": BASE["Base"] | {"required": [], "anyOf": [{"required": ["id"]}, {"required": ["name"]}]}},
      "required": ["body"]})])
def test_what_parts_of_a_schema_require_and_what_stands_beside_a_reference(tmp_path, schema, expected):
    tools, rejected = described(tmp_path, posting(schema, **BASE))
    assert tools["T.a"]["parameters"] == {"type": "object"} | expected and not rejected


def test_references_within_the_directory_that_is_collected(tmp_path):
    """They may lead up, but not out of it, whatever a file on the web is called; what is missing is said."""
    (tmp_path / "specs" / "models").mkdir(parents=True)
    (tmp_path / "specs" / "models" / "item.json").write_text('{"type": "object", "properties": {"n": {"type": "integer"}}}')
    (tmp_path / "out.json").write_text('{"type": "string", "description": "PRIVATE"}')
    spec = posting({"properties": {"item": {"$ref": "../models/item.json"}, "out": {"$ref": "../../out.json"},
                                   "gone": {"$ref": "#/components/schemas/Gone"}}})
    tools, rejected = described(tmp_path, spec, "specs/v1/spec.json")
    properties = tools["T.a"]["parameters"]["properties"]
    assert properties["item"]["properties"] == {"n": {"type": "integer"}} and properties["out"] == properties["gone"] == {}
    assert [r["line"] for r in rejected] == ["../../out.json", "#/components/schemas/Gone"]
    _, rejected, *_ = collect.openapi_records(tmp_path / "specs" / "v1" / "spec.json", "https://a.example/b/c/spec.json", "MIT", None)
    assert rejected["line"] == "../models/item.json"


def test_yaml_merges_and_has_names_for_keys(tmp_path):
    pytest.importorskip("yaml")
    tools, rejected = described(tmp_path, """openapi: 3.0.0
info: {title: T, version: "1"}
x-paging: &paging
  limit: {type: integer, default: 10}
  after: {type: string}
paths:
  /a:
    post:
      operationId: a
      requestBody: {required: true, content: {application/json: {schema: {properties: {
        <<: *paging, limit: {type: integer}, null: {type: boolean}, 1: {type: string}}}}}}
      responses: {201: {$ref: "#/components/responses/201"}}
components: {responses: {201: {description: Made., content: {application/json: {schema: {type: string}}}}}}
""", "spec.yaml")
    assert tools["T.a"]["parameters"]["properties"] == {
        "limit": {"type": "integer"}, "after": {"type": "string"}, "null": {"type": "boolean"}, "1": {"type": "string"}}
    assert tools["T.a"]["returns"] == {"type": "string"} and not rejected
    bomb = "\n".join(["a0: &a0 {" + ", ".join(f"k{n}: 1" for n in range(2000)) + "}",
                      *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 99))])
    with pytest.raises(ValueError, match="merged by"):
        described(tmp_path, bomb, "bomb.yaml")


def test_yaml_merges_each_of_several_and_may_be_empty():
    pytest.importorskip("yaml")
    assert collect.parse_yaml("a: &a {x: 1}\nb: {<<: *a, <<: {y: 2}, z: 3}\n")["b"] == {"x": 1, "y": 2, "z": 3}
    assert collect.parse_yaml("# nothing\n") is None


def test_a_specification_without_operations_is_said_to_be_none(tmp_path):
    with pytest.raises(ValueError, match="no `paths`"):
        described(tmp_path, {"openapi": "3.1.0", "info": {}, "paths": {}, "webhooks": {"made": {"post": {}}}})


@pytest.mark.parametrize("front, begins, license", [
    ("name: pdf\r\ndescription: Fill in forms.\r\nlicense: MIT", "pdf: Fill in forms.", "MIT"),
    ("name: 'pdf'\ndescription: >-\n  Fill in\n  forms.\n\n  Or: merge.\nlicense: see LICENSE.txt", "pdf: Fill in forms. Or: merge.", "BSD"),
    ("name: pdf\ndescription: |\n  Fill in.\nmetadata:\n  name: no\nlicense: Unknown", "pdf: Fill in.", "BSD"),
    ('name: pdf\ndescription: "Say \\"fill\\"\n  it in"', 'pdf: Say "fill" it in', "BSD"),
    ("description: Fill in\n  forms \"like this\"\nname: pdf", 'pdf: Fill in forms "like this"', "BSD")])
def test_front_matter_of_skills(tmp_path, front, begins, license):
    path = tmp_path / "SKILL.md"
    path.write_bytes(f"---\n{front}\n---\n\n# PDF\n".encode())
    [record] = collect.skill_records(path, "pdf/SKILL.md", "BSD", Namespace())
    assert record.text == f"{begins}\n\n# PDF" and record.license == license
    path.write_text("---\nname: pdf\ndescription:\n---\n")
    with pytest.raises(ValueError, match="no `name` and `description`"):
        list(collect.skill_records(path, "pdf/SKILL.md", "BSD", Namespace()))


TOOL = {"name": "find", "description": "Find it.", "inputSchema": {
    "type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}}


@pytest.mark.parametrize("listing, file, expected", [
    (TOOL, "notes.json", ["notes.find"]),
    ({"tools": {"find": {"description": "Find it.", "parameters": TOOL["inputSchema"]}}}, "notes/mcp-tools.json", ["notes.find"]),
    ({"@a/notes": {"tools": [TOOL]}, "b": {"tools": {"find": TOOL}}, "c": {"url": "x"}}, "all.json", ["a_notes.find", "b.find"]),
    ({"server": {"name": "notes"}, "tools": [TOOL, {"name": "odd"}]}, "x.json", ["notes.find"]),
    ({"first": {"id": 1}, "second": {"result": {"tools": [TOOL]}}}, "notes.json", ["notes.find"]),
    ([{"type": "function", "function": TOOL | {"inputSchema": json.dumps(TOOL["inputSchema"])}}], "notes.json", ["notes.find"])])
def test_listings_of_mcp_tools(tmp_path, listing, file, expected):
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(listing))
    found = list(collect.mcp_records(path, file, "MIT", None))
    tools = [tool for tool in found if isinstance(tool, collect.Tool)]
    assert [tool.name for tool in tools] == expected and all(t.parameters == TOOL["inputSchema"] for t in tools)
    odd = [r["line"] for r in found if isinstance(r, dict)]
    assert odd == ["odd"] * ("odd" in str(listing))


@pytest.mark.parametrize("schema, expected", [
    ([{"name": "a", "type": "string"}, {"name": "b", "type": "integer", "optional": True}],
     {"properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a"]}),
    ([{"name": "a", "type": "string", "required": True}, {"name": "b", "type": "integer", "required": False}],
     {"properties": {"a": {"type": "string"}, "b": {"type": "integer"}}, "required": ["a"]}),
    ({"type": "object", "additionalProperties": {"type": "string"}},
     {"additionalProperties": {"type": "string"}, "properties": {}, "required": []}),
    ({"$ref": "#/$defs/A", "$defs": {"A": {"type": "object"}}},
     {"$ref": "#/$defs/A", "$defs": {"A": {"type": "object"}}, "properties": {}, "required": []})])
def test_arguments_of_tools_as_they_are_stated(schema, expected):
    [tool] = collect.tools_of([{"name": "f", "description": "", "arguments": schema}])
    assert tool["function"]["parameters"] == {"type": "object"} | expected


def test_pages_of_commands_in_chinese(tmp_path):
    path = tmp_path / "pages.zh" / "common" / "ls.md"
    path.parent.mkdir(parents=True)
    path.write_text("# ls\n\n> 列出目录。\n\n- 列出全部\uff1a\n\n`ls -a`\n\n- One a line:\n\n`ls -1`\n")
    [record] = collect.command_records(path, "pages.zh/common/ls.md", "MIT", Namespace())
    assert "列出全部:\nls -a\n\nOne a line:\nls -1" in record.text


@pytest.mark.parametrize("required, expected", [(True, ["id", "name"]), (False, ["id"])])
def test_what_a_body_of_openapi_2_requires(tmp_path, required, expected):
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "integer"}}, "required": ["name"]}
    parameters = [{"name": "id", "in": "path", "type": "string"}, {"name": "it", "in": "body", "required": required, "schema": schema}]
    operation = {"operationId": "a", "parameters": parameters, "responses": {}}
    tools, _ = described(tmp_path, {"swagger": "2.0", "info": {"title": "T"}, "paths": {"/a/{id}": {"put": operation}}})
    assert tools["T.a"]["parameters"]["required"] == expected and list(tools["T.a"]["parameters"]["properties"]) == ["id", "name", "n"]


def test_long_inheritance_and_a_body_without_a_schema(tmp_path):
    chain = {f"L{n}": {"allOf": [{"$ref": f"#/L{n + 1}"}, {"properties": {f"p{n}": {"type": "string"}}}]} for n in range(8)}
    base = {"L8": {"type": "object", "properties": {"p8": {"type": "string"}}, "required": ["p8"]}}
    tools, rejected = described(tmp_path, posting({"$ref": "#/L0"}, **chain, **base))
    parameters = tools["T.a"]["parameters"]
    assert sorted(parameters["properties"]) == [f"p{n}" for n in range(9)] and parameters["required"] == ["p8"] and not rejected
    spec = posting({})
    spec["paths"]["/a"]["post"]["requestBody"]["content"] = {"application/octet-stream": {}}
    assert described(tmp_path, spec)[0]["T.a"]["parameters"] == {"type": "object", "properties": {"body": {}}, "required": ["body"]}


def test_many_parts_that_require_much_take_bounded_time(tmp_path):
    part = {"properties": {"a": {}}, "required": ["a"] * 5000}
    started = time.time()
    described(tmp_path, posting({"allOf": [{"$ref": "#/A"}] * 20_000}, A=part))
    assert time.time() - started < 10


def test_annotations_that_are_odd():
    class Odd(type):
        def __repr__(cls):
            raise RuntimeError

    def read(annotation):
        return collect.annotation_text(annotation, types)
    assert read(Odd("Shy", (), {}))[0].endswith("Shy")
    assert read("Literal[-X]") == ("", "") and read("Literal[-1, 'x']") == ("Literal[-1, 'x']", "")
    assert read("'Annotated[int, \"How many.\"]'") == ("int", "How many.")
    assert read(enum.Enum("Maybe", {"NO": None, "YES": True})) == ("Maybe", "")


def test_names_of_a_lazy_module_are_imported_in_examples():
    module = types.ModuleType("lazy_one")

    def load(name):  # as transformers does
        if name != "Thing":
            raise AttributeError(name)
        module.Thing = type(name, (), {"__module__": "lazy_one"})
        return module.Thing
    module.__getattr__ = load
    [[_, [step]]] = collect.sessions(">>> Thing()\n1\n", len, module)
    assert step["imports"] == ["from lazy_one import Thing"]


def test_an_example_without_a_call_asks_a_module_for_nothing():
    module = types.ModuleType("lazy_two")
    module.__getattr__ = lambda name: {}[name]
    assert collect.sessions(">>> 1 + 1\n2\n", len, module)[0][1][0]["call"] is None
