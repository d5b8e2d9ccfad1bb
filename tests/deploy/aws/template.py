"""The CloudFormation template as plain values, and what its parameters resolve to."""

import json
import pathlib
import re
import tomllib

import yaml

ROOT = pathlib.Path(__file__).parents[3]
AWS = ROOT / "config" / "aws"


class Loader(yaml.SafeLoader):
    """YAML with CloudFormation's short forms."""


def short_form(loader, suffix, node):
    if isinstance(node, yaml.ScalarNode):
        value = loader.construct_scalar(node)
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        value = loader.construct_mapping(node, deep=True)
    if suffix == "GetAtt" and isinstance(value, str):
        value = value.split(".", 1)
    return {suffix if suffix in ("Ref", "Condition") else f"Fn::{suffix}": value}


Loader.add_multi_constructor("!", short_form)


def load(text=None):
    """The template; that of the tree if no text is given."""
    return yaml.load(text or (AWS / "refarch.yaml").read_text(), Loader)


def parameter_sets(template):
    """Name of each set of parameters, and the values: the defaults alone, then with each file."""
    defaults = {name: str(parameter["Default"]) for name, parameter in template["Parameters"].items()}
    sets = {"defaults": defaults}
    for name in ("small", "stress"):
        given = json.loads((AWS / f"{name}.json").read_text())
        sets[name] = defaults | {entry["ParameterKey"]: entry["ParameterValue"] for entry in given}
    return sets


def settings():
    """config/default.toml."""
    return tomllib.loads((ROOT / "config" / "default.toml").read_text())


def resources(template, kind):
    """Logical id and properties of the resources of a type."""
    return {
        name: resource.get("Properties", {})
        for name, resource in template["Resources"].items()
        if resource["Type"] == kind
    }


def reference(value):
    """The logical id (or parameter) that a value names: by Ref, GetAtt, or a Sub of one name."""
    if isinstance(value, dict):
        if "Ref" in value:
            return value["Ref"]
        if "Fn::GetAtt" in value:
            return value["Fn::GetAtt"][0]
        if "Fn::Sub" in value:
            names = re.findall(r"\$\{([A-Za-z]+)", value["Fn::Sub"])
            return names[0] if len(names) == 1 else None
    return None


def numbers(value, parameters):
    """A number, or what a reference to a parameter resolves to."""
    name = reference(value)
    return float(parameters[name] if name else value)


def chosen(items):
    """The values of a list, with those of Fn::If in both cases."""
    for item in items:
        if isinstance(item, dict) and "Fn::If" in item:
            yield from chosen(value for value in item["Fn::If"][1:] if value != {"Ref": "AWS::NoValue"})
        else:
            yield item


def containers(template):
    """Each task's logical id, properties and container."""
    for name, task in resources(template, "AWS::ECS::TaskDefinition").items():
        (container,) = task["ContainerDefinitions"]
        yield name, task, container


def environment(container):
    """A container's plain variables."""
    return {variable["Name"]: variable["Value"] for variable in container["Environment"]}


def secrets(container):
    """A container's variables that come from secrets."""
    return {variable["Name"]: variable["ValueFrom"] for variable in chosen(container["Secrets"])}


def statements(template):
    """Each role, and the statements of its policies."""
    for name, role in resources(template, "AWS::IAM::Role").items():
        for policy in role["Policies"]:
            for statement in policy["PolicyDocument"]["Statement"]:
                yield name, statement


def listed(value):
    """A value that may be one or a list."""
    return value if isinstance(value, list) else [value]


def dashboard(template):
    """The dashboard's widgets. Parameters become 0, since they stand as numbers in the JSON."""
    text = template["Resources"]["Dashboard"]["Properties"]["DashboardBody"]["Fn::Sub"]
    return json.loads(re.sub(r":\$\{\w+\}", ":0", text))["widgets"]


def rows(widget):
    """A widget's metrics: namespace, metric, dimensions, options. A dot repeats what is above it."""
    last = []
    for metric in widget["properties"].get("metrics", []):
        options = metric[-1] if isinstance(metric[-1], dict) else {}
        names = [name for name in metric if isinstance(name, str)]
        if names:
            names = [last[at] if name == "." else name for at, name in enumerate(names)]
            last = names
        yield names, options
