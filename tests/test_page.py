"""The page, from outside: bad requests over a socket, and a browser, where one is here."""

import http.client
import json
import math
import re
import shlex
import shutil
import socket
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from scipy.stats import chisquare

from cflow_plugin import CflowError
from cflow_plugin.commands.watch.arrivals import Arrival
from cflow_plugin.commands.watch.journal import Result
from cflow_plugin.commands.watch.page import Review
from cflow_plugin.commands.watch.watch import watch
from cflow_plugin.images.reading import read_image

from .brightness import save_brightness_model
from .test_follow import Running, folder, model, picture, table, until  # noqa: F401  fixtures

pytest.importorskip("starlette", reason='the page is not installed: pip install "cflow-plugin[page]"')
pytest.importorskip("uvicorn", reason='the page is not installed: pip install "cflow-plugin[page]"')


class Page:
    """A watch with a page and two images, ended by a third."""

    def __init__(self, model, folder, output, caplog, **settings):  # noqa: F811
        caplog.set_level("INFO")
        (folder / "dark.png").write_bytes(picture(100))
        (folder / "light.png").write_bytes(picture(200))
        self.folder, self.output, self.model = folder, output, model
        settings = {"limit": 3, "overlays": False, "page": 0, **settings}
        self.running = Running(model, str(folder), output, **settings)
        until(lambda: len(table(output)) == len(list(folder.iterdir())) and "The page is at" in caplog.text)
        self.address, self.port, self.token = re.search(
            r"The page is at (http://[\d.]+:(\d+)/)(?:\?token=(\S+))?", caplog.text
        ).groups()

    def ask(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", int(self.port), timeout=30)
        connection.putrequest(method, path, skip_host="Host" in (headers or {}))
        for name, value in {"Content-Length": str(len(body or b"")), **(headers or {})}.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers

    def end(self):
        (self.folder / "last.png").write_bytes(picture(50))
        self.running.join()


@pytest.fixture
def page(model, folder, tmp_path, caplog):  # noqa: F811
    page = Page(model, folder, tmp_path / "out", caplog)
    yield page
    page.end()


JSON = {"Content-Type": "application/json"}
MARK = {"number": 2, "what": "good", "who": "Ada"}


def marked(**changes):
    return json.dumps({**MARK, **changes}).encode()


def wished(**wish):
    return json.dumps({"who": "Ada", **wish}).encode()


BAD = [
    *[("GET", path, None, {}, 404) for path in ("/x", "/../page.html", "/%2e%2e/%2e%2e/etc/passwd", "/page.py")],
    *[("GET", path, None, {}, 404) for path in ("/image/99", "/image/x", "/image/-1", "/image/1/../2", "/page.html")],
    ("GET", f"/image/{10**30}", None, {}, 404),
    *[("GET", f"/api/would?rate={rate}", None, {}, 400) for rate in ("x", "0", "1", "-1", "nan", "inf", "0.0001", "")],
    ("GET", "/api/would", None, {}, 400),
    *[(method, "/", None, {}, 405) for method in ("POST", "PUT", "DELETE", "PATCH", "TRACE")],
    *[(method, "/api/mark", None, {}, 405) for method in ("GET", "PUT")],
    ("GET", "/", None, {"Host": "evil.example"}, 400),
    ("POST", "/api/mark", marked(), {"Content-Type": "text/plain"}, 415),
    ("POST", "/api/mark", marked(), {}, 415),
    ("POST", "/api/mark", b"number=2&what=good", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
    *[("POST", "/api/mark", body, JSON, 400) for body in (b"", b"{", b"[]", b"null", b"\xff", b"[" * 9000, b"{}")],
    ("POST", "/api/mark", marked() + b" " * 20_000, JSON, 413),
    *[("POST", "/api/mark", marked(number=number), JSON, 400) for number in ("2", 1.5, None, True)],
    *[("POST", "/api/mark", marked(what=what), JSON, 400) for what in ("../..", "", None, ["good"], {"a": 1})],
    *[("POST", "/api/mark", marked(who=who), JSON, 400) for who in ("", " ", "a" * 81, "a\nb", "\x00", 7)],
    ("POST", "/api/mark", marked(more=1), JSON, 400),
    *[("POST", "/api/mark", marked(number=number), JSON, 404) for number in (99, -1, 10**30)],
    *[("GET", f"/drawn/{name}", None, {}, 404) for name in ("x.png", "..", "%2e%2e%2f%2e%2e%2flog.csv", "a/b")],
    *[("GET", f"/api/{act}", None, {}, 405) for act in ("judge", "measure", "use", "recalibrate", "lay_aside")],
    *[("POST", f"/api/{act}", b"{}", JSON, 400) for act in ("judge", "measure", "use", "recalibrate", "lay_aside")],
    *[("POST", f"/api/{act}", b"{}", {}, 415) for act in ("judge", "measure", "use", "recalibrate", "lay_aside")],
    ("POST", "/api/judge", wished(name="../../x.png", what="good"), JSON, 404),
    ("POST", "/api/judge", wished(name=["1_dark.png"], what="good"), JSON, 400),
    ("POST", "/api/judge", wished(name="1_dark.png", what="../good"), JSON, 400),
    *[("POST", "/api/use", wished(model=name), JSON, 409) for name in ("none.xml", "../model.xml", "/etc/passwd", "")],
    ("POST", "/api/use", wished(model=7), JSON, 400),
    ("POST", "/api/measure", wished(model="none.xml"), JSON, 409),
    ("POST", "/api/measure", wished(model="model.xml"), JSON, 409),  # nothing was looked at
    *[("POST", "/api/recalibrate", wished(rate=rate), JSON, 400) for rate in (0, 1.5, -0.1, "0.1", None, True)],
    ("POST", "/api/recalibrate", wished(rate=0.1), JSON, 409),
]


def test_bad_requests(page):
    """Each gets its status, and changes nothing; the page goes on."""
    assert len(BAD) >= 30
    found = [(request[:4], page.ask(*request[:4])[0]) for request in BAD]
    assert [status for _, status in found] == [request[4] for request in BAD], found
    with socket.create_connection(("127.0.0.1", int(page.port))) as raw:
        raw.sendall(b"\x16\x03\x01 no HTTP \r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
    slow = socket.create_connection(("127.0.0.1", int(page.port)), timeout=30)
    slow.sendall(b"POST /api/mark HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
    slow.sendall(b"Content-Length: 50\r\n\r\n{")
    assert page.ask("GET", "/api/state")[0] == 200
    assert slow.recv(100).startswith(b"HTTP/1.1 408")
    slow.close()
    drawn = [".size", "1_dark.png", "2_light.png"]
    assert sorted(path.name for path in (page.output / "review").rglob("*") if path.is_file()) == drawn
    assert not list(page.model.parent.glob("*recalibrated*"))


def test_what_it_tells_and_what_is_marked(page):
    status, text, headers = page.ask("GET", "/")
    assert status == 200
    assert b"http" not in text.lower().replace(b"http-equiv", b"")  # nothing from elsewhere
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    state = json.loads(page.ask("GET", "/api/state")[1])
    assert [(image["image"], image["decision"]) for image in state["images"]] == [
        ("light.png", "anomalous"),
        ("dark.png", "good"),
    ]
    assert state["scored"] == 2
    assert state["verdict"].startswith("No change: 2 images")
    assert sum(state["recent"]) == 2
    assert sum(state["reference"]) == 21
    # 21 reference scores from 0.3 to 0.5: a rate of 0.1 allows 2 of 22 ranks, so that 0.49 is the threshold.
    assert json.loads(page.ask("GET", "/api/would?rate=0.1")[1]) == {"threshold": 0.49, "anomalous": 1, "images": 2}
    shown = cv2.imdecode(np.frombuffer(page.ask("GET", "/image/2")[1], np.uint8), cv2.IMREAD_COLOR)
    assert shown.shape == (8, 8, 3)
    for wish in (marked(), marked(number=1, what="defect", who="Æsa =1+1")):
        assert page.ask("POST", "/api/mark", wish, JSON)[0] == 200
    assert (page.output / "review/good/2_light.png").read_bytes() == picture(200)
    assert (page.output / "review/defect/1_dark.png").read_bytes() == picture(100)
    log = (page.output / "review/log.csv").read_text(encoding="utf-8").splitlines()
    assert [line.split(",")[1:3] for line in log[1:]] == [["Ada", "good after all"], ["Æsa =1+1", "defect missed"]]


def test_a_sample_sets_the_threshold_anew(model, folder, tmp_path, caplog):  # noqa: F811
    """From the draw to a restart with the new file; what is expected is counted by hand."""
    (tmp_path / "models").mkdir()
    for file in model.parent.iterdir():
        shutil.copyfile(file, tmp_path / "models" / file.name)
    own, output = tmp_path / "models/model.xml", tmp_path / "out"
    for shade in range(110, 148):
        (folder / f"{shade}.png").write_bytes(picture(shade))
    page = Page(own, folder, output, caplog, limit=43, sample=25)  # 40 images are there

    def state():
        return json.loads(page.ask("GET", "/api/state")[1])

    def post(act, **wish):
        status, text, _ = page.ask("POST", f"/api/{act}", wished(**wish), JSON)
        return status, json.loads(text)

    until(lambda: state()["scored"] == 40)
    sample = state()["sample"]
    assert (sample["left"], sample["good"], sample["defect"]) == (25, 0, 0)
    shown = cv2.imdecode(np.frombuffer(page.ask("GET", f"/drawn/{sample['next']}")[1], np.uint8), cv2.IMREAD_COLOR)
    assert shown.shape == (8, 8, 3)
    assert post("judge", name=sample["next"], what="defect")[0] == 200
    assert post("judge", name=sample["next"], what="good")[0] == 404  # was looked at
    (folder / "148.png").write_bytes(picture(148))
    until(lambda: state()["scored"] == 41)
    assert state()["sample"]["left"] == 24  # drawing has ended
    status, refused = post("recalibrate", rate=0.1)
    assert (status, "whole sample" in refused["error"]) == (409, True)
    good = []
    while name := state()["sample"]["next"]:
        assert post("judge", name=name, what="good")[0] == 200
        good.append(cv2.imread(str(output / "review/sample/good" / name))[0, 0, 0] / 255)
    status, refused = post("recalibrate", rate=0.01)
    assert (status, "needs at least 99" in refused["error"]) == (409, True)
    status, made = post("recalibrate", rate=0.1)
    threshold = sorted(good)[23 - 1]  # of 25 ranks 2.5 may lie above
    assert status == 200
    assert made["threshold"] == pytest.approx(threshold, abs=1e-6)
    assert (made["images"], made["alarms"]) == (24, sum(value > 0.5 for value in good))

    models = {found["name"]: found for found in state()["models"]}
    assert models["model.xml"]["in_use"]
    figures = models[made["name"]]["figures"]
    assert (figures["good"], figures["defect"], figures["alarms"]) == (24, 1, 1)
    assert models["model.xml"]["figures"]["alarms"] == made["alarms"]
    assert own.read_bytes() == model.read_bytes()
    assert post("use", model=made["name"])[0] == 200
    between = int(np.ceil(255 * threshold)) - 1  # below the new threshold, above the old one
    (folder / "next.png").write_bytes(picture(between))
    until(lambda: state()["scored"] == 42)
    assert [(row["image"], row["anomalous"]) for row in table(output)] == [("next.png", "0")]
    assert between > 128
    assert {found["name"] for found in state()["models"] if found["in_use"]} == {made["name"]}
    assert post("use", model="model.xml")[0] == 200  # back, and forth again
    assert post("use", model=made["name"])[0] == 200
    page.end()
    log = (output / "review/log.csv").read_text().splitlines()
    assert [line.split(",")[2] for line in log].count("to be used") == 3
    config = yaml.safe_load((output / "review/retrain.yaml").read_text())["data"]["init_args"]
    [folder_of_good] = config["normal_dir"]
    assert len(list((Path(config["root"]) / folder_of_good).glob("*.png"))) == 24
    assert len(list((Path(config["root"]) / config["abnormal_dir"][0]).glob("*.png"))) == 1

    caplog.clear()
    (folder / "again.png").write_bytes(picture(between))
    watch(own, str(folder), output, follow=True, limit=1)
    assert "Goes on with" in caplog.text
    assert table(output)[-1]["anomalous"] == "0"


def seen(number, name="part.png", path=None, shade=100, kind=np.uint8):
    stamp = f"{path.stat().st_mtime_ns} {path.stat().st_size}" if path else ""
    return Result(number, name, stamp, 0.0), Arrival(name, stamp, path, 0.0, np.full((8, 8, 3), shade, kind))


def test_a_copy_is_of_what_was_seen(tmp_path):
    """Also where the file has another content by now, has gone, has a name longer than a name may be, or 16 bits."""
    review, file = Review(tmp_path / "review", 3, "journal"), tmp_path / "latest.png"
    file.write_bytes(picture(90))
    result, arrival = seen(1, "latest.png", file, 90)
    file.write_bytes(picture(200))
    name = review.pick(result, arrival.path, arrival.image, "defect", "Ada")
    assert read_image(tmp_path / name)[0, 0, 0] == 90
    result, arrival = seen(2, "latest.png", file, 200)
    review.offer(result, arrival)
    file.unlink()
    result, arrival = seen(3, f"{'a' * 120}/{'部' * 79}.png", None, 120)
    review.offer(result, arrival)
    result, arrival = seen(4, "deep.png", None, 4000, np.uint16)
    review.offer(result, arrival)
    drawn = sorted((tmp_path / "review/sample/drawn").glob("*.png"), key=lambda path: int(path.name.split("_")[0]))
    assert [read_image(path)[0, 0, 0] for path in drawn[:2]] == [200, 120]
    assert read_image(drawn[2], bits=16)[0, 0, 0] == 4000


def test_the_last_word_on_an_image_counts(tmp_path):
    review = Review(tmp_path / "line #3: '1'", 2, "journal")
    one, two, three = (seen(number, f"{number}.png") for number in (1, 2, 3))
    review.offer(*one)
    assert review.sample()["next"] is None  # two are wanted
    with pytest.raises(CflowError, match="still being drawn"):
        review.judge("1_1.png", "good", "Ada")
    review.offer(*two)
    for result, arrival in (one, three):
        for what in ("defect", "good", "defect"):
            review.pick(result, None, arrival.image, what, "Ada")
    review.judge("1_1.png", "good", "Ada")
    assert [[path.name for path in review.all_of(what)] for what in ("good", "defect")] == [["1_1.png"], ["3_3.png"]]
    review.pick(one[0], None, one[1].image, "defect", "Ada")
    review.judge("2_2.png", "defect", "Ada")
    with pytest.raises(CflowError, match="No image of the sample was called good"):
        review.reviewed_sample()
    review.lay_aside("Ada")
    review.offer(*three)
    assert review.sample() == {"good": 0, "defect": 0, "left": 1, "size": 2, "full": False, "next": None}
    assert len(review.all_of("defect")) == 3
    review.pick(two[0], None, two[1].image, "good", "Ada")
    config = yaml.safe_load(review.config.read_text(encoding="utf-8"))["data"]["init_args"]
    assert config["root"] == str((tmp_path / "line #3: '1'").resolve())
    [_, _, _, path] = shlex.split(review.command())
    assert Path(path) == review.config


def test_a_sample_of_another_size_is_drawn_anew(tmp_path):
    for size, expected in ((2, [1, 2]), (2, [1, 2]), (3, []), (0, [])):
        review = Review(tmp_path / "review", size, "journal")
        found = sorted(int(path.name.split("_")[0]) for path in (tmp_path / "review").glob("sample/drawn/*"))
        assert found == ([] if size == 2 and not found else expected)
        for number in (1, 2) if size == 2 else ():
            review.offer(*seen(number))
    with pytest.raises(CflowError, match="--sample"):
        Review(tmp_path / "review", -1, "journal")


def test_models_that_change_under_the_watch(model, folder, tmp_path, caplog):  # noqa: F811
    """The one that is chosen goes away; the given one is exported anew; another is damaged, or of another kind."""
    models, output = tmp_path / "models", tmp_path / "out"
    models.mkdir()
    for name in ("model", "new", "odd"):
        save_brightness_model(
            models / f"{name}.xml", [0.3 + 0.01 * step for step in range(21)] + [0.6] * (name == "new")
        )
    (models / "gone.xml").symlink_to(models / "nowhere.xml")
    (models / "odd.bin").write_bytes(b"")
    (models / "junk.xml").write_text("<annotation/>")
    page = Page(models / "model.xml", folder, output, caplog, limit=4)

    def post(act, **wish):
        status, text, _ = page.ask("POST", f"/api/{act}", wished(**wish), JSON)
        return status, json.loads(text)

    def state():
        return json.loads(page.ask("GET", "/api/state")[1])

    assert post("mark", number=2, what="good")[0] == 200
    assert {found["name"] for found in state()["models"]} == {"model.xml", "new.xml", "odd.xml", "junk.xml"}
    assert post("measure", model="junk.xml")[0] == 409
    assert post("measure", model="new.xml")[0] == 200
    assert post("use", model="new.xml")[0] == 200
    (models / "new.xml").unlink()
    (folder / "third.png").write_bytes(picture(120))
    until(lambda: state()["scored"] == 3)
    assert [found["name"] for found in state()["models"] if found["in_use"] and found["gone"]] == ["new.xml"]
    assert table(output)[-1]["p_value"] == f"{(1 + 3 + 1) / 23:.6f}"  # of the new one's reference scores
    assert "has changed since" in state()["fixed"]
    page.end()

    for number, prepare in enumerate(
        (
            lambda: (models / "new.xml").write_text("damaged"),
            lambda: save_brightness_model(models / "model.xml", [0.1] * 30),  # exported anew: it is what is wanted
        )
    ):
        prepare()
        caplog.clear()
        (folder / f"again {number}.png").write_bytes(picture(120))
        watch(models / "model.xml", str(folder), output, follow=True, limit=1)
        assert ("cannot be used" in caplog.text) == (number == 0)
        assert "Goes on with" not in caplog.text


def test_a_threshold_of_the_users_own_forbids_other_models(model, folder, tmp_path, caplog):  # noqa: F811
    page = Page(model, folder, tmp_path / "out", caplog, threshold=0.3)
    assert "--threshold decides" in json.loads(page.ask("GET", "/api/state")[1])["fixed"]
    assert page.ask("POST", "/api/recalibrate", wished(rate=0.1), JSON)[0] == 409
    assert page.ask("POST", "/api/use", wished(model="model.xml"), JSON)[0] == 409
    assert page.ask("POST", "/api/mark", marked(number=1, what="good"), JSON)[0] == 200
    figures = json.loads(page.ask("POST", "/api/measure", wished(model="model.xml"), JSON)[1])
    assert (figures["alarms"], figures["good"]) == (1, 1)  # 100 / 255 is above 0.3, and below 0.5
    page.end()


def test_each_image_is_drawn_with_the_same_chance(tmp_path):
    """Counted over many watches; with a restart in the middle, each of which draws as one without would have."""
    counts = np.zeros(60)
    image = np.zeros((2, 2, 3), np.uint8)
    for draw in range(300):
        review = Review(tmp_path / f"{draw}", 6, f"journal {draw}")
        for number in range(1, 61):
            if number == 30:
                review = Review(tmp_path / f"{draw}", 6, f"journal {draw}")
            review.offer(Result(number, f"{number}.png", "", 0.0), Arrival(f"{number}.png", "", None, 0.0, image))
        drawn = [int(path.name.split("_")[0]) for path in (tmp_path / f"{draw}/sample/drawn").iterdir()]
        assert len(drawn) == 6
        counts[np.array(drawn) - 1] += 1
    assert chisquare(counts).pvalue > 1e-4
    assert counts[:30].sum() == pytest.approx(900, abs=4 * math.sqrt(1800 / 4))


def test_a_token_is_asked_for_where_others_can_reach_it(model, folder, tmp_path, caplog):  # noqa: F811
    page = Page(model, folder, tmp_path / "out", caplog, host="0.0.0.0")
    for path in ("/", "/page.js", "/api/state", "/image/1", "/api/would?rate=0.1", "/?token=wrong", "/?token=%C3%BC"):
        assert page.ask("GET", path)[0] == 401
    assert page.ask("POST", "/api/mark", marked(), {**JSON, "Cookie": "token=wrong"})[0] == 401
    status, _, headers = page.ask("GET", f"/?token={page.token}")
    assert status == 303
    assert "HttpOnly" in headers["set-cookie"]
    assert "samesite=strict" in headers["set-cookie"].lower()
    assert page.ask("GET", "/api/state", headers={"Cookie": f"token={page.token}"})[0] == 200
    page.end()


@pytest.mark.parametrize("webhook", [None, "http://127.0.0.1:9/"])
def test_a_port_that_is_taken(model, folder, tmp_path, webhook, monkeypatch):  # noqa: F811
    monkeypatch.setenv("CFLOW_PLUGIN_WEBHOOK_SECRET", "secret")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(CflowError, match="cannot be served"):
        watch(model, str(folder), tmp_path / "out", follow=True, page=taken.getsockname()[1], webhook=webhook)
    with pytest.raises(CflowError, match="cannot be served"):
        watch(model, str(folder), tmp_path / "out", follow=True, page=0, host="nowhere")


@pytest.mark.long
def test_in_a_browser(page, tmp_path):
    """With the keyboard alone, in light and dark, on a screen and a phone; nothing is asked of another host."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("there is no Chromium here: apt-get install chromium")
    asked, wrong = [], []
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme, width in (("light", 1200), ("dark", 1200), ("light", 360)):
            context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
            tab = context.new_page()
            tab.on("request", lambda request: asked.append(request.url))
            tab.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
            tab.on("pageerror", lambda error: wrong.append(str(error)))
            tab.goto(page.address)
            tab.wait_for_selector("#images li:nth-child(2)")
            until(lambda tab=tab: "threshold" in tab.inner_text("#would"))
            assert "anomalous" in tab.inner_text("#images li.anomalous")
            assert "No change" in tab.inner_text("#verdict")
            assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            loaded = "[...document.images].every((image) => !image.src || (image.complete && image.naturalWidth))"
            until(lambda tab=tab, loaded=loaded: tab.evaluate(loaded))
            tab.screenshot(path=tmp_path / f"{scheme} {width}.png", full_page=True)
            context.close()
        for scheme in ("light", "dark"):
            tab = browser.new_page(color_scheme=scheme, bypass_csp=True)  # axe is a script of the test's
            tab.goto(page.address)
            tab.wait_for_selector("#images li:nth-child(2)")
            found = axe.Axe().run(tab).response["violations"]
            assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found] == []
        tab = browser.new_page()
        tab.goto(page.address)
        tab.wait_for_selector("#images li:nth-child(2)")
        tab.keyboard.press("Tab")
        tab.keyboard.type("Ada")
        tab.keyboard.press("Tab")
        tab.keyboard.press("Enter")
        until(lambda: "Copied" in tab.inner_text("#said"))
        before = tab.inner_text("#would")
        tab.focus("#rate")
        tab.keyboard.press("End")
        until(lambda: tab.inner_text("#would") != before)
        assert "30.0 %" in tab.inner_text("#would")
        browser.close()
    assert wrong == []
    assert all(url.startswith(page.address) for url in asked)
    assert (page.output / "review/good/2_light.png").is_file()
