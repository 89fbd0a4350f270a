"""A command of several processes with an injected fault: `join_and.py FLAGS --what=kill --where=1 --wait=gather`.

In process `where` happens `what`: "kill" (SIGKILL), "mistake" (UserError), "bug" (another exception) or "nothing". If
something does, the others wait for that process, in a collective of JAX or in `gather`, or are busy in Python, where
other threads have to wait for the interpreter. Process 0 prints what it got.
"""

import os
import signal

import jax.numpy as jnp
from absl import flags
from jax.experimental import multihost_utils

from gptjax import cli
from gptjax.config import UserError
from gptjax.distributed import processes

WHAT = flags.DEFINE_enum("what", "nothing", ["nothing", "kill", "mistake", "bug"], "What happens.")
WHERE = flags.DEFINE_integer("where", 0, "In which process.")
WAIT = flags.DEFINE_enum("wait", "gather", ["gather", "collective", "python"], "What the others do.")


def main() -> None:
    cli.join()
    number = 0 if cli.PROCESS_ID.value is None else cli.PROCESS_ID.value
    numbers = multihost_utils.process_allgather(jnp.array([number])).ravel().tolist()
    print({"gathered": processes.gather([number]), "collective": numbers, "first": processes.of_first(lambda: 7)})
    if WHAT.value == "nothing":
        return
    if number != WHERE.value:
        while WAIT.value == "python":
            sum(range(10**6))
        processes.gather(0) if WAIT.value == "gather" else multihost_utils.process_allgather(jnp.array([number]))
    elif WHAT.value == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif WHAT.value == "mistake":
        raise UserError("the disk is full")
    else:
        raise RuntimeError("a bug")


if __name__ == "__main__":
    cli.run(main, joins=True)
