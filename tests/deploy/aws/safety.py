"""Who reaches what, who may do what, and where secrets are."""

import re

from check import check
from template import AWS, ROOT, chosen, containers, environment, listed, reference, resources, secrets, statements


@check
def only_the_load_balancer_is_open(c):
    groups = resources(c.template, "AWS::EC2::SecurityGroup")
    rules = [(name, rule) for name, group in groups.items() for rule in chosen(group.get("SecurityGroupIngress", []))]
    rules += [(reference(rule["GroupId"]), rule) for rule in resources(c.template, "AWS::EC2::SecurityGroupIngress").values()]
    for name, rule in rules:
        is_open = any(key in rule for key in ("CidrIp", "CidrIpv6", "SourcePrefixListId"))
        c.that(not is_open or name == "LoadBalancerGroup", f"{name} is open to addresses")
        if name == "LoadBalancerGroup":
            c.that((rule["FromPort"], rule["ToPort"]) in ((80, 80), (443, 443)), f"{name}: port {rule['FromPort']}")
            c.that(reference(rule["CidrIp"]) == "PageCidr", f"{name}: other addresses than PageCidr")
    c.that(
        [reference(rule["SourceSecurityGroupId"]) for name, rule in rules if name == "ServeGroup"] == ["LoadBalancerGroup"],
        "serve is reached by others than the load balancer",
    )
    for name in ("ListenGroup", "EmbedGroup", "ToolsGroup"):
        c.that(name not in [group for group, _ in rules], f"{name} is reached by something")
    for name, group in groups.items():
        egress = group.get("SecurityGroupEgress")
        c.that(egress, f"{name} may reach everything")
        for rule in egress or []:
            is_narrow = rule.get("CidrIp") != "0.0.0.0/0" or (rule["FromPort"], rule["ToPort"]) == (443, 443)
            c.that(is_narrow, f"{name} may reach the world on port {rule['FromPort']}")
    for name, service in resources(c.template, "AWS::ECS::Service").items():
        network = service["NetworkConfiguration"]["AwsvpcConfiguration"]
        c.that(network["AssignPublicIp"] == "DISABLED", f"{name} has a public address")
        c.that({reference(subnet) for subnet in network["Subnets"]} == {"PrivateA", "PrivateB"}, f"{name}: public subnets")
        role = name.removesuffix("Service")
        c.that([reference(group) for group in network["SecurityGroups"]] == [f"{role}Group"], f"{name}: another group")
    private = {"PrivateRoutesA", "PrivateRoutesB"}
    for name, route in resources(c.template, "AWS::EC2::Route").items():
        if reference(route["RouteTableId"]) in private:
            c.that("GatewayId" not in route, f"{name} leads from a private subnet to the internet gateway")


@check
def the_database_is_reached_by_four_groups(c):
    found = set()
    for name, rule in resources(c.template, "AWS::EC2::SecurityGroupIngress").items():
        if reference(rule["GroupId"]) == "DatabaseGroup":
            c.that((rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) == ("tcp", 5432, 5432), f"{name}: other ports")
            found.add(reference(rule.get("SourceSecurityGroupId")))
    c.that(found == {"ServeGroup", "ListenGroup", "EmbedGroup", "ToolsGroup"}, f"the database is reached by {found}")
    group = c.template["Resources"]["DatabaseGroup"]["Properties"]
    c.that("SecurityGroupIngress" not in group, "the database's group has more rules")
    database = c.template["Resources"]["Database"]["Properties"]
    c.that(database["PubliclyAccessible"] is False, "the database is public")
    c.that([reference(name) for name in database["VPCSecurityGroups"]] == ["DatabaseGroup"], "the database has other groups")
    subnets = c.template["Resources"]["DatabaseSubnets"]["Properties"]["SubnetIds"]
    c.that({reference(subnet) for subnet in subnets} == {"PrivateA", "PrivateB"}, "the database is in public subnets")


@check
def the_database_is_encrypted_and_kept(c):
    database = c.template["Resources"]["Database"]
    properties = database["Properties"]
    # The database of a snapshot is encrypted as the snapshot is.
    encrypted = {"Fn::If": ["FromSnapshot", {"Ref": "AWS::NoValue"}, True]}
    c.that(properties["StorageEncrypted"] == encrypted, "the database is not encrypted")
    c.that(properties.get("ManageMasterUserPassword") is True, "RDS does not keep the owner's password")
    c.that("MasterUserPassword" not in properties, "the owner's password is in the template")
    c.that(reference(properties["DeletionProtection"]) == "DeletionProtection", "deletion protection is no parameter")
    c.that(database.get("DeletionPolicy") == "Snapshot", "the database is deleted without a snapshot")
    c.that(database.get("UpdateReplacePolicy") == "Snapshot", "the database is replaced without a snapshot")
    c.that(reference(properties["DBParameterGroupName"]) == "DatabaseParameters", "other database parameters")
    (parameters,) = resources(c.template, "AWS::RDS::DBParameterGroup").values()
    c.that(parameters["Parameters"].get("rds.force_ssl") == "1", "TLS is not forced")
    c.that(parameters["Family"] == f"postgres{properties['EngineVersion']}", "parameters of another version")
    dockerfile = (AWS / "Dockerfile").read_text()
    for name, _, container in containers(c.template):
        variables = environment(container)
        c.that(variables.get("PGSSLMODE") == "verify-full", f"{name}: the server is not verified")
        c.that(f" {variables.get('PGSSLROOTCERT')}" in dockerfile, f"{name}: the image has no such certificates")


WILDCARDS = {"ecr:GetAuthorizationToken", "ssmmessages"}
RIGHTS = {
    ("ServeRole", "LiveQueue"): {"GetQueueAttributes"},
    ("ServeRole", "DeadQueue"): {"GetQueueAttributes"},
    ("ListenRole", "LiveQueue"): {"SendMessage", "GetQueueAttributes"},
    ("ListenRole", "DeadQueue"): {"GetQueueAttributes"},
    ("EmbedRole", "LiveQueue"): {"ReceiveMessage", "DeleteMessage", "ChangeMessageVisibility", "GetQueueAttributes"},
    ("EmbedRole", "DeadQueue"): {"SendMessage", "GetQueueAttributes"},
    ("ToolsRole", "LiveQueue"): {"SendMessage", "GetQueueAttributes"},
    ("ToolsRole", "DeadQueue"): {
        "ReceiveMessage", "DeleteMessage", "ChangeMessageVisibility", "GetQueueAttributes", "StartMessageMoveTask",
        "ListMessageMoveTasks",
    },
}  # fmt: skip
RIGHTS |= {(role, "BulkQueue"): rights for (role, queue), rights in list(RIGHTS.items()) if queue == "LiveQueue"}


@check
def rights_are_by_name(c):
    found = {}
    for role, statement in statements(c.template):
        actions = listed(statement["Action"])
        targets = listed(statement["Resource"])
        c.that(statement.get("Sid"), f"{role}: a statement without a name")
        c.that(statement["Effect"] == "Allow", f"{role}: {statement.get('Sid')} denies")
        for action in actions:
            c.that("*" not in action, f"{role} may do {action}")
            may_be_any = action in WILDCARDS or action.split(":")[0] in WILDCARDS
            c.that("*" not in targets or may_be_any, f"{role} may do {action} to everything")
            for target in chosen(targets):
                if action.startswith("sqs:"):
                    found.setdefault((role, reference(target)), set()).add(action.removeprefix("sqs:"))
        for target in chosen(targets):
            c.that(target == "*" or reference(target), f"{role}: {target} is no resource of the stack")
    for place in set(found) | set(RIGHTS):
        wanted, got = RIGHTS.get(place, set()), found.get(place, set())
        c.that(wanted == got, f"{place}: may {sorted(got)}, needs {sorted(wanted)}")
    for name, task, _ in containers(c.template):
        role = name.removesuffix("Task") + "Role"
        c.that(reference(task["TaskRoleArn"]) == role, f"{name} does not run as {role}")
        c.that(reference(task["ExecutionRoleArn"]) == "ExecutionRole", f"{name}: another execution role")


SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|API_KEY|(?:^|_)URL$.*:.*@")


@check
def secrets_are_no_plain_variables(c):
    logins = {"ServeTask": "ServeLogin", "ListenTask": "ListenLogin", "EmbedTask": "EmbedLogin", "ToolsTask": "Database"}
    for name, _, container in containers(c.template):
        for variable in environment(container):
            c.that(not SECRET.search(variable), f"{name}: {variable} is a plain variable")
        given = secrets(container)
        for variable, value in given.items():
            kind = c.template["Resources"].get(reference(value), {}).get("Type")
            is_secret = kind == "AWS::SecretsManager::Secret" or reference(value) in ("Database", "PineconeSecret")
            c.that(is_secret, f"{name}: {variable} comes from no secret")
        for variable, key in (("POSTGRES_DB_USER", "username"), ("POSTGRES_DB_PASSWORD", "password")):
            value = given.get(variable, {})
            c.that(reference(value) == logins[name], f"{name}: {variable} is of another login")
            c.that(value.get("Fn::Sub", "").endswith(f":{key}::"), f"{name}: {variable} is not {key}")
    for name, secret in resources(c.template, "AWS::SecretsManager::Secret").items():
        c.that("SecretString" not in secret, f"{name}: its value is in the template")
    c.that("PINECONE_API_KEY" not in c.template["Parameters"], "the key of Pinecone is a parameter")
    roles = (ROOT / "config" / "roles.sql").read_text()
    for name, secret in resources(c.template, "AWS::SecretsManager::Secret").items():
        login = re.search(r'"username": "(\w+)"', secret["GenerateSecretString"].get("SecretStringTemplate", ""))
        c.that(not login or f"'{login.group(1)}'" in roles, f"{name}: roles.sql does not make its role")


@check
def https_and_edits_come_together(c):
    listener = c.template["Resources"]["HttpListener"]["Properties"]
    redirect, forward = chosen(listener["DefaultActions"])
    c.that(redirect.get("Type") == "redirect" and forward.get("Type") == "forward", "HTTP is not sent to HTTPS")
    https = c.template["Resources"]["HttpsListener"]
    c.that(https["Condition"] == "ServesHttps", "HTTPS without a certificate")
    c.that("TLS13" in https["Properties"]["SslPolicy"], "old TLS")
    for name, _, container in containers(c.template):
        token = [entry for entry in container["Secrets"] if "REFARCH_SERVE_EDIT_TOKEN" in str(entry)]
        c.that(len(token) == (name == "ServeTask"), f"{name}: the token for edits")
        for entry in token:
            c.that(entry.get("Fn::If", [None])[0] == "HasCertificate", f"{name}: edits without HTTPS")
