"""What config/compose.yaml and the files beside it have to be, and mistakes that this finds."""

import copy
import os
import re
import unittest

import facts
import yaml
from facts import ADMIN_PORT, GRACE_S, PAGE_PORT, Checks, is_known_variable, is_secret, read, seconds

ROLES = ("migrate", "serve", "listen", "embed", "tool")
RUNNING = ("serve", "listen", "embed")
PROFILES = {"sqs": "sqs", "prometheus": "observe", "grafana": "observe", "tool": "tool"}


class Files:
    """The files, parsed."""

    def __init__(self):
        self.compose = yaml.safe_load(read("config/compose.yaml"))
        self.env = {
            name: dict(
                line.split("=", 1)
                for line in read("config/compose/%s.env" % name).splitlines()
                if "=" in line and line[0] != "#"
            )
            for name in ("pgmq", "sqs")
        }
        self.scrape = yaml.safe_load(read("config/compose/prometheus.yml"))
        self.queues = read("config/compose/make_queues.py")
        self.datasources = yaml.safe_load(read("config/compose/grafana/datasources/prometheus.yaml"))
        self.dashboards = yaml.safe_load(read("config/compose/grafana/dashboards/refarch.yaml"))


def default(text):
    """A value with its variables replaced by their defaults."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(text))


def check(files):
    checks = Checks()
    services = files.compose["services"]
    checks.that(
        set(services) == {"postgres", *ROLES, "sqs", "prometheus", "grafana"}, "the services are others"
    )
    for name, service in services.items():
        check_service(checks, files, name, service)
    for name in ROLES:
        check_role(checks, name, services[name])
    check_order(checks, services)
    check_database(checks, services)
    check_sqs(checks, files, services)
    check_observation(checks, files, services)
    return checks


def check_service(checks, files, name, service):
    image = service["image"]
    checks.that(
        re.fullmatch(r"\$\{[A-Z_]+_IMAGE:-[^}]+\}", image), "%s: no variable replaces the image" % name
    )
    if name not in ROLES:
        tag = default(image).partition(":")[2]
        checks.that(tag and tag != "latest", "%s: the image has no version" % name)
    checks.that(
        service.get("profiles", []) == ([PROFILES[name]] if name in PROFILES else []),
        "%s: the profile" % name,
    )
    for limit in ("mem_limit", "pids_limit"):
        checks.that(service.get(limit), "%s: no %s" % (name, limit))
    checks.that(
        service.get("restart") in ("unless-stopped", "on-failure", "no"), "%s: no restart policy" % name
    )
    checks.that(
        not service.get("privileged") and not service.get("network_mode"), "%s: too many rights" % name
    )
    one_off = name in ("migrate", "tool")
    health = service.get("healthcheck", {})
    checks.that(health.get("disable") if one_off else health.get("test"), "%s: the health check" % name)
    if not one_off:
        checks.that(
            {"interval", "timeout", "retries", "start_period"} <= set(health),
            "%s: the health check has no times" % name,
        )
    for port in service.get("ports", []):
        checks.that(port.startswith("127.0.0.1:"), "%s: port %s is open to other machines" % (name, port))
    for volume in service.get("volumes", []):
        source, _, rest = volume.partition(":")
        if source.startswith("."):
            checks.that(
                os.path.exists(os.path.join(facts.ROOT, "config", source)),
                "%s: there is no %s" % (name, source),
            )
            checks.that(rest.endswith(":ro"), "%s: %s can be written" % (name, source))
        else:
            checks.that(
                source in files.compose["volumes"], "%s: the volume %s is not declared" % (name, source)
            )
    for variable, value in (service.get("environment") or {}).items():
        if is_secret(variable):
            checks.that(
                re.fullmatch(r"\$\{\w+:-[^}]*\}", str(value)), "%s: %s is written down" % (name, variable)
            )
    for needed, how in service.get("depends_on", {}).items():
        if not checks.that(
            needed in files.compose["services"], "%s waits for %s, which is not there" % (name, needed)
        ):
            continue
        other = files.compose["services"][needed]
        ends = how["condition"] == "service_completed_successfully"
        checks.that(
            ends == (other["restart"] == "on-failure"),
            "%s waits for %s in a way that never comes" % (name, needed),
        )
        checks.that(
            not other.get("profiles") or other["profiles"] == service.get("profiles"),
            "%s waits for %s, which may be off" % (name, needed),
        )


def check_role(checks, name, service):
    if name != "migrate":
        checks.that(
            service["command"][0] in facts.commands(),
            "%s: refarch has no command %s" % (name, service["command"][0]),
        )
    checks.that(service.get("read_only") is True, "%s: its files can be written" % name)
    checks.that(service.get("tmpfs") == ["/tmp"], "%s: /tmp" % name)
    checks.that(service.get("cap_drop") == ["ALL"], "%s: it has capabilities" % name)
    checks.that(service.get("security_opt") == ["no-new-privileges:true"], "%s: it can get privileges" % name)
    checks.that(service.get("cpus"), "%s: no limit on CPUs" % name)
    checks.that(
        seconds(service["stop_grace_period"]) > GRACE_S, "%s: it is killed before runtime.grace_s" % name
    )
    for variable in service["environment"]:
        checks.that(is_known_variable(variable), "%s: there is no variable %s" % (name, variable))
    checks.that(service["environment"].get("POSTGRES_DB_HOST") == "postgres", "%s: another database" % name)
    checks.that(
        service["env_file"] == ["compose/${REFARCH_FLEET:-pgmq}.env"], "%s: the file of variables" % name
    )
    if name in RUNNING:
        checks.that(service["command"] == [name], "%s: another role" % name)
        checks.that(service["restart"] == "unless-stopped", "%s: it is not started again" % name)
        checks.that(
            service["healthcheck"]["test"] == ["CMD", "refarch", "health", "--ready"],
            "%s: the health check asks something else" % name,
        )
    else:
        checks.that("ports" not in service, "%s: it has ports" % name)


def check_order(checks, services):
    for name in (*RUNNING, "tool"):
        checks.that("migrate" in services[name]["depends_on"], "%s does not wait for migrate" % name)
    checks.that(set(services["migrate"]["depends_on"]) == {"postgres"}, "migrate waits for something else")
    ports = services["serve"].get("ports", [])
    checks.that(
        len(ports) == 1 and default(ports[0]) == "127.0.0.1:3000:%d" % PAGE_PORT, "serve: the page's port"
    )


def check_logins(checks, services):
    """The owner migrates, and is there for tools. Each other role logs in as somebody with fewer rights."""
    server, migrate = services["postgres"]["environment"], services["migrate"]
    for name in ROLES:
        variables, is_owner = services[name]["environment"], name not in RUNNING
        checks.that(
            variables.get("POSTGRES_DB_NAME") == server["POSTGRES_DB"], "%s: another database's name" % name
        )
        user = facts.OWNER if is_owner else facts.LOGINS[name]
        checks.that(variables.get("POSTGRES_DB_USER") == user, "%s does not log in as %s" % (name, user))
        if is_owner:
            password = server["POSTGRES_PASSWORD"]
        else:
            password = migrate["environment"].get(facts.passwords()[name])
        checks.that(
            password and variables.get("POSTGRES_DB_PASSWORD") == password, "%s: another password" % name
        )
    checks.that(server["POSTGRES_USER"] == facts.OWNER, "the owner is somebody else")
    checks.that(migrate.get("entrypoint", [])[-2:] == ["/bin/sh", "-c"], "migrate: no shell")
    checks.that(
        migrate["command"] == [facts.MIGRATION.replace("$", "$$")], "migrate gives the roles other rights"
    )
    token = services["serve"]["environment"]["REFARCH_SERVE_EDIT_TOKEN"]
    checks.that(
        migrate["environment"].get("REFARCH_SERVE_EDIT_TOKEN") == token, "migrate does not know who edits"
    )


def check_database(checks, services):
    check_logins(checks, services)
    checks.that("ports" not in services["postgres"], "the database can be reached from outside")
    shared = int(services["postgres"]["shm_size"].removesuffix("gb")) * 1024
    checks.that(
        shared * 2 >= int(facts.SETTINGS["index.build_memory_mib"]),
        "postgres: too little shared memory to build lists",
    )


def check_sqs(checks, files, services):
    checks.that(not files.env["pgmq"], "pgmq.env sets something")
    env = files.env["sqs"]
    for variable, value in env.items():
        checks.that(is_known_variable(variable), "sqs.env: there is no variable %s" % variable)
        if variable.endswith("_URL") or "_URL_" in variable:
            checks.that(value.startswith("http://sqs:5000"), "sqs.env: %s is another server" % variable)
    for variable in ("SQS_QUEUE_URL", "SQS_BULK_QUEUE_URL", "SQS_DEAD_LETTER_QUEUE_URL"):
        queue = env.get(variable, "").rpartition("/")[2]
        lane = queue.rpartition("-")[2]
        checks.that(
            '"refarch-dead"' in files.queues
            and '("live", "bulk")' in files.queues
            and lane in ("live", "bulk", "dead"),
            "sqs.env: no queue %s is made" % queue,
        )
    checks.that(
        "MAX_RECEIVES = %s\n" % facts.SETTINGS["queue.max_receives"] in files.queues,
        "the redrive policy is not queue.max_receives",
    )
    checks.that("RETENTION_S = 14 * 24 * 60 * 60\n" in files.queues, "messages are not kept for 14 days")
    checks.that(
        services["sqs"]["healthcheck"]["test"] == ["CMD", "python3", "/make_queues.py"],
        "sqs: nobody makes the queues",
    )


def check_observation(checks, files, services):
    mounts = dict(volume.split(":")[:2] for volume in services["prometheus"]["volumes"])
    checks.that(
        mounts.get("./compose/prometheus.yml") == "/etc/prometheus/prometheus.yml", "prometheus: its settings"
    )
    for rules in files.scrape["rule_files"]:
        checks.that(
            mounts.get("./prometheus/" + rules) == "/etc/prometheus/" + rules,
            "prometheus: %s is not mounted" % rules,
        )
    (job,) = files.scrape["scrape_configs"]
    (names,) = job["dns_sd_configs"]
    checks.that(set(names["names"]) == set(RUNNING), "prometheus does not look at every role")
    checks.that(names["port"] == ADMIN_PORT and names["type"] == "A", "prometheus asks another port")
    (source,) = files.datasources["datasources"]
    checks.that(source["url"] == "http://prometheus:9090", "grafana asks another server")
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    (provider,) = files.dashboards["providers"]
    checks.that(
        provider["options"]["path"] == mounts.get("./grafana"), "grafana: the dashboards are elsewhere"
    )
    anonymous = services["grafana"]["environment"]
    checks.that(anonymous["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer", "grafana: everybody may change it")


def change(path, value):
    """A mistake: the value at a path of the compose file is another. None removes it."""

    def plant(files):
        facts.set_at(files.compose["services"], path, value)

    return plant


def set_env(files):
    files.env["sqs"]["SQS_BULK_QUEU_URL"] = files.env["sqs"].pop("SQS_BULK_QUEUE_URL")


def set_scrape(files):
    files.scrape["scrape_configs"][0]["dns_sd_configs"][0]["port"] = PAGE_PORT


def set_redrive(files):
    files.queues = files.queues.replace("MAX_RECEIVES = 25", "MAX_RECEIVES = 4")


MISTAKES = {
    "a port for other machines": (change(["serve", "ports"], ["3000:3000"]), "open to other machines"),
    "a root file system that can be written": (change(["embed", "read_only"], None), "can be written"),
    "a stop that comes too early": (change(["embed", "stop_grace_period"], "10s"), "before runtime.grace_s"),
    "a password in plain sight": (
        change(["postgres", "environment", "POSTGRES_PASSWORD"], "hunter2"),
        "is written down",
    ),
    "a setting that does not exist": (
        change(["listen", "environment"], {"REFARCH_RELAY_POL_MS": "5"}),
        "no variable REFARCH_RELAY_POL_MS",
    ),
    "a health check of another kind": (
        change(["listen", "healthcheck", "test"], ["CMD", "curl", "localhost"]),
        "asks something else",
    ),
    "no limit on memory": (change(["embed", "mem_limit"], None), "no mem_limit"),
    "a start before the schema is there": (
        change(["serve", "depends_on"], {"postgres": {"condition": "service_healthy"}}),
        "does not wait for migrate",
    ),
    "a role that does not exist": (change(["listen", "command"], ["lisen"]), "no command lisen"),
    "an image without a version": (
        change(["grafana", "image"], "${GRAFANA_IMAGE:-grafana/grafana}"),
        "no version",
    ),
    "a queue's variable with another name": (set_env, "no variable SQS_BULK_QUEU_URL"),
    "metrics at another port": (set_scrape, "another port"),
    "a redrive policy that gives up early": (set_redrive, "not queue.max_receives"),
    "a role that is the owner": (
        change(["serve", "environment", "POSTGRES_DB_USER"], "refarch"),
        "serve does not log in as refarch_serve",
    ),
    "the password of another": (
        change(["listen", "environment", "POSTGRES_DB_PASSWORD"], "${EMBED_PASSWORD:-embed}"),
        "listen: another password",
    ),
    "a role without rights": (
        change(["migrate", "command"], [facts.MIGRATION.replace("serve=refarch_serve", "").replace("$", "$$")]),
        "other rights",
    ),
    "a capability": (change(["serve", "cap_drop"], None), "capabilities"),
}


class Compose(unittest.TestCase):
    def test_the_fleet_is_as_it_has_to_be(self):
        checks = check(Files())
        self.assertEqual(checks.faults, [])
        print("compose: %d assertions" % checks.count)

    def test_mistakes_are_found(self):
        files = Files()
        for name, (plant, fault) in MISTAKES.items():
            with self.subTest(name):
                spoiled = copy.deepcopy(files)
                plant(spoiled)
                faults = check(spoiled).faults
                self.assertTrue(any(fault in found for found in faults), faults)
        print("compose: %d mistakes planted, all found" % len(MISTAKES))


if __name__ == "__main__":
    unittest.main()
