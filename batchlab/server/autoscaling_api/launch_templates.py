"""Launch templates and their versions from a TOML file, which may change while the server runs.

    [worker]
    default = 1                       # the version for `$Default`; 1 if it is left out

    [[worker.version]]                # version 1; the next such table is version 2
    command = ["my-worker", "--name", "{instance}", "--slots", "{slots}"]
    type = "m7i.large"
    slots = 2

The id of a template is derived from its name. The server reads the file again when the file has changed, so `$Latest`
is the latest version at every launch.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter
from pydantic import ValidationError as Malformed

from batchlab.core.errors import UsageError
from batchlab.core.job_definition import MAX_GPUS
from batchlab.core.model import Market, Pool
from batchlab.fleet.api_types import LaunchTemplate, Template, ValidationError

VARIABLE = "BATCHLAB_LAUNCH_TEMPLATE"
"""Environment variable of an instance with its launch template and version, such as `worker:1`.

A launcher uses the variable BATCHLAB_LAUNCH_TEMPLATE to find the fields of the template that the engine does not know.
"""

MAX_USER_DATA = 16 * 1024
"""Limit of user data in bytes, before the encoding in base64."""

_PLAIN_USER = re.compile(r"[1-9]\d*(:\d+)?")
"""A numeric user id other than root. Zeros at the start are not allowed, because Docker also reads 00 as root."""

_UNKNOWN = "You must use a valid fully-formed launch template. The specified launch template, with"


def _decode(text: str) -> str:
    try:
        data = base64.b64decode(text, validate=True)
        if len(data) > MAX_USER_DATA:
            raise ValueError(f"{len(data)} bytes of user data, but EC2 accepts at most {MAX_USER_DATA}")
        return data.decode()
    except (binascii.Error, UnicodeDecodeError) as error:
        raise ValueError("the user data is not base64-encoded text") from error


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Role(_Strict):
    """Role with the access keys that instances with this role get."""

    name: Annotated[str, Field(pattern=r"^[\w+=,.@-]{1,64}$")]
    access_key: str
    secret_key: str
    token: str = ""


class Version(_Strict):
    """One version of a launch template in the TOML file."""

    command: tuple[str, ...] = ()
    """Command of an instance that is a process. The placeholders {instance}, {group}, and {slots} are replaced."""
    image: str = ""
    """Image of an instance that is a container. The words of `command` are the arguments of the container."""
    network: str = "bridge"
    """Docker network of an instance that is a container."""
    user: str = "65534:65534"
    """User of the container's processes: "uid:gid"."""
    type: str = ""
    market: Market = Market.ON_DEMAND
    slots: Annotated[int, Field(ge=1)] = 1
    gpus: Annotated[int, Field(ge=0, le=MAX_GPUS)] = 0
    """GPUs of an instance. A container gets as many GPUs of its machine."""
    gpu_devices: bool = True
    """Whether containers get devices. Without devices, the GPUs are only declared."""
    boot_s: Annotated[float, Field(ge=0)] = 0.0
    env: dict[str, str] = {}
    system: bool = False
    """Whether the image boots an init system, as a machine does, and gets the privileges of a machine."""
    user_data: Annotated[str, AfterValidator(_decode)] = ""
    """Decoded user data, which the metadata service returns.

    The file contains the user data in base64, as EC2 requires.
    """
    role: Role | None = None
    """Role whose credentials the metadata service returns."""


class _Template(_Strict):
    default: Annotated[int, Field(ge=1)] = 1
    version: Annotated[tuple[Version, ...], Field(min_length=1)]


_FILE = TypeAdapter(dict[Annotated[str, Field(pattern=r"^[a-zA-Z0-9().\-/_]{3,128}$")], _Template])


def template_id(name: str) -> str:
    """Return the id of the template with the name `name`, in EC2's form."""
    return f"lt-{hashlib.sha256(name.encode()).hexdigest()[:17]}"


class TemplateFile:
    """Implementation of the Templates port on a file. Launchers also read fields for their own use from the file."""

    def __init__(self, path: Path, images: Collection[str] = ()) -> None:
        """Raise UsageError if the file cannot be read.

        If `images` is not empty, a version must use one of the images, a user other than root, and no `system`.
        """
        self._path = path
        self._images = frozenset(images)
        self._stamp = (0, 0)
        self._templates: Mapping[str, _Template] = {}
        self._read()

    def template(self, reference: LaunchTemplate) -> Template:
        version = self.referred(reference)
        name = self._name(reference)
        number = self._number(name, reference.version)
        return Template(
            LaunchTemplate(template_id(name), name, str(number)),
            version.type,
            version.market,
            version.slots,
            version.boot_s,
            (*version.env.items(), (VARIABLE, f"{name}:{number}")),
            version.gpus,
        )

    def launch_configuration(self, name: str) -> Template:
        """Raise ValidationError, because the endpoint does not support launch configurations.

        AWS also refuses new launch configurations.
        """
        raise ValidationError(f"Launch configuration name not found - {name}")

    def argv(self, pool: Pool, instance: str) -> Sequence[str]:
        """Return the command of the template from which the pool's instance is launched."""
        values = {"{instance}": instance, "{group}": pool.name, "{slots}": str(pool.slots)}

        def fill(word: str) -> str:
            for name, value in values.items():
                word = word.replace(name, value)
            return word

        return [fill(word) for word in self.launched(pool).command]

    def launched(self, pool: Pool) -> Version:
        """Return the version from which an instance of the pool is launched."""
        self._refresh()
        name, _, number = dict(pool.env)[VARIABLE].rpartition(":")
        return self._version(name, int(number))

    def referred(self, reference: LaunchTemplate) -> Version:
        """Return the version that `reference` names. Raise ValidationError if the version does not exist."""
        self._refresh()
        name = self._name(reference)
        return self._version(name, self._number(name, reference.version))

    def _version(self, name: str, number: int) -> Version:
        version = self._templates[name].version[number - 1]
        is_plain = _PLAIN_USER.fullmatch(version.user) and not version.system
        if self._images and (version.image not in self._images or not is_plain):
            raise ValidationError(
                f"This endpoint does not launch version {number} of template {name}, because its image, user, or "
                "system is not allowed. `asg serve --image` sets the allowed images."
            )
        return version

    def _name(self, reference: LaunchTemplate) -> str:
        if name := reference.launch_template_name:
            if name in self._templates:
                return name
            raise ValidationError(f"{_UNKNOWN} template name {name}, does not exist.")
        id_ = reference.launch_template_id
        for name in self._templates:
            if template_id(name) == id_:
                return name
        raise ValidationError(f"{_UNKNOWN} template ID {id_}, does not exist.")

    def _number(self, name: str, version: str) -> int:
        template = self._templates[name]
        if version in ("", "$Default"):
            return template.default
        if version == "$Latest":
            return len(template.version)
        if version.isdecimal() and 1 <= int(version) <= len(template.version):
            return int(version)
        raise ValidationError(f"{_UNKNOWN} template name {name} and version {version}, does not exist.")

    def _refresh(self) -> None:
        """Read the file again if the file has changed. Raise ValidationError if the file is invalid or missing."""
        try:
            if self._stamp_now() != self._stamp:
                self._read()
        except (OSError, UsageError) as error:
            raise ValidationError(str(error)) from error

    def _stamp_now(self) -> tuple[int, int]:
        stat = self._path.stat()
        return stat.st_mtime_ns, stat.st_size

    def _read(self) -> None:
        try:
            stamp = self._stamp_now()
            templates = _FILE.validate_python(tomllib.loads(self._path.read_text("utf-8")))
        except OSError as error:
            raise UsageError(
                f"{self._path} cannot be read: {error.strerror}.", remedy="Name an existing file that can be read."
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{self._path} is not TOML: {error}.", remedy="Correct that line.") from error
        except Malformed as error:
            first = error.errors()[0]
            place = ".".join(str(step) for step in first["loc"])
            raise UsageError(
                f"{self._path}: {place}: {first['msg']}.", remedy="docs/asg-endpoint.md shows the form of the file."
            ) from error
        for name, template in templates.items():
            if template.default > len(template.version):
                raise UsageError(
                    f"{self._path}: {name} does not have a version {template.default}.",
                    remedy="Set `default` to an existing version.",
                )
        self._stamp, self._templates = stamp, templates
