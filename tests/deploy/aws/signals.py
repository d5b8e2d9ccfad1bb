"""Metrics, alarms, scaling and dashboard: that each name and each dimension is one that exists."""

import re

from check import check
from template import AWS, ROOT, containers, dashboard, environment, reference, resources, rows


@check
def metric_math_knows_its_ids(c):
    def expressions(where, queries):
        ids = {query["Id"] for query in queries}
        c.that(sum(query.get("ReturnData", True) for query in queries) == 1, f"{where}: not one result")
        c.that(len(ids) == len(queries), f"{where}: an id twice")
        for query in queries:
            text = query.get("Expression")
            if isinstance(text, dict):
                text = re.sub(r"\$\{\w+\}", "0", text["Fn::Sub"])
            if text:
                used = set(re.findall(r"\b[a-z]\w*\b", text))
                c.that(used and used <= ids, f"{where}: {text} names {sorted(used - ids)}")
                c.that(query.get("ReturnData") is True, f"{where}: the expression is not the result")
            else:
                c.that(query.get("ReturnData") is False, f"{where}: {query['Id']} is a result")

    for name, policy in resources(c.template, "AWS::ApplicationAutoScaling::ScalingPolicy").items():
        metric = policy["TargetTrackingScalingPolicyConfiguration"].get("CustomizedMetricSpecification")
        if metric:
            expressions(name, metric["Metrics"])
    for name, alarm in resources(c.template, "AWS::CloudWatch::Alarm").items():
        if "Metrics" in alarm:
            expressions(name, alarm["Metrics"])
    for widget in dashboard(c.template):
        options = [options for _, options in rows(widget)]
        ids = {entry["id"] for entry in options if "id" in entry}
        for entry in options:
            if "expression" in entry:
                used = set(re.findall(r"\b[a-z]\w*\b", entry["expression"]))
                c.that(used <= ids, f"{widget['properties']['title']}: {entry['expression']} names {sorted(used - ids)}")


def written_metrics():
    """The metrics that listen writes, by its source, and the name of their dimension."""
    source = (ROOT / "src" / "role" / "embedded_metrics.rs").read_text()
    names = set(re.findall(r'\("(\w+)", "(?:Count|Seconds|Count/Second)"', source.split("#[cfg(test)]")[0]))
    return names, re.search(r'DIMENSION: &str = "(\w+)"', source).group(1), re.search(r'NAMESPACE: &str = "(\w+)"', source).group(1)


@check
def dimensions_match(c):
    names, dimension, namespace = written_metrics()
    kinds = {
        "ClusterName": "AWS::ECS::Cluster",
        "ServiceName": "AWS::ECS::Service",
        "QueueName": "AWS::SQS::Queue",
        "DBInstanceIdentifier": "AWS::RDS::DBInstance",
        "LoadBalancer": "AWS::ElasticLoadBalancingV2::LoadBalancer",
    }

    def metric(where, space, name, dimensions):
        if space == namespace:
            c.that(name in names, f"{where}: listen writes no {name}")
            c.that(list(dimensions) == [dimension], f"{where}: {name} has the dimension {dimension}")
        for key, value in dimensions.items():
            if key == dimension:
                c.that(value == "AWS::StackName", f"{where}: another deployment")
            else:
                kind = c.template["Resources"].get(value, {}).get("Type")
                c.that(kind and kind == kinds.get(key), f"{where}: {key} is {value}")

    def query(where, metric_):
        given = {entry["Name"]: reference(entry["Value"]) for entry in metric_.get("Dimensions", [])}
        metric(where, metric_["Namespace"], metric_["MetricName"], given)

    for name, alarm in resources(c.template, "AWS::CloudWatch::Alarm").items():
        queries = [entry["MetricStat"]["Metric"] for entry in alarm.get("Metrics", []) if "MetricStat" in entry]
        for entry in queries or [alarm]:
            query(name, entry)
    for name, policy in resources(c.template, "AWS::ApplicationAutoScaling::ScalingPolicy").items():
        found = policy["TargetTrackingScalingPolicyConfiguration"].get("CustomizedMetricSpecification", {})
        for entry in found.get("Metrics", []):
            if "MetricStat" in entry:
                query(name, entry["MetricStat"]["Metric"])
    for widget in dashboard(c.template):
        title = widget["properties"]["title"]
        for row, _ in rows(widget):
            if row:
                plain = {key: re.sub(r"^\$\{([\w:]+).*", r"\1", value) for key, value in zip(row[2::2], row[3::2], strict=True)}
                metric(title, row[0], row[1], plain)
        source = re.search(r"SOURCE '\$\{(\w+)\}'", widget["properties"].get("query", ""))
        if source:
            wanted = {"pelican": "ListenLogs", "emu": "EmbedLogs"}
            service = re.search(r'service = "(\w+)"', widget["properties"]["query"]).group(1)
            c.that(source.group(1) == wanted.get(service), f"{title}: reads {source.group(1)}")
        for alarm in widget["properties"].get("alarms", []):
            c.that(alarm[2:-5] in resources(c.template, "AWS::CloudWatch::Alarm"), f"{title}: {alarm} is no alarm")
    for name in ("Listen", "Embed"):
        scaling = c.template["Resources"][f"{name}Scaling"]["Properties"]
        wanted = f"service/${{Cluster}}/${{{name}Service.Name}}"
        c.that(scaling["ResourceId"] == {"Fn::Sub": wanted}, f"{name}Scaling scales {scaling['ResourceId']}")
    for name, _, container in containers(c.template):
        deployment = environment(container).get("REFARCH_LOG_EMF")
        is_listen = name == "ListenTask"
        c.that((reference(deployment) == "AWS::StackName") == is_listen, f"{name}: log.emf is {deployment}")


@check
def scaling_follows_both_signals(c):
    policies = resources(c.template, "AWS::ApplicationAutoScaling::ScalingPolicy")
    found = {(reference(policy["ScalingTargetId"]), policy["PolicyName"]) for policy in policies.values()}
    wanted = {("ListenScaling", "cpu"), ("EmbedScaling", "cpu"), ("EmbedScaling", "backlog")}
    c.that(found == wanted, f"policies: {found}")
    for name, policy in policies.items():
        tracking = policy["TargetTrackingScalingPolicyConfiguration"]
        target = "ScaleCpu" if policy["PolicyName"] == "cpu" else "ScaleBacklog"
        c.that(reference(tracking["TargetValue"]) == target, f"{name}: aims at {tracking['TargetValue']}")
        for key in ("ScaleOutCooldown", "ScaleInCooldown"):
            c.that(reference(tracking.get(key)) == key, f"{name}: {key} is {tracking.get(key)}")
        if policy["PolicyName"] == "backlog":
            metrics = [entry["MetricStat"]["Metric"] for entry in tracking["CustomizedMetricSpecification"]["Metrics"][:-1]]
            c.that("BacklogSeconds" in [metric["MetricName"] for metric in metrics], f"{name} does not read BacklogSeconds")


@check
def alarms_ring(c):
    alarms = resources(c.template, "AWS::CloudWatch::Alarm")
    wanted = {
        ("DeadQueue", "ApproximateNumberOfMessagesVisible"), ("LiveQueue", "ApproximateAgeOfOldestMessage"),
        ("BulkQueue", "ApproximateAgeOfOldestMessage"), ("AWS::StackName", "FreshnessP99"),
        ("AWS::StackName", "ProofOverdue"), ("AWS::StackName", "Faults"), ("AWS::StackName", "BacklogChanges"),
        ("Database", "FreeStorageSpace"),
    }  # fmt: skip
    found = set()
    for name, alarm in alarms.items():
        c.that([reference(action) for action in alarm.get("AlarmActions", [])] == ["Alarms"], f"{name} tells nobody")
        c.that(alarm.get("AlarmDescription"), f"{name} does not say what to do")
        if "MetricName" in alarm:
            (dimension,) = alarm["Dimensions"]
            found.add((reference(dimension["Value"]), alarm["MetricName"]))
        if alarm.get("Namespace") == "AWS/SQS":
            c.that(alarm["TreatMissingData"] == "notBreaching", f"{name} rings when the queue is not used")
    c.that(wanted <= found, f"no alarm on {wanted - found}")
    silence = alarms["SilenceAlarm"]
    c.that(silence["TreatMissingData"] == "breaching", "silence is no alarm")
    c.that(alarms["DeadLettersAlarm"]["Threshold"] == 0, "dead letters are tolerated")
