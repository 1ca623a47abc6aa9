"""The image that `Dockerfile` makes is small, needs no privilege, and works."""

import json
import unittest
from pathlib import Path

from containers import (
    BASE,
    CONFINED,
    HARDENED,
    STAND_IN_TOKEN,
    UPSTREAM,
    authority,
    base,
    confinement,
    container,
    healthy,
    image,
    inspect,
    network,
    podman,
    variables,
    wait_until_healthy,
)
from support import CREATE, create, run

PROGRAM = "/usr/local/bin/kling-proxy"
STATE = "/var/lib/kling-proxy"
LARGEST = 25_000_000
KEYS = {"KLING_ACCESS_KEY": "accessKey", "KLING_SECRET_KEY": STAND_IN_TOKEN}


def description(name):
    return json.loads(podman("image", "inspect", name))[0]


class Image(unittest.TestCase):
    def test_it_adds_one_program_to_its_base(self):
        added = json.loads(podman("diff", "--format=json", image(), BASE))
        added = {kind: set(paths) for kind, paths in added.items()}
        new = {"/usr/local", "/usr/local/bin", PROGRAM, STATE}
        self.assertEqual(added["added"] - {"/var", "/var/lib"}, new)
        self.assertLessEqual(added["changed"], {"/usr", "/var", "/var/lib"})
        size = description(image())["Size"] - description(BASE)["Size"]
        print(f"{size / 1e6:.1f} MB ... ", end="", flush=True)
        self.assertLess(size, LARGEST)

    def test_its_base_has_the_libraries_that_it_needs(self):
        root = podman("image", "mount", image()).strip()
        self.addCleanup(podman, "image", "unmount", image())
        # What `ldd` does, by the image's own loader.
        [loader] = Path(root).glob("lib*/ld-linux-*.so.*")
        libraries = run("chroot", root, f"/{loader.relative_to(root)}", "--list", PROGRAM)
        self.assertNotIn("not found", libraries)

    def test_it_says_how_it_is_run(self):
        settings = description(image())
        said = {name: settings["Config"].get(name) for name in ["User", "Entrypoint", "Cmd", "ExposedPorts"]}
        expected = {
            "User": "65532:65532",
            "Entrypoint": [PROGRAM],
            "Cmd": None,
            "ExposedPorts": {"5546/tcp": {}, "5547/tcp": {}},
        }
        self.assertEqual(said, expected)
        self.assertEqual(settings["Healthcheck"]["Test"], ["CMD", PROGRAM, "health"])

    def test_it_works_without_any_privilege_and_cannot_write(self):
        with container("--network=none", *HARDENED, image(), "serve", "--sandbox") as name:
            wait_until_healthy(name)
            self.assertEqual(confinement(name), CONFINED)
            inside = ["nsenter", "--net", "--target", inspect(name, "{{.State.Pid}}")]
            self.assertRegex(create(*inside, *CREATE, "http://127.0.0.1:5546/v1/videos/text2video"), r"^\d+$")
            podman("stop", "--time=30", name)
            self.assertEqual(inspect(name, "{{.State.ExitCode}}"), "0")

    def test_a_named_volume_keeps_the_tasks_for_the_next_container(self):
        self.addCleanup(podman, "volume", "rm", "--force", "tasks")
        keys = variables(KEYS | {"KLING_PROXY_UPSTREAM__URL": "http://127.0.0.1:1"})
        start = ["--network=none", f"--volume=tasks:{STATE}", *HARDENED, *keys, image()]
        with container(*start) as name:
            wait_until_healthy(name)
            self.assertIn(f"tasks    {STATE}/tasks.db", podman("logs", name))
            inside = ["nsenter", "--net", "--target", inspect(name, "{{.State.Pid}}")]
            refused = run(*inside, *CREATE, "http://127.0.0.1:5546/v1/videos/text2video")
            self.assertEqual(json.loads(refused)["code"], 9101)
        with container(*start) as name:
            wait_until_healthy(name)
            self.assertIn("9101 upstream_unreachable", podman("exec", name, PROGRAM, "tasks"))

    def test_its_health_check_fails_when_it_is_not_ready(self):
        off = variables({"KLING_PROXY_ADMIN__ADDRESS": "off"})
        with container("--network=none", *off, image(), "serve", "--sandbox") as name:
            self.assertFalse(healthy(name))

    def test_it_resolves_a_name_and_verifies_a_certificate(self):
        with network() as net:
            once = [
                "--rm",
                f"--network={net}",
                f"--volume={authority()}:/etc/authority:ro",
                *HARDENED,
                *variables(KEYS),
            ]
            check = ["check", "--output=json"]
            report = json.loads(podman("run", *once, *variables(UPSTREAM), image(), *check))
            steps = {step["step"]: step for step in report["steps"]}
            self.assertEqual({step["status"] for step in steps.values()}, {"ok"}, report)
            self.assertIn(f"{base() + 1} root certificates", steps["trust"]["found"])

            url = {"KLING_PROXY_UPSTREAM__URL": UPSTREAM["KLING_PROXY_UPSTREAM__URL"]}
            report = json.loads(podman("run", *once, *variables(url), image(), *check, code=69))
            self.assertEqual(report["steps"][-1]["step"], "tls")
            self.assertIn("Test authority", report["steps"][-1]["found"])

            nowhere = {"KLING_PROXY_UPSTREAM__URL": "https://nowhere.test"}
            report = json.loads(podman("run", *once, *variables(nowhere), image(), *check, code=69))
            self.assertEqual(report["steps"][-1]["step"], "name")


if __name__ == "__main__":
    unittest.main()
