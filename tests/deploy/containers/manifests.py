"""The rules for the manifests in config/kubernetes. kubernetes.py runs them, and plants mistakes."""

import functools
import json
import re

import facts
import kubernetes_validate
import yaml
from facts import ADMIN_PORT, GRACE_S, PAGE_PORT, Checks, is_known_variable, is_secret, read
from network import check_network
from objects import ROLES, labels, named, spec
from scaler import check_scaler, scalers, target

VERSION = "1.37"
# Kinds of other projects, for which kubernetes_validate has no schema.
CUSTOM = {"ScaledObject", "PodMonitor", "PrometheusRule"}
PASSWORDS = {role: role + "-password" for role in ROLES}
SECRETS = {
    ("refarch-database", "password"),
    *(("refarch-database", key) for key in PASSWORDS.values()),
    ("refarch-page", "edit-token"),
}
# Objects that are made by hand, as the overlay's comment says.
BY_HAND = {"rds-certificates"}


def check(manifests, overlay):
    checks = Checks()
    names = [(thing["kind"], thing["metadata"]["name"]) for thing in manifests.objects]
    checks.that(len(names) == len(set(names)), "an object twice")
    for thing in manifests.objects:
        check_object(checks, thing)
    for workload in manifests.workloads():
        check_pod(checks, manifests, workload)
    for role in ROLES:
        workload = manifests.get("Deployment", "refarch-" + role)
        if checks.that(workload, "there is no Deployment refarch-%s" % role):
            check_role(checks, manifests, role, workload)
    check_migration(checks, manifests)
    check_settings(checks, manifests, overlay)
    check_services(checks, manifests)
    check_scaler(checks, manifests)
    check_network(checks, manifests, overlay)
    if overlay == "observe":
        check_observation(checks, manifests)
    return checks


def check_object(checks, thing):
    name = named(thing)
    if thing["kind"] not in CUSTOM:
        fault = schema_fault(json.dumps(thing))
        checks.that(fault is None, "%s: %s" % (name, fault))
    if thing["kind"] != "Namespace":
        checks.that(thing["metadata"].get("namespace") == "refarch", "%s is in another namespace" % name)
    checks.that(thing["kind"] != "Secret", "%s: a secret in a file" % name)
    checks.that(
        thing["metadata"].get("labels", {}).get("app.kubernetes.io/part-of") == "refarch",
        "%s has no label" % name,
    )


@functools.lru_cache(maxsize=None)
def schema_fault(text):
    """Why an object does not fit the schema of Kubernetes. The same object is looked at once, because it is slow."""
    try:
        kubernetes_validate.validate(json.loads(text), VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return error.message
    return None


def check_pod(checks, manifests, workload):
    name, pod = named(workload), spec(workload)
    account = manifests.get("ServiceAccount", pod.get("serviceAccountName"))
    checks.that(account, "%s: there is no account %s" % (name, pod.get("serviceAccountName")))
    checks.that(pod.get("automountServiceAccountToken") is False, "%s: it gets a token of the API" % name)
    user = pod.get("securityContext", {})
    checks.that(user.get("runAsNonRoot") is True and user.get("runAsUser", 0) > 0, "%s runs as root" % name)
    checks.that(user.get("seccompProfile") == {"type": "RuntimeDefault"}, "%s: no seccomp profile" % name)
    for key in ("hostNetwork", "hostPID", "hostIPC", "hostAliases"):
        checks.that(key not in pod, "%s: %s" % (name, key))
    (container,) = pod["containers"]
    rights = container.get("securityContext", {})
    checks.that(rights.get("readOnlyRootFilesystem") is True, "%s: its files can be written" % name)
    checks.that(rights.get("allowPrivilegeEscalation") is False, "%s: it can get privileges" % name)
    checks.that(rights.get("capabilities", {}).get("drop") == ["ALL"], "%s: it has capabilities" % name)
    tag = container["image"].partition(":")[2]
    checks.that(tag and tag != "latest", "%s: the image has no version" % name)
    wanted, most = container["resources"].get("requests", {}), container["resources"].get("limits", {})
    for resource in ("cpu", "memory"):
        if checks.that(resource in wanted and resource in most, "%s: no limit on %s" % (name, resource)):
            checks.that(
                quantity(wanted[resource]) <= quantity(most[resource]),
                "%s requests more %s than its limit" % (name, resource),
            )
    for variable in container.get("env", []):
        if is_secret(variable["name"]):
            reference = variable.get("valueFrom", {}).get("secretKeyRef", {})
            known = (reference.get("name"), reference.get("key")) in SECRETS
            checks.that(known, "%s: %s is not taken from a secret" % (name, variable["name"]))
    mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
    claims = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", [])}
    volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
    checks.that(mounts == set(volumes) | claims, "%s: mounts and volumes differ" % name)
    for volume in volumes.values():
        allowed = (
            volume.get("emptyDir", {}).get("sizeLimit") or volume.get("configMap", {}).get("name") in BY_HAND
        )
        checks.that(allowed, "%s: the volume %s has no bound" % (name, volume["name"]))
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        port = container.get(probe, {}).get("httpGet", {}).get("port")
        if port:
            ports = {port["name"] for port in container.get("ports", [])}
            checks.that(port in ports, "%s: %s asks port %s, which it has not" % (name, probe, port))


def quantity(text):
    number, unit = re.fullmatch(r"([0-9.]+)(m|Mi|Gi)?", str(text)).groups()
    return float(number) * {None: 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30}[unit]


def check_role(checks, manifests, role, workload):
    pod = spec(workload)
    (container,) = pod["containers"]
    checks.that(container["args"] == [role] and role in facts.commands(), "%s: another command" % role)
    check_login(checks, role, container, facts.LOGINS[role], PASSWORDS[role])
    checks.that(
        workload["spec"]["selector"]["matchLabels"].items() <= labels(workload).items(),
        "%s: the selector misses its pods" % role,
    )
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    expected = {"admin": ADMIN_PORT, "page": PAGE_PORT} if role == "serve" else {"admin": ADMIN_PORT}
    checks.that(ports == expected, "%s: the ports are not the image's" % role)
    for probe, path in (
        ("startupProbe", "/healthz"),
        ("livenessProbe", "/healthz"),
        ("readinessProbe", "/readyz"),
    ):
        asked = container.get(probe, {}).get("httpGet", {})
        checks.that(
            asked == {"path": path, "port": "admin"}, "%s: the %s asks something else" % (role, probe)
        )
    start = container["startupProbe"]
    checks.that(
        start["periodSeconds"] * start["failureThreshold"] >= 60, "%s: too little time to start" % role
    )
    waits = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    grace = pod.get("terminationGracePeriodSeconds", 30)
    checks.that(grace > waits + GRACE_S, "%s: it is killed before runtime.grace_s" % role)
    checks.that(role != "serve" or waits >= 5, "serve: balancers send requests to a pod that ends")
    rolling = workload["spec"]["strategy"].get("rollingUpdate", {})
    checks.that(
        rolling.get("maxUnavailable") == 0 and rolling.get("maxSurge"),
        "%s: a release takes a pod away first" % role,
    )
    spread = pod.get("topologySpreadConstraints", [])
    keys = {rule["topologyKey"] for rule in spread}
    checks.that(
        keys == {"topology.kubernetes.io/zone", "kubernetes.io/hostname"},
        "%s: not spread over zones and nodes" % role,
    )
    for rule in spread:
        own = manifests.pods(rule["labelSelector"]) == [workload]
        checks.that(
            own and rule["whenUnsatisfiable"] == "ScheduleAnyway", "%s: its spread counts other pods" % role
        )
    budgets = [
        thing
        for thing in manifests.kind("PodDisruptionBudget")
        if manifests.pods(thing["spec"]["selector"]) == [workload]
    ]
    if checks.that(len(budgets) == 1, "%s: no disruption budget of its own" % role):
        checks.that(
            budgets[0]["spec"].get("maxUnavailable") == 1,
            "%s: the budget lets no node or every node go" % role,
        )
    scaled = any(
        target(scaler) == ("Deployment", workload["metadata"]["name"]) for scaler in scalers(manifests)
    )
    replicas = workload["spec"].get("replicas")
    checks.that(
        replicas is None if scaled else (replicas or 0) >= 2,
        "%s: replicas beside a scaler, or fewer than two" % role,
    )
    checks.that(pod["serviceAccountName"] == "refarch-" + role, "%s: the account of another role" % role)


def variables_of(container):
    """A container's variables: a text, or the name of a secret and its key."""
    found = {}
    for variable in container["env"]:
        reference = variable.get("valueFrom", {}).get("secretKeyRef", {})
        found[variable["name"]] = variable.get("value", (reference.get("name"), reference.get("key")))
    return found


def check_login(checks, name, container, user, key):
    """The owner migrates. Each role logs in as somebody with fewer rights."""
    variables = variables_of(container)
    checks.that(variables.get("POSTGRES_DB_USER") == user, "%s does not log in as %s" % (name, user))
    checks.that(
        variables.get("POSTGRES_DB_PASSWORD") == ("refarch-database", key), "%s: another password" % name
    )


def check_migration(checks, manifests):
    job = manifests.get("Job", "refarch-migrate")
    if not checks.that(job, "there is no Job for the migration"):
        return
    pod = spec(job)
    (container,) = pod["containers"]
    checks.that(container.get("command", [])[-2:] == ["/bin/sh", "-c"], "migrate: no shell")
    checks.that(container["args"] == [facts.MIGRATION], "the Job gives the roles other rights")
    check_login(checks, "migrate", container, facts.OWNER, "password")
    variables = variables_of(container)
    for role, variable in facts.passwords().items():
        checks.that(
            variables.get(variable) == ("refarch-database", PASSWORDS[role]),
            "migrate: another password of %s" % role,
        )
    checks.that(
        variables.get("REFARCH_SERVE_EDIT_TOKEN") == ("refarch-page", "edit-token"),
        "migrate does not know who edits",
    )
    checks.that(
        pod.get("restartPolicy") == "Never" and job["spec"].get("backoffLimit"), "the Job is not tried again"
    )
    checks.that(pod["serviceAccountName"] == "refarch-migrate", "migrate: the account of another role")
    versions = {
        spec(manifests.get("Deployment", "refarch-" + role))["containers"][0]["image"]
        for role in ROLES
        if manifests.get("Deployment", "refarch-" + role)
    }
    checks.that(versions == {pod["containers"][0]["image"]}, "roles and migration have different images")


def check_settings(checks, manifests, overlay):
    for variable, value in manifests.settings().items():
        checks.that(is_known_variable(variable), "there is no variable %s" % variable)
        checks.that(not is_secret(variable), "%s is in a ConfigMap" % variable)
        checks.that(isinstance(value, str), "%s is no text" % variable)
    found = manifests.settings()
    checks.that(found.get("REFARCH_RUNTIME_GRACE_S") == str(GRACE_S), "the grace period is not the default")
    checks.that(found.get("POSTGRES_DB_HOST"), "no database is named")
    if overlay == "aws":
        checks.that(found.get("PGSSLMODE") == "verify-full", "the server of the database is not verified")
        mounts = spec(manifests.get("Job", "refarch-migrate"))["containers"][0]["volumeMounts"]
        folder = found.get("PGSSLROOTCERT", "").rpartition("/")[0]
        checks.that(any(mount["mountPath"] == folder for mount in mounts), "the certificates are not mounted")
        for lane in ("QUEUE", "BULK_QUEUE", "DEAD_LETTER_QUEUE"):
            checks.that("SQS_%s_URL" % lane in found, "no SQS_%s_URL" % lane)
        for account in manifests.kind("ServiceAccount"):
            role = account["metadata"].get("annotations", {}).get("eks.amazonaws.com/role-arn", "")
            checks.that(
                role.endswith("/" + account["metadata"]["name"]),
                "%s has the rights of another" % named(account),
            )
    else:
        server = manifests.get("Service", found.get("POSTGRES_DB_HOST"))
        checks.that(server, "there is no Service %s" % found.get("POSTGRES_DB_HOST"))
    for workload in manifests.workloads():
        container = spec(workload)["containers"][0]
        if workload["kind"] != "StatefulSet":
            checks.that(
                {"configMapRef": {"name": "refarch"}} in container["envFrom"],
                "%s has no settings" % named(workload),
            )
            for variable in container["env"]:
                checks.that(is_known_variable(variable["name"]), "there is no variable %s" % variable["name"])


def check_services(checks, manifests):
    for service in manifests.kind("Service"):
        found = manifests.pods({"matchLabels": service["spec"]["selector"]})
        if not checks.that(len(found) == 1, "%s leads to no workload or to several" % named(service)):
            continue
        ports = {port["name"] for port in spec(found[0])["containers"][0]["ports"]}
        for port in service["spec"]["ports"]:
            checks.that(
                port["targetPort"] in ports,
                "%s leads to port %s, which nobody has" % (named(service), port["targetPort"]),
            )
        checks.that(
            service["spec"].get("type", "ClusterIP") == "ClusterIP",
            "%s is open to the world" % named(service),
        )


def check_observation(checks, manifests):
    (monitor,) = manifests.kind("PodMonitor")
    found = {
        labels(workload)["app.kubernetes.io/component"]
        for workload in manifests.pods(monitor["spec"]["selector"])
    }
    checks.that(found == set(ROLES), "the monitor does not look at every role")
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    checks.that(
        (endpoint["port"], endpoint["path"]) == ("admin", "/metrics"), "the monitor asks another endpoint"
    )
    (rules,) = manifests.kind("PrometheusRule")
    checks.that(
        rules["spec"] == yaml.safe_load(read("config/prometheus/refarch.rules.yml")),
        "the rules are not those of config/prometheus",
    )
    boards = manifests.get("ConfigMap", "refarch-dashboards")
    checks.that(
        boards["metadata"]["labels"].get("grafana_dashboard") == "1", "Grafana does not find the dashboards"
    )
    checks.that(len(boards["data"]) >= 2, "a dashboard is missing")
