"""A SimpleDB for tests, which speaks its protocol over HTTP: no emulator has one (docs/ledger.md).

`expressions` reads Select, `domain` keeps items and their limits, `server` is the process, `rig`
starts it. What each refuses is what the Developer Guide of API version 2009-04-15 says; where the
guide leaves a choice, the stricter one is taken.
"""
