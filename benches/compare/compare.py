#!/usr/bin/env python3
"""Measures kling-proxy and other proxies in front of a stand-in for Kling's API. README.md explains the results."""

import argparse
import base64
import hashlib
import hmac
import http.client
import importlib.util
import json
import os
import resource
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TARGET = ROOT / os.environ.get("CARGO_TARGET_DIR", "target")
ACCESS_KEY = "AccessKeyOfTheComparison00000001"
SECRET_KEY = "SecretKeyOfTheComparison00000001"
POLL = "/v1/videos/text2video/104454366743201459"
MEGABYTE = 1_000_000
UPLOAD = 13 * MEGABYTE
WARM_UP = 0.4  # seconds of each load before the measurement
PATIENCE = 10  # seconds for a contestant to start
PATIENCE_COUNTED = 120  # seconds for a contestant to start under callgrind
BASE = "nginx"


class Failed(Exception):
    """A contestant fails at a task of the comparison."""


@dataclass(frozen=True)
class Contestant:
    """Command and configuration that start a proxy. A `$name` in them stands for an entry of `Rig.values`."""

    program: str | Path | None  # None if it is not installed
    arguments: str
    configuration: str | None = None
    variables: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """Load for each contestant, and the figures to report."""

    title: str
    figures: tuple
    path: str = POLL
    client: str = ""  # arguments of the load client
    sent: int = 0  # bytes of a request's body


@dataclass(frozen=True)
class Proxy:
    """Running contestant. Without group and start: upstream itself, with no proxy between."""

    url: str
    group: int | None = None
    started: float | None = None


TIMED = ("requests/s", "p99, ms", "CPU, ms per 1000")
LOADS = {
    "start": Load("start", ("until the first 200, ms", "resident, MB")),
    "poll1": Load("poll, 1 connection", TIMED, client="--connections 1"),
    "poll32": Load("poll, 32 connections", TIMED, client="--connections 32"),
    "poll256": Load("poll, 256 connections", TIMED, client="--connections 256"),
    "post1k": Load("POST of 1 KB, 32 connections", TIMED, client="--connections 32 --post 1000"),
    "post13m": Load(
        "POST of 13 MB, 4 connections",
        ("MB/s", "CPU, s per GB", "peak resident, MB"),
        client=f"--connections 4 --post {UPLOAD}",
        sent=UPLOAD,
    ),
    "error": Load("429 with code 1303, 32 connections", TIMED, "/limited", "--connections 32 --status 429"),
    "idle": Load("idle connections", ("resident, MB", "KB each")),
}
# Loads for one process, and variables to start it with. Retries are off for errors: the others do not retry either.
PROCESSES = (
    (("poll1", "poll32", "poll256", "post1k", "post13m"), {}),
    (("error",), {"KLING_PROXY_RETRY__ATTEMPTS": "1"}),
    (("idle",), {}),
)


def contestants(kling_proxy):
    """Returns all contestants in the order of the table. None means that the load client talks to upstream directly."""
    return {
        "direct": None,
        "nginx": Contestant(which("nginx"), "-e stderr -c $configuration", "nginx.conf"),
        "haproxy": Contestant(which("haproxy"), "-db -f $configuration", "haproxy.cfg"),
        "envoy": Contestant(envoy(), "-c $configuration -l error --disable-hot-restart", "envoy.yaml"),
        "pingora": Contestant(existing(TARGET / "release/compare-pingora"), "$port $upstream_port $ca_file $token"),
        "kling-proxy": Contestant(
            existing(kling_proxy),
            "--listen 127.0.0.1:$port --admin off --upstream https://localhost:$upstream_port",
            variables={
                "KLING_ACCESS_KEY": ACCESS_KEY,
                "KLING_SECRET_KEY": SECRET_KEY,
                "KLING_PROXY_UPSTREAM__CA_FILE": "$ca_file",
            },
        ),
    }


def which(name):
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")


def envoy():
    """Returns the program itself, because the command of its Python package is a script that starts the program."""
    package = importlib.util.find_spec("envoy")
    return existing(Path(package.origin).with_name("_bin") / "envoy") if package else which("envoy")


def existing(path):
    return path if path.exists() else None


def token():
    """Mints the token for the contestants that cannot mint one. They add it to each request."""

    def encode(raw):
        return base64.urlsafe_b64encode(raw).rstrip(b"=")

    now = int(time.time())
    claims = {"iss": ACCESS_KEY, "exp": now + 86400, "nbf": now - 5}
    signed = encode(b'{"alg":"HS256","typ":"JWT"}') + b"." + encode(json.dumps(claims).encode())
    return (signed + b"." + encode(hmac.digest(SECRET_KEY.encode(), signed, hashlib.sha256))).decode()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def build(profile):
    """Builds the load client and upstream, and returns their folder."""
    command = ["cargo", "build", "--quiet", "--locked", "--profile", profile, "--target-dir", TARGET]
    subprocess.run([*command, "--manifest-path", HERE / "Cargo.toml"], check=True)
    return TARGET / {"dev": "debug"}.get(profile, profile)


# === figures from the kernel about a group of processes ===


def processes(group):
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(folder.name)) == group:
                yield folder
        except ProcessLookupError:
            pass


def cpu_seconds(group):
    """Returns the CPU time of all threads so far, which the scheduler counts in nanoseconds."""
    seconds = 0
    for file in (file for folder in processes(group) for file in folder.glob("task/*/schedstat")):
        with suppress(FileNotFoundError, ProcessLookupError):  # the thread has ended meanwhile
            seconds += int(file.read_text().split()[0]) / 1e9
    return seconds


def resident(group):
    """Returns the resident memory in megabytes, or None if only root may read it. A shared page counts once."""
    try:
        return megabytes(group, "smaps_rollup", "Pss:")
    except PermissionError:
        return None


def peak_resident(group):
    """Returns the greatest resident memory since `reset_peak`, in megabytes."""
    return megabytes(group, "status", "VmHWM:")


def reset_peak(group):
    """Resets the peak of the resident memory. Returns False if that is not allowed."""
    try:
        for folder in processes(group):
            (folder / "clear_refs").write_text("5")
    except PermissionError:
        return False
    return True


def megabytes(group, file, name):
    lines = (line.split() for folder in processes(group) for line in (folder / file).read_text().splitlines())
    return sum(int(words[1]) for words in lines if words[0] == name) * 1024 / MEGABYTE


# === the rig ===


class Rig:
    """Upstream, and the values that contestants need in order to run in front of it."""

    def __init__(self, everyone, programs, folder):
        self.everyone = everyone
        self.programs = programs
        self.folder = folder
        self.values = {"folder": folder, "ca_file": folder / "ca.pem", "token": token()}
        self.upstream = subprocess.Popen(
            [programs / "compare-upstream", "--ca-file", self.values["ca_file"]]
            + ["--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY],
            stdout=subprocess.PIPE,
            text=True,
        )
        self.values["upstream_port"] = self.upstream.stdout.readline().strip()

    def close(self):
        self.upstream.terminate()
        self.upstream.wait()
        self.upstream.stdout.close()

    @contextmanager
    def running(self, name, variables=(), wrapper=()):
        """Starts a contestant and waits for its first successful response. Stops it at the end."""
        contestant = self.everyone[name]
        if contestant is None:
            yield Proxy(f"https://localhost:{self.values['upstream_port']}")
            return
        port = free_port()
        values = {**self.values, "port": port}
        if contestant.configuration:
            values["configuration"] = self.folder / contestant.configuration
            text = Template((HERE / contestant.configuration).read_text("utf-8")).substitute(values)
            values["configuration"].write_text(text, "utf-8")
        variables = contestant.variables | dict(variables)
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            start = time.perf_counter()
            process = subprocess.Popen(
                [*wrapper, contestant.program, *shlex.split(Template(contestant.arguments).substitute(values))],
                env={key: Template(value).substitute(values) for key, value in variables.items()}
                | {"HOME": str(self.folder), "PATH": os.environ["PATH"]},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        try:
            end = start + (PATIENCE_COUNTED if wrapper else PATIENCE)
            status = None
            while status != 200:
                if process.poll() is not None or time.perf_counter() > end:
                    said = log.read_text("utf-8", "replace")[-500:]
                    raise Failed(f"did not start; its last status: {status}; its log: {said!r}")
                status = poll(port)
            started = time.perf_counter() - start
            yield Proxy(f"http://127.0.0.1:{port}", process.pid, started)
        finally:
            stop(process)

    @contextmanager
    def client(self, proxy, load, *more):
        """Runs the load client, and kills it at the end."""
        command = [self.programs / "compare-load", proxy.url + load.path, *shlex.split(load.client), *map(str, more)]
        if proxy.group is None:
            command += ["--ca-file", self.values["ca_file"], "--token", self.values["token"]]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                yield process
            finally:
                process.kill()

    def send(self, proxy, load, *more):
        """Runs a load to its end and returns its report."""
        with self.client(proxy, load, *more) as client:
            return report(client.communicate()[0])


def poll(port):
    """Returns the status of one poll, or None if the process does not listen yet. Waits a little if it is not 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", POLL, headers={"Connection": "close"})
        status = connection.getresponse().status
        if status != 200:
            time.sleep(0.01)
        return status
    except (OSError, http.client.HTTPException):
        time.sleep(0.0005)
    finally:
        connection.close()


def stop(process):
    """Stops a contestant by SIGINT, which all take as a request for a quick end; after 10 seconds by SIGKILL."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(10)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            pass


def report(line):
    """Parses the output of the load client. Fails if a response was bad or there was none."""
    if not line:
        raise Failed("the load client failed")
    done = json.loads(line)
    if done["bad"] or not done["requests"]:
        raise Failed(f"{done['bad']} of {done['bad'] + done['requests']} answers were bad: {done['why']}")
    return done


# === measuring ===


def start(proxy):
    time.sleep(0.3)
    return proxy.started * 1e3, resident(proxy.group)


def timed(rig, proxy, load, seconds):
    """Returns the figures of a load, in the order of `load.figures`."""
    rig.send(proxy, load, "--seconds", min(WARM_UP, seconds))
    if proxy.group is not None:
        is_reset = reset_peak(proxy.group)
        before = cpu_seconds(proxy.group)
    done = rig.send(proxy, load, "--seconds", seconds)
    requests, sent = done["requests"], done["requests"] * load.sent
    figures = {
        "requests/s": requests / done["seconds"],
        "p99, ms": done["p99"] * 1e3,
        "MB/s": sent / done["seconds"] / MEGABYTE,
    }
    if proxy.group is not None:
        cpu = cpu_seconds(proxy.group) - before
        figures["CPU, ms per 1000"] = cpu * 1e3 / requests * 1e3
        figures["CPU, s per GB"] = cpu / sent * 1e9 if sent else None
        figures["peak resident, MB"] = peak_resident(proxy.group) if is_reset else None
    return [figures.get(name) for name in load.figures]


def idle(rig, proxy, load, connections):
    """Measures the memory of connections that were used once. Then uses each again, to see that it was kept."""
    before = resident(proxy.group)
    with rig.client(proxy, load, "--hold", "--connections", connections) as client:
        report(client.stdout.readline())
        time.sleep(1)
        held = resident(proxy.group)
        report(client.communicate("\n")[0])
    return held, None if held is None else (held - before) * MEGABYTE / 1000 / connections


def instructions(rig, name, requests):
    """Returns the user-space instructions per poll. The difference of two runs leaves out start and end."""
    counts = []
    for number in (requests // 10, requests):
        folder = Path(tempfile.mkdtemp(dir=rig.folder))
        output = f"--callgrind-out-file={folder}/%p"
        wrapper = ["valgrind", "--quiet", "--tool=callgrind", "--trace-children=yes", output]
        with rig.running(name, wrapper=wrapper) as proxy:
            rig.send(proxy, LOADS["poll1"], "--requests", number)
        lines = (line.split() for file in folder.iterdir() for line in file.open())
        counts.append(sum(int(words[1]) for words in lines if words[:1] == ["totals:"]))
    return (counts[1] - counts[0]) / (requests - requests // 10)


class Results:
    """Samples and failures by contestant and load."""

    def __init__(self):
        self.samples = {}
        self.bad = {}

    @contextmanager
    def noting(self, name, key):
        """Marks figures that cannot be measured."""
        try:
            yield
        except (Failed, OSError) as error:
            self.bad[name, key] = str(error)
            print(f"{name}, {key}: BAD: {error}", file=sys.stderr, flush=True)

    def add(self, name, key, figures):
        self.samples.setdefault((name, key), []).append(figures)
        named = zip(LOADS[key].figures, figures, strict=True)
        print(f"{name}, {key}:", "; ".join(f"{show(value)} {figure}" for figure, value in named), file=sys.stderr)

    def is_bad(self, name, key):
        """Returns True for a failed load, and for every load of a contestant that did not start."""
        return (name, "start") in self.bad or (name, key) in self.bad

    def median(self, name, key, column):
        """Returns the median, or None if there is no such figure."""
        values = [figures[column] for figures in self.samples.get((name, key), [])]
        return None if self.is_bad(name, key) or not values or None in values else statistics.median(values)

    def cell(self, name, key, column):
        """Returns a median, with its ratio to the median of the base."""
        value, base = self.median(name, key, column), self.median(BASE, key, column)
        if self.is_bad(name, key):
            return "**bad**"
        return show(value) if not value or not base or name == BASE else f"{show(value)} ({value / base:.2f})"

    def table(self, names):
        """Yields the lines of the table in Markdown."""
        yield f"| load | figure | {' | '.join(names)} |"
        yield f"| --- | --- |{' ---: |' * len(names)}"
        for key, load in LOADS.items():
            for column, figure in enumerate(load.figures):
                cells = " | ".join(self.cell(name, key, column) for name in names)
                yield f"| {load.title} | {figure} | {cells} |"


def show(value):
    """Returns a number with three digits, or with all digits of a larger integer."""
    if value is None:
        return "–"
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def visit(rig, name, options, results):
    """Runs all loads against one contestant, once."""
    for keys, variables in PROCESSES:
        if results.is_bad(name, "start"):
            return
        with results.noting(name, "start"), rig.running(name, variables) as proxy:
            if proxy.group is not None:
                results.add(name, "start", start(proxy))
            for key in keys:
                with results.noting(name, key):
                    if key != "idle":
                        results.add(name, key, timed(rig, proxy, LOADS[key], options.seconds))
                    elif proxy.group is not None:
                        results.add(name, key, idle(rig, proxy, LOADS[key], options.idle))


def compare(rig, names, options, results):
    for _ in range(options.rounds):
        for name in names:
            visit(rig, name, options, results)
    print(f"Rounds: {options.rounds}; seconds a load: {options.seconds:g}; cores: {os.cpu_count()}.", end=" ")
    print(f"Medians, in parentheses their ratio to {BASE}'s.\n")
    print("\n".join(results.table(names)))


def count(rig, names, results):
    print("| contestant | instructions a poll |\n| --- | ---: |")
    for name in names:
        with results.noting(name, "instr"):
            print(f"| {name} | {show(instructions(rig, name, 5000))} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--proxy", type=Path, help="the kling-proxy that is measured: target/release/kling-proxy")
    parser.add_argument("--only", help="contestants, separated by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="how long a load lasts")
    parser.add_argument("--idle", type=int, default=10_000, help="how many idle connections")
    parser.add_argument("--instr", action="store_true", help="count instructions instead, with callgrind")
    parser.add_argument("--smoke", action="store_true", help="only see that all of it works, with debug builds")
    options = parser.parse_args()
    if options.smoke:
        parser.set_defaults(only="kling-proxy", rounds=1, seconds=0.2, idle=100)
        options = parser.parse_args()
    proxy = options.proxy or TARGET / ("debug" if options.smoke else "release") / "kling-proxy"
    everyone = contestants(proxy.resolve())
    names = options.only.split(",") if options.only else list(everyone)
    if unknown := set(names) - set(everyone):
        parser.error(f"no such contestant: {', '.join(unknown)}")
    missing = [name for name in names if everyone[name] and not everyone[name].program]
    names = [name for name in names if name not in missing and (everyone[name] or not options.instr)]
    programs = build("dev" if options.smoke else "release")

    # As many descriptors as allowed: an idle connection takes one in the load client and one in the proxy.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    results = Results()
    with tempfile.TemporaryDirectory(prefix="kling-proxy-compare-") as folder:
        rig = Rig(everyone, programs, Path(folder))
        try:
            if options.instr:
                count(rig, names, results)
            else:
                compare(rig, names, options, results)
        finally:
            rig.close()
    for name in missing:
        print(f"\nLeft out, since it is not installed: {name}.")
    for (name, key), why in results.bad.items():
        print(f"\nBad: {name}, {key}: {why}")
    return 1 if results.bad or "kling-proxy" in missing else 0


if __name__ == "__main__":
    sys.exit(main())
