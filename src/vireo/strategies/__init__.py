"""How one model is spread over the processes of a run: whole on each (`replicated`) or in parts (`sharded`, `zero`)."""
