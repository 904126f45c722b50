"""The manifests, as far as they can be checked without a cluster.

Kubernetes' own objects and the pod templates are checked against Kubernetes' schemas. No package has those of KubeRay:
`RAY_FIELDS` are the fields that the manifests may use, from the CRDs of KubeRay 1.6.2 and 1.7.0.
"""

import os
import subprocess
from copy import deepcopy

import kubernetes_validate
import pytest

from tests.deploy.recipes import (
    CRONJOB,
    KUBERNETES,
    ONE_MACHINE,
    PINNED,
    RAYCRONJOB,
    RAYJOB,
    ray_templates,
    template_of,
)

OBJECTS = [each for name, objects in KUBERNETES.items() if name != "kustomization.yaml" for each in objects]
RAY_FIELDS = {
    "RayCronJob": {"schedule": str, "timeZone": str, "jobTemplate": dict},
    "RayJob": {
        "entrypoint": str,
        "activeDeadlineSeconds": int,
        "preRunningDeadlineSeconds": int,
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": dict,
    },
    "rayClusterSpec": {"rayVersion": str, "authOptions": dict, "headGroupSpec": dict, "workerGroupSpecs": list},
    "authOptions": {"mode": str},
    "headGroupSpec": {"rayStartParams": dict, "template": dict},
    "workerGroupSpecs": {
        "groupName": str,
        "replicas": int,
        "minReplicas": int,
        "maxReplicas": int,
        "rayStartParams": dict,
        "template": dict,
    },
}


def check_fields(kind: str, value: dict) -> None:
    for name, inner in value.items():
        assert name in RAY_FIELDS[kind], f"{kind} has no {name}"
        assert type(inner) is RAY_FIELDS[kind][name], f"{kind}.{name} is {inner!r}"
        if name in RAY_FIELDS:
            for each in inner if isinstance(inner, list) else [inner]:
                check_fields(name, each)


def check(manifest: dict) -> None:
    if manifest["kind"] not in ("RayJob", "RayCronJob"):
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
        return
    assert manifest["apiVersion"] == "ray.io/v1"
    check_fields(manifest["kind"], manifest["spec"])
    job = manifest["spec"].get("jobTemplate", manifest["spec"])
    check_fields("RayJob", job)
    assert all(type(value) is str for value in job["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].values())
    for template in ray_templates(job):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "a"}, "template": template}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("manifest", OBJECTS, ids=lambda each: f"{each['kind']}-{each['metadata']['name']}")
def test_objects_have_the_fields_of_their_kind(manifest):
    check(manifest)


def broken(manifest: dict, *path: str | int, value: object) -> dict:
    copy = inner = deepcopy(manifest)
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return copy


HEAD = ("spec", "rayClusterSpec", "headGroupSpec")


@pytest.mark.parametrize(
    "manifest",
    [
        broken(RAYJOB, "spec", "concurrencyPolicy", value="Forbid"),
        broken(RAYJOB, "spec", "activeDeadlineSeconds", value="6h"),
        broken(RAYJOB, *HEAD, "rayStartParams", value={"num-cpus": 0}),
        broken(RAYJOB, *HEAD, "template", "spec", "containers", 0, "volumeMount", value=[]),
        broken(CRONJOB, "spec", "schedule", value=5),
        broken(CRONJOB, "spec", "jobTemplate", "spec", "retries", value=3),
    ],
)
def test_what_does_not_fit_would_be_noticed(manifest):
    with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
        check(manifest)


def test_a_night_is_the_same_whatever_starts_it():
    assert RAYCRONJOB["spec"]["jobTemplate"] == RAYJOB["spec"]
    schedules = {(each["spec"]["schedule"], each["spec"]["timeZone"]) for each in (RAYCRONJOB, CRONJOB, ONE_MACHINE)}
    assert len(schedules) == 1


def test_a_run_stops_itself_before_its_deadlines():
    job = RAYJOB["spec"]
    assert job["activeDeadlineSeconds"] > 5 * 3600
    outer = CRONJOB["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"]
    assert job["activeDeadlineSeconds"] + job["preRunningDeadlineSeconds"] < outer < 24 * 3600
    assert 5 * 3600 < ONE_MACHINE["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"] < 24 * 3600
    assert job["backoffLimit"] == 0  # KubeRay would retry whatever the exit code
    assert job["shutdownAfterJobFinishes"]
    assert {each["spec"]["concurrencyPolicy"] for each in (CRONJOB, ONE_MACHINE)} == {"Forbid"}


def test_ray_is_that_of_the_image_and_asks_for_a_token():
    cluster = RAYJOB["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == PINNED["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


PODS = [
    template["spec"] for template in (*ray_templates(RAYJOB["spec"]), template_of(CRONJOB), template_of(ONE_MACHINE))
]


@pytest.mark.parametrize("pod", PODS)
def test_pods_are_not_root_and_hold_no_credentials(pod):
    assert pod["securityContext"]["runAsNonRoot"]
    (container,) = pod["containers"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["resources"]["limits"]["memory"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    names = {variable["name"] for variable in container.get("env", [])}
    assert names <= {"JOB_NAME", "JOB_UID", "KUBECACHEDIR"}


def test_what_the_manifests_name_is_there():
    (kustomization,) = KUBERNETES["kustomization.yaml"]
    (generated,) = kustomization["configMapGenerator"]
    assert set(kustomization["resources"]) | set(generated["files"]) <= set(KUBERNETES)
    (container,) = template_of(CRONJOB)["spec"]["containers"]
    (volume,) = (each for each in template_of(CRONJOB)["spec"]["volumes"] if "configMap" in each)
    assert volume["configMap"]["name"] == generated["name"]
    (mount,) = (each for each in container["volumeMounts"] if each["name"] == volume["name"])
    assert f"{mount['mountPath']}/{generated['files'][0]}" in container["args"][0]
    made = {(each["kind"], each["metadata"]["name"]) for each in OBJECTS}
    for pod in PODS:
        assert ("ServiceAccount", pod["serviceAccountName"]) in made
        for each in pod["volumes"]:
            if "persistentVolumeClaim" in each:
                assert ("PersistentVolumeClaim", each["persistentVolumeClaim"]["claimName"]) in made


@pytest.mark.parametrize(
    ("states", "applied", "code"),
    [
        (["", "Initializing", "Running", "Complete"], 0, 0),
        (["Running", "Failed"], 0, 3),
        (["ValidationFailed"], 0, 3),
        ([], 1, 1),
    ],
)
def test_the_cronjob_ends_as_its_rayjob_does(states, applied, code, tmp_path):
    """Its shell script, with a kubectl that tells these states. 3 fails the Job, 1 is tried again."""
    (container,) = template_of(CRONJOB)["spec"]["containers"]
    rules = CRONJOB["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"]
    assert [rule["onExitCodes"]["values"] for rule in rules] == [[3]]
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    programs = {
        "kubectl": f"""
            case "$*" in
                patch*) for word; do echo "$word"; done ;;
                apply*) cat >applied; exit {applied} ;;
                *message*) echo "AppFailed: exit code 4" ;;
                *) head -n 1 states; sed -i 1d states ;;
            esac""",
        "sleep": "",
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_NAME": "trbert-nightly-1", "JOB_UID": "uid-1"}
    done = subprocess.run(
        [*container["command"], *container["args"]],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (code, "")
    assert ("exit code 4" in done.stdout) == (code == 3)
    owner = "{apiVersion: batch/v1, kind: Job, name: trbert-nightly-1, uid: uid-1}"
    assert owner in (tmp_path / "applied").read_text()
