"""moto's server, with mended what its CloudFormation gets wrong of our stack. Usage: moto_server.py PORT

moto 5.2.5 knows nothing of some types: alarms, secrets, scaling, queue policies, budgets. It takes the stack for
complete without them. What is mended here would otherwise end the stack, though AWS takes it.
"""

import json
import re
import sys
import warnings

from moto.backends import get_backend
from moto.cloudformation import models as stacks
from moto.cloudformation import parsing
from moto.ecr.models import Repository
from moto.ecs.models import EC2ContainerServiceBackend, TaskDefinition
from moto.rds.models import DBInstance, DBParameterGroup
from moto.server import main


def mended(owner, name):
    """Replaces a function of moto by one that takes the old one first."""

    def put(function):
        old = getattr(owner, name)
        setattr(owner, name, lambda *args, **named: function(old, *args, **named))

    return put


@mended(parsing, "parse_and_update_resource")
def _(old, logical_id, resource_json, resources_map, account_id, region_name):
    """A resource whose condition was false is made by an update, and one that moto cannot change stays."""
    made = resources_map._parsed_resources.get(logical_id)
    if made is None:
        return parsing.parse_and_create_resource(logical_id, resource_json, resources_map, account_id, region_name)
    return old(logical_id, resource_json, resources_map, account_id, region_name) or made


@mended(parsing.ResourceMap, "update")
def _(old, self, template, parameters=None):
    """A resource whose condition is still false is not remembered as made."""
    old(self, template, {**(self.input_parameters or {}), **(parameters or {})})
    for name in [name for name in template["Resources"] if self._parsed_resources.get(name, self) is None]:
        del self._parsed_resources[name]


@mended(stacks.CloudFormationBackend, "execute_change_set")
def _(old, self, change_set_name, stack_name=None):
    """A stack has the outputs of its last change set."""
    old(self, change_set_name, stack_name)
    for stack in self.stacks.values():
        stack.output_map = stack._create_output_map()


@mended(DBInstance, "get_cfn_attribute")
def _(old, self, attribute_name):
    """moto splits Endpoint.Address and MasterUserSecret.SecretArn at the dot, and knows the first part only."""
    known = {"Endpoint": self.address, "MasterUserSecret": "arn:aws:secretsmanager:us-east-1:123456789012:secret:owner"}
    return known.get(attribute_name) or old(self, attribute_name)


@mended(parsing, "get_references_from_template")
def _(old, template_part):
    """A parameter in Fn::Sub is a reference too, so that a change of it changes the resource."""
    return [*old(template_part), *re.findall(r"\$\{(\w+)\}", json.dumps(template_part))]


# The name is what Ref of a group of parameters gives.
DBParameterGroup.physical_resource_id = property(lambda self: self.name)


@mended(Repository, "create_from_cloudformation_json")
def _(old, resource_name, cloudformation_json, account_id, region_name, **kwargs):
    """AWS gives a repository a name in lower case."""
    return old(resource_name.lower(), cloudformation_json, account_id, region_name, **kwargs)


@mended(TaskDefinition, "update_from_cloudformation_json")
def _(old, original_resource, new_resource_name, cloudformation_json, account_id, region_name):
    """A changed task is a new revision, made as the first one."""
    get_backend("ecs")[account_id][region_name].deregister_task_definition(original_resource.arn)
    return TaskDefinition.create_from_cloudformation_json(new_resource_name, cloudformation_json, account_id, region_name)


# On Fargate a container needs no memory of its own, only its task does.
EC2ContainerServiceBackend._calculate_task_resource_requirements = staticmethod(
    lambda task_definition: {"CPU": 0, "MEMORY": 0, "PORTS": [], "PORTS_UDP": []}
)

def of_network(delete):
    return lambda self, made: delete(get_backend("ec2")[self._account_id][self._region_name], made.physical_resource_id)


def of_tasks(delete):
    return lambda self, made: delete(get_backend("ecs")[self._account_id][self._region_name], made)


def without_gateway(ec2, gateway):
    """An attachment is not deleted by itself."""
    found = ec2.get_internet_gateway(gateway)
    if found.vpc:
        ec2.detach_internet_gateway(gateway, found.vpc.id)
    ec2.delete_internet_gateway(gateway)


def without_routes(ec2, table):
    """An association is not deleted by itself."""
    for association in list(ec2.get_route_table(table)._associations):
        ec2.disassociate_route_table(association)
    ec2.delete_route_table(table)


# Types that moto makes and does not delete.
DELETE = {
    "AWS::EC2::RouteTable": of_network(without_routes),
    "AWS::EC2::NatGateway": of_network(lambda ec2, nat: ec2.nat_gateways.pop(nat, None)),
    "AWS::EC2::EIP": of_network(lambda ec2, address: ec2.release_address(address=address)),
    "AWS::EC2::InternetGateway": of_network(without_gateway),
    "AWS::EC2::VPCEndpoint": of_network(lambda ec2, endpoint: ec2.vpc_end_points.pop(endpoint, None)),
    "AWS::ECS::Service": of_tasks(lambda ecs, service: ecs.services.pop(f"{service.cluster_name}:{service.name}", None)),
    "AWS::ECS::TaskDefinition": of_tasks(lambda ecs, task: ecs.deregister_task_definition(task.arn)),
    "AWS::ECS::Cluster": of_tasks(lambda ecs, cluster: ecs.clusters.pop(cluster.name, None)),
    "AWS::ElasticLoadBalancingV2::Listener": lambda self, listener: None,
    "AWS::ElasticLoadBalancingV2::TargetGroup": lambda self, group: get_backend("elbv2")[self._account_id][
        self._region_name
    ].target_groups.pop(group.physical_resource_id, None),
}


@mended(parsing.ResourceMap, "_delete_resource")
def _(old, self, parsed_resource, resource_json):
    """Everything that a stack made ends with it."""
    delete = DELETE.get(resource_json["Type"])
    if delete:
        delete(self, parsed_resource)
    else:
        old(self, parsed_resource, resource_json)


warnings.simplefilter("ignore")
main(["-H", "127.0.0.1", "-p", sys.argv[1]])
