"""A process that trains with others, as test_processes.py starts it: RUN_FILE PORT PROCESS COUNT DEVICES."""

import os
import sys


def main() -> None:
    run_file, port, process, count, devices = sys.argv[1:]
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", int(count), int(process), initialization_timeout=60)
    from maxstack.config import load_run
    from maxstack.train.loop import train
    from maxstack.train.run import RunConfig

    outcome = train(load_run(run_file, RunConfig))
    print(f"ended at step {outcome.step}, stopped by {outcome.stopped_by}", flush=True)


if __name__ == "__main__":
    main()
