"""The template holds what is asked of it, and the checks notice planted mistakes."""

import re
import subprocess
import tomllib
import unittest

import check
import template

TEXT = (template.AWS / "refarch.yaml").read_text()

# What is planted: what stands in the template, what stands there instead, and the check that must notice.
MISTAKES = [
    ("a most under the least", "EmbedMax: {Type: Number, Default: 50", "EmbedMax: {Type: Number, Default: 1", "most_is_over_least"),
    ("an unknown id in metric math", "IF(faults > 0 AND", "IF(errors > 0 AND", "metric_math_knows_its_ids"),
    (
        "the queue of another lane in a dimension",
        "Dimensions: [{Name: QueueName, Value: !GetAtt DeadQueue.QueueName}]",
        "Dimensions: [{Name: QueueName, Value: !GetAtt LiveQueue.QueueName}]",
        "alarms_ring",
    ),
    (
        "a service's name in a dimension of the cluster",
        '"ClusterName","${Cluster}","ServiceName","${ListenService.Name}",{"label":"listen"}],[".",".",".",".",".","${Emb',
        '"ClusterName","${ListenService}","ServiceName","${ListenService.Name}",{"label":"listen"}],[".",".",".",".",".","${Emb',
        "dimensions_match",
    ),
    ("a metric that nobody writes", "MetricName: FreshnessP99", "MetricName: FreshnessP999", "dimensions_match"),
    ("scaling of another service", "service/${Cluster}/${EmbedService.Name}", "service/${Cluster}/${ServeService.Name}", "dimensions_match"),
    (
        "the database open to the network",
        "GroupId: !Ref DatabaseGroup, IpProtocol: tcp, FromPort: 5432, ToPort: 5432, SourceSecurityGroupId: !Ref ListenGroup",
        "GroupId: !Ref DatabaseGroup, IpProtocol: tcp, FromPort: 5432, ToPort: 5432, CidrIp: 10.0.0.0/8",
        "only_the_load_balancer_is_open",
    ),
    (
        "the database reached by the load balancer",
        "SourceSecurityGroupId: !Ref ToolsGroup",
        "SourceSecurityGroupId: !Ref LoadBalancerGroup",
        "the_database_is_reached_by_four_groups",
    ),
    ("a public database", "PubliclyAccessible: false", "PubliclyAccessible: true", "the_database_is_reached_by_four_groups"),
    ("TLS not forced", "rds.force_ssl: '1'", "rds.force_ssl: '0'", "the_database_is_encrypted_and_kept"),
    ("a server that is not verified", "Value: verify-full", "Value: require", "the_database_is_encrypted_and_kept"),
    ("a right to everything", "Action: [sqs:SendMessage, sqs:GetQueueAttributes]", "Action: sqs:*", "rights_are_by_name"),
    ("a statement for every queue", "Resource: !GetAtt DeadQueue.Arn}", "Resource: '*'}", "rights_are_by_name"),
    ("listen may receive", "Action: [sqs:SendMessage, sqs:GetQueueAttributes]", "Action: [sqs:SendMessage, sqs:GetQueueAttributes, sqs:ReceiveMessage]", "rights_are_by_name"),
    ("a stop timeout of the grace period", "StopTimeout: {Type: Number, Default: 30", "StopTimeout: {Type: Number, Default: 20", "tasks_have_time_to_stop"),
    (
        "a secret as a plain variable",
        "          - {Name: REFARCH_SERVE_BIND, Value: 0.0.0.0:3000}",
        "          - {Name: REFARCH_SERVE_BIND, Value: 0.0.0.0:3000}\n          - {Name: PINECONE_API_KEY, Value: !Ref PineconeSecret}",
        "secrets_are_no_plain_variables",
    ),
    ("the owner's login in a service", "!Sub '${EmbedLogin}:username::'", "!Sub '${Database.MasterUserSecret.SecretArn}:username::'", "secrets_are_no_plain_variables"),
    ("edits without HTTPS", "!If [HasCertificate, {Name: REFARCH_SERVE_EDIT_TOKEN", "!If [HasServices, {Name: REFARCH_SERVE_EDIT_TOKEN", "https_and_edits_come_together"),
    ("another number than default.toml's", "MaxReceives: {Type: Number, Default: 25", "MaxReceives: {Type: Number, Default: 4", "numbers_are_the_same_everywhere"),
    ("another cooldown than the reference's", "ScaleInCooldown: {Type: Number, Default: 30", "ScaleInCooldown: {Type: Number, Default: 300", "numbers_are_the_same_everywhere"),
    ("a retention of four days", "MessageRetentionPeriod: 1209600, Sqs", "MessageRetentionPeriod: 345600, Sqs", "queues_keep_what_they_hold"),
    ("no way back", "DeploymentCircuitBreaker: {Enable: true, Rollback: true}", "DeploymentCircuitBreaker: {Enable: true, Rollback: false}", "deployments_roll_back"),
    ("a public task", "AssignPublicIp: DISABLED, SecurityGroups: [!Ref EmbedGroup]", "AssignPublicIp: ENABLED, SecurityGroups: [!Ref EmbedGroup]", "only_the_load_balancer_is_open"),
    ("no policy for the backlog", "TargetValue: !Ref ScaleBacklog", "TargetValue: !Ref ScaleCpu", "scaling_follows_both_signals"),
    ("an alarm that rings for an unused queue", "TreatMissingData: notBreaching", "TreatMissingData: breaching", "alarms_ring"),
]  # fmt: skip


class Template(unittest.TestCase):
    maxDiff = None

    def test_everything_holds(self):
        asserted, faults = check.run(template.load())
        print(f"template: {asserted} assertions in {len(check.ALL)} checks")
        self.assertEqual(faults, {})
        self.assertGreater(asserted, 500)

    def test_each_planted_mistake_is_noticed(self):
        caught = 0
        for what, right, wrong, noticed_by in MISTAKES:
            with self.subTest(what):
                self.assertIn(right, TEXT, "nothing to plant it in")
                _, faults = check.run(template.load(TEXT.replace(right, wrong)))
                self.assertIn(noticed_by, faults)
                caught += 1
        print(f"template: {caught} of {len(MISTAKES)} planted mistakes were noticed")

    def test_the_template_can_be_sent_without_a_bucket(self):
        self.assertLessEqual(len(TEXT.encode()), 51_200)

    def test_parameter_files_say_what_costs(self):
        """The cost is reckoned from the files alone, so they must not leave a size to the defaults."""
        cost = (template.AWS / "cost.awk").read_text()
        for name in ("small", "stress"):
            text = (template.AWS / f"{name}.json").read_text()
            for key in ("Architecture", "DatabaseClass", "DatabaseStorage", "DatabaseMultiAz", "NatPerZone", "ServeTasks",
                        "ServeCpu", "ServeMemory", "ListenMin", "ListenCpu", "ListenMemory", "EmbedMin", "EmbedMax",
                        "EmbedCpu", "EmbedMemory"):  # fmt: skip
                self.assertIn(f'"{key}"', text)
                self.assertIn(f'set["{key}"]', cost)

    def test_the_runbook_tells_the_cost(self):
        runbook = (template.ROOT / "docs" / "runbook.md").read_text()
        totals = []
        for name in ("small", "stress"):
            command = ["awk", "-f", template.AWS / "cost.awk", template.AWS / "prices.toml", template.AWS / f"{name}.json"]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            month, million = re.findall(r"  total +([\d.]+)", said)
            totals.append(f"{float(month):,.0f}")
            self.assertIn(f"| sum | {million} |", runbook)
        self.assertIn(f"| a month at rest | {' | '.join(totals)} |", runbook)

    def test_prices_agree_with_those_of_the_plan(self):
        """refarch plan has a price file of its own form; what both name costs the same."""
        theirs = tomllib.loads((template.ROOT / "config" / "prices.toml").read_text())["us-east-1"]
        ours = dict(re.findall(r"^([a-z][\w.]*) = ([\d.]+)(?: #.*)?$", (template.AWS / "prices.toml").read_text(), re.M))
        same = {key: float(ours[key]) for key in theirs if key in ours}
        self.assertEqual(same, {key: theirs[key] for key in same})
        self.assertGreater(len(same), 3)
        for name, instance in theirs["rds"].items():
            if name in ours:
                self.assertEqual(float(ours[name]), instance["hour"], name)

    def test_the_source_of_each_price_is_told(self):
        """Each was read at a place that a comment names, or is marked as remembered; both files agree on which."""
        text = (template.AWS / "prices.toml").read_text()
        source, remembered = "", {}
        for line in text.splitlines():
            if line.startswith("#"):
                source = line if "Read 20" in line else source
            elif not line:
                source = ""
            elif " = " in line:
                remembered[line.split()[0]] = "# from memory, 20" in line
                self.assertTrue(source or remembered[line.split()[0]], line)
        theirs = tomllib.loads((template.ROOT / "config" / "prices.toml").read_text())["us-east-1"]["rds"]
        for name, instance in theirs.items():
            if name in remembered:
                self.assertEqual("from_memory" in instance, remembered[name], name)


if __name__ == "__main__":
    unittest.main()
