"""A student's first minutes, in a real browser: open notebook 01 in JupyterLab, run it, move the slider."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "course" / "01_forward_noising.ipynb"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
IDLE = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium: install it, or name one in the environment variable CHROMIUM")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of notebook 01, copied to an empty folder, in a JupyterLab of its own."""
    pytest.importorskip("jupyterlab", reason="no JupyterLab: pip install jupyterlab")
    home = tmp_path_factory.mktemp("lab")
    served = home / "course"
    served.mkdir()
    shutil.copy(NOTEBOOK, served)
    settings = home / "JUPYTER_CONFIG_DIR" / "labconfig"
    settings.mkdir(parents=True)
    (settings / "page_config.json").write_text(json.dumps(  # the news pop-up covers a corner of the page
        {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))
    (settings / "default_setting_overrides.json").write_text(json.dumps(  # cells out of sight exist as well
        {"@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"}}))
    own = {name: str(home / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR",
                                               "JUPYTER_DATA_DIR", "IPYTHONDIR", "MPLCONFIGDIR")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    token, port = secrets.token_hex(16), _free_port()
    log = home / "lab.log"
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={port}",
             "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}", "--allow-root",
             f"--ServerApp.root_dir={served}", "--expose-app-in-browser",
             "--LabApp.extension_manager=readonly"],
            env=os.environ | own | {"PYTHONPATH": path}, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, log)
        yield f"http://127.0.0.1:{port}/lab/tree/{NOTEBOOK.name}?token={token}&reset"
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def page(lab: str) -> Iterator[Any]:
    """That notebook, opened but not run, its kernel ready."""
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 950})
        page.set_default_timeout(300_000)
        page.goto(lab)
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
        page.wait_for_function(IDLE)
        yield page
        browser.close()


def test_a_reader_who_runs_nothing_sees_the_pictures_and_their_words(page: Any) -> None:
    """The stored figures survive the cleaning of an untrusted page, and so do their alt texts."""
    pictures = page.locator(".jp-OutputArea-output figure img")
    pictures.first.wait_for()
    assert all(alt.strip() for alt in pictures.evaluate_all("all => all.map(image => image.alt)"))
    assert pictures.first.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
    assert page.locator(".jp-OutputArea-output", has_text="turn the knobs yourself").count() >= 1
    assert page.locator(".jp-OutputArea-output", has_text="VBox(").count() == 0


def test_the_slider_changes_the_picture(page: Any) -> None:
    page.evaluate("() => jupyterapp.commands.execute('notebook:run-all-cells')")
    explorer = page.locator(".jp-OutputArea-output", has=page.locator(".widget-slider")).first
    picture = explorer.locator("img.widget-image")
    picture.wait_for()
    before = picture.get_attribute("src")
    said = explorer.locator("[role=status]").text_content()
    explorer.locator(".widget-slider .noUi-handle").focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("([image, before]) => image.src !== before",
                           arg=[picture.element_handle(), before])
    page.wait_for_function("([words, said]) => words.textContent !== said",
                           arg=[explorer.locator("[role=status]").element_handle(), said])
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
    assert page.locator("text=Error displaying widget").count() == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=2).close()
            return
        except OSError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.25)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()}")
