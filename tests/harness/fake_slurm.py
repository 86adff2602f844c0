"""As much of SLURM as a job needs: sbatch, srun, squeue and scontrol as commands of this machine.

A job runs at once, as a process; `scontrol requeue` runs its script again when it has ended.
"""

import os
import signal
import time
from pathlib import Path

SBATCH = """#!/bin/bash
spool={spool}
[ -e $spool/refusing ] && {{ echo "sbatch: error: Invalid partition" >&2; exit 1; }}
id=$(($(ls $spool | grep -c 'script$') + 1))
cp "$1" $spool/$id.script
touch $spool/$id.alive
SLURM_JOB_ID=$id setsid $spool/begin $id > /dev/null 2>&1 &
echo "Submitted batch job $id"
"""
BEGIN = """#!/bin/bash
spool={spool}
touch $spool/$1.requeued
while [ -e $spool/$1.requeued ]; do
    rm $spool/$1.requeued
    touch $spool/$1.alive
    echo begun >> $spool/$1.begun
    bash $spool/$1.script
    rm $spool/$1.alive
done
"""
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do
    case "$1" in
        --unbuffered) shift ;;
        --output) output="${{2//%j/$SLURM_JOB_ID}}"; shift 2 ;;
        --error) error="${{2//%j/$SLURM_JOB_ID}}"; shift 2 ;;
        *) exit 64 ;;
    esac
done
echo $$ > {spool}/$SLURM_JOB_ID.pid
# The shell is replaced, so that this is the process that a signal to the job step reaches.
SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_JOB_NUM_NODES=1 SLURM_JOB_NODELIST=here \\
    exec "${{@//%j/$SLURM_JOB_ID}}" >> "${{output//%t/0}}" 2>> "${{error//%t/0}}"
"""
SQUEUE = """#!/bin/bash
cd {spool}
for alive in *.alive; do
    [ -e "$alive" ] && echo "RUNNING $(sed -n 's/^#SBATCH --job-name=//p' ${{alive%.alive}}.script)"
done
exit 0
"""
SCONTROL = """#!/bin/bash
[ "$1" = requeue ] && touch {spool}/$2.requeued
"""
COMMANDS = {"sbatch": SBATCH, "srun": SRUN, "squeue": SQUEUE, "scontrol": SCONTROL}


class FakeSlurm:
    """The commands in a folder to be put on PATH."""

    def __init__(self, folder: Path):
        self.bin, self.spool = folder / "bin", folder / "spool"
        self.bin.mkdir(parents=True)
        self.spool.mkdir()
        for path, text in {
            **{self.bin / name: text for name, text in COMMANDS.items()},
            self.spool / "begin": BEGIN,
        }.items():
            path.write_text(text.format(spool=self.spool))
            path.chmod(0o755)
        self.path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"

    def script(self, job: int) -> str:
        return (self.spool / f"{job}.script").read_text()

    def begun(self, job: int) -> int:
        """How often the job has been begun."""
        path = self.spool / f"{job}.begun"
        return path.read_text().count("begun") if path.exists() else 0

    def preempt(self, job: int) -> None:
        """What SLURM does before a job's time is up."""
        os.kill(int((self.spool / f"{job}.pid").read_text()), signal.SIGUSR2)

    def wait(self, job: int, seconds: float = 300) -> None:
        """Until the job has ended for good."""
        end = time.monotonic() + seconds
        while (
            (self.spool / f"{job}.alive").exists() or (self.spool / f"{job}.requeued").exists() or not self.begun(job)
        ):
            assert time.monotonic() < end
            time.sleep(0.1)
