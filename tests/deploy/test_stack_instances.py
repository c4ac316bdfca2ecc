"""The stack's groups and launch templates, compared with the needs of the fleet and of a booting instance."""

from __future__ import annotations

import base64
import json
import re

import pytest

from batchlab.adapters.aws.group_descriptions import DRAIN_HOOK, POOL_TAG, READY_HOOK, SLOTS_TAG, GroupParameters
from batchlab.core.model import Pool
from batchlab.runtime.aws_deployment import AwsDeployment, Database, parse
from tests.support.aws import cfn
from tests.support.aws.stack_shapes import RELEASE, SHAPES

TEMPLATE = cfn.load()
SHOWN = {name: cfn.Rendered(TEMPLATE, **shape) for name, shape in SHAPES.items()}


@pytest.fixture(params=SHOWN)
def shape(request: pytest.FixtureRequest) -> cfn.Rendered:
    return SHOWN[request.param]


def test_a_pool_is_the_group_that_the_fleet_takes_over(shape: cfn.Rendered) -> None:
    group = shape.properties("PoolGroup")
    pool = Pool("default", 0, 10, 2, boot_s=240.0)
    wanted = GroupParameters("batchlab-pool-{pool}").request("batchlab-pool-default", pool)
    assert group["AutoScalingGroupName"] == wanted["AutoScalingGroupName"]
    assert shape.properties("PoolTemplate")["LaunchTemplateName"] == "batchlab-pool-default"
    assert group["LifecycleHookSpecificationList"] == wanted["LifecycleHookSpecificationList"]
    assert group["TerminationPolicies"] == wanted["TerminationPolicies"]
    assert int(group["Cooldown"]) == wanted["DefaultCooldown"]
    assert group["HealthCheckGracePeriod"] == wanted["HealthCheckGracePeriod"]
    tags = {one["Key"]: one["Value"] for one in group["Tags"] if one["PropagateAtLaunch"]}
    assert (tags[POOL_TAG], tags[SLOTS_TAG]) == ("default", 2)
    assert (tags["batchlab.stack"], tags["batchlab.role"]) == ("batchlab", "worker")


def test_its_hooks_end_as_they_should() -> None:
    hooks = {
        one["LifecycleHookName"]: one["DefaultResult"]
        for one in SHOWN["empty"].properties("PoolGroup")["LifecycleHookSpecificationList"]
    }
    assert hooks == {READY_HOOK: "ABANDON", DRAIN_HOOK: "CONTINUE"}


def test_workers_are_spot_and_on_demand_of_several_types() -> None:
    policy = cfn.Rendered(
        TEMPLATE, PoolInstanceTypes="c7i.xlarge,c6i.xlarge", PoolOnDemandBase=2, PoolOnDemandPercent=25
    ).properties("PoolGroup")["MixedInstancesPolicy"]
    assert policy["LaunchTemplate"]["Overrides"] == [{"InstanceType": "c7i.xlarge"}, {"InstanceType": "c6i.xlarge"}]
    assert policy["InstancesDistribution"] == {
        "OnDemandAllocationStrategy": "prioritized",
        "OnDemandBaseCapacity": 2,
        "OnDemandPercentageAboveBaseCapacity": 25,
        "SpotAllocationStrategy": "price-capacity-optimized",
    }


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_one_to_four_types(count: int) -> None:
    types = ["m7i.large", "m7a.large", "m6i.large", "m6a.large"][:count]
    made = cfn.Rendered(TEMPLATE, PoolInstanceTypes=",".join(types)).properties("PoolGroup")
    overrides = made["MixedInstancesPolicy"]["LaunchTemplate"]["Overrides"]
    assert [override["InstanceType"] for override in overrides] == types


def test_nothing_runs_without_a_release() -> None:
    for name, one in SHOWN["empty"].of_type("AWS::AutoScaling::AutoScalingGroup").items():
        assert (one["MinSize"], one["MaxSize"]) == ("0", "0"), name
    running = cfn.Rendered(TEMPLATE, Release="a" * 64, PoolMin=1, PoolMax=7)
    manager, pool = running.properties("ManagerGroup"), running.properties("PoolGroup")
    sizes = {manager[size] for size in ("MinSize", "MaxSize", "DesiredCapacity")}
    assert sizes == {"1"}
    assert (pool["MinSize"], pool["MaxSize"]) == (1, 7)
    assert "DesiredCapacity" not in pool, "an update would undo what the manager has asked for"


def test_nothing_but_the_manager_scales(shape: cfn.Rendered) -> None:
    assert shape.of_type("AWS::AutoScaling::ScalingPolicy") == {}


def test_peak_is_scheduled_on_request() -> None:
    assert SHOWN["empty"].of_type("AWS::AutoScaling::ScheduledAction") == {}
    begins = SHOWN["endpoints"].properties("PoolPeakBegins")
    ends = SHOWN["endpoints"].properties("PoolPeakEnds")
    assert (begins["MinSize"], begins["Recurrence"]) == (2, "0 8 * * 1-5")
    assert (ends["MinSize"], ends["Recurrence"]) == (0, "0 18 * * 1-5")


def test_instances_give_credentials_by_token_only_and_encrypt(shape: cfn.Rendered) -> None:
    templates = shape.of_type("AWS::EC2::LaunchTemplate")
    assert len(templates) == 2
    for template in templates.values():
        data = template["LaunchTemplateData"]
        assert data["MetadataOptions"] == {
            "HttpEndpoint": "enabled",
            "HttpTokens": "required",
            "HttpPutResponseHopLimit": 1,
            "InstanceMetadataTags": "enabled",
        }
        (disk,) = data["BlockDeviceMappings"]
        assert (disk["Ebs"]["Encrypted"], disk["Ebs"]["VolumeType"]) == (True, "gp3")
        assert data["ImageId"].startswith("resolve:ssm:/aws/service/ami-amazon-linux-latest/al2023")
        assert data["InstanceInitiatedShutdownBehavior"] == "terminate"
        assert "KeyName" not in data


def told(shape: cfn.Rendered, template: str) -> AwsDeployment:
    """Return the deployment that an instance of that template reads."""
    encoded = shape.properties(template)["LaunchTemplateData"]["UserData"]
    script = base64.b64decode(encoded).decode()
    assert len(script) < 16 * 1024, "EC2 takes no more"
    text = script.partition("deployment.json <<'END'\n")[2].partition("\nEND\n")[0]
    return parse(json.loads(text.replace("<Database.Endpoint.Port>", "5432")))


def test_instances_get_the_outputs_of_the_stack(shape: cfn.Rendered) -> None:
    manager, worker = told(shape, "ManagerTemplate"), told(shape, "PoolTemplate")
    assert manager == worker, "with one pool"
    outputs = shape.outputs
    assert manager.stack == "batchlab"
    assert manager.bucket == outputs["Bucket"]
    assert manager.prefix == outputs["QueuePrefix"]
    assert manager.region == outputs["Region"]
    assert manager.token_secret == outputs["TokenSecret"]
    assert manager.log_group == outputs["LogGroup"]
    assert manager.ledger == outputs["Ledger"]
    assert manager.domain == outputs.get("Domain", "")
    assert manager.manager_group == shape.properties("ManagerGroup")["AutoScalingGroupName"]
    image = shape.parameter("PoolImage") or shape.parameter("ContainerImage")
    pool = Pool("default", 0, 10, 2, boot_s=90, instance_type="m7i.large", image=image)
    assert manager.pools == (pool,)
    group = shape.properties("PoolGroup")["AutoScalingGroupName"]
    assert f"{manager.groups_prefix}{pool.name}" == group


def test_instances_know_how_to_sign_in_to_the_store() -> None:
    by_password = told(SHOWN["postgres"], "ManagerTemplate").database
    by_iam = told(SHOWN["own-network"], "ManagerTemplate").database
    host, secret = "<Database.Endpoint.Address>", "<Database.MasterUserSecret.SecretArn>"
    ca = "@DATABASE_CA@"  # boot.sh inserts the release's certificates
    assert by_password == Database(host, 5432, "batchlab", secret, ca=ca)
    assert by_iam == Database(host, 5432, "batchlab", user="batchlab_iam", iam=True, ca=ca)
    assert told(SHOWN["endpoints"], "ManagerTemplate").database is None


@pytest.mark.parametrize(("template", "role"), [("Pool", "worker"), ("Manager", "manager")])
def test_instances_know_their_role_and_group(template: str, role: str) -> None:
    shape = SHOWN["endpoints"]
    encoded = shape.properties(f"{template}Template")["LaunchTemplateData"]["UserData"]
    script = base64.b64decode(encoded).decode()
    group = shape.properties(f"{template}Group")["AutoScalingGroupName"]
    for line in (f"ROLE='{role}'", f"GROUP='{group}'", f"RELEASE='{RELEASE}'"):
        assert line in script.splitlines()


def test_user_data_is_the_script_as_it_is() -> None:
    """The only differences are the values that Fn::Sub inserts in braces."""
    script = (cfn.stack_file().parent / "userdata.sh").read_text()
    for name in ("PoolTemplate", "ManagerTemplate"):
        data = TEMPLATE["Resources"][name]["Properties"]["LaunchTemplateData"]["UserData"]
        text, variables = data["Fn::Base64"]["Fn::Sub"]
        assert text == script
        known = {*variables, *TEMPLATE["Parameters"], *TEMPLATE["Resources"], *cfn.PSEUDO}
        assert set(re.findall(r"\$\{([^!}]*)\}", text)) <= known
