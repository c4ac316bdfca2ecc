"""A SimpleDB server for tests, which serves the service's protocol over HTTP. No emulator supports SimpleDB
(docs/contributing/ledger.md).

`expressions` parses Select, `domain` stores items and enforces limits, `server` is the process, and `fixtures` starts
it. Each part refuses what the Developer Guide of API version 2009-04-15 forbids. If the guide leaves a choice, the
server takes the stricter option.
"""
