"""Makes the files of a release for one platform: an archive, its bill of materials, and checksums.

`python3 .ci/release.py` builds for Linux with musl, statically, if that target of Rust is installed, else for this
machine. It needs cargo, git and cargo-cyclonedx. The same commit gives the same archive, but for the program in it.
"""

import argparse
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Beside the program: the README with the pages that it leads to, and the examples.
FILES = ["CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md", "SECURITY.md", "config", "docs"]
# The name that each shell looks for.
COMPLETIONS = {
    "bash": "kling-proxy.bash",
    "elvish": "kling-proxy.elv",
    "fish": "kling-proxy.fish",
    "powershell": "_kling-proxy.ps1",
    "zsh": "_kling-proxy",
}


def output(*command, **options):
    """The standard output of a command that succeeds."""
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, **options).stdout


def git(*words):
    """The output of git, also where another user owns the clone."""
    return output("git", "-c", "safe.directory=*", *words, text=True)


def default_target(host):
    """The musl target of this machine if Rust has it, else this machine's own."""
    static = host.replace("-linux-gnu", "-linux-musl")
    libraries = Path(output("rustc", "--print", "sysroot", text=True).strip(), "lib/rustlib")
    if (libraries / static).is_dir():
        return static
    print(f"The target {static} is not installed, so the program is for {host}, and needs its libraries.")
    return host


def build(target, host, folder):
    """Builds the program and returns its path."""
    environment = dict(os.environ)
    if target == host:
        # Where `cargo build --release` puts it, so that nothing is built twice.
        where, words = folder / "release", []
    else:
        where, words = folder / target / "release", ["--target", target]
    if target.endswith("-linux-musl") and target != host:
        environment.setdefault(f"CC_{target.replace('-', '_')}", "musl-gcc")
    if target.startswith("aarch64-unknown-linux"):
        # Some kernels have pages of 64 KiB. With this machine's size jemalloc would refuse to start on them.
        environment.setdefault("JEMALLOC_SYS_WITH_LG_PAGE", "16")
    output("cargo", "build", "--release", "--locked", *words, env=environment)
    return where / "kling-proxy"


def is_static(program):
    """Returns true if an ELF program needs no loader, and so no library."""
    return "INTERP" not in output("readelf", "--program-headers", "--wide", program, text=True)


def crates(target):
    """The crates that are in the program, each as `name version`."""
    words = ["--locked", "--edges=normal", f"--target={target}", "--prefix=none", "--format={p}"]
    lines = output("cargo", "tree", *words, text=True).splitlines()
    return {" ".join(line.split()[:2]).replace(" v", " ") for line in lines}


def bill_of_materials(target, time):
    """The crates in the program, as CycloneDX.

    The tool can write only beside `Cargo.toml`, and adds crates that only the tests' features need.
    """
    options = ["--format=json", "--spec-version=1.5", "--describe=binaries", "--no-build-deps", f"--target={target}"]
    output("cargo", "cyclonedx", "--quiet", *options, env=os.environ | {"SOURCE_DATE_EPOCH": str(time)})
    written = ROOT / "kling-proxy_bin.cdx.json"
    bill = json.loads(written.read_text(encoding="utf-8").replace(f"path+{ROOT.as_uri()}", "path+file://."))
    written.unlink()
    there = crates(target)
    bill["components"] = [part for part in bill["components"] if f"{part['name']} {part['version']}" in there]
    known = {part["bom-ref"] for part in [bill["metadata"]["component"], *bill["components"]]}
    bill["dependencies"] = [
        {"ref": crate["ref"], "dependsOn": [needed for needed in crate.get("dependsOn", []) if needed in known]}
        for crate in bill["dependencies"]
        if crate["ref"] in known
    ]
    return (json.dumps(bill, indent=2) + "\n").encode()


def contents(program, scratch):
    """The files of the archive by their names in it, each with its text and its mode."""
    files = {"kling-proxy": (program.read_bytes(), 0o755)}
    # Only what git knows: a folder such as `config/secrets` holds keys.
    for name in git("ls-files", "-z", *FILES).split("\0")[:-1]:
        files[name] = ((ROOT / name).read_bytes(), 0o644)
    for shell, name in COMPLETIONS.items():
        files[f"completions/{name}"] = (output(program, "completions", shell), 0o644)
    output(program, "man", scratch)
    for page in scratch.iterdir():
        files[f"man/{page.name}"] = (page.read_bytes(), 0o644)
        page.unlink()
    scratch.rmdir()
    return files


def archive(folder, files, time):
    """A compressed archive of files under one folder, without a trace of this machine."""
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, (data, mode) in sorted(files.items()):
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size, entry.mode, entry.mtime = len(data), mode, time
            tar.addfile(entry, io.BytesIO(data))
    return gzip.compress(raw.getvalue(), mtime=0)


def main():
    metadata = json.loads(output("cargo", "metadata", "--format-version=1", "--no-deps", "--locked"))
    [package] = metadata["packages"]
    target_folder = Path(metadata["target_directory"])
    host = output("rustc", "--print", "host-tuple", text=True).strip()

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", help="the platform, as Rust names it")
    parser.add_argument("--program", type=Path, help="a program that was built for the platform, instead of a build")
    parser.add_argument("--out", type=Path, default=target_folder / "dist", help="the folder to write to")
    options = parser.parse_args()

    target = options.target or (host if options.program else default_target(host))
    program = (options.program or build(target, host, target_folder)).resolve()
    if target.endswith("-linux-musl") and not is_static(program):
        sys.exit(f"{program} is not static")

    time = int(os.environ.get("SOURCE_DATE_EPOCH") or git("log", "-1", "--format=%ct"))
    options.out.mkdir(parents=True, exist_ok=True)
    name = f"kling-proxy-{package['version']}-{target}"
    made = {
        f"{name}.tar.gz": archive(name, contents(program, options.out.resolve() / "man"), time),
        f"{name}.cdx.json": bill_of_materials(target, time),
    }
    made["SHA256SUMS"] = "".join(f"{hashlib.sha256(made[file]).hexdigest()}  {file}\n" for file in made).encode()
    for file, data in made.items():
        (options.out / file).write_bytes(data)
        print(options.out / file)


if __name__ == "__main__":
    main()
