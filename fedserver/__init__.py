"""The aggregation server: keeps the global model, runs the rounds. It never imports torch."""
