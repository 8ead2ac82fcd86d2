"""What the exit code of train.py says, to whoever starts it: docs/train.md has the table."""

DONE = 0
FAILED = 1  # also: hangs, or another process has taken the folder over
MISTAKE = 2  # of the command line, the config or the data, told in one line
DIVERGED = 3
TOO_LARGE = 4  # chips have no memory for a run's first step: started again it fails again
PREEMPTED = 75  # saved; the same command goes on
