"""`loopwright submit`: what it writes for SLURM, Kubernetes and Ray, and what it refuses."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from loopwright.framework.command_line.main import main
from loopwright.strategies.launch.environment import detect_environment

PAGE = Path(__file__).resolve().parents[2] / "docs" / "clusters.md"
# Whatever a shell, YAML, Kubernetes or Python could take for something else.
AWKWARD = [
    "--lr",
    "0.1",
    "two  words",
    "it's",
    '"$HOME" $(X) $$ `ls`',
    "ü 日本",
    "yes",
    "#1: {a}",
    "a\nb",
    "\\n",
]
ENV = 'it\'s "$HOME" $(X) {0} ü'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(
        "import json, os, sys\n"
        "print(json.dumps([sys.argv[1:], os.environ.get('A'), os.getcwd()]))\n"
    )
    return tmp_path


def written(capsys: pytest.CaptureFixture[str], words: str, *arguments: str) -> str:
    """What is printed for arguments: words, and others that may have spaces."""
    capsys.readouterr()
    assert main(["submit", *words.split(), *arguments]) == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(["submit", *arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def directives(script: str) -> list[str]:
    """The options for SLURM, without quotes."""
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    return [word for line in lines for word in shlex.split(line)[1:]]


def test_a_batch_script(capsys: pytest.CaptureFixture[str]) -> None:
    script = written(
        capsys,
        "--slurm --output - --nodes 2 --devices 4 --cpus_per_task 6 --mem 64G --time 30:0:0 --partition gpu",
        *["--account", "my lab", "--sbatch=--array=0-3", "--python", "py", "train.py"],
    )
    assert directives(script) == [
        "--job-name=train",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--cpus-per-task=6",
        "--mem=64G",
        "--time=1-06:00:00",
        "--partition=gpu",
        "--account=my lab",
        "--signal=SIGUSR1@120",
        "--requeue",
        "--open-mode=append",
        "--array=0-3",
    ]
    assert script.endswith("srun --kill-on-bad-exit=1 --cpus-per-task=6 py -u train.py\n")  # fmt: skip


def run_script(folder: Path, script: str, **env: str) -> list[Any]:
    """Run a batch script in bash, with an srun that runs the command once; returns what the program got."""
    srun = folder / "bin" / "srun"
    srun.parent.mkdir(exist_ok=True)
    srun.write_text(
        '#!/bin/bash\nwhile [[ $1 == -* ]]; do echo "$1" >> options; shift; done\nexec "$@"\n'
    )
    srun.chmod(0o755)
    scontrol = folder / "bin" / "scontrol"
    scontrol.write_text('#!/bin/bash\necho "$*" >> asked\necho n1; echo n2\n')
    scontrol.chmod(0o755)
    (folder / "script").write_text(script)
    path = f"{srun.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "script"],
        env={**os.environ, "PATH": path, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return [done.returncode, done.stdout, done.stderr]


def test_a_shell_hands_over_what_was_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = written(
        capsys, "--slurm", "--output", "-", "--env", f"A={ENV}", "--image", "a b", "--python", sys.executable,
        "train.py", *AWKWARD,
    )  # fmt: skip
    code, out, err = run_script(folder, script)
    assert code == 0, err
    assert json.loads(out) == [AWKWARD, ENV, str(folder)]
    assert "--container-image=a b" in (folder / "options").read_text().splitlines()


def test_a_container_without_scontrol_is_put_back_by_the_script(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = written(
        capsys, "--slurm", "--output", "-", "--image", "x", "--python", sys.executable, "train.py",
    )  # fmt: skip
    for status, asked in ((138, ["requeue 5_2"]), (1, [])):
        (folder / "asked").unlink(missing_ok=True)
        (folder / "train.py").write_text(f"raise SystemExit({status})")
        array = {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"}
        assert run_script(folder, script, SLURM_JOB_ID="7", **array)[0] == status
        file = folder / "asked"
        assert (file.read_text().splitlines() if file.exists() else []) == asked


def test_restarts_in_a_batch_job(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A launcher on each machine takes over, and meets the others on the first one."""
    script = written(
        capsys,
        "--slurm --output - --nodes 2 --devices 3 --cpu --max-restarts 2 --python echo -m pkg.train",
        "a b",
    )
    assert "--ntasks-per-node=1" in directives(script)
    assert not [option for option in directives(script) if "gpu" in option]
    code, out, err = run_script(folder, script, SLURM_JOB_ID="10007")
    assert code == 0, err
    assert out.split()[:4] == ["-m", "loopwright", "launch", "--processes"]
    meets = "--nnodes 2 --rdzv-id 10007- --rdzv-endpoint n1:15007"
    assert f"{meets} --max_restarts 2 --module -- pkg.train a b" in out


@pytest.mark.parametrize(
    ("written_as", "directive", "signal"),
    [
        ("90", "0-01:30:00", 120),
        ("90:30", "0-01:31:00", 120),
        ("1-2", "1-02:00:00", 120),
        ("1-2:3", "1-02:03:00", 120),
        ("2-00:00:30", "2-00:01:00", 120),
        ("0:5:0", "0-00:05:00", 30),
    ],
)
def test_times_are_slurms(
    written_as: str,
    directive: str,
    signal: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = written(capsys, "--slurm", "--output=-", "--time", written_as, "train.py")
    assert f"--time={directive}" in directives(script)
    assert f"--signal=SIGUSR1@{signal}" in directives(script)


def containers(manifest: Any) -> list[dict[str, Any]]:
    """All containers of a manifest."""
    if isinstance(manifest, list):
        return [found for item in manifest for found in containers(item)]
    if not isinstance(manifest, dict):
        return []
    found = manifest.get("containers", [])
    return found + [each for item in manifest.values() for each in containers(item)]


def expanded(text: str, env: dict[str, str]) -> str:
    """Fill in variables as Kubernetes does."""
    parts = re.split(r"(\$\$|\$\([^)]*\))", text)
    for index, part in enumerate(parts):
        if part == "$$":
            parts[index] = "$"
        elif part.startswith("$("):
            parts[index] = env.get(part[2:-1], part)
    return "".join(parts)


@pytest.mark.parametrize("kind", ["pytorchjob", "jobset"])
def test_a_manifest(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = written(
        capsys,
        f"--kubernetes --kind {kind} --output - --nodes 3 --devices 1 --image repo/x:1 --namespace on "
        "--volume data:/data --workdir /data --mem 8G --cpus-per-device 2 --time 1:0:0",
        *["--env", f"A={ENV}", "train.py", *AWKWARD],
    )
    manifest = yaml.safe_load(text)
    assert manifest["metadata"] == {"name": "train", "namespace": "on"}
    for container in containers(manifest):
        env = {each["name"]: expanded(each.get("value", ""), {}) for each in container["env"]}  # fmt: skip
        assert (env["A"], env["LOOPWRIGHT_JOB"]) == (ENV, "train")
        words = [expanded(word, env) for word in container["command"]]
        assert words == ["python", "-u", "train.py", *AWKWARD]
        assert container["workingDir"] == "/data"
        limits = {"nvidia.com/gpu": 1, "memory": "8Gi", "cpu": 2}
        assert container["resources"] == {"limits": limits}
        assert "/data" in [mount["mountPath"] for mount in container["volumeMounts"]]
    if kind == "pytorchjob":
        replicas = manifest["spec"]["pytorchReplicaSpecs"]
        assert [replicas[role]["replicas"] for role in ("Master", "Worker")] == [1, 2]
        assert manifest["spec"]["runPolicy"]["activeDeadlineSeconds"] == 3600
        assert replicas["Master"]["restartPolicy"] == "ExitCode"
        # The operator looks for a container of this name.
        assert {each["name"] for each in containers(manifest)} == {"pytorch"}


def test_a_jobsets_pods_join_each_other(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = written(
        capsys, "--kubernetes --kind jobset --output - --nodes 2 --image x train.py"
    )  # fmt: skip
    (container,) = containers(yaml.safe_load(text))
    for each in container["env"]:
        monkeypatch.setenv(each["name"], each.get("value", "1"))
    environment = detect_environment()
    assert environment is not None
    assert (environment.rank, environment.world_size, environment.node_rank) == (1, 2, 1)  # fmt: skip
    assert (environment.address, environment.port) == ("train-node-0-0.train", 29500)


@pytest.mark.parametrize("kind", ["pytorchjob", "jobset"])
def test_a_pod_with_several_devices_runs_a_launcher(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = written(
        capsys,
        f"--kubernetes --kind {kind} --output - --nodes 2 --devices 4 --max-restarts 5 --image x -m pkg.train",
        "$(RANK)",
    )
    assert "5" in text
    for container in containers(yaml.safe_load(text)):
        env = {"RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "7"}
        words = [expanded(word, env) for word in container["command"]]
        assert shlex.join(words) == (
            "python -m loopwright launch --processes 4 --nnodes 2 --node_rank 1 --master_addr a --master_port 7 "
            "--module -- pkg.train '$(RANK)'"
        )


def test_a_program_for_ray(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it passes to Ray is told by a package of that name that stands in for it."""
    text = written(
        capsys,
        "--ray --output - --nodes 2 --devices 4 --cpus-per-device 3 --max_restarts 2 --name it's",
        *["--env", f"A={ENV}", "train.py", *AWKWARD],
    )
    ast.parse(text)
    package = folder / "ray" / "train"
    package.mkdir(parents=True)
    tell = (
        "class Told:\n"
        "    def __init__(self, *args, **kwargs): print([kwargs[k] for k in sorted(kwargs) if 'config' not in k])\n"
    )
    (package.parent / "__init__.py").write_text(
        "import os\ndef init(runtime_env): os.environ.update(runtime_env['env_vars'])\n"
    )
    (package / "__init__.py").write_text(
        f"{tell}FailureConfig = RunConfig = ScalingConfig = Told\n"
    )
    (package / "torch.py").write_text(
        "class TorchTrainer:\n"
        "    def __init__(self, train, **kwargs): self.fit = lambda: train({})\n"
    )
    (folder / "program.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "program.py"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    *told, last = done.stdout.splitlines()
    assert told == ["[8, {'CPU': 3, 'GPU': 1}, True]", "[2]", '["it\'s"]']
    assert json.loads(last) == [AWKWARD, ENV, str(folder)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train.py", "name one of --slurm, --kubernetes and --ray"),
        ("--slurm --ray train.py", "name one of --slurm, --kubernetes and --ray"),
        ("--slurm", "name a program to start"),
        ("--slurm trian.py", "there is no file 'trian.py'"),
        ("--slurm --nodse 2 train.py", "there is no option '--nodse'; did you mean '--nodes'?"),
        ("--slurm --nodes 0 train.py", "--nodes/--nnodes/--num-machines: invalid integer from 1 value: '0'"),
        ("--slurm --time soon train.py", "--time/--time-limit: must be minutes, minutes:seconds"),
        ("--slurm --mem 64 train.py", "must be whole gigabytes, such as 64G; got '64'"),
        ("--slurm --env A train.py", "--env: must be NAME=value"),
        ("--slurm --sbatch nothing train.py", "--sbatch must be an option of sbatch"),
        ("--slurm --name a/b train.py", "--name must be one line without a slash; got 'a/b'"),
        ("--slurm --namespace a train.py", "--namespace has an effect with --kubernetes only, not with --slurm"),
        ("--ray --time 10 train.py", "--time has an effect with --slurm and --kubernetes only"),
        ("--kubernetes train.py", "--kubernetes needs --image"),
        ("--kubernetes --image x --partition a train.py", "--partition has an effect with --slurm only"),
        ("--kubernetes --image x --name A train.py", "at most 40 lower-case letters"),
        ("--kubernetes --image x --volume data train.py", "a PersistentVolumeClaim and an absolute path"),
        ("--slurm --run --output - train.py", "--run needs a file to submit"),
        ("--slurm --output none/x train.py", "none/x cannot be written"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_named(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refusal(capsys, *arguments.split())


def test_a_file_is_not_overwritten_unasked(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "sbatch train.sbatch" in written(capsys, "--slurm", "train.py")
    before = (folder / "train.sbatch").read_text()
    again = ["--slurm", "--nodes", "7", "train.py"]
    assert "train.sbatch is there already" in refusal(capsys, *again)
    assert (folder / "train.sbatch").read_text() == before
    monkeypatch.setenv("PATH", str(folder))
    assert "there is no program 'sbatch' here" in refusal(
        capsys, "--force", "--run", *again
    )
    assert "--nodes=7" in (folder / "train.sbatch").read_text()
    sbatch = folder / "sbatch"
    sbatch.write_text("#!/bin/sh\nexit 5\n")
    sbatch.chmod(0o755)
    assert main(["submit", "--force", "--run", *again]) == 5


def test_the_files_in_the_documentation_are_what_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PAGE.read_text(encoding="utf-8")
    pair = r"```bash\n(loopwright submit .*?)```\n+```\w+(?: notest)?\n(.*?)```"
    shown = re.findall(pair, text, re.DOTALL)
    assert len(shown) >= 4
    for command, file in shown:
        arguments = shlex.split(command.replace("\\\n", " "))[2:]
        got = written(capsys, "--output -", *arguments)
        assert got.replace(str(folder), "/shared/project") == file, command
