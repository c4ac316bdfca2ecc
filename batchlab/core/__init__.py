"""Values, ports, messages, and rules that every other room uses: the model, the protocol, the
commit point, prices, and schedules."""
