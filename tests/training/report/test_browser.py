"""The report in a real browser, headless, over its debugging port: as wide as a telephone and as a desk.

Left out, and counted, where there is no Chromium.
"""

import asyncio
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.training.report.fake_run import fake_run
from training.report.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TELEPHONE, DESK = 390, 1280
"""Widths in CSS pixels."""
OVERFLOW = """
(() => { const wide = [...document.querySelectorAll("body *")].filter(one =>
    one.getBoundingClientRect().right > innerWidth + 1 && !one.closest(".scroll, .list, pre, svg"));
  return JSON.stringify({width: document.documentElement.scrollWidth, inner: innerWidth,
    wide: wide.map(one => one.outerHTML.slice(0, 120)),
    links: [...document.querySelectorAll("nav a")].map(
      one => document.querySelector(one.getAttribute("href")) !== null),
    cut: [...document.querySelectorAll("svg")].flatMap(svg => [...svg.querySelectorAll("text")].filter(text => {
      const inner = text.getBoundingClientRect(), outer = svg.getBoundingClientRect();
      return inner.right > outer.right + 1 || inner.left < outer.left - 1; }).map(text => text.textContent))}); })()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of the debugging port of a headless browser."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip("no Chromium")
    profile = tmp_path_factory.mktemp("profile")
    words = (program, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
             f"--user-data-dir={profile}", "--remote-debugging-port=0", "--remote-allow-origins=*",
             "about:blank")  # fmt: skip
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    try:
        yield next(found[1] for line in process.stderr if (found := re.search(r"listening on ws://([^/]+)/", line)))
    finally:
        process.kill()
        process.communicate()


async def _looked_at(host: str, page: Path, width: int, picture: Path | None) -> dict[str, Any]:
    """What the page is like at that width: requests, errors, measures."""
    async with aiohttp.ClientSession() as http:
        async with http.put(f"http://{host}/json/new?about:blank") as answer:
            address = (await answer.json(content_type=None))["webSocketDebuggerUrl"]
        async with http.ws_connect(address, max_msg_size=0) as socket:
            numbers, seen = itertools.count(1), {"requests": [], "errors": []}  # type: ignore[var-annotated]

            async def ask(method: str, **values: object) -> dict[str, Any]:
                number = next(numbers)
                await socket.send_json({"id": number, "method": method, "params": values})
                while True:
                    told = await socket.receive_json()
                    _note(told, seen)
                    if told.get("id") == number:
                        assert "error" not in told, told
                        return told["result"]  # type: ignore[no-any-return]

            for domain in ("Page", "Network", "Runtime", "Log"):
                await ask(f"{domain}.enable")
            await ask("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1,
                      mobile=width == TELEPHONE)  # fmt: skip
            await ask("Page.navigate", url=page.as_uri())
            while (await ask("Runtime.evaluate", expression="document.readyState"))["result"]["value"] != "complete":
                pass
            said = await ask("Runtime.evaluate", expression=OVERFLOW)
            if picture is not None:
                import base64

                shot = await ask("Page.captureScreenshot", format="png", captureBeyondViewport=False)
                picture.write_bytes(base64.b64decode(shot["data"]))
    return {**seen, **json.loads(said["result"]["value"])}


def _note(told: dict[str, Any], seen: dict[str, list[Any]]) -> None:
    method, values = told.get("method", ""), told.get("params", {})
    if method == "Network.requestWillBeSent" and not values["request"]["url"].startswith(("file:", "data:", "about:")):
        seen["requests"].append(values["request"]["url"])
    if method in ("Runtime.exceptionThrown", "Log.entryAdded"):
        seen["errors"].append(values)


@pytest.mark.parametrize("width", [TELEPHONE, DESK])
def test_report__in_a_browser(browser: str, tmp_path: Path, width: int) -> None:
    page = Path(write_report(str(fake_run(tmp_path / "run"))))
    found = asyncio.run(_looked_at(browser, page, width, None))
    assert found["inner"] == width and found["width"] <= width, found
    assert not found["wide"] and not found["cut"]
    assert not found["requests"] and not found["errors"]
    assert len(found["links"]) > 5 and all(found["links"])
