"""Train a model, as `moe-shard train` does: python -m moe_shard.train MODEL [key=value ...]."""

import signal
import sys

if __name__ == "__main__":
    # Until the command answers it, Ctrl-C ends the process as it ends others: without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    from moe_shard.cli.train import main
    from moe_shard.errors import run_command
    from moe_shard.runtime.signals import finished

    run_command(lambda: finished(main(sys.argv[1:], prog="python -m moe_shard.train")))
