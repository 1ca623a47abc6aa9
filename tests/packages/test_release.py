"""The files that `.ci/release.py` makes: the archive is complete, and what is in it runs as it is unpacked.

They are made from the program in the image, which is a release build, so that none is built for this. `RELEASE` names a
folder of files that were made before, to test those.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import unittest
from pathlib import Path

from support import ROOT, create, eventually, run

CARGO = tomllib.loads((ROOT / "Cargo.toml").read_text(encoding="utf-8"))["package"]
HOST = run("rustc", "--print", "host-tuple").strip()


def make(folder, *options):
    run(sys.executable, ROOT / ".ci/release.py", f"--out={folder}", *options, cwd=ROOT, timeout=300)


def program_of_the_image(folder):
    """A copy of the program in the image."""
    from containers import image, podman

    root = Path(podman("image", "mount", image()).strip())
    try:
        return Path(shutil.copy(root / "usr/local/bin/kling-proxy", folder))
    finally:
        podman("image", "unmount", image())


class Release(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.scratch = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        if folder := os.environ.get("RELEASE"):
            cls.files, cls.program = Path(folder), None
        else:
            cls.files, cls.program = cls.scratch / "dist", program_of_the_image(cls.scratch)
            make(cls.files, f"--program={cls.program}")
        [cls.archive] = cls.files.glob("*.tar.gz")
        cls.name = cls.archive.name.removesuffix(".tar.gz")
        cls.target = re.fullmatch(r"kling-proxy-[^-]+-(.*)", cls.name)[1]
        run("tar", "-xzf", cls.archive.resolve(), "-C", cls.scratch)
        cls.unpacked = cls.scratch / cls.name

    def run_unpacked(self, *words):
        """What the unpacked program prints, without the environment of the test."""
        return run(self.unpacked / "kling-proxy", *words, env={"HOME": str(self.scratch), "PATH": "/usr/bin:/bin"})

    def test_the_archive_has_the_program_its_pages_and_nothing_that_git_does_not_know(self):
        folder = self.scratch / "pages"
        self.run_unpacked("man", str(folder))
        pages = {f"man/{page.name}": page.read_text(encoding="utf-8") for page in folder.iterdir()}
        completions = {
            f"completions/{file}": self.run_unpacked("completions", shell)
            for shell, file in [
                ("bash", "kling-proxy.bash"),
                ("elvish", "kling-proxy.elv"),
                ("fish", "kling-proxy.fish"),
                ("powershell", "_kling-proxy.ps1"),
                ("zsh", "_kling-proxy"),
            ]
        }
        self.assertIn("man/kling-proxy.1", pages)
        kept = [":(glob)*.md", "LICENSE", "config", "docs"]
        kept = run("git", "-c", "safe.directory=*", "ls-files", *kept, cwd=ROOT).splitlines()
        self.assertIn("config/systemd/kling-proxy.service", kept)
        expected = pages | completions | {name: (ROOT / name).read_text(encoding="utf-8") for name in kept}
        found = {str(path.relative_to(self.unpacked)) for path in self.unpacked.rglob("*") if path.is_file()}
        self.assertEqual(found, {"kling-proxy", *expected})
        for name, text in expected.items():
            self.assertEqual((self.unpacked / name).read_text(encoding="utf-8"), text, name)

    def test_the_archive_shows_nothing_of_the_machine_that_made_it(self):
        with tarfile.open(self.archive) as tar:
            entries = tar.getmembers()
        self.assertEqual({(entry.uid, entry.gid, entry.uname, entry.gname) for entry in entries}, {(0, 0, "", "")})
        modes = {entry.mode for entry in entries if entry.name != f"{self.name}/kling-proxy"}
        self.assertEqual(modes, {0o644})
        if self.program:
            again = self.scratch / "again"
            make(again, f"--program={self.program}")
            for file in self.files.iterdir():
                self.assertEqual((again / file.name).read_bytes(), file.read_bytes(), file.name)

    def test_links_in_the_archive_lead_somewhere(self):
        """But for links from `docs/` into the source, which is not in the archive."""
        source = re.compile(r"\.\./(benches|fuzz|src|tests)/")
        for page in [*self.unpacked.glob("*.md"), *self.unpacked.glob("docs/*.md")]:
            for link in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
                self.assertTrue((page.parent / link).exists() or source.match(link), f"{page.name}: {link}")

    def test_the_unpacked_program_makes_a_task_in_the_sandbox(self):
        self.assertIn(CARGO["version"], self.run_unpacked("--version"))
        command = [self.unpacked / "kling-proxy", "--sandbox", "--listen", "127.0.0.1:0", "--admin", "off"]
        environment = {"HOME": str(self.scratch), "PATH": "/usr/bin:/bin"}
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as proxy:
            self.addCleanup(proxy.kill)
            url = re.match(r"proxy +(\S+)", eventually("it listens", proxy.stdout.readline))[1]
            sent = ["curl", "--silent", "--show-error", "--max-time", "10", "--data", '{"prompt":"a cat"}']
            self.assertRegex(create(*sent, f"{url}/v1/videos/text2video"), r"^\d+$")
            proxy.terminate()
            self.assertEqual(proxy.wait(timeout=30), 0)

    def test_the_bill_of_materials_lists_the_crates_of_the_program(self):
        text = (self.files / f"{self.name}.cdx.json").read_text(encoding="utf-8")
        bill = json.loads(text)
        self.assertEqual((bill["bomFormat"], bill["specVersion"]), ("CycloneDX", "1.5"))
        self.assertEqual(bill["metadata"]["component"]["name"], "kling-proxy")
        words = ["--locked", "--edges=normal", f"--target={self.target}", "--prefix=none", "--format={p}"]
        tree = {" ".join(line.split()[:2]) for line in run("cargo", "tree", *words, cwd=ROOT).splitlines()}
        listed = {f"{part['name']} v{part['version']}" for part in bill["components"]}
        self.assertIn("rustls", text)
        self.assertEqual(listed, {line for line in tree if not line.startswith("kling-proxy ")})
        refs = {part["bom-ref"] for part in [bill["metadata"]["component"], *bill["components"]]}
        self.assertEqual({crate["ref"] for crate in bill["dependencies"]}, refs)
        self.assertNotIn(str(ROOT), text)

    def test_the_checksums_are_those_of_the_files(self):
        lines = (self.files / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
        listed = dict(reversed(line.split("  ")) for line in lines)
        files = [self.archive, self.files / f"{self.name}.cdx.json"]
        self.assertEqual(listed, {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files})

    def test_the_crate_has_no_key_of_the_clone(self):
        copy = self.scratch / "copy"
        for name in run("git", "-c", "safe.directory=*", "ls-files", "-z", cwd=ROOT).split("\0")[:-1]:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
        (copy / "config/secrets").mkdir()
        (copy / "config/secrets/kling_api_key").write_text("a key", encoding="utf-8")
        listed = run("cargo", "package", "--list", "--locked", cwd=copy).splitlines()
        self.assertIn("config/compose.yaml", listed)
        self.assertNotIn("config/secrets/kling_api_key", listed)

    @unittest.skipUnless(HOST.endswith("-linux-gnu"), "needs a program that is not static")
    def test_a_program_with_a_loader_is_not_released_as_static(self):
        wrong = [f"--out={self.scratch / 'wrong'}", f"--target={HOST.replace('gnu', 'musl')}", f"--program={sys.executable}"]
        done = subprocess.run(
            [sys.executable, ROOT / ".ci/release.py", *wrong], cwd=ROOT, capture_output=True, text=True
        )
        self.assertEqual((done.returncode, (self.scratch / "wrong").exists()), (1, False), done.stderr)
        self.assertIn("is not static", done.stderr)

    def test_all_builds_use_the_same_rust(self):
        for file in ["Dockerfile", ".github/workflows/ci.yml"]:
            images = re.findall(r"\brust:\S+", (ROOT / file).read_text(encoding="utf-8"))
            self.assertEqual(images, [f"rust:{CARGO['rust-version']}-bookworm"], file)


if __name__ == "__main__":
    unittest.main()
