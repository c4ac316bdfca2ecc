"""The user data in the launch templates, with the stack's values for an instance."""

from __future__ import annotations

import base64
import json
import re

import pytest

from batchlab.deploy import template as pool_templates
from batchlab.runtime import aws_deployment
from batchlab.runtime.aws_deployment import AwsDeployment, Database
from batchlab.server.autoscaling_api.launch_templates import MAX_USER_DATA
from tests.support.aws import cfn
from tests.support.aws.stack_shapes import RELEASE, SHAPES

TEMPLATE = cfn.load()
TEMPLATES = {"PoolTemplate": "worker", "ManagerTemplate": "manager"}


def script(shape: cfn.Rendered, name: str) -> str:
    data = shape.properties(name)["LaunchTemplateData"]["UserData"]
    return base64.b64decode(data).decode()


def deployed(text: str) -> AwsDeployment:
    """Return the deployment that the user data writes."""
    (found,) = re.findall(r"deployment\.json <<'END'\n(.*?)\nEND\n", text, re.S)
    return aws_deployment.parse(json.loads(found.replace("<Database.Endpoint.Port>", "5432")))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_nothing_is_left_to_fill_in_and_it_fits(shape: str, name: str) -> None:
    text = script(cfn.Rendered(TEMPLATE, **SHAPES[shape]), name)
    assert "${" not in text
    assert len(text.encode()) <= MAX_USER_DATA
    settings = dict(re.findall(r"^([A-Z_]+)='(.*)'$", text, re.M))
    assert settings["ROLE"] == TEMPLATES[name]
    assert settings["RELEASE"] == SHAPES[shape].get("Release", "")
    assert settings["CONTAINER_IMAGE"] == SHAPES[shape].get("ContainerImage", "")
    pools_image = SHAPES[shape].get("PoolImage", "")
    assert settings["POOL_IMAGE"] == (pools_image if TEMPLATES[name] == "worker" else "")
    assert deployed(text).pools[0].image == (pools_image or SHAPES[shape].get("ContainerImage", ""))
    group = "batchlab-manager" if name == "ManagerTemplate" else "batchlab-pool-default"
    assert settings["GROUP"] == group
    at = deployed(text)
    assert (at.stack, at.prefix, at.region) == ("batchlab", "batchlab-", "us-east-1")
    assert at.groups_prefix + at.pools[0].name == "batchlab-pool-default"


def test_manager_gets_the_address_of_its_ledger() -> None:
    shown = {name: cfn.Rendered(TEMPLATE, **shape) for name, shape in SHAPES.items()}
    found = {name: deployed(script(one, "ManagerTemplate")) for name, one in shown.items()}
    assert found["endpoints"].ledger == "sqlite"
    assert found["simpledb"].domain == "<LedgerDomain>"
    by_password = Database(
        "<Database.Endpoint.Address>", 5432, "batchlab", "<Database.MasterUserSecret.SecretArn>", ca="@DATABASE_CA@"
    )
    assert found["postgres"].database == by_password
    by_iam = found["own-network"].database
    assert by_iam is not None
    assert (by_iam.iam, by_iam.user) == (True, "batchlab_iam")
    assert found["endpoints"].token_secret == "<TokenSecret.Id>"


def test_manager_gets_every_pool_and_a_worker_its_own() -> None:
    template = pool_templates.expand(TEMPLATE, ["default", "big"])
    shape = cfn.Rendered(template, Release=RELEASE, PoolBigName="big", PoolBigSlots=4)
    default, big = deployed(script(shape, "ManagerTemplate")).pools
    assert (default.name, default.instance_type) == ("default", "m7i.large")
    assert (big.name, big.slots) == ("big", 4)
    assert deployed(script(shape, "PoolBigTemplate")).pools == (big,)


def test_each_pool_has_its_own_image_and_the_manager_has_none() -> None:
    template = pool_templates.expand(TEMPLATE, ["default", "big"])
    parameters = {"PoolBigName": "big", "PoolBigImage": "me/tools:1", "ContainerImage": "me/grid:1", "Egress": "nat"}
    shape = cfn.Rendered(template, Release=RELEASE, **parameters)
    images = {}
    for name in ("PoolTemplate", "PoolBigTemplate", "ManagerTemplate"):
        settings = dict(re.findall(r"^([A-Z_]+)='(.*)'$", script(shape, name), re.M))
        images[name] = settings["CONTAINER_IMAGE"], settings["POOL_IMAGE"]
    assert images == {
        "PoolTemplate": ("me/grid:1", ""),
        "PoolBigTemplate": ("me/grid:1", "me/tools:1"),
        "ManagerTemplate": ("me/grid:1", ""),
    }
    default, big = deployed(script(shape, "ManagerTemplate")).pools
    assert (default.image, big.image) == ("me/grid:1", "me/tools:1")


def test_only_a_role_whose_instances_have_an_image_may_pull() -> None:
    template = pool_templates.expand(TEMPLATE, ["default", "big"])
    shape = cfn.Rendered(template, Release=RELEASE, PoolBigName="big", PoolBigImage="me/tools:1", Egress="nat")
    pulls = {
        role: "ecr:GetDownloadUrlForLayer" in json.dumps(shape.properties(role)["Policies"])
        for role in ("PoolRole", "PoolBigRole", "ManagerRole")
    }
    assert pulls == {"PoolRole": False, "PoolBigRole": True, "ManagerRole": False}
