"""The manifests for KubeRay are what its CustomResourceDefinitions allow, and hold what makes a lost head no loss.

KUBERAY_CRD names the folder of the definitions (default: ../shared/kuberay, or beside the golden vectors).
"""

import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from cluster.__main__ import COMMANDS
from cluster.core.arguments import PretrainJob, SubmitCommand
from datapipe.core.cli import Page
from tests.support.golden import ROOT, golden_folder
from training.commands.recipe import read_with_recipe

MANIFESTS = sorted((ROOT / "cluster" / "docs" / "kuberay").glob("*.yaml"))


def definitions() -> Path:
    places = [os.environ.get("KUBERAY_CRD"), ROOT.parent / "shared" / "kuberay", golden_folder().parent / "kuberay"]
    folder = next((Path(place) for place in places if place and Path(place).is_dir()), None)
    if folder is None:
        pytest.skip("KubeRay's definitions absent")
    return folder


def closed(schema: Any) -> Any:
    """The schema of a definition as JSON schema that allows no other fields, as Kubernetes would drop them silently."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: closed(value) for name, value in schema.items() if not name.startswith("x-") and name != "format"}
    if schema.get("x-kubernetes-int-or-string"):
        made |= {"anyOf": [{"type": "integer"}, {"type": "string"}]}
    if isinstance(schema.get("properties"), dict) and "type" in schema and schema.get("type") == "object":
        keep = schema.get("x-kubernetes-preserve-unknown-fields")
        made["additionalProperties"] = closed(schema.get("additionalProperties", bool(keep)))
    return made


def mistakes(manifest: dict[str, Any]) -> list[str]:
    """What the definition of a manifest's kind and version does not allow."""
    kinds = {crd["spec"]["names"]["kind"]: crd for crd in map(yaml.safe_load, map(Path.read_text, sorted(
        definitions().glob("*.yaml"))))}  # fmt: skip
    versions = {one["name"]: one for one in kinds[manifest["kind"]]["spec"]["versions"]}
    version = versions[manifest["apiVersion"].rpartition("/")[2]]
    schema = closed(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # Kubernetes' own
    validator = jsonschema.Draft202012Validator(schema)
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


def containers(found: Any) -> Iterator[dict[str, Any]]:
    """All containers of a manifest."""
    if isinstance(found, dict):
        yield from found.get("containers", ())
        for value in found.values():
            yield from containers(value)
    elif isinstance(found, list):
        for value in found:
            yield from containers(value)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifest__is_what_kuberay_takes(path: Path) -> None:
    manifest = yaml.safe_load(path.read_text())
    assert mistakes(manifest) == []
    assert all({"limits", "requests"} <= one["resources"].keys() for one in containers(manifest))
    assert not [one for one in containers(manifest) for pair in one.get("env", ()) if "SECRET" in pair["name"]]


def test_mistakes__are_found() -> None:
    manifest = yaml.safe_load(next(path for path in MANIFESTS if path.name == "rayjob.yaml").read_text())
    manifest["spec"]["backofLimit"] = manifest["spec"].pop("backoffLimit")
    manifest["spec"]["ttlSecondsAfterFinished"] = "soon"
    manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"][0].pop("template")
    found = "\n".join(mistakes(manifest))
    assert all(word in found for word in ("backofLimit", "'soon'", "'template' is a required property")), found


def test_ray_job__starts_anew_after_a_lost_head_and_with_a_command_that_is_one() -> None:
    spec = yaml.safe_load((ROOT / "cluster" / "docs" / "kuberay" / "rayjob.yaml").read_text())["spec"]
    assert spec["backoffLimit"] > 0 and spec["submitterConfig"]["backoffLimit"] > 0
    python, flag, module, times, command, *words = shlex.split(spec["entrypoint"])
    assert (python, flag, module) == ("python", "-m", "cluster.keep_alive") and int(times) > 0 and command in COMMANDS
    _, config = read_with_recipe(PretrainJob, words, Page("pretrain", ""))
    groups = {group["groupName"]: group for group in spec["rayClusterSpec"]["workerGroupSpecs"]}
    gpus = groups["gpus"]["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert config.cluster.max_workers == int(gpus) * groups["gpus"]["maxReplicas"]
    assert config.cluster.least_workers == int(gpus) * groups["gpus"]["minReplicas"]


def test_shared_cluster__has_room_for_many_commands_and_none_on_the_head() -> None:
    spec = yaml.safe_load((ROOT / "cluster" / "docs" / "kuberay" / "raycluster.yaml").read_text())["spec"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    drivers = next(group for group in spec["workerGroupSpecs"] if group["groupName"] == "drivers")
    asked = SubmitCommand(command="pretrain")
    memory = drivers["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]
    assert int(drivers["rayStartParams"]["num-cpus"]) >= 20  # one CPU each, as there are GPUs
    assert 2**30 * int(memory.removesuffix("Gi")) >= 20e9 * asked.driver_memory_gb
    assert json.dumps(spec).count('"IMAGE"') == 3
