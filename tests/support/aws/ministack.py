"""MiniStack with all services that a stack needs. The MiniStack of a grid has three services."""

from __future__ import annotations

import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from botocore.config import Config

from batchlab.adapters.aws.endpoint import Endpoint, session
from tests.support.aws import cfn
from tests.support.aws.emulators import Server, free_port, ministack_python

REGION = "us-east-1"
ACCOUNT = "000000000000"
ROOT = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
END_S = 30.0
CONDITIONS = Path(__file__).with_name("ministack_conditions.py")
MAX_INLINE_BYTES = 51_200
"""The maximum size of a template in a request."""


@dataclass(frozen=True)
class Plane:
    """An account at MiniStack. `ca` is the file with MiniStack's certificate if MiniStack uses TLS."""

    url: str
    ca: Path | None = None
    keys: Mapping[str, Any] = field(default_factory=lambda: ROOT)

    def client(self, service: str) -> Any:
        """Return a boto3 client that makes each call once."""
        verify = str(self.ca) if self.ca else None
        # The client ignores the user's proxies, because MiniStack runs on this machine.
        config = Config(retries={"total_max_attempts": 1}, proxies={})
        given: dict[str, Any] = dict(self.keys)
        make: Any = session(REGION).client
        return make(service, endpoint_url=self.url, verify=verify, config=config, **given)

    def role(self, name: str, session: str = "i-0123456789abcdef0") -> Plane:
        """Return the same account with the credentials of a role, as an instance with the role's profile has them."""
        arn = self.client("iam").get_role(RoleName=name)["Role"]["Arn"]
        given = self.client("sts").assume_role(RoleArn=arn, RoleSessionName=session)["Credentials"]
        keys = {
            "aws_access_key_id": given["AccessKeyId"],
            "aws_secret_access_key": given["SecretAccessKey"],
            "aws_session_token": given["SessionToken"],
        }
        return Plane(self.url, self.ca, keys)


class _TlsServer(Server):
    def __init__(self, command: Sequence[str], folder: Path, *, port: int, env: Mapping[str, str]) -> None:
        super().__init__(command, folder, port=port, env=env)
        self.endpoint = Endpoint(f"https://127.0.0.1:{port}")
        self._context = ssl.create_default_context(cafile=env["MINISTACK_SSL_CERT"])

    def _answers(self) -> bool:
        assert self.endpoint.url is not None
        try:
            with urllib.request.urlopen(self.endpoint.url, timeout=5, context=self._context):
                return True
        except urllib.error.HTTPError as error:
            error.close()
            return True
        except OSError:
            return False


@contextmanager
def served(folder: Path, *, enforces: bool = False, tls: bool = False) -> Iterator[Plane]:
    """Start MiniStack. With `enforces`, MiniStack checks the IAM policies of every caller except the root user, with
    the condition keys of `ministack_conditions`."""
    port = free_port()
    env = {
        "GATEWAY_PORT": str(port),
        "BIND_HOST": "127.0.0.1",
        "IOT_MTLS_ENABLED": "0",
        "LOG_LEVEL": "WARNING",
        "AUTH": str(enforces).lower(),
    }
    command = [str(ministack_python()), "-I", str(CONDITIONS)]
    if tls:
        cert, key = folder / "cert.pem", folder / "key.pem"
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=127.0.0.1",
                "-addext",
                "subjectAltName=IP:127.0.0.1",
                "-keyout",
                str(key),
                "-out",
                str(cert),
            ],
            check=True,
            capture_output=True,
        )
        env |= {"USE_SSL": "1", "MINISTACK_SSL_CERT": str(cert), "MINISTACK_SSL_KEY": str(key)}
        server: Server = _TlsServer(command, folder, port=port, env=env)
    else:
        server = Server(command, folder, port=port, env=env)
    try:
        server.start()
        assert server.endpoint.url is not None
        yield Plane(server.endpoint.url, cert if tls else None)
    finally:
        server.kill()


class Stack:
    """A stack at MiniStack. Each operation on the stack waits until its end."""

    def __init__(self, plane: Plane, name: str = "batchlab") -> None:
        self.plane = plane
        self.name = name
        self._api = plane.client("cloudformation")

    def create(self, template: cfn.Template, **parameters: Any) -> str:
        """Create the stack, and return its final status."""
        self._api.create_stack(**self._request(template, parameters))
        return self.ended()

    def update(self, template: cfn.Template, **parameters: Any) -> str:
        self._api.update_stack(**self._request(template, parameters))
        return self.ended()

    def change_set(self, name: str, template: cfn.Template, **parameters: Any) -> list[dict[str, Any]]:
        """Create a change set, and return its changes."""
        self._api.create_change_set(ChangeSetName=name, **self._request(template, parameters))
        named = {"ChangeSetName": name, "StackName": self.name}
        give_up_s = time.monotonic() + END_S
        while (told := self._api.describe_change_set(**named))["Status"] != "CREATE_COMPLETE":
            assert time.monotonic() < give_up_s, told
            time.sleep(0.05)
        return [one["ResourceChange"] for one in told["Changes"]]

    def execute(self, name: str) -> str:
        self._api.execute_change_set(ChangeSetName=name, StackName=self.name)
        return self.ended()

    def delete(self) -> str:
        identity = self.describe()["StackId"]
        self._api.delete_stack(StackName=self.name)
        return self.ended(identity)

    def describe(self, identity: str = "") -> dict[str, Any]:
        (found,) = self._api.describe_stacks(StackName=identity or self.name)["Stacks"]
        described: dict[str, Any] = found
        return described

    def ended(self, identity: str = "") -> str:
        give_up_s = time.monotonic() + END_S
        while (status := str(self.describe(identity)["StackStatus"])).endswith("IN_PROGRESS"):
            assert time.monotonic() < give_up_s, status
            time.sleep(0.05)
        return status

    def ids(self) -> dict[str, str]:
        """Return the physical id of each resource, and check that no id is made up."""
        told = self._api.describe_stack_resources(StackName=self.name)["StackResources"]
        found = {one["LogicalResourceId"]: one.get("PhysicalResourceId", "") for one in told}
        assert not {"", "unknown"} & set(found.values()), found
        return found

    def outputs(self) -> dict[str, str]:
        told = {o["OutputKey"]: o["OutputValue"] for o in self.describe().get("Outputs", [])}
        assert not {"", "unknown"} & set(told.values()), told
        return told

    def failures(self) -> dict[str, str]:
        """Return the reason of each failed resource."""
        events = self._api.describe_stack_events(StackName=self.name)["StackEvents"]
        return {
            event["LogicalResourceId"]: event.get("ResourceStatusReason", "")
            for event in events
            if event["ResourceStatus"].endswith("FAILED")
        }

    def _request(self, template: cfn.Template, parameters: Mapping[str, Any]) -> dict[str, Any]:
        body = cfn.body(template)
        told = {"TemplateBody": body} if len(body) <= MAX_INLINE_BYTES else self._lent(body)
        return {
            "StackName": self.name,
            **told,
            "Capabilities": ["CAPABILITY_IAM"],
            "Parameters": [{"ParameterKey": key, "ParameterValue": str(value)} for key, value in parameters.items()],
        }

    def _lent(self, body: str) -> dict[str, str]:
        s3 = self.plane.client("s3")
        s3.create_bucket(Bucket="templates")
        s3.put_object(Bucket="templates", Key="stack.json", Body=body.encode())
        return {"TemplateURL": f"{self.plane.url}/templates/stack.json"}
