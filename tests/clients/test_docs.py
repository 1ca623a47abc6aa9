"""README and `docs/` are right: what stands there is run as it stands, in front of the sandbox."""

import json
import os
import re
import subprocess
import tempfile
import unittest
from pathlib import Path

from pages import COMMANDS, PAGES, Block, anchors, blocks, looks_like, transcript
from support import BINARY, ROOT, environment, proxy

DOCUMENTED = {"proxy": "127.0.0.1:5546", "admin": "127.0.0.1:5547", "sandbox": "127.0.0.1:5548"}
MODULES = ROOT / "tests/clients/node_modules"


class Docs(unittest.TestCase):
    def setUp(self):
        self.home = Path(self.enterContext(tempfile.TemporaryDirectory()))
        (self.home / "node_modules").symlink_to(MODULES)
        (self.home / "bin").mkdir()
        (self.home / "bin/kling-proxy").symlink_to(BINARY)

    def run_here(self, block, urls):
        """What a block prints, with a running proxy at the documented addresses."""
        command = [*COMMANDS[block.language], block.text]
        addresses = {documented: urls[name].partition("://")[2] for name, documented in DOCUMENTED.items()}
        for documented, real in addresses.items():
            command[-1] = command[-1].replace(documented, real)
        # The reader's proxy has the default address.
        admin = f"kling-proxy tasks --admin {addresses[DOCUMENTED['admin']]}"
        command[-1] = command[-1].replace("kling-proxy tasks", admin)
        path = f"{self.home}/bin:{Path(COMMANDS['python'][0]).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            command,
            cwd=self.home,
            env=environment(str(self.home)) | {"PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        self.assertEqual(done.returncode, 0, f"{block.text}\n{done.stdout}")
        for documented, real in addresses.items():
            done.stdout = done.stdout.replace(real, documented)
        return done.stdout

    def test_every_block_runs(self):
        ran = 0
        for page in PAGES:
            with self.subTest(page.name), proxy() as urls:
                for block in blocks(page):
                    if block.note == "file":
                        (self.home / block.about).write_text(block.text, encoding="utf-8")
                    elif not block.note and block.language in COMMANDS:
                        self.run_here(block, urls)
                        ran += 1
        self.assertGreaterEqual(ran, 9)
        probe = ["ffprobe", "-v", "error", "-show_entries", "stream=codec_name", "-of", "json", "cat.mp4"]
        played = subprocess.run(probe, cwd=self.home, capture_output=True, check=True, text=True)
        self.assertEqual(json.loads(played.stdout)["streams"][0]["codec_name"], "h264")

    def test_transcripts_are_true(self):
        for name, least in {"first-five-minutes.md": 11, "tasks.md": 4}.items():
            with self.subTest(name):
                self.check_transcript(ROOT / "docs" / name, least)

    def check_transcript(self, page, least):
        for block in blocks(page):
            if block.note == "file":
                (self.home / block.about).write_text(block.text, encoding="utf-8")
        consoles = [block for block in blocks(page) if block.language == "console" and not block.note]
        steps = [step for block in consoles for step in transcript(block.text)]
        # One shell for all; a mark stands before what each command prints.
        marked = "".join(f"printf '\\036'\n{command} || true\n" for command, _ in steps)
        with proxy() as urls:
            session = self.run_here(Block("", "", "bash", marked), urls)
        printed = session.split("\036")[1:]
        self.assertGreaterEqual(len(steps), least)
        self.assertEqual(len(printed), len(steps), session)
        for (command, expected), seen in zip(steps, printed):
            with self.subTest(command):
                self.assertRegex(seen.strip(), looks_like(expected.strip()))

    def test_settings_files_are_accepted(self):
        files = [block.text for page in PAGES for block in blocks(page) if block.language == "toml"]
        self.assertTrue(files)
        for text in files:
            settings = self.home / "settings.toml"
            settings.write_text(text, encoding="utf-8")
            command = [BINARY, "settings", "--config", str(settings)]
            done = subprocess.run(command, env=environment(str(self.home)), capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, f"{text}\n{done.stderr}")

    def test_links_lead_somewhere(self):
        for page in [*PAGES, ROOT / "SECURITY.md"]:
            for link in re.findall(r"\]\((?!https?:)([^)]*)\)", page.read_text(encoding="utf-8")):
                path, _, anchor = link.partition("#")
                to = (page.parent / path).resolve() if path else page
                with self.subTest(page=page.name, link=link):
                    self.assertTrue(to.exists())
                    if anchor:
                        self.assertIn(anchor, anchors(to))


if __name__ == "__main__":
    unittest.main()
