"""The README is right: its blocks are run as they stand."""

import json
import re
import subprocess
import tempfile
import unittest

from support import BINARY, ROOT, environment, proxy

DOCUMENTED = "http://127.0.0.1:5546"
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language, beginning):
    """The block of the README that begins so."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    [found] = [block for block in blocks if block.startswith(beginning)]
    return found


class Readme(unittest.TestCase):
    def setUp(self):
        self.home = self.enterContext(tempfile.TemporaryDirectory())
        self.urls = self.enterContext(proxy())

    def run_block(self, command, language, beginning):
        script = block(language, beginning)
        self.assertIn(DOCUMENTED, script)
        return subprocess.run(
            [*command, script.replace(DOCUMENTED, self.urls["proxy"])],
            cwd=self.home,
            env=environment(self.home),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            text=True,
            timeout=60,
        ).stdout

    def test_the_first_video_is_made_and_can_be_played(self):
        self.run_block(["bash", "-euo", "pipefail", "-c"], "bash", "proxy=")
        probe = ["ffprobe", "-v", "error", "-show_entries", "stream=codec_name", "-of", "json", "cat.mp4"]
        played = subprocess.run(probe, cwd=self.home, capture_output=True, check=True, text=True)
        self.assertEqual(json.loads(played.stdout)["streams"][0]["codec_name"], "h264")

    def test_curl_is_moved_over(self):
        answer = json.loads(self.run_block(["bash", "-euc"], "bash", "curl "))
        self.assertEqual(answer["code"], 0, answer)

    def test_requests_is_moved_over(self):
        self.assertEqual(self.run_block(["python3", "-c"], "python", "import requests"), "")

    def test_the_table_of_codes_is_that_of_the_program(self):
        rows = json.loads(subprocess.check_output([BINARY, "explain", "--output", "json"]))
        for row in rows[1:]:
            cells = f"| {row['code']} | {row['status']} | `{row['type']}` |"
            alternative = f"| {row['code']} | as upstream, or {row['status']} | `{row['type']}` |"
            self.assertTrue(cells in README or alternative in README, row)


if __name__ == "__main__":
    unittest.main()
