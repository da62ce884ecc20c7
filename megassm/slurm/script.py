"""The batch script of a run (see `megassm.commands.slurm`)."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from megassm.cli.arguments import STOPPED
from megassm.errors import UserError
from megassm.run.directory import CONFIG, JOB_CODE, JOB_ENDED, JOB_LOG, JOB_RANK_LOG, JOB_SETUP
from megassm.slurm.request import JobRequest

LAST_RESORT_S = 600
"""srun leaves the ranks this long, beyond parallel.timeout_s, after the first has left: the watchdog knows why."""


def batch_script(
    request: JobRequest, folder: Path, python: Path, cwd: Path, patience_s: int, data: Sequence[Path] = ()
) -> str:
    """The script of a job whose configuration and code are in `folder`; `patience_s` is parallel.timeout_s.

    Args:
        data: folders beside the run's and `cwd` that a container must see.

    Raises:
        UserError: a folder cannot be named to the container.
    """
    ranges, tasks, cpus = "-" in request.nodes, request.tasks_per_node, request.cpus_per_task
    options = {
        "job-name": f"megassm-{folder.parents[1].name}",
        "nodes": request.nodes,
        # of a range, sbatch would fix the number of tasks at that of the first start: a smaller one would never come
        **({"mincpus": tasks * (cpus or 1)} if ranges else {"ntasks-per-node": tasks, "cpus-per-task": cpus}),
        "gpus-per-node": None if request.own_gpus else request.gpus_per_node or None,
        "time": request.time,
        "signal": f"USR1@{request.save_before_s}",
        "chdir": cwd,
        "output": str(folder / JOB_LOG).replace("%", "%%"),
        "open-mode": "append",
    }
    given = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    again = "--requeue" if request.chain == 1 else "--no-requeue"
    head = "\n".join(f"#SBATCH {option}" for option in [*given, again, *(f"--{own}" for own in request.sbatch)])
    srun, command = _launch(request, python, [cwd, folder.parents[1], *data])
    return SCRIPT.format(
        head=head,
        folder=shlex.quote(str(folder)),
        code=JOB_CODE,
        config=CONFIG,
        setup=SETUP.format(file=JOB_SETUP) if request.setup else "",
        before=BEFORE.format(ended=JOB_ENDED, stopped=STOPPED) if request.chain > 1 else "",
        after=AFTER.format(ended=JOB_ENDED) if request.chain > 1 else REQUEUE.format(stopped=STOPPED),
        what_then="the next job of the chain" if request.chain > 1 else "the job is then requeued, and",
        srun="".join(f"  {option} \\\n" for option in srun),
        command=command,
        tasks=tasks,
        wait_s=patience_s + LAST_RESORT_S,
        stopped=STOPPED,
        save_before_s=request.save_before_s,
    )


def _launch(request: JobRequest, python: Path, folders: Sequence[Path]) -> tuple[list[str], str]:
    """(srun's options beside the tool's own, what each rank runs)."""
    options = [shlex.quote(f"--{option}") for option in request.srun]
    if request.logs == "label":
        options.append("--label")
    elif request.logs == "rank":
        options += [f'--output="${{JOB//%/%%}}/{JOB_RANK_LOG.format("%t")}"', "--open-mode=append"]
    kind, _, image = request.container.partition(":")
    if not image:
        return options, shlex.quote(str(python))
    for folder in folders:
        if set(str(folder)) & set(":,"):
            raise UserError(f"{folder}: --container cannot show a folder with ':' or ',' in its name to the ranks")
    own = [option.partition("=")[2] for option in request.srun if option.startswith("container-mounts=")]
    mounts = ",".join([f"{folder}:{folder}" for folder in dict.fromkeys(folders)] + own)
    if kind == "pyxis":
        options = [option for option in options if "--container-mounts=" not in option]
        options.append(f"--container-image={shlex.quote(image)} --container-mounts={shlex.quote(mounts)}")
        return options, "python3"
    gpu = "--nv " if request.gpus_per_node else ""
    return options, f'apptainer exec {gpu}--bind {shlex.quote(mounts)} --pwd "$PWD" {shlex.quote(image)} python3'


SETUP = """
# what the site needs: modules, environments, variables of NCCL
source "$JOB/{file}"
set +eu +o pipefail   # of this script, whatever that one has set
"""
BEFORE = """
# a chain of jobs, each after the one before: it goes on where that was stopped or lost, and not where it has ended
if [ -e "$JOB/{ended}" ]; then
  code=$(< "$JOB/{ended}")
  [ "$code" = {stopped} ] || {{ echo "--- the job before ended with code $code: nothing to continue"; exit "$code"; }}
  rm -f "$JOB/{ended}"
fi
"""
AFTER = """
echo "$code" > "$JOB/{ended}"
"""
REQUEUE = """
# not where SLURM is ending the job anyway (scancel, preemption), nor where it has started it elsewhere since
if [ "$code" = {stopped} ]; then
  job=$(scontrol show job -o "$SLURM_JOB_ID")
  if [[ $job == *" JobState=RUNNING "* && $job == *" Restarts=${{SLURM_RESTART_COUNT:-0}} "* ]]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
  fi
fi
"""
SCRIPT = """\
#!/usr/bin/env bash
# Made by `megassm slurm`. SIGUSR1 comes to every rank {save_before_s} s before the time is over: all finish the
# micro-batch, save, and exit with {stopped}; {what_then} continues from that checkpoint.
{head}

JOB={folder}
echo "--- job $SLURM_JOB_ID, restart ${{SLURM_RESTART_COUNT:-0}}, on $SLURM_JOB_NODELIST, $(date -u +%FT%TZ)"
{before}{setup}
export PYTHONPATH="$JOB/{code}${{PYTHONPATH:+:$PYTHONPATH}}"

# srun would give each rank one core, and takes --cpus-per-task from no batch job since 22.05: all that the job has here
cores=${{SLURM_CPUS_PER_TASK:-$((${{SLURM_CPUS_ON_NODE:-0}} / {tasks}))}}

# in the background, because bash runs a trap only between commands
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node={tasks} --ntasks=$((SLURM_JOB_NUM_NODES * {tasks})) \\
  --cpus-per-task=$((cores > 0 ? cores : 1)) \\
{srun}  --kill-on-bad-exit=0 --wait={wait_s} {command} -P -m megassm train --config "$JOB/{config}" &
ranks=$!
trap 'again=1; kill -USR1 $ranks' USR1   # scancel --batch --signal=USR1: srun hands it to the ranks
trap again=1 TERM                        # preemption, scancel: SLURM tells the ranks itself; wait for them
again=1
while [ $again = 1 ]; do again=0; wait $ranks; code=$?; done   # a signal ends `wait` early
echo "--- job $SLURM_JOB_ID: the ranks ended with code $code, $(date -u +%FT%TZ)"
{after}exit "$code"
"""
