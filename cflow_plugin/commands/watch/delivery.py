"""Who is told of results: a webhook, a broker. Each has its own thread, which reads the journal as its queue."""

__all__ = ["Mqtt", "Receiver", "Webhook", "deliver", "receivers_of"]

import base64
import hashlib
import hmac
import json
import logging
import os
import threading
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit

from cflow_plugin.commands.watch.arrivals import Health
from cflow_plugin.commands.watch.journal import Journal, Result
from cflow_plugin.commands.watch.sources import without_password
from cflow_plugin.errors import CflowError, first_line

logger = logging.getLogger(__name__)

SECRET, PASSWORD = "CFLOW_PLUGIN_WEBHOOK_SECRET", "CFLOW_PLUGIN_MQTT_PASSWORD"
_ANSWER = 10.0  # seconds that a receiver has for its answer
_LONGEST = 60.0  # seconds between two attempts
_LOOK = 0.05


class Receiver(Protocol):
    """Somebody who is told of results.

    Attributes:
        name: Under which it is known in the journal.
    """

    name: str

    def send(self, identifier: str, message: bytes) -> None:
        """Tell of one result; returns when it has arrived.

        Args:
            identifier: The same whenever this result is sent again.
            message: The result as JSON.

        Raises:
            OSError: If it has not arrived, or may not have.
        """
        ...

    def close(self) -> None:
        """End the connection."""
        ...


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """What is moved would be asked for without the result."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


class Webhook:
    """A server that takes results by POST, signed as Standard Webhooks has it.

    Args:
        address: Of http or https.
        secret: Both sides know it.

    References:
        https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
    """

    def __init__(self, address: str, secret: str) -> None:
        if urlsplit(address).scheme not in {"http", "https"} or not urlsplit(address).hostname:
            message = f"--webhook takes an address that begins with http:// or https://, got {address}."
            raise CflowError(message)
        if not secret:
            message = f"Results are signed: put a secret that the server knows into the environment, as {SECRET}."
            raise CflowError(message)
        self.name = _name("webhook", address)
        self._address, self._secret = address, _key(secret)

    def send(self, identifier: str, message: bytes) -> None:
        """Post a result."""
        moment = str(int(time.time()))
        signed = f"{identifier}.{moment}.".encode() + message
        signature = base64.b64encode(hmac.new(self._secret, signed, hashlib.sha256).digest()).decode()
        headers = {
            "Content-Type": "application/json",
            "webhook-id": identifier,
            "webhook-timestamp": moment,
            "webhook-signature": f"v1,{signature}",
        }
        request = urllib.request.Request(self._address, message, headers)
        with _OPENER.open(request, timeout=_ANSWER):
            pass

    def close(self) -> None:
        """Nothing is open between two results."""


def _key(secret: str) -> bytes:
    """The bytes of a secret, which may be written as Standard Webhooks does, whsec_ and base64."""
    return base64.b64decode(secret.removeprefix("whsec_")) if secret.startswith("whsec_") else secret.encode()


class Mqtt:
    """A topic of an MQTT broker; each result is sent with the quality of service 1.

    Args:
        address: ``mqtt://user@host:port/topic``, or ``mqtts://`` with TLS.
        password: Of that user.
        name: Name of the client at the broker.
    """

    def __init__(self, address: str, password: str | None, name: str) -> None:
        try:
            from paho.mqtt import client, enums
        except ImportError as error:
            message = '--mqtt needs the package paho-mqtt: pip install "cflow-plugin[mqtt]"'
            raise CflowError(message) from error
        parts = urlsplit(address)
        self._topic = unquote(parts.path.strip("/"))
        is_topic = self._topic and "#" not in address and "+" not in self._topic
        if parts.scheme not in {"mqtt", "mqtts"} or not parts.hostname or not is_topic:
            shown = without_password(address)
            message = f"--mqtt takes mqtt://host/topic or mqtts://user@host:port/topic, got {shown}."
            raise CflowError(message)
        if parts.password:
            message = f"The password of --mqtt would be seen by others here: put it into the environment as {PASSWORD}."
            raise CflowError(message)
        self.name = _name("mqtt", address)

        def make() -> client.Client:
            made = client.Client(enums.CallbackAPIVersion.VERSION2, client_id=name)
            if parts.username:
                made.username_pw_set(unquote(parts.username), password)
            if parts.scheme == "mqtts":
                made.tls_set()
            return made

        self._make = make
        self._unsure = False  # whether the client may still hold what has not arrived, and would send it twice
        self._client = make()
        self._where = (parts.hostname, parts.port or (8883 if parts.scheme == "mqtts" else 1883))

    def send(self, identifier: str, message: bytes) -> None:
        """Publish a result, and wait until the broker has it."""
        if not self._client.is_connected() or self._unsure:
            self._connect()
        self._unsure = True
        sent = self._client.publish(self._topic, message, qos=1)
        try:
            sent.wait_for_publish(_ANSWER)
        except (RuntimeError, ValueError) as error:
            raise OSError(first_line(error)) from error
        if not sent.is_published():
            why = "the broker does not answer"
            raise OSError(why)
        self._unsure = False

    def _connect(self) -> None:
        self.close()
        self._client = self._make()
        self._client.connect(*self._where)
        self._client.loop_start()
        end = time.monotonic() + _ANSWER
        while not self._client.is_connected():
            if time.monotonic() > end:
                message = "the broker refuses the connection"
                raise OSError(message)
            time.sleep(_LOOK)

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()


def _name(kind: str, address: str) -> str:
    """A receiver's name, by which one knows it and which gives no secret of its address away."""
    return f"{kind} {urlsplit(address).hostname} {hashlib.sha256(address.encode()).hexdigest()[:8]}"


def receivers_of(webhook: str | None, mqtt: str | None, journal: Journal) -> list[Receiver]:
    """The receivers that a user has named; each is noted in the journal, so that it gets all results from now on.

    Args:
        webhook: Address of a server.
        mqtt: Address of a topic.
        journal: The journal.

    Raises:
        CflowError: If an address cannot be used.
    """
    found: list[Receiver] = []
    if webhook is not None:
        found.append(Webhook(webhook, os.environ.get(SECRET, "")))
    if mqtt is not None:
        found.append(Mqtt(mqtt, os.environ.get(PASSWORD), f"cflow-plugin-{journal.name[:8]}"))
    for receiver in found:
        journal.told(receiver.name)
    return found


def deliver(receiver: Receiver, path: Path, health: Health) -> threading.Thread:
    """Start to tell a receiver of all results that it does not have, in their order.

    Once ``health.ended`` is set, the thread ends when all is told, or at the first failure.

    Args:
        receiver: Who is told.
        path: The journal.
        health: What is wrong with the receiver is noted there.
    """

    def run() -> None:
        journal = Journal(path)
        number, wait = journal.told(receiver.name), 1.0
        while True:
            is_last_look = health.ended.is_set()
            results = journal.after(number)
            if not results:
                if is_last_look:
                    break
                health.ended.wait(_LOOK)
            for result in results:
                try:
                    receiver.send(f"{journal.name}-{result.number}", _message(journal.name, result))
                    journal.tell(receiver.name, result.number)
                except (OSError, HTTPException) as error:
                    what = f"{error.code} {error.reason}" if isinstance(error, HTTPError) else first_line(error)
                    waiting = journal.last - number
                    said = f"{receiver.name.rsplit(' ', 1)[0]}: {what}; {waiting} results wait for it on disk."
                    if receiver.name not in health.receivers:
                        logger.warning("%s", said)
                    health.receivers[receiver.name] = said
                    if health.ended.wait(wait):
                        journal.close()
                        receiver.close()
                        return
                    wait = min(2 * wait, _LONGEST)
                    break
                if health.receivers.pop(receiver.name, None):
                    logger.info("%s answers again.", receiver.name.rsplit(" ", 1)[0])
                number, wait = result.number, 1.0
        journal.close()
        receiver.close()

    thread = threading.Thread(target=run, name=receiver.name, daemon=True)
    thread.start()
    return thread


def _message(journal: str, result: Result) -> bytes:
    found = {"id": f"{journal}-{result.number}", **result._asdict(), "regions": json.loads(result.regions or "[]")}
    del found["stamp"]
    return json.dumps(found).encode()
