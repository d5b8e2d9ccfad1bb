"""The objects of an overlay, and how they select each other."""

ROLES = ("serve", "listen", "embed")


class Manifests:
    """The objects of an overlay."""

    def __init__(self, objects):
        self.objects = objects

    def kind(self, *kinds):
        return [thing for thing in self.objects if thing["kind"] in kinds]

    def get(self, kind, name):
        for thing in self.kind(kind):
            if thing["metadata"]["name"] == name:
                return thing
        return None

    def workloads(self):
        return self.kind("Deployment", "StatefulSet", "Job")

    def pods(self, selector):
        """The workloads whose pods a selector takes."""
        return [thing for thing in self.workloads() if selects(selector, labels(thing))]

    def settings(self):
        return self.get("ConfigMap", "refarch")["data"]


def named(thing):
    return "%s/%s" % (thing["kind"], thing["metadata"]["name"])


def spec(workload):
    return workload["spec"]["template"]["spec"]


def labels(workload):
    return workload["spec"]["template"]["metadata"]["labels"]


def selects(selector, found):
    if any(found.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for rule in selector.get("matchExpressions", []):
        if rule["operator"] != "In" or found.get(rule["key"]) not in rule["values"]:
            return False
    return True
