"""The units in config/systemd, started by systemd: it is booted from this machine's /usr, in a container."""

import os
import shutil
import signal
import subprocess
import tempfile
import unittest
from pathlib import Path

from support import (
    API_KEY,
    BINARY,
    CONFIG,
    CREATE,
    UNPRIVILEGED,
    create,
    documented,
    eventually,
    mounts,
    printed,
    privileges,
    run,
)

UNITS = CONFIG / "systemd"
SERVICE = "kling-proxy.service"
SOCKET = "kling-proxy.socket"
# Of 100; more is less safe. What is left: a way to the network, as a proxy must have, and to all of it.
EXPOSURE = 12
# In the machine: a clone of the repository with a release build in it, and an unpacked release.
CLONE, RELEASE = "/clone", "/release"
SANDBOX = f"""\
[Service]
ExecStart={RELEASE}/kling-proxy sandbox
Environment=KLING_PROXY_SANDBOX__CONCURRENCY=100
"""
ENVIRONMENT = "KLING_PROXY_UPSTREAM__URL=http://127.0.0.1:5548\n"


def make(root):
    """A machine before the installation, with nothing of this one but its programs."""
    for name in ["bin", "sbin", "lib", "lib64"]:
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for name in ["usr/share", "usr/local/bin", "etc/systemd/system", "var", "root", "run", "proc", "sys", "dev", "tmp"]:
        (root / name).mkdir(parents=True)
    (root / "etc/os-release").write_text("ID=test\n", encoding="utf-8")
    (root / "etc/machine-id").touch()
    for folder in [f"{CLONE}/target/release", RELEASE]:
        (root / folder[1:]).mkdir(parents=True)
        shutil.copy(BINARY, root / folder[1:])
    shutil.copytree(UNITS, root / CLONE[1:] / "config/systemd")
    (root / "etc/systemd/system/sandbox.service").write_text(SANDBOX, encoding="utf-8")
    (root / "etc/kling-proxy").mkdir()
    (root / "etc/kling-proxy/environment").write_text(ENVIRONMENT, encoding="utf-8")


def is_first(pid):
    """Whether it is number 1 of the namespace that it is in; what sets the machine up, and ends, is not."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
    [ids] = [line.split() for line in status.splitlines() if line.startswith("NSpid:")]
    return ids[-1] == "1"


class Systemd(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.mkdtemp(prefix="kling-proxy-systemd-")
        cls.addClassCleanup(shutil.rmtree, folder)
        cls.root = Path(folder)
        cls.root.chmod(0o755)
        make(cls.root)
        programs = [f"--bind-ro=/usr/{name}" for name in ["bin", "sbin", "lib", "lib64", "share"]]
        options = ["--register=no", "--keep-unit", "--private-network", "--console=read-only", "--tmpfs=/var"]
        log = cls.enterClassContext(open(cls.root / "console", "w+", encoding="utf-8"))
        cls.machine = subprocess.Popen(
            ["systemd-nspawn", f"--directory={folder}", *programs, *options, "--boot", "systemd.unit=basic.target"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        cls.addClassCleanup(cls.end)
        first = cls.first_process()
        cls.addClassCleanup(os.kill, first, signal.SIGKILL)
        namespaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup"]
        cls.inside = ["nsenter", f"--target={first}", *namespaces]
        up = [*cls.inside, "systemctl", "is-system-running", "--quiet"]
        eventually("systemd is up", lambda: subprocess.run(up, stderr=subprocess.DEVNULL).returncode == 0)
        cls.systemctl("start", "sandbox")
        cls.commands(CLONE, printed(UNITS / SERVICE))

    @classmethod
    def end(cls):
        try:
            cls.machine.wait(timeout=30)
        except subprocess.TimeoutExpired:
            cls.machine.kill()
            cls.machine.wait()

    @classmethod
    def first_process(cls):
        """The machine's number 1, as this one numbers it."""
        children = Path(f"/proc/{cls.machine.pid}/task/{cls.machine.pid}/children")

        def systemd():
            if cls.machine.poll() is not None:
                raise AssertionError((cls.root / "console").read_text(encoding="utf-8"))
            return next(filter(is_first, children.read_text(encoding="utf-8").split()), None)

        return int(eventually("there is a first process", systemd))

    @classmethod
    def systemctl(cls, *words, **options):
        return run(*cls.inside, "systemctl", *words, **options).strip()

    @classmethod
    def commands(cls, folder, text):
        """What the commands of a reader print, run in a folder of the machine as they are printed."""
        shell = f'sudo() {{ "$@"; }}\ncd {folder}\n{text}'
        return run(*cls.inside, "bash", "-euc", shell, env=os.environ | {"KLING_API_KEY": API_KEY})

    def setUp(self):
        self.addCleanup(self.systemctl, "reset-failed")
        self.addCleanup(self.systemctl, "stop", SERVICE)

    def show(self, *names):
        lines = self.systemctl("show", SERVICE, f"--property={','.join(names)}").splitlines()
        return dict(line.split("=", 1) for line in lines)

    def create(self, address="127.0.0.1:5546"):
        return create(*self.inside, *CREATE, f"http://{address}/v1/videos/text2video")

    def test_the_printed_commands_install_and_start_the_service(self):
        self.systemctl("stop", SERVICE)
        self.commands(CLONE, printed(UNITS / SERVICE))
        self.assertEqual(self.show("ActiveState", "UnitFileState"), {"ActiveState": "active", "UnitFileState": "enabled"})
        self.create()
        keys = self.root / "etc/kling-proxy"
        self.assertEqual([path.stat().st_mode & 0o777 for path in [keys, keys / "api_key"]], [0o700, 0o600])
        self.assertEqual((keys / "api_key").read_text(encoding="utf-8"), API_KEY)

    def test_the_documented_commands_upgrade_go_back_and_uninstall(self):
        page, program = "upgrading.md", self.root / "usr/local/bin/kling-proxy"
        self.systemctl("start", SERVICE)
        old, pid = program.stat().st_ino, self.show("MainPID")
        report = self.commands(RELEASE, documented(page, "Check the new version"))
        self.assertIn("127.0.0.1:5548", report)

        for section in ["Upgrade the service", "Go back to the old program"]:
            self.commands(RELEASE, documented(page, section))
            new, now = program.stat().st_ino, self.show("MainPID")
            self.assertTrue(new != old and now != pid, section)
            old, pid = new, now
            self.create()
        self.assertEqual(list(program.parent.iterdir()), [program])

        self.addCleanup(self.commands, CLONE, printed(UNITS / SERVICE))
        self.addCleanup((self.root / "etc/kling-proxy/environment").write_text, ENVIRONMENT, encoding="utf-8")
        self.addCleanup((self.root / "etc/kling-proxy").mkdir)
        self.commands(RELEASE, documented(page, "Uninstall the service"))
        left = [path for path in self.root.glob("[eu][ts][cr]/**/*kling-proxy*") if path.is_file()]
        run(*self.inside, "test", "!", "-e", "/var/lib/kling-proxy", "-a", "!", "-e", "/var/lib/private/kling-proxy")
        self.assertEqual((left, (self.root / "etc/kling-proxy").exists()), ([], False))
        self.assertEqual(self.show("LoadState"), {"LoadState": "not-found"})

    def test_systemd_has_nothing_to_say_about_the_units(self):
        verify = [*self.inside, "systemd-analyze", "verify", *(f"{CLONE}/config/systemd/{unit}" for unit in [SERVICE, SOCKET])]
        done = subprocess.run(verify, capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout, done.stderr), (0, "", ""))

    def test_the_service_is_exposed_to_little(self):
        run(*self.inside, "systemd-analyze", "security", f"--threshold={EXPOSURE}", SERVICE)

    def test_the_service_has_its_keys_and_no_privilege(self):
        self.systemctl("start", SERVICE)
        self.create()
        pid = self.show("MainPID")["MainPID"]
        may = privileges(pid, *self.inside)
        self.assertNotIn("0", may.pop("Uid") | may.pop("Gid"))
        self.assertEqual(may, UNPRIVILEGED)
        seen = mounts(pid, *self.inside)
        self.assertIn("ro", seen["/"])
        self.assertIn(f"/run/credentials/{SERVICE}", seen)

    def test_the_tasks_outlive_the_service(self):
        self.systemctl("start", SERVICE)
        task = self.create()
        # A user asks the running service; root reads the file of a stopped one.
        asked = [*self.inside, "/usr/local/bin/kling-proxy", "tasks"]
        self.assertIn(task, run(*asked, env={"HOME": "/nonexistent"}))
        self.systemctl("stop", SERVICE)
        read = ["env", "STATE_DIRECTORY=/var/lib/kling-proxy", "/usr/local/bin/kling-proxy", "tasks"]
        self.assertIn(task, run(*self.inside, *read))
        self.systemctl("start", SERVICE)
        self.assertIn(task, run(*asked, env={"HOME": "/nonexistent"}))
        folder = [*self.inside, "stat", "--format=%a", "/var/lib/private/kling-proxy", "/var/lib/private/kling-proxy/tasks.db"]
        self.assertEqual(run(*folder).split(), ["700", "600"])

    def test_reload_keeps_the_process_and_stop_ends_it_well(self):
        self.systemctl("start", SERVICE)
        before = self.show("MainPID", "NRestarts")
        self.systemctl("reload", SERVICE)
        self.create()
        self.assertEqual(self.show("MainPID", "NRestarts"), before)
        self.systemctl("stop", SERVICE)
        ended = {"ActiveState": "inactive", "Result": "success", "ExecMainStatus": "0"}
        self.assertEqual(self.show(*ended), ended)

    def test_a_killed_service_comes_back(self):
        self.systemctl("start", SERVICE)
        self.systemctl("kill", "--signal=KILL", SERVICE)
        back = {"ActiveState": "active", "NRestarts": "1"}
        eventually("it is back", lambda: self.show(*back) == back)
        self.create()

    def test_wrong_settings_are_not_tried_again(self):
        environment = self.root / "etc/kling-proxy/environment"
        self.addCleanup(environment.write_text, ENVIRONMENT, encoding="utf-8")
        environment.write_text("KLING_PROXY_NO_SUCH_SETTING=1\n", encoding="utf-8")
        self.systemctl("start", SERVICE, code=1)
        ended = {"ActiveState": "failed", "ExecMainStatus": "78", "NRestarts": "0"}
        self.assertEqual(self.show(*ended), ended)

    def test_the_first_connection_starts_the_service_and_none_is_refused_after_that(self):
        self.addCleanup(self.systemctl, "disable", "--now", SOCKET)
        self.commands(CLONE, printed(UNITS / SOCKET))
        self.assertEqual(self.show("ActiveState"), {"ActiveState": "inactive"})
        first = self.create("[::1]:5546")
        self.assertEqual(self.show("ActiveState"), {"ActiveState": "active"})
        self.systemctl("restart", "--no-block", SERVICE)
        self.assertNotEqual(self.create(), first)
        self.systemctl("stop", SERVICE)
        self.create()


if __name__ == "__main__":
    unittest.main()
