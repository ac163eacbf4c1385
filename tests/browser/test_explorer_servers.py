"""The explorer with a kernel behind it: JupyterLab and Voila, driven in a real browser."""

from __future__ import annotations

import io

import nbformat
import numpy as np
import pytest
from looking import layer, load, stage
from PIL import Image

from gloria_core.viz.explorer.form import RUNS


@pytest.fixture
def notebook(tmp_path):
    """A notebook with nothing but the page of a study in it."""
    cells = [nbformat.v4.new_code_cell("from gloria_core.viz.explorer.form import study_page\nstudy_page()")]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), tmp_path / "explore.ipynb")
    return tmp_path / "explore.ipynb"


def exercise(page, tmp_path, open_page) -> None:
    """Load, hover, click, type, switch map and model, go to another study, export: what a reader does."""
    page.wait_for_selector(".gx-word.gx-on", timeout=90_000)
    page.wait_for_function("document.querySelector('.gx-map').width > 100")
    bare = page.locator('[data-text="impression"] .gx-word').first
    pinned = layer(page)
    bare.hover()
    assert (layer(page) != pinned).any()
    bare.click()
    assert bare.get_attribute("aria-pressed") == "true"

    page.get_by_label("A phrase of your own").fill("large effusion on the left")
    page.keyboard.press("Enter")
    own = page.locator('[data-text="own-1"] .gx-word')
    own.first.wait_for()
    page.wait_for_function("""document.querySelectorAll('[data-text="own-1"] .gx-on').length === 5""")
    before, words = layer(page), page.locator(".gx-word").count()
    page.get_by_label("Map of picture 1").select_option(index=0)
    assert (layer(page) != before).any()
    before = layer(page)
    page.get_by_label("Model of picture 1").select_option(index=1)
    assert (layer(page) != before).any()

    page.keyboard.press("Tab")
    own.first.click()
    for key in "sgtw":  # keys of the notebook, too: none may reach it
        page.keyboard.press(key)
    assert page.locator(".gx-word").count() == words

    with page.expect_download() as download:
        page.locator(".gx-page").click()
    download.value.save_as(tmp_path / "exported.html")
    other = load(open_page(), tmp_path / "exported.html")
    shown = layer(other)
    other.locator('[data-text="own-1"] .gx-word').first.click()
    assert (layer(other) != shown).any()

    title = page.locator(".gx-header h2").inner_text()
    page.get_by_label("Study", exact=True).select_option(index=1)
    page.wait_for_function("(title) => document.querySelector('.gx-header h2').innerText !== title", arg=title)
    page.wait_for_selector(".gx-word.gx-on")


def test_jupyterlab(serve, open_page, notebook, studio, tmp_path, pictures):
    options = ("--no-browser", "--allow-root", "--IdentityProvider.token=", "--ServerApp.ip=127.0.0.1")
    address = serve(
        "jupyterlab",
        *options,
        f"--ServerApp.root_dir={tmp_path}",
        folder=tmp_path,
        port_option="--ServerApp.port",
        environment={RUNS: str(studio)},
    )
    page = open_page(width=1500, height=1050)
    page.goto(f"{address}/lab/tree/{notebook.name}")
    page.locator(".jp-Notebook .jp-CodeCell").first.click()
    page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click()
    page.wait_for_selector(".jp-Notebook-ExecutionIndicator[data-status='idle']")
    page.keyboard.press("Shift+Enter")
    exercise(page, tmp_path, open_page)
    assert page.locator(".jp-Notebook .jp-CodeCell").count() <= 2  # Shift+Enter made one; no key cut or made another
    page.screenshot(path=pictures / "figures" / "explorer" / "jupyterlab.png")


def test_voila(serve, open_page, notebook, studio, tmp_path, pictures):
    address = serve(
        "voila",
        notebook.name,
        "--no-browser",
        "--Voila.ip=127.0.0.1",
        folder=tmp_path,
        port_option="--port",
        environment={RUNS: str(studio)},
    )
    page = open_page(width=1280, height=1000)
    page.goto(address)
    exercise(page, tmp_path, open_page)
    page.locator(".gx-chip").first.click()
    page.screenshot(path=pictures / "figures" / "explorer" / "voila.png", full_page=True)
    page.keyboard.press("t")
    first = stage(page)
    page.get_by_text("Your own radiograph and report").click()
    pixels = np.linspace(0, 255, 96 * 70).reshape(96, 70).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    upload = {"name": "mine.png", "mimeType": "image/png", "buffer": buffer.getvalue()}
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Image: PNG, JPEG or DICOM").click()
    chooser.value.set_files(upload)
    page.get_by_placeholder("Its report").fill("Small left effusion. No pneumothorax.")
    page.get_by_role("button", name="Show", exact=True).click()
    page.wait_for_function("document.querySelector('.gx-header h2').innerText === 'mine.png'")
    page.wait_for_selector(".gx-word.gx-on")
    second = stage(page)
    assert second.shape[0] / second.shape[1] == pytest.approx(96 / 70, abs=0.02) and second.shape != first.shape
    assert page.locator(".gx-chip").count() == 0
