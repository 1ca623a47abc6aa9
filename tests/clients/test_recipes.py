"""The larger recipes: a workflow whose steps are run, and the Compose file as processes."""

import os
import re
import signal
import socket
import subprocess
import tempfile
import unittest
from pathlib import Path

import yaml

from pages import COMMANDS, file
from support import BINARY, ROOT, environment, proxy

RECIPES = ROOT / "docs/recipes.md"
KEYS = ("KLING_API_KEY_FILE",)


class Recipes(unittest.TestCase):
    def setUp(self):
        self.home = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def write(self, name, text):
        path = self.home / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o600)
        return str(path)

    def test_the_steps_of_the_workflow_pass(self):
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        workflow = yaml.safe_load(file(RECIPES, "workflow.yaml").replace("127.0.0.1:5546", address))
        job = workflow["jobs"]["tests"]
        self.write("test_video.py", file(RECIPES, "test_video.py"))
        (self.home / "kling-proxy").symlink_to(BINARY)
        variables = environment(str(self.home)) | job["env"]
        variables |= {"KLING_PROXY_LISTEN__ADDRESS": address}
        variables["PATH"] = f"{self.home}:{Path(COMMANDS['python'][0]).parent}:{variables['PATH']}"

        steps = [step for step in job["steps"] if "run" in step and step.get("if") != "failure()"]
        self.assertEqual([step["name"] for step in steps], ["Start Kling's stand-in", "Run the tests"])
        for step in steps:
            # As the runner does it; what is started in the background goes on.
            started = subprocess.Popen(
                ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
                cwd=self.home,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                text=True,
            )
            self.addCleanup(self.end, started.pid)
            output, _ = started.communicate(timeout=60)
            self.assertEqual(started.returncode, 0, output)
        self.assertIn("Ran 2 tests", output)

    def end(self, group):
        try:
            os.killpg(group, signal.SIGTERM)
        except ProcessLookupError:
            pass

    def test_the_client_of_the_compose_file_needs_its_token_only(self):
        services = yaml.safe_load((ROOT / "config/compose.yaml").read_text(encoding="utf-8"))["services"]
        token = "0123456789abcdef" * 4
        secrets = {
            "/run/secrets/client_tokens": self.write("client_tokens", f"client:{token}\n"),
            "/run/secrets/client_token": self.write("client_token", f"{token}\n"),
        }

        def here(text):
            return re.sub(r"/run/secrets/\w+", lambda secret: secrets[secret[0]], text)

        settings = services["kling-proxy"]["environment"]
        # The sandbox brings its own keys.
        settings = {name: here(value) for name, value in settings.items() if name not in KEYS}
        settings["KLING_PROXY_LISTEN__ADDRESS"] = settings["KLING_PROXY_LISTEN__ADDRESS"].replace(":5546", ":0")
        client = services["client"]
        command = [here(word.replace("$$", "$")) for word in [*client["entrypoint"], *client.get("command", [])]]
        with proxy(**settings) as urls:
            port = urls["proxy"].rpartition(":")[2]
            self.write(".curlrc", f"connect-to = kling-proxy:5546:127.0.0.1:{port}\n")
            for ours, body in [(True, '"code":0'), (False, '"code":9003')]:
                if not ours:
                    self.write("client_token", "another\n")
                done = subprocess.run(
                    command,
                    env=environment(str(self.home)),
                    capture_output=True,
                    text=True,
                    timeout=60,
                )
                self.assertEqual((done.returncode == 0, body in done.stdout), (ours, True), done)


if __name__ == "__main__":
    unittest.main()
