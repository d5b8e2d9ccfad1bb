"""What the overlays in config/kubernetes have to be, and mistakes that this finds."""

import copy
import os
import subprocess
import unittest

import facts
from manifests import check
from objects import Manifests, spec

OVERLAYS = ("pgvector", "aws", "observe")
RULES = "config/prometheus/refarch.rules.yml"
RENDERED = "config/kubernetes/overlays/observe/rules.yaml"
HEAD = """# Made of %s: REFARCH_RENDER_DEFAULTS=1 scripts/test deploy
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: refarch
spec:
""" % RULES


def built(overlay):
    path = os.path.join(facts.ROOT, "config/kubernetes/overlays", overlay)
    made = subprocess.run(["kubectl", "kustomize", path], stdout=subprocess.PIPE, check=True)
    return Manifests(facts.documents(made.stdout))


def change(kind, name, way, value):
    """A mistake: the value at a path of an object is another. None removes it."""

    def plant(manifests):
        facts.set_at(manifests.get(kind, name), way, value)

    return plant


def deployment(role, way, value):
    return change("Deployment", "refarch-" + role, ["spec", "template", "spec", *way], value)


def container(role, way, value):
    return deployment(role, ["containers", 0, *way], value)


def remove(kind, name):
    return lambda manifests: manifests.objects.remove(manifests.get(kind, name))


def plain_password(manifests):
    variables = spec(manifests.get("Deployment", "refarch-embed"))["containers"][0]["env"]
    variables[1] = {"name": "POSTGRES_DB_PASSWORD", "value": "hunter2"}


def secret(key):
    return {"valueFrom": {"secretKeyRef": {"name": "refarch-database", "key": key}}}


def login(role, place, value):
    name = ("POSTGRES_DB_USER", "POSTGRES_DB_PASSWORD")[place]
    return container(role, ["env", place], dict(value, name=name))


OPEN = ["spec", "ingress", 0, "from"]
TRIGGER = ["spec", "triggers", 0, "metadata"]

# Each by its overlay.
MISTAKES = {
    "a field that does not exist": ("aws", container("embed", ["livenesProbe"], {}), "livenesProbe"),
    "a stop that comes too early": (
        "aws",
        deployment("embed", ["terminationGracePeriodSeconds"], 20),
        "before runtime.grace_s",
    ),
    "a liveness that needs the database": (
        "aws",
        container("listen", ["livenessProbe", "httpGet", "path"], "/readyz"),
        "livenessProbe asks something else",
    ),
    "least above most": (
        "aws",
        change("ScaledObject", "refarch-embed", ["spec", "minReplicaCount"], 60),
        "least is above its most",
    ),
    "a password in plain sight": ("pgvector", plain_password, "not taken from a secret"),
    "a role that is the owner": ("aws", login("serve", 0, {"value": "refarch"}), "not log in as refarch_serve"),
    "the password of another": (
        "pgvector",
        login("listen", 1, secret("embed-password")),
        "listen: another password",
    ),
    "a role without rights": (
        "aws",
        change(
            "Job",
            "refarch-migrate",
            ["spec", "template", "spec", "containers", 0, "args"],
            [facts.MIGRATION.replace(",serve=refarch_serve", "")],
        ),
        "other rights",
    ),
    "a database that anybody can reach": (
        "pgvector",
        change("NetworkPolicy", "refarch-postgres", OPEN, None),
        "opens to everybody",
    ),
    "a network that is open at first": (
        "pgvector",
        remove("NetworkPolicy", "refarch-deny"),
        "not closed at first",
    ),
    "root": ("pgvector", deployment("serve", ["securityContext", "runAsUser"], 0), "runs as root"),
    "files that can be written": (
        "aws",
        container("embed", ["securityContext", "readOnlyRootFilesystem"], False),
        "its files can be written",
    ),
    "a metric that does not exist": (
        "aws",
        change(
            "ScaledObject",
            "refarch-embed",
            [*TRIGGER, "valueLocation"],
            'refarch_backlog_s{source="products"}',
        ),
        "no metric refarch_backlog_s",
    ),
    "another target of the scaler": (
        "observe",
        change("ScaledObject", "refarch-embed", [*TRIGGER, "threshold"], "100"),
        "not scaling.backlog_s",
    ),
    "two scalers": (
        "pgvector",
        lambda manifests: manifests.objects.append(
            dict(
                copy.deepcopy(manifests.get("HorizontalPodAutoscaler", "refarch-embed")), kind="ScaledObject"
            )
        ),
        "not one scaler",
    ),
    "a scaler of something else": (
        "pgvector",
        change(
            "HorizontalPodAutoscaler", "refarch-embed", ["spec", "scaleTargetRef", "name"], "refarch-embeds"
        ),
        "scales something else",
    ),
    "a Service that leads nowhere": (
        "pgvector",
        change("Service", "refarch-serve", ["spec", "selector"], {"app": "serve"}),
        "leads to no workload",
    ),
    "a Service open to the world": (
        "pgvector",
        change("Service", "refarch-serve", ["spec", "type"], "LoadBalancer"),
        "open to the world",
    ),
    "a budget for no pod": (
        "aws",
        change(
            "PodDisruptionBudget",
            "refarch-embed",
            ["spec", "selector", "matchLabels", "app.kubernetes.io/component"],
            "emebd",
        ),
        "no disruption budget",
    ),
    "a setting that does not exist": (
        "aws",
        change("ConfigMap", "refarch", ["data", "REFARCH_RELAY_POL_MS"], "5"),
        "no variable REFARCH_RELAY_POL_MS",
    ),
    "an unverified server": (
        "aws",
        change("ConfigMap", "refarch", ["data", "PGSSLMODE"], "require"),
        "not verified",
    ),
    "the rights of another role": (
        "aws",
        deployment("listen", ["serviceAccountName"], "refarch-embed"),
        "account of another role",
    ),
    "different images": ("aws", container("embed", ["image"], "refarch:0.0.9"), "different images"),
    "no limit on memory": (
        "aws",
        container("listen", ["resources", "limits"], {"cpu": "1"}),
        "no limit on memory",
    ),
    "a release that takes a pod away first": (
        "aws",
        change("Deployment", "refarch-serve", ["spec", "strategy", "rollingUpdate", "maxUnavailable"], 1),
        "takes a pod away first",
    ),
    "metrics at another port": (
        "observe",
        change("PodMonitor", "refarch", ["spec", "podMetricsEndpoints", 0, "port"], "page"),
        "monitor asks another endpoint",
    ),
    "alerts of another version": (
        "observe",
        change("PrometheusRule", "refarch", ["spec", "groups"], []),
        "not those of config/prometheus",
    ),
}


class Kubernetes(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        body = facts.read(RULES)
        wanted = HEAD + "".join(
            "  " + line if line.strip() else line for line in body[body.index("groups:") :].splitlines(True)
        )
        if os.environ.get("REFARCH_RENDER_DEFAULTS"):
            with open(os.path.join(facts.ROOT, RENDERED), "w", encoding="utf-8") as file:
                file.write(wanted)
        cls.overlays = {overlay: built(overlay) for overlay in OVERLAYS}

    def test_the_overlays_are_as_they_have_to_be(self):
        for overlay, manifests in self.overlays.items():
            with self.subTest(overlay):
                checks = check(manifests, overlay)
                self.assertEqual(checks.faults, [])
                print(
                    "kubernetes: %s: %d objects, %d assertions"
                    % (overlay, len(manifests.objects), checks.count)
                )

    def test_mistakes_are_found(self):
        for name, (overlay, plant, fault) in MISTAKES.items():
            with self.subTest(name):
                spoiled = copy.deepcopy(self.overlays[overlay])
                plant(spoiled)
                faults = check(spoiled, overlay).faults
                self.assertTrue(any(fault in found for found in faults), faults)
        print("kubernetes: %d mistakes planted, all found" % len(MISTAKES))


if __name__ == "__main__":
    unittest.main()
