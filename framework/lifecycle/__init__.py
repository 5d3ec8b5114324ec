"""How a run begins and ends: processes, signals, what is restored and saved."""
