"""Training: the loop, the DeepSpeed engine, optimizer, EMA, telemetry and validation."""
