"""Runs `vtok` several times in one process: python several_runs.py '[[PORT, [ARGUMENT]], ...]'

PORT is where the processes of that call meet.
"""

import json
import os
import sys

from vtok_ext.cli.app import run

for port, arguments in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(port)
    code = run(arguments)
    if code:
        sys.exit(code)
