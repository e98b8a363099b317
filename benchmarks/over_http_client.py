"""vLLM's command line, imported once: run by vLLM's python, it needs nothing of ours. Each line that it reads is a
command, `{"words": [...], "log": PATH}`, run in a fork of this process, which differs from a start of its own by the
half minute that importing takes; each line that it writes is an exit status, the first one of the imports'.
"""

import json
import os
import sys
from contextlib import suppress

from vllm.entrypoints.cli.main import main

sys.argv = ["vllm", "--version"]  # imports all that commands need, and ends
answers, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
os.dup2(nothing, 1)
with suppress(SystemExit):
    main()
os.write(answers, b"0\n")
while line := sys.stdin.readline():
    told = json.loads(line)
    if not (child := os.fork()):
        break
    os.write(answers, f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n".encode())
else:
    sys.exit()

os.dup2(nothing, 0)
log = os.open(told["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(log, 1)
os.dup2(log, 2)
sys.argv = ["vllm", *told["words"]]
sys.exit(main())
