"""Values, ports, messages, and rules that every other package of batchlab uses: the model, the protocol, the commit
of outcomes, prices, and schedules.
"""
