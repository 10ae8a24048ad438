"""The batch script: as a shell script, with stand-ins for what a cluster has, and in a real Slurm.

The real one has a single node with two GPUs that are not there. It is started by
../shared/local_slurm.sh where that exists; elsewhere a Slurm that already runs is used.
"""

import contextlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "run_vllm_sim.slurm"
LOCAL_SLURM = ROOT.parent / "shared" / "local_slurm.sh"
REAL_SLURM_COMMANDS = ("sbatch", "sinfo", "scancel", "slurmctld", "slurmd", "munged")
LINES = SCRIPT.read_text(encoding="ascii").splitlines()

SWEEP = shlex.split("--sweep --script capacity.py --workload 30,20 --seed 0,1 --quiet --out")
NO_CELL = "--cell or SLURM_ARRAY_TASK_ID 2: the sweep has cells 0 to 1"

THIS_PYTHON = f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n'

# A main.py that shows what reaches it and ends as it is told.
STAND_IN = """\
import os, sys
print("arguments", sys.argv[1:])
print("threads", os.environ.get("OMP_NUM_THREADS"), "marker", os.environ.get("MARKER"))
sys.exit(int(os.environ.get("STATUS", "0")))
"""


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")
    path.chmod(0o755)


def environment(bin_dir, **more):
    """Ours without anything of a cluster, and with this Python as python3."""
    env = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SRUN_", "BASH_")) and name not in ("MODULES", "MARKER")
    }
    executable(bin_dir / "python3", THIS_PYTHON)
    return env | {"PATH": f"{bin_dir}:{env['PATH']}", "OMP_NUM_THREADS": "1"} | more


def bash(cwd, *args, env, script=SCRIPT, **options):
    return subprocess.run(
        ["bash", str(script), *args],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        encoding="ascii",
        timeout=120,
        **options,
    )


@pytest.fixture
def place(tmp_path):
    """A directory with the script and the stand-in, and the environment to run it in."""
    work = tmp_path / "work dir"
    work.mkdir()
    (work / "main.py").write_text(STAND_IN, encoding="ascii")
    shutil.copy(SCRIPT, work)
    return work, tmp_path / "bin", environment(tmp_path / "bin")


# ---- the text ---------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
@pytest.mark.parametrize("name", ["run_vllm_sim.slurm", ".ci/run"])
def test_shellcheck_finds_nothing(name):
    done = subprocess.run(["shellcheck", name], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_options_come_before_the_first_command():
    """sbatch stops reading #SBATCH lines at the first line that is neither empty nor comment."""
    first = next(i for i, line in enumerate(LINES) if line.strip() and not line.startswith("#"))
    options = [i for i, line in enumerate(LINES) if line.startswith("#SBATCH")]
    assert options and max(options) < first
    assert LINES[first] == "set -euo pipefail"


def test_options_ask_for_one_gpu_and_leave_the_site_to_the_user():
    given = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", "\n".join(LINES), re.MULTILINE))
    asked = [given[name] for name in ("cpus-per-task", "mem", "time")]
    assert asked == ["2", "16G", "00:10:00"]  # more waits longer in a queue than it runs
    assert given["output"] == "%x_%j.out" and given["gres"] == "gpu:1"
    assert given["nodes"] == given["ntasks"] == "1"
    assert not {"partition", "account"} & given.keys()
    for name in ("partition", "account"):
        assert any(line.startswith(f"##SBATCH --{name}=") for line in LINES)


def test_header_says_how_to_submit():
    header = "\n".join(LINES[: LINES.index("")])
    assert "sbatch run_vllm_sim.slurm" in header


# ---- without Slurm ----------------------------------------------------------------------------


def test_main_runs_without_slurm(tmp_path):
    arguments = ("--scenario", "1", "--device", "cpu", "--quiet")
    done = bash(ROOT, *arguments, env=environment(tmp_path / "bin"))
    assert (done.returncode, done.stderr) == (0, "")
    host, _, rest = done.stdout.partition("\n")
    assert host.startswith("host ") and "job none" in host
    assert re.search(r"^GPU ", rest, re.MULTILINE)
    assert re.search(r"^python  3\.\d+\.\d+ .*, torch 2\.", rest, re.MULTILINE)
    assert "Scenario 1: " in rest and rest.endswith(" s\n") and "checks held" in rest


def test_bad_argument_gives_two(tmp_path):
    done = bash(ROOT, "--scenario", "5", env=environment(tmp_path / "bin"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "--scenario" in done.stderr


@pytest.mark.parametrize("status", [0, 1, 2, 130])
def test_exit_status_is_that_of_main(place, status):
    work, _, env = place
    assert bash(work, env=env | {"STATUS": str(status)}).returncode == status


def test_arguments_arrive_as_they_were_given(place):
    work, _, env = place
    given = ["--json", "a b.json", "*", "$HOME", "", "it's"]
    assert f"arguments {given}\n" in bash(work, *given, env=env).stdout


def test_script_called_from_elsewhere_finds_main(place, tmp_path):
    work, _, env = place
    done = bash(tmp_path, env=env, script=work / SCRIPT.name)
    assert done.returncode == 0 and "arguments []" in done.stdout


def test_copy_in_a_spool_directory_runs_where_it_was_submitted(place, tmp_path):
    """As slurmd does it: a copy with another name, started in another directory."""
    work, _, env = place
    spool = tmp_path / "spool"
    spool.mkdir()
    copy = shutil.copy(SCRIPT, spool / "slurm_script")
    done = bash(spool, env=env | {"SLURM_SUBMIT_DIR": str(work)}, script=copy)
    assert done.returncode == 0 and "arguments []" in done.stdout
    done = bash(spool, env=env | {"SLURM_SUBMIT_DIR": str(spool)}, script=copy)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "submit from the repository's root" in done.stderr


def test_venv_is_used_if_there_is_one(place):
    work, _, env = place
    venv = work / ".venv" / "bin"
    executable(venv / "python", THIS_PYTHON)
    activate = f"export MARKER=activated PATH={shlex.quote(str(venv))}:$PATH\n"
    (venv / "activate").write_text(activate, encoding="ascii")
    assert "marker activated" in bash(work, env=env).stdout


def test_a_sweep_runs_the_other_script_with_what_follows(place):
    work, _, env = place
    (work / "sweep.py").write_text(STAND_IN.replace("arguments", "sweep of"), encoding="ascii")
    done = bash(work, "--sweep", "--seed", "0,1", "a b", env=env | {"STATUS": "1"})
    assert done.returncode == 1 and "sweep of ['--seed', '0,1', 'a b']\n" in done.stdout
    assert "arguments ['--seed', '--sweep']\n" in bash(work, "--seed", "--sweep", env=env).stdout


def test_a_sweep_without_slurm_runs_one_cell_or_all(tmp_path):
    env = environment(tmp_path / "bin")
    sweep = (*SWEEP, str(tmp_path / "out"))
    done = bash(ROOT, *sweep, "--cell", "1", env=env)
    assert (done.returncode, done.stderr) == (0, "") and "cell 1: done, " in done.stdout
    done = bash(ROOT, *sweep, env=env)
    assert done.returncode == 0 and "cell 0: done, " in done.stdout
    assert "cell 1: done before" in done.stdout
    done = bash(ROOT, *sweep, env=env | {"SLURM_ARRAY_TASK_ID": "2"})
    assert done.returncode == 2
    assert done.stderr == f"sweep.py: error: {NO_CELL}\n"


def test_missing_torch_takes_one_line(place):
    work, bin_dir, env = place
    # -S: without site-packages.
    executable(bin_dir / "python3", THIS_PYTHON.replace('"$@"', '-S "$@"'))
    done = bash(work, env={k: v for k, v in env.items() if k != "PYTHONPATH"})
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "torch is missing" in done.stderr


def test_modules_that_are_not_there_are_passed_over(place):
    """The module function of some sites reads variables that are not set."""
    work, _, env = place
    function = '() {  if [ "$2" = cuda ]; then MARKER="loaded$UNSET"; export MARKER;'
    env |= {"MODULES": "nowhere cuda", "BASH_FUNC_module%%": function + " else return 1; fi\n}"}
    done = bash(work, env=env)
    assert done.returncode == 0
    assert "module nowhere: not loaded" in done.stdout and "marker loaded" in done.stdout
    assert bash(work, env=env | {"BASH_FUNC_module%%": "() {  return 1\n}"}).returncode == 0


def test_gpu_is_printed_and_a_broken_driver_is_no_hindrance(place):
    work, bin_dir, env = place
    executable(bin_dir / "nvidia-smi", '#!/bin/sh\necho "GPU 0: stand-in $1"\n')
    assert "GPU 0: stand-in -L\n" in bash(work, env=env).stdout
    executable(bin_dir / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    assert bash(work, env=env).returncode == 0


def test_srun_starts_it_in_a_job_but_not_in_a_step(place):
    work, bin_dir, env = place
    executable(
        bin_dir / "srun",
        '#!/bin/sh\necho "srun $1 $2 cpus $SRUN_CPUS_PER_TASK"\nshift 2\nexec "$@"\n',
    )
    assert "srun" not in bash(work, env=env).stdout
    del env["OMP_NUM_THREADS"]
    env |= {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "4", "STATUS": "2"}
    done = bash(work, "x y", env=env)
    assert done.returncode == 2
    assert "job 7" in done.stdout and "arguments ['x y']\nthreads 4" in done.stdout
    assert "srun --nodes=1 --ntasks=1 cpus 4\n" in done.stdout
    assert "srun" not in bash(work, env=env | {"SLURM_STEP_ID": "0"}).stdout


# ---- in a real Slurm --------------------------------------------------------------------------


def free_port():
    """One of two free ports in a row: slurmctld's; slurmd takes the next."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port
    raise RuntimeError("no two free ports in a row")


@pytest.fixture
def slurm(tmp_path):
    """(environment, options of sbatch, directory to submit from), for a Slurm that runs."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in REAL_SLURM_COMMANDS if not shutil.which(name, path=path)]
    if missing:
        pytest.skip(f"no Slurm here: {', '.join(missing)} not installed")
    if not LOCAL_SLURM.is_file():
        up = subprocess.run(["sinfo", "-h"], capture_output=True, text=True)
        if up.returncode or not up.stdout.strip():
            pytest.skip("Slurm is installed but not running (sinfo)")
        # The compute nodes see the checkout; they may see neither our /tmp nor have a free GPU.
        yield environment(tmp_path / "bin"), ["--gres=none", "--mem=4G"], ROOT
        return
    # Not in tmp_path: munged refuses a socket that other users cannot reach.
    place = tempfile.mkdtemp(prefix="slurm-")
    env = environment(
        tmp_path / "bin",
        SLURM_LOCAL_DIR=f"{place}/slurm",
        SLURM_LOCAL_PORT=str(free_port()),
        # Believed by Slurm though this machine may have less: two jobs fit at a time.
        SLURM_LOCAL_CPUS="8",
        SLURM_LOCAL_MEM_MB="65536",
        SLURM_LOCAL_GPUS="2",
    )
    env["PATH"] += ":/usr/sbin:/sbin"
    os.chmod(place, 0o755)
    work = tmp_path / "work dir"
    work.mkdir()
    for source in (SCRIPT, *ROOT.glob("*.py")):
        shutil.copy(source, work)
    shutil.copytree(ROOT / "vllm_sim", work / "vllm_sim")
    try:
        up = subprocess.run([LOCAL_SLURM, "start"], env=env, capture_output=True, text=True)
        if up.returncode:
            pytest.skip(f"Slurm does not start here: {up.stderr.strip().splitlines()[-1:]}")
        yield env | {"SLURM_CONF": f"{place}/slurm/slurm.conf"}, [], work
    finally:
        subprocess.run([LOCAL_SLURM, "stop", "purge"], env=env, capture_output=True)
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def submitted(slurm, *arguments):
    """A job that sbatch waits for; it is cancelled if it does not end."""
    env, options, work = slurm
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen(["sbatch", "-W", *options, *arguments], cwd=work, env=env, **pipes)
    try:
        yield job
    finally:
        if job.poll() is None:
            job.kill()
            subprocess.run(["scancel", *re.findall(r"\d+", job.communicate()[0])], env=env)


def number_of(job):
    """Of a job that has ended; a cluster's queue may take too long, one of our own may not."""
    try:
        told, errors = job.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        if LOCAL_SLURM.is_file():
            raise
        pytest.skip("the queue of this cluster did not run the job in time")
    number = re.search(r"^Submitted batch job (\d+)", told)
    assert number, errors
    return number[1]


@pytest.fixture
def output(slurm):
    """What a job printed into a file of the folder that it was submitted from."""
    paths = []

    def read(name):
        paths.append(slurm[2] / name)
        return paths[-1].read_text(encoding="ascii")

    yield read
    for path in paths:
        path.unlink(missing_ok=True)


def test_a_real_array_runs_a_sweep_that_is_merged(slurm, output):
    """Three tasks for two cells: the third has none, and says so."""
    work = slurm[2]
    options = ["--array=0-2", "--gres=none", "--cpus-per-task=1", "--output=array_%a.out"]
    try:
        with submitted(slurm, *options, SCRIPT.name, *SWEEP, "sweep-out") as job:
            number_of(job)
        assert job.returncode == 2
        for task, told in enumerate(["cell 0: done, exit code 0", "cell 1: done, exit code 0"]):
            assert told in output(f"array_{task}.out")
        assert f"error: {NO_CELL}\n" in output("array_2.out")
        done = subprocess.run(
            [sys.executable, "sweep.py", "--merge", *(work / "sweep-out").glob("*.json")],
            cwd=work,
            capture_output=True,
            text=True,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "2 of 2 cells held" in done.stdout
    finally:
        shutil.rmtree(work / "sweep-out", ignore_errors=True)


def test_real_jobs_print_to_their_files_and_end_as_main_does(slurm, output):
    """Two jobs at a time, as `sbatch -W` looks only every few seconds whether one has ended."""
    with (
        submitted(slurm, SCRIPT.name, "--scenario", "1", "--device", "cpu") as sound,
        submitted(slurm, SCRIPT.name, "--block-size", "0") as bad,
    ):
        for job, status in ((sound, 0), (bad, 2)):
            number = number_of(job)
            text = output(f"vllm-sim_{number}.out")
            assert job.returncode == status, text
            assert text.startswith("host ") and f"job {number}," in text
            if status == 0:
                assert "Scenario 1: " in text and " checks held, " in text
            else:
                assert "main.py: error: argument --block-size" in text
                assert "Traceback" not in text
