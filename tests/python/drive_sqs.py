"""Drives an SQS endpoint with the vendor's own client, and checks what it answers."""

import json
import sys
import time

import boto3
from botocore.exceptions import ClientError

sqs = boto3.client(
    "sqs",
    endpoint_url=sys.argv[1],
    region_name="us-east-1",
    aws_access_key_id="test",
    aws_secret_access_key="test",
)


def refused(code, call, **arguments):
    try:
        call(**arguments)
    except ClientError as error:
        assert code in (error.response["Error"]["Code"], error.response["Error"].get("QueryErrorCode")), error
        print(f"refused as expected: {error.response['Error']['Code']}")
    else:
        raise AssertionError(f"{code} was expected")


dead = sqs.create_queue(QueueName="dead")["QueueUrl"]
arn = sqs.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": "2"})
jobs = sqs.create_queue(QueueName="jobs", Attributes={"RedrivePolicy": policy})["QueueUrl"]
assert sqs.get_queue_url(QueueName="jobs")["QueueUrl"] == jobs
assert sorted(sqs.list_queues()["QueueUrls"]) == sorted([jobs, dead])

attributes = {"kind": {"DataType": "String", "StringValue": "test"}}
sent = sqs.send_message(QueueUrl=jobs, MessageBody="hello", MessageAttributes=attributes)
entries = [{"Id": str(n), "MessageBody": f"body {n}"} for n in range(10)]
batch = sqs.send_message_batch(QueueUrl=jobs, Entries=entries)
assert len(batch["Successful"]) == 10 and not batch.get("Failed"), batch
print("sent 11 messages in 2 calls")

received = []
while len(received) < 11:
    answer = sqs.receive_message(
        QueueUrl=jobs,
        MaxNumberOfMessages=10,
        WaitTimeSeconds=1,
        VisibilityTimeout=2,
        MessageSystemAttributeNames=["All"],
        MessageAttributeNames=["All"],
    )
    received += answer["Messages"]
hello = next(message for message in received if message["Body"] == "hello")
assert hello["MessageId"] == sent["MessageId"]
assert hello["MessageAttributes"] == attributes
assert hello["Attributes"]["ApproximateReceiveCount"] == "1"
counts = sqs.get_queue_attributes(QueueUrl=jobs, AttributeNames=["All"])["Attributes"]
assert counts["ApproximateNumberOfMessagesNotVisible"] == "11", counts
print("received 11 messages, with their attributes")

handles = [{"Id": str(n), "ReceiptHandle": m["ReceiptHandle"]} for n, m in enumerate(received[:5])]
handles.append({"Id": "bad", "ReceiptHandle": "nonsense"})
deleted = sqs.delete_message_batch(QueueUrl=jobs, Entries=handles)
assert len(deleted["Successful"]) == 5 and deleted["Failed"][0]["Id"] == "bad", deleted
sqs.change_message_visibility(QueueUrl=jobs, ReceiptHandle=received[5]["ReceiptHandle"], VisibilityTimeout=0)
again = sqs.receive_message(QueueUrl=jobs, WaitTimeSeconds=1, MessageSystemAttributeNames=["All"])["Messages"][0]
assert again["MessageId"] == received[5]["MessageId"]
assert again["Attributes"]["ApproximateReceiveCount"] == "2"
print("deleted 5, released 1 and had it again")

# The third receive goes to the dead letters instead.
sqs.change_message_visibility(QueueUrl=jobs, ReceiptHandle=again["ReceiptHandle"], VisibilityTimeout=0)
assert "Messages" not in sqs.receive_message(QueueUrl=jobs, WaitTimeSeconds=0)
start = time.monotonic()
letter = sqs.receive_message(QueueUrl=dead, WaitTimeSeconds=5)["Messages"][0]
assert letter["MessageId"] == again["MessageId"] and time.monotonic() - start < 4
sqs.change_message_visibility(QueueUrl=dead, ReceiptHandle=letter["ReceiptHandle"], VisibilityTimeout=0)
sqs.start_message_move_task(SourceArn=arn)
moves = sqs.list_message_move_tasks(SourceArn=arn)["Results"]
assert moves[0]["Status"] == "COMPLETED" and moves[0]["ApproximateNumberOfMessagesMoved"] == 1, moves
print("a message received too often became a dead letter, and was moved back")

refused("AWS.SimpleQueueService.NonExistentQueue", sqs.send_message, QueueUrl=jobs + "x", MessageBody="x")
refused("AWS.SimpleQueueService.TooManyEntriesInBatchRequest", sqs.send_message_batch, QueueUrl=jobs,
        Entries=[{"Id": str(n), "MessageBody": "x"} for n in range(11)])
refused("AWS.SimpleQueueService.BatchEntryIdsNotDistinct", sqs.send_message_batch, QueueUrl=jobs,
        Entries=[{"Id": "1", "MessageBody": "x"}, {"Id": "1", "MessageBody": "y"}])
refused("AWS.SimpleQueueService.BatchRequestTooLong", sqs.send_message_batch, QueueUrl=jobs,
        Entries=[{"Id": str(n), "MessageBody": "x" * 600_000} for n in range(2)])
refused("InvalidMessageContents", sqs.send_message, QueueUrl=jobs, MessageBody="\uffff")
refused("InvalidParameterValue", sqs.send_message, QueueUrl=jobs, MessageBody="x" * 1_048_577)
refused("ReceiptHandleIsInvalid", sqs.delete_message, QueueUrl=jobs, ReceiptHandle="nonsense")
print("all as expected")
