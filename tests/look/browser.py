"""Opens an HTML file in a headless Chromium (Qt WebEngine, from the package index), and takes a picture of it.

    python -m tests.look.browser PAGE.html PICTURE.png [--dark] [--width 1000] [--script 'document.title']

Prints, as JSON, what the page wrote to the console, what it requested beside itself, and the value of the script.
"""

import argparse
import json
import os
from pathlib import Path

SETTLE_MS = 300  # from the page's load event, or the last change of its size, to the picture
MOST_PIXELS = 8000


def look(
    page: Path, picture: Path, *, dark: bool, width: int, height: int | None, at: str, keys: list[str], script: str
) -> dict:
    """Open a page, press keys, run a script, and take a picture; of the whole page if there is no `height`."""
    flags = [f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--disable-gpu"]
    os.environ |= {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": " ".join(flags)}
    if os.geteuid() == 0:  # Chromium's sandbox refuses root
        os.environ["QTWEBENGINE_DISABLE_SANDBOX"] = "1"
    from PySide6.QtCore import QEventLoop, Qt, QTimer, QUrl
    from PySide6.QtTest import QTest
    from PySide6.QtWebEngineCore import QWebEnginePage, QWebEngineSettings, QWebEngineUrlRequestInterceptor
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    console: list[str] = []
    requests: list[str] = []
    url = QUrl.fromLocalFile(str(page.resolve()))

    class Page(QWebEnginePage):
        def javaScriptConsoleMessage(self, level, message, line, source):  # noqa: N802 - Qt's name
            console.append(message)

    class Requests(QWebEngineUrlRequestInterceptor):
        def interceptRequest(self, info):  # noqa: N802 - Qt's name
            if info.requestUrl().toString() != url.toString() + at:
                requests.append(info.requestUrl().toString())

    app, loop = QApplication([]), QEventLoop()
    view = QWebEngineView()
    view.setPage(Page(view))
    interceptor = Requests()
    view.page().setUrlRequestInterceptor(interceptor)
    view.settings().setAttribute(QWebEngineSettings.WebAttribute.ShowScrollBars, False)
    view.resize(width, height or 800)
    view.show()

    def wait_for(milliseconds: int) -> None:
        QTimer.singleShot(milliseconds, loop.quit)
        loop.exec()

    def value_of(expression: str) -> object:
        found = []
        view.page().runJavaScript(expression, lambda value: (found.append(value), loop.quit()))
        loop.exec()
        return found[0]

    loaded: list[bool] = []
    view.loadFinished.connect(lambda ok: (loaded.append(ok), loop.quit()))
    view.load(QUrl(url.toString() + at))
    loop.exec()
    for key in keys:
        QTest.keyClick(view.focusProxy(), getattr(Qt.Key, f"Key_{key}"))
        wait_for(50)
    result = value_of(f"JSON.stringify({script})")
    if height is None:
        view.resize(width, min(int(value_of("document.documentElement.scrollHeight")), MOST_PIXELS))
        while value_of("innerHeight") != view.height():
            wait_for(SETTLE_MS)
    wait_for(SETTLE_MS)
    saved = view.grab().save(str(picture))
    view.deleteLater()
    del app
    return {
        "loaded": loaded == [True] and saved,
        "console": console,
        "requests": requests,
        "value": json.loads(result) if result else None,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1000)
    parser.add_argument("--height", type=int, help="default: that of the whole page")
    parser.add_argument("--at", default="", help="part of the page to scroll to, such as #labels")
    parser.add_argument("--keys", nargs="*", default=[], help="such as Tab and Down, pressed in this order")
    parser.add_argument("--script", default="document.title")
    seen = look(**vars(parser.parse_args()))
    print(json.dumps(seen), flush=True)
    os._exit(0 if seen["loaded"] else 1)  # Qt's own end takes seconds, and warns
