"""What docstrings and annotations say of parameters, beside docstring_parser and numpydoc."""
import enum
import importlib
import inspect
import json
import re
import time
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
        if stated is annotation and typing.get_origin(annotation) is typing.Annotated:
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
    found = {o["key"].partition(":")[2]: o["unfit"] for o in collect.describe_module("unfitting", set())["objects"]}
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
