"""The example of a Kubernetes Job: its parts agree, and its ranks get the time and the flags that Slurm gives."""

import re
from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[1] / "configs"
SERVICE, JOB = yaml.safe_load_all((CONFIGS / "kubernetes.yml").read_text())
POD = JOB["spec"]["template"]
CONTAINER = POD["spec"]["containers"][0]
COMMAND = CONTAINER["args"][0]


def flag(name: str, text: str = COMMAND) -> str:
    found = re.search(rf"{name} (\S+)", text)
    assert found, name
    return found[1]


def test_its_parts_agree():
    assert int(flag("--nnodes")) == JOB["spec"]["completions"] == JOB["spec"]["parallelism"]
    assert int(flag("--nproc-per-node")) == CONTAINER["resources"]["limits"]["nvidia.com/gpu"]
    name = JOB["metadata"]["name"]
    assert SERVICE["spec"]["selector"] == POD["metadata"]["labels"] == {"job-name": name}
    assert POD["spec"]["subdomain"] == SERVICE["metadata"]["name"]
    assert flag("--rdzv-endpoint") == f"{name}-0.{SERVICE['metadata']['name']}:{CONTAINER['ports'][0]['containerPort']}"
    env = {variable["name"]: variable["value"] for variable in CONTAINER["env"]}
    assert (CONFIGS.parent / env["CONFIG"]).is_file()
    mounted = {mount["name"]: mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in POD["spec"]["volumes"]} and mounted["runs"] == "/runs"


def test_its_ranks_have_the_time_and_the_flags_of_slurms():
    slurm = (CONFIGS / "slurm.sh").read_text()
    for name in ("--signals-to-handle", "--max-restarts", "--rdzv-backend", "--tee"):
        assert flag(name) == flag(name, slurm), name
    grace = int(flag("--shutdown-timeout"))
    assert f"checkpoint.grace_seconds={grace}" in COMMAND and f"grace={grace} " in slurm
    assert POD["spec"]["terminationGracePeriodSeconds"] > grace
    assert any(variable["name"] == "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" for variable in CONTAINER["env"])


@pytest.mark.parametrize("document", [SERVICE, JOB], ids=lambda document: document["kind"])
def test_it_is_what_kubernetes_takes(document):
    validator = pytest.importorskip("kubernetes_validate")  # pip install kubernetes-validate: the API's own schemas
    validator.validate(document, validator.latest_version(), strict=True)
