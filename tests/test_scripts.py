"""The experiment scripts: what they run, how they pass signals on, and what they ask SLURM for; with a stub for python."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
EXPERIMENTS = {
    "run_experiment": [
        "run_noisy_experiment.py",
        "args/noisy_coconut.yaml",
        "benchmark=gsm8k",
        "name=noisy_coconut_gsm8k",
        "num_questions=null",
    ],
    "run_simple_experiment": ["test.py", "args/noise_sweep.yaml", "noise_type=all", "name=noise_scale_all"],
    "run_branch_experiment": ["run_noisy_experiment.py", "args/noisy_coconut.yaml", "num_branches=5"],
}
# `python -c` counts GPUs; torchrun starts two workers; STUB says what a program does. In bash, which starts at once.
STUB = """#!/usr/bin/env bash
note() { local line; line=$(printf '%q ' "$@"); echo "$line" >> events; }

does=${STUB:-0} received=()
if [ "$1" = -c ]; then echo "${STUB_GPUS:-1}"; exit; fi
note called "${OMP_NUM_THREADS:-}" "$@"
if [ "$1" = -m ] && [ "$does" = wait ]; then
    trap 'note torchrun was signalled' TERM
    "$0" worker & "$0" worker & wait
    exit
fi
case $does in [0-9]) exit "$does" ;; esac
for name in USR1 INT HUP TERM; do trap "received+=($name)" "$name"; done
if [ "$does" = killed ]; then trap - TERM; fi
note ready
for ((left = 1000; left > 0; left--)); do # an end, should no signal come
    if [ ${#received[@]} != 0 ] && [ "$does" != deaf ]; then break; fi
    sleep 0.02
done
sleep 0.1
note received "${received[@]}"
"""
RECORDER = """#!/usr/bin/env bash
printf '%s\\n' "${0##*/}" "$@" > "$0.arguments"
echo "${ANSWER:-}"
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with nothing but the scripts and a stub for python, in a directory whose name has a space."""
    directory = tmp_path / "a repository"
    shutil.copytree(SCRIPTS, directory / "scripts")
    executable(directory / "stub", STUB)
    return directory


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def start(root: Path, script: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A script started from the directory above; ours is no SLURM job, whatever these tests run in."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "OMP_", "PROCESSES"))}
    return subprocess.Popen(
        [str(shutil.which("bash")), str(root / "scripts" / f"{script}.sh"), *arguments],
        cwd=root.parent,
        env={**kept, "PYTHON": str(root / "stub"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_signals,
    )


def heed_signals() -> None:
    """What runs in the background, or under nohup, ignores some: bash cannot trap a signal that was ignored when it began."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def run(root: Path, script: str, *arguments: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a script that ends by itself."""
    process = start(root, script, *arguments, **environment)
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def events(root: Path, kind: str) -> list[list[str]]:
    """What the stub noted of one kind: "called" with the number of threads and its arguments, "ready", "received"."""
    path = root / "events"
    lines = path.read_text().splitlines() if path.exists() else []
    return [words[1:] for words in map(shlex.split, lines) if words[0] == kind]


def stop(root: Path, process: subprocess.Popen[str], number: int, programs: int = 1) -> tuple[int, str]:
    """Send a signal once the programs wait for one, those of a terminal to the script's whole group; exit code, stdout."""
    try:
        for _ in range(6000):
            if len(events(root, "ready")) == programs:
                break
            time.sleep(0.01)
        (os.killpg if number in (signal.SIGINT, signal.SIGHUP) else os.kill)(process.pid, number)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "unbound" not in errors
    return process.returncode, output


def slurm(root: Path, **answers: str) -> dict[str, str]:
    """Stubs that record their arguments, and the environment of a batch job."""
    for name in ("sbatch", "scontrol", "squeue"):
        executable(root / "bin" / name, RECORDER.replace("${ANSWER:-}", answers.get(name, "")))
    return {"PATH": f"{root / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}


def recorded(root: Path, name: str) -> list[str] | None:
    path = root / "bin" / f"{name}.arguments"
    return path.read_text().splitlines()[1:] if path.exists() else None


def test_every_script_is_valid_bash():
    scripts = sorted(path for path in SCRIPTS.iterdir() if path.suffix in (".sh", ".sbatch"))
    assert {path.stem for path in scripts} >= {*EXPERIMENTS, "job"}
    for script in scripts:
        checked = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert (checked.returncode, checked.stderr) == (0, ""), script


@pytest.mark.parametrize("script", EXPERIMENTS)
def test_arguments_and_exit_code(root, script):
    further = ["args/other one.yaml", "name=a b", "seed=$(touch evaluated)", "x=`touch evaluated`; touch evaluated", "y=*"]
    code, _, errors = run(root, script, *further, STUB="3", OMP_NUM_THREADS="5")
    assert (code, errors) == (3, "")
    assert events(root, "called") == [["5", *EXPERIMENTS[script], *further]]
    assert not list(root.parent.rglob("evaluated"))


def test_benchmark_comes_from_the_environment(root):
    run(root, "run_experiment", BENCHMARK="math; touch evaluated")
    name = "math; touch evaluated"
    assert events(root, "called")[0][3:5] == [f"benchmark={name}", f"name=noisy_coconut_{name}"]


@pytest.mark.parametrize("given", [{"PROCESSES": "2"}, {"STUB_GPUS": "2"}])
def test_several_processes_run_under_torchrun(root, given):
    code, _, _ = run(root, "run_experiment", "seed=1", SLURM_CPUS_ON_NODE="9", **given)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert code == 0
    assert events(root, "called") == [["4", *torchrun, *EXPERIMENTS["run_experiment"], "seed=1"]]


@pytest.mark.parametrize(
    ("variable", "said"), [("OUT", "OUT must be below results/"), ("EXPERIMENT", "EXPERIMENT must be noise")]
)
def test_a_table_over_seeds_is_asked_for_rightly_before_anything_runs(variable: str, said: str) -> None:
    ended = subprocess.run(
        ["bash", SCRIPTS / "across_seeds.sh"], env={**os.environ, variable: "mine"}, capture_output=True, text=True, timeout=60
    )
    assert (ended.returncode, ended.stdout) == (2, "")
    assert said in ended.stderr


@pytest.mark.parametrize("processes", ["0", "two", "x[$(touch evaluated)]"])
def test_processes_must_be_a_number(root, processes):
    code, _, errors = run(root, "run_experiment", PROCESSES=processes)
    assert (code, errors) == (2, f"error: PROCESSES: {processes}: must be a whole number, at least 1\n")
    assert not list(root.parent.rglob("evaluated"))


def test_the_projects_environment_is_used_without_python(root):
    (root / "requirements.txt").touch()
    (root / "stub").rename(executable(root / ".venv" / "bin" / "python", ""))
    run(root, "run_simple_experiment", PYTHON="")
    install, program = (arguments for _, *arguments in events(root, "called"))
    assert install[:3] == ["-m", "pip", "install"]
    assert program == EXPERIMENTS["run_simple_experiment"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_signals_reach_the_program_as_one_sigterm(root, name):
    code, output = stop(root, start(root, "run_simple_experiment", STUB="wait"), signal.Signals[name])
    assert (code, events(root, "received")) == (0, [["TERM"]])
    assert output == "== stopped with exit code 0; the same command goes on from there\n"


def test_signals_reach_the_workers_of_torchrun(root):
    process = start(root, "run_simple_experiment", STUB="wait", PROCESSES="2")
    code, _ = stop(root, process, signal.SIGTERM, programs=2)
    assert (code, events(root, "received")) == (0, [["TERM"], ["TERM"]])
    assert events(root, "torchrun") == []


def test_training_on_this_machine(root):
    slurm(root)
    process = start(
        root, "train", "args/x.yaml", "name=a b", STUB="wait", PROCESSES="2", SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1"
    )
    code, _ = stop(root, process, signal.SIGTERM, programs=2)
    assert (code, events(root, "received")) == (0, [["TERM"], ["TERM"]])
    assert events(root, "called")[0][1:] == [
        *["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
        *["run.py", "args/x.yaml", "name=a b"],
    ]
    assert recorded(root, "scontrol") is None


def test_exit_code_of_a_program_that_the_signal_killed(root):
    code, output = stop(root, start(root, "run_branch_experiment", STUB="killed"), signal.SIGTERM)
    assert (code, events(root, "received")) == (128 + signal.SIGTERM, [])
    assert "exit code 143" in output


@pytest.mark.parametrize(
    ("state", "number", "queued"),
    [
        ("RUNNING", signal.SIGUSR1, True),
        ("RUNNING", signal.SIGTERM, True),
        ("", signal.SIGUSR1, True),
        ("COMPLETING", 15, False),
    ],
)
def test_a_stopped_job_is_queued_again_unless_it_was_cancelled(root, state, number, queued):
    environment = slurm(root, squeue=state)
    code, output = stop(root, start(root, "run_experiment", STUB="wait", **environment), number)
    assert (code, events(root, "received")) == (0, [["TERM"]])
    assert recorded(root, "squeue") == ["--noheader", "--jobs", "7", "--format", "%T"]
    assert recorded(root, "scontrol") == (["requeue", "7"] if queued else None)
    assert ("not queued again" in output) != queued


def test_a_job_that_does_not_end_is_killed_and_queued_again(root):
    process = start(root, "run_experiment", STUB="deaf", PATIENCE="0.2", **slurm(root, squeue="RUNNING"))
    assert stop(root, process, signal.SIGUSR1)[0] == 128 + signal.SIGKILL
    assert recorded(root, "scontrol") == ["requeue", "7"]


def test_a_job_that_ends_is_not_queued_again(root):
    assert run(root, "run_experiment", STUB="0", **slurm(root))[0] == 0
    assert recorded(root, "scontrol") is None


def test_a_job_queued_again_goes_on_instead_of_starting_over(root):
    run(root, "run_experiment", "fresh=true", SLURM_RESTART_COUNT="1", **slurm(root))
    assert events(root, "called")[0][-2:] == ["fresh=true", "fresh=false"]


@pytest.mark.parametrize("script", EXPERIMENTS)
def test_runs_from_slurms_copy(root, script):
    """SLURM runs a copy of the batch script, in the directory of the submission."""
    copy = shutil.copy(root / "scripts" / f"{script}.sh", root.parent / "slurm_script")
    environment = {**os.environ, "PYTHON": str(root / "stub")}
    subprocess.run(["bash", str(copy), "seed=1"], cwd=root, env=environment, check=True)
    assert events(root, "called")[0][1:] == [*EXPERIMENTS[script], "seed=1"]
    lines = Path(copy).read_text().splitlines()
    assert [line for line in lines if line.startswith("#SBATCH")] == [
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@120",
        "#SBATCH --open-mode=append",
    ]


@pytest.mark.parametrize("script", EXPERIMENTS)
def test_submission(root, script):
    environment = slurm(root, sbatch="Submitted batch job 8")
    wanted = {"PARTITION": "big gpu", "ACCOUNT": "lab", "GPUS": "3", "CPUS": "6", "TIME_LIMIT": "1:00:00"}
    code, output, errors = run(root, script, "--submit", "name=a b", **environment, **wanted)
    assert (code, output, errors) == (0, "Submitted batch job 8\n", "")
    assert recorded(root, "sbatch") == [
        *["--job-name", script, "--output", "logs/%x-%j.out", "--nodes", "1", "--ntasks", "1", "--cpus-per-task", "6"],
        *["--time", "1:00:00", "--gpus-per-node", "3", "--partition", "big gpu", "--account", "lab"],
        *[f"scripts/{script}.sh", "name=a b"],
    ]
    assert (root / "logs").is_dir()
    assert events(root, "called") == []


def test_submission_without_gpu_partition_and_account(root):
    run(root, "run_simple_experiment", "--submit", **slurm(root), GPUS="0")
    options = recorded(root, "sbatch")
    assert options is not None
    assert not {"--gpus-per-node", "--partition", "--account"} & {*options}
    assert options[-1] == "scripts/run_simple_experiment.sh"


def test_submission_where_there_is_no_slurm(root):
    (root / "bin").mkdir()
    (root / "bin" / "dirname").symlink_to(str(shutil.which("dirname")))
    code, _, errors = run(root, "run_experiment", "--submit", PATH=str(root / "bin"))
    assert (code, errors) == (2, "error: --submit: there is no sbatch here; without --submit it runs on this machine\n")


@pytest.mark.parametrize(("last", "code"), [("finished: 12 steps, checkpoints in x", 0), ("stopped by a signal at step 3", 1)])
def test_a_training_that_a_signal_stopped_is_not_taken_for_finished(tmp_path: Path, last: str, code: int) -> None:
    """run.py ends without an error then, so its log decides."""
    (tmp_path / "run.log").write_text(f"epoch 1\n\r   {last}\n")
    root = Path(__file__).resolve().parents[1]
    script = f'source {root}/scripts/environment.sh; whole "{tmp_path}/run.log"'
    ended = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert ended.returncode == code
    assert ("stopped before its end" in ended.stderr) == bool(code)
