"""Manifests for Kubernetes: a PyTorchJob of Kubeflow's training operator, or a JobSet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .job import PORT, Job
from .yaml_text import as_yaml

# A program that is told to end has so many seconds for it; Kubernetes' default is 30.
_GRACE_SECONDS = 120
# 128 + SIGUSR1, SIGUSR2 or SIGTERM: a program that was told to end, and has saved.
_TOLD_TO_END = [138, 140, 143]
# What a launcher is told of the other machines, and in which variables that stands.
_MEET = {
    "--node_rank": "RANK",
    "--master_addr": "MASTER_ADDR",
    "--master_port": "MASTER_PORT",
}


def manifest(job: Job) -> str:
    """Return the manifest of the kind that is asked for."""
    make = _jobset if job.kind == "jobset" else _pytorchjob
    return as_yaml(make(job))


def _pytorchjob(job: Job) -> dict[str, Any]:
    """A PyTorchJob: the operator gives each pod RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, by machine."""
    # After codes from 128 on, a pod is started again: a program that was told to end has such a code, one that has
    # failed has not.
    policy = "OnFailure" if job.max_restarts else "ExitCode"

    def replicas(count: int) -> dict[str, Any]:
        template = {"spec": _pod(job, "pytorch", [])}
        return {"replicas": count, "restartPolicy": policy, "template": template}

    by_role = {"Master": replicas(1)}
    if job.nodes > 1:
        by_role["Worker"] = replicas(job.nodes - 1)
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": _metadata(job),
        "spec": {
            "runPolicy": {
                "cleanPodPolicy": "Running",
                "activeDeadlineSeconds": job.seconds,
                "backoffLimit": job.max_restarts or None,
            },
            "pytorchReplicaSpecs": by_role,
        },
    }


def _jobset(job: Job) -> dict[str, Any]:
    """A JobSet of one indexed Job, whose pods find each other through the headless service that it has."""
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    env = [
        _variable("MASTER_ADDR", f"{job.name}-node-0-0.{job.name}"),
        _variable("MASTER_PORT", str(PORT)),
        _variable("WORLD_SIZE", str(job.nodes)),
        {"name": "RANK", "valueFrom": {"fieldRef": {"fieldPath": index}}},
    ]
    on_codes = {"operator": "In", "values": _TOLD_TO_END}
    on_eviction = [{"type": "DisruptionTarget", "status": "True"}]
    job_spec = {
        "parallelism": job.nodes,
        "completions": job.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "activeDeadlineSeconds": job.seconds,
        # A pod that was told to end is made again, and counts as no failure.
        "podFailurePolicy": {
            "rules": [
                {"action": "Ignore", "onExitCodes": on_codes},
                {"action": "Ignore", "onPodConditions": on_eviction},
            ]
        },
        "template": {"spec": {"restartPolicy": "Never", **_pod(job, "train", env)}},
    }
    failure_policy: dict[str, Any] = {"maxRestarts": job.max_restarts}
    if job.seconds:
        rule = {"action": "FailJobSet", "onJobFailureReasons": ["DeadlineExceeded"]}
        failure_policy["rules"] = [rule]
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(job),
        "spec": {
            "failurePolicy": failure_policy,
            "network": {"enableDNSHostnames": True, "subdomain": job.name},
            "replicatedJobs": [
                {"name": "node", "replicas": 1, "template": {"spec": job_spec}}
            ],
        },
    }


def _metadata(job: Job) -> dict[str, Any]:
    return {"name": job.name, "namespace": job.namespace}


def _pod(job: Job, container: str, env: list[dict[str, Any]]) -> dict[str, Any]:
    """A pod's specification, the same on all machines."""
    # A pod that is started again goes on with the run of this name.
    named = [_variable("LOOPWRIGHT_JOB", job.name)]
    own = [_variable(name, _literal(value)) for name, value in job.env.items()]
    # Loaders' workers hand batches over in shared memory, of which a container has 64 MB otherwise.
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}}
    ]
    for number, (claim, path) in enumerate(job.volumes):
        name = f"volume-{number}"
        mounts.append({"name": name, "mountPath": path})
        volumes.append({"name": name, "persistentVolumeClaim": {"claimName": claim}})
    return {
        "terminationGracePeriodSeconds": _GRACE_SECONDS,
        "containers": [
            {
                "name": container,
                "image": job.image,
                "command": _command(job),
                "workingDir": job.workdir,
                "env": [*env, *named, *own],
                "resources": _resources(job),
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }


def _command(job: Job) -> list[str]:
    """What a pod runs: the program, or where it has several devices, a launcher for them."""
    if job.devices == 1:
        return [_literal(word) for word in job.command]
    meet: list[str] = []
    if job.nodes > 1:
        meet = ["--nnodes", str(job.nodes)]
        # Kubernetes fills these in.
        for option, name in _MEET.items():
            meet += [option, f"$({name})"]
    # It is Kubernetes that starts processes again.
    alone = replace(job, max_restarts=0)
    program = len(job.program)
    words = alone.launcher(*meet)
    return [*words[:-program], *map(_literal, words[-program:])]


def _literal(text: str) -> str:
    """Keep Kubernetes from filling something in for a $ in ``text``."""
    return text.replace("$", "$$")


def _variable(name: str, value: str) -> dict[str, str]:
    return {"name": name, "value": value}


def _resources(job: Job) -> dict[str, Any] | None:
    limits: dict[str, Any] = {}
    if not job.cpu:
        limits["nvidia.com/gpu"] = job.devices
    if job.memory:
        limits["memory"] = f"{job.memory}Gi"
    if job.cpus_per_device:
        limits["cpu"] = job.cpus_per_device * job.devices
    return {"limits": limits} if limits else None
