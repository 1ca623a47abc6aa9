"""Starts the proxy in front of its own sandbox, on free ports."""

import os
import re
import subprocess
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / os.environ.get("CARGO_TARGET_DIR", "target")
BINARY = os.environ.get("KLING_PROXY_BIN", str(TARGET / "debug/kling-proxy"))
DEFAULTS = {
    "KLING_PROXY_LISTEN__ADDRESS": "127.0.0.1:0",
    "KLING_PROXY_ADMIN__ADDRESS": "127.0.0.1:0",
    "KLING_PROXY_SANDBOX__TASK_TIME": "300ms",
}
LISTENER = re.compile(r"(proxy|admin|sandbox) +(https?://\S+)")


def environment(home, **variables):
    """What the binary sees: nothing of the caller's but `PATH`, and no settings file."""
    return {"PATH": os.environ["PATH"], "HOME": home, **variables}


@contextmanager
def proxy(**variables):
    """`kling-proxy serve --sandbox` with these variables; yields the URL of each listener by its name."""
    with tempfile.TemporaryDirectory() as home, open(f"{home}/log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            [BINARY, "serve", "--sandbox"],
            env=environment(home) | DEFAULTS | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            urls = {}
            while len(urls) < 3:
                line = process.stdout.readline()
                if not line:
                    log.seek(0)
                    raise AssertionError(f"it did not start:\n{log.read()}")
                if listener := LISTENER.match(line):
                    urls[listener[1]] = listener[2]
            # A full pipe would stop the child.
            threading.Thread(target=process.stdout.read, daemon=True).start()
            yield urls
        finally:
            process.terminate()
            code = process.wait(timeout=30)
            process.stdout.close()
        if code != 0:
            log.seek(0)
            raise AssertionError(f"it ended with {code}:\n{log.read()}")
