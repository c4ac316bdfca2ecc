"""Benchmark of batchlab and its peers: the same tasks on the same machine, with two workers for each peer.

A peer is another scheduler. `python -m benchmarks.peers install` installs the peers, and `python -m benchmarks.peers
run` measures the peers and prints a table (see `__main__`). The parts are:

    registry        peers, with their virtual environments, packages, and services
    install         virtual environments of the peers
    services        brokers and databases that the peers need
    rounds          order of the measurements, and one driver process for each measurement
    driver          measurement of one peer, in a process of the peer's own virtual environment
    adapters        code that runs tasks with one peer
    workloads       tasks of the workloads W1 to W7N, and the check of their results
    report          medians and tables
    ceilings        request rates of an AWS emulator, as an upper limit for the peers that use SQS

Drivers and workers run in environments without batchlab's dependencies. So all modules except `adapters.batchlab_peer`,
`ceilings`, and the start of the emulator in `services` use only the standard library and the peer's own packages.
"""
