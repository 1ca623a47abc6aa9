"""The pods of config/kubernetes start, their probes pass, and their containers reach Kling without a key.

podman reads the manifests. What it leaves to a kubelet is done here, since none is to be had for a test: a Secret's
folder, probes, and the order of a native sidecar, which starts first and ends last.
"""

import base64
import json
import os
import tempfile
import unittest
import urllib.request
from pathlib import Path

import yaml
from containers import (
    CONFINED,
    IMAGE,
    STAND_IN_TOKEN,
    UPSTREAM,
    address,
    authority,
    confinement,
    curl,
    image,
    inspect,
    network,
    podman,
)
from support import CONFIG, ROOT, eventually, printed, run

# What the commands of a manifest's reader become here: the image is there, and no cluster is.
SHELL = """\
docker() {
    [ "$*" = "build --tag $IMAGE ." ] && [ -f Dockerfile ]
}
kubectl() {
    case $1 in
        create) command kubectl "$@" --dry-run=client --output=json > "$HOME/secret.json" ;;
        *) echo "$*" >> "$HOME/asked" ;;
    esac
}
"""


def template(name):
    return yaml.safe_load((CONFIG / "kubernetes" / name).read_text(encoding="utf-8"))["spec"]["template"]


def secret(folder, volume, secrets, group):
    """Mounts a Secret as a kubelet does: links to links to files of root's, which `fsGroup` may read."""
    version = folder / "..2026_11_24_00_00_00.1"
    version.mkdir(parents=True)
    (folder / "..data").symlink_to(version.name)
    for name, value in secrets[volume["secretName"]].items():
        (version / name).write_bytes(base64.b64decode(value))
        (version / name).chmod(volume["defaultMode"])
        os.chown(version / name, 0, group)
        (folder / name).symlink_to(f"..data/{name}")
    return {"path": str(folder)}


def empty(folder, volume, group):
    """Mounts an emptyDir as a kubelet does: root's folder, which everybody may write, of the group `fsGroup`."""
    if set(volume) != {"sizeLimit"}:
        raise AssertionError(volume)
    folder.mkdir()
    folder.chmod(0o2777)
    os.chown(folder, 0, group)
    return {"path": str(folder)}


class Pod(unittest.TestCase):
    def setUp(self):
        image()
        curl()
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.folder.chmod(0o755)
        self.network = self.enterContext(network())

    def as_printed(self, name, *expected):
        """Runs the commands at the top of a manifest, and gives the Secret that they make."""
        home = self.folder / "home"
        home.mkdir()
        path = {"HOME": str(home), "PATH": os.environ["PATH"], "IMAGE": IMAGE, "KLING_API_KEY": STAND_IN_TOKEN}
        run("bash", "-euc", SHELL + printed(CONFIG / "kubernetes" / name), cwd=ROOT, env=path)
        asked = (home / "asked").read_text(encoding="utf-8").splitlines()
        self.assertEqual(asked, [f"apply -f config/kubernetes/{name}", *expected])
        made = json.loads((home / "secret.json").read_text(encoding="utf-8"))
        return {made["metadata"]["name"]: made["data"]}

    def start(self, pod, secrets):
        """Starts a pod's sidecar and gives its name once its probes pass."""
        spec = pod["spec"]
        group = spec["securityContext"]["fsGroup"]
        [sidecar] = spec.pop("initContainers")
        self.assertEqual(sidecar["restartPolicy"], "Always", "what makes a sidecar of an init container")
        probes = {name: sidecar.pop(name) for name in list(sidecar) if name.endswith("Probe")}
        self.assertEqual(set(probes), {"startupProbe", "livenessProbe", "readinessProbe"})
        # podman would take it on this machine too, which a kubelet does not.
        [port] = [port["containerPort"] for port in sidecar.pop("ports") if port["name"] == "admin"]

        for volume in spec["volumes"]:
            folder = self.folder / volume["name"]
            if "secret" in volume:
                volume["hostPath"] = secret(folder, volume.pop("secret"), secrets, group)
            else:
                volume["hostPath"] = empty(folder, volume.pop("emptyDir"), group)
        # The way to Kling's stand-in.
        spec["volumes"].append({"name": "authority", "hostPath": {"path": str(authority())}})
        sidecar["volumeMounts"].append({"name": "authority", "mountPath": "/etc/authority", "readOnly": True})
        sidecar["env"] += [{"name": name, "value": value} for name, value in UPSTREAM.items()]
        manifest = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "pod"},
            "spec": spec | {"containers": [sidecar]},
        }
        file = self.folder / "pod.yaml"
        file.write_text(yaml.safe_dump(manifest), encoding="utf-8")
        self.addCleanup(podman, "kube", "down", file)
        podman("kube", "play", f"--network={self.network}", file)

        infra = podman("pod", "inspect", "--format={{.InfraContainerID}}", "pod").strip()
        admin = f"http://{address(infra)}:{port}"

        def passes(probe):
            ask = probes[probe]["httpGet"]
            self.assertEqual(ask["port"], "admin")
            try:
                with urllib.request.urlopen(admin + ask["path"], timeout=1) as answer:
                    return answer.status == 200
            except OSError:
                return False

        eventually("it has started", lambda: passes("startupProbe"), probes["startupProbe"]["failureThreshold"])
        self.assertTrue(passes("livenessProbe") and passes("readinessProbe"))
        self.assertEqual(confinement("pod-kling-proxy"), CONFINED)
        self.assertIn("tasks    /var/lib/kling-proxy/tasks.db", podman("logs", "pod-kling-proxy"))
        return "pod-kling-proxy"

    def run_in_pod(self, container):
        """What one of the pod's own containers prints."""
        variables = [f"--env={variable['name']}={variable['value']}" for variable in container.get("env", [])]
        return json.loads(podman("run", "--rm", "--pod=pod", *variables, container["image"], *container["args"]))

    def test_an_app_reaches_kling_through_its_sidecar(self):
        pod = template("deployment.yaml")
        [app] = pod["spec"].pop("containers")
        self.start(pod, self.as_printed("deployment.yaml"))
        [url] = [variable["value"] for variable in app["env"] if variable["name"] == "KLING_BASE_URL"]
        answer = self.run_in_pod({"image": curl(), "args": [f"{url}/v1/videos/text2video"]})
        self.assertEqual(answer["data"], [])

    def test_a_job_ends_and_then_its_sidecar(self):
        pod = template("job.yaml")
        [task] = pod["spec"].pop("containers")
        printed_after = ["wait --for=condition=Complete --timeout=5m job/task", "logs job/task -c task"]
        name = self.start(pod, self.as_printed("job.yaml", *printed_after))
        self.assertEqual(self.run_in_pod(task)["data"], [])
        podman("stop", f"--time={pod['spec']['terminationGracePeriodSeconds']}", name)
        self.assertEqual(inspect(name, "{{.State.ExitCode}}"), "0")


if __name__ == "__main__":
    unittest.main()
