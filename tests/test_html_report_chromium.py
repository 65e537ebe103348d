"""The report in a real browser: no request, no error, its values at the pointer, its schemes.

Chromium's network log names each request and its initiator: the origin of a page, or "not an
origin" for requests of the browser itself. Nothing leaves: the proxy is a port without a server.
"""

import json
import re
import shutil
import subprocess

import pytest
from example_runs import example_run

from minitune.report.html_report import html_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--no-first-run",
    "--enable-logging=stderr",
    "--window-size=1200,900",
    "--proxy-server=127.0.0.1:9",
)
DARK = "--blink-settings=preferredColorScheme=0"
REQUEST = '<img src="http://elsewhere.test/x.png">'
# Moves the pointer close to the middle of the first chart, and writes down the state of the page.
PROBE = """
const plot = document.querySelector(".plot"), box = plot.getBoundingClientRect();
const texts = () => [...document.querySelector(".chart .legend").querySelectorAll("b")].map(
  (text) => text.textContent);
const dots = () => [...document.querySelectorAll(".dot")].slice(0, 2).map(
  (dot) => dot.getAttribute("cx"));
const found = { before: texts() };
plot.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + 0.507 * box.width }));
found.pointed = texts();
found.dots = dots();
found.cursor = plot.querySelector(".cursor").getAttribute("x1");
found.steps = [...document.querySelectorAll(".step")].map((step) => step.textContent);
plot.dispatchEvent(new PointerEvent("pointerleave", {}));
found.after = texts();
plot.dispatchEvent(new KeyboardEvent("keydown", { key: "Home" }));
found.home = texts();
const press = (key) => plot.dispatchEvent(new KeyboardEvent("keydown", { key }));
const first = () => document.querySelector(".step").textContent;
press("ArrowRight");
found.keys = [first()];
for (const key of ["ArrowRight", "ArrowLeft", "ArrowLeft", "ArrowLeft", "End", "ArrowLeft"]) {
  press(key);
  found.keys.push(first());
}
found.colour = getComputedStyle(document.body).backgroundColor;
found.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
const result = document.createElement("pre");
result.id = "found";
result.textContent = JSON.stringify(found);
document.body.append(result);
"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")


@pytest.fixture
def browse(tmp_path):
    """Return a function that opens a page: its DOM, console lines and requests."""

    def run(source, *options):
        path, log = tmp_path / "page.html", tmp_path / "requests.json"
        path.write_text(source, encoding="utf-8")
        own = (f"--user-data-dir={tmp_path / 'profile'}", f"--log-net-log={log}", "--dump-dom")
        done = subprocess.run(
            [CHROMIUM, *OPTIONS, *own, *options, path.as_uri()],
            capture_output=True,
            timeout=120,
            check=True,
        )
        lines = done.stderr.decode(errors="replace").splitlines()
        return done.stdout.decode(), [li for li in lines if "CONSOLE" in li], requests_in(log)

    return run


def requests_in(log):
    """Return the addresses in a network log that pages asked for."""
    content = json.loads(log.read_text(encoding="utf-8"))
    kind = content["constants"]["logEventTypes"]["URL_REQUEST_START_JOB"]
    jobs = [event["params"] for event in content["events"] if event["type"] == kind]
    jobs = [job for job in jobs if "url" in job]
    return [job["url"] for job in jobs if job["initiator"] != "not an origin"]


def with_probe(source):
    """Return a page without its policy, and with a script that writes down its state."""
    source = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", source)
    return source.replace("</body>", f"<script>{PROBE}</script></body>")


def found_in(dom):
    return json.loads(re.search('<pre id="found">(.*?)</pre>', dom)[1])


def two_runs():
    return [example_run(), example_run("runs/second", steps=20, rate=4e-4)]


def test_the_page_makes_no_request_and_no_error(browse):
    _, console, requests = browse(html_report(two_runs()))
    assert not console and not requests


def test_the_policy_refuses_requests_and_scripts_that_slipped_in(browse):
    slipped = f"{REQUEST}<script>document.title = 'changed'</script></body>"
    dom, console, requests = browse(html_report(two_runs()).replace("</body>", slipped))
    assert not requests and "<title>changed" not in dom
    assert len(console) == 2 and all("Content Security Policy" in line for line in console)


def test_the_pointer_shows_the_values_of_all_curves_and_the_page_follows_the_scheme(browse):
    source = with_probe(html_report([example_run()])).replace("</body>", f"{REQUEST}</body>")
    dom, console, requests = browse(source)
    assert not console and requests == ["http://elsewhere.test/x.png"]  # so requests are seen
    found, run = found_in(dom), example_run()
    loss = {record["step"]: f"{record['loss']:.4f}" for record in run.training}
    evaluation = {r["step"]: f"{r['eval_loss']:.4f} at step {r['step']}" for r in run.evaluations}
    assert found["before"] == found["after"] == [loss[40], evaluation[40]]
    assert found["pointed"] == [loss[20], evaluation[20]]
    assert found["dots"] == ["50%", "50%"] and set(found["steps"]) == {"step 20"}
    assert found["home"] == ["–", evaluation[0]]
    assert found["cursor"] == "50%"  # the place of a record, not of the pointer
    steps = [1, 2, 1, 0, 0, 40, 39]
    assert found["keys"] == [f"step {step}" for step in steps]
    assert found["overflow"] == 0
    dark = found_in(browse(source, DARK)[0])
    assert [found["colour"], dark["colour"]] == ["rgb(247, 247, 245)", "rgb(18, 20, 22)"]


def test_a_narrow_screen_needs_no_sideways_scrolling(browse, tmp_path):
    (tmp_path / "narrow.html").write_text(with_probe(html_report(two_runs())), encoding="utf-8")
    frame = '<iframe src="narrow.html" style="width:390px;height:800px"></iframe>'
    show = "frames[0].document.getElementById('found').outerHTML"
    script = f"<script>onload = () => {{ document.body.innerHTML += {show} }}</script>"
    dom, _, _ = browse(f"<body>{frame}{script}</body>", "--allow-file-access-from-files")
    assert found_in(dom)["overflow"] == 0
