"""config/compose.yaml brings up a proxy with Kling's keys, and a client that has none and reaches nothing else.

podman-compose reads it. That waits for no health check with a podman of before 4.6, so the test does.
"""

import json
import os
import shutil
import tempfile
import unittest
from pathlib import Path

import yaml
from containers import (
    CONFINED,
    IMAGE,
    KLING,
    STAND_IN,
    STAND_IN_TOKEN,
    UPSTREAM,
    address,
    authority,
    confinement,
    curl,
    image,
    podman,
    wait_until_healthy,
)
from support import CONFIG, printed, run

KEYS = {"KLING_API_KEY": STAND_IN_TOKEN}
# What the commands of the file's reader become here: no image is built again, and `up` returns.
SHELL = """\
sudo() { "$@"; }
docker() {
    [ "$*" = 'compose -f config/compose.yaml up' ]
    podman-compose --project-name=test --file="$3" --file=config/test.yaml up --no-build --detach kling kling-proxy
}
"""


def overrides():
    """What the test adds: Kling's stand-in, beyond the network that the client is in, and the way to it."""
    volumes = [f"{authority()}:/etc/authority:ro"]
    stand_in = {
        "image": IMAGE,
        "command": ["serve", "--sandbox"],
        "environment": STAND_IN,
        "volumes": volumes,
        "networks": {"outside": {"aliases": [KLING]}},
    }
    return {"services": {"kling-proxy": {"environment": UPSTREAM, "volumes": volumes}, "kling": stand_in}}


class Compose(unittest.TestCase):
    def setUp(self):
        image()
        curl()
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        (self.folder / "config").mkdir()
        shutil.copy(CONFIG / "compose.yaml", self.folder / "config")
        (self.folder / "config/test.yaml").write_text(yaml.safe_dump(overrides()), encoding="utf-8")
        self.addCleanup(self.compose, "down", "--volumes", "--timeout=0")
        run("bash", "-euc", SHELL + printed(CONFIG / "compose.yaml"), cwd=self.folder, env=os.environ | KEYS)

    def compose(self, *words, **options):
        files = ["--file=config/compose.yaml", "--file=config/test.yaml"]
        return run("podman-compose", "--project-name=test", *files, *words, cwd=self.folder, **options)

    def container(self, service):
        return podman("ps", "--quiet", f"--filter=label=com.docker.compose.service={service}").strip()

    def client(self, *options, **run_options):
        return self.compose("run", "--rm", "--no-deps", "-T", *options, **run_options)

    def test_the_client_gets_an_answer_by_the_proxy_alone(self):
        proxy = self.container("kling-proxy")
        for name in [proxy, self.container("kling")]:
            wait_until_healthy(name)
        self.assertEqual(confinement(proxy), CONFINED)
        self.assertIn("tasks    /var/lib/kling-proxy/tasks.db", podman("logs", proxy))
        self.assertEqual(json.loads(self.client("client"))["data"], [])
        self.client("kling-proxy", "check")  # as docs/upgrading.md says

        past_it = ["--entrypoint=curl", "client", "--max-time", "5"]
        self.client(*past_it, f"https://{KLING}:5546", code=6)
        self.client(*past_it, f"https://{address(self.container('kling'))}:5546", code=7)


if __name__ == "__main__":
    unittest.main()
