"""Runs commands, and knows where things are."""

import json
import os
import re
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "config"
TARGET = ROOT / os.environ.get("CARGO_TARGET_DIR", "target")
BINARY = TARGET / "debug/kling-proxy"
# Of the embedded sandbox, as `kling-proxy sandbox` prints them.
API_KEY = "api-sandboxKeyForTestsOnly000000"

CREATE = [
    "curl", "--silent", "--show-error", "--max-time", "10",
    "--header", "content-type: application/json", "--data", '{"prompt":"a cat"}',
]  # fmt: skip
UNPRIVILEGED = {
    "CapInh": {"0000000000000000"},
    "CapPrm": {"0000000000000000"},
    "CapEff": {"0000000000000000"},
    "CapBnd": {"0000000000000000"},
    "CapAmb": {"0000000000000000"},
    "NoNewPrivs": {"1"},
    "Seccomp": {"2"},
}


def run(*command, code=0, **options):
    """What a command prints, once it has ended with this exit code."""
    done = subprocess.run(
        [str(word) for word in command],
        stdin=None if "input" in options else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **{"timeout": 120, **options},
    )
    if done.returncode != code:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def printed(path):
    """The commands in the comment at the top of a file, which its reader copies: the indented lines."""
    head = path.read_text(encoding="utf-8").split("-->" if path.suffix == ".plist" else "\n\n")[0]
    return "\n".join(re.findall(r"^(?:#   |    )(.*)$", head, re.MULTILINE))


def documented(page, heading):
    """The one block of commands in a section of a page in `docs/`."""
    section = (ROOT / "docs" / page).read_text(encoding="utf-8").split(f"# {heading}\n")[1].split("\n#")[0]
    [block] = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return block


def create(*command):
    """The id of the task that a create makes, sent by curl with these words before and after."""
    answer = json.loads(run(*command))
    if answer["code"] != 0:
        raise AssertionError(answer)
    return answer["data"]["task_id"]


def privileges(pid, *inside):
    """What a process may do, in the terms of `UNPRIVILEGED`, and as whom."""
    lines = run(*inside, "cat", f"/proc/{pid}/status").splitlines()
    fields = {name: set(values.split()) for name, values in (line.split(":", 1) for line in lines)}
    return {name: fields[name] for name in ["Uid", "Gid", *UNPRIVILEGED]}


def mounts(pid, *inside):
    """The options of each mount that a process sees, by its path."""
    lines = run(*inside, "cat", f"/proc/{pid}/mountinfo").splitlines()
    return {path: options.split(",") for _, _, _, _, path, options, *_ in map(str.split, lines)}


def eventually(what, condition, patience=30):
    """The first true value of `condition`, asked again until then."""
    end = time.monotonic() + patience
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not in {patience} s: {what}")
        time.sleep(0.05)
    return value
