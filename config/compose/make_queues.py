"""Makes the queues in moto's server, which runs beside this. Making them again changes nothing."""

import json

import boto3

RETENTION_S = 14 * 24 * 60 * 60
# As queue.max_receives.
MAX_RECEIVES = 25

sqs = boto3.client(
    "sqs",
    endpoint_url="http://127.0.0.1:5000",
    region_name="us-east-1",
    aws_access_key_id="local",
    aws_secret_access_key="local",
)


def make(name, **attributes):
    attributes["MessageRetentionPeriod"] = str(RETENTION_S)
    return sqs.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"]


dead = make("refarch-dead")
arn = sqs.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
redrive = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": MAX_RECEIVES})
for lane in ("live", "bulk"):
    make("refarch-" + lane, RedrivePolicy=redrive)
