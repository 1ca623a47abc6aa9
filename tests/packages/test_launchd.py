"""The launchd agent in config/launchd: its form, and what it starts. On a Mac it is untried."""

import json
import plistlib
import tempfile
import unittest
from pathlib import Path

from support import API_KEY, BINARY, CONFIG, ROOT, printed, run

PLIST = CONFIG / "launchd/local.kling-proxy.plist"
# Prints what a Mac's `security` prints of a password, if it is asked for that.
SECURITY = """\
#!/bin/sh
[ "$*" = 'find-generic-password -s kling-proxy -w' ] || exit 44
echo '{"api_key":"%s"}'
"""


# What the commands of the file's reader become where there is neither launchd nor a Keychain.
SHELL = """\
sudo() { [ "$*" = 'install -m 755 target/release/kling-proxy /usr/local/bin/' ]; }
security() { [ "$*" = "add-generic-password -a $USER -s kling-proxy -w" ]; }
launchctl() { [ "$1 $2" = "bootstrap gui/$(id -u)" ] && cat "$3"; }
"""


class Agent(unittest.TestCase):
    def setUp(self):
        self.agent = plistlib.loads(PLIST.read_bytes())

    def test_it_is_a_property_list_named_as_its_label(self):
        binary = Path(self.enterContext(tempfile.TemporaryDirectory())) / "binary.plist"
        run("plistutil", "--infile", PLIST, "--format", "bin", "--outfile", binary)
        self.assertEqual(plistlib.loads(binary.read_bytes()), self.agent)
        self.assertEqual(self.agent["Label"], PLIST.stem)
        self.assertEqual(self.agent["ProgramArguments"], ["/usr/local/bin/kling-proxy", "serve"])

    def test_the_printed_commands_install_it_for_this_user(self):
        home = self.enterContext(tempfile.TemporaryDirectory())
        environment = {"HOME": home, "USER": "someone", "PATH": "/usr/bin:/bin"}
        installed = run("bash", "-euc", SHELL + printed(PLIST), cwd=ROOT, env=environment)
        agent = plistlib.loads(installed.encode())
        self.assertEqual(agent.pop("StandardOutPath"), f"{home}/Library/Logs/kling-proxy.log")
        self.assertEqual(agent.pop("StandardErrorPath"), f"{home}/Library/Logs/kling-proxy.log")
        self.assertEqual(agent, {name: self.agent[name] for name in agent})

    def test_its_settings_get_the_keys_from_the_keychain(self):
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        security = folder / "security"
        security.write_text(SECURITY % API_KEY, encoding="utf-8")
        security.chmod(0o755)
        variables = {
            name: value.replace("/usr/bin/security", str(security))
            for name, value in self.agent["EnvironmentVariables"].items()
        }
        environment = {"HOME": str(folder), "PATH": "/usr/bin:/bin", **variables}
        report = json.loads(run(BINARY, "check", "--offline", "--output=json", env=environment))
        self.assertEqual(report["status"], "ok", report)
        [credential] = [step["found"] for step in report["steps"] if step["step"] == "credential"]
        self.assertEqual(credential, "API key from credentials.command")


if __name__ == "__main__":
    unittest.main()
