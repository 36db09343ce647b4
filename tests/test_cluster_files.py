"""The cluster files, checked without a cluster: by Ray's own validator, against a simulated AWS
account, and against the fields of KubeRay's RayJob. `ray up` itself is in test_ray_up.py."""

from __future__ import annotations

import copy
import json
import re
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from typer.testing import CliRunner

from snscc_ray.cli import app

ROOT = Path(__file__).resolve().parents[1]
FILES = ("cluster.yaml", "deploy/cluster-local.yaml")


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return loaded


def pinned() -> dict[str, str]:
    """Package name to version, from constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if "==" in line]
    return {name: version for name, version in pairs}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a check of a file went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize("name", FILES)
def test_ray_accepts_the_file(name: str) -> None:
    validate_config(prepare_config(load(name)))


def misspell(config: dict[str, Any], path: str) -> dict[str, Any]:
    """The config with the last key of `path` (a/b/c) misspelt."""
    config = copy.deepcopy(config)
    *parents, key = path.split("/")
    inner = config
    for parent in parents:
        inner = inner[parent]
    inner[key + "s"] = inner.pop(key)
    return config


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("cluster.yaml", "setup_commands"),
        ("cluster.yaml", "idle_timeout_minutes"),
        ("cluster.yaml", "auth/ssh_user"),
        ("cluster.yaml", "provider/security_group/GroupName"),
        ("cluster.yaml", "available_node_types/gpu_worker/min_workers"),
        ("deploy/cluster-local.yaml", "head_start_ray_commands"),
        ("deploy/cluster-local.yaml", "auth/ssh_private_key"),
    ],
)
def test_ray_refuses_a_misspelt_key(name: str, path: str) -> None:
    with pytest.raises(jsonschema.ValidationError, match=path.split("/")[-1] + "s"):
        validate_config(prepare_config(misspell(load(name), path)))


@pytest.mark.parametrize("name", FILES)
def test_token_authentication_is_on_everywhere(name: str) -> None:
    config = load(name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]
    assert any("RAY_AUTH_MODE=token" in c and "~/.bashrc" in c for c in config["setup_commands"])
    for kind in ("head", "worker"):
        starts = [c for c in config[f"{kind}_start_ray_commands"] if "ray start" in c]
        assert len(starts) == 1
        # Before `ray start` on the same line, so that it is in its environment.
        assert re.search(r"\bRAY_AUTH_MODE=token (\w+=\w+ )*ray start\b", starts[0])
    assert "disabled" not in (ROOT / name).read_text()


@pytest.mark.parametrize("name", FILES)
def test_the_dashboard_listens_on_loopback_only(name: str) -> None:
    (start,) = [c for c in load(name)["head_start_ray_commands"] if "ray start" in c]
    assert re.findall(r"--dashboard-host[= ](\S+)", start) == ["127.0.0.1"]


def test_both_files_set_a_machine_up_alike() -> None:
    aws, local = map(load, FILES)
    for field in ("setup_commands", "file_mounts", "rsync_exclude", "worker_start_ray_commands"):
        assert aws[field] == local[field]
    # The first autoscaler is needed for the local provider only.
    heads = [
        [c.replace("RAY_enable_autoscaler_v2=0 ", "") for c in config["head_start_ray_commands"]]
        for config in (aws, local)
    ]
    assert heads[0] == heads[1]


def test_no_limit_is_near_what_a_node_takes_to_come() -> None:
    """While a lost worker boots and installs, the others are idle and the run waits."""
    from ray.autoscaler.v2.instance_manager.config import InstanceReconcileConfig

    assert (
        "`Pending: … setting-up` | the node is installing | wait; the first time takes ten" in GUIDE
    )
    boot = 10 * 60.0
    aws, job = load("cluster.yaml"), load("deploy/rayjob.yaml")["spec"]
    idle = job["rayClusterSpec"]["autoscalerOptions"]["idleTimeoutSeconds"]
    words = ("twenty", aws["idle_timeout_minutes"])
    assert words == ("twenty", 20) and f"stop after {words[0]} idle minutes" in GUIDE
    (wait,) = re.findall(r"--wait (\d+)", GUIDE.split("## AWS")[1].split("## Your own")[0])
    setup = yaml.safe_load(job["runtimeEnvYAML"])["config"]["setup_timeout_seconds"]
    install = InstanceReconcileConfig().ray_install_status_timeout_s  # Ray's own, on AWS
    for limit in (60 * aws["idle_timeout_minutes"], idle, int(wait), setup, install):
        assert limit >= 2 * boot


def test_everything_that_is_installed_is_mounted() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    mounts = load("cluster.yaml")["file_mounts"]
    needed = {"pyproject.toml", "constraints.txt", project["project"]["readme"], "LICENSE"}
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    needed |= {package.rstrip("*") for package in packages}
    assert {mounts.get(f"~/snscc_ray/{name}") for name in needed} == needed
    assert all((ROOT / name).exists() for name in needed)


def test_versions_are_those_that_are_tested() -> None:
    versions = pinned()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (install,) = [c for c in load("cluster.yaml")["setup_commands"] if "pip install" in c]
    assert "--constraint ~/snscc_ray/constraints.txt" in install
    written = dict(re.findall(r'"([a-z]+)(?:\[\w+\])?==([\d.]+)"', install))
    assert written == {name: versions[name] for name in ("ray", "torch")}
    lowest = project["requires-python"].removeprefix(">=")
    assert f"python{lowest} -m venv" in " ".join(load("cluster.yaml")["setup_commands"])

    job = load("deploy/rayjob.yaml")["spec"]
    assert job["rayClusterSpec"]["rayVersion"] == versions["ray"]
    images = {c["image"] for c in containers(job)}
    tag = f"rayproject/ray:{versions['ray']}-py{lowest.replace('.', '')}"
    assert images == {f"{tag}-cpu", f"{tag}-gpu"}
    environment = yaml.safe_load(job["runtimeEnvYAML"])["pip"]
    assert environment["packages"] == [f"/snscc/snscc_ray-{project['version']}-py3-none-any.whl"]
    assert environment["pip_install_options"] == ["--constraint=/snscc/constraints.txt"]


# --- AWS --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def simulated_account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """cluster.yaml as Ray's AWS provider completes it in a simulated account that holds nothing but
    the stack of deploy/aws-account.yaml."""
    moto = pytest.importorskip("moto", reason="moto plays AWS")
    import boto3

    config = prepare_config(load("cluster.yaml"))
    with pytest.MonkeyPatch.context() as patch, moto.mock_aws():
        # Ray writes the SSH key of the cluster into the home folder.
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("AWS_ACCESS_KEY_ID", "simulated")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "simulated")
        boto3.client("cloudformation", config["provider"]["region"]).create_stack(
            StackName="snscc",
            TemplateBody=(ROOT / "deploy" / "aws-account.yaml").read_text(),
            Parameters=[{"ParameterKey": "SshFrom", "ParameterValue": "198.51.100.7/32"}],
            Capabilities=["CAPABILITY_NAMED_IAM"],
        )
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

        config = AWSNodeProvider.fillout_available_node_types_resources(config)
        yield AWSNodeProvider.bootstrap_config(config)


@pytest.fixture
def account(simulated_account: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy(simulated_account)


def launch(config: dict[str, Any], node_type: str) -> Any:
    """Start one node as Ray does and return the EC2 instance."""
    import boto3
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler.tags import TAG_RAY_NODE_NAME, TAG_RAY_USER_NODE_TYPE

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    node_config = config["available_node_types"][node_type]["node_config"]
    tags = {TAG_RAY_NODE_NAME: node_type, TAG_RAY_USER_NODE_TYPE: node_type}
    (node_id,) = provider.create_node(node_config, tags, 1)
    return boto3.resource("ec2", config["provider"]["region"]).Instance(node_id)


def test_a_cpu_head_leads_and_spot_gpus_work(account: dict[str, Any]) -> None:
    head, worker = (account["available_node_types"][name] for name in ("head", "gpu_worker"))
    assert account["head_node_type"] == "head"
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert worker["resources"]["GPU"] == 1 and worker["resources"]["CPU"] == 4
    assert (worker["min_workers"], worker["max_workers"]) == (0, account["max_workers"])
    assert account["provider"]["cache_stopped_nodes"] is False

    instances = launch(account, "head"), launch(account, "gpu_worker")
    assert [i.instance_lifecycle for i in instances] == [None, "spot"]
    profiles = [i.iam_instance_profile["Arn"].split("/")[-1] for i in instances]
    assert profiles == ["snscc-head", "snscc-worker"]


def test_on_demand_is_one_line_less(account: dict[str, Any]) -> None:
    lines = (ROOT / "cluster.yaml").read_text().splitlines()
    marked = [line for line in lines if "on-demand" in line]
    assert len(marked) == 1
    config = prepare_config(yaml.safe_load("\n".join(line for line in lines if line not in marked)))
    validate_config(config)
    node_config = config["available_node_types"]["gpu_worker"]["node_config"]
    before = account["available_node_types"]["gpu_worker"]["node_config"]
    assert before.keys() - node_config.keys() >= {"InstanceMarketOptions"}
    before.pop("InstanceMarketOptions")
    assert launch(account, "gpu_worker").instance_lifecycle is None


@pytest.mark.parametrize("node_type", ["head", "gpu_worker"])
@pytest.mark.parametrize(
    "path",
    ["InstanceType", "ImageId", "IamInstanceProfile", "BlockDeviceMappings/0/Ebs/VolumeSize"],
)
def test_ec2_refuses_a_misspelt_key_of_a_node(
    account: dict[str, Any], node_type: str, path: str
) -> None:
    from botocore.exceptions import ParamValidationError

    *parents, key = path.split("/")
    inner = account["available_node_types"][node_type]["node_config"]
    for parent in parents:
        inner = inner[int(parent)] if isinstance(inner, list) else inner[parent]
    inner[key + "s"] = inner.pop(key)
    with pytest.raises(ParamValidationError, match=f"{key}s"):
        launch(account, node_type)


def test_only_ssh_is_open_and_only_to_you(account: dict[str, Any]) -> None:
    for node_type in ("head", "gpu_worker"):
        (group,) = launch(account, node_type).security_groups
        assert group["GroupName"] == "snscc-ray"
        assert open_to_the_world(account, group["GroupId"]) == [("tcp", 22, 22, "198.51.100.7/32")]


def test_without_the_stack_ray_opens_ssh_only() -> None:
    from ray.autoscaler._private.aws.config import _create_default_inbound_rules

    extra = load("cluster.yaml")["provider"]["security_group"].get("IpPermissions", [])
    rules = _create_default_inbound_rules(["sg-1"], extra)
    assert [(r["FromPort"], r["ToPort"]) for r in rules if r.get("IpRanges")] == [(22, 22)]
    assert [r["UserIdGroupPairs"] for r in rules if not r.get("IpRanges")] == [
        [{"GroupId": "sg-1"}]
    ]


def open_to_the_world(config: dict[str, Any], group_id: str) -> list[tuple[Any, ...]]:
    """(protocol, first port, last port, addresses) of each rule that is not among the nodes."""
    import boto3

    group = boto3.resource("ec2", config["provider"]["region"]).SecurityGroup(group_id)
    found = []
    for rule in group.ip_permissions:
        assert all(pair["GroupId"] == group_id for pair in rule["UserIdGroupPairs"])
        ranges = [r["CidrIp"] for r in rule["IpRanges"]] + rule["Ipv6Ranges"]
        ports = rule.get("FromPort"), rule.get("ToPort")
        found += [(rule["IpProtocol"], *ports, addresses) for addresses in ranges]
    return found


def test_the_roles_may_do_what_is_needed_and_workers_no_more(account: dict[str, Any]) -> None:
    import boto3

    iam = boto3.resource("iam")
    allowed: dict[str, set[str]] = {}
    for role in ("snscc-head", "snscc-worker"):
        statements = [
            statement
            for policy in iam.Role(role).attached_policies.all()
            for statement in policy.default_version.document["Statement"]
        ]
        actions = [statement["Action"] for statement in statements]
        allowed[role] = {a for x in actions for a in ([x] if isinstance(x, str) else x)}
    bucket = {"s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject"}
    assert all(bucket <= actions for actions in allowed.values())
    assert all(action.startswith("s3:") for action in allowed["snscc-worker"])
    start = {"ec2:RunInstances", "ec2:TerminateInstances", "ssm:GetParameters", "iam:PassRole"}
    assert start <= allowed["snscc-head"]


# --- Kubernetes -------------------------------------------------------------------------------

FIELDS: dict[str, Any] = json.loads((ROOT / "tests" / "data" / "rayjob_fields.json").read_text())


def containers(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [c for group in groups for c in group["template"]["spec"]["containers"]]


def mistakes(value: Any, path: str, kind: str = "object") -> list[str]:
    """What the schema of the RayJob would refuse in `value`, as `path: why`."""
    if kind.startswith("array of "):
        if not isinstance(value, list):
            return [f"{path}: not a list"]
        inner = kind.removeprefix("array of ")
        return [m for item in value for m in mistakes(item, f"{path}[]", inner)]
    if path in FIELDS["objects"]:
        if not isinstance(value, dict):
            return [f"{path}: not an object"]
        schema = FIELDS["objects"][path]
        found = [f"{path}: {k} is missing" for k in schema["required"] if k not in value]
        for key, item in value.items():
            if key not in schema["fields"]:
                found.append(f"{path}: there is no field {key}")
            else:
                found += mistakes(item, f"{path}.{key}", schema["fields"][key])
        return found
    if kind.startswith("map of "):
        inner = kind.removeprefix("map of ")
        return [m for k, v in value.items() for m in mistakes(v, f"{path}.{k}", inner)]
    if kind.startswith("one of "):
        return [] if str(value) in kind.split()[2:] else [f"{path}: {value!r} is not {kind}"]
    types: dict[str, tuple[type, ...]] = {
        "string": (str,), "boolean": (bool,), "integer": (int,), "number": (int, float),
        "integer or string": (int, str), "object": (dict,),
    }  # fmt: skip
    right = isinstance(value, types[kind]) and (kind == "boolean" or not isinstance(value, bool))
    return [] if right else [f"{path}: {value!r} is not {kind}"]


def test_the_rayjob_has_no_field_that_kuberay_does_not_know() -> None:
    job = load("deploy/rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert mistakes(job["spec"], "spec") == []


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("entrypoints", "snscc", "spec: there is no field entrypoints"),
        ("ttlSecondsAfterFinished", "600", "'600' is not integer"),
        ("rayClusterSpec/authOptions/mode", "tokens", "'tokens' is not one of"),
        ("rayClusterSpec/headGroupSpec/rayStartParams/num-cpus", 0, "0 is not string"),
        ("rayClusterSpec/workerGroupSpecs/0/maxReplica", 4, "no field maxReplica"),
        ("rayClusterSpec/workerGroupSpecs/0/template/spec/containers/0/images", "x", "images"),
    ],
)
def test_a_wrong_field_of_the_rayjob_is_found(path: str, value: object, says: str) -> None:
    spec = load("deploy/rayjob.yaml")["spec"]
    *parents, key = path.split("/")
    inner: Any = spec
    for parent in parents:
        inner = inner[int(parent)] if isinstance(inner, list) else inner[parent]
    inner[key] = value
    (found,) = mistakes(spec, "spec")
    assert says in found


def test_the_rayjob_is_safe_and_cleans_up() -> None:
    job = load("deploy/rayjob.yaml")["spec"]
    cluster = job["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    assert job["shutdownAfterJobFinishes"] is True and job["ttlSecondsAfterFinished"] > 0
    assert cluster["enableInTreeAutoscaling"] is True
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] == 0 < group["maxReplicas"]
    head, worker = containers(job)
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == "1"
    for container in (head, worker):
        assert container["resources"]["limits"] == container["resources"]["requests"]


# --- The commands -----------------------------------------------------------------------------


GUIDE = (ROOT / "docs" / "cluster.md").read_text()


def test_every_option_of_the_commands_exists() -> None:
    """`snscc …` in the RayJob and in the guide uses options that `--help` names."""
    text = GUIDE.replace("\\\n", " ") + load("deploy/rayjob.yaml")["spec"]["entrypoint"]
    commands = re.findall(r"snscc (run|pack) ([^`\n]*)", text)
    assert {name for name, _ in commands} == {"run", "pack"}
    for name, arguments in commands:
        help_text = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        for option in re.findall(r"(?<!\S)--[a-z-]+", arguments):
            assert option in help_text, f"snscc {name} has no {option}"


def test_the_guide_names_what_there_is() -> None:
    for name in re.findall(r"\b(?:deploy/)?[a-z-]+\.(?:yaml|txt)\b", GUIDE):
        assert (ROOT / name).is_file(), name
    job = load("deploy/rayjob.yaml")
    images = {container["image"] for container in containers(job["spec"])}
    assert set(re.findall(r"rayproject/ray:\S+?(?=[`\s])", GUIDE)) <= images
    wheel = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["pip"]["packages"][0]
    assert set(re.findall(r"\S+\.whl", GUIDE)) == {f"--from-file=dist/{Path(wheel).name}"}
    assert f"rayjob {job['metadata']['name']}" in GUIDE
    quota = yaml.safe_load((ROOT / "cluster.yaml").read_text())["max_workers"] * 4  # vCPUs each
    assert set(re.findall(r"--desired-value (\d+)", GUIDE)) == {str(quota)}


def test_the_manifests_in_the_guide_belong_to_the_rayjob() -> None:
    (text,) = re.findall(r"kubectl apply -f - <<'END'\n(.*?)\nEND", GUIDE, flags=re.DOTALL)
    claim, pod = yaml.safe_load_all(text)
    volumes = load("deploy/rayjob.yaml")["spec"]["rayClusterSpec"]["headGroupSpec"]["template"][
        "spec"
    ]["volumes"]
    claims = {"persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}
    assert [v for v in volumes if claims.items() <= v.items()] == pod["spec"]["volumes"]
    assert mistakes(pod["spec"], "spec.rayClusterSpec.headGroupSpec.template.spec") == []
