"""scripts/deploy-aws over moto, from up to down."""

import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import unittest

import boto3

from template import ROOT

BIN = pathlib.Path(sys.executable).parent
SCRIPT = ROOT / "scripts" / "deploy-aws"
STACK = "shop"
KEY = "pc-secret-of-the-test"


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def deploy(*arguments, path=f"{BIN}:{os.environ['PATH']}", **env):
    return subprocess.run(
        [SCRIPT, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={
            "PATH": path,
            "HOME": tempfile.gettempdir(),
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "REFARCH_DEPLOY_POLL_S": "0.2",
            **env,
        },
    )


class OverMoto(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        port = free_port()
        cls.url = f"http://127.0.0.1:{port}"
        server = pathlib.Path(__file__).with_name("moto_server.py")
        cls.log = tempfile.TemporaryFile()
        cls.moto = subprocess.Popen([sys.executable, server, str(port)], stdout=cls.log, stderr=cls.log)
        os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        while cls.moto.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("moto ended")

    @classmethod
    def tearDownClass(cls):
        cls.moto.kill()
        cls.moto.wait()
        cls.log.close()

    def aws(self, service):
        return boto3.client(service, endpoint_url=self.url)

    def run_script(self, *arguments, code=0, **env):
        result = deploy(*arguments, "--stack", STACK, "--endpoint-url", self.url, **env)
        self.assertEqual(result.returncode, code, result.stdout + result.stderr)
        self.assertNotIn(KEY, result.stdout + result.stderr)
        return result.stdout + result.stderr

    def test_from_up_to_down(self):
        said = self.run_script("up", "--yes", "--image", "v1", PINECONE_INDEX="shop", PINECONE_API_KEY=KEY)
        for line in ("Monthly cost at rest", "exec refarch migrate --roles listen=refarch_listen", "the page: http://shop-"):
            self.assertIn(line, said)
        self.assertLess(said.index("roles.sql"), said.index("refarch migrate"))
        self.assertLess(said.index("refarch migrate"), said.index("the services"))

        (stack,) = self.aws("cloudformation").describe_stacks(StackName=STACK)["Stacks"]
        self.assertEqual(stack["StackStatus"], "UPDATE_COMPLETE")
        ecs = self.aws("ecs")
        (cluster,) = ecs.list_clusters()["clusterArns"]
        services = ecs.list_services(cluster=cluster)["serviceArns"]
        self.assertEqual(len(services), 3)
        families = {arn.split("/")[-1].split(":")[0] for arn in ecs.list_task_definitions()["taskDefinitionArns"]}
        self.assertEqual(families, {f"{STACK}-{role}" for role in ("serve", "listen", "embed", "tools")})
        for arn in ecs.list_task_definitions()["taskDefinitionArns"]:
            (container,) = ecs.describe_task_definition(taskDefinition=arn)["taskDefinition"]["containerDefinitions"]
            self.assertTrue(container["image"].endswith(":v1"), container["image"])
        secret = self.aws("secretsmanager").get_secret_value(SecretId=f"refarch/{STACK}/pinecone")
        self.assertEqual(secret["SecretString"], KEY)
        queues = self.aws("sqs").list_queues()["QueueUrls"]
        self.assertEqual(len(queues), 3)
        (database,) = self.aws("rds").describe_db_instances()["DBInstances"]
        self.assertTrue(database["StorageEncrypted"])

        # A second image: the services change, the network stays.
        vpcs = {vpc["VpcId"] for vpc in self.aws("ec2").describe_vpcs()["Vpcs"]}
        said = self.run_script("up", "--yes", "--image", "v2", PINECONE_INDEX="shop", PINECONE_API_KEY=KEY)
        self.assertNotIn("network, database", said)
        self.assertEqual(vpcs, {vpc["VpcId"] for vpc in self.aws("ec2").describe_vpcs()["Vpcs"]})
        for role in ("serve", "tools"):
            (container,) = ecs.describe_task_definition(taskDefinition=f"{STACK}-{role}")["taskDefinition"]["containerDefinitions"]
            self.assertTrue(container["image"].endswith(":v2"), container["image"])

        said = self.run_script("status")
        for line in ("UPDATE_COMPLETE", "0 of 1 tasks", "Dead queue: visible, in flight: 0\t0", "/api/v1/status"):
            self.assertIn(line, said)
        self.assertIn("--count 1000 --load --seed 7", self.run_script("load", "1000", "--seed", "7"))
        self.assertIn("exec refarch verify --json", deploy("run", "--stack", STACK, "--endpoint-url", self.url, "--", "verify", "--json").stdout)
        said = deploy("psql", "--stack", STACK, "--endpoint-url", self.url, "--", "-c", 'SELECT "a b"').stdout
        self.assertIn("exec refarch psql -c SELECT\\ \\\"a\\ b\\\"", said)
        tasks = ecs.list_tasks(cluster=cluster, desiredStatus="STOPPED")["taskArns"] + ecs.list_tasks(cluster=cluster)["taskArns"]
        self.assertGreaterEqual(len(tasks), 7)

        logs = self.aws("logs")
        group = f"/refarch/{STACK}/embed"
        logs.create_log_stream(logGroupName=group, logStreamName="embed/embed/1")
        event = {"timestamp": int(time.time() * 1000), "message": '{"action": "embedding_completed"}'}
        logs.put_log_events(logGroupName=group, logStreamName="embed/embed/1", logEvents=[event])
        self.assertIn("embedding_completed", self.run_script("logs", "embed"))

        # moto makes no target of scaling by the stack, so there is none to be bounded.
        self.run_script("pause")
        targets = self.aws("application-autoscaling").describe_scalable_targets(ServiceNamespace="ecs")["ScalableTargets"]
        self.assertEqual(len(targets), 2)
        self.assertTrue(all(target["SuspendedState"]["DynamicScalingInSuspended"] for target in targets))
        self.run_script("resume")
        described = ecs.describe_services(cluster=cluster, services=services)["services"]
        self.assertEqual(sorted(service["desiredCount"] for service in described), [1, 1, 1])

        # A psql that somebody forgot.
        task = f"{STACK}-tools"
        ecs.run_task(cluster=cluster, taskDefinition=task, launchType="FARGATE", startedBy="deploy-aws",
                     networkConfiguration={"awsvpcConfiguration": {"subnets": [self.subnet()]}})  # fmt: skip

        # What AWS makes by itself beside the stack.
        name = cluster.split("/")[-1]
        logs.create_log_group(logGroupName=f"/aws/ecs/containerinsights/{name}/performance")
        logs.create_log_group(logGroupName=f"/aws/rds/instance/{database['DBInstanceIdentifier']}/postgresql")
        rds = self.aws("rds")
        rds.modify_db_instance(DBInstanceIdentifier=database["DBInstanceIdentifier"], DeletionProtection=True, ApplyImmediately=True)
        self.assertIn("the database is protected", self.run_script("down", "--yes", code=1))
        rds.modify_db_instance(DBInstanceIdentifier=database["DBInstanceIdentifier"], DeletionProtection=False, ApplyImmediately=True)
        self.assertIn(f"stack {STACK} is removed", self.run_script("down", "--yes"))
        self.assertEqual(self.left(), [])

    def subnet(self):
        (stack,) = self.aws("cloudformation").describe_stacks(StackName=STACK)["Stacks"]
        (subnets,) = [output["OutputValue"] for output in stack["Outputs"] if output["OutputKey"] == "Subnets"]
        return subnets.split(",")[0]

    def left(self):
        """What there still is in the account, but for what an account begins with."""
        ec2 = self.aws("ec2")
        calls = [
            self.aws("cloudformation").list_stacks(StackStatusFilter=["CREATE_COMPLETE", "UPDATE_COMPLETE"])["StackSummaries"],
            [vpc for vpc in ec2.describe_vpcs()["Vpcs"] if not vpc["IsDefault"]],
            [group for group in ec2.describe_security_groups()["SecurityGroups"] if group["GroupName"] != "default"],
            ec2.describe_nat_gateways()["NatGateways"],
            ec2.describe_addresses()["Addresses"],
            ec2.describe_vpc_endpoints()["VpcEndpoints"],
            self.aws("rds").describe_db_instances()["DBInstances"],
            self.aws("rds").describe_db_snapshots(SnapshotType="manual")["DBSnapshots"],
            self.aws("rds").describe_db_subnet_groups()["DBSubnetGroups"],
            self.aws("sqs").list_queues().get("QueueUrls", []),
            self.aws("sns").list_topics()["Topics"],
            self.aws("ecr").describe_repositories()["repositories"],
            self.aws("ecs").list_clusters()["clusterArns"],
            self.aws("elbv2").describe_load_balancers()["LoadBalancers"],
            self.aws("elbv2").describe_target_groups()["TargetGroups"],
            self.aws("iam").list_roles()["Roles"],
            self.aws("logs").describe_log_groups()["logGroups"],
            self.aws("cloudwatch").list_dashboards()["DashboardEntries"],
            self.aws("secretsmanager").list_secrets()["SecretList"],
        ]
        return [entry for found in calls for entry in found]


class WithoutAws(unittest.TestCase):
    def path_with(self, **programs):
        """A PATH that has these programs before all others."""
        folder = tempfile.mkdtemp()
        for name, text in programs.items():
            program = pathlib.Path(folder, name)
            program.write_text(f"#!/bin/sh\n{text}\n")
            program.chmod(0o755)
        self.addCleanup(subprocess.run, ["rm", "-rf", folder], check=True)
        return f"{folder}:{os.environ['PATH']}"

    def test_a_dry_run_calls_nothing_and_prints_all(self):
        with tempfile.NamedTemporaryFile() as calls:
            path = self.path_with(aws=f"echo aws >>{calls.name}", docker=f"echo docker >>{calls.name}", curl=f"echo curl >>{calls.name}")
            for arguments in (["up"], ["load", "10"], ["psql"], ["status"], ["pause"], ["resume"], ["down"], ["run", "--dry-run", "--", "verify"]):
                result = deploy(*arguments[:1], "--dry-run", *arguments[1:], path=path)
                self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
            self.assertEqual(pathlib.Path(calls.name).read_text(), "")
        said = deploy("up", "--dry-run", path=path).stdout
        order = ["ToolsImage=", "roles.sql", "exec\\ refarch\\ migrate", "ServiceImage=", "the page:"]
        places = [said.index(part) for part in order]
        self.assertEqual(places, sorted(places))
        self.assertIn("docker push", said)
        version = tomllib.loads((ROOT / "Cargo.toml").read_text())["package"]["version"]
        self.assertRegex(said, f"docker build .*--build-arg VERSION={re.escape(version)} --build-arg REVISION=[0-9a-f]{{40}}")

    def test_the_cost_follows_the_parameters(self):
        def total(*arguments):
            said = deploy("up", "--dry-run", *arguments).stdout
            return float(said.split("  total")[1].split()[0]), said

        small, said = total()
        self.assertIn("1 embed", said)
        self.assertIn("Prices change: check them before you rely on this.", said)
        remembered = said.split("From memory: ")[1].splitlines()[0]
        self.assertIn("nat_hour", remembered)
        self.assertNotIn("fargate", remembered)
        self.assertIn("fargate_arm_vcpu_hour", total("--set", "Architecture=ARM64")[1].split("From memory: ")[1])
        self.assertGreater(total("--size", "stress")[0], 4 * small)
        two_zones, _ = total("--set", "DatabaseMultiAz=true")
        self.assertAlmostEqual(two_zones - small, 730 * 0.065 + 20 * 0.115, places=1)
        more, said = total("--set", "EmbedMin=3")
        self.assertIn("3 embed", said)
        self.assertAlmostEqual(more - small, 2 * 730 * (0.04048 + 2 * 0.004445) + 2 * 6 * 60 * 730 / 1e6 * 0.4, places=1)

    def test_what_is_missing_is_named(self):
        nobody = self.path_with(aws="exit 255")
        for arguments, path, says in (
            (["up"], nobody, "AWS takes no credentials"),
            (["up", "--size", "huge"], nobody, "there is no file"),
            (["up", "--set", "EmbedMxa=3"], nobody, "names no parameter"),
            (["lode"], nobody, "there is no command lode"),
            (["load", "--dry-run"], nobody, "load needs a number of products"),
            (["run"], nobody, "run needs a command"),
            (["up", "--stack", "a b"], nobody, "is no name"),
            (["up", "--region"], nobody, "--region needs a value"),
            (["up"], self.path_with(aws="exit 0", docker="exit 1"), "Docker does not answer"),
        ):
            result = deploy(*arguments, path=path)
            self.assertEqual(result.returncode, 1, arguments)
            self.assertIn(says, result.stderr)
        self.assertEqual(deploy().returncode, 2)
        self.assertIn("--delete-snapshots", deploy("--help").stdout)
        said = deploy("up", "--dry-run", PINECONE_INDEX="shop").stderr
        self.assertIn("PINECONE_API_KEY is not", said)


if __name__ == "__main__":
    unittest.main()
