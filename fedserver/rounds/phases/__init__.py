"""One file a phase, each a function `step(round, event) -> (round, actions)`."""
