"""Numbers, queues, tasks and deployments."""

import re

from check import check
from template import AWS, ROOT, containers, dashboard, environment, numbers, reference, resources, settings


@check
def most_is_over_least(c):
    for name, values in c.sets.items():
        for least, most in (("ListenMin", "ListenMax"), ("EmbedMin", "EmbedMax")):
            c.that(int(values[most]) >= int(values[least]), f"{name}: {most} is under {least}")
        grown = 1.1 * int(values["DatabaseStorage"])
        c.that(int(values["DatabaseMaxStorage"]) >= grown, f"{name}: storage cannot grow by a tenth, as RDS wants")
    for target, role in (("ListenScaling", "Listen"), ("EmbedScaling", "Embed")):
        scaling = c.template["Resources"][target]["Properties"]
        c.that(reference(scaling["MinCapacity"]) == f"{role}Min", f"{target}: another least")
        c.that(reference(scaling["MaxCapacity"]) == f"{role}Max", f"{target}: another most")


@check
def numbers_are_the_same_everywhere(c):
    defaults, wanted = c.sets["defaults"], settings()
    same = {
        "Visibility": ("queue", "visibility_s"),
        "MaxReceives": ("queue", "max_receives"),
        "GracePeriod": ("runtime", "grace_s"),
        "DatabasePool": ("database", "pool_size"),
        "ScaleBacklog": ("scaling", "backlog_s"),
        "ScaleOutCooldown": ("scaling", "cooldown_out_s"),
        "ScaleInCooldown": ("scaling", "cooldown_in_s"),
    }
    # Those of the reference architecture, and of default.toml where it has them.
    reference_numbers = {
        "ListenMin": 2, "ListenMax": 6, "EmbedMin": 2, "EmbedMax": 50, "ScaleCpu": 25, "ScaleOutCooldown": 30,
        "ScaleInCooldown": 30, "EmbedCpu": 4096, "EmbedMemory": 8192, "ListenCpu": 512, "ListenMemory": 1024,
        "ServeCpu": 512, "ServeMemory": 1024, "ServeTasks": 2, "ScaleBacklog": 10,
    }  # fmt: skip
    for parameter, (section, key) in same.items():
        value = wanted[section][key]
        c.that(float(defaults[parameter]) == float(value), f"{parameter} is not {section}.{key} = {value}")
    for parameter, value in reference_numbers.items():
        c.that(float(defaults[parameter]) == value, f"{parameter} is not the reference's {value}")
    for name, values in c.sets.items():
        for parameter in ("Visibility", "MaxReceives"):
            c.that(values[parameter] == defaults[parameter], f"{name}: another {parameter}")
    for name, task, container in containers(c.template):
        variables = environment(container)
        for variable, parameter in (
            ("REFARCH_QUEUE_VISIBILITY_S", "Visibility"),
            ("REFARCH_QUEUE_MAX_RECEIVES", "MaxReceives"),
            ("REFARCH_RUNTIME_GRACE_S", "GracePeriod"),
            ("REFARCH_DATABASE_POOL_SIZE", "DatabasePool"),
        ):
            c.that(reference(variables.get(variable)) == parameter, f"{name}: {variable} is not {parameter}")


@check
def queues_keep_what_they_hold(c):
    queues = resources(c.template, "AWS::SQS::Queue")
    for name, queue in queues.items():
        c.that(queue.get("MessageRetentionPeriod") == 14 * 86_400, f"{name}: retention is not 14 days")
        c.that(queue.get("SqsManagedSseEnabled") is True, f"{name}: not encrypted")
        if name != "DeadQueue":
            c.that(reference(queue.get("VisibilityTimeout")) == "Visibility", f"{name}: another visibility timeout")
            redrive = queue.get("RedrivePolicy", {})
            c.that(reference(redrive.get("deadLetterTargetArn")) == "DeadQueue", f"{name}: no dead-letter queue")
            c.that(reference(redrive.get("maxReceiveCount")) == "MaxReceives", f"{name}: another maxReceiveCount")
    (policy,) = resources(c.template, "AWS::SQS::QueuePolicy").values()
    (statement,) = policy["PolicyDocument"]["Statement"]
    c.that({reference(queue) for queue in policy["Queues"]} == set(queues), "a queue without the policy for TLS")
    c.that(statement["Effect"] == "Deny" and "aws:SecureTransport" in statement["Condition"]["Bool"], "TLS is not asked for")


@check
def tasks_have_time_to_stop(c):
    for set_name, values in c.sets.items():
        for name, _, container in containers(c.template):
            stop = numbers(container.get("StopTimeout", 30), values)
            grace = numbers(environment(container)["REFARCH_RUNTIME_GRACE_S"], values)
            c.that(stop >= grace + 5, f"{set_name}: {name} is killed after {stop} s, its grace period is {grace} s")
            c.that(stop <= 120, f"{set_name}: {name}: Fargate waits for 120 s at most")
        (group,) = resources(c.template, "AWS::ElasticLoadBalancingV2::TargetGroup").values()
        (delay,) = [entry["Value"] for entry in group["TargetGroupAttributes"]]
        c.that(float(delay) <= float(values["GracePeriod"]), "the load balancer sends requests to tasks that ended")


@check
def deployments_roll_back(c):
    for name, service in resources(c.template, "AWS::ECS::Service").items():
        deployment = service["DeploymentConfiguration"]
        c.that(deployment.get("DeploymentCircuitBreaker") == {"Enable": True, "Rollback": True}, f"{name}: no circuit breaker")
        c.that(deployment["MinimumHealthyPercent"] == 100, f"{name}: fewer tasks while it is deployed")
        c.that(deployment["MaximumPercent"] >= 200, f"{name}: a single task cannot be replaced")
        c.that(name == "ServeService" or "DesiredCount" not in service, f"{name}: an update resets what scaling chose")
        c.that(reference(service["TaskDefinition"]) == name.replace("Service", "Task"), f"{name}: another task")


@check
def containers_are_locked_down(c):
    valid = {
        256: {512, 1024, 2048}, 512: set(range(1024, 4097, 1024)), 1024: set(range(2048, 8193, 1024)),
        2048: set(range(4096, 16385, 1024)), 4096: set(range(8192, 30721, 1024)),
    }  # fmt: skip
    for name, task, container in containers(c.template):
        is_tools = name == "ToolsTask"
        c.that(container["ReadonlyRootFilesystem"] is not is_tools, f"{name}: its root file system")
        dropped = container["LinuxParameters"].get("Capabilities", {}).get("Drop")
        c.that(is_tools or dropped == ["ALL"], f"{name}: keeps capabilities")
        c.that(container.get("User") != "root" and not container.get("Privileged"), f"{name}: runs as root")
        if name in ("ListenTask", "EmbedTask"):
            # The health check asks the admin endpoint, which nobody else reaches.
            c.that(container["HealthCheck"]["Command"] == ["CMD", "refarch", "health"], f"{name}: another health check")
            c.that(environment(container).get("REFARCH_ADMIN_LISTEN", "").startswith("127.0.0.1:"), f"{name}: its admin endpoint")
        options = container["LogConfiguration"]["Options"]
        c.that(reference(options["awslogs-group"]) == name.replace("Task", "Logs"), f"{name}: another log")
        c.that(environment(container).get("REFARCH_LOG_FORMAT") == "json", f"{name}: the dashboard cannot read its log")
        image = container["Image"]["Fn::Sub"]
        wanted = "ToolsImage" if is_tools else "ServiceImage"
        c.that(image == f"${{Repository.RepositoryUri}}:${{{wanted}}}", f"{name}: image {image}")
        for set_name, values in c.sets.items():
            cpu, memory = numbers(task["Cpu"], values), numbers(task["Memory"], values)
            c.that(memory in valid.get(int(cpu), ()), f"{set_name}: {name}: Fargate has no {cpu} CPU with {memory} MiB")
    for name, group in resources(c.template, "AWS::Logs::LogGroup").items():
        c.that("RetentionInDays" in group, f"{name} keeps its log for ever")


# Memory of a class in GiB. RDS allows memory / 9,531,392 connections, some of which it keeps.
MEMORY = {"db.t4g.medium": 4, "db.m7g.2xlarge": 32}


@check
def connections_suffice(c):
    serve_pool = settings()["serve"]["pool_size"]
    for name in ("small", "stress"):
        values = {key: value for key, value in c.sets[name].items()}
        pool = int(values["DatabasePool"])
        # All tasks twice, since a deployment starts the new ones before it stops the old ones; and a command.
        tasks = int(values["EmbedMax"]) + int(values["ListenMax"]) + int(values["ServeTasks"])
        most = 2 * (tasks * pool + int(values["ServeTasks"]) * serve_pool) + pool
        allowed = MEMORY[values["DatabaseClass"]] * 2**30 // 9_531_392 - 20
        c.that(most <= allowed, f"{name}: tasks may hold {most} connections, {values['DatabaseClass']} has {allowed}")


@check
def the_script_finds_what_it_asks_for(c):
    script = "\n".join(path.read_text() for path in sorted((ROOT / "scripts").glob("deploy*aws*")))
    outputs = set(re.findall(r"output ([A-Z]\w+)", script)) | {"ServeService", "ListenService", "EmbedService"}
    outputs |= {"LiveQueue", "BulkQueue", "DeadQueue"}
    for name in outputs:
        c.that(name in c.template["Outputs"], f"the script asks for the output {name}")
    for name in set(re.findall(r"parameter ([A-Z]\w+)", script)) | set(re.findall(r'(?<!--build-arg )"(\w+)=\$', script)):
        if name[0].isupper() and not name.endswith("Suspended"):
            c.that(name in c.template["Parameters"], f"the script sets the parameter {name}")
    for name, values in c.sets.items():
        for key in values:
            c.that(key in c.template["Parameters"], f"{name}.json sets {key}")
