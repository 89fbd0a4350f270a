"""The chat page: its files without a browser, and its use in headless Chromium where Playwright is installed."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_servers import LIMIT, slow_down, wait_until

MILLISECONDS = 1000 * LIMIT
PAGE = Path(__file__).parents[2] / "gptjax" / "serving" / "page"
MARKDOWN = """# Title

**bold** and `code` [link](https://example.com) [bad](javascript:alert(1)) <img src=x onerror=alert(1)>

1. one
   - inner
2. two

| a | b |
|---|---|
| 1 | <script>alert(2)</script> |
"""


def texts(language: str) -> dict[str, str]:
    """The texts of a language by name, as written in language.js."""
    code = (PAGE / "language.js").read_text().split(f"  {language}: {{\n")[1].split("\n  },")[0]
    return dict(re.findall(r"^    (\w+): (.*),$", code, re.MULTILINE))


def test_both_languages_have_every_text_that_the_page_uses() -> None:
    used = set(re.findall(r'data-(?:text|title|label|placeholder)="(\w+)"', (PAGE / "index.html").read_text()))
    for path in PAGE.glob("*.js"):
        used |= set(re.findall(r'\b(?:text|button)\("(\w+)"', path.read_text()))
    assert used
    assert used <= texts("en").keys()
    assert texts("en").keys() == texts("zh").keys()


def test_everything_that_the_page_loads_exists() -> None:
    loaded = re.findall(r'(?:href|src)="([^"]+)"', (PAGE / "index.html").read_text())
    for path in PAGE.glob("*.js"):
        loaded += re.findall(r'from "\./([^"]+)"', path.read_text())
    assert loaded
    assert [name for name in loaded if not (PAGE / name).is_file()] == []


def test_the_page_loads_nothing_from_elsewhere(serve_tiny) -> None:
    with serve_tiny(page=PAGE) as server, server.client() as client:
        response = client.get("/")
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert client.get("/app.js").headers["content-type"].startswith("text/javascript")
        assert client.get("/../application.py").status_code == 404
    assert not re.search(r"<script>|<style>|\bstyle=|\bon\w+=", response.text), "inline code is blocked by the policy"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    quiet = ("background-networking", "component-update", "sync", "quic", "gpu")
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(
            timeout=MILLISECONDS,
            executable_path=chromium,
            args=["--no-sandbox", *(f"--disable-{name}" for name in quiet)],
        )
        yield found
        found.close()


@pytest.fixture(scope="module")
def page_server(browser, serve_tiny) -> Iterator[Any]:
    with serve_tiny(page=PAGE) as server:
        yield server


@pytest.fixture
def page(browser, page_server) -> Iterator[Any]:
    """The page in a new profile, in English, once it has the models."""
    context = browser.new_context(locale="en-GB", viewport={"width": 1000, "height": 700})
    context.set_default_timeout(MILLISECONDS)
    errors: list[str] = []
    opened = context.new_page()
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.goto(page_server.url)
    opened.wait_for_selector("#model option", state="attached")
    opened.click("#toggle-settings")
    opened.fill("#max_tokens", "12")
    opened.fill("#seed", "1")
    opened.click("#toggle-settings")
    yield opened
    context.close()
    assert errors == []


def send(page: Any, text: str, completions: int) -> str:
    """Sends a message; returns the last completion when so many are there and none is in progress."""
    page.fill("#input", text)
    page.press("#input", "Enter")
    return last_completion(page, completions)


def last_completion(page: Any, completions: int) -> str:
    page.wait_for_selector(f":nth-match(.message.assistant, {completions}) .actions button")
    page.wait_for_selector("#stop", state="hidden")
    return page.locator(".message.assistant .body").last.inner_text()


def test_a_conversation(page, page_server) -> None:
    def answer(text: str) -> list[str]:
        messages = [{"role": "user", "content": text}]
        found = page_server.chat(messages=messages, max_tokens=None, max_completion_tokens=12, seed=1)
        return found["choices"][0]["message"]["content"].split()  # spaces collapse in HTML

    assert send(page, "Hello", 1).split() == answer("Hello")
    send(page, "And then?", 2)
    assert page.locator(".message").count() == 4

    page.reload()  # the browser keeps it
    page.wait_for_selector(".message")
    assert page.locator(".message").count() == 4
    assert page.locator("#list .title").all_inner_texts() == ["Hello"]

    page.locator(".message.user").first.hover()
    page.locator(".message.user").first.get_by_text("Edit").click()
    page.fill(".message.user textarea", "A different question")
    page.press(".message.user textarea", "Enter")
    edited = last_completion(page, 1)
    assert page.locator(".message").count() == 2
    assert edited.split() == answer("A different question")

    page.get_by_text("Regenerate").click()
    assert last_completion(page, 1) == edited  # the seed is the same

    page.click("#new")
    assert page.locator(".message").count() == 0
    assert page.locator("#list li").count() == 1
    page.get_by_label("Delete").click()
    assert page.locator("#list li").count() == 0


def test_stop_frees_the_row(page, page_server, monkeypatch) -> None:
    slow_down(monkeypatch, page_server.engine)
    page.click("#toggle-settings")
    page.fill("#max_tokens", "900")
    page.fill("#input", "Go on")
    page.press("#input", "Enter")
    page.wait_for_selector("#stop", state="visible")
    page.wait_for_selector(".message.assistant .body:not(.waiting)")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send", state="visible")
    page.get_by_text("Stopped.").wait_for(state="visible")
    wait_until(lambda: page_server.engine.is_idle)


def test_markdown_never_becomes_html_of_its_own(page) -> None:
    html = page.evaluate(
        """async (text) => {
          const { render } = await import("/markdown.js");
          const box = document.createElement("div");
          box.append(...render(text));
          return box.innerHTML;
        }""",
        MARKDOWN,
    )
    parts = ("<h1>Title</h1>", "<strong>bold</strong>", "<code>code</code>", "<ol", "<ul><li>inner</li></ul>", "<td>")
    assert [part for part in parts if part not in html] == []
    assert re.findall(r"<a [^>]*>", html) == [
        '<a href="https://example.com" target="_blank" rel="noopener noreferrer nofollow">'
    ]
    assert "<img" not in html
    assert "<script" not in html
    assert "javascript:" not in html


def test_layout_language_and_theme(page) -> None:
    box = {name: page.locator(name).bounding_box() for name in ("nav", "#messages", "#composer", "main > header")}
    assert box["nav"]["x"] == 0
    assert box["nav"]["x"] + box["nav"]["width"] <= box["#messages"]["x"]
    assert box["main > header"]["y"] + box["main > header"]["height"] <= box["#messages"]["y"]
    assert box["#messages"]["y"] + box["#messages"]["height"] <= box["#composer"]["y"]
    assert box["#composer"]["y"] + box["#composer"]["height"] <= 700

    page.select_option("#language", "zh")
    assert page.locator("#send").inner_text() == "发送"
    assert page.get_attribute("html", "lang") == "zh"

    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.select_option("#theme", "dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    page.reload()
    assert page.get_attribute("html", "data-theme") == "dark"

    page.set_viewport_size({"width": 400, "height": 700})
    assert not page.locator("nav").is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_an_error_of_the_server_is_shown(page) -> None:
    page.fill("#input", "x" * 2000)
    page.press("#input", "Enter")
    page.wait_for_selector("#notice", state="visible")
    assert "context" in page.locator("#notice").inner_text()
    assert page.locator(".message.assistant").count() == 0


def test_an_api_key_is_asked_for_and_kept(browser, serve_tiny) -> None:
    with serve_tiny(page=PAGE, api_keys=("secret",)) as server:
        context = browser.new_context(locale="zh-CN")
        context.set_default_timeout(MILLISECONDS)
        opened = context.new_page()
        opened.goto(server.url)
        opened.fill("#key", "secret")
        opened.press("#key", "Enter")
        opened.wait_for_selector("#model option", state="attached")
        opened.reload()
        opened.wait_for_selector("#model option", state="attached")
        context.close()
