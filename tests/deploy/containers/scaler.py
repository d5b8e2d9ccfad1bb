"""The rules for what scales embed."""

import re

import facts
from facts import ADMIN_PORT, BACKLOG_S, COOLDOWN_S, CPU_PERCENT, LEAST, MOST, setting


def scalers(manifests):
    return manifests.kind("HorizontalPodAutoscaler", "ScaledObject")


def target(scaler):
    to = scaler["spec"]["scaleTargetRef"]
    return to.get("kind", "Deployment"), to["name"]


def check_scaler(checks, manifests):
    found = scalers(manifests)
    if not checks.that(len(found) == 1, "not one scaler, but %d" % len(found)):
        return
    (scaler,) = found
    checks.that(target(scaler) == ("Deployment", "refarch-embed"), "the scaler scales something else")
    checks.that(manifests.get(*target(scaler)), "the scaler scales what is not there")
    rule = scaler["spec"]
    if scaler["kind"] == "HorizontalPodAutoscaler":
        least, most, behavior = rule["minReplicas"], rule["maxReplicas"], rule["behavior"]
        (metric,) = rule["metrics"]
        checks.that(
            metric["resource"]
            == {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": CPU_PERCENT}},
            "the scaler has another target",
        )
    else:
        least, most = rule["minReplicaCount"], rule["maxReplicaCount"]
        behavior = rule["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        checks.that("fallback" not in rule, "KEDA has no fallback for metrics of type Value")
        (trigger,) = rule["triggers"]
        check_trigger(checks, manifests, trigger)
    checks.that(1 <= least <= most, "the scaler's least is above its most, or 0")
    checks.that((least, most) == (LEAST, MOST), "the scaler has other bounds than the reference")
    up, down = behavior["scaleUp"], behavior["scaleDown"]
    # One step at most doubles, as in refarch itself.
    out = {"type": "Percent", "value": 100, "periodSeconds": setting("scaling.cooldown_out_s", COOLDOWN_S)}
    checks.that(up == {"stabilizationWindowSeconds": 0, "policies": [out]}, "the scaler grows in other steps")
    checks.that(
        down["stabilizationWindowSeconds"] == setting("scaling.cooldown_in_s", COOLDOWN_S),
        "the scaler shrinks after another time",
    )


def check_trigger(checks, manifests, trigger):
    # Twice the seconds want twice the pods: the ratio of the value to its target, not of a sum.
    checks.that(trigger.get("metricType") == "Value", "the trigger does not take the value as it is")
    data = trigger["metadata"]
    checks.that(all(isinstance(value, str) for value in data.values()), "KEDA takes texts only")
    wanted = setting("scaling.backlog_s", BACKLOG_S)
    checks.that(
        data.get("targetValue", data.get("threshold")) == str(wanted), "the target is not scaling.backlog_s"
    )
    text = data.get("valueLocation", data.get("query", ""))
    name = (re.findall(r"refarch_\w+", text) or [""])[0]
    roles = facts.metrics().get(name, "")
    checks.that(name == "refarch_backlog_seconds" and "`listen`" in roles, "listen has no metric %s" % name)
    checks.that('source="%s"' % facts.SETTINGS["source.name"] in text, "the metric of another source")
    if trigger["type"] == "metrics-api":
        checks.that(data.get("format") == "prometheus", "the answer is read as another format")
        host, port, path = re.fullmatch(r"http://([\w-]+)\.refarch\.svc:(\d+)(/\w+)", data["url"]).groups()
        service = manifests.get("Service", host)
        if checks.that(service, "there is no Service %s" % host):
            checks.that(
                int(port) in {port["port"] for port in service["spec"]["ports"]},
                "%s has no port %s" % (host, port),
            )
        checks.that((int(port), path) == (ADMIN_PORT, "/metrics"), "the trigger asks another endpoint")
        checks.that(data.get("aggregationType") == "max", "the trigger adds up what each reports of all")
    else:
        checks.that(trigger["type"] == "prometheus", "a trigger of another type")
        checks.that(
            text.startswith("max(") and 'namespace="refarch"' in text,
            "the query adds up what each reports of all",
        )
        checks.that(data.get("ignoreNullValues") == "false", "no answer scales in")
