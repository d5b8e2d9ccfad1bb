"""The rules for who may exchange packets with whom."""

from objects import ROLES, labels, named, selects


def check_network(checks, manifests, overlay):
    policies = manifests.kind("NetworkPolicy")
    deny = [policy for policy in policies if policy["spec"]["podSelector"] == {}]
    closed = (
        len(deny) == 1
        and set(deny[0]["spec"]) == {"podSelector", "policyTypes"}
        and len(deny[0]["spec"]["policyTypes"]) == 2
    )
    checks.that(closed, "the network is not closed at first")
    for policy in policies:
        rules = [(rule, "from") for rule in policy["spec"].get("ingress", [])]
        rules += [(rule, "to") for rule in policy["spec"].get("egress", [])]
        for rule, side in rules:
            checks.that(rule.get("ports"), "%s opens every port" % named(policy))
            checks.that(rule.get(side), "%s opens to everybody" % named(policy))
            for peer in rule.get(side) or []:
                checks.that(
                    peer not in ({}, {"podSelector": {}}, {"namespaceSelector": {}}),
                    "%s opens to everybody" % named(policy),
                )
                cidr = peer.get("ipBlock", {}).get("cidr", "10.0.0.0/16")
                checks.that(int(cidr.rpartition("/")[2]) >= 16, "%s opens to %s" % (named(policy), cidr))
        if rules:
            checks.that(manifests.pods(policy["spec"]["podSelector"]), "%s is for no pod" % named(policy))
    for role in ROLES:
        workload = manifests.get("Deployment", "refarch-" + role)
        if workload:
            checks.that(
                opened(policies, workload, "ingress", "admin") == [{"refarch/metrics": "read"}],
                "%s: metrics are open to others" % role,
            )
            page = [{"refarch/access": "page"}] if role == "serve" else []
            checks.that(
                opened(policies, workload, "ingress", "page") == page, "%s: the page is open to others" % role
            )
            checks.that(opened(policies, workload, "egress", 53), "%s cannot look up names" % role)
            checks.that(opened(policies, workload, "egress", 5432), "%s cannot reach the database" % role)
            checks.that(
                bool(opened(policies, workload, "egress", 443)) == (overlay == "aws"),
                "%s: SQS cannot be reached, or the world can" % role,
            )
    job = manifests.get("Job", "refarch-migrate")
    checks.that(
        job and opened(policies, job, "egress", 5432) and not opened(policies, job, "ingress", "admin"),
        "migrate: its way to the database",
    )
    for server in manifests.kind("StatefulSet"):
        checks.that(
            opened(policies, server, "ingress", "postgres") == [{"app.kubernetes.io/name": "refarch"}],
            "the database is open to others",
        )
        checks.that(not opened(policies, server, "egress", 443), "the database can reach others")


def opened(policies, workload, side, port):
    """The labels of the peers that a pod may exchange packets with at a port."""
    peers = []
    for policy in policies:
        if selects(policy["spec"]["podSelector"], labels(workload)):
            for rule in policy["spec"].get(side, []):
                if any(allowed["port"] == port for allowed in rule.get("ports", [])):
                    for peer in rule.get("from", rule.get("to", [])):
                        selector = (
                            peer.get("podSelector")
                            or peer.get("namespaceSelector")
                            or {"matchLabels": peer.get("ipBlock")}
                        )
                        peers.append(selector.get("matchLabels"))
    return peers
