"""What people really see: pages in a headless browser. Skipped where there is none."""

from __future__ import annotations

import contextlib
import html
import http.client
import re
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxhpo.analysis import write_comparison, write_report
from jaxhpo.analysis.export import export

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))), None
)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BROWSER is None, reason="no Chromium here")]

# Reads a page of the same folder in a frame of a phone's width, and says how wide it wants to be.
PROBE = """<!doctype html><body style="margin: 0">
<iframe src="{page}" style="width: {width}px; height: 900px; border: 0"></iframe>
<script>
addEventListener("load", () => {{
  const root = document.querySelector("iframe").contentDocument.documentElement;
  const wide = [...root.querySelectorAll("p, h1, h2, dl, figure, .scroll, .figures, pre")].filter(
    (node) => node.getBoundingClientRect().right > {width} + 0.5);
  const texts = [...root.querySelectorAll("svg text")].map((node) => node.getBoundingClientRect().height);
  document.title = JSON.stringify([root.scrollWidth, wide.length, root.querySelectorAll("svg").length, Math.min(...texts)]);
}});
</script>"""


@pytest.fixture
def browse(tmp_path):
    """``browse(url)``: the page's elements after its scripts have run, and all that it wrote to the console."""

    def run(url, width=1280):
        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
                   "--no-first-run", "--disable-extensions", f"--window-size={width},2000", "--allow-file-access-from-files",
                   "--enable-logging=stderr", "--virtual-time-budget=20000", "--dump-dom", url]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return run


@pytest.fixture
def record(make_record):
    losses = [None if x > 0.95 else float(x) for x in np.random.default_rng(5).uniform(0.1, 1.0, 60)]
    note = {"confirmation": {"number": 3, "seeds": 3, "validation": {"loss": [0.1, 0.2, 0.15]}, "test": {}}}
    return make_record(losses, notes=note)


def title_of(page):
    found = re.search(r"<title>(\[.*?\])</title>", page)
    assert found is not None, page[:300]
    return found[1]


@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_their_window_and_nothing_fails(browse, record, make_record, tmp_path, width):
    pytest.importorskip("matplotlib")
    write_report(record, tmp_path)
    others = [make_record([1.0, 0.5, 0.3 + 0.1 * seed], name="another", seed=seed) for seed in range(4)]
    write_comparison([record, *others], tmp_path)
    for page in ("report.html", "comparison.html"):
        (tmp_path / "probe.html").write_text(PROBE.format(page=page, width=width))
        shown, console = browse(f"file://{tmp_path / 'probe.html'}", width)
        assert console == []
        wanted, wide, figures, smallest = (float(x) for x in title_of(shown)[1:-1].split(","))
        assert wanted <= width
        assert wide == 0
        assert figures >= 3
        assert smallest >= 8  # pixels of the least line of text in a figure


def test_the_probe_sees_what_it_is_for(browse, tmp_path):
    """A page that is too wide, and one that fails."""
    (tmp_path / "page.html").write_text(
        '<p style="width: 700px">wide</p><svg><text>x</text></svg><script>nothing.here()</script>'
    )
    (tmp_path / "probe.html").write_text(PROBE.format(page="page.html", width=390))
    shown, console = browse(f"file://{tmp_path / 'probe.html'}", 390)
    wanted, wide, *_ = (float(x) for x in title_of(shown)[1:-1].split(","))
    assert wanted >= 700
    assert wide == 1
    assert any("nothing is not defined" in line for line in console)


@contextlib.contextmanager
def dashboard(storage):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    code = f"import optuna_dashboard as d; d.run_server({storage!r}, host='127.0.0.1', port={port})"
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            assert server.poll() is None
            with contextlib.suppress(OSError):
                link = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                link.request("GET", "/api/studies")
                if link.getresponse().status == 200:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/dashboard/studies/1"
    finally:
        server.terminate()
        server.wait(10)


def text_of(page):
    bare = re.sub(r"<(style|script).*?</\1>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"(?:<[^>]+>)+", "|", bare))


def test_optuna_dashboard_shows_the_trials(browse, make_record, tmp_path):
    pytest.importorskip("optuna_dashboard")
    made = make_record([0.9, None, 0.25, 0.7, 0.3])
    with dashboard(export(made, "optuna", tmp_path / "out.db")) as url:
        trials, _ = browse(f"{url}/trials")
        study, _ = browse(url)
    seen = text_of(trials)
    assert "study (id=1)" in seen
    assert "5 Trials" in seen
    states = ["Complete", "Fail", "Complete", "Complete", "Complete"]
    assert re.findall(r"\|Trial (\d+)\|(Complete|Fail)(?=\|)", seen)[:5] == [(str(i), state) for i, state in enumerate(states)]
    first = made.trials[0].hparams
    assert "|Value|0.9|" in seen
    assert f"|momentum {first['momentum']}|" in seen
    assert f"|activation {first['activation']}|" in seen
    assert f"|decay[1] {first['decay'][1]}|" in seen
    overview = text_of(study)
    assert "Best Trial (number=2)|0.25|" in overview
    assert "Hyperparameter Importance" in overview
