"""What the browser tests share: a study to look at, servers, and a Chromium. Collected by `make test-browser` only."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
SWITCH = "GLORIA_BROWSER_TESTS"
PICTURES = "GLORIA_PICTURES"
"""Environment variable: folder that the pictures of `make figures` are written to; without it they do not last."""

if SWITCH not in os.environ:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def trained():
    """Folder of the quickstart, if it has been run: its models are shown then. GLORIA_BROWSER_TESTS=made leaves it."""
    if os.environ[SWITCH] == "made":
        return None
    folder = ROOT / "results" / "runs" / "quickstart"
    runs = [*folder.glob("02_pretraining-gloria*/checkpoints/best.pt")]
    return folder if runs and list(folder.glob("01_*/manifest.csv")) else None


@pytest.fixture(scope="session")
def studio(trained, tmp_path_factory):
    """Folder laid out as a study's runs: a dataset and two checkpoints; small and untrained if there is no other."""
    if trained is not None:
        return trained
    from gloria_core.checkpoints import native
    from gloria_core.checkpoints.model import ModelConfig, build_model
    from gloria_core.data.dataset import save_dataset
    from gloria_core.data.sources import prepare
    from gloria_core.data.tokenizer import train_wordpiece

    folder = tmp_path_factory.mktemp("studio")
    data = folder / "01_data_preparation-made"
    frame = prepare("phantom", data / "raw", {"n_patients": 24, "size": 96, "workers": 1, "progress": False})
    save_dataset(data, frame, name="phantom", root=data / "raw", size=96)
    tokenizer = train_wordpiece([*frame["impression"], *frame["findings"]], vocab_size=400)
    for name, objective in (("gloria", "gloria"), ("prior", "prior")):
        config = ModelConfig(objective=objective, image_encoder="resnet_tiny", image_size=96, crop=88)
        model = build_model(config, tokenizer)
        native.save(folder / f"02_pretraining-{name}-made" / "checkpoints" / "best.pt", model)
    return folder


@pytest.fixture(scope="session")
def pictures(trained, tmp_path_factory):
    """Folder for screenshots and the exported page: a temporary one, except for `make figures`."""
    if PICTURES not in os.environ:
        return tmp_path_factory.mktemp("pictures")
    if trained is None:
        pytest.fail("the pictures show the quickstart's models: run `make study` first")
    return ROOT / os.environ[PICTURES]


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail("no Chromium: apt-get install chromium")
    with playwright.sync_playwright() as run:
        opened = run.chromium.launch(executable_path=chromium, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def open_page(browser):
    """Factory of pages that note every error of their own; the test fails at its end if there was one."""
    errors, contexts = [], []

    def note(message) -> None:
        # Voila looks for MathJax, JupyterLab for its news; favicons and files that a server lacks are no fault of ours
        if message.type == "error" and "Failed to load resource" not in message.text:
            errors.append(f"{message.text} ({message.location.get('url', '')})")

    def open_one(*, scale: float = 1, width: int = 1280, height: int = 960, scheme: str = "light"):
        viewport = {"width": width, "height": height}
        context = browser.new_context(
            viewport=viewport, device_scale_factor=scale, color_scheme=scheme, accept_downloads=True
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.set_default_timeout(60_000)
        return page

    yield open_one
    for context in contexts:
        context.close()
    ours = [error for error in errors if not any(word in error for word in ("MathJax", "mathjax", "cdn.jsdelivr"))]
    assert ours == []


@pytest.fixture(scope="module")
def serve(tmp_path_factory):
    """Factory: start a Jupyter program on a free port of this machine and wait until it answers; gives its address."""
    running = []
    home = tmp_path_factory.mktemp("jupyter")
    settings = home / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    quiet = '{"fetchNews": "false", "checkForUpdates": false}'
    (settings / "notification.jupyterlab-settings").write_text(quiet)

    def start(*command: str, folder: Path, port_option: str, environment: dict[str, str]) -> str:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        own = {name: str(home / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
        own |= {"JUPYTERLAB_SETTINGS_DIR": str(home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "spaces")}
        log = (home / f"{port}.log").open("w")
        process = subprocess.Popen(
            [sys.executable, "-m", *command, f"{port_option}={port}"],
            cwd=folder,
            env=os.environ | own | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        running.append((process, log))
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            if process.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"{address}/api/status" if "jupyterlab" in command else f"{address}/favicon.ico")
                return address
            except urllib.error.HTTPError:
                return address  # it answers, if only that there is no such thing
            except OSError:
                time.sleep(0.25)
        raise RuntimeError(Path(log.name).read_text())

    yield start
    for process, log in running:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
        log.close()
