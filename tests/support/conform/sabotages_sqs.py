"""Changes of the behavior of SQS, one rule each, and the checks that must notice each change."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping

from tests.support.conform.proxy import Request, Response, Sabotage, Send


def _message_deletes_are_swallowed(request: Request, send: Send) -> Response:
    if request.action == "DeleteMessage":
        return Response(200, b"{}")
    return send(request)


def _bodies_are_ascii(request: Request, send: Send) -> Response:
    if request.action == "SendMessage":
        asked = request.json
        body = asked["MessageBody"].encode("ascii", "replace").decode()
        request.json = {**asked, "MessageBody": body}
    return send(request)


def _long_bodies_are_cut_off(request: Request, send: Send) -> Response:
    if request.action == "SendMessage":
        asked = request.json
        request.json = {**asked, "MessageBody": asked["MessageBody"][:200_000]}
    return send(request)


def _other(request: Request, action: str, **asked: object) -> Request:
    """Return a request of another action with the same headers."""
    target = {"x-amz-target": f"AmazonSQS.{action}"}
    headers = {**request.headers, **target}
    return Request("POST", request.path, headers, json.dumps(asked).encode())


def _a_heartbeat_deletes(request: Request, send: Send) -> Response:
    if request.action == "ChangeMessageVisibility":
        asked = request.json
        del asked["VisibilityTimeout"]
        return send(_other(request, "DeleteMessage", **asked))
    return send(request)


def _a_delete_empties_the_queue(request: Request, send: Send) -> Response:
    if request.action == "DeleteMessage":
        return send(_other(request, "PurgeQueue", QueueUrl=request.json["QueueUrl"]))
    return send(request)


def _creating_again_empties_the_queue(request: Request, send: Send) -> Response:
    if request.action == "CreateQueue":
        there = send(_other(request, "GetQueueUrl", QueueName=request.json["QueueName"]))
        if there.status == 200:
            send(_other(request, "PurgeQueue", QueueUrl=json.loads(there.body)["QueueUrl"]))
    return send(request)


def _a_queue_has_two_urls(request: Request, send: Send) -> Response:
    answer = send(request)
    if request.action == "GetQueueUrl":
        answer.body = answer.body.replace(b"127.0.0.1", b"localhost")
    return answer


def _a_missing_queue_is_empty(request: Request, send: Send) -> Response:
    answer = send(request)
    if b"NonExistentQueue" in answer.body or b"QueueDoesNotExist" in answer.body:
        return Response(200, b"{}")
    return answer


def _the_last_of_a_batch_is_lost(request: Request, send: Send) -> Response:
    if request.action != "SendMessageBatch":
        return send(request)
    asked = request.json
    *kept, lost = asked["Entries"]
    request.json = {**asked, "Entries": kept}
    answer = send(request)
    if answer.status == 200:
        told = json.loads(answer.body)
        told["Successful"].append({**told["Successful"][0], "Id": lost["Id"]})
        answer.body = json.dumps(told).encode()
    return answer


def _a_receive_gives_all_there_is(request: Request, send: Send) -> Response:
    if request.action == "ReceiveMessage":
        request.json = {**request.json, "MaxNumberOfMessages": 10}
    return send(request)


def _times_are_seconds(request: Request, send: Send) -> Response:
    answer = send(request)
    if request.action == "ReceiveMessage":
        answer.body = re.sub(rb'(Timestamp": "\d{10})\d{3}"', rb'\1"', answer.body)
    return answer


def _any_attributes_will_do(request: Request, send: Send) -> Response:
    answer = send(request)
    if request.action == "CreateQueue" and answer.status == 400:
        name = request.json["QueueName"]
        return Response(200, json.dumps({"QueueUrl": f"http://127.0.0.1/1/{name}"}).encode())
    return answer


def _receive_counts_stand_still(request: Request, send: Send) -> Response:
    answer = send(request)
    if request.action == "ReceiveMessage":
        told = json.loads(answer.body)
        for message in told.get("Messages") or ():
            message["Attributes"]["ApproximateReceiveCount"] = "1"
        answer.body = json.dumps(told).encode()
    return answer


def _visibility_never_changes(request: Request, send: Send) -> Response:
    if request.action.startswith("ChangeMessageVisibility"):
        return Response(200, b"{}")
    return send(request)


def _nothing_is_hidden(request: Request, send: Send) -> Response:
    if request.action == "ReceiveMessage":
        request.json = {**request.json, "VisibilityTimeout": 0}
    return send(request)


def _what_is_received_is_gone(request: Request, send: Send) -> Response:
    if request.action == "ReceiveMessage":
        request.json = {**request.json, "VisibilityTimeout": 40_000}
    return send(request)


def _delays_are_dropped(request: Request, send: Send) -> Response:
    if request.action.startswith("SendMessage"):
        request.body = re.sub(rb', "DelaySeconds": \d+', b"", request.body)
    return send(request)


def _nobody_waits(request: Request, send: Send) -> Response:
    if request.action == "ReceiveMessage":
        request.json = {**request.json, "WaitTimeSeconds": 0}
    return send(request)


def _nobody_is_woken(request: Request, send: Send) -> Response:
    if request.action == "ReceiveMessage":
        asked = request.json
        time.sleep(asked.get("WaitTimeSeconds", 0))
        request.json = {**asked, "WaitTimeSeconds": 0}
    return send(request)


def _there_are_no_dead_letters(request: Request, send: Send) -> Response:
    if request.action in ("CreateQueue", "SetQueueAttributes"):
        asked = request.json
        asked.get("Attributes", {}).pop("RedrivePolicy", None)
        request.json = asked
    return send(request)


def _attributes_never_change(request: Request, send: Send) -> Response:
    if request.action == "SetQueueAttributes":
        return Response(200, b"{}")
    return send(request)


def _purges_are_swallowed(request: Request, send: Send) -> Response:
    if request.action == "PurgeQueue":
        return Response(200, b"{}")
    return send(request)


def _failed_entries_are_not_told(request: Request, send: Send) -> Response:
    answer = send(request)
    if request.action.endswith("Batch") and answer.status == 200:
        answer.body = json.dumps({**json.loads(answer.body), "Failed": []}).encode()
    return answer


def _what_is_in_flight_is_not_counted(request: Request, send: Send) -> Response:
    answer = send(request)
    if request.action == "GetQueueAttributes":
        answer.body = re.sub(rb'(MessagesNotVisible": )"\d+"', rb'\1"0"', answer.body)
    return answer


def _a_missing_queue_is_an_outage(request: Request, send: Send) -> Response:
    answer = send(request)
    if b"NonExistentQueue" in answer.body or b"QueueDoesNotExist" in answer.body:
        return Response(500, b'{"__type": "InternalFailure"}')
    return answer


SQS_SABOTAGES: Mapping[str, tuple[Sabotage, set[str]]] = {
    "nobody is woken": (_nobody_is_woken, {"sqs-wake", "sqs-wake-due", "sqs-wake-given-back", "sqs-wait-partial"}),
    "bodies are ASCII": (_bodies_are_ascii, {"sqs-body"}),
    "the last of a batch is lost": (
        _the_last_of_a_batch_is_lost,
        {"sqs-batch-10", "sqs-batch-256k", "sqs-batch-told", "sqs-share"},
    ),
    "a receive gives all there is": (_a_receive_gives_all_there_is, {"sqs-receive-most"}),
    "times are seconds": (_times_are_seconds, {"sqs-times"}),
    "any attributes will do": (_any_attributes_will_do, {"sqs-create-different"}),
    "message deletes are swallowed": (_message_deletes_are_swallowed, {"sqs-delete"}),
    "receive counts stand still": (_receive_counts_stand_still, {"sqs-receive-count"}),
    "visibility never changes": (
        _visibility_never_changes,
        {"sqs-give-back", "sqs-extend", "sqs-port-round", "sqs-port-refused"},
    ),
    "long bodies are cut off": (_long_bodies_are_cut_off, {"sqs-body-256k"}),
    "a heartbeat deletes": (_a_heartbeat_deletes, {"sqs-change-expired", "sqs-give-back"}),
    "a delete empties the queue": (_a_delete_empties_the_queue, {"sqs-delete-foreign"}),
    "creating again empties the queue": (_creating_again_empties_the_queue, {"sqs-create-same"}),
    "a queue has two urls": (_a_queue_has_two_urls, {"sqs-queue-url"}),
    "a missing queue is empty": (_a_missing_queue_is_empty, {"sqs-queue-missing", "sqs-port-missing"}),
    "nothing is hidden": (_nothing_is_hidden, {"sqs-hidden", "sqs-receive-visibility"}),
    "what is received is gone": (_what_is_received_is_gone, {"sqs-redelivery"}),
    "delays are dropped": (_delays_are_dropped, {"sqs-delay", "sqs-delay-each"}),
    "nobody waits": (_nobody_waits, {"sqs-wait-empty"}),
    "there are no dead letters": (
        _there_are_no_dead_letters,
        {"sqs-dead-letter", "sqs-dead-letter-neighbours", "sqs-port-ensure"},
    ),
    "attributes never change": (_attributes_never_change, {"sqs-attributes-update", "sqs-port-ensure"}),
    "purges are swallowed": (_purges_are_swallowed, {"sqs-purge"}),
    "failed entries are not told": (
        _failed_entries_are_not_told,
        {"sqs-delete-batch-partial", "sqs-change-batch-partial"},
    ),
    "what is in flight is not counted": (_what_is_in_flight_is_not_counted, {"sqs-counts"}),
    "a missing queue is an outage": (_a_missing_queue_is_an_outage, {"sqs-queue-missing"}),
}
