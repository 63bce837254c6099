"""`vtok ARGUMENTS...` under torchrun, whose process 1 kills itself the first time.

It dies in the middle of writing its second shard; torchrun then ends the other process and starts
both again.
"""

import os
import signal
import sys

from vtok_ext.cli.app import run
from vtok_ext.data import latent_shards

if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    whole, calls = latent_shards.output_file, []

    def cut(path, op):
        calls.append(path)
        if len(calls) == 3:  # two files each
            path.with_name(f".{path.stem}.0.partial{path.suffix}").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(path, op)

    latent_shards.output_file = cut

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
