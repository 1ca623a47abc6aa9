"""Podman with a storage of its own, and in it the image that `Dockerfile` makes.

No image is fetched. The build's base is this machine, mounted; the final base is made of the Debian packages that
gcr.io/distroless/cc-debian12 is made of, so that what is missing here is missing there.
"""

import atexit
import functools
import os
import shutil
import subprocess
import tempfile
import tomllib
from contextlib import contextmanager
from pathlib import Path
from resource import RLIMIT_NOFILE, RLIMIT_NPROC, setrlimit

from support import ROOT, TARGET, UNPRIVILEGED, eventually, mounts, privileges, run

VERSION = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))["package"]["version"]
IMAGE = f"kling-proxy:{VERSION}"
BASE = "localhost/test/base"
BUILD_BASE = "localhost/test/build-base"
# The image of the examples' clients, here with this machine's curl in it.
CURL = "docker.io/curlimages/curl:8.16.0"
# What distroless' base has of the binary's needs: libc, its C runtime, and whom to trust.
PACKAGES = ["libc6", "libgcc-s1", "ca-certificates"]
HARDENED = ["--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
# What the proxy's process may do in its container, and whether its root is read-only.
CONFINED = (UNPRIVILEGED | {"Uid": {"65532"}, "Gid": {"65532"}}, True)
# Where the stand-in for Kling is, by the name in its certificate.
KLING = "kling.test"
UPSTREAM = {
    "KLING_PROXY_UPSTREAM__URL": f"https://{KLING}:5546",
    "KLING_PROXY_UPSTREAM__CA_FILE": "/etc/authority/ca.pem",
}
# The stand-in is a proxy that takes this token, which a key pair's JWT is signed with, for a client's.
STAND_IN_TOKEN = "5ecRe7ToKeN0fTheStandInForTests0"
STAND_IN = {
    "KLING_PROXY_LISTEN__ADDRESS": "0.0.0.0:5546",
    "KLING_PROXY_LISTEN__TLS__CERTIFICATE_FILE": "/etc/authority/kling.pem",
    "KLING_PROXY_LISTEN__TLS__KEY_FILE": "/etc/authority/kling.key",
    "KLING_PROXY_ACCESS__ALLOWED_HOSTS": f'["{KLING}"]',
    "KLING_PROXY_ACCESS__CLIENT_TOKENS_FILE": "/etc/authority/tokens",
}
# As much as any of it needs, and no more than a process may ask for that may not raise its limits.
LIMIT = 16384
# No journal, no systemd.
SETTINGS = f"""\
[containers]
default_ulimits = ["nofile={LIMIT}:{LIMIT}", "nproc={LIMIT}:{LIMIT}"]
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
tmp_dir = "{{0}}/libpod"
[network]
network_backend = "netavark"
network_config_dir = "{{0}}/networks"
"""
STORAGE = """\
[storage]
driver = "vfs"
graphroot = "{0}/graph"
runroot = "{0}/run"
"""


@functools.cache
def storage():
    """Its folder; everything in it goes when the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="kling-proxy-packages-"))
    folder.chmod(0o755)
    for limit in [RLIMIT_NOFILE, RLIMIT_NPROC]:
        setrlimit(limit, (LIMIT, LIMIT))
    for variable, name, text in [
        ("CONTAINERS_CONF", "containers.conf", SETTINGS),
        ("CONTAINERS_STORAGE_CONF", "storage.conf", STORAGE),
    ]:
        (folder / name).write_text(text.format(folder), encoding="utf-8")
        os.environ[variable] = str(folder / name)
    atexit.register(clear, folder)
    return folder


def clear(folder):
    run("podman", "pod", "rm", "--all", "--force", "--time=0")
    run("podman", "rm", "--all", "--force", "--time=0")
    run("podman", "network", "prune", "--force")
    shutil.rmtree(folder)


def podman(*words, **options):
    """What `podman` prints."""
    storage()
    return run("podman", *words, **options)


def imported(folder, name, *changes):
    """Makes an image of a folder."""
    archive = folder.with_suffix(".tar")
    run("tar", "--create", "--file", archive, "--directory", folder, ".")
    podman("import", *(f"--change={change}" for change in changes), archive, name)
    archive.unlink()


def tree(name):
    """An empty root folder for an image."""
    folder = storage() / name
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    return folder


@functools.cache
def base():
    """Makes the final base, and tells how many trust roots it has."""
    root, packages = tree("base"), tree("packages")
    run("apt-get", "download", "-qq", *PACKAGES, cwd=packages)
    for package in packages.iterdir():
        run("dpkg-deb", "--extract", package, root)
    # What the package's own script would do.
    roots = sorted((root / "usr/share/ca-certificates/mozilla").iterdir())
    bundle = root / "etc/ssl/certs/ca-certificates.crt"
    bundle.parent.mkdir(parents=True, exist_ok=True)
    bundle.write_text("".join(file.read_text(encoding="utf-8") for file in roots), encoding="utf-8")
    (root / "etc/nsswitch.conf").write_text("hosts: files dns\n", encoding="utf-8")
    imported(root, BASE)
    return len(roots)


def build_base():
    """An empty folder where this machine's programs, toolchain and crates are mounted: the options for that."""
    root = tree("build-base")
    for name in ["bin", "sbin", "lib", "lib64"]:
        (root / name).symlink_to(f"usr/{name}")
    cargo = Path(os.environ.get("CARGO_HOME", Path.home() / ".cargo"))
    # What was built for the last image, so that only what has changed is built for this one.
    cache = TARGET / "image"
    cache.mkdir(parents=True, exist_ok=True)
    imported(
        root,
        BUILD_BASE,
        "ENV PATH=/rust/bin:/usr/bin",
        "ENV CARGO_HOME=/cargo",
        "ENV CARGO_NET_OFFLINE=true",
        "ENV CARGO_BUILD_BUILD_DIR=/cache",
    )
    run("cargo", "fetch", "--locked", "--target", run("rustc", "--print", "host-tuple").strip(), cwd=ROOT)
    return [
        "--volume=/usr:/usr:ro",
        "--volume=/etc/alternatives:/etc/alternatives:ro",
        f"--volume={run('rustc', '--print', 'sysroot', cwd=ROOT).strip()}:/rust:ro",
        f"--volume={cargo}/registry:/cargo/registry",
        f"--volume={cache}:/cache",
    ]


@functools.cache
def image():
    """Builds the image as anybody would, but for the bases, and gives its name."""
    base()
    podman(
        "build",
        "--isolation=chroot",
        "--format=docker",  # OCI's format knows no health check
        f"--build-arg=BUILD_IMAGE={BUILD_BASE}",
        f"--build-arg=BASE_IMAGE={BASE}",
        f"--tag={IMAGE}",
        *build_base(),
        ROOT,
        timeout=1800,
    )
    return IMAGE


@functools.cache
def curl():
    """An image of curl and a shell, with the libraries that they need."""
    root = tree("curl")
    programs = [Path(f"/usr/bin/{name}") for name in ["curl", "sh", "cat"]]
    words = run("ldd", *programs).split()
    for file in {*programs, *(Path(word) for word in words if word.startswith("/") and not word.endswith(":"))}:
        copy = root / file.relative_to("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    (root / "bin").symlink_to("usr/bin")
    imported(root, CURL, 'ENTRYPOINT ["curl"]', "ENV PATH=/usr/bin")
    return CURL


@functools.cache
def authority():
    """A folder with a certificate of `KLING`, and of the private authority that issued it."""
    folder = tree("authority")
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1"]
    openssl = functools.partial(run, "openssl", "req", "-x509", *new_key, cwd=folder)
    openssl("-subj", "/CN=Test authority", "-keyout", "ca.key", "-out", "ca.pem")
    openssl(
        "-subj", f"/CN={KLING}", "-addext", f"subjectAltName=DNS:{KLING}",
        "-addext", "basicConstraints=critical,CA:FALSE",
        "-CA", "ca.pem", "-CAkey", "ca.key", "-keyout", "kling.key", "-out", "kling.pem",
    )  # fmt: skip
    (folder / "tokens").write_text(STAND_IN_TOKEN, encoding="utf-8")
    for name in ["kling.key", "tokens"]:
        (folder / name).chmod(0o444)
    return folder


def variables(pairs):
    """The options that set environment variables."""
    return [f"--env={name}={value}" for name, value in pairs.items()]


@contextmanager
def container(*words):
    """The id of a container that runs meanwhile."""
    name = podman("run", "--detach", *words).strip()
    try:
        yield name
    finally:
        podman("rm", "--force", "--time=0", name)


def inspect(name, field):
    """A field of a container, as a Go template names it."""
    return podman("inspect", f"--format={field}", name).strip()


def address(name):
    """A container's address on its one network."""
    return inspect(name, "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")


def confinement(name):
    """What a container's process may do, in the terms of `CONFINED`."""
    pid = inspect(name, "{{.State.Pid}}")
    return privileges(pid), "ro" in mounts(pid)["/"]


def healthy(name):
    """Whether the image's own health check passes."""
    state = inspect(name, "{{.State.Status}}")
    if state != "running":
        raise AssertionError(f"it is {state}:\n{podman('logs', name)}")
    return subprocess.run(["podman", "healthcheck", "run", name], capture_output=True).returncode == 0


def wait_until_healthy(name):
    """Runs the image's health check until it passes."""
    eventually(f"{name} is healthy", lambda: healthy(name))


@contextmanager
def network():
    """The name of a network on which containers find each other by name, and `KLING` answers."""
    name = podman("network", "create").strip()
    try:
        with container(
            f"--network={name}",
            f"--network-alias={KLING}",
            f"--volume={authority()}:/etc/authority:ro",
            *variables(STAND_IN),
            *HARDENED,
            image(),
            "serve",
            "--sandbox",
        ) as stand_in:
            wait_until_healthy(stand_in)
            yield name
    finally:
        podman("network", "rm", name)
