"""A headless Chromium to open pages in, spoken to over a pipe: no package is needed for it.

    with Browser(find_chromium()) as browser:
        page = browser.open(Path("run.html"))
        page.run("document.title"), page.errors

Two file descriptors carry the DevTools protocol: JSON messages that end with a zero byte.
"""

import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "headless_shell")
SECONDS = 60  # that an answer may take on a busy machine


def find_chromium():
    """The path of a Chromium, or None."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """Started at once; ends with its context."""

    def __init__(self, path, width=1400, height=1000):
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_it, self.write_to = os.pipe()
        self.read_from, from_it = os.pipe()
        # Where 3 and 4 are expected nothing of ours may lie.
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (to_it, from_it)]

        def place():
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        self.process = subprocess.Popen(
            [
                path,
                "--headless",
                "--no-sandbox",
                "--disable-gpu",
                "--remote-debugging-pipe",
                "--disable-dev-shm-usage",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                f"--user-data-dir={self.folder.name}",
                f"--window-size={width},{height}",
                "about:blank",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=place,
            pass_fds=(3, 4),
            env=os.environ | {"HOME": self.folder.name},
        )
        for fd in (to_it, from_it, *high):
            os.close(fd)
        self.count, self.left, self.events = 0, b"", []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            self.ask("Browser.close")
            self.process.wait(10)
        except (OSError, RuntimeError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        for fd in (self.write_to, self.read_from):
            os.close(fd)
        self.folder.cleanup()

    def ask(self, method, session=None, **params):
        """The result of one command; events that come meanwhile are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if session:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.write_to, data) :]
        until = time.monotonic() + SECONDS
        while True:
            answer = self._read(until)
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def _read(self, until):
        while b"\0" not in self.left:
            left = max(0.0, until - time.monotonic())
            ready, _, _ = select.select([self.read_from], [], [], left)
            if not ready:
                raise RuntimeError("the browser does not answer")
            data = os.read(self.read_from, 1 << 16)
            if not data:
                raise RuntimeError("the browser is gone")
            self.left += data
        message, _, self.left = self.left.partition(b"\0")
        return json.loads(message)

    def open(self, path, fragment="", dark=False):
        """A page in a tab of its own, loaded."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Runtime", "Log", "Page", "Network"):
            page.ask(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.ask("Emulation.setEmulatedMedia", features=[scheme])
        page.ask("Page.navigate", url=Path(path).resolve().as_uri() + fragment)
        page.wait("document.readyState === 'complete' && location.protocol === 'file:'")
        return page


class Page:
    def __init__(self, browser, session):
        self.browser, self.session = browser, session

    def ask(self, method, **params):
        return self.browser.ask(method, self.session, **params)

    def run(self, code):
        """The value of an expression; RuntimeError where it throws."""
        done = self.ask("Runtime.evaluate", expression=code, returnByValue=True)
        if "exceptionDetails" in done:
            raise RuntimeError(json.dumps(done["exceptionDetails"])[:500])
        return done["result"].get("value")

    def wait(self, code, seconds=SECONDS):
        """Until the expression is true."""
        until = time.monotonic() + seconds
        while not self.run(code):
            if time.monotonic() > until:
                raise RuntimeError(f"never: {code}")
            time.sleep(0.05)

    def press(self, key, code=None, **more):
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=code or key, **more)

    @property
    def errors(self):
        """What was thrown or logged as an error or a warning."""
        found = []
        for event in self.browser.events:
            params, method = event.get("params", {}), event.get("method")
            if event.get("sessionId") != self.session:
                continue
            if (
                method == "Runtime.exceptionThrown"
                or (method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"))
                or (method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"))
            ):
                found.append(json.dumps(params)[:500])
        return found

    @property
    def requested(self):
        """All addresses that the page asked for."""
        return [
            event["params"]["request"]["url"]
            for event in self.browser.events
            if event.get("sessionId") == self.session
            and event["method"] == "Network.requestWillBeSent"
        ]
