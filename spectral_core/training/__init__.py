"""Training: a loop over a callable model, its configuration and its data. Nothing here knows a pipeline or
a host."""
