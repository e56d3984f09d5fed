"""For users too: the simulated relay, contract suites, doubles, fault plans and the ledger."""
