import email.utils
import gzip
import http.server
import json
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import tracemalloc
from urllib.parse import parse_qs, urlsplit

import pytest

import collect
from conftest import run
from collect import Web, WebError, crawl, hf_license, hf_rows, html_to_text, is_public


class Site(http.server.ThreadingHTTPServer):
    """A local server. `pages` maps a path to a body, (status, headers, body), or a function of the request that gives one
    (None: it has answered itself). `log` holds every request: (path, headers)."""
    daemon_threads = True

    def __init__(self, context=None):
        site, self.pages, self.log = self, {}, []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                site.log.append((self.path, dict(self.headers)))
                answer = site.pages.get(self.path, site.pages.get("*", (404, {}, "none")))
                answer = answer(self) if callable(answer) else answer
                if answer is None:
                    return
                status, headers, body = answer if isinstance(answer, tuple) else (200, {}, answer)
                body = body.encode() if isinstance(body, str) else body
                self.send_response(status)
                for name, value in ({"Content-Type": "text/html", "Content-Length": str(len(body))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.host = f"127.0.0.1:{self.server_address[1]}"
        self.url = f"http://{self.host}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *args):
        pass

    def paths(self):
        return [path for path, _ in self.log]


@pytest.fixture
def site():
    site = Site()
    yield site
    site.shutdown()
    site.server_close()


@pytest.fixture
def client(tmp_path):
    usual = {"allow_private": True, "rate": 1e6, "timeout": 2.0, "retries": 3, "backoff": 0.01}
    return lambda **options: Web(tmp_path / "cache", **usual | options)


def moved(target, headers={}, body=b""):
    return 302, {"Location": target} | headers, body


def page(*links, head="", text="Some words."):
    return f"<head>{head}</head><p>{text}</p>" + "".join(f"<a href='{link}'>{link}</a>" for link in links)


def texts(items):
    """{path: text} of the records, {path: reason} of the rejections."""
    items = list(items)
    return ({urlsplit(r.url).path: r.text for r in items if not isinstance(r, dict)},
            {urlsplit(r["file"]).path: r["reason"] for r in items if isinstance(r, dict)})


def test_only_one_machine_of_the_public_internet_is_public():
    private = """0.0.0.0 10.1.2.3
        100.64.0.1 127.0.0.1 169.254.169.254 172.16.0.1 192.0.0.9 192.168.1.1 192.88.99.1 198.18.0.1
        203.0.113.1 224.0.0.1 240.0.0.1 255.255.255.255 :: ::1 ::7f00:1 ::ffff:7f00:1 ::ffff:8.8.8.8 64:ff9b::7f00:1 64:ff9b:1::1
        2002:7f00:1:: 2001::1 2001:db8::1 3fff::1 fc00::1 fec0::1 fe80::1%1 ff02::1 ff0e::1 100::1""".split()
    assert [a for a in private if is_public(a)] == []
    assert all(map(is_public, ["8.8.8.8", "93.184.216.34", "2606:4700::1111", "2a00:1450::1"]))


def test_nothing_private_is_reached(site, client, monkeypatch):
    """The name of a public host may resolve to a private address, in any spelling that the resolver knows."""
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: real({"inner.example": "127.0.0.1"}.get(host, host), *a, **k))
    port = site.server_address[1]
    for host in "127.0.0.1 localhost inner.example 2130706433 0x7f.1 0 [::ffff:7f00:1] [::1] 169.254.169.254 a@127.0.0.1".split():
        with pytest.raises(WebError, match="not a public address"):
            client(allow_private=False).get(f"http://{host}:{port}/")
    monkeypatch.setenv("HTTP_PROXY", site.url)  # a proxy would connect for us, unchecked
    with pytest.raises(WebError, match="not a public address"):
        client(allow_private=False).get("http://inner.example/")
    for bad in ("file:///etc/passwd", "ftp://127.0.0.1/", "http://", "http://[", "http://a..b/", "//x", "", "http://x:99999/"):
        with pytest.raises(ValueError):
            client(allow_private=False).get(bad)
    assert site.log == []


def test_a_name_that_changes_its_address_after_the_check(site, client, monkeypatch):
    answers, connected = ["93.184.216.34", "127.0.0.1"], []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, **k: [(2, 1, 6, "", (answers.pop(0), port))])

    def connect(address, timeout):
        connected.append(address[0])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(WebError, match="127.0.0.1, not a public address"):  # at the second try
        client(allow_private=False).get(f"http://rebind.example:{site.server_address[1]}/")
    assert connected == ["93.184.216.34"] and site.log == []


@pytest.mark.parametrize("target", ["http://127.0.0.1:{}/x", "http://[::ffff:7f00:1]:{}/x", "http://169.254.169.254/x", "//localhost:{}/x"])
def test_a_redirect_to_a_private_address(site, client, monkeypatch, target):
    """Only the first address is let through here, as if it were public; its redirect is checked as strictly as any."""
    checks = iter([True])
    monkeypatch.setattr(collect, "is_public", lambda address: next(checks, False) or is_public(address))
    site.pages["/"] = moved(target.format(site.server_address[1]))
    with pytest.raises(WebError, match="not a public address"):
        client(allow_private=False).get(site.url + "/")
    assert site.paths() == ["/"]


def test_redirects(site, client):
    site.pages |= {f"/{i}": moved(f"{i + 1}") for i in range(9)} | {"/9": "end", "/f": moved("file:///etc/passwd")}
    assert client().get(site.url + "/4").url == site.url + "/9"
    site.pages |= {"/u": moved("/اعزام".encode().decode("latin-1")), "/%D8%A7%D8%B9%D8%B2%D8%A7%D9%85": "raw UTF-8"}
    assert client().get(site.url + "/u").text == "raw UTF-8"
    for path, reason in (("/3", "more than 5 redirects"), ("/f", "only http and https")):
        with pytest.raises(WebError, match=reason):
            client().get(site.url + path)


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes its certificate with openssl")
def test_the_certificate_is_checked_for_the_name(client, tmp_path, monkeypatch):
    """Connecting to a checked address must not lose the name for SNI and the certificate."""
    subprocess.run("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout key.pem -out cert.pem -subj /CN=docs "
                   "-addext subjectAltName=DNS:docs.example".split(), cwd=tmp_path, check=True, capture_output=True)
    context, names = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), []
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    context.sni_callback = lambda sock, name, context: names.append(name)
    site, real = Site(context), socket.getaddrinfo
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "cert.pem"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: real("127.0.0.1", *a, **k))
    site.pages["/"] = "hello"
    try:
        assert client().get(f"https://docs.example:{site.server_address[1]}/").body == b"hello"
        with pytest.raises(WebError, match="SSLCertVerificationError"):
            client().get(f"https://other.example:{site.server_address[1]}/")
    finally:
        site.shutdown()
        site.server_close()
    assert names[0] == "docs.example" and "other.example" in names and len(site.log) == 1
    assert site.log[0][1]["Host"].startswith("docs.example:")


@pytest.mark.parametrize("status", [429, 503])
def test_a_storm_of_refusals(site, client, status):
    """Retry-After is waited for, within reason; a storm without end is given up in bounded time."""
    answers, started = [(status, {"Retry-After": "1"}, ""), "calm"], time.time()
    site.pages["/"] = lambda request: answers.pop(0)
    assert client().get(site.url + "/").body == b"calm" and time.time() - started > 0.9
    for header in ("9" * 30, "Wed, 21 Oct 2099 07:28:00 GMT", "soon", "-5", ""):
        site.pages["*"] = (status, {"Retry-After": header}, "")
        started = time.time()
        with pytest.raises(WebError, match=f"{status}, [14] times") as error:
            client().get(site.url + "/storm")
        assert time.time() - started < 2 and error.value.status == status


def test_retry_after_is_capped():
    assert collect.retry_after("9" * 30) == collect.retry_after("Wed, 21 Oct 2099 07:28:00 GMT") == 60
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert collect.retry_after("7") == 7 and collect.retry_after("1.5") == 1.5 and 25 < collect.retry_after(soon) <= 30
    assert collect.retry_after("soon") == collect.retry_after("²") == collect.retry_after("Wed, 21 Oct 1999 07:28:00 GMT") == 0


def drip(request):
    """An answer without end or length, a byte every 0.1 s: its body, or already its headers."""
    request.wfile.write(b"HTTP/1.0 200 OK\r\n" + (b"\r\n" if request.path == "/body" else b"X: "))
    for _ in range(100):
        request.wfile.write(b"x")
        time.sleep(0.1)


def test_slow_big_and_broken_answers_cost_bounded_time_and_memory(site, client):
    zipped, zeros = {"Content-Encoding": "gzip"}, gzip.compress(bytes(50_000_000))
    site.pages |= {"/body": drip, "/head": drip, "/long": "x" * 200_001, "/short": (200, {"Content-Length": "99"}, "x"),
                   "/bomb": (200, zipped, zeros), "/twice": (200, {"Content-Encoding": "gzip, gzip"}, gzip.compress(zeros)),
                   "/fit": (200, zipped, gzip.compress(b"y" * 200_000)), "/moved": moved("/fit", zipped, zeros),
                   "/bad": (200, zipped, "no gzip"), "/cut": (200, zipped, gzip.compress(b"y" * 100)[:-8])}
    reasons = dict.fromkeys(("/long", "/bomb", "/twice"), "over 200,000 bytes")
    tracemalloc.start()
    for path, reason in (reasons | dict.fromkeys(("/body", "/head", "/short", "/bad", "/cut"), "no complete answer")).items():
        started = time.time()
        with pytest.raises(WebError, match=reason):
            client(timeout=9 if path in reasons else 0.5, retries=1, max_bytes=200_000).get(site.url + path)
        assert time.time() - started < 4, path
    assert client(timeout=9, max_bytes=200_000).get(site.url + "/moved").body == b"y" * 200_000
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_rate_per_host(site, client):
    site.pages["*"] = "x"
    web, started = client(rate=10), time.time()
    for i in range(4):
        web.get(f"{site.url}/{i}")
    assert 0.3 <= time.time() - started < 3


def test_nothing_is_fetched_twice_and_stale_pages_are_asked_about(site, client):
    def tagged(request):
        return (304, {}, "") if request.headers.get("If-None-Match") == '"1"' else (200, {"ETag": '"1"'}, "tagged")

    site.pages |= {"/a": tagged, "/b": moved("/a")}
    assert [client().get(site.url + p).body for p in ("/a", "/a", "/b", "/b")] == [b"tagged"] * 4
    for _ in range(2):
        with pytest.raises(WebError, match="404"):
            client().get(site.url + "/none")
    assert site.paths() == ["/a", "/b", "/none"]
    stale = client(max_age=-1).get(site.url + "/a")
    assert stale.body == b"tagged" and stale.status == 200 and site.log[-1][1]["If-None-Match"] == '"1"'


def test_html_becomes_readable_text():
    title, text, found = html_to_text("""<title>A &amp; B</title><nav><p>menu <a href="n">n</a></nav>
        <script>if (a < b) "<p>evil</p>"</script>
        <style>p{}</style><header>top</header><h2>Use<a class="headerlink" href="#u">¶</a></h2><p>One <b>two
        </i></b> &lt;three&gt;&#0;<ul><li>a<li><p>b</p><ol><li>c</ol></ul><table><tr><th>k<th>v<tr><td>1</td><td>2</table>
        <div class="highlight"><pre><span>if x:</span>\n    <div>y</div> &lt; 1   # &amp;lt;\n</pre></div><!-- <p>no -->
        <footer>f</footer><p title="a>b">end 1 < 2</div></p><nav>open""")
    assert title == "A & B" and found["a"] == ["n", "#u"]
    assert text == "## Use\n\nOne two <three>\ufffd\n- a\n- b\n- c\n\nk | v\n1 | 2\n\n```\nif x:\n    y < 1   # &lt;\n```\n\nend 1 < 2"


def test_hostile_html_takes_linear_time():
    """html.parser needs minutes for the second of these."""
    for source in ("<div>" * 10_000 + "deep" + "</p>" * 10_000, "<a " * 20_000, "<a b='" * 20_000, "<!--" * 20_000,
                   "<script>" * 10_000, "<ul><li>" * 10_000 + "x", "<b>" * 10_000 + "<i></u>" * 10_000,
                   "<table><tr><td>" * 10_000 + "x", "</" * 20_000, "<pre>" * 20_000, "<nav></nav " * 20_000, "<title>" * 20_000,
                   "<a b" + " " * 100_000, "-\n" * 50_000, "#" * 100_000):
        started = time.time()
        assert len(html_to_text(source)[1]) <= 200_000 and time.time() - started < 3
    assert html_to_text("<div>" * 10_000 + "deep" + "</div>" * 10_000 + "<p>after")[1] == "deep\n\nafter"


def test_crawl_by_levels_on_one_host(site, client):
    main = "<link rel=canonical href='/a/main'><link rel=license href='https://l.example/mit'>"
    site.pages |= {"/": page("a", "b/#x", "pic", "out", "gone", "a#again", "?q=1", "http://other.example/", "mailto:x", "javascript:1", "http://["),
                   "/?q=1": page(), "/a": page("deep", head=main), "/pic": (200, {"Content-Type": "image/png"}, "x"),
                   "/b/": page("t", head="<base href='/base/'><link rel=canonical href=//other.example/>"), "/base/t": page("never"),
                   "/deep": page("/a", head=main), "/out": moved("http://other.example/")}
    first = list(crawl(f"{site.url}#top", client(), depth=2))
    records, rejected = texts(first)
    assert list(records) == ["/", "/a/main", "/b/", "/base/t"]
    assert {k: v.split(": ")[-1] for k, v in rejected.items()} == {
        "/out": "leads to another host", "/gone": "status 404", "/pic": "not HTML but image/png",
        "/deep": f"the same page as {site.url}/a/main"}
    assert "/never" not in site.paths() and "/base/never" not in site.paths() and len(set(site.paths())) == len(site.log)
    licences = {r.url: r.license for r in first if not isinstance(r, dict)}
    assert licences[f"{site.url}/a/main"] == "https://l.example/mit" and licences[f"{site.url}/"] == "unknown"
    requests_made = len(site.log)
    assert list(crawl(site.url, client(), depth=2)) == first and len(site.log) == requests_made
    assert len(list(crawl(site.url, client(), depth=0))) == 1


def test_crawl_reads_apis_and_the_worst_encodings(site, client):
    site.pages |= {"/": b"\xef\xbb\xbfa\0b\xff<a href=g>g</a>",
                   "/g": "<dl><dt class='sig sig-object py' id='pkg.mod.f'>f(x)<dd>Does it.</dl><dt class='sig' id='term'>"}
    first, second = crawl(site.url, client())
    assert (first.domain, first.apis, first.text) == ("text", [], "ab\ufffdg")
    assert (second.domain, second.apis) == ("api_doc", ["pkg.mod.f"])


def test_no_page_ends_a_crawl(site, client):
    """A number of 5,000 digits, a link that is none, a printed version that stands for the page it prints."""
    site.pages |= {"/": page("digits", "//[text](x)", "print"), "/digits": f"<p>&#{'9' * 5000};</p>",
                   "/print": '<head><meta name="robots" content="noindex"><link rel="canonical" href="/whole"></head><a href="whole">All</a>',
                   "/whole": "<p>The whole page.</p>"}
    records, rejected = texts(crawl(site.url, client()))
    assert "/whole" in records and "/digits" in rejected and "/print" in rejected


def test_tags_take_linear_time():
    started = time.time()
    collect.html_to_text("<" + "a" * 200_000)
    assert time.time() - started < 2


def test_no_secret_of_an_address_is_kept(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["collect.py", "openapi:http://bob:hunter2@127.0.0.1:9/spec.json?api_key=SECRET"])
    args = collect.parse_args()
    [unit], prefixes = collect.web_unit("openapi", args.sources[0].split(":", 1)[1], args)
    assert not any(secret in name for secret in ("bob", "hunter2", "SECRET") for name in (unit.filename, *prefixes))


def test_robots(site, client):
    site.pages |= {"/robots.txt": "User-agent: bad\nDisallow: /\n\nuser-AGENT: *\nUser-agent: x\nDisallow: /private # all\n"
                                  "Allow: /private/open\nDisallow: /*.php$\nDisallow: /*?s=\nCrawl-delay: 0.2\nDisallow:\n",
                   "/": page("private/a", "private/open", "a.php", "a.php5", "x?s=1", "y?t=1"), "*": page()}
    started = time.time()
    records, rejected = texts(crawl(site.url, client()))
    assert site.paths() == ["/robots.txt", "/", "/private/open", "/a.php5", "/y?t=1"] and time.time() - started > 0.6
    assert set(rejected) == {"/private/a", "/a.php", "/x"} and all("robots.txt forbids it" in r for r in rejected.values())
    assert collect.robot_rules("User-agent: *\nDisallow: /\nUser-agent: hephaestus-collect\nCrawl-delay: 2") == ([], 2.0)
    many = "".join(f"user-agent: a{i}\n" for i in range(5000)) + "disallow: /a\n" * 20_000
    for hostile in ("user-agent: *\n" * 7000, "user-agent" + " " * 100_000, "user-agent: *\n" + "x \n" * 30_000, many):
        started = time.time()
        assert collect.robot_rules(hostile) == ([], 0) and time.time() - started < 1
    site.pages["/robots.txt"] = "User-agent: *\nCrawl-delay: 100000"
    with pytest.raises(WebError, match="100000 s between pages"):
        list(crawl(site.url, client(max_age=-1)))


def test_robots_of_a_server_in_trouble_forbid(site, client):
    site.pages |= {"/robots.txt": (500, {}, ""), "/": page()}
    with pytest.raises(WebError, match="no robots.txt"):
        list(crawl(site.url, client()))
    assert set(site.paths()) == {"/robots.txt"}


def test_endless_sites_end(site, client):
    site.pages["*"] = lambda request: page(*(f"{request.path.rstrip('/')}/{i}" for i in range(20)), "/" + "x" * 2000)
    items = list(crawl(site.url, client(), depth=99, max_pages=30))
    assert len(items) == 31 + 1 and "30 pages read" in items[-1]["reason"] and len(site.log) <= 31
    site.pages["*"] = lambda request: page(*map(str, range(50))) if request.path == "/y/" else (503, {}, "")
    site.pages["/robots.txt"] = (404, {}, "")
    items = list(crawl(site.url + "/y/", client(), max_pages=100))
    assert len(items) == 7 and "5 failures in a row; 45 known" in items[-1]["reason"]


ROWS = 250


def dataset(request):
    query = {k: v[0] for k, v in parse_qs(urlsplit(request.path).query).items()}
    if urlsplit(request.path).path == "/splits":
        splits = [{"dataset": "o/d", "config": c, "split": s} for c, s in (("en", "train"), ("en", "test"), ("de", "train"))]
        return json.dumps({"splits": splits}) if query["dataset"] == "o/d" else (404, {}, '{"error": "Not found. Is it gated?"}')
    start = int(query["offset"])
    rows = [{"row_idx": i, "row": {"q": f"{query['config']} {i}"}, "truncated_cells": ["q"] * (i == 7)}
            for i in range(start, min(start + 100, ROWS))]
    return json.dumps({"rows": rows, "num_rows_total": ROWS + start})  # a total that grows with every page


def test_hf_rows_in_pages_resumed_from_the_cache(site, client):
    site.pages["*"] = dataset
    rows = hf_rows("o/d/en/test", client(), site.url, token="secret")
    for _ in range(120):  # killed on the second page
        next(rows)
    rows.close()
    items = list(hf_rows("o/d/en/test", client(), site.url, token="secret"))
    assert [i[0] for i in items if isinstance(i, tuple)] == [f"o/d/en/test:{i}" for i in range(ROWS) if i != 7]
    assert items[8][1] == {"q": "en 8"} and "cut by the server: q" in items[7]["reason"]
    assert len(site.log) == 4 and all(headers["Authorization"] == "Bearer secret" for _, headers in site.log)
    assert len(list(hf_rows("o/d/en", client(), site.url))) == 2 * ROWS and "Authorization" not in site.log[-1][1]


def test_hf_errors_are_one_line_with_the_servers_message(site, client):
    site.pages["*"] = dataset
    for name, reason in {"o/none": "Is it gated", "o/d/fr": "there are en/train, en/test, de"}.items():
        with pytest.raises(ValueError, match=reason):
            next(hf_rows(name, client(), site.url))
    same = json.dumps({"rows": [{"row_idx": 0, "row": {}, "truncated_cells": []}], "num_rows_total": 10**9})
    gap = json.dumps({"rows": [{"row_idx": i, "row": {}, "truncated_cells": []} for i in (0, 2)], "num_rows_total": 2})
    for body, reason in (("[" * 10**5, "not the answer"), ("[]", "not the answer"), ("\xff", "not the answer"), ('{"rows": 1}', "not the answer"),
                         (same, "does not give row 1 of"), (gap, "does not give row 0 of")):
        site.pages["*"] = lambda request: dataset(request) if "splits" in request.path else body
        with pytest.raises(ValueError, match=reason):
            list(hf_rows("o/d/de", client(max_age=-1), site.url))


def test_a_token_never_leaves_its_host(site, client):
    other = Site()
    try:
        other.pages["*"] = '{"splits": []}'
        site.pages["*"] = moved(f"{other.url}/splits")
        with pytest.raises(ValueError):
            next(hf_rows("o/d", client(), site.url, token="secret"))
        assert "Authorization" in site.log[0][1] and len(other.log) == 1 and "Authorization" not in other.log[0][1]
    finally:
        other.shutdown()
        other.server_close()


def test_hf_license(site, client):
    site.pages["/api/datasets/o/d"] = '{"tags": ["task:x", "license:mit"]}'
    assert hf_license("o/d/en", client(), site.url) == "mit" and hf_license("o/none", client(), site.url) == "unknown"


def records_in(directory):
    return [json.loads(line) for shard in sorted(directory.glob("*.jsonl")) for line in shard.open(encoding="utf-8")]


def test_crawl_from_the_command_line(site, tmp_path):
    site.pages |= {"/docs/": page("one", "two"), "/docs/one": page(text="First page."), "/docs/two": page(text="Second page.")}
    url, fast = f"crawl:{site.url}/docs/", ("--rate", 1000, "--allow-private", "--license", "MIT")
    run("collect.py", "--out", tmp_path, url, *fast, "--depth", 1, "--max-pages", 10)
    assert {urlsplit(r["url"]).path for r in records_in(tmp_path)} == {"/docs/", "/docs/one", "/docs/two"}
    assert {r["license"] for r in records_in(tmp_path)} == {"MIT"}
    asked = len(site.log)
    run("collect.py", "--out", tmp_path, url, *fast, "--depth", 1, "--max-pages", 10)  # nothing to do
    run("collect.py", "--out", tmp_path, url, *fast, "--depth", 0)                     # another crawl, from the cache
    assert len(site.log) == asked and [urlsplit(r["url"]).path for r in records_in(tmp_path)] == ["/docs/"]


def test_no_private_address_without_the_flag(site, tmp_path):
    site.pages["*"] = page()
    for source in (f"crawl:{site.url}/", f"openapi:{site.url}/spec.json"):
        assert "not a public address" in run("collect.py", "--out", tmp_path, source, "--rate", 1000, ok=False).stderr
    assert not site.log and not records_in(tmp_path)


def test_openapi_from_the_web(site, tmp_path):
    spec = {"openapi": "3.0.0", "info": {"title": "Shop"}, "paths": {"/": {"get": {"operationId": "list", "summary": "List all goods."}}}}
    site.pages["/spec"] = 200, {"Content-Type": "application/json"}, json.dumps(spec)
    run("collect.py", "--out", tmp_path, f"openapi:{site.url}/spec", "--allow-private")
    assert [r["apis"] for r in records_in(tmp_path)] == [["Shop.list"]]


def test_hf_from_the_command_line(site, tmp_path, monkeypatch):
    rows = [{"messages": [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "", "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}]}]},
            {"text": "Prose. " * 40}, {"label": 3}]
    answers = {"/splits": {"splits": [{"config": "c", "split": "train"}]}, "/rows": {
        "rows": [{"row_idx": i, "row": row, "truncated_cells": []} for i, row in enumerate(rows)], "num_rows_total": len(rows)}}
    site.pages["*"] = lambda request: json.dumps(answers[urlsplit(request.path).path])
    monkeypatch.setenv("HF_TOKEN", "secret")
    run("collect.py", "--out", tmp_path, "hf:o/d", "--hf-host", site.url, "--allow-private", "--rate", 1000, "--chat-domain", "instruction")
    chat, text = records_in(tmp_path)
    assert chat["id"] == "instruction:hf:o/d:o/d/c/train:0" and chat["apis"] == ["add"] and text["text"] == "Prose. " * 40
    [rejected] = records_in(tmp_path / "rejected")
    assert rejected["line"] == "o/d/c/train:2" and "label" in rejected["reason"]
    assert all(headers["Authorization"] == "Bearer secret" for _, headers in site.log)


def test_a_source_that_fails_leaves_the_others(site, tmp_path):
    (tmp_path / "notes.md").write_text("A sentence of prose. " * 20)
    site.pages["*"] = (404, {}, "none")
    done = run("collect.py", "--out", tmp_path / "out", f"text:{tmp_path / 'notes.md'}", "hf:o/d", "--hf-host", site.url, "--allow-private", ok=False)
    assert "status 404" in done.stderr and [r["domain"] for r in records_in(tmp_path / "out")] == ["text"]


def test_a_proxy_is_used_as_the_user_says(site, client, monkeypatch):
    """The proxy looks up the names; a target that is known to be private is not asked of it."""
    site.pages["*"] = lambda request: f"by proxy: {request.path}"
    monkeypatch.setenv("HTTP_PROXY", site.url)
    monkeypatch.setenv("NO_PROXY", "")
    real = socket.getaddrinfo

    def resolve(host, *args, **options):
        if host.endswith(".example"):
            raise socket.gaierror("unknown here")
        return real(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    answer = client(allow_private=False).get("http://docs.example/page")
    assert answer.body == b"by proxy: http://docs.example/page"
    with pytest.raises(WebError, match="not a public address"):
        client(allow_private=False).get("http://127.0.0.1/page")
    assert site.paths() == ["http://docs.example/page"]


def test_a_secure_address_goes_through_the_proxy_as_a_tunnel(client, monkeypatch):
    asked = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listener.accept()
        asked.append(connection.recv(1000).split(b"\r\n")[0])
        connection.sendall(b"HTTP/1.1 502 no\r\n\r\n")
        connection.close()

    threading.Thread(target=serve, daemon=True).start()
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.setenv("NO_PROXY", "")
    with pytest.raises(WebError, match="no complete answer"):
        client(retries=0).get("https://docs.example/page")
    assert asked == [b"CONNECT docs.example:443 HTTP/1.1"] or asked == [b"CONNECT docs.example:443 HTTP/1.0"]
    listener.close()


def test_charsets_members_and_encodings(site, client):
    site.pages |= {
        "/latin": (200, {"Content-Type": "text/html; charset=iso-8859-1"}, "<p>caf\u00e9</p>".encode("latin-1")),
        "/odd": (200, {"Content-Type": "text/html; charset=klingon"}, "<p>caf\u00e9</p>"),
        "/members": (200, {"Content-Encoding": "gzip"}, gzip.compress(b"one ") + gzip.compress(b"two")),
        "/plain": (200, {"Content-Encoding": "gzip, identity"}, gzip.compress(b"one")),
        "/none": (404, {"Content-Encoding": "br"}, ""), "/lost": moved("/none?secret"),
        "/brotli": (200, {"Content-Encoding": "br"}, b"\x0b\x02\x80"), "/moved": moved("/caf\u00e9".encode().decode("latin-1")),
        "/caf%C3%A9": "here"}
    assert "caf\u00e9" in client().get(site.url + "/latin").text and "caf\u00e9" in client().get(site.url + "/odd").text
    assert client().get(site.url + "/members").body == b"one two" and client().get(site.url + "/moved").body == b"here"
    assert client().get(site.url + "/plain").body == b"one"
    with pytest.raises(WebError, match="/none: status 404"):
        client().get(site.url + "/none")
    with pytest.raises(WebError, match="/lost: status 404"):
        client().get(site.url + "/lost")
    with pytest.raises(WebError, match="packed as br"):
        client().get(site.url + "/brotli")


def test_a_negative_chunk_is_not_read_to_its_end(site, client):
    def endless(request):
        request.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n")
        for _ in range(1000):
            request.wfile.write(b"x" * 100_000)
    site.pages["/"] = endless
    tracemalloc.start()
    with pytest.raises(WebError, match="no complete answer"):
        client(retries=0).get(site.url + "/")
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("spelled", ["/a/../private/x", "/./private/x", "/a/%2e%2e/private/x", "/private/./x"])
def test_dot_segments_do_not_pass_by_robots(site, client, spelled):
    site.pages |= {"/robots.txt": "User-agent: *\nDisallow: /private/", "/": page(spelled), "/private/x": page(text="secret")}
    found, refused = texts(crawl(site.url, client()))
    assert [*found] == ["/"] and refused == {"/private/x": f"{site.url}/private/x: robots.txt forbids it"}


def test_robots_in_pages_and_headers(site, client):
    site.pages |= {
        "/": page("/hidden", "/dead-end", "/header"), "/hidden": page("/b", head="<meta name=robots content='noindex'>"),
        "/dead-end": page("/c", head="<meta name='ROBOTS' content='NoFollow'>"),
        "/header": (200, {"X-Robots-Tag": "none"}, page("/d")), "/b": page(), "/c": page(), "/d": page()}
    found, refused = texts(crawl(site.url, client(), depth=5))
    assert sorted(found) == ["/", "/b", "/dead-end"]
    assert refused == dict.fromkeys(("/hidden", "/header"), "it asks robots not to index it")


def test_groups_of_robots_txt():
    """Other lines end no group, an empty group of ours allows all, and a rule counts wherever it stands."""
    text = "User-agent: a\nSitemap: /s\nCrawl-delay: 3\nUser-agent: hephaestus-collect\nDisallow: /x\n" + "#\n" * 99_999 + "Disallow: /y"
    rules, delay = collect.robot_rules(text)
    assert [size for size, _, _ in rules] == [2, 2] and delay == 0
    assert collect.robot_rules("User-agent: *\nDisallow: /\nUser-agent: Hephaestus-Collect\n") == ([], 0)


def test_a_base_that_is_no_address_does_not_count(site, client):
    site.pages |= {"/": page("b", head="<base href='javascript:void(0)'>"), "/b": page()}
    assert sorted(texts(crawl(site.url, client()))[0]) == ["/", "/b"]
